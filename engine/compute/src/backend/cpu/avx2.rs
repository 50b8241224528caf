//! AVX2 with FMA and F16C: the same sums as the portable level, 8 columns in a register.
//!
//! Integer dot products of nibbles stay in 16 bits for a whole block of 32: a pair of products is
//! at most 2 * 15 * 127 = 3810, eight of them 30480. Bytes can't (2 * 255 * 127 saturates), so
//! q8_0 multiplies magnitudes with the weight's sign moved to the activation.
#![expect(clippy::needless_range_loop, reason = "constant indices keep tiles in registers")]

use std::arch::x86_64::*;
use std::array::from_fn;
use std::ops::Range;

use hat_loader::DType;

use super::super::PAGE_SIZE;
use super::attend::{AttendScratch, AttendTask, Key, KvData, Tile, TileOps, attend_task};
use super::kernels::Kernels;
use super::math::{self, BLOCK, Block};
use super::matrix::{Linear, Sums, weight_types};
use super::threads::Part;
use super::x86::{self, attend_steps, level};

/// 8 columns: 4 weights (or 8 nibbles) of each.
type Word = [u8; 32];
/// Registers of 8 columns in a panel.
const HALVES: usize = 2;
/// Distance of the prefetch, in [`Word`]s. It runs on into the next panel.
const AHEAD: usize = 128;

level! {
    "avx2", "avx2,fma,f16c", needs ["avx2" "fma" "f16c"], tiles of 4,
    quantise_row: math::quantise_row
}

attend_steps! {
    "avx2,fma,f16c", __m256, 8, together 2,
    zero: _mm256_setzero_ps, broadcast: _mm256_set1_ps, mul: _mm256_mul_ps, fmadd: _mm256_fmadd_ps,
    load: _mm256_loadu_ps, load_halves: _mm_loadu_si128, f16_to_f32: _mm256_cvtph_ps
}

#[target_feature(enable = "avx2,fma,f16c")]
fn word(bytes: &Word) -> __m256i {
    // SAFETY: a load of exactly the 32 bytes of the array.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// 16 f16 numbers, or two runs of 16 bytes.
#[target_feature(enable = "avx2,fma,f16c")]
fn split(bytes: &Word) -> [__m128i; HALVES] {
    let both = word(bytes);
    [_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both)]
}

/// 16 f16 numbers as f32.
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(bytes: &Word) -> [__m256; HALVES] {
    let [first, second] = split(bytes);
    [_mm256_cvtph_ps(first), _mm256_cvtph_ps(second)]
}

/// Activations `4 j..4 j + 4` in every lane.
#[target_feature(enable = "avx2,fma,f16c")]
fn broadcast(q: &[i8; BLOCK], j: usize) -> __m256i {
    _mm256_set1_epi32(bytemuck::cast(q.as_chunks::<4>().0[j]))
}

/// Hides a value from the optimiser, which else re-associates the integer sums over the unrolled
/// steps (exact, but it keeps all products alive at once and spills).
#[target_feature(enable = "avx2,fma,f16c")]
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

/// Asks for the words of a later block: a panel is read once from memory, whatever the rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch<const N: usize>(block: &[Word; N]) {
    for line in 0..N.div_ceil(2) {
        let at = block.as_ptr().wrapping_add(AHEAD + line * 2);
        #[allow(unused_unsafe, reason = "unsafe before Rust 1.90")]
        // SAFETY: a prefetch reads nothing and can't fault, whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(at.cast())
        };
    }
}

/// The registers of a tile as numbers.
#[target_feature(enable = "avx2,fma,f16c")]
fn sums<const R: usize>(acc: [[__m256; HALVES]; R]) -> Sums<R> {
    acc.map(|row| bytemuck::cast(row.map(bytemuck::cast::<__m256, [f32; 8]>)))
}

