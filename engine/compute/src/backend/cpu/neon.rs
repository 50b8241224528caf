//! NEON with the dot product instruction: 4 columns in a register.
//!
//! `sdot` adds four products of signed bytes to each 32-bit lane, which is a word of the panel
//! layout. Intrinsics that are not stable yet are written in assembly.

use std::arch::aarch64::*;
use std::arch::asm;

use super::kernels::Kernels;
use super::simd::{Job, Simd, WordBytes, instructions, run_inside};

/// The proof that this CPU has the instructions.
#[derive(Clone, Copy)]
pub(super) struct Neon(());

/// The kernels of this level, or the instruction set that this CPU lacks.
pub(super) fn kernels() -> Result<&'static dyn Kernels, &'static str> {
    if !std::arch::is_aarch64_feature_detected!("dotprod") {
        return Err("dotprod");
    }
    Ok(&Neon(()))
}

/// The same of all registers of 4 columns.
macro_rules! each {
    ($i:ident => $one:expr) => {
        [
            {
                let $i = 0;
                $one
            },
            {
                let $i = 1;
                $one
            },
            {
                let $i = 2;
                $one
            },
            {
                let $i = 3;
                $one
            },
        ]
    };
}

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

/// 4 f16 numbers as f32, exact.
#[inline]
#[target_feature(enable = "neon")]
fn widen(halves: uint16x4_t) -> float32x4_t {
    let floats;
    // SAFETY: one instruction on these registers, which every CPU with NEON has.
    unsafe {
        asm!(
            "fcvtl {0:v}.4s, {1:v}.4h",
            lateout(vreg) floats,
            in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    floats
}

impl Simd for Neon {
    type Floats = [float32x4_t; 4];
    type Whole = [int32x4_t; 4];
    type Word = [uint8x16_t; 4];
    type Dots = [int32x4_t; 4];
    type Scales = [int32x4_t; 4];

    const NAME: &'static str = "neon";
    const ROWS: usize = 4;
    const QUERIES: usize = 2;
    const RUNS: usize = 2;
    const DOTS_ARE_I16: bool = false;
    const SIGNED_OFFSET: i32 = 0;

    run_inside! { "neon,dotprod" }

    instructions! { unsafe
        fn splat(self, x: f32) -> [float32x4_t; 4] { [vdupq_n_f32(x); 4] }
        fn floats(self, x: &[f32; 16]) -> [float32x4_t; 4] {
            each!(i => vld1q_f32(x[4 * i..].as_ptr()))
        }
        fn halves(self, x: &[u8; 32]) -> [float32x4_t; 4] {
            each!(i => widen(vreinterpret_u16_u8(vld1_u8(x[8 * i..].as_ptr()))))
        }
        fn bf16s(self, x: &[u8; 32]) -> [float32x4_t; 4] {
            each!(i => {
                let wide = vmovl_u16(vreinterpret_u16_u8(vld1_u8(x[8 * i..].as_ptr())));
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(wide))
            })
        }
        fn array(self, x: [float32x4_t; 4]) -> [f32; 16] {
            let mut out = [0f32; 16];
            for (out, x) in out.as_chunks_mut::<4>().0.iter_mut().zip(x) {
                vst1q_f32(out.as_mut_ptr(), x);
            }
            out
        }
        fn mul(self, a: [float32x4_t; 4], b: [float32x4_t; 4]) -> [float32x4_t; 4] {
            each!(i => vmulq_f32(a[i], b[i]))
        }
        fn fma(
            self,
            a: [float32x4_t; 4],
            b: [float32x4_t; 4],
            c: [float32x4_t; 4]
        ) -> [float32x4_t; 4] {
            each!(i => vfmaq_f32(c[i], a[i], b[i]))
        }
        fn word(self, bytes: &WordBytes) -> [uint8x16_t; 4] {
            each!(i => vld1q_u8(bytes[16 * i..].as_ptr()))
        }
        fn and(self, a: [uint8x16_t; 4], bits: u8) -> [uint8x16_t; 4] {
            each!(i => vandq_u8(a[i], vdupq_n_u8(bits)))
        }
        fn or(self, a: [uint8x16_t; 4], b: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
            each!(i => vorrq_u8(a[i], b[i]))
        }
        fn shl(self, a: [uint8x16_t; 4], bits: i32) -> [uint8x16_t; 4] {
            each!(i => vshlq_u8(a[i], vdupq_n_s8(bits as i8)))
        }
        fn shr(self, a: [uint8x16_t; 4], bits: i32) -> [uint8x16_t; 4] { self.shl(a, -bits) }
        fn dots(self, half: i32) -> [int32x4_t; 4] { [vdupq_n_s32(2 * half); 4] }
        fn dot(self, dots: [int32x4_t; 4], word: [uint8x16_t; 4], q: [i8; 4]) -> [int32x4_t; 4] {
            // Below 128: signed and unsigned bytes are the same.
            self.dot_signed(dots, word, q)
        }
        fn dot_signed(
            self,
            dots: [int32x4_t; 4],
            word: [uint8x16_t; 4],
            q: [i8; 4]
        ) -> [int32x4_t; 4] {
            let q = vreinterpretq_s8_s32(vdupq_n_s32(bytemuck::cast(q)));
            each!(i => sdot(dots[i], vreinterpretq_s8_u8(word[i]), q))
        }
        fn whole(self) -> [int32x4_t; 4] { [vdupq_n_s32(0); 4] }
        fn add(self, whole: [int32x4_t; 4], dots: [int32x4_t; 4]) -> [int32x4_t; 4] {
            each!(i => vaddq_s32(whole[i], dots[i]))
        }
        fn scales(self, bytes: &[u8; 16]) -> [int32x4_t; 4] {
            let bytes = vreinterpretq_s8_u8(vld1q_u8(bytes.as_ptr()));
            let [a, b] = [vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes))];
            [
                vmovl_s16(vget_low_s16(a)),
                vmovl_s16(vget_high_s16(a)),
                vmovl_s16(vget_low_s16(b)),
                vmovl_s16(vget_high_s16(b)),
            ]
        }
        fn add_scaled(
            self,
            whole: [int32x4_t; 4],
            dots: [int32x4_t; 4],
            scales: [int32x4_t; 4]
        ) -> [int32x4_t; 4] {
            each!(i => vmlaq_s32(whole[i], dots[i], scales[i]))
        }
        fn to_floats(self, whole: [int32x4_t; 4]) -> [float32x4_t; 4] {
            each!(i => vcvtq_f32_s32(whole[i]))
        }
    }
}
