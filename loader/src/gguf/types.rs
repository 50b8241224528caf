//! Tensor types of GGUF files, a row each: number, name, block, and the form in which it is read.
//!
//! A type without kernels is read as one that has them where that holds the same numbers bit for
//! bit, else as f32 numbers. Every number is that of llama.cpp's dequantiser.

use std::borrow::Cow;
use std::sync::Arc;

use half::{bf16, f16};

use crate::rows::{MakeRows, Origin, Rows};
use crate::tensor::{DType, TensorBytes};

/// A tensor type of GGUF files.
#[derive(Debug)]
pub(crate) struct GgufType {
    /// Its number in the file.
    pub(crate) number: u32,
    /// Its name in llama.cpp.
    pub(crate) name: &'static str,
    /// Weights and bytes of a block.
    pub(crate) block: (usize, usize),
    /// Form in which it is read; `None` if it is refused.
    pub(crate) form: Option<Form>,
}

/// Form in which a type is read.
#[derive(Debug)]
pub(crate) enum Form {
    /// As it is.
    Same(DType),
    /// Blocks of another type with the same numbers: one block in, one or more out.
    Blocks(DType, fn(&[u8], &mut [u8])),
    /// Numbers of a block; a bundle keeps them as f16, rounded, for want of kernels.
    Numbers(fn(&[u8], &mut [f32])),
    /// Numbers of a block, each of which bf16 holds.
    ShortNumbers(fn(&[u8], &mut [f32])),
    /// `then` for a tensor whose blocks all fit, else `otherwise`.
    Fitting { fits: fn(&[u8]) -> bool, then: &'static Form, otherwise: &'static Form },
}

use Form::{Blocks, Fitting, Numbers, Same, ShortNumbers};

const fn row(
    number: u32,
    name: &'static str,
    block: (usize, usize),
    form: Option<Form>,
) -> GgufType {
    GgufType { number, name, block, form }
}

/// All types.
const TYPES: &[GgufType] = &[
    row(0, "F32", (1, 4), Some(Same(DType::F32))),
    row(1, "F16", (1, 2), Some(Same(DType::F16))),
    row(30, "BF16", (1, 2), Some(Same(DType::Bf16))),
    row(8, "Q8_0", (32, 34), Some(Same(DType::Q8_0))),
    row(2, "Q4_0", (32, 18), Some(Same(DType::Q4_0))),
    row(3, "Q4_1", (32, 20), Some(Same(DType::Q4_1))),
    row(14, "Q6_K", (256, 210), Some(Same(DType::Q6K))),
    row(6, "Q5_0", (32, 22), Some(Blocks(DType::Q8_0, q5_0))),
    row(20, "IQ4_NL", (32, 18), Some(Blocks(DType::Q8_0, iq4_nl))),
    row(39, "MXFP4", (32, 17), Some(MXFP4)),
    row(11, "Q3_K", (256, 110), Some(Blocks(DType::Q6K, q3_k))),
    row(7, "Q5_1", (32, 24), Some(Numbers(q5_1))),
    row(12, "Q4_K", (256, 144), Some(Numbers(q4_k))),
    row(13, "Q5_K", (256, 176), Some(Numbers(q5_k))),
    row(10, "Q2_K", (256, 84), Some(Numbers(q2_k))),
    row(23, "IQ4_XS", (256, 136), Some(Numbers(iq4_xs))),
    row(9, "Q8_1", (32, 40), None),
    row(15, "Q8_K", (256, 292), None),
    row(16, "IQ2_XXS", (256, 66), None),
    row(17, "IQ2_XS", (256, 74), None),
    row(18, "IQ3_XXS", (256, 98), None),
    row(19, "IQ1_S", (256, 50), None),
    row(21, "IQ3_S", (256, 110), None),
    row(22, "IQ2_S", (256, 82), None),
    row(24, "I8", (1, 1), None),
    row(25, "I16", (1, 2), None),
    row(26, "I32", (1, 4), None),
    row(27, "I64", (1, 8), None),
    row(28, "F64", (1, 8), None),
    row(29, "IQ1_M", (256, 56), None),
    row(34, "TQ1_0", (256, 54), None),
    row(35, "TQ2_0", (256, 66), None),
    row(40, "NVFP4", (64, 36), None),
];

/// Powers of two of f16's range; beyond it bf16 holds the same numbers.
const MXFP4: Form = Fitting {
    fits: mxfp4_fits,
    then: &Blocks(DType::Q8_0, mxfp4),
    otherwise: &ShortNumbers(mxfp4_numbers),
};

