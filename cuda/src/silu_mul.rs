//! Launcher of `silu_mul.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;

/// `gate = gate / (1 + exp(-gate)) * up`; the length is a multiple of 4.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit.
pub fn silu_mul(
    gpu: &mut impl Gpu,
    mut gate: SliceMut<'_, f32>,
    up: Slice<'_, f32>,
) -> Result<(), GpuError> {
    let numbers = gate.len();
    assert!(numbers == up.len() && numbers.is_multiple_of(4), "{numbers} gates, {}", up.len());
    if numbers == 0 {
        return Ok(());
    }
    let out = gate.vectors();
    let params = abi::hat_silu_mul { gate: out, up: up.vectors(), out, count: numbers as u64 };
    let grid = [count(numbers.div_ceil(1024)), 1, 1];
    // SAFETY: each thread touches four numbers below `count`, in place.
    unsafe { gpu.launch(Launch { kernel: Kernel::SiluMul, grid }, &params) }
}
