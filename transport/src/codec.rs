//! Hidden rows to the bytes that cross the wire, and back.
//!
//! A codec is chosen when a session opens and stays. A payload is `rows` rows one after another,
//! each [`Codec::row_bytes`] long, numbers little-endian, no padding. `--whole --wire` applies the
//! same loss where rows would cross.
//!
//! All codecs but f32 begin a row with its exponent (`exponent`), so that no row is out of reach.

#[cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "functions compiled for AVX2, entered after the CPU was asked")
)]
mod avx2;
mod block;
mod exponent;
#[cfg(test)]
mod tests;

use half::f16;
use half::slice::HalfFloatSliceExt;

use self::block::{Bytes, Nibbles};
use self::exponent::Exponent;

/// Numbers converted at a time, on the stack.
const BLOCK: usize = 256;
/// Numbers that share a scale.
const INT8_BLOCK: usize = 64;
const INT4_BLOCK: usize = 32;

/// Format of the numbers of a row. HELLO names a codec by its id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// IEEE binary32, without loss.
    F32,
    /// IEEE binary16, rounded to nearest even, with one exponent for the row.
    F16,
    /// Blocks of 64 numbers as 8-bit integers with one scale, the largest number of each apart as
    /// f16: 8.5 bits a number, and one exponent for the row.
    #[default]
    Int8,
    /// Blocks of 32 numbers as 4-bit integers with one scale, the largest number of each apart as
    /// f16: 5 bits a number, and one exponent for the row.
    Int4,
}

/// Rows that can't be packed, or bytes that are no rows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// A number is NaN or infinite: BAD_VALUE on the wire.
    #[error("row {row} holds a value that is not finite, at column {column}")]
    NotFinite {
        /// The first such row of the payload.
        row: usize,
        /// The first such number in it.
        column: usize,
    },
    /// The bytes are no whole number of rows, or not as many as asked for: BAD_SHAPE on the wire.
    #[error("{got} bytes where {expected} bytes of rows are expected")]
    Length {
        /// `rows * row_bytes`
        expected: usize,
        /// Length found.
        got: usize,
    },
}

impl Codec {
    /// All that this build offers, the least lossy first.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Int8, Self::Int4];

    /// The id in HELLO. 1 to 3 were rows without an exponent, which this build does not speak.
    #[must_use]
    pub const fn id(self) -> u8 {
        match self {
            Self::F32 => 0,
            Self::F16 => 4,
            Self::Int8 => 5,
            Self::Int4 => 6,
        }
    }

