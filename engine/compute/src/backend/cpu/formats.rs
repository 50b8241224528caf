//! The types of weights: for each, where its parts stand in a panel and how they are unpacked; and
//! the two kernels over all of them, for blocks and for floats.
//!
//! A new block type is an `impl Blocks` and a row of `formats!`.

use std::array::from_fn;
use std::marker::PhantomData;
use std::ops::Range;

use hat_loader::DType;
use hat_loader::layout::{PANEL, Q6K_UNIT_BYTES, panel_block_bytes};

use super::math::Block;
use super::matrix::{Linear, Sums, for_each_panel};
use super::simd::Simd;
use super::threads::Part;

/// The types that have kernels: one row each.
macro_rules! formats {
    ($($row:ident: $format:ty,)*) => {
        /// True if there is a kernel for weights of this type.
        pub(super) fn has_kernel(dtype: DType) -> bool {
            matches!(dtype, $(DType::$row)|*)
        }

        /// Some columns of a matrix, by the type of its weights.
        #[inline(always)]
        pub(super) fn linear(
            s: impl Simd,
            job: &Linear<'_>,
            columns: Range<usize>,
            out: &mut Part<'_, f32>,
        ) {
            match job.weight.dtype {
                $(DType::$row => for_each_panel::<_, $format>(s, job, columns, out),)*
                other => unreachable!("{} is refused when the weight is taken", other.name()),
            }
        }
    };
}

formats! {
    Q4_0: Packed<Q4_0>,
    Q4_1: Packed<Q4_1>,
    Q8_0: Packed<Q8_0>,
    Q6K: Packed<Q6K>,
    F32: Plain<F32>,
    F16: Plain<F16>,
    Bf16: Plain<Bf16>,
}

/// The products of rows with a panel.
pub(super) trait Format: 'static {
    /// Element of a row of activations.
    type Input;

    /// The rows of a product, one after the other.
    fn input<'a>(linear: &Linear<'a>) -> &'a [Self::Input];

    /// The sums of 16 columns for `R` rows.
    fn tile<S: Simd, const R: usize>(s: S, panel: &[u8], rows: [&[Self::Input]; R]) -> Sums<R>;
}

/// A type of blocks. A panel has the same block of 16 columns together: maybe a head, then units
/// of 32 weights of each column.
pub(super) trait Blocks: 'static {
    const DTYPE: DType;
    /// Bytes before the first unit.
    const HEAD: usize = 0;
    /// Bytes of a unit.
    const UNIT: usize = panel_block_bytes(Self::DTYPE);
    /// Offset of a block's 16 f16 scales.
    const SCALE: usize;
    /// Whole scales of a unit, for as many words each; 0 if there are none.
    const SCALES: usize = 0;
    /// Even number that is taken off each weight.
    const OFFSET: i32 = 0;
    /// Words whose sums of pairs of products fit 16 bits: 8 if weights have 4 bits, 4 if they have
    /// 5, 2 if they have 6, 1 if they are signed bytes.
    const DOTS: usize;
    /// Weights are signed bytes.
    const SIGNED: bool = false;

    /// Weights `4 j..4 j + 4` of a unit.
    fn word<S: Simd>(s: S, unit: &[u8], j: usize) -> S::Word;

    /// Whole scales `g` of a unit.
    #[inline(always)]
    fn scales<S: Simd>(s: S, unit: &[u8], g: usize) -> S::Scales {
        let _ = g;
        s.scales(part(unit, 0))
    }

    /// Number that is added to each weight of a unit.
    #[inline(always)]
    fn minimum<S: Simd>(s: S, block: &[u8], unit: &[u8]) -> Option<S::Floats> {
        let _ = (s, block, unit);
        None
    }
}

/// The bytes from `at` on.
#[inline(always)]
fn part<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..].first_chunk().expect("inside the block")
}

/// Word `j` of a plane of nibbles: the low ones are weights 0..16.
#[inline(always)]
fn nibbles<S: Simd>(s: S, plane: &[u8], j: usize) -> S::Word {
    let both = s.word(part(plane, j % 4 * 64));
    s.and(if j < 4 { both } else { s.shr(both, 4) }, 15)
}

