//! NEON with the dot product instruction: the same sums as the portable level, 4 columns in a
//! register.
//!
//! `sdot` adds four products of bytes to each 32-bit lane, which is a word of the panel layout.
//! The intrinsic is not stable yet, so the instruction is written in assembly. Everything without
//! an integer dot product is the portable code: NEON and fused multiply-add are part of every
//! aarch64 CPU, so the compiler makes vectors of it there.

use std::arch::aarch64::*;
use std::arch::asm;
use std::array::from_fn;
use std::ops::Range;

use hat_loader::DType;
use hat_loader::layout::PANEL;

use super::kernels::Kernels;
use super::math::{self, BLOCK, Block};
use super::matrix::{Linear, Sums, weight_types};
use super::portable;
use super::threads::Part;

/// Registers of 4 columns in a panel.
const QUARTERS: usize = PANEL / 4;

/// 4 columns: 4 weights (or 8 nibbles) of each.
type Word = [u8; 16];

/// The kernels of this level, or the instruction set that this CPU lacks.
pub(super) fn kernels() -> Result<&'static Kernels, &'static str> {
    if !std::arch::is_aarch64_feature_detected!("dotprod") {
        return Err("dotprod");
    }
    Ok(&KERNELS)
}

static KERNELS: Kernels = Kernels { name: "neon", linear, ..portable::KERNELS };

fn linear(job: &Linear<'_>, columns: Range<usize>, out: &mut Part<'_, f32>) {
    // SAFETY: reached only through `KERNELS`, which leaves this file only through `kernels`,
    // which has checked that the CPU has the dot product; NEON is part of the architecture.
    unsafe { linear_inside(job, columns, out) }
}

#[target_feature(enable = "neon,dotprod")]
fn linear_inside(job: &Linear<'_>, columns: Range<usize>, out: &mut Part<'_, f32>) {
    linear_of_type(job, columns, out)
}

macro_rules! inside_this_level {
    ($call:expr) => {
        // SAFETY: tiles are made only in `linear_of_type`, which only `linear_inside` calls.
        unsafe { $call }
    };
}

weight_types! { inside_this_level, 4 }

/// The float types have nothing that the compiler does not make vectors of by itself.
macro_rules! numbers {
    ($($name:ident)*) => {$(
        #[target_feature(enable = "neon,dotprod")]
        fn $name<const R: usize>(panel: &[u8], rows: [&[f32]; R]) -> Sums<R> {
            portable::$name(panel, rows)
        }
    )*};
}

numbers! { f32_numbers f16_numbers bf16_numbers }

/// Adds the dot product of 4 bytes with 4 bytes to each lane.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut sums: int32x4_t, weights: int8x16_t, q: int8x16_t) -> int32x4_t {
    // SAFETY: one instruction on these registers, which this level has.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sums,
            in(vreg) weights,
            in(vreg) q,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn word(bytes: &Word) -> uint8x16_t {
    // SAFETY: a load of exactly the 16 bytes of the array.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// 16 f16 numbers as f32.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn halves(words: &[Word]) -> [float32x4_t; QUARTERS] {
    from_fn(|i| {
        let (halves, _) = words[i / 2][i % 2 * 8..].as_chunks::<2>();
        let four: [f32; 4] = from_fn(|c| math::f16_to_f32(u16::from_le_bytes(halves[c])));
        // SAFETY: a load of exactly the 4 numbers of the array.
        unsafe { vld1q_f32(four.as_ptr()) }
    })
}

/// Activations `4 j..4 j + 4` in every lane.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn broadcast(q: &[i8; BLOCK], j: usize) -> int8x16_t {
    vreinterpretq_s8_s32(vdupq_n_s32(bytemuck::cast(q.as_chunks::<4>().0[j])))
}

/// `acc = sum * (d * da) + acc`, fused.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn scale(
    acc: &mut [float32x4_t; QUARTERS],
    dots: [int32x4_t; QUARTERS],
    d: [float32x4_t; QUARTERS],
    da: f32,
) {
    for i in 0..QUARTERS {
        acc[i] = vfmaq_f32(acc[i], vcvtq_f32_s32(dots[i]), vmulq_n_f32(d[i], da));
    }
}

/// The registers of a tile as numbers.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sums<const R: usize>(acc: [[float32x4_t; QUARTERS]; R]) -> Sums<R> {
    let mut sums = [[0f32; PANEL]; R];
    for (sums, acc) in sums.iter_mut().zip(acc) {
        for (four, acc) in sums.as_chunks_mut::<4>().0.iter_mut().zip(acc) {
            // SAFETY: a store of exactly the 4 numbers of the array.
            unsafe { vst1q_f32(four.as_mut_ptr(), acc) };
        }
    }
    sums
}

/// Dot products of a nibble plane with 32 activations.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn nibble_dots<const R: usize>(plane: &[Word], rows: [&Block; R]) -> [[int32x4_t; QUARTERS]; R] {
    let mask = vdupq_n_u8(15);
    let mut dots = [[vdupq_n_s32(0); QUARTERS]; R];
    for j in 0..4 {
        for i in 0..QUARTERS {
            let both = word(&plane[j * QUARTERS + i]);
            let low = vreinterpretq_s8_u8(vandq_u8(both, mask));
            let high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(both));
            for r in 0..R {
                dots[r][i] = sdot(dots[r][i], low, broadcast(&rows[r].q, j));
                dots[r][i] = sdot(dots[r][i], high, broadcast(&rows[r].q, j + 4));
            }
        }
    }
    dots
}

