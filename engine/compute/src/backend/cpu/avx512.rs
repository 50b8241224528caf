//! AVX-512 with VNNI: a panel's 16 columns in one register.
//!
//! `vpdpbusd` adds four products of an unsigned and a signed byte to each 32-bit lane, which is a
//! word of the panel layout. Signed weights are made unsigned, and the sum begins at what that
//! adds.

use std::arch::x86_64::*;

use super::avx2::{fold, need};
use super::kernels::Kernels;
use super::math::{AMAX_MIN, BLOCK, Block};
use super::simd::{Job, Simd, WordBytes, instructions, run_inside};

/// Distance of the prefetch, in bytes. It runs on into the next panel.
const AHEAD: usize = 4096;

/// The proof that this CPU has the instructions.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// The kernels of this level, or the instruction set that this CPU lacks.
pub(super) fn kernels() -> Result<&'static dyn Kernels, &'static str> {
    need!("avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512vl" "avx512dq" "avx512vnni");
    Ok(&Avx512(()))
}

impl Simd for Avx512 {
    type Floats = __m512;
    type Whole = __m512i;
    type Word = __m512i;
    type Dots = __m512i;
    type Scales = __m512i;

    const NAME: &'static str = "avx512";
    const ROWS: usize = 8;
    const QUERIES: usize = 4;
    const RUNS: usize = 4;
    const DOTS_ARE_I16: bool = false;
    const SIGNED_OFFSET: i32 = 128;

    run_inside! { "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni" }

    #[inline(always)]
    fn array(self, x: __m512) -> [f32; 16] {
        bytemuck::cast(x)
    }

    instructions! { unsafe
        fn splat(self, x: f32) -> __m512 { _mm512_set1_ps(x) }
        fn floats(self, x: &[f32; 16]) -> __m512 { _mm512_loadu_ps(x.as_ptr()) }
        fn halves(self, x: &[u8; 32]) -> __m512 {
            _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast()))
        }
        fn bf16s(self, x: &[u8; 32]) -> __m512 {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
        fn to_halves(self, x: &[f32; 16]) -> [u16; 16] {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            bytemuck::cast(_mm512_cvtps_ph::<NEAREST>(self.floats(x)))
        }
        fn mul(self, a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn largest(self, x: [__m512; 2]) -> f32 {
            let x = _mm512_max_ps(x[0], x[1]);
            let (low, high) = (_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            fold!(_mm256_max_ps(low, high), _mm_max_ps, _mm_max_ss)
        }
        fn total(self, x: [__m512; 2]) -> f32 {
            let x = _mm512_add_ps(x[0], x[1]);
            let (low, high) = (_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            fold!(_mm256_add_ps(low, high), _mm_add_ps, _mm_add_ss)
        }
        fn word(self, bytes: &WordBytes) -> __m512i { _mm512_loadu_si512(bytes.as_ptr().cast()) }
        fn and(self, a: __m512i, bits: u8) -> __m512i {
            _mm512_and_si512(a, _mm512_set1_epi8(bits.cast_signed()))
        }
        fn or(self, a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        fn shl(self, a: __m512i, bits: i32) -> __m512i {
            _mm512_sll_epi16(a, _mm_cvtsi32_si128(bits))
        }
        fn shr(self, a: __m512i, bits: i32) -> __m512i {
            _mm512_srl_epi16(a, _mm_cvtsi32_si128(bits))
        }
        fn dots(self, half: i32) -> __m512i { _mm512_set1_epi32(2 * half) }
        fn dot(self, dots: __m512i, word: __m512i, q: [i8; 4]) -> __m512i {
            _mm512_dpbusd_epi32(dots, word, _mm512_set1_epi32(bytemuck::cast(q)))
        }
        fn dot_signed(self, dots: __m512i, word: __m512i, q: [i8; 4]) -> __m512i {
            self.dot(dots, _mm512_xor_si512(word, _mm512_set1_epi8(-128)), q)
        }
        fn whole(self) -> __m512i { _mm512_setzero_si512() }
        fn add(self, whole: __m512i, dots: __m512i) -> __m512i { _mm512_add_epi32(whole, dots) }
        fn scales(self, bytes: &[u8; 16]) -> __m512i {
            _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))
        }
        fn add_scaled(self, whole: __m512i, dots: __m512i, scales: __m512i) -> __m512i {
            _mm512_add_epi32(whole, _mm512_mullo_epi32(dots, scales))
        }
        fn to_floats(self, whole: __m512i) -> __m512 { _mm512_cvtepi32_ps(whole) }
        fn prefetch(self, rows: usize, block: &[u8]) -> () {
            // A tile of few rows reads fast enough for the CPU to see a stream by itself, and is
            // slower with it.
            if rows >= 4 {
                for line in (0..block.len()).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T1>(block.as_ptr().wrapping_add(AHEAD + line).cast());
                }
            }
        }
        fn quantise_row(self, x: &[f32], out: &mut [Block]) -> () {
            let (x, rest) = x.as_chunks::<BLOCK>();
            assert!(rest.is_empty() && x.len() == out.len(), "{} blocks of {}", out.len(), x.len());
            for (x, out) in x.iter().zip(out) {
                quantise(x, out);
            }
        }
    }
}

/// One block of [`super::math::quantise_row`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn quantise(x: &[f32; BLOCK], out: &mut Block) {
    let (halves, _) = x.as_chunks::<16>();
    // SAFETY: loads of exactly the 16 numbers that each half has.
    let [a, b] =
        unsafe { [_mm512_loadu_ps(halves[0].as_ptr()), _mm512_loadu_ps(halves[1].as_ptr())] };
    let amax = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    let (d, inverse) = if amax >= AMAX_MIN { (amax / 127.0, 127.0 / amax) } else { (0.0, 0.0) };
    let inverse = _mm512_set1_ps(inverse);
    // To nearest, ties to even; the largest becomes 127, so nothing is clamped.
    let a = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)));
    let b = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(b, inverse)));
    out.q = bytemuck::cast([a, b]);
    let [first, second] = [sum(a), sum(b)];
    out.sums = [first as i16, second as i16];
    out.d = d;
    out.s = d * (first + second) as f32;
}

/// The sum of 16 bytes.
#[inline]
#[target_feature(enable = "avx512vl,avx512vnni")]
fn sum(q: __m128i) -> i32 {
    let four = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), q);
    let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
}
