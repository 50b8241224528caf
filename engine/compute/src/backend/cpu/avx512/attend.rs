//! The steps of attention, 16 keys or dimensions in a register.

use std::arch::x86_64::*;
use std::array::from_fn;

use super::super::super::PAGE_SIZE;
use super::super::attend::{Key, Numbers, Tile, TileOps};
use super::super::math;

/// Registers of one tile's keys.
const TILE: usize = PAGE_SIZE / 16;

/// Attention's steps; made only inside this level.
#[derive(Clone, Copy)]
pub(super) struct Ops;

impl TileOps for Ops {
    const TOGETHER: usize = 4;

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
                Numbers::Half(k) => scores(q, k, |k| wide::<TILE>(k)),
                Numbers::Full(k) => scores(q, k, |k| full::<TILE>(k)),
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
                    add_values(weights, fades, v, sums, |v| full::<4>(v), |v| full::<1>(v));
                }
            }
        }
    }
}

/// Runs of 16 f16 numbers as f32, from the front.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn wide<const N: usize>(numbers: &[u16]) -> [__m512; N] {
    let (runs, _) = numbers[..16 * N].as_chunks::<16>();
    // SAFETY: loads of exactly the 16 numbers that each array has.
    from_fn(|i| unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(runs[i].as_ptr().cast())) })
}

/// Runs of 16 numbers, from the front.
#[inline]
#[target_feature(enable = "avx512f")]
fn full<const N: usize>(numbers: &[f32]) -> [__m512; N] {
    let (runs, _) = numbers[..16 * N].as_chunks::<16>();
    // SAFETY: loads of exactly the 16 numbers that each array has.
    from_fn(|i| unsafe { _mm512_loadu_ps(runs[i].as_ptr()) })
}

#[target_feature(enable = "avx512f,avx512vl")]
fn widen(from: &[u16], to: &mut [f32]) {
    let (from, from_rest) = from.as_chunks::<16>();
    let (to, to_rest) = to[..from.len() * 16 + from_rest.len()].as_chunks_mut::<16>();
    for (from, to) in from.iter().zip(to) {
        *to = bytemuck::cast(wide::<1>(from));
    }
    for (to, from) in to_rest.iter_mut().zip(from_rest) {
        *to = math::widen(*from);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn scores<const Q: usize, N>(
    q: [&[f32]; Q],
    k: &[N],
    load: impl Fn(&[N]) -> [__m512; TILE],
) -> [Tile; Q] {
    let mut sums = [[_mm512_setzero_ps(); TILE]; Q];
    let head_dim = k.len() / PAGE_SIZE;
    let q = q.map(|q| &q[..head_dim]);
    for (d, keys) in k.as_chunks::<PAGE_SIZE>().0.iter().enumerate() {
        let keys = load(keys);
        for r in 0..Q {
            let q = _mm512_set1_ps(q[r][d]);
            for i in 0..TILE {
                sums[r][i] = _mm512_fmadd_ps(q, keys[i], sums[r][i]);
            }
        }
    }
    sums.map(bytemuck::cast)
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn add_values<const Q: usize, N: Key>(
    weights: [&[f32]; Q],
    fades: [f32; Q],
    v: &[N],
    mut sums: [&mut [f32]; Q],
    load_four: impl Fn(&[N]) -> [__m512; 4],
    load_one: impl Fn(&[N]) -> [__m512; 1],
) {
    let head_dim = sums[0].len();
    let mut at = 0;
    while at + 64 <= head_dim {
        add_run(weights, fades, v, at, &mut sums, &load_four);
        at += 64;
    }
    while at + 16 <= head_dim {
        add_run(weights, fades, v, at, &mut sums, &load_one);
        at += 16;
    }
    for d in at..head_dim {
        for r in 0..Q {
            let column = v[d..].iter().step_by(head_dim).zip(weights[r]);
            let chain = |sum: f32, (v, weight): (&N, &f32)| weight.mul_add(v.number(), sum);
            sums[r][d] = column.fold(sums[r][d] * fades[r], chain);
        }
    }
}

/// Dimensions `at..at + 16 * N`.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn add_run<const Q: usize, const N: usize, T>(
    weights: [&[f32]; Q],
    fades: [f32; Q],
    v: &[T],
    at: usize,
    sums: &mut [&mut [f32]; Q],
    load: impl Fn(&[T]) -> [__m512; N],
) {
    let mut run = [[_mm512_setzero_ps(); N]; Q];
    for r in 0..Q {
        let fade = _mm512_set1_ps(fades[r]);
        run[r] = full::<N>(&sums[r][at..]).map(|sum| _mm512_mul_ps(sum, fade));
    }
    let keys = weights[0].len();
    let weights = weights.map(|weights| &weights[..keys]);
    for (j, v) in v.chunks_exact(sums[0].len()).enumerate().take(keys) {
        let v = load(&v[at..]);
        for r in 0..Q {
            let weight = _mm512_set1_ps(weights[r][j]);
            for i in 0..N {
                run[r][i] = _mm512_fmadd_ps(weight, v[i], run[r][i]);
            }
        }
    }
    for r in 0..Q {
        let (runs, _) = sums[r][at..at + 16 * N].as_chunks_mut::<16>();
        for i in 0..N {
            runs[i] = bytemuck::cast(run[r][i]);
        }
    }
}

/// The upper half of a register, and the lower.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn fold(v: __m512) -> (__m256, __m256) {
    (_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn largest(tile: &Tile) -> f32 {
    let [a, b] = full(tile);
    let (low, high) = fold(_mm512_max_ps(a, b));
    let eight = _mm256_max_ps(low, high);
    let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn total(tile: &Tile) -> f32 {
    let [a, b] = full(tile);
    let (low, high) = fold(_mm512_add_ps(a, b));
    let eight = _mm256_add_ps(low, high);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
