//! The level that runs everywhere: plain Rust, and the specification of the bits.

use std::array::from_fn;

use hat_loader::DType;
use hat_loader::layout::{PANEL, Q6K_UNIT_BYTES};

use super::super::PAGE_SIZE;
use super::attend::{self, AttendScratch, AttendTask, Key, KvData, Tile, TileOps, attend_task};
use super::kernels::Kernels;
use super::math::{self, BLOCK, Block};
use super::matrix::{Linear, Sums, weight_types};
use super::threads::Part;

/// The kernels of this level.
pub(super) const KERNELS: Kernels = Kernels {
    name: "portable",
    quantise_row: math::quantise_row,
    rms_norm_row: math::rms_norm_row,
    f32_to_f16: math::f32_to_f16_all,
    rope_angles_row: math::rope_angles_row,
    rotate: math::rotate,
    attend,
    linear: linear_of_type,
};

fn attend(
    task: &AttendTask<'_>,
    scratch: &mut AttendScratch,
    out: &mut Part<'_, f32>,
    at: (usize, usize),
) {
    attend_task(task, scratch, out, at, Plain);
}

/// Attention's steps without any instruction set.
#[derive(Clone, Copy)]
struct Plain;

impl TileOps for Plain {
    const TOGETHER: usize = 2;

    fn f16_to_f32(self, from: &[u16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = math::f16_to_f32(*from);
        }
    }

    fn largest(self, tile: &Tile) -> f32 {
        attend::fold(*tile, |a, b| if a > b { a } else { b })
    }

    fn total(self, tile: &Tile) -> f32 {
        attend::fold(*tile, |a, b| a + b)
    }

    fn scores<const Q: usize>(self, q: [&[f32]; Q], k: KvData<'_>) -> [Tile; Q] {
        match k {
            KvData::Half(k) => scores(q, k),
            KvData::Full(k) => scores(q, k),
        }
    }

    fn add_values<const Q: usize>(
        self,
        weights: [&[f32]; Q],
        fades: [f32; Q],
        v: KvData<'_>,
        sums: [&mut [f32]; Q],
    ) {
        match v {
            KvData::Half(v) => add_values(weights, fades, v, sums),
            KvData::Full(v) => add_values(weights, fades, v, sums),
        }
    }
}

fn scores<const Q: usize>(q: [&[f32]; Q], k: &[impl Key]) -> [Tile; Q] {
    let mut sums = [[0f32; PAGE_SIZE]; Q];
    for (d, keys) in k.as_chunks::<PAGE_SIZE>().0.iter().enumerate() {
        let keys = keys.map(Key::number);
        for (sums, q) in sums.iter_mut().zip(q) {
            for (sum, key) in sums.iter_mut().zip(&keys) {
                *sum = q[d].mul_add(*key, *sum);
            }
        }
    }
    sums
}

fn add_values<const Q: usize>(
    weights: [&[f32]; Q],
    fades: [f32; Q],
    v: &[impl Key],
    sums: [&mut [f32]; Q],
) {
    for ((weights, fade), sums) in weights.into_iter().zip(fades).zip(sums) {
        for sum in sums.iter_mut() {
            *sum *= fade;
        }
        for (weight, v) in weights.iter().zip(v.chunks_exact(sums.len())) {
            for (sum, v) in sums.iter_mut().zip(v) {
                *sum = weight.mul_add(v.number(), *sum);
            }
        }
    }
}

macro_rules! plainly {
    ($call:expr) => {
        $call
    };
}

weight_types! { plainly, 4 }

/// The 16 f16 numbers at `at`.
fn halves(block: &[u8], at: usize) -> [f32; PANEL] {
    from_fn(|c| math::f16_to_f32(u16::from_le_bytes([block[at + c * 2], block[at + c * 2 + 1]])))
}

/// Exact sums of a nibble plane with 32 activations, for weights 0..16 and 16..32 apart.
fn nibble_sums(plane: &[u8], q: &[i8; BLOCK]) -> [[i32; PANEL]; 2] {
    let mut sums = [[0; PANEL]; 2];
    for (j, words) in plane.chunks_exact(4 * PANEL).enumerate() {
        for (c, word) in words.as_chunks::<4>().0.iter().enumerate() {
            for (t, byte) in word.iter().enumerate() {
                sums[0][c] += i32::from(byte & 15) * i32::from(q[j * 4 + t]);
                sums[1][c] += i32::from(byte >> 4) * i32::from(q[16 + j * 4 + t]);
            }
        }
    }
    sums
}