impl GgufType {
    /// The type of a number.
    pub(crate) fn of(number: u32) -> Option<&'static Self> {
        TYPES.iter().find(|kind| kind.number == number)
    }

    /// Names of the types that are read.
    pub(crate) fn names() -> String {
        let read = TYPES.iter().filter(|kind| kind.form.is_some());
        read.map(|kind| kind.name).collect::<Vec<_>>().join(", ")
    }

    /// Bytes of one row of `k` weights; `None` if `k` is no whole number of blocks.
    pub(crate) fn row_bytes(&self, k: usize) -> Option<usize> {
        let (weights, bytes) = self.block;
        if k.is_multiple_of(weights) { (k / weights).checked_mul(bytes) } else { None }
    }

    /// The tensor of such bytes in its form, with the type of its rows. Looks at every block of a
    /// type that has two forms.
    ///
    /// # Panics
    /// If the type is refused.
    pub(crate) fn read(&'static self, bytes: TensorBytes) -> (DType, Rows, Origin) {
        let mut form = self.form.as_ref().expect("refused types don't get here");
        while let Fitting { fits, then, otherwise } = form {
            form = if bytes.chunks_exact(self.block.1).all(fits) { then } else { otherwise };
        }
        let bits = (self.block.1 * 8) as f64 / self.block.0 as f64;
        let origin = |kept| Origin { name: Cow::Borrowed(self.name), bits, kept };
        let made =
            |form| Rows::Made(Arc::new(BlockRows { kind: self, form, bytes: bytes.clone() }));
        match form {
            Same(dtype) => (*dtype, Rows::Stored(bytes), origin(*dtype)),
            Blocks(dtype, _) => (*dtype, made(form), origin(*dtype)),
            Numbers(_) => (DType::F32, made(form), origin(DType::F16)),
            ShortNumbers(_) => (DType::Bf16, made(form), origin(DType::Bf16)),
            Fitting { .. } => unreachable!("resolved above"),
        }
    }
}

/// Rows made of another type's blocks.
struct BlockRows {
    kind: &'static GgufType,
    form: &'static Form,
    bytes: TensorBytes,
}

impl MakeRows for BlockRows {
    fn make(&self, row: usize, k: usize, out: &mut [u8]) {
        let (weights, bytes) = self.kind.block;
        let row_bytes = k / weights * bytes;
        let blocks = self.bytes[row * row_bytes..][..row_bytes].chunks_exact(bytes);
        match self.form {
            Blocks(dtype, widen) => {
                let out_bytes = weights / dtype.block_weights() * dtype.block_bytes();
                for (block, out) in blocks.zip(out.chunks_exact_mut(out_bytes)) {
                    widen(block, out);
                }
            }
            Numbers(numbers) => {
                write_numbers(blocks, weights, *numbers, out, f32::to_le_bytes);
            }
            ShortNumbers(numbers) => {
                let bytes = |x| bf16::from_f32(x).to_le_bytes();
                write_numbers(blocks, weights, *numbers, out, bytes);
            }
            Same(_) | Fitting { .. } => unreachable!("such tensors are not made"),
        }
    }
}

/// Writes the numbers of blocks, each in `N` bytes.
fn write_numbers<'a, const N: usize>(
    blocks: impl Iterator<Item = &'a [u8]>,
    weights: usize,
    numbers: fn(&[u8], &mut [f32]),
    out: &mut [u8],
    bytes: impl Fn(f32) -> [u8; N],
) {
    let mut x = [0.0; 256];
    for (block, out) in blocks.zip(out.chunks_exact_mut(weights * N)) {
        numbers(block, &mut x[..weights]);
        for (out, x) in out.as_chunks_mut().0.iter_mut().zip(&x) {
            *out = bytes(*x);
        }
    }
}

/// The f16 at `at`.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Weight `i` of 16 nibble bytes: low nibbles are weights 0..16, high ones 16..32.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    bytes[i % 16] >> (i / 16 * 4) & 15
}

/// d, qh[4], qs[16]: `d * (q - 16)`.
fn q5_0(block: &[u8], out: &mut [u8]) {
    out[..2].copy_from_slice(&block[..2]);
    for (i, out) in out[2..].iter_mut().enumerate() {
        let high = block[2 + i / 8] >> (i % 8) & 1;
        *out = (nibble(&block[6..], i) | high << 4).wrapping_sub(16);
    }
}

/// d, m, qh[4], qs[16]: `d * q + m`.
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (i, out) in out.iter_mut().enumerate() {
        let high = block[4 + i / 8] >> (i % 8) & 1;
        *out = d * f32::from(nibble(&block[8..], i) | high << 4) + m;
    }
}

/// Values of IQ4's sixteen codes.
const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// d, qs[16]: `d * value`.
fn iq4_nl(block: &[u8], out: &mut [u8]) {
    out[..2].copy_from_slice(&block[..2]);
    for (i, out) in out[2..].iter_mut().enumerate() {
        *out = IQ4_VALUES[usize::from(nibble(&block[2..], i))].cast_unsigned();
    }
}