pub(super) struct Q4_0;
impl Blocks for Q4_0 {
    const DTYPE: DType = DType::Q4_0;
    const SCALE: usize = 256;
    const OFFSET: i32 = 8;
    const DOTS: usize = 8;

    #[inline(always)]
    fn word<S: Simd>(s: S, unit: &[u8], j: usize) -> S::Word {
        nibbles(s, unit, j)
    }
}

pub(super) struct Q4_1;
impl Blocks for Q4_1 {
    const DTYPE: DType = DType::Q4_1;
    const SCALE: usize = 256;
    const DOTS: usize = 8;

    #[inline(always)]
    fn word<S: Simd>(s: S, unit: &[u8], j: usize) -> S::Word {
        nibbles(s, unit, j)
    }

    #[inline(always)]
    fn minimum<S: Simd>(s: S, _: &[u8], unit: &[u8]) -> Option<S::Floats> {
        Some(s.halves(part(unit, 288)))
    }
}

pub(super) struct Q8_0;
impl Blocks for Q8_0 {
    const DTYPE: DType = DType::Q8_0;
    const SCALE: usize = 512;
    const DOTS: usize = 1;
    const SIGNED: bool = true;

    #[inline(always)]
    fn word<S: Simd>(s: S, unit: &[u8], j: usize) -> S::Word {
        s.word(part(unit, j * 64))
    }
}

pub(super) struct Q6K;
impl Blocks for Q6K {
    const DTYPE: DType = DType::Q6K;
    const HEAD: usize = 2 * PANEL;
    const UNIT: usize = Q6K_UNIT_BYTES;
    const SCALE: usize = 0;
    const SCALES: usize = 2;
    const OFFSET: i32 = 32;
    const DOTS: usize = 2;

    #[inline(always)]
    fn word<S: Simd>(s: S, unit: &[u8], j: usize) -> S::Word {
        let high = s.word(part(unit, (4 + j / 4) * 64));
        let high = match j % 4 {
            0 => s.shl(high, 4),
            1 => s.shl(high, 2),
            2 => high,
            _ => s.shr(high, 2),
        };
        s.or(nibbles(s, unit, j), s.and(high, 0x30))
    }

    #[inline(always)]
    fn scales<S: Simd>(s: S, unit: &[u8], g: usize) -> S::Scales {
        s.scales(part(unit, (24 + g) * PANEL))
    }
}

/// Blocks of weights, which are multiplied with quantised activations.
pub(super) struct Packed<T>(PhantomData<T>);

impl<T: Blocks> Format for Packed<T> {
    type Input = Block;

    #[inline(always)]
    fn input<'a>(linear: &Linear<'a>) -> &'a [Block] {
        linear.blocks
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize>(s: S, panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
        let mut acc = [s.splat(0.0); R];
        let mut at = 0;
        for block in panel.chunks_exact(panel_block_bytes(T::DTYPE)) {
            for unit in block[T::HEAD..].chunks_exact(T::UNIT) {
                s.prefetch(R, unit);
                let a: [&Block; R] = from_fn(|r| &rows[r][at]);
                at += 1;
                let dots = dots::<S, T, R>(s, unit, a);
                let d = s.halves(part(block, T::SCALE));
                for r in 0..R {
                    acc[r] = s.fma(s.to_floats(dots[r]), s.mul(d, s.splat(a[r].d)), acc[r]);
                }
                if let Some(minimum) = T::minimum(s, block, unit) {
                    for r in 0..R {
                        acc[r] = s.fma(minimum, s.splat(a[r].s), acc[r]);
                    }
                }
            }
        }
        arrays(s, acc)
    }
}