/// q4_0 in blocks of 9 words, q4_1 in blocks of 10. One body with one caller for each tile, so
/// that its registers are given out together.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles<const R: usize, const WORDS: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let (ones, mask) = (_mm256_set1_epi16(1), _mm256_set1_epi8(15));
    let mut acc = [[_mm256_setzero_ps(); HALVES]; R];
    for (b, block) in panel.as_chunks::<32>().0.as_chunks::<WORDS>().0.iter().enumerate() {
        prefetch(block);
        let a: [&Block; R] = from_fn(|r| &rows[r][b]);
        // Each register has 16 pairs of i16 whose sum counts.
        let mut dots = [[_mm256_setzero_si256(); HALVES]; R];
        if WORDS == 9 {
            // The -8 of 32 weights, half of it in each of a pair: at most 22352 + 8128.
            dots = a.map(|a| [_mm256_set1_epi16(-4 * (a.sums[0] + a.sums[1])); HALVES]);
        }
        for j in 0..4 {
            let both: [__m256i; HALVES] = from_fn(|h| word(&block[j * 2 + h]));
            let low = both.map(|v| _mm256_and_si256(v, mask));
            let high = both.map(|v| _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask));
            for r in 0..R {
                let q = broadcast(&a[r].q, j);
                dots[r][0] = _mm256_add_epi16(dots[r][0], _mm256_maddubs_epi16(low[0], q));
                dots[r][1] = _mm256_add_epi16(dots[r][1], _mm256_maddubs_epi16(low[1], q));
                let q = broadcast(&a[r].q, j + 4);
                dots[r][0] = _mm256_add_epi16(dots[r][0], _mm256_maddubs_epi16(high[0], q));
                dots[r][1] = _mm256_add_epi16(dots[r][1], _mm256_maddubs_epi16(high[1], q));
            }
            for r in 0..R {
                dots[r] = [pin(dots[r][0]), pin(dots[r][1])];
            }
        }
        let d = halves(&block[8]);
        for r in 0..R {
            let da = _mm256_set1_ps(a[r].d);
            for h in 0..HALVES {
                let sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[r][h], ones));
                acc[r][h] = _mm256_fmadd_ps(sum, _mm256_mul_ps(d[h], da), acc[r][h]);
            }
        }
        if WORDS == 10 {
            let m = halves(&block[WORDS - 1]);
            for r in 0..R {
                let s = _mm256_set1_ps(a[r].s);
                for h in 0..HALVES {
                    acc[r][h] = _mm256_fmadd_ps(m[h], s, acc[r][h]);
                }
            }
        }
    }
    sums(acc)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_0<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    nibbles::<R, 9>(panel, rows)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_1<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    nibbles::<R, 10>(panel, rows)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q8_0<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let ones = _mm256_set1_epi16(1);
    let mut acc = [[_mm256_setzero_ps(); HALVES]; R];
    for (b, block) in panel.as_chunks::<32>().0.as_chunks::<17>().0.iter().enumerate() {
        prefetch(block);
        let a: [&Block; R] = from_fn(|r| &rows[r][b]);
        let mut dots = [[_mm256_setzero_si256(); HALVES]; R];
        for j in 0..8 {
            let w: [__m256i; HALVES] = from_fn(|h| word(&block[j * 2 + h]));
            let magnitude = w.map(|w| _mm256_abs_epi8(w));
            for r in 0..R {
                let a = broadcast(&a[r].q, j);
                // 2 * 128 * 127 = 32512 fits 16 bits.
                let dot = |h: usize| {
                    let pairs = _mm256_maddubs_epi16(magnitude[h], _mm256_sign_epi8(a, w[h]));
                    _mm256_madd_epi16(pairs, ones)
                };
                dots[r][0] = _mm256_add_epi32(dots[r][0], dot(0));
                dots[r][1] = _mm256_add_epi32(dots[r][1], dot(1));
            }
            for r in 0..R {
                dots[r] = [pin(dots[r][0]), pin(dots[r][1])];
            }
        }
        let d = halves(&block[16]);
        for r in 0..R {
            let da = _mm256_set1_ps(a[r].d);
            for h in 0..HALVES {
                let sum = _mm256_cvtepi32_ps(dots[r][h]);
                acc[r][h] = _mm256_fmadd_ps(sum, _mm256_mul_ps(d[h], da), acc[r][h]);
            }
        }
    }
    sums(acc)
}

