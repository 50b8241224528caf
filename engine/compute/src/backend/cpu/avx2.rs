//! AVX2 with FMA and F16C: 8 columns in a register.
//!
//! Dot products stay in 16 bits as long as they fit: a pair of products of nibbles is at most
//! 2 * 15 * 127 = 3810, eight of them 30480. Bytes can't (2 * 255 * 127 saturates), so signed ones
//! multiply magnitudes with the weight's sign moved to the activation.

use std::arch::x86_64::*;

use super::kernels::Kernels;
use super::simd::{Job, Simd, WordBytes, instructions, run_inside};

/// Distance of the prefetch, in bytes. It runs on into the next panel.
const AHEAD: usize = 4096;

/// The proof that this CPU has the instructions.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// The kernels of this level, or the instruction set that this CPU lacks.
pub(super) fn kernels() -> Result<&'static dyn Kernels, &'static str> {
    need!("avx2" "fma" "f16c");
    Ok(&Avx2(()))
}

/// Gives up where this CPU lacks an instruction set.
macro_rules! need {
    ($($name:tt)*) => {
        $(if !is_x86_feature_detected!($name) {
            return Err($name);
        })*
    };
}
pub(super) use need;

/// The same of both registers of 8 columns.
macro_rules! both {
    ($h:ident => $one:expr) => {
        [
            {
                let $h = 0;
                $one
            },
            {
                let $h = 1;
                $one
            },
        ]
    };
}

