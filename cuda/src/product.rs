//! Launchers of `gemv.cu`, `linear.cu` and `linear_float.cu`: products with weights, and which
//! kernel one takes.

use std::ffi::c_void;

pub use hat_plan::Write;

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;
use crate::quantise_rows::{BLOCK, Q8};
use crate::table::Table;

/// Rows that one pass of [`gemv`] over the weights serves at most.
pub const ROWS_MAX: usize = 16;
/// Rows of an `mma`: as many or fewer are one pass of half the work.
const ROWS: usize = 8;
/// Rows of a tile: one pass over the weights serves as many.
pub const TILE_ROWS: usize = 64;
/// Outputs of a tile.
const TILE_OUTPUTS: usize = 128;
/// Columns of float matrices are a multiple of this.
pub const COLUMNS: usize = 8;

/// Operands of a product `out[r][n] = sum_k x[r][k] weight[n][k] (+ bias[n])`.
#[derive(Debug)]
pub struct Product<'a, X> {
    /// `[rows][columns]`: int8 blocks ([`Q8`]) for block types, numbers of the weights' own type
    /// ([`crate::quantise_rows::round_rows`]) for float types.
    pub x: X,
    /// `[outputs][columns]`
    pub weight: Table<'a>,
    /// f32 `[outputs]`
    pub bias: Option<Slice<'a, f32>>,
    /// Treatment of `out`'s old content.
    pub write: Write,
    /// f32 `[rows][outputs]`
    pub out: SliceMut<'a, f32>,
}

impl<X> Product<'_, X> {
    /// A grid of tiles of 64 rows and 128 outputs.
    fn tiles(&self, rows: usize) -> [usize; 2] {
        [rows.div_ceil(TILE_ROWS), self.weight.rows().div_ceil(TILE_OUTPUTS)]
    }

    /// Kernel `which` of the `of` that the weights' type has.
    fn kernel(&self, which: usize, of: usize) -> Kernel {
        let numbers = self.weight.numbers();
        let kernels = numbers.products();
        assert_eq!(kernels.len(), of, "kernels for {numbers:?}");
        kernels[which]
    }

    /// Launches a kernel that takes x as it is at `x`, and of q8 its `d` and `s`.
    ///
    /// # Safety
    /// There are as many numbers there as `rows` take.
    unsafe fn launch(
        mut self,
        gpu: &mut impl Gpu,
        kernel: Kernel,
        grid: [usize; 2],
        rows: usize,
        (x, d, s): (*const c_void, *const f32, *const f32),
    ) -> Result<(), GpuError> {
        let outputs = self.weight.rows();
        assert!(self.out.len() >= rows * outputs, "{rows} rows of {outputs} in {}", self.out.len());
        assert!(self.bias.is_none_or(|bias| bias.len() >= outputs), "a bias for {outputs} outputs");
        if rows == 0 || outputs == 0 {
            return Ok(());
        }
        let params = abi::hat_product {
            x,
            d,
            s,
            weight: self.weight.pointer().cast(),
            bias: self.bias.map_or(std::ptr::null(), |bias| bias.pointer()),
            out: self.out.pointer(),
            rows: count(rows),
            columns: count(self.weight.columns()),
            outputs: count(outputs),
            add: u32::from(self.write == Write::Add),
        };
        let grid = [count(grid[0]), count(grid[1]), 1];
        // SAFETY: a block reads panels with outputs below `outputs`, whose padding columns are in
        // the table's bytes, and rows below `rows`; it writes outputs below `outputs`.
        unsafe { gpu.launch(Launch { kernel, grid }, &params) }
    }
}

/// The product with a block type for any number of rows, by the kernel that reads the weights less
/// often, to the bit what CPU backends compute for the same blocks. Both kernels give the same
/// bits, so a row's result does not depend on how many there are.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit, or there is no kernel for the type of the weights.
pub fn linear(gpu: &mut impl Gpu, rows: usize, to: Product<'_, Q8<'_>>) -> Result<(), GpuError> {
    if rows <= ROWS_MAX { gemv(gpu, rows, to) } else { tiled(gpu, rows, to) }
}

/// The same for few rows: a pass over the weights for each [`ROWS_MAX`].
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// As [`linear`].
pub fn gemv(gpu: &mut impl Gpu, rows: usize, to: Product<'_, Q8<'_>>) -> Result<(), GpuError> {
    let few = rows <= ROWS;
    let panels = to.weight.rows().div_ceil(abi::HAT_PANEL as usize);
    let passes = rows.div_ceil(if few { ROWS } else { ROWS_MAX });
    let kernel = to.kernel(usize::from(!few), 3);
    queue(gpu, kernel, [panels, passes], rows, to)
}

/// The same by tiles of [`TILE_ROWS`] rows, also where there are fewer.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// As [`linear`].
pub fn tiled(gpu: &mut impl Gpu, rows: usize, to: Product<'_, Q8<'_>>) -> Result<(), GpuError> {
    queue(gpu, to.kernel(2, 3), to.tiles(rows), rows, to)
}

fn queue(
    gpu: &mut impl Gpu,
    kernel: Kernel,
    grid: [usize; 2],
    rows: usize,
    to: Product<'_, Q8<'_>>,
) -> Result<(), GpuError> {
    let (numbers, Q8 { q, d, s }) = (rows * to.weight.columns(), to.x);
    let blocks = numbers / BLOCK;
    assert!(q.len() >= numbers && d.len() >= blocks && s.len() >= blocks, "x [{rows}]");
    // SAFETY: asserted above.
    unsafe { to.launch(gpu, kernel, grid, rows, (q.vectors().cast(), d.pointer(), s.pointer())) }
}

/// The product with a float type: 32 of K at a time by tensor cores, these sums in sequence in f32.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit, the columns are no multiple of [`COLUMNS`], or there is no kernel for
/// the type of the weights.
pub fn linear_float(
    gpu: &mut impl Gpu,
    rows: usize,
    to: Product<'_, Slice<'_, u16>>,
) -> Result<(), GpuError> {
    let (columns, kernel, grid) = (to.weight.columns(), to.kernel(0, 1), to.tiles(rows));
    assert!(columns.is_multiple_of(COLUMNS), "{columns} columns are no multiple of {COLUMNS}");
    assert!(to.x.len() >= rows * columns, "{rows} rows of {columns} in {}", to.x.len());
    let (x, null) = (to.x.vectors().cast(), std::ptr::null());
    // SAFETY: asserted above.
    unsafe { to.launch(gpu, kernel, grid, rows, (x, null, null)) }
}