/// Dot products of one unit of q6_k with 32 activations, scaled, as i32.
///
/// A pair of products is at most 2 * 63 * 127 = 16002, two pairs fit 16 bits; then
/// multiply-add-adjacent multiplies by the scale, and takes off 32 times the activations too.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q6_k_dots<const R: usize>(unit: &[Word; 13], rows: [&Block; R]) -> [[__m256i; HALVES]; R] {
    let (mask, two_bits) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
    let mut dots = [[_mm256_setzero_si256(); HALVES]; R];
    let all_scales = split(&unit[12]);
    for g in 0..2 {
        // Two equal i16 for each column.
        let scales = _mm256_cvtepi8_epi16(all_scales[g]);
        let (even, odd) =
            (_mm256_unpacklo_epi16(scales, scales), _mm256_unpackhi_epi16(scales, scales));
        let scales = [
            _mm256_permute2x128_si256::<0x20>(even, odd),
            _mm256_permute2x128_si256::<0x31>(even, odd),
        ];
        for h in 0..HALVES {
            let high = word(&unit[8 + g * 2 + h]);
            let high: [__m256i; 4] = [
                _mm256_and_si256(_mm256_slli_epi16::<4>(high), two_bits),
                _mm256_and_si256(_mm256_slli_epi16::<2>(high), two_bits),
                _mm256_and_si256(high, two_bits),
                _mm256_and_si256(_mm256_srli_epi16::<2>(high), two_bits),
            ];
            let q: [__m256i; 4] = from_fn(|s| {
                let both = word(&unit[s * 2 + h]);
                let low = if g == 0 { both } else { _mm256_srli_epi16::<4>(both) };
                _mm256_or_si256(_mm256_and_si256(low, mask), high[s])
            });
            for r in 0..R {
                let a = &rows[r];
                let pairs = |s: usize| {
                    let first = _mm256_maddubs_epi16(q[s], broadcast(&a.q, g * 4 + s));
                    let second = _mm256_maddubs_epi16(q[s + 1], broadcast(&a.q, g * 4 + s + 1));
                    _mm256_madd_epi16(_mm256_add_epi16(first, second), scales[h])
                };
                // 16 * 2032 = 32512 fits 16 bits.
                let offset = _mm256_madd_epi16(_mm256_set1_epi16(-16 * a.sums[g]), scales[h]);
                let sum = _mm256_add_epi32(_mm256_add_epi32(pairs(0), pairs(2)), offset);
                dots[r][h] = pin(_mm256_add_epi32(dots[r][h], sum));
            }
        }
    }
    dots
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q6_k<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [[_mm256_setzero_ps(); HALVES]; R];
    for (b, block) in panel.as_chunks::<32>().0.as_chunks::<105>().0.iter().enumerate() {
        let d = halves(&block[0]);
        for (u, unit) in block[1..].as_chunks::<13>().0.iter().enumerate() {
            prefetch(unit);
            let a: [&Block; R] = from_fn(|r| &rows[r][b * 8 + u]);
            let dots = q6_k_dots(unit, a);
            for r in 0..R {
                let da = _mm256_set1_ps(a[r].d);
                for h in 0..HALVES {
                    let sum = _mm256_cvtepi32_ps(dots[r][h]);
                    acc[r][h] = _mm256_fmadd_ps(sum, _mm256_mul_ps(d[h], da), acc[r][h]);
                }
            }
        }
    }
    sums(acc)
}

/// The float types: `N` words hold one k of 16 columns; `f16_to_f32` makes f32 of them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn numbers<const R: usize, const N: usize>(
    panel: &[u8],
    rows: [&[f32]; R],
    f16_to_f32: impl Fn(&[Word; N]) -> [__m256; HALVES],
) -> Sums<R> {
    let mut acc = [[_mm256_setzero_ps(); HALVES]; R];
    for (k, words) in panel.as_chunks::<32>().0.as_chunks::<N>().0.iter().enumerate() {
        let w = f16_to_f32(words);
        for r in 0..R {
            let x = _mm256_set1_ps(rows[r][k]);
            acc[r][0] = _mm256_fmadd_ps(x, w[0], acc[r][0]);
            acc[r][1] = _mm256_fmadd_ps(x, w[1], acc[r][1]);
        }
    }
    sums(acc)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn f32_numbers<const R: usize>(panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
    numbers::<R, 2>(panel, rows, |words| words.each_ref().map(|w| _mm256_castsi256_ps(word(w))))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn f16_numbers<const R: usize>(panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
    numbers::<R, 1>(panel, rows, |[words]| halves(words))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn bf16_numbers<const R: usize>(panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
    numbers::<R, 1>(panel, rows, |[words]| {
        split(words)
            .map(|half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half))))
    })
}
