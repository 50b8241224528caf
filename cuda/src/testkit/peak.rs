//! Launcher of `peak.cu`: what a GPU can do at most, for benches.

use crate::abi;
use crate::bound::Work;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;

const THREADS: usize = 256;
/// Bytes that a thread copies.
const VECTOR: usize = 16;
/// Products of one round of a warp, and operations of one m16n8k16.
const ROUND: u64 = 8;
const PRODUCT_FLOPS: u64 = 2 * 16 * 8 * 16;

/// Copies bytes; returns what that is.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If the lengths are not the same multiple of 16.
pub fn copy(
    gpu: &mut impl Gpu,
    from: Slice<'_, u8>,
    mut to: SliceMut<'_, u8>,
) -> Result<Work, GpuError> {
    let bytes = from.len();
    assert!(bytes == to.len() && bytes.is_multiple_of(VECTOR) && bytes > 0, "{bytes} bytes");
    let vectors = bytes / VECTOR;
    let params = abi::hat_peak {
        from: from.vectors().cast(),
        out: to.vectors().cast(),
        vectors: vectors as u64,
        steps: 0,
        reserved: 0,
    };
    let grid = [count(vectors.div_ceil(THREADS)), 1, 1];
    // SAFETY: threads beyond `vectors` touch nothing; both are as long.
    unsafe { gpu.launch(Launch { kernel: Kernel::PeakCopy, grid }, &params) }?;
    Ok(Work { bytes: 2 * bytes as u64, flops: 0 })
}

/// Number formats of the products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductDType {
    /// f16, f32 sums.
    Halves,
    /// Signed bytes, i32 sums: products of twice the depth.
    Bytes,
}

/// Products by `blocks` blocks, `steps` rounds each; returns what they are.
/// `from` has 128 words, `out` 256 numbers of each block.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length is not that, or there is no block.
pub fn multiply(
    gpu: &mut impl Gpu,
    what: ProductDType,
    blocks: usize,
    steps: usize,
    from: Slice<'_, u32>,
    mut out: SliceMut<'_, f32>,
) -> Result<Work, GpuError> {
    assert!(from.len() >= 128 && out.len() >= blocks * THREADS && blocks > 0, "{blocks} blocks");
    let params = abi::hat_peak {
        from: from.vectors(),
        out: out.vectors().cast(),
        vectors: 0,
        steps: count(steps),
        reserved: 0,
    };
    let (kernel, flops) = match what {
        ProductDType::Halves => (Kernel::PeakMultiply, PRODUCT_FLOPS),
        ProductDType::Bytes => (Kernel::PeakMultiplyBytes, 2 * PRODUCT_FLOPS),
    };
    let launch = Launch { kernel, grid: [count(blocks), 1, 1] };
    // SAFETY: each thread reads words below 128 and writes its own number.
    unsafe { gpu.launch(launch, &params) }?;
    let warps = (blocks * THREADS / 32) as u64;
    Ok(Work { bytes: 0, flops: warps * steps as u64 * ROUND * flops })
}