/// Folds the upper half of 8 numbers onto the lower until one is left.
macro_rules! fold {
    ($eight:expr, $four:ident, $one:ident) => {{
        let eight = $eight;
        let four = $four(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = $four(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32($one(two, _mm_movehdup_ps(two)))
    }};
}
pub(super) use fold;

/// Hides a value from the optimiser, which else re-associates the integer sums over the unrolled
/// steps (exact, but it keeps all products alive at once and spills).
#[inline]
#[target_feature(enable = "avx2")]
fn pin(mut v: __m256i) -> __m256i {
    // SAFETY: the assembly is a comment; it reads and writes nothing but the register of `v`.
    unsafe {
        std::arch::asm!(
            "/* {0} */",
            inout(ymm_reg) v,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    v
}

impl Simd for Avx2 {
    type Floats = [__m256; 2];
    type Whole = [__m256i; 2];
    type Word = [__m256i; 2];
    type Dots = [__m256i; 2];
    type Scales = [__m256i; 2];

    const NAME: &'static str = "avx2";
    const ROWS: usize = 4;
    const QUERIES: usize = 2;
    const RUNS: usize = 2;
    const DOTS_ARE_I16: bool = true;
    const SIGNED_OFFSET: i32 = 0;

    run_inside! { "avx2,fma,f16c" }

    #[inline(always)]
    fn array(self, x: [__m256; 2]) -> [f32; 16] {
        bytemuck::cast(x)
    }

    instructions! { unsafe
        fn splat(self, x: f32) -> [__m256; 2] { [_mm256_set1_ps(x); 2] }
        fn floats(self, x: &[f32; 16]) -> [__m256; 2] {
            both!(h => _mm256_loadu_ps(x[8 * h..].as_ptr()))
        }
        fn halves(self, x: &[u8; 32]) -> [__m256; 2] {
            both!(h => _mm256_cvtph_ps(_mm_loadu_si128(x[16 * h..].as_ptr().cast())))
        }
        fn bf16s(self, x: &[u8; 32]) -> [__m256; 2] {
            both!(h => {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(x[16 * h..].as_ptr().cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            })
        }
        fn to_halves(self, x: &[f32; 16]) -> [u16; 16] {
            let x = self.floats(x);
            bytemuck::cast(both!(h => _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[h])))
        }
        fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            both!(h => _mm256_mul_ps(a[h], b[h]))
        }
        fn fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            both!(h => _mm256_fmadd_ps(a[h], b[h], c[h]))
        }
        fn largest(self, x: [[__m256; 2]; 2]) -> f32 {
            let [a, b] = both!(h => _mm256_max_ps(x[0][h], x[1][h]));
            fold!(_mm256_max_ps(a, b), _mm_max_ps, _mm_max_ss)
        }
        fn total(self, x: [[__m256; 2]; 2]) -> f32 {
            let [a, b] = both!(h => _mm256_add_ps(x[0][h], x[1][h]));
            fold!(_mm256_add_ps(a, b), _mm_add_ps, _mm_add_ss)
        }
        fn word(self, bytes: &WordBytes) -> [__m256i; 2] {
            both!(h => _mm256_loadu_si256(bytes[32 * h..].as_ptr().cast()))
        }
        fn and(self, a: [__m256i; 2], bits: u8) -> [__m256i; 2] {
            both!(h => _mm256_and_si256(a[h], _mm256_set1_epi8(bits.cast_signed())))
        }
        fn or(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
            both!(h => _mm256_or_si256(a[h], b[h]))
        }
        fn shl(self, a: [__m256i; 2], bits: i32) -> [__m256i; 2] {
            both!(h => _mm256_sll_epi16(a[h], _mm_cvtsi32_si128(bits)))
        }
        fn shr(self, a: [__m256i; 2], bits: i32) -> [__m256i; 2] {
            both!(h => _mm256_srl_epi16(a[h], _mm_cvtsi32_si128(bits)))
        }
        fn dots(self, half: i32) -> [__m256i; 2] { [_mm256_set1_epi16(half as i16); 2] }
        fn dot(self, dots: [__m256i; 2], word: [__m256i; 2], q: [i8; 4]) -> [__m256i; 2] {
            let q = _mm256_set1_epi32(bytemuck::cast(q));
            both!(h => pin(_mm256_add_epi16(dots[h], _mm256_maddubs_epi16(word[h], q))))
        }
        fn dot_signed(self, dots: [__m256i; 2], word: [__m256i; 2], q: [i8; 4]) -> [__m256i; 2] {
            let q = _mm256_set1_epi32(bytemuck::cast(q));
            // 2 * 128 * 127 = 32512 fits 16 bits.
            both!(h => _mm256_add_epi16(
                dots[h],
                _mm256_maddubs_epi16(_mm256_abs_epi8(word[h]), _mm256_sign_epi8(q, word[h])),
            ))
        }
        fn whole(self) -> [__m256i; 2] { [_mm256_setzero_si256(); 2] }
        fn add(self, whole: [__m256i; 2], dots: [__m256i; 2]) -> [__m256i; 2] {
            self.add_scaled(whole, dots, [_mm256_set1_epi16(1); 2])
        }
        fn scales(self, bytes: &[u8; 16]) -> [__m256i; 2] {
            // Two equal i16 for each column.
            let wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes.as_ptr().cast()));
            let even = _mm256_unpacklo_epi16(wide, wide);
            let odd = _mm256_unpackhi_epi16(wide, wide);
            [
                _mm256_permute2x128_si256::<0x20>(even, odd),
                _mm256_permute2x128_si256::<0x31>(even, odd),
            ]
        }
        fn add_scaled(
            self,
            whole: [__m256i; 2],
            dots: [__m256i; 2],
            scales: [__m256i; 2]
        ) -> [__m256i; 2] {
            both!(h => pin(_mm256_add_epi32(whole[h], _mm256_madd_epi16(dots[h], scales[h]))))
        }
        fn to_floats(self, whole: [__m256i; 2]) -> [__m256; 2] {
            both!(h => _mm256_cvtepi32_ps(whole[h]))
        }
        fn prefetch(self, _rows: usize, block: &[u8]) -> () {
            // A panel is read once from memory, whatever the rows.
            for line in (0..block.len()).step_by(64) {
                _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(AHEAD + line).cast());
            }
        }
    }
}
