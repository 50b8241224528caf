//! Launcher of `linear_float.cu`: products of f16 and bf16 matrices.

use crate::abi;
use crate::gemv::Write;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;
use crate::linear::{TILE_OUTPUTS, TILE_ROWS};
use crate::table::{Table, WeightDType};

/// Columns are a multiple of this.
pub const COLUMNS: usize = 8;

/// Operands of [`linear_float`].
#[derive(Debug)]
pub struct LinearFloat<'a> {
    /// `[rows][columns]`, of the weights' type: [`crate::quantise_rows::round_rows`].
    pub x: Slice<'a, u16>,
    /// `[outputs][columns]`, f16 or bf16.
    pub weight: Table<'a>,
    /// f32 `[outputs]`
    pub bias: Option<Slice<'a, f32>>,
    /// Treatment of `out`'s old content.
    pub write: Write,
    /// f32 `[rows][outputs]`
    pub out: SliceMut<'a, f32>,
}

/// `out[r][n] = sum_k x[r][k] weight[n][k] (+ bias[n])`: 32 of K at a time by tensor cores, these
/// sums in sequence in f32.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit, the columns are no multiple of [`COLUMNS`], or the weights are of
/// another type.
pub fn linear_float(
    gpu: &mut impl Gpu,
    rows: usize,
    mut to: LinearFloat<'_>,
) -> Result<(), GpuError> {
    let (columns, outputs) = (to.weight.columns(), to.weight.rows());
    let kernel = match to.weight.numbers() {
        WeightDType::F16 => Kernel::LinearF16,
        WeightDType::Bf16 => Kernel::LinearBf16,
        other => panic!("linear_float has no kernel for {other:?}"),
    };
    assert!(columns.is_multiple_of(COLUMNS), "{columns} columns are no multiple of {COLUMNS}");
    assert!(to.x.len() >= rows * columns, "{rows} rows of {columns} in {}", to.x.len());
    assert!(to.out.len() >= rows * outputs, "{rows} rows of {outputs} in {}", to.out.len());
    assert!(to.bias.is_none_or(|bias| bias.len() >= outputs), "a bias for {outputs} outputs");
    if rows == 0 || outputs == 0 {
        return Ok(());
    }
    let params = abi::hat_linear_float {
        x: to.x.vectors(),
        weight: to.weight.pointer().cast(),
        bias: to.bias.map_or(std::ptr::null(), |bias| bias.pointer()),
        out: to.out.pointer(),
        rows: count(rows),
        columns: count(columns),
        outputs: count(outputs),
        add: u32::from(to.write == Write::Add),
    };
    let grid = [count(rows.div_ceil(TILE_ROWS)), count(outputs.div_ceil(TILE_OUTPUTS)), 1];
    // SAFETY: a block reads panels with outputs below `outputs`, whose padding columns are in the
    // table's bytes, and rows below `rows`; it writes outputs below `outputs`.
    unsafe { gpu.launch(Launch { kernel, grid }, &params) }
}