    /// The inverse of [`Codec::id`]; `None` for ids that this build does not offer.
    #[must_use]
    pub fn from_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.id() == id)
    }

    /// The name in flags and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// The inverse of [`Codec::name`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.name() == name)
    }

    /// The codec of rows that come back in a session of this one. Nothing follows a row that comes
    /// back but the final norm and the head, so its error is all in the logits, and few rows come
    /// back: int4 sessions get them as int8.
    #[must_use]
    pub const fn down(self) -> Self {
        match self {
            Self::Int4 => Self::Int8,
            same => same,
        }
    }

    /// Bytes of one row of `hidden` numbers.
    #[must_use]
    pub const fn row_bytes(self, hidden: usize) -> usize {
        match self {
            Self::F32 => 4 * hidden,
            Self::F16 => 1 + 2 * hidden,
            Self::Int8 => 1 + block::row_bytes(hidden, INT8_BLOCK, 8),
            Self::Int4 => 1 + block::row_bytes(hidden, INT4_BLOCK, 4),
        }
    }

    /// Writes `rows` (`[n, hidden]`) to `out` (`n * row_bytes(hidden)` bytes).
    ///
    /// # Errors
    /// If a number is not finite; `out` is then undefined.
    ///
    /// # Panics
    /// If the lengths do not fit together.
    pub fn encode(self, rows: &[f32], hidden: usize, out: &mut [u8]) -> Result<(), CodecError> {
        assert!(rows.len().is_multiple_of(hidden), "whole rows of {hidden}: {}", rows.len());
        let row_bytes = self.row_bytes(hidden);
        assert_eq!(out.len(), rows.len() / hidden * row_bytes, "room for all rows");
        finite(rows, hidden)?;
        let rows = rows.chunks_exact(hidden).zip(out.chunks_exact_mut(row_bytes));
        match self {
            Self::F32 => rows.for_each(|(row, out)| encode_f32(row, out)),
            Self::F16 => rows.for_each(|(row, out)| encode_f16(row, out)),
            Self::Int8 => avx2::encode::<Bytes, INT8_BLOCK>(rows),
            Self::Int4 => avx2::encode::<Nibbles, INT4_BLOCK>(rows),
        }
        Ok(())
    }

    /// Reads rows (`[n, hidden]`) from the bytes of a peer.
    ///
    /// # Errors
    /// If there are not exactly the bytes of `out`'s rows, or a number is not finite; `out` is
    /// then undefined.
    ///
    /// # Panics
    /// If `out` is not a whole number of rows.
    pub fn decode(self, bytes: &[u8], hidden: usize, out: &mut [f32]) -> Result<(), CodecError> {
        assert!(out.len().is_multiple_of(hidden), "whole rows of {hidden}: {}", out.len());
        let row_bytes = self.row_bytes(hidden);
        let expected = out.len() / hidden * row_bytes;
        if bytes.len() != expected {
            return Err(CodecError::Length { expected, got: bytes.len() });
        }
        let rows = out.chunks_exact_mut(hidden).zip(bytes.chunks_exact(row_bytes));
        match self {
            Self::F32 => rows.for_each(|(row, bytes)| decode_f32(bytes, row)),
            Self::F16 => rows.for_each(|(row, bytes)| decode_f16(bytes, row)),
            Self::Int8 => avx2::decode::<Bytes, INT8_BLOCK>(rows),
            Self::Int4 => avx2::decode::<Nibbles, INT4_BLOCK>(rows),
        }
        finite(out, hidden)?;
        if self != Self::F32 {
            // After the check: what is too great for f32 by a rounding alone is no fault.
            for (row, bytes) in out.chunks_exact_mut(hidden).zip(bytes.chunks_exact(row_bytes)) {
                Exponent::from_byte(bytes[0]).put_back(row);
            }
        }
        Ok(())
    }
}

fn encode_f32(row: &[f32], out: &mut [u8]) {
    for (to, from) in out.as_chunks_mut().0.iter_mut().zip(row) {
        *to = from.to_le_bytes();
    }
}

fn decode_f32(bytes: &[u8], row: &mut [f32]) {
    for (to, from) in row.iter_mut().zip(bytes.as_chunks().0) {
        *to = f32::from_le_bytes(*from);
    }
}

/// Writes one row: its exponent, then its numbers.
fn encode_f16(row: &[f32], out: &mut [u8]) {
    let exponent = Exponent::of(row, 0);
    let (byte, out) = out.split_at_mut(1);
    byte[0] = exponent.byte();
    for (to, from) in out.chunks_mut(2 * BLOCK).zip(row.chunks(BLOCK)) {
        let mut within = [0.0; BLOCK];
        within[..from.len()].copy_from_slice(from);
        exponent.take_out(&mut within);
        let mut narrow = [f16::ZERO; BLOCK];
        narrow.convert_from_f32_slice(&within);
        for (to, from) in to.as_chunks_mut().0.iter_mut().zip(narrow) {
            *to = from.to_le_bytes();
        }
    }
}

/// Reads one row's numbers; its exponent is still to be put back.
fn decode_f16(bytes: &[u8], row: &mut [f32]) {
    for (to, from) in row.chunks_mut(BLOCK).zip(bytes[1..].chunks(2 * BLOCK)) {
        let mut narrow = [f16::ZERO; BLOCK];
        for (to, from) in narrow.iter_mut().zip(from.as_chunks().0) {
            *to = f16::from_le_bytes(*from);
        }
        narrow[..to.len()].convert_to_f32_slice(to);
    }
}

fn finite(rows: &[f32], hidden: usize) -> Result<(), CodecError> {
    // Without an early exit, so that it runs as vectors.
    if rows.iter().fold(true, |all, x| all & x.is_finite()) {
        return Ok(());
    }
    let at = rows.iter().position(|x| !x.is_finite()).expect("one is not");
    Err(CodecError::NotFinite { row: at / hidden, column: at % hidden })
}