#[target_feature(enable = "neon,dotprod")]
fn q4_1<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [[vdupq_n_f32(0.0); QUARTERS]; R];
    for (b, block) in panel.as_chunks::<16>().0.as_chunks::<20>().0.iter().enumerate() {
        let a: [&Block; R] = from_fn(|r| &rows[r][b]);
        let dots = nibble_dots(&block[..16], a);
        let (d, m) = (halves(&block[16..18]), halves(&block[18..]));
        for r in 0..R {
            scale(&mut acc[r], dots[r], d, a[r].d);
            for i in 0..QUARTERS {
                acc[r][i] = vfmaq_n_f32(acc[r][i], m[i], a[r].s);
            }
        }
    }
    sums(acc)
}

#[target_feature(enable = "neon,dotprod")]
fn q4_0<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [[vdupq_n_f32(0.0); QUARTERS]; R];
    for (b, block) in panel.as_chunks::<16>().0.as_chunks::<18>().0.iter().enumerate() {
        let a: [&Block; R] = from_fn(|r| &rows[r][b]);
        let dots = nibble_dots(&block[..16], a);
        let d = halves(&block[16..]);
        for r in 0..R {
            let offset = vdupq_n_s32(-8 * (i32::from(a[r].sums[0]) + i32::from(a[r].sums[1])));
            let dots = from_fn(|i| vaddq_s32(dots[r][i], offset));
            scale(&mut acc[r], dots, d, a[r].d);
        }
    }
    sums(acc)
}

#[target_feature(enable = "neon,dotprod")]
fn q8_0<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [[vdupq_n_f32(0.0); QUARTERS]; R];
    for (b, block) in panel.as_chunks::<16>().0.as_chunks::<34>().0.iter().enumerate() {
        let a: [&Block; R] = from_fn(|r| &rows[r][b]);
        let mut dots = [[vdupq_n_s32(0); QUARTERS]; R];
        for j in 0..8 {
            for i in 0..QUARTERS {
                let weights = vreinterpretq_s8_u8(word(&block[j * QUARTERS + i]));
                for r in 0..R {
                    dots[r][i] = sdot(dots[r][i], weights, broadcast(&a[r].q, j));
                }
            }
        }
        let d = halves(&block[32..]);
        for r in 0..R {
            scale(&mut acc[r], dots[r], d, a[r].d);
        }
    }
    sums(acc)
}

/// Dot products of one unit of q6_k with 32 activations, scaled.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn q6_k_dots<const R: usize>(unit: &[Word; 26], rows: [&Block; R]) -> [[int32x4_t; QUARTERS]; R] {
    let (mask, two_bits) = (vdupq_n_u8(15), vdupq_n_u8(0x30));
    let mut dots = [[vdupq_n_s32(0); QUARTERS]; R];
    for g in 0..2 {
        let scales = &unit[24 + g];
        for i in 0..QUARTERS {
            let bits = word(&unit[16 + g * QUARTERS + i]);
            let high = [vshlq_n_u8::<4>(bits), vshlq_n_u8::<2>(bits), bits, vshrq_n_u8::<2>(bits)];
            let scale: [i32; 4] = from_fn(|c| i32::from(scales[i * 4 + c].cast_signed()));
            // SAFETY: a load of exactly the 4 numbers of the array.
            let scale = unsafe { vld1q_s32(scale.as_ptr()) };
            let mut part = rows.map(|row| vdupq_n_s32(-32 * i32::from(row.sums[g])));
            for s in 0..4 {
                let both = word(&unit[s * QUARTERS + i]);
                let low = if g == 0 { vandq_u8(both, mask) } else { vshrq_n_u8::<4>(both) };
                let q = vreinterpretq_s8_u8(vorrq_u8(low, vandq_u8(high[s], two_bits)));
                for r in 0..R {
                    part[r] = sdot(part[r], q, broadcast(&rows[r].q, g * 4 + s));
                }
            }
            for r in 0..R {
                dots[r][i] = vmlaq_s32(dots[r][i], part[r], scale);
            }
        }
    }
    dots
}

#[target_feature(enable = "neon,dotprod")]
fn q6_k<const R: usize>(panel: &[u8], rows: [&[Block]; R]) -> Sums<R> {
    let mut acc = [[vdupq_n_f32(0.0); QUARTERS]; R];
    for (b, block) in panel.as_chunks::<16>().0.as_chunks::<210>().0.iter().enumerate() {
        let d = halves(&block[..2]);
        for (u, unit) in block[2..].as_chunks::<26>().0.iter().enumerate() {
            let a: [&Block; R] = from_fn(|r| &rows[r][b * 8 + u]);
            let dots = q6_k_dots(unit, a);
            for r in 0..R {
                scale(&mut acc[r], dots[r], d, a[r].d);
            }
        }
    }
    sums(acc)
}
