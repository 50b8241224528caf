//! Instructions that every level has; the kernels are written once over them.
//!
//! Everything here and in the kernels is `inline(always)`, down to the intrinsics: [`Simd::run`]
//! enters the level, and what it runs is compiled for that. A closure that calls an intrinsic is
//! not inlined so, nor is one that the standard library calls; loops with constant ends are.

use super::math::{self, Block};

/// A word of 4 bytes of each of 16 columns.
pub(super) type WordBytes = [u8; 64];

/// Work that is compiled for the level that runs it. `run` is `inline(always)`.
pub(super) trait Job {
    /// Its result.
    type Output;

    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// The instructions of a level, over 16 numbers at a time: one for each column of a panel, for 16
/// keys, or for 16 dimensions. A value proves that this CPU has them.
///
/// Exact sums of products of bytes: a *word* is 4 bytes of each column, `dot` adds their products
/// with 4 activations to [`Simd::Dots`], and `add` takes these into [`Simd::Whole`].
pub(super) trait Simd: Copy + Send + Sync + 'static {
    /// f32
    type Floats: Copy;
    /// i32
    type Whole: Copy;
    /// 4 bytes each.
    type Word: Copy;
    /// Sums of products of bytes: i32, or two i16 that are added up later ([`Simd::DOTS_ARE_I16`]).
    type Dots: Copy;
    /// Whole numbers of a byte, that multiply [`Simd::Dots`].
    type Scales: Copy;

    /// Name of the level, for messages.
    const NAME: &'static str;
    /// Rows of the largest tile of a product: 4 or 8.
    const ROWS: usize;
    /// Queries of attention at a time: 2 to 4, as the registers allow.
    const QUERIES: usize;
    /// Runs of 16 dimensions of attention at a time: 2 or 4.
    const RUNS: usize;
    /// True if `Dots` hold the products of a few words alone ([`super::formats::Blocks::DOTS`]).
    const DOTS_ARE_I16: bool;
    /// Excess of each weight in `dot_signed`.
    const SIGNED_OFFSET: i32;

    /// Runs a job inside the level.
    fn run<J: Job>(self, job: J) -> J::Output;