fn q4_1<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [[0f32; PANEL]; R];
    for (b, block) in panel.chunks_exact(20 * PANEL).enumerate() {
        let (d, m) = (halves(block, 256), halves(block, 288));
        for (acc, row) in acc.iter_mut().zip(rows) {
            let a = &row[b];
            let [first, second] = nibble_sums(&block[..256], &a.q);
            for c in 0..PANEL {
                acc[c] = ((first[c] + second[c]) as f32).mul_add(d[c] * a.d, acc[c]);
                acc[c] = m[c].mul_add(a.s, acc[c]);
            }
        }
    }
    acc
}

fn q4_0<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [[0f32; PANEL]; R];
    for (b, block) in panel.chunks_exact(18 * PANEL).enumerate() {
        let d = halves(block, 256);
        for (acc, row) in acc.iter_mut().zip(rows) {
            let a = &row[b];
            let [first, second] = nibble_sums(&block[..256], &a.q);
            let offset = 8 * (i32::from(a.sums[0]) + i32::from(a.sums[1]));
            for c in 0..PANEL {
                let sum = first[c] + second[c] - offset;
                acc[c] = (sum as f32).mul_add(d[c] * a.d, acc[c]);
            }
        }
    }
    acc
}

fn q8_0<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [[0f32; PANEL]; R];
    for (b, block) in panel.chunks_exact(34 * PANEL).enumerate() {
        let d = halves(block, 512);
        for (acc, row) in acc.iter_mut().zip(rows) {
            let a = &row[b];
            let mut sums = [0i32; PANEL];
            for (j, words) in block[..512].chunks_exact(4 * PANEL).enumerate() {
                for (sum, word) in sums.iter_mut().zip(words.as_chunks::<4>().0) {
                    for (t, byte) in word.iter().enumerate() {
                        *sum += i32::from(byte.cast_signed()) * i32::from(a.q[j * 4 + t]);
                    }
                }
            }
            for c in 0..PANEL {
                acc[c] = (sums[c] as f32).mul_add(d[c] * a.d, acc[c]);
            }
        }
    }
    acc
}

fn q6_k<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [[0f32; PANEL]; R];
    for (b, block) in panel.chunks_exact(210 * PANEL).enumerate() {
        let d = halves(block, 0);
        for (u, unit) in block[2 * PANEL..].chunks_exact(Q6K_UNIT_BYTES).enumerate() {
            let (low, high) = unit[..24 * PANEL].split_at(16 * PANEL);
            let scales = &unit[24 * PANEL..];
            for (acc, row) in acc.iter_mut().zip(rows) {
                let a = &row[b * 8 + u];
                let mut sums = nibble_sums(low, &a.q);
                for (g, words) in high.chunks_exact(4 * PANEL).enumerate() {
                    for (c, word) in words.as_chunks::<4>().0.iter().enumerate() {
                        for (t, byte) in word.iter().enumerate() {
                            for s in 0..4 {
                                let bits = i32::from(byte >> (2 * s) & 3) * 16;
                                sums[g][c] += bits * i32::from(a.q[g * 16 + s * 4 + t]);
                            }
                        }
                    }
                }
                for c in 0..PANEL {
                    let part = |g: usize| {
                        let scale = i32::from(scales[g * PANEL + c].cast_signed());
                        scale * (sums[g][c] - 32 * i32::from(a.sums[g]))
                    };
                    acc[c] = ((part(0) + part(1)) as f32).mul_add(d[c] * a.d, acc[c]);
                }
            }
        }
    }
    acc
}

/// The float types: one fused multiply-add for each weight, K in sequence.
#[inline(always)]
fn numbers<const R: usize, const BYTES: usize>(
    panel: &[u8],
    rows: [&[f32]; R],
    number: impl Fn([u8; BYTES]) -> f32,
) -> Sums<R> {
    let mut acc = [[0f32; PANEL]; R];
    for (k, weights) in panel.chunks_exact(BYTES * PANEL).enumerate() {
        let (weights, _) = weights.as_chunks::<BYTES>();
        let weights: [f32; PANEL] = from_fn(|c| number(weights[c]));
        for (acc, row) in acc.iter_mut().zip(rows) {
            for (acc, weight) in acc.iter_mut().zip(&weights) {
                *acc = row[k].mul_add(*weight, *acc);
            }
        }
    }
    acc
}

#[inline(always)]
pub(super) fn f32_numbers<const R: usize>(panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
    numbers(panel, rows, f32::from_le_bytes)
}

#[inline(always)]
pub(super) fn f16_numbers<const R: usize>(panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
    numbers(panel, rows, |bytes| math::f16_to_f32(u16::from_le_bytes(bytes)))
}

#[inline(always)]
pub(super) fn bf16_numbers<const R: usize>(panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
    numbers(panel, rows, |bytes| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16))
}
