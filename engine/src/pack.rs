//! Hidden rows to the bytes that cross the wire, and back.
//!
//! A codec is chosen when a session opens and stays. A payload is `rows` rows one after another,
//! each [`Codec::row_bytes`] long, numbers little-endian, no padding. `--whole` applies the same
//! loss by [`Codec::round_trip`] where rows would cross.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// The largest finite f16; greater values are cut to it.
const F16_MAX: f32 = 65504.0;
/// Numbers converted at a time, on the stack.
const BLOCK: usize = 256;

/// How the numbers of a row are written. HELLO names a codec by its id; 2 (int8) and 3 (int4) are
/// reserved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// IEEE binary32, without loss.
    F32,
    /// IEEE binary16, rounded to nearest even; beyond +-65504 cut to that.
    #[default]
    F16,
}

/// Rows that can't be packed, or bytes that are no rows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
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
        /// What came.
        got: usize,
    },
}

impl Codec {
    /// All that this build offers, the least lossy first.
    pub const ALL: [Self; 2] = [Self::F32, Self::F16];

    /// The id in HELLO.
    #[must_use]
    pub const fn id(self) -> u8 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
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
        }
    }

    /// The inverse of [`Codec::name`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.name() == name)
    }

    /// Bytes of one row of `hidden` numbers.
    #[must_use]
    pub const fn row_bytes(self, hidden: usize) -> usize {
        match self {
            Self::F32 => 4 * hidden,
            Self::F16 => 2 * hidden,
        }
    }

    /// Writes `rows` (`[n, hidden]`) to `out` (`n * row_bytes(hidden)` bytes). Returns how many
    /// numbers were cut because the codec does not reach as far.
    ///
    /// # Errors
    /// If a number is not finite; `out` is then undefined.
    ///
    /// # Panics
    /// If the lengths do not fit together.
    pub fn pack(self, rows: &[f32], hidden: usize, out: &mut [u8]) -> Result<usize, PackError> {
        assert!(rows.len().is_multiple_of(hidden), "whole rows of {hidden}: {}", rows.len());
        assert_eq!(out.len(), self.row_bytes(rows.len()), "room for all rows");
        finite(rows, hidden)?;
        let mut cut = 0;
        match self {
            Self::F32 => {
                for (to, from) in out.chunks_exact_mut(4).zip(rows) {
                    to.copy_from_slice(&from.to_le_bytes());
                }
            }
            Self::F16 => {
                for (to, from) in out.chunks_mut(2 * BLOCK).zip(rows.chunks(BLOCK)) {
                    let mut narrow = [f16::ZERO; BLOCK];
                    cut += to_f16(from, &mut narrow[..from.len()]);
                    for (to, from) in to.chunks_exact_mut(2).zip(narrow) {
                        to.copy_from_slice(&from.to_le_bytes());
                    }
                }
            }
        }
        Ok(cut)
    }

    /// Reads rows (`[n, hidden]`) from the bytes of a peer.
    ///
    /// # Errors
    /// If there are not exactly the bytes of `out`'s rows, or a number is not finite; `out` is
    /// then undefined.
    ///
    /// # Panics
    /// If `out` is not a whole number of rows.
    pub fn unpack(self, bytes: &[u8], hidden: usize, out: &mut [f32]) -> Result<(), PackError> {
        assert!(out.len().is_multiple_of(hidden), "whole rows of {hidden}: {}", out.len());
        let expected = self.row_bytes(out.len());
        if bytes.len() != expected {
            return Err(PackError::Length { expected, got: bytes.len() });
        }
        match self {
            Self::F32 => {
                for (to, from) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *to = f32::from_le_bytes(*from);
                }
            }
            Self::F16 => {
                for (to, from) in out.chunks_mut(BLOCK).zip(bytes.chunks(2 * BLOCK)) {
                    let mut narrow = [f16::ZERO; BLOCK];
                    for (to, from) in narrow.iter_mut().zip(from.as_chunks().0) {
                        *to = f16::from_le_bytes(*from);
                    }
                    narrow[..to.len()].convert_to_f32_slice(to);
                }
            }
        }
        finite(out, hidden)
    }

    /// What a crossing does to rows, in place: the same as pack and unpack. Returns how many
    /// numbers were cut.
    ///
    /// # Errors
    /// If a number is not finite.
    ///
    /// # Panics
    /// If `rows` is not a whole number of rows.
    pub fn round_trip(self, rows: &mut [f32], hidden: usize) -> Result<usize, PackError> {
        assert!(rows.len().is_multiple_of(hidden), "whole rows of {hidden}: {}", rows.len());
        finite(rows, hidden)?;
        let mut cut = 0;
        if self == Self::F16 {
            for block in rows.chunks_mut(BLOCK) {
                let mut narrow = [f16::ZERO; BLOCK];
                let narrow = &mut narrow[..block.len()];
                cut += to_f16(block, narrow);
                narrow.convert_to_f32_slice(block);
            }
        }
        Ok(cut)
    }
}

/// At most [`BLOCK`] numbers; returns how many were cut.
fn to_f16(from: &[f32], to: &mut [f16]) -> usize {
    let mut within = [0.0; BLOCK];
    let within = &mut within[..from.len()];
    let mut cut = 0;
    for (within, &value) in within.iter_mut().zip(from) {
        *within = value.clamp(-F16_MAX, F16_MAX);
        cut += usize::from(value.abs() > F16_MAX);
    }
    to.convert_from_f32_slice(within);
    cut
}

