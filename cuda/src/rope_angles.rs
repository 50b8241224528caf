//! Launcher of `rope_angles.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;

/// `angles[r] = [cos.., sin..]` of `positions[r] * inv_freq[i]`, the product rounded to f32;
/// `angles` is f32 `[rows][2 * inv_freq.len()]`.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit.
pub fn rope_angles(
    gpu: &mut impl Gpu,
    positions: Slice<'_, u32>,
    inv_freq: Slice<'_, f32>,
    mut angles: SliceMut<'_, f32>,
) -> Result<(), GpuError> {
    let (rows, half) = (positions.len(), inv_freq.len());
    assert!(angles.len() >= 2 * rows * half, "angles of {rows} rows, {half} each");
    if rows == 0 || half == 0 {
        return Ok(());
    }
    let params = abi::hat_rope_angles {
        positions: positions.pointer(),
        inv_freq: inv_freq.pointer(),
        angles: angles.pointer(),
        rows: count(rows),
        half: count(half),
    };
    let grid = [count((rows * half).div_ceil(256)), 1, 1];
    // SAFETY: each thread reads one of `rows` positions and one of `half` frequencies, and writes
    // two of `2 * rows * half` angles.
    unsafe { gpu.launch(Launch { kernel: Kernel::RopeAngles, grid }, &params) }
}
