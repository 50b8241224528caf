//! AVX-512 with VNNI: the same sums as the portable level, a panel's 16 columns in one register.
//!
//! `vpdpbusd` adds four products of an unsigned and a signed byte to each 32-bit lane, which is a
//! word of the panel layout. Nibbles are unsigned as they are; what is signed (q8_0) or has an
//! offset (q4_0, q6_k) is made unsigned, and the sum begins at what that adds.
#![expect(clippy::needless_range_loop, reason = "constant indices keep tiles in registers")]

mod elementwise;

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

/// 16 columns: 4 weights (or 8 nibbles) of each.
type Word = [u8; 64];
/// 16 f16 numbers.
type Halves = [u8; 32];
/// Distance of the prefetch, in bytes. It runs on into the next panel.
const AHEAD: usize = 4096;

level! {
    "avx512", "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    needs ["avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512vl" "avx512dq" "avx512vnni"], tiles of 8,
    quantise_row: elementwise::quantise_row
}

attend_steps! {
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", __m512, 16, together 4,
    zero: _mm512_setzero_ps, broadcast: _mm512_set1_ps, mul: _mm512_mul_ps, fmadd: _mm512_fmadd_ps,
    load: _mm512_loadu_ps, load_halves: _mm256_loadu_si256, f16_to_f32: _mm512_cvtph_ps
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn word(bytes: &Word) -> __m512i {
    // SAFETY: a load of exactly the 64 bytes of the array.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn half_word(bytes: &Halves) -> __m256i {
    // SAFETY: a load of exactly the 32 bytes of the array.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// 16 f16 numbers as f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(bytes: &Halves) -> __m512 {
    _mm512_cvtph_ps(half_word(bytes))
}

/// Activations `4 j..4 j + 4` in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(q: &[i8; BLOCK], j: usize) -> __m512i {
    _mm512_set1_epi32(bytemuck::cast(q.as_chunks::<4>().0[j]))
}

/// Asks for the bytes of a later block, into L2. A tile of few rows reads fast enough for the
/// CPU to see a stream by itself, and is slower with it.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch<const R: usize>(block: &[u8]) {
    if R < 4 {
        return;
    }
    for line in (0..block.len()).step_by(64) {
        let at = block.as_ptr().wrapping_add(AHEAD + line);
        #[allow(unused_unsafe, reason = "unsafe before Rust 1.90")]
        // SAFETY: a prefetch reads nothing and can't fault, whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.cast())
        };
    }
}

/// `acc = sum * (d * da) + acc`, fused.
#[inline]
#[target_feature(enable = "avx512f")]
fn scale(acc: __m512, sum: __m512i, d: __m512, da: f32) -> __m512 {
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(d, _mm512_set1_ps(da)), acc)
}

/// The registers of a tile as numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn sums<const R: usize>(acc: [__m512; R]) -> Sums<R> {
    acc.map(bytemuck::cast)
}

/// Adds the dot products of a nibble plane with 32 activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn nibble_dots<const R: usize>(
    plane: &[Word],
    rows: [&Block; R],
    mut dots: [__m512i; R],
) -> [__m512i; R] {
    let mask = _mm512_set1_epi8(15);
    for j in 0..4 {
        let both = word(&plane[j]);
        let low = _mm512_and_si512(both, mask);
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask);
        for r in 0..R {
            dots[r] = _mm512_dpbusd_epi32(dots[r], low, broadcast(&rows[r].q, j));
        }
        for r in 0..R {
            dots[r] = _mm512_dpbusd_epi32(dots[r], high, broadcast(&rows[r].q, j + 4));
        }
    }
    dots
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn q4_1<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [_mm512_setzero_ps(); R];
    for (b, block) in panel.as_chunks::<320>().0.iter().enumerate() {
        prefetch::<R>(block);
        let a: [&Block; R] = from_fn(|r| &rows[r][b]);
        let (plane, scales) = block.split_at(256);
        let dots = nibble_dots(plane.as_chunks().0, a, [_mm512_setzero_si512(); R]);
        let scales = scales.as_chunks().0;
        let (d, m) = (halves(&scales[0]), halves(&scales[1]));
        for r in 0..R {
            acc[r] = scale(acc[r], dots[r], d, a[r].d);
            acc[r] = _mm512_fmadd_ps(m, _mm512_set1_ps(a[r].s), acc[r]);
        }
    }
    sums(acc)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn q4_0<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [_mm512_setzero_ps(); R];
    for (b, block) in panel.as_chunks::<288>().0.iter().enumerate() {
        prefetch::<R>(block);
        let a: [&Block; R] = from_fn(|r| &rows[r][b]);
        let (plane, scales) = block.split_at(256);
        let dots = nibble_dots(plane.as_chunks().0, a, a.map(|a| offset(a, 8)));
        let d = halves(&scales.as_chunks().0[0]);
        for r in 0..R {
            acc[r] = scale(acc[r], dots[r], d, a[r].d);
        }
    }
    sums(acc)
}

