//! Launcher of `gemv.cu`: products of few rows.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;
use crate::quantise_rows::{BLOCK, Q8};
use crate::table::{Table, WeightDType};

/// Rows that one pass over the weights serves at most.
pub const ROWS_MAX: usize = 16;
/// Rows of an `mma`: as many or fewer are one pass of half the work.
const ROWS: usize = 8;

/// Treatment of the output's old content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Overwritten.
    Store,
    /// The result is added to the old content, with one rounding.
    Add,
}

/// Operands of [`gemv`] and of [`crate::linear::linear`].
#[derive(Debug)]
pub struct Gemv<'a> {
    /// `[rows][columns]` as int8 blocks.
    pub x: Q8<'a>,
    /// `[outputs][columns]`; of a block type.
    pub weight: Table<'a>,
    /// f32 `[outputs]`
    pub bias: Option<Slice<'a, f32>>,
    /// Treatment of `out`'s old content.
    pub write: Write,
    /// f32 `[rows][outputs]`
    pub out: SliceMut<'a, f32>,
}

/// `out[r][n] = sum_k x[r][k] weight[n][k] (+ bias[n])`, to the bit what CPU backends compute for
/// the same blocks; for few rows. [`crate::linear::linear`] takes as many as there are.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit, or there is no kernel for the type of the weights.
pub fn gemv(gpu: &mut impl Gpu, rows: usize, to: Gemv<'_>) -> Result<(), GpuError> {
    let few = rows <= ROWS;
    let kernel = match to.weight.numbers() {
        WeightDType::Q8_0 if few => Kernel::GemvQ80x8,
        WeightDType::Q8_0 => Kernel::GemvQ80x16,
        WeightDType::Q4_0 if few => Kernel::GemvQ40x8,
        WeightDType::Q4_0 => Kernel::GemvQ40x16,
        WeightDType::Q4_1 if few => Kernel::GemvQ41x8,
        WeightDType::Q4_1 => Kernel::GemvQ41x16,
        WeightDType::Q6K if few => Kernel::GemvQ6Kx8,
        WeightDType::Q6K => Kernel::GemvQ6Kx16,
        other => panic!("gemv has no kernel for {other:?}"),
    };
    let panels = to.weight.rows().div_ceil(abi::HAT_PANEL as usize);
    let passes = rows.div_ceil(if few { ROWS } else { ROWS_MAX });
    queue(gpu, kernel, [panels, passes], rows, to)
}

/// A launch of `gemv` or `linear`, whose blocks write outputs and rows that there are, and no
/// others.
pub(crate) fn queue(
    gpu: &mut impl Gpu,
    kernel: Kernel,
    grid: [usize; 2],
    rows: usize,
    mut to: Gemv<'_>,
) -> Result<(), GpuError> {
    let (columns, outputs) = (to.weight.columns(), to.weight.rows());
    let blocks = rows * columns / BLOCK;
    let Q8 { q, d, s } = to.x;
    assert!(q.len() >= rows * columns && d.len() >= blocks && s.len() >= blocks, "x [{rows}]");
    assert!(to.out.len() >= rows * outputs, "{rows} rows of {outputs} in {}", to.out.len());
    assert!(to.bias.is_none_or(|bias| bias.len() >= outputs), "a bias for {outputs} outputs");
    if rows == 0 || outputs == 0 {
        return Ok(());
    }
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
    let grid = [count(grid[0]), count(grid[1]), 1];
    // SAFETY: a block reads panels with outputs below `outputs`, whose padding columns are in the
    // table's bytes, and rows below `rows`; it writes outputs below `outputs`.
    unsafe { gpu.launch(Launch { kernel, grid }, &params) }
}
