//! Launchers of `quantise_rows.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;
use crate::table::WeightDType;

/// Numbers that share a scale.
pub const BLOCK: usize = abi::HAT_BLOCK as usize;

/// Rows in int8 blocks, to read: `x = d q`.
#[derive(Clone, Copy, Debug)]
pub struct Q8<'a> {
    /// `[rows][columns]`
    pub q: Slice<'a, i8>,
    /// `[rows][columns / 32]`
    pub d: Slice<'a, f32>,
    /// `[rows][columns / 32]`: d times the sum of the block's q.
    pub s: Slice<'a, f32>,
}

/// Rows in int8 blocks, to write; fields as in [`Q8`].
#[derive(Debug)]
pub struct Q8Mut<'a> {
    /// `[rows][columns]`
    pub q: SliceMut<'a, i8>,
    /// `[rows][columns / 32]`
    pub d: SliceMut<'a, f32>,
    /// `[rows][columns / 32]`
    pub s: SliceMut<'a, f32>,
}

fn assert_blocks(numbers: usize, q: usize, d: usize, s: usize) {
    assert!(numbers.is_multiple_of(BLOCK), "{numbers} numbers are no whole blocks");
    let blocks = numbers / BLOCK;
    assert!(q >= numbers && d >= blocks && s >= blocks, "{numbers} numbers in {q}, {d}, {s}");
}

/// All numbers of `x` to blocks: `d = max |x| / 127`, `q` the nearest whole number.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit.
pub fn quantise_q8(
    gpu: &mut impl Gpu,
    x: Slice<'_, f32>,
    mut to: Q8Mut<'_>,
) -> Result<(), GpuError> {
    assert_blocks(x.len(), to.q.len(), to.d.len(), to.s.len());
    let params = abi::hat_q8 {
        x: x.pointer(),
        q: to.q.pointer(),
        d: to.d.pointer(),
        s: to.s.pointer(),
        blocks: (x.len() / BLOCK) as u64,
    };
    if params.blocks == 0 {
        return Ok(());
    }
    let grid = [count((params.blocks as usize).div_ceil(8)), 1, 1];
    let launch = Launch { kernel: Kernel::QuantiseQ8, grid };
    // SAFETY: a warp touches one block below `blocks`; all lengths were asserted for that many.
    unsafe { gpu.launch(launch, &params) }
}

/// Numbers to the nearest of f16 or of bf16, as a product of matrices takes them; what is too large
/// is infinite, so that nobody takes the product for a number.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit, is odd, or the type is another one.
pub fn round_rows(
    gpu: &mut impl Gpu,
    numbers: WeightDType,
    x: Slice<'_, f32>,
    mut out: SliceMut<'_, u16>,
) -> Result<(), GpuError> {
    let kernel = match numbers {
        WeightDType::F16 => Kernel::RoundF16,
        WeightDType::Bf16 => Kernel::RoundBf16,
        other => panic!("numbers are not rounded to {other:?}"),
    };
    assert!(x.len().is_multiple_of(2) && out.len() >= x.len(), "{} in {}", x.len(), out.len());
    if x.is_empty() {
        return Ok(());
    }
    let params = abi::hat_round { x: x.vectors(), out: out.vectors(), count: x.len() as u64 };
    let grid = [count(x.len().div_ceil(512)), 1, 1];
    // SAFETY: a thread touches a pair below `count`; both lengths were asserted.
    unsafe { gpu.launch(Launch { kernel, grid }, &params) }
}
