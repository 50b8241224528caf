//! The functions that each level supplies, with the same bits. Formulas are in `math.rs`.

use std::ops::Range;

use super::attend::{AttendScratch, AttendTask, attend_task};
use super::math::{self, Block};
use super::matrix::Linear;
use super::simd::{Job, Simd};
use super::threads::Part;
use super::{formats, simd};

/// Methods of [`Kernels`], each compiled for the level that it runs on.
macro_rules! kernels {
    ($s:ident: $($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $body:block)*) => {
        /// The kernels of a level. A level other than the portable one gives itself away only on a
        /// CPU that has its instructions.
        pub(super) trait Kernels: Sync {
            /// Name of the level, for messages.
            fn name(&self) -> &'static str;
            $($(#[$doc])* fn $name(&self, $($arg: $ty),*);)*
        }

        impl<S: Simd> Kernels for S {
            fn name(&self) -> &'static str {
                S::NAME
            }

            $(fn $name(&self, $($arg: $ty),*) {
                struct Call<A>(A);

                impl Job for Call<($($ty,)*)> {
                    type Output = ();

                    #[inline(always)]
                    fn run<S: Simd>(self, $s: S) {
                        let _ = $s;
                        let Self(($($arg,)*)) = self;
                        $body
                    }
                }

                self.run(Call(($($arg,)*)));
            })*
        }
    };
}

kernels! { s:
    fn quantise_row(x: &[f32], out: &mut [Block]) { Simd::quantise_row(s, x, out) }
    fn rms_norm_row(x: &[f32], weight: &[u8], eps: f32, out: &mut [f32]) {
        math::rms_norm_row(x, weight, eps, out)
    }
    /// f32 to f16, to nearest, ties to even; both have the same length.
    fn f32_to_f16(from: &[f32], to: &mut [u16]) { simd::f32_to_f16(s, from, to) }
    /// cos and sin of `position * inv_freq`; `angles` is twice as long as `inv_freq`.
    fn rope_angles_row(position: u32, inv_freq: &[f32], angles: &mut [f32]) {
        math::rope_angles_row(position, inv_freq, angles)
    }
    fn rotate(head: &mut [f32], angles: &[f32]) { math::rotate(head, angles) }
    /// All query heads of one key/value head, for some rows; `at` is where `out` begins for them:
    /// row and column.
    fn attend(
        task: &AttendTask<'_>,
        scratch: &mut AttendScratch,
        out: &mut Part<'_, f32>,
        at: (usize, usize)
    ) {
        attend_task(s, task, scratch, out, at)
    }
    /// The columns of a matrix; `out` has these columns of all rows. Starts at a whole panel.
    fn linear(job: &Linear<'_>, columns: Range<usize>, out: &mut Part<'_, f32>) {
        formats::linear(s, job, columns, out)
    }
}
