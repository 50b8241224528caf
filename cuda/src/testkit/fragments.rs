//! Launcher of `fragments.cu`: what one operation does to the registers of each lane of a warp.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Number, Slice, SliceMut, count};
use crate::kernel::Kernel;

/// Lanes of a warp.
pub const LANES: usize = 32;
/// Registers of A and B that a lane brings to a product.
pub const PRODUCT_WORDS: usize = 6;

/// A product of matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// f16 with f32 sums, m16n8k16.
    Halves,
    /// bf16 with f32 sums, m16n8k16.
    Bf16,
    /// Signed bytes with i32 sums, m16n8k32.
    Bytes,
    /// The same, m16n8k16: of a lane's words the first two are A, the fifth B.
    Bytes16,
}

/// An operation on rows of 16 bytes in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// `load_matrices`: each lane names a row.
    Load,
    /// `load_matrices_transposed`: likewise.
    LoadTransposed,
    /// `copy_async`: each lane names the place of its row, 32 more for zeros; places differ.
    Copy,
    /// `copy_async_word`, four times for each row: likewise.
    CopyWords,
}

/// Runs an operation over 32 rows of 4 words; `out` gets 4 words of each lane.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length is not that.
pub fn rows(
    gpu: &mut impl Gpu,
    what: Rows,
    from: Slice<'_, u32>,
    lanes: Slice<'_, u32>,
    mut out: SliceMut<'_, u32>,
) -> Result<(), GpuError> {
    assert!(from.len() >= 4 * LANES && out.len() >= 4 * LANES, "32 rows of 4 words");
    assert!(lanes.len() >= LANES, "a number for each lane");
    let kernel = match what {
        Rows::Load => Kernel::FragmentLoad,
        Rows::LoadTransposed => Kernel::FragmentLoadTransposed,
        Rows::Copy => Kernel::FragmentCopy,
        Rows::CopyWords => Kernel::FragmentCopyWords,
    };
    let params = abi::hat_fragments {
        from: from.vectors(),
        out: out.vectors(),
        lanes: lanes.pointer(),
        steps: 0,
        reserved: 0,
    };
    // SAFETY: one warp reads 32 rows and numbers and writes 32 times 4 words; the kernel takes
    // the numbers modulo 32.
    unsafe { gpu.launch(Launch { kernel, grid: [1, 1, 1] }, &params) }
}

/// `steps` products into the same sums. `from` has `[steps][32][6]` registers, `sums` the `[32][4]`
/// of C, which become those of D; whole numbers for bytes, else f32.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length is not that.
pub fn multiply<T: Number>(
    gpu: &mut impl Gpu,
    what: Product,
    steps: usize,
    from: Slice<'_, u32>,
    mut sums: SliceMut<'_, T>,
) -> Result<(), GpuError> {
    assert!(from.len() >= steps * LANES * PRODUCT_WORDS, "{steps} products of 32 lanes");
    assert!(sums.len() >= 4 * LANES && size_of::<T>() == 4, "4 sums of 32 lanes");
    let kernel = match what {
        Product::Halves => Kernel::FragmentMultiply,
        Product::Bf16 => Kernel::FragmentMultiplyBf16,
        Product::Bytes => Kernel::FragmentMultiplyBytes,
        Product::Bytes16 => Kernel::FragmentMultiplyBytes16,
    };
    let params = abi::hat_fragments {
        from: from.vectors(),
        out: sums.vectors().cast(),
        lanes: std::ptr::null(),
        steps: count(steps),
        reserved: 0,
    };
    // SAFETY: one warp reads the registers of all steps and writes 32 times 4 sums.
    unsafe { gpu.launch(Launch { kernel, grid: [1, 1, 1] }, &params) }
}