/// The excess of a sum whose 32 weights are each `offset` too large, negated.
#[inline]
#[target_feature(enable = "avx512f")]
fn offset(a: &Block, offset: i32) -> __m512i {
    _mm512_set1_epi32(-offset * (i32::from(a.sums[0]) + i32::from(a.sums[1])))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn q8_0<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let sign = _mm512_set1_epi8(-128);
    let mut acc = [_mm512_setzero_ps(); R];
    for (b, block) in panel.as_chunks::<544>().0.iter().enumerate() {
        prefetch::<R>(block);
        let a: [&Block; R] = from_fn(|r| &rows[r][b]);
        let (plane, scales) = block.split_at(512);
        let plane: &[Word] = plane.as_chunks().0;
        let mut dots = a.map(|a| offset(a, 128));
        for j in 0..8 {
            // The weight and 128: unsigned.
            let w = _mm512_xor_si512(word(&plane[j]), sign);
            for r in 0..R {
                dots[r] = _mm512_dpbusd_epi32(dots[r], w, broadcast(&a[r].q, j));
            }
        }
        let d = halves(&scales.as_chunks().0[0]);
        for r in 0..R {
            acc[r] = scale(acc[r], dots[r], d, a[r].d);
        }
    }
    sums(acc)
}

/// Dot products of one unit of q6_k with 32 activations, scaled.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn q6_k_dots<const R: usize>(unit: &[u8; 416], rows: [&Block; R]) -> [__m512i; R] {
    let (mask, two_bits) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
    let (planes, scales) = unit.split_at(384);
    let planes: &[Word] = planes.as_chunks().0;
    let mut dots = [_mm512_setzero_si512(); R];
    for g in 0..2 {
        let bits = word(&planes[4 + g]);
        let high: [__m512i; 4] = [
            _mm512_slli_epi16::<4>(bits),
            _mm512_slli_epi16::<2>(bits),
            bits,
            _mm512_srli_epi16::<2>(bits),
        ];
        let mut part = rows.map(|row| _mm512_set1_epi32(-32 * i32::from(row.sums[g])));
        for s in 0..4 {
            let both = word(&planes[s]);
            let low = if g == 0 { both } else { _mm512_srli_epi16::<4>(both) };
            let (low, high) = (_mm512_and_si512(low, mask), _mm512_and_si512(high[s], two_bits));
            let q = _mm512_or_si512(low, high);
            for r in 0..R {
                part[r] = _mm512_dpbusd_epi32(part[r], q, broadcast(&rows[r].q, g * 4 + s));
            }
        }
        let scales: &[[u8; 16]] = scales.as_chunks().0;
        let scale = _mm512_cvtepi8_epi32(bytemuck::cast(scales[g]));
        for r in 0..R {
            dots[r] = _mm512_add_epi32(dots[r], _mm512_mullo_epi32(part[r], scale));
        }
    }
    dots
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn q6_k<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [_mm512_setzero_ps(); R];
    for (b, block) in panel.as_chunks::<3360>().0.iter().enumerate() {
        let (d, units) = block.split_at(32);
        let d = halves(&d.as_chunks().0[0]);
        for (u, unit) in units.as_chunks::<416>().0.iter().enumerate() {
            prefetch::<R>(unit);
            let a: [&Block; R] = from_fn(|r| &rows[r][b * 8 + u]);
            let dots = q6_k_dots(unit, a);
            for r in 0..R {
                acc[r] = scale(acc[r], dots[r], d, a[r].d);
            }
        }
    }
    sums(acc)
}

/// The float types: `N` bytes hold one k of 16 columns; `f16_to_f32` makes f32 of them.
#[inline]
#[target_feature(enable = "avx512f")]
fn numbers<const R: usize, const N: usize>(
    panel: &[u8],
    rows: [&[f32]; R],
    f16_to_f32: impl Fn(&[u8; N]) -> __m512,
) -> Sums<R> {
    let mut acc = [_mm512_setzero_ps(); R];
    for (k, weights) in panel.as_chunks::<N>().0.iter().enumerate() {
        let w = f16_to_f32(weights);
        for r in 0..R {
            acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(rows[r][k]), w, acc[r]);
        }
    }
    sums(acc)
}

#[target_feature(enable = "avx512f,avx512bw")]
fn f32_numbers<const R: usize>(panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
    numbers(panel, rows, |weights| _mm512_castsi512_ps(word(weights)))
}

#[target_feature(enable = "avx512f,avx512bw")]
fn f16_numbers<const R: usize>(panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
    numbers(panel, rows, |weights| halves(weights))
}

#[target_feature(enable = "avx512f,avx512bw")]
fn bf16_numbers<const R: usize>(panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
    numbers(panel, rows, |weights| {
        let wide = _mm512_cvtepu16_epi32(half_word(weights));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    })
}
