//! The steps of attention: two loops that the compiler would spill, and the folds.

use std::arch::x86_64::*;
use std::array::from_fn;

use super::super::super::PAGE_SIZE;
use super::super::attend::{Tile, TileOps};
use super::super::math;

/// Attention's steps; made only inside this level.
#[derive(Clone, Copy)]
pub(super) struct Ops;

impl TileOps for Ops {
    #[inline(always)]
    fn widen(self, from: &[u16], to: &mut [f32]) {
        // SAFETY: an `Ops` is made only in `super::attend`, which is inside this level.
        unsafe { widen(from, to) }
    }

    #[inline(always)]
    fn largest(self, tile: &Tile) -> f32 {
        // SAFETY: an `Ops` is made only in `super::attend`, which is inside this level.
        unsafe { largest(tile) }
    }

    #[inline(always)]
    fn total(self, tile: &Tile) -> f32 {
        // SAFETY: an `Ops` is made only in `super::attend`, which is inside this level.
        unsafe { total(tile) }
    }

    #[inline(always)]
    fn scores<const Q: usize>(self, q: [&[f32]; Q], k: &[f32]) -> [Tile; Q] {
        // SAFETY: an `Ops` is made only in `super::attend`, which is inside this level.
        unsafe { scores(q, k) }
    }

    #[inline(always)]
    fn add_values<const Q: usize>(
        self,
        weights: [&[f32]; Q],
        fades: [f32; Q],
        v: &[f32],
        sums: [&mut [f32]; Q],
    ) {
        // SAFETY: an `Ops` is made only in `super::attend`, which is inside this level.
        unsafe { add_values(weights, fades, v, sums) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn widen(from: &[u16], to: &mut [f32]) {
    let (from, from_rest) = from.as_chunks::<8>();
    let (to, to_rest) = to[..from.len() * 8 + from_rest.len()].as_chunks_mut::<8>();
    for (from, to) in from.iter().zip(to) {
        // SAFETY: loads and stores of exactly the 8 numbers that the arrays have.
        unsafe {
            let half = _mm_loadu_si128(from.as_ptr().cast());
            _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(half));
        }
    }
    for (to, from) in to_rest.iter_mut().zip(from_rest) {
        *to = math::widen(*from);
    }
}

/// Runs of 8 numbers, from the front.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eights<const N: usize>(numbers: &[f32]) -> [__m256; N] {
    let (eights, _) = numbers[..8 * N].as_chunks::<8>();
    // SAFETY: loads of exactly the 8 numbers that each array has.
    from_fn(|i| unsafe { _mm256_loadu_ps(eights[i].as_ptr()) })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scores<const Q: usize>(q: [&[f32]; Q], k: &[f32]) -> [Tile; Q] {
    let mut sums = [[_mm256_setzero_ps(); 4]; Q];
    for (d, keys) in k.chunks_exact(PAGE_SIZE).enumerate() {
        let keys = eights::<4>(keys);
        for r in 0..Q {
            let q = _mm256_set1_ps(q[r][d]);
            for i in 0..4 {
                sums[r][i] = _mm256_fmadd_ps(q, keys[i], sums[r][i]);
            }
        }
    }
    sums.map(|row| bytemuck::cast(row.map(bytemuck::cast::<__m256, [f32; 8]>)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_values<const Q: usize>(
    weights: [&[f32]; Q],
    fades: [f32; Q],
    v: &[f32],
    mut sums: [&mut [f32]; Q],
) {
    let head_dim = sums[0].len();
    let mut at = 0;
    while at + 32 <= head_dim {
        add_run::<Q, 4>(weights, fades, v, at, &mut sums);
        at += 32;
    }
    while at + 8 <= head_dim {
        add_run::<Q, 1>(weights, fades, v, at, &mut sums);
        at += 8;
    }
    for d in at..head_dim {
        for r in 0..Q {
            let column = v[d..].iter().step_by(head_dim).zip(weights[r]);
            let chain = |sum: f32, (v, weight): (&f32, &f32)| weight.mul_add(*v, sum);
            sums[r][d] = column.fold(sums[r][d] * fades[r], chain);
        }
    }
}

/// Dimensions `at..at + 8 * N`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_run<const Q: usize, const N: usize>(
    weights: [&[f32]; Q],
    fades: [f32; Q],
    v: &[f32],
    at: usize,
    sums: &mut [&mut [f32]; Q],
) {
    let mut run = [[_mm256_setzero_ps(); N]; Q];
    for r in 0..Q {
        let fade = _mm256_set1_ps(fades[r]);
        run[r] = eights::<N>(&sums[r][at..]).map(|sum| _mm256_mul_ps(sum, fade));
    }
    let keys = weights[0].len();
    let weights = weights.map(|weights| &weights[..keys]);
    for (j, v) in v.chunks_exact(sums[0].len()).enumerate().take(keys) {
        let v = eights::<N>(&v[at..]);
        for r in 0..Q {
            let weight = _mm256_set1_ps(weights[r][j]);
            for i in 0..N {
                run[r][i] = _mm256_fmadd_ps(weight, v[i], run[r][i]);
            }
        }
    }
    for r in 0..Q {
        let (eights, _) = sums[r][at..at + 8 * N].as_chunks_mut::<8>();
        for i in 0..N {
            eights[i] = bytemuck::cast(run[r][i]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn largest(tile: &Tile) -> f32 {
    let [a, b, c, d] = eights(tile);
    let eight = _mm256_max_ps(_mm256_max_ps(a, c), _mm256_max_ps(b, d));
    let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn total(tile: &Tile) -> f32 {
    let [a, b, c, d] = eights(tile);
    let eight = _mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d));
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