    /// The same number 16 times.
    fn splat(self, x: f32) -> Self::Floats;
    fn floats(self, x: &[f32; 16]) -> Self::Floats;
    /// f32 numbers, from bytes.
    #[inline(always)]
    fn f32s(self, x: &[u8; 64]) -> Self::Floats {
        self.floats(&bytemuck::cast(*x))
    }
    /// f16 numbers, exact.
    fn halves(self, x: &[u8; 32]) -> Self::Floats;
    /// bf16 numbers, exact.
    fn bf16s(self, x: &[u8; 32]) -> Self::Floats;
    fn array(self, x: Self::Floats) -> [f32; 16];
    /// f16, to nearest, ties to even.
    #[inline(always)]
    fn to_halves(self, x: &[f32; 16]) -> [u16; 16] {
        x.map(math::f32_to_f16)
    }
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`, fused.
    fn fma(self, a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// The largest of 32, by folding the upper half onto the lower.
    #[inline(always)]
    fn largest(self, x: [Self::Floats; 2]) -> f32 {
        fold(x.map(|x| self.array(x)), |a, b| if a > b { a } else { b })
    }
    /// The sum of 32, by folding the upper half onto the lower.
    #[inline(always)]
    fn total(self, x: [Self::Floats; 2]) -> f32 {
        fold(x.map(|x| self.array(x)), |a, b| a + b)
    }

    fn word(self, bytes: &WordBytes) -> Self::Word;
    /// Each byte with the same bits.
    fn and(self, a: Self::Word, bits: u8) -> Self::Word;
    fn or(self, a: Self::Word, b: Self::Word) -> Self::Word;
    /// Each byte shifted by less than 8; bits of its neighbour may come in.
    fn shl(self, a: Self::Word, bits: i32) -> Self::Word;
    /// As `shl`, to the right.
    fn shr(self, a: Self::Word, bits: i32) -> Self::Word;

    /// Sums that begin at twice a number.
    fn dots(self, half: i32) -> Self::Dots;
    /// Adds products of bytes below 128 with activations.
    fn dot(self, dots: Self::Dots, word: Self::Word, q: [i8; 4]) -> Self::Dots;
    /// Adds products of signed bytes, each of them `SIGNED_OFFSET` too large, with activations.
    fn dot_signed(self, dots: Self::Dots, word: Self::Word, q: [i8; 4]) -> Self::Dots;
    fn whole(self) -> Self::Whole;
    fn add(self, whole: Self::Whole, dots: Self::Dots) -> Self::Whole;
    /// Signed bytes.
    fn scales(self, bytes: &[u8; 16]) -> Self::Scales;
    fn add_scaled(self, whole: Self::Whole, dots: Self::Dots, scales: Self::Scales) -> Self::Whole;
    /// f32 of whole numbers below 2^24 in magnitude.
    fn to_floats(self, whole: Self::Whole) -> Self::Floats;

    /// Asks for the bytes of a later block, for a tile of so many rows.
    #[inline(always)]
    fn prefetch(self, rows: usize, block: &[u8]) {
        let _ = (rows, block);
    }

    /// As [`math::quantise_row`].
    #[inline(always)]
    fn quantise_row(self, x: &[f32], out: &mut [Block]) {
        math::quantise_row(x, out);
    }
}

/// As [`math::f32_to_f16_all`].
#[inline(always)]
pub(super) fn f32_to_f16(s: impl Simd, from: &[f32], to: &mut [u16]) {
    let (from, rest) = from.as_chunks::<16>();
    let (to, to_rest) = to.as_chunks_mut::<16>();
    for (from, to) in from.iter().zip(to) {
        *to = s.to_halves(from);
    }
    math::f32_to_f16_all(rest, to_rest);
}

/// Converts a run of f16; both have the same length.
#[inline(always)]
pub(super) fn f16_to_f32(s: impl Simd, from: &[u16], to: &mut [f32]) {
    let (from, rest) = from.as_chunks::<16>();
    let (to, to_rest) = to.as_chunks_mut::<16>();
    for (from, to) in from.iter().zip(to) {
        *to = s.array(s.halves(bytemuck::cast_ref(from)));
    }
    for (to, from) in to_rest.iter_mut().zip(rest) {
        *to = math::f16_to_f32(*from);
    }
}

/// Folds the upper half onto the lower until one number is left.
#[inline(always)]
fn fold(x: [[f32; 16]; 2], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut x: [f32; 32] = bytemuck::cast(x);
    let mut half = x.len() / 2;
    while half > 0 {
        for i in 0..half {
            x[i] = f(x[i], x[i + half]);
        }
        half /= 2;
    }
    x[0]
}

/// Methods of [`Simd`], in `unsafe` where they are a level's intrinsics.
macro_rules! instructions {
    ($(fn $name:ident($self:ident $(, $arg:ident: $ty:ty)*) -> $out:ty $body:block)*) => {$(
        #[inline(always)]
        fn $name($self $(, $arg: $ty)*) -> $out $body
    )*};
    (unsafe $(fn $name:ident($self:ident $(, $arg:ident: $ty:ty)*) -> $out:ty $body:block)*) => {$(
        #[inline(always)]
        #[allow(unused_unsafe, reason = "some only call others")]
        fn $name($self $(, $arg: $ty)*) -> $out {
            // SAFETY: `self` proves that this CPU has the instructions; loads are of references.
            unsafe { $body }
        }
    )*};
}
pub(super) use instructions;

/// [`Simd::run`] of a level with these instructions.
macro_rules! run_inside {
    ($features:literal) => {
        #[inline(always)]
        fn run<J: Job>(self, job: J) -> J::Output {
            #[target_feature(enable = $features)]
            fn inside<J: Job>(s: impl Simd, job: J) -> J::Output {
                job.run(s)
            }
            // SAFETY: `self` is made only by `kernels`, which has checked that this CPU has them.
            unsafe { inside(self, job) }
        }
    };
}
pub(super) use run_inside;
