//! Launcher of `embed.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Memory as _, SliceMut, count};
use crate::kernel::Kernel;
use crate::table::Table;

/// `out[r] = table[tokens[r]]`, `out` f32 `[rows][columns]`. `staging` takes the tokens to the GPU
/// and has room for as many as there are.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a token is not in the table, or a length does not fit.
pub fn embed<G: Gpu>(
    gpu: &mut G,
    tokens: &[u32],
    table: Table<'_>,
    staging: &mut G::Memory,
    mut out: SliceMut<'_, f32>,
) -> Result<(), GpuError> {
    let (rows, columns) = (tokens.len(), table.columns());
    if rows == 0 {
        return Ok(());
    }
    let last = tokens.iter().copied().max().unwrap_or(0) as usize;
    assert!(last < table.rows(), "token {last} of {}", table.rows());
    assert!(out.len() >= rows * columns, "{rows} rows of {columns} in {}", out.len());
    gpu.upload(tokens, staging, 0)?;
    let params = abi::hat_embed {
        tokens: staging.slice().pointer(),
        table: table.pointer(),
        out: out.pointer(),
        columns: count(columns),
        dtype: table.numbers().id(),
    };
    let grid = [count(rows), count(columns.div_ceil(256)), 1];
    // SAFETY: tokens were checked against the table, whose bytes were checked when it was made;
    // `out` has room for all rows.
    unsafe { gpu.launch(Launch { kernel: Kernel::Embed, grid }, &params) }
}
