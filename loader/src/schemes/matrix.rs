//! A quantised matrix as fields of codes, zeros and scales: `w = scale * (code - zero)`.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use half::{bf16, f16};

use crate::rows::{MakeRows, Origin, Rows, SourceTensor};
use crate::tensor::{DType, TensorBytes};

/// Weights of a block of q4_0 and q8_0.
const BLOCK: usize = 32;

/// Values laid over a matrix, each for a rectangle of weights.
pub(super) struct Field {
    pub(super) bytes: TensorBytes,
    pub(super) element: Element,
    pub(super) n: Axis,
    pub(super) k: Axis,
}

/// Steps of a field along one dimension of the matrix.
#[derive(Clone, Copy)]
pub(super) struct Axis {
    /// Weights that have one element, or the word of one.
    each: usize,
    /// Distance from one element to the next.
    stride: usize,
}

/// Form of a field's elements.
#[derive(Clone, Copy)]
pub(super) enum Element {
    /// Whole numbers from 0, several in a word of 32 bits.
    Word {
        bits: u32,
        along: Along,
        order: Option<&'static [u32; 8]>,
    },
    I8,
    /// E4M3: no infinity, one NaN.
    F8,
    F16,
    Bf16,
    F32,
}

/// Dimension whose weights share a word.
#[derive(Clone, Copy)]
pub(super) enum Along {
    N,
    K,
}

/// The codes that mean 0.
pub(super) enum Zeros {
    All(i32),
    /// A field, and a number to add to each.
    Each(Field, i32),
}

/// A quantised matrix `[n, k]`.
pub(super) struct Matrix {
    pub(super) codes: Field,
    /// Bits of a code.
    pub(super) bits: u32,
    pub(super) zeros: Zeros,
    pub(super) scales: Field,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// The rows of a matrix as a type.
struct MatrixRows {
    matrix: Matrix,
    dtype: DType,
}

impl Axis {
    pub(super) fn new(each: usize, stride: usize) -> Self {
        Self { each: each.max(1), stride }
    }
}

impl Field {
    fn at(&self, n: usize, k: usize) -> usize {
        n / self.n.each * self.n.stride + k / self.k.each * self.k.stride
    }

    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.bytes[at * N..][..N].try_into().expect("N bytes")
    }

    /// A whole number.
    fn whole(&self, n: usize, k: usize) -> i32 {
        let at = self.at(n, k);
        match self.element {
            Element::Word { bits, along, order } => {
                let place = match along {
                    Along::N => n % self.n.each,
                    Along::K => k % self.k.each,
                };
                let place = order.map_or(place as u32, |order| order[place]);
                let word = u32::from_le_bytes(self.bytes(at));
                (word >> (place * bits) & ((1 << bits) - 1)).cast_signed()
            }
            Element::I8 => i32::from(self.bytes[at].cast_signed()),
            _ => unreachable!("codes and zeros are whole numbers"),
        }
    }

    fn number(&self, n: usize, k: usize) -> f32 {
        let at = self.at(n, k);
        match self.element {
            Element::F8 => e4m3(self.bytes[at]),
            Element::F16 => f16::from_le_bytes(self.bytes(at)).to_f32(),
            Element::Bf16 => bf16::from_le_bytes(self.bytes(at)).to_f32(),
            Element::F32 => f32::from_le_bytes(self.bytes(at)),
            Element::Word { .. } | Element::I8 => self.whole(n, k) as f32,
        }
    }
}

/// The number of an E4M3 byte.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (byte >> 3 & 15, byte & 7);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => f32::from(mantissa) / 512.0,
        _ => f32::from(8 + mantissa) * 2f32.powi(i32::from(exponent) - 10),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

impl Matrix {
    /// The matrix as a tensor of the source.
    pub(super) fn tensor(self, path: PathBuf, name: String) -> SourceTensor {
        let (n, k) = (self.n, self.k);
        let dtype = self.block_type();
        let kept = dtype.unwrap_or(DType::F16);
        let dtype = dtype.unwrap_or(DType::F32);
        let zeros = match &self.zeros {
            Zeros::All(_) => 0,
            Zeros::Each(field, _) => field.bytes.len(),
        };
        let bytes = self.codes.bytes.len() + self.scales.bytes.len() + zeros;
        let bits = bytes as f64 * 8.0 / (n * k).max(1) as f64;
        let origin = Origin { name: Cow::Owned(name), bits, kept };
        let rows = Rows::Made(Arc::new(MatrixRows { matrix: self, dtype }));
        SourceTensor { path, dtype, shape: vec![n, k], rows, origin, interleaved_heads: None }
    }

    /// The type whose blocks hold the same numbers, if there is one.
    fn block_type(&self) -> Option<DType> {
        let each = self.scales.k.each;
        if matches!(self.codes.element, Element::F8)
            || !self.k.is_multiple_of(BLOCK)
            || !(each.is_multiple_of(BLOCK) || each >= self.k)
        {
            return None;
        }
        let (mut low, mut high) = match self.codes.element {
            Element::I8 => (-128, 127),
            _ => (0, (1 << self.bits) - 1),
        };
        let (mut zero_min, mut zero_max) = (i32::MAX, i32::MIN);
        for n in 0..self.n {
            for k in (0..self.k).step_by(each) {
                let (scale, zero) = (self.scales.number(n, k), self.zero(n, k));
                if !scale.is_finite() || f16::from_f32(scale).to_f32() != scale {
                    return None;
                }
                (zero_min, zero_max) = (zero_min.min(zero), zero_max.max(zero));
            }
        }
        (low, high) = (low - zero_max, high - zero_min);
        [(DType::Q4_0, -8, 7), (DType::Q8_0, -128, 127)]
            .into_iter()
            .find(|(_, least, most)| low >= *least && high <= *most)
            .map(|(dtype, ..)| dtype)
    }

    fn zero(&self, n: usize, k: usize) -> i32 {
        match &self.zeros {
            Zeros::All(zero) => *zero,
            Zeros::Each(field, plus) => field.whole(n, k) + plus,
        }
    }
}

impl MakeRows for MatrixRows {
    fn make(&self, row: usize, k: usize, out: &mut [u8]) {
        let matrix = &self.matrix;
        let width = self.dtype.block_bytes();
        let weights = self.dtype.block_weights();
        for (at, out) in (0..k).step_by(weights).zip(out.chunks_exact_mut(width)) {
            let scale = matrix.scales.number(row, at);
            let zero = matrix.zero(row, at);
            let code = |i: usize| matrix.codes.whole(row, at + i) - zero;
            match self.dtype {
                DType::F32 => {
                    let number = match matrix.codes.element {
                        Element::F8 => matrix.codes.number(row, at),
                        _ => code(0) as f32,
                    };
                    out.copy_from_slice(&(scale * number).to_le_bytes());
                }
                DType::Q4_0 => {
                    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
                    let nibble = |i: usize| (code(i) + 8) as u8;
                    for (i, out) in out[2..].iter_mut().enumerate() {
                        *out = nibble(i) | nibble(i + 16) << 4;
                    }
                }
                _ => {
                    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
                    for (i, out) in out[2..].iter_mut().enumerate() {
                        *out = (code(i) as i8).cast_unsigned();
                    }
                }
            }
        }
    }
}
