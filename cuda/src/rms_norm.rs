//! Launcher of `rms_norm.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;

/// Operands of [`rms_norm`] beside its rows.
#[derive(Debug)]
pub struct RmsNorm<'a> {
    /// f32 `[columns]`; `columns` is a multiple of 4.
    pub weight: Slice<'a, f32>,
    /// Term added to the mean of squares.
    pub eps: f32,
    /// f32 `[rows][columns]`
    pub out: SliceMut<'a, f32>,
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each row of `x`, `[rows][columns]`.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit.
pub fn rms_norm(
    gpu: &mut impl Gpu,
    rows: usize,
    x: Slice<'_, f32>,
    mut to: RmsNorm<'_>,
) -> Result<(), GpuError> {
    let columns = to.weight.len();
    if rows == 0 {
        return Ok(());
    }
    assert!(columns > 0 && columns.is_multiple_of(4), "{columns} columns");
    let fits = x.len() >= rows * columns && to.out.len() >= rows * columns;
    assert!(fits, "{rows} rows of {columns}");
    let launch = Launch { kernel: Kernel::RmsNorm, grid: [count(rows), 1, 1] };
    let params = abi::hat_rms_norm {
        x: x.vectors(),
        weight: to.weight.vectors(),
        out: to.out.vectors(),
        columns: count(columns),
        eps: to.eps,
    };
    // SAFETY: one block a row; each touches `columns` numbers of its row, as asserted.
    unsafe { gpu.launch(launch, &params) }
}
