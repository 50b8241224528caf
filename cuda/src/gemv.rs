//! Launcher of `gemv.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;
use crate::quantise_rows::{BLOCK, Q8};
use crate::table::{Numbers, Table};

/// Rows that one pass over the weights serves.
pub const ROWS: usize = 8;

/// What happens to the old content of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Overwritten.
    Store,
    /// Added to, with one rounding.
    Add,
}

/// Operands of [`gemv`].
#[derive(Debug)]
pub struct Gemv<'a> {
    /// `[rows][columns]` as int8 blocks.
    pub x: Q8<'a>,
    /// `[outputs][columns]`; q8_0, q4_0 or q4_1.
    pub weight: Table<'a>,
    /// f32 `[outputs]`
    pub bias: Option<Slice<'a, f32>>,
    /// What happens to `out`.
    pub write: Write,
    /// f32 `[rows][outputs]`
    pub out: SliceMut<'a, f32>,
}

/// `out[r][n] = sum_k x[r][k] weight[n][k] (+ bias[n])`. A row's result does not depend on how many
/// there are.
///
/// # Errors
/// If the GPU says no.
///
/// # Panics
/// If a length does not fit, or there is no kernel for the type of the weights.
pub fn gemv(gpu: &mut impl Gpu, rows: usize, mut to: Gemv<'_>) -> Result<(), GpuError> {
    let (columns, outputs) = (to.weight.columns(), to.weight.rows());
    let blocks = rows * columns / BLOCK;
    let Q8 { q, d, s } = to.x;
    assert!(q.len() >= rows * columns && d.len() >= blocks && s.len() >= blocks, "x [{rows}]");
    assert!(to.out.len() >= rows * outputs, "{rows} rows of {outputs} in {}", to.out.len());
    assert!(to.bias.is_none_or(|bias| bias.len() >= outputs), "a bias for {outputs} outputs");
    if rows == 0 || outputs == 0 {
        return Ok(());
    }
    let single = rows == 1;
    let kernel = match to.weight.numbers() {
        Numbers::Q8_0 if single => Kernel::GemvQ80x1,
        Numbers::Q8_0 => Kernel::GemvQ80x8,
        Numbers::Q4_0 if single => Kernel::GemvQ40x1,
        Numbers::Q4_0 => Kernel::GemvQ40x8,
        Numbers::Q4_1 if single => Kernel::GemvQ41x1,
        Numbers::Q4_1 => Kernel::GemvQ41x8,
        other => panic!("gemv has no kernel for {other:?}"),
    };
    let params = abi::hat_gemv {
        q: q.vectors(),
        d: d.pointer(),
        s: s.pointer(),
        weight: to.weight.pointer(),
        bias: to.bias.map_or(std::ptr::null(), |bias| bias.pointer()),
        out: to.out.pointer(),
        rows: count(rows),
        columns: count(columns),
        outputs: count(outputs),
        add: u32::from(to.write == Write::Add),
    };
    let panels = outputs.div_ceil(abi::HAT_PANEL as usize);
    let grid = [count(panels), count(rows.div_ceil(if single { 1 } else { ROWS })), 1];
    // SAFETY: a block reads one panel, whose padding columns are in the table's bytes, and rows
    // below `rows`; it writes outputs below `outputs`.
    unsafe { gpu.launch(Launch { kernel, grid }, &params) }
}
