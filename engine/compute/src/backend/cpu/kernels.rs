//! Table of the functions that a level of the instruction set supplies.
//!
//! A level other than the portable one gives its table away only on a CPU that has its
//! instructions, so holding a table is the proof that its functions may be called.

use std::ops::Range;

use super::attend::{AttendScratch, AttendTask};
use super::math::Block;
use super::matrix::Linear;
use super::threads::Part;

/// The kernels of one level; same bits in each. Formulas are in `math.rs`.
pub(super) struct Kernels {
    /// Name of the level, for messages.
    pub(super) name: &'static str,
    pub(super) quantise_row: fn(x: &[f32], out: &mut [Block]),
    pub(super) rms_norm_row: fn(x: &[f32], weight: &[u8], eps: f32, out: &mut [f32]),
    /// f32 to f16, to nearest, ties to even; both have the same length.
    pub(super) f32_to_f16: fn(from: &[f32], to: &mut [u16]),
    /// cos and sin of `position * inv_freq`; `angles` is twice as long as `inv_freq`.
    pub(super) rope_angles_row: fn(position: u32, inv_freq: &[f32], angles: &mut [f32]),
    pub(super) rotate: fn(head: &mut [f32], angles: &[f32]),
    /// All query heads of one key/value head, for some rows; `at` is where `out` begins for them:
    /// row and column.
    pub(super) attend:
        fn(&AttendTask<'_>, &mut AttendScratch, out: &mut Part<'_, f32>, at: (usize, usize)),
    /// The columns of a matrix; `out` has these columns of all rows. Starts at a whole panel.
    pub(super) linear: fn(&Linear<'_>, columns: Range<usize>, out: &mut Part<'_, f32>),
}
