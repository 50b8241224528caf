//! The quantiser of activations.

use std::arch::x86_64::*;

use super::super::math::{AMAX_MIN, BLOCK, Block};

/// As [`super::super::math::quantise_row`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn quantise_row(x: &[f32], out: &mut [Block]) {
    let (x, rest) = x.as_chunks::<BLOCK>();
    assert!(rest.is_empty() && x.len() == out.len(), "{} blocks for {} rows", x.len(), out.len());
    for (x, out) in x.iter().zip(out) {
        let x = halves(x);
        let amax = _mm512_max_ps(_mm512_abs_ps(x[0]), _mm512_abs_ps(x[1]));
        let amax = _mm512_reduce_max_ps(amax);
        let (d, inverse) = if amax >= AMAX_MIN { (amax / 127.0, 127.0 / amax) } else { (0.0, 0.0) };
        let inverse = _mm512_set1_ps(inverse);
        // To nearest, ties to even; the largest becomes 127, so nothing is clamped.
        let q = x.map(|x| _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse))));
        let sums = q.map(|q| sum(q));
        let (first, second): (&mut [i8; 16], &mut [i8; 16]) = {
            let (first, second) = out.q.split_at_mut(16);
            (first.try_into().expect("16 of 32"), second.try_into().expect("16 of 32"))
        };
        *first = bytemuck::cast(q[0]);
        *second = bytemuck::cast(q[1]);
        out.sums = [sums[0] as i16, sums[1] as i16];
        out.d = d;
        out.s = d * (sums[0] + sums[1]) as f32;
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn halves(x: &[f32; BLOCK]) -> [__m512; 2] {
    let (first, second) = x.split_at(16);
    // SAFETY: loads of exactly the 16 numbers that each half has.
    unsafe { [_mm512_loadu_ps(first.as_ptr()), _mm512_loadu_ps(second.as_ptr())] }
}

/// The sum of 16 bytes.
#[inline]
#[target_feature(enable = "avx512vl,avx512vnni")]
fn sum(q: __m128i) -> i32 {
    let four = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), q);
    let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
}