/// Exact sums over a unit, times its whole scales.
#[inline(always)]
fn dots<S: Simd, T: Blocks, const R: usize>(s: S, unit: &[u8], rows: [&Block; R]) -> [S::Whole; R] {
    let groups = if T::SCALES == 0 { 1 } else { T::SCALES };
    let words = 8 / groups;
    // Words that are added before the sums are taken into whole numbers.
    let run = if S::DOTS_ARE_I16 && T::DOTS < words { T::DOTS } else { words };
    let offset = if T::SIGNED { S::SIGNED_OFFSET } else { T::OFFSET };
    let mut whole = [s.whole(); R];
    let mut sums = [s.dots(0); R];
    let mut scales = None;
    // Written out: a loop over words is not always unrolled, and all of this is constant.
    macro_rules! words {
        ($($i:literal)*) => {$({
            let g = $i / words;
            if $i % words == 0 && T::SCALES > 0 {
                scales = Some(T::scales(s, unit, g));
            }
            if $i % words == 0 && offset > 0 {
                for r in 0..R {
                    let [first, second] = rows[r].sums.map(i32::from);
                    let all = if groups == 1 { first + second } else { [first, second][g] };
                    sums[r] = s.dots(-(offset / 2) * all);
                    if run < words {
                        whole[r] = add(s, whole[r], sums[r], scales);
                        sums[r] = s.dots(0);
                    }
                }
            }
            // Of nibbles, the two words that stand together.
            let j = if run == 8 { $i / 2 + $i % 2 * 4 } else { $i };
            let word = T::word(s, unit, j);
            for r in 0..R {
                let q = rows[r].q.as_chunks::<4>().0[j];
                sums[r] = if T::SIGNED {
                    s.dot_signed(sums[r], word, q)
                } else {
                    s.dot(sums[r], word, q)
                };
            }
            if ($i + 1) % run == 0 {
                for r in 0..R {
                    whole[r] = add(s, whole[r], sums[r], scales);
                    sums[r] = s.dots(0);
                }
            }
        })*};
    }
    words!(0 1 2 3 4 5 6 7);
    whole
}

#[inline(always)]
fn add<S: Simd>(s: S, whole: S::Whole, dots: S::Dots, scales: Option<S::Scales>) -> S::Whole {
    match scales {
        Some(scales) => s.add_scaled(whole, dots, scales),
        None => s.add(whole, dots),
    }
}

/// The registers of a tile as numbers.
#[inline(always)]
fn arrays<S: Simd, const R: usize>(s: S, acc: [S::Floats; R]) -> Sums<R> {
    let mut sums = [[0.0; PANEL]; R];
    for r in 0..R {
        sums[r] = s.array(acc[r]);
    }
    sums
}

/// A type of single numbers: 16 of one k stand together.
pub(super) trait Numbers: 'static {
    const BYTES: usize;

    fn load<S: Simd>(s: S, bytes: &[u8]) -> S::Floats;
}

/// Single numbers, which are multiplied with activations as they are: one fused multiply-add each,
/// K in sequence.
pub(super) struct Plain<T>(PhantomData<T>);

impl<T: Numbers> Format for Plain<T> {
    type Input = f32;

    #[inline(always)]
    fn input<'a>(linear: &Linear<'a>) -> &'a [f32] {
        linear.x
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize>(s: S, panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
        let mut acc = [s.splat(0.0); R];
        for (k, weights) in panel.chunks_exact(PANEL * T::BYTES).enumerate() {
            let weights = T::load(s, weights);
            for r in 0..R {
                acc[r] = s.fma(s.splat(rows[r][k]), weights, acc[r]);
            }
        }
        arrays(s, acc)
    }
}

macro_rules! numbers {
    ($($name:ident: $bytes:literal, $load:ident;)*) => {$(
        pub(super) struct $name;

        impl Numbers for $name {
            const BYTES: usize = $bytes;

            #[inline(always)]
            fn load<S: Simd>(s: S, bytes: &[u8]) -> S::Floats {
                s.$load(part(bytes, 0))
            }
        }
    )*};
}

numbers! {
    F32: 4, f32s;
    F16: 2, halves;
    Bf16: 2, bf16s;
}
