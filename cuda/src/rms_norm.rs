//! Launcher of `rms_norm.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;

/// Operands of [`rms_norm`] and [`add_rms_norm`].
#[derive(Debug)]
pub struct RmsNorm<'a> {
    /// f32 `[columns]`; `columns` is a multiple of 4.
    pub weight: Slice<'a, f32>,
    /// Added to the mean of squares.
    pub eps: f32,
    /// f32 `[rows][columns]`
    pub out: SliceMut<'a, f32>,
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each row of `x`, `[rows][columns]`.
///
/// # Errors
/// If the GPU says no.
///
/// # Panics
/// If a length does not fit.
pub fn rms_norm(
    gpu: &mut impl Gpu,
    rows: usize,
    x: Slice<'_, f32>,
    to: RmsNorm<'_>,
) -> Result<(), GpuError> {
    // The kernel writes x only if there is something to add.
    queue(gpu, rows, x.len(), x.vectors().cast_mut(), std::ptr::null(), to)
}

/// `x += add`, then as [`rms_norm`].
///
/// # Errors
/// If the GPU says no.
///
/// # Panics
/// If a length does not fit.
pub fn add_rms_norm(
    gpu: &mut impl Gpu,
    rows: usize,
    mut x: SliceMut<'_, f32>,
    add: Slice<'_, f32>,
    to: RmsNorm<'_>,
) -> Result<(), GpuError> {
    assert!(add.len() >= rows * to.weight.len(), "numbers to add: {}", add.len());
    queue(gpu, rows, x.len(), x.vectors(), add.vectors(), to)
}

fn queue(
    gpu: &mut impl Gpu,
    rows: usize,
    x_len: usize,
    x: *mut f32,
    add: *const f32,
    mut to: RmsNorm<'_>,
) -> Result<(), GpuError> {
    let columns = to.weight.len();
    if rows == 0 {
        return Ok(());
    }
    assert!(columns > 0 && columns.is_multiple_of(4), "{columns} columns");
    assert!(x_len >= rows * columns && to.out.len() >= rows * columns, "{rows} rows of {columns}");
    let launch = Launch { kernel: Kernel::RmsNorm, grid: [count(rows), 1, 1] };
    let params = abi::hat_rms_norm {
        x,
        add,
        weight: to.weight.vectors(),
        out: to.out.vectors(),
        columns: count(columns),
        eps: to.eps,
    };
    // SAFETY: one block a row; each touches `columns` numbers of its row, as asserted.
    unsafe { gpu.launch(launch, &params) }
}
