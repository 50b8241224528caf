//! The level that runs everywhere: plain Rust, and the specification of the bits.

use std::array::from_fn;

use super::math;
use super::simd::{Job, Simd, WordBytes, instructions};

/// No instruction set.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Simd for Portable {
    type Floats = [f32; 16];
    type Whole = [i32; 16];
    type Word = WordBytes;
    type Dots = [i32; 16];
    type Scales = [i32; 16];

    const NAME: &'static str = "portable";
    const ROWS: usize = 4;
    const QUERIES: usize = 2;
    const RUNS: usize = 2;
    const DOTS_ARE_I16: bool = false;
    const SIGNED_OFFSET: i32 = 0;

    #[inline(always)]
    fn run<J: Job>(self, job: J) -> J::Output {
        job.run(self)
    }

    instructions! {
        fn splat(self, x: f32) -> [f32; 16] { [x; 16] }
        fn floats(self, x: &[f32; 16]) -> [f32; 16] { *x }
        fn halves(self, x: &[u8; 32]) -> [f32; 16] {
            from_fn(|i| math::f16_to_f32(u16::from_le_bytes([x[2 * i], x[2 * i + 1]])))
        }
        fn bf16s(self, x: &[u8; 32]) -> [f32; 16] {
            from_fn(|i| f32::from_le_bytes([0, 0, x[2 * i], x[2 * i + 1]]))
        }
        fn array(self, x: [f32; 16]) -> [f32; 16] { x }
        fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] { from_fn(|i| a[i] * b[i]) }
        fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
            from_fn(|i| a[i].mul_add(b[i], c[i]))
        }
        fn word(self, bytes: &WordBytes) -> WordBytes { *bytes }
        fn and(self, a: WordBytes, bits: u8) -> WordBytes { a.map(|a| a & bits) }
        fn or(self, a: WordBytes, b: WordBytes) -> WordBytes { from_fn(|i| a[i] | b[i]) }
        fn shl(self, a: WordBytes, bits: i32) -> WordBytes { a.map(|a| a << bits) }
        fn shr(self, a: WordBytes, bits: i32) -> WordBytes { a.map(|a| a >> bits) }
        fn dots(self, half: i32) -> [i32; 16] { [2 * half; 16] }
        fn dot(self, dots: [i32; 16], word: WordBytes, q: [i8; 4]) -> [i32; 16] {
            // Below 128: signed and unsigned bytes are the same.
            self.dot_signed(dots, word, q)
        }
        fn dot_signed(self, dots: [i32; 16], word: WordBytes, q: [i8; 4]) -> [i32; 16] {
            let product = |c: usize, t: usize| {
                i32::from(word[4 * c + t].cast_signed()) * i32::from(q[t])
            };
            from_fn(|c| dots[c] + (0..4).map(|t| product(c, t)).sum::<i32>())
        }
        fn whole(self) -> [i32; 16] { [0; 16] }
        fn add(self, whole: [i32; 16], dots: [i32; 16]) -> [i32; 16] {
            from_fn(|i| whole[i] + dots[i])
        }
        fn scales(self, bytes: &[u8; 16]) -> [i32; 16] {
            bytes.map(|byte| i32::from(byte.cast_signed()))
        }
        fn add_scaled(self, whole: [i32; 16], dots: [i32; 16], scales: [i32; 16]) -> [i32; 16] {
            from_fn(|i| whole[i] + dots[i] * scales[i])
        }
        fn to_floats(self, whole: [i32; 16]) -> [f32; 16] { whole.map(|whole| whole as f32) }
    }
}