/// d, two high bits of 8 scales, four low bits of 8 scales, qs[128]: `d * (scale - 32) * value`.
fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (unit, out) in out.chunks_exact_mut(32).enumerate() {
        let low = block[4 + unit / 2] >> (unit % 2 * 4) & 15;
        let scale = f32::from(low) + f32::from((high >> (unit * 2) & 3) << 4) - 32.0;
        for (i, out) in out.iter_mut().enumerate() {
            let code = nibble(&block[8 + unit * 16..], i);
            *out = d * scale * f32::from(IQ4_VALUES[usize::from(code)]);
        }
    }
}

/// Twice the values of the sixteen E2M1 codes.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half the scale of a block of MXFP4 is 2 to the power of its first byte, less this.
const MXFP4_BIAS: i32 = 128;

/// True if f16 holds half the block's scale.
fn mxfp4_fits(block: &[u8]) -> bool {
    (-24..=15).contains(&(i32::from(block[0]) - MXFP4_BIAS))
}

/// E8M0 scale, qs[16]: `scale * value`.
fn mxfp4(block: &[u8], out: &mut [u8]) {
    let scale = f16::from_f32(2f32.powi(i32::from(block[0]) - MXFP4_BIAS));
    out[..2].copy_from_slice(&scale.to_le_bytes());
    for (i, out) in out[2..].iter_mut().enumerate() {
        *out = E2M1_DOUBLED[usize::from(nibble(&block[1..], i))].cast_unsigned();
    }
}

fn mxfp4_numbers(block: &[u8], out: &mut [f32]) {
    // In two factors, since the power alone may be below f32's normal numbers.
    let power = i32::from(block[0]) - MXFP4_BIAS;
    let (first, second) = (2f32.powi(power / 2), 2f32.powi(power - power / 2));
    for (i, out) in out.iter_mut().enumerate() {
        let value = f32::from(E2M1_DOUBLED[usize::from(nibble(&block[1..], i))]);
        *out = value * first * second;
    }
}

/// Place of weight `i` of the three- and two-bit types: group of 128, pair of bits, byte.
fn pair_of_bits(i: usize) -> (usize, usize, usize) {
    (i / 128, i % 128 / 32, i % 32)
}

/// High bits [32], pairs of bits [64], 16 scales of six bits, d: `d * (scale - 32) * (q - 4)`, as
/// q6_k has it.
fn q3_k(block: &[u8], out: &mut [u8]) {
    out.fill(0);
    for i in 0..256 {
        let (part, pair, l) = pair_of_bits(i);
        let low = block[32 + part * 32 + l] >> (pair * 2) & 3;
        let high = block[l] >> (part * 4 + pair) & 1;
        crate::layout::put_q6k(out, i, (low | high << 2) + 32 - 4);
    }
    for (i, out) in out[192..208].iter_mut().enumerate() {
        let low = block[96 + i % 8] >> (i / 8 * 4) & 15;
        let high = block[104 + i % 4] >> (i / 4 * 2) & 3;
        *out = (low | high << 4).wrapping_sub(32);
    }
    out[208..].copy_from_slice(&block[108..]);
}

/// 16 scales and minima of four bits, pairs of bits [64], d, dmin:
/// `d * scale * q - dmin * minimum`.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(block, 80), half(block, 82));
    for (i, out) in out.iter_mut().enumerate() {
        let (part, pair, l) = pair_of_bits(i);
        let q = block[16 + part * 32 + l] >> (pair * 2) & 3;
        let (scale, minimum) = (block[i / 16] & 15, block[i / 16] >> 4);
        *out = d * f32::from(scale) * f32::from(q) - dmin * f32::from(minimum);
    }
}

/// Scale and minimum of 32 weights, from the 12 bytes of q4_k and q5_k.
fn scale_and_minimum(bytes: &[u8], unit: usize) -> (u8, u8) {
    if unit < 4 {
        return (bytes[unit] & 63, bytes[unit + 4] & 63);
    }
    let low = bytes[unit + 4];
    (low & 15 | bytes[unit - 4] >> 6 << 4, low >> 4 | bytes[unit] >> 6 << 4)
}

/// `d * scale * q - dmin * minimum` of the block's 8 units; `code` gives a weight's high bits.
fn with_minima(block: &[u8], codes: &[u8], out: &mut [f32], high: impl Fn(usize, usize) -> u8) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    for (unit, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&block[4..16], unit);
        let (d, m) = (d * f32::from(scale), dmin * f32::from(minimum));
        for (l, out) in out.iter_mut().enumerate() {
            let low = codes[unit / 2 * 32 + l] >> (unit % 2 * 4) & 15;
            *out = d * f32::from(low | high(unit, l) << 4) - m;
        }
    }
}

/// d, dmin, scales and minima [12], qs[128].
fn q4_k(block: &[u8], out: &mut [f32]) {
    with_minima(block, &block[16..], out, |_, _| 0);
}

/// d, dmin, scales and minima [12], high bits [32], qs[128].
fn q5_k(block: &[u8], out: &mut [f32]) {
    with_minima(block, &block[48..], out, |unit, l| block[16 + l] >> unit & 1);
}

#[cfg(test)]
mod tests;
