//! Launcher of `linear.cu`, and which kernel a product takes.

use crate::gemv::{self, Gemv, gemv};
use crate::gpu::{Gpu, GpuError};
use crate::kernel::Kernel;
use crate::table::WeightDType;

/// Rows of a tile: one pass over the weights serves as many.
pub const TILE_ROWS: usize = 64;
/// Outputs of a tile.
pub(crate) const TILE_OUTPUTS: usize = 128;

/// `out[r][n] = sum_k x[r][k] weight[n][k] (+ bias[n])` for any number of rows, by the kernel that
/// reads the weights less often. Both give the same bits, so a row's result does not depend on how
/// many there are.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit, or there is no kernel for the type of the weights.
pub fn linear(gpu: &mut impl Gpu, rows: usize, to: Gemv<'_>) -> Result<(), GpuError> {
    if rows <= gemv::ROWS_MAX { gemv(gpu, rows, to) } else { tiled(gpu, rows, to) }
}

/// The same by tiles of [`TILE_ROWS`] rows, also where there are fewer.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit, or there is no kernel for the type of the weights.
pub fn tiled(gpu: &mut impl Gpu, rows: usize, to: Gemv<'_>) -> Result<(), GpuError> {
    let kernel = match to.weight.numbers() {
        WeightDType::Q8_0 => Kernel::LinearQ80,
        WeightDType::Q4_0 => Kernel::LinearQ40,
        WeightDType::Q4_1 => Kernel::LinearQ41,
        WeightDType::Q6K => Kernel::LinearQ6K,
        other => panic!("linear has no kernel for {other:?}"),
    };
    let grid = [rows.div_ceil(TILE_ROWS), to.weight.rows().div_ceil(TILE_OUTPUTS)];
    gemv::queue(gpu, kernel, grid, rows, to)
}