fn finite(rows: &[f32], hidden: usize) -> Result<(), PackError> {
    // Without an early exit, so that it runs as vectors.
    if rows.iter().fold(true, |all, x| all & x.is_finite()) {
        return Ok(());
    }
    let at = rows.iter().position(|x| !x.is_finite()).expect("one is not");
    Err(PackError::NotFinite { row: at / hidden, column: at % hidden })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_and_ids_are_fixed() {
        assert_eq!(Codec::ALL.map(|codec| (codec.id(), codec.name())), [(0, "f32"), (1, "f16")]);
        assert_eq!(
            [0, 1, 2, 3, 255].map(Codec::from_id),
            [Some(Codec::F32), Some(Codec::F16), None, None, None]
        );
        assert_eq!(
            ["f16", "f32", "int8"].map(Codec::from_name),
            [Some(Codec::F16), Some(Codec::F32), None]
        );
        assert_eq!((Codec::F32.row_bytes(576), Codec::F16.row_bytes(576)), (2304, 1152));
    }

    #[test]
    fn bytes_are_little_endian_and_dense() {
        let rows = [1.0f32, -2.0, 0.5, 65504.0];
        let mut out = [0u8; 16];
        assert_eq!(Codec::F32.pack(&rows, 2, &mut out), Ok(0));
        assert_eq!(out[..8], [0, 0, 0x80, 0x3F, 0, 0, 0, 0xC0]);
        assert_eq!(Codec::F16.pack(&rows, 2, &mut out[..8]), Ok(0));
        assert_eq!(out[..8], [0, 0x3C, 0, 0xC0, 0, 0x38, 0xFF, 0x7B]);
    }

    #[test]
    fn f16_rounds_to_even_and_cuts_beyond_its_range() {
        let mut rows = [65505.0f32, -1e30, 2049.0, 2051.0, 6e-8, 2e-8, -0.0, 65503.0];
        assert_eq!(Codec::F16.round_trip(&mut rows, 4), Ok(2));
        assert_eq!(rows[..4], [65504.0, -65504.0, 2048.0, 2052.0]);
        assert_eq!(rows[4], 2f32.powi(-24));
        assert_eq!((rows[5], rows[6].to_bits(), rows[7]), (0.0, (-0.0f32).to_bits(), 65504.0));
    }

    #[test]
    fn what_is_not_finite_is_refused_on_both_sides() {
        for codec in Codec::ALL {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut rows = vec![1.0f32; 3 * 300];
                rows[2 * 300 + 7] = bad;
                let refused = Err(PackError::NotFinite { row: 2, column: 7 });
                let mut bytes = vec![0; codec.row_bytes(rows.len())];
                assert_eq!(codec.pack(&rows, 300, &mut bytes), refused);
                assert_eq!(codec.round_trip(&mut rows.clone(), 300), refused);
                for (to, &from) in bytes.chunks_mut(codec.row_bytes(1)).zip(&rows) {
                    match codec {
                        Codec::F32 => to.copy_from_slice(&from.to_le_bytes()),
                        Codec::F16 => to.copy_from_slice(&f16::from_f32(from).to_le_bytes()),
                    }
                }
                assert_eq!(codec.unpack(&bytes, 300, &mut rows), refused.map(drop));
            }
        }
    }

    #[test]
    fn lengths_of_a_peer_are_checked() {
        for codec in Codec::ALL {
            let bytes = vec![0; codec.row_bytes(8) + 1];
            let expected = codec.row_bytes(8);
            for got in [0, 1, expected - 1, expected + 1] {
                let refused = Err(PackError::Length { expected, got });
                assert_eq!(codec.unpack(&bytes[..got], 4, &mut [0.0; 8]), refused);
            }
            assert_eq!(codec.unpack(&[], 4, &mut []), Ok(()));
        }
    }

    proptest! {
        /// A crossing equals `round_trip`, at any alignment, and a second one changes nothing.
        #[test]
        fn crossing_equals_round_trip(
            bits in prop::collection::vec(any::<u32>(), 1..700), offset in 0usize..4,
        ) {
            let rows: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b))
                .map(|x| if x.is_finite() { x } else { 1.0 }).collect();
            let hidden = rows.len();
            for codec in Codec::ALL {
                let mut bytes = vec![0; offset + codec.row_bytes(hidden)];
                let cut = codec.pack(&rows, hidden, &mut bytes[offset..]).unwrap();
                let mut crossed = vec![0.0; hidden];
                codec.unpack(&bytes[offset..], hidden, &mut crossed).unwrap();
                let mut tripped = rows.clone();
                prop_assert_eq!(codec.round_trip(&mut tripped, hidden), Ok(cut));
                let bits = |rows: &[f32]| rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                prop_assert_eq!(bits(&crossed), bits(&tripped));
                prop_assert_eq!(codec.round_trip(&mut tripped, hidden), Ok(0));
                prop_assert_eq!(bits(&crossed), bits(&tripped));
                for (&x, &y) in rows.iter().zip(&crossed) {
                    let wanted = match codec {
                        Codec::F32 => x,
                        Codec::F16 => f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f32(),
                    };
                    prop_assert_eq!(y.to_bits(), wanted.to_bits());
                }
            }
        }
    }
}
