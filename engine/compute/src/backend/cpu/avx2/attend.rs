//! The steps of attention: two loops that the compiler would spill, and the folds.

use std::arch::x86_64::*;
use std::array::from_fn;

use super::super::super::PAGE_SIZE;
use super::super::attend::{Key, Numbers, Tile, TileOps};
use super::super::math;

/// Attention's steps; made only inside this level.
#[derive(Clone, Copy)]
pub(super) struct Ops;

impl TileOps for Ops {
    const TOGETHER: usize = 2;

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
    fn scores<const Q: usize>(self, q: [&[f32]; Q], k: Numbers<'_>) -> [Tile; Q] {
        // SAFETY: an `Ops` is made only in `super::attend`, which is inside this level.
        unsafe {
            match k {
                Numbers::Half(k) => scores(q, k, |k| wide::<4>(k)),
                Numbers::Full(k) => scores(q, k, |k| eights::<4>(k)),
            }
        }
    }

    #[inline(always)]
    fn add_values<const Q: usize>(
        self,
        weights: [&[f32]; Q],
        fades: [f32; Q],
        v: Numbers<'_>,
        sums: [&mut [f32]; Q],
    ) {
        // SAFETY: an `Ops` is made only in `super::attend`, which is inside this level.
        unsafe {
            match v {
                Numbers::Half(v) => {
                    add_values(weights, fades, v, sums, |v| wide::<4>(v), |v| wide::<1>(v));
                }
                Numbers::Full(v) => {
                    add_values(weights, fades, v, sums, |v| eights::<4>(v), |v| eights::<1>(v));
                }
            }
        }
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

/// As [`math::narrow_all`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn narrow(from: &[f32], to: &mut [u16]) {
    let (eights, rest) = from.as_chunks::<8>();
    let (to, to_rest) = to.as_chunks_mut::<8>();
    for (from, to) in eights.iter().zip(to) {
        // SAFETY: a load of exactly the 8 numbers that the array has.
        let eight = unsafe { _mm256_loadu_ps(from.as_ptr()) };
        *to = bytemuck::cast(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(eight));
    }
    math::narrow_all(rest, to_rest);
}

/// Runs of 8 numbers, from the front.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eights<const N: usize>(numbers: &[f32]) -> [__m256; N] {
    let (eights, _) = numbers[..8 * N].as_chunks::<8>();
    // SAFETY: loads of exactly the 8 numbers that each array has.
    from_fn(|i| unsafe { _mm256_loadu_ps(eights[i].as_ptr()) })
}

/// Runs of 8 f16 numbers as f32, from the front.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn wide<const N: usize>(numbers: &[u16]) -> [__m256; N] {
    let (eights, _) = numbers[..8 * N].as_chunks::<8>();
    // SAFETY: loads of exactly the 8 numbers that each array has.
    from_fn(|i| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(eights[i].as_ptr().cast())) })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scores<const Q: usize, N>(
    q: [&[f32]; Q],
    k: &[N],
    load: impl Fn(&[N]) -> [__m256; 4],
) -> [Tile; Q] {
    let mut sums = [[_mm256_setzero_ps(); 4]; Q];
    let head_dim = k.len() / PAGE_SIZE;
    let q = q.map(|q| &q[..head_dim]);
    for (d, keys) in k.as_chunks::<PAGE_SIZE>().0.iter().enumerate() {
        let keys = load(keys);
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
fn add_values<const Q: usize, N: Key>(
    weights: [&[f32]; Q],
    fades: [f32; Q],
    v: &[N],
    mut sums: [&mut [f32]; Q],
    load_four: impl Fn(&[N]) -> [__m256; 4],
    load_one: impl Fn(&[N]) -> [__m256; 1],
) {
    let head_dim = sums[0].len();
    let mut at = 0;
    while at + 32 <= head_dim {
        add_run(weights, fades, v, at, &mut sums, &load_four);
        at += 32;
    }
    while at + 8 <= head_dim {
        add_run(weights, fades, v, at, &mut sums, &load_one);
        at += 8;
    }
    for d in at..head_dim {
        for r in 0..Q {
            let column = v[d..].iter().step_by(head_dim).zip(weights[r]);
            let chain = |sum: f32, (v, weight): (&N, &f32)| weight.mul_add(v.number(), sum);
            sums[r][d] = column.fold(sums[r][d] * fades[r], chain);
        }
    }
}

/// Dimensions `at..at + 8 * N`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_run<const Q: usize, const N: usize, T>(
    weights: [&[f32]; Q],
    fades: [f32; Q],
    v: &[T],
    at: usize,
    sums: &mut [&mut [f32]; Q],
    load: impl Fn(&[T]) -> [__m256; N],
) {
    let mut run = [[_mm256_setzero_ps(); N]; Q];
    for r in 0..Q {
        let fade = _mm256_set1_ps(fades[r]);
        run[r] = eights::<N>(&sums[r][at..]).map(|sum| _mm256_mul_ps(sum, fade));
    }
    let keys = weights[0].len();
    let weights = weights.map(|weights| &weights[..keys]);
    for (j, v) in v.chunks_exact(sums[0].len()).enumerate().take(keys) {
        let v = load(&v[at..]);
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
