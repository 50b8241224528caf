//! Launchers of `quantise_rows.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;
use crate::table::Numbers;

/// What a report says of a row with a number that is not finite.
pub const NOT_FINITE: u32 = abi::HAT_NOT_FINITE;

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
/// If the GPU says no.
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
        x: x.pointer().cast_mut(), // only read
        q: to.q.pointer(),
        d: to.d.pointer(),
        s: to.s.pointer(),
        blocks: (x.len() / BLOCK) as u64,
    };
    queue_blocks(gpu, Kernel::QuantiseQ8, &params)
}

/// All numbers of `x` from blocks.
///
/// # Errors
/// If the GPU says no.
///
/// # Panics
/// If a length does not fit.
pub fn dequantise_q8(
    gpu: &mut impl Gpu,
    from: Q8<'_>,
    mut x: SliceMut<'_, f32>,
) -> Result<(), GpuError> {
    assert_blocks(x.len(), from.q.len(), from.d.len(), from.s.len());
    let params = abi::hat_q8 {
        x: x.pointer(),
        q: from.q.pointer().cast_mut(), // only read
        d: from.d.pointer().cast_mut(),
        s: from.s.pointer().cast_mut(),
        blocks: (x.len() / BLOCK) as u64,
    };
    queue_blocks(gpu, Kernel::DequantiseQ8, &params)
}

fn queue_blocks(gpu: &mut impl Gpu, kernel: Kernel, params: &abi::hat_q8) -> Result<(), GpuError> {
    if params.blocks == 0 {
        return Ok(());
    }
    let grid = [count((params.blocks as usize).div_ceil(8)), 1, 1];
    // SAFETY: a warp touches one block below `blocks`; all lengths were asserted for that many.
    unsafe { gpu.launch(Launch { kernel, grid }, params) }
}

/// Rows to f16 as they cross the wire: beyond +-65504 cut to that. `report[r]` is the number of
/// those, or [`NOT_FINITE`].
///
/// # Errors
/// If the GPU says no.
///
/// # Panics
/// If a length does not fit, or the columns are not even.
pub fn narrow_f16(
    gpu: &mut impl Gpu,
    columns: usize,
    x: Slice<'_, f32>,
    mut half: SliceMut<'_, u16>,
    report: SliceMut<'_, u32>,
) -> Result<(), GpuError> {
    assert!(half.len() >= x.len(), "{} numbers in {}", x.len(), half.len());
    let x_pointer = x.vectors().cast_mut(); // only read
    queue_rows(gpu, Kernel::NarrowF16, columns, x.len(), (x_pointer, half.vectors()), report)
}

/// Rows from f16. `report[r]` is 0 or [`NOT_FINITE`].
///
/// # Errors
/// If the GPU says no.
///
/// # Panics
/// If a length does not fit, or the columns are not even.
pub fn widen_f16(
    gpu: &mut impl Gpu,
    columns: usize,
    half: Slice<'_, u16>,
    mut x: SliceMut<'_, f32>,
    report: SliceMut<'_, u32>,
) -> Result<(), GpuError> {
    assert!(x.len() >= half.len(), "{} numbers in {}", half.len(), x.len());
    let half_pointer = half.vectors().cast_mut(); // only read
    queue_rows(gpu, Kernel::WidenF16, columns, half.len(), (x.vectors(), half_pointer), report)
}

/// Numbers to the nearest of f16 or of bf16, as a product of matrices takes them; what is too large
/// is infinite, so that nobody takes the product for a number.
///
/// # Errors
/// If the GPU says no.
///
/// # Panics
/// If a length does not fit, is odd, or the type is another one.
pub fn round_rows(
    gpu: &mut impl Gpu,
    numbers: Numbers,
    x: Slice<'_, f32>,
    mut out: SliceMut<'_, u16>,
) -> Result<(), GpuError> {
    let kernel = match numbers {
        Numbers::F16 => Kernel::RoundF16,
        Numbers::Bf16 => Kernel::RoundBf16,
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

fn queue_rows(
    gpu: &mut impl Gpu,
    kernel: Kernel,
    columns: usize,
    numbers: usize,
    (x, half): (*mut f32, *mut u16),
    mut report: SliceMut<'_, u32>,
) -> Result<(), GpuError> {
    // A thread counts in 16 bits; a row is shorter.
    let fits = columns.is_multiple_of(2) && (1..65536).contains(&columns);
    assert!(fits && numbers.is_multiple_of(columns), "{numbers} numbers, {columns} columns");
    let rows = numbers / columns;
    assert!(report.len() >= rows, "reports of {rows} rows in {}", report.len());
    if rows == 0 {
        return Ok(());
    }
    let (report, columns) = (report.pointer(), count(columns));
    let params = abi::hat_f16_rows { x, half, report, columns, reserved: 0 };
    let grid = [count(rows), 1, 1];
    // SAFETY: one block a row; the callers asserted that both sides hold all rows.
    unsafe { gpu.launch(Launch { kernel, grid }, &params) }
}
