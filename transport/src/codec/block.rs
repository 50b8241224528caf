//! Rows as small integers: blocks with a scale, and the largest number of each block apart.
//!
//! A row is its exponent, and then blocks of up to `N` numbers. A block's bytes: the scale and the
//! largest number, both f16, then a code for each number. A code is a signed integer times the
//! scale; the lowest code, which rounding never gives, stands where the largest number was.
//! Residual streams hold a few channels that are hundreds of times greater than the rest: in one
//! scale with them, their neighbours would all be rounded to nothing.
//!
//! The functions are written once and compiled for several instruction sets (`avx2`): each lane
//! does the same IEEE operations, so the bytes are the same everywhere.

use half::f16;

use super::exponent::Exponent;

/// Adding it rounds to an integer, ties to even, which stands in the low bits.
const ROUND: f32 = 12_582_912.0;

/// Integers of one width.
pub(super) trait Grid {
    /// The largest code; the least one is its negative.
    const MOST: i8;
    /// Bits of a code's magnitude.
    const BITS: i32;
    /// Code of the number that is written apart.
    const MARK: i8 = -Self::MOST - 1;
    /// Bytes of so many codes.
    fn bytes(count: usize) -> usize;
    /// Writes codes; both sides are as long as they say.
    fn write(codes: &[i8], out: &mut [u8]);
    /// The inverse of [`Grid::write`].
    fn read(bytes: &[u8], codes: &mut [i8]);
}

/// A byte each.
pub(super) struct Bytes;

impl Grid for Bytes {
    const MOST: i8 = 127;
    const BITS: i32 = 7;

    fn bytes(count: usize) -> usize {
        count
    }

    #[inline(always)]
    fn write(codes: &[i8], out: &mut [u8]) {
        out.iter_mut().zip(codes).for_each(|(to, &code)| *to = code.cast_unsigned());
    }

    #[inline(always)]
    fn read(bytes: &[u8], codes: &mut [i8]) {
        codes.iter_mut().zip(bytes).for_each(|(to, &byte)| *to = byte.cast_signed());
    }
}

/// Half a byte each: the first half of a block in the low halves, the second in the high ones.
pub(super) struct Nibbles;

impl Grid for Nibbles {
    const MOST: i8 = 7;
    const BITS: i32 = 3;

    fn bytes(count: usize) -> usize {
        count.div_ceil(2)
    }

    #[inline(always)]
    fn write(codes: &[i8], out: &mut [u8]) {
        let (low, high) = codes.split_at(out.len());
        out.iter_mut().zip(low).for_each(|(to, &code)| *to = code.cast_unsigned() & 15);
        out.iter_mut().zip(high).for_each(|(to, &code)| *to |= code.cast_unsigned() << 4);
    }

    #[inline(always)]
    fn read(bytes: &[u8], codes: &mut [i8]) {
        let (low, high) = codes.split_at_mut(bytes.len());
        low.iter_mut().zip(bytes).for_each(|(to, &byte)| *to = (byte << 4).cast_signed() >> 4);
        high.iter_mut().zip(bytes).for_each(|(to, &byte)| *to = byte.cast_signed() >> 4);
    }
}

/// Bytes of a row.
pub(super) const fn row_bytes(hidden: usize, block: usize, bits: usize) -> usize {
    let rest = hidden % block;
    let last = if rest == 0 { 0 } else { 4 + (rest * bits).div_ceil(8) };
    hidden / block * (4 + block * bits / 8) + last
}

/// Writes one row: its exponent, then its blocks.
#[inline(always)]
pub(super) fn encode_row<G: Grid, const N: usize>(row: &[f32], out: &mut [u8]) {
    // The largest scale is a normal f16, too: a subnormal one has few bits.
    let exponent = Exponent::of(row, G::BITS);
    let (byte, mut out) = out.split_at_mut(1);
    byte[0] = exponent.byte();
    for numbers in row.chunks(N) {
        let (block, rest) = out.split_at_mut(4 + G::bytes(numbers.len()));
        out = rest;
        // Whole blocks, so that the loops have a known length; zeros change nothing.
        let mut whole = [0.0f32; N];
        whole[..numbers.len()].copy_from_slice(numbers);
        exponent.take_out(&mut whole);
        let mut codes = [0; N];
        let (scale, apart) = quantise::<G, N>(&whole, &mut codes);
        block[..2].copy_from_slice(&scale.to_le_bytes());
        block[2..4].copy_from_slice(&apart.to_le_bytes());
        G::write(&codes[..numbers.len()], &mut block[4..]);
    }
}

/// Reads one row's numbers; its exponent is still to be put back.
#[inline(always)]
pub(super) fn decode_row<G: Grid, const N: usize>(bytes: &[u8], row: &mut [f32]) {
    let mut bytes = &bytes[1..];
    for numbers in row.chunks_mut(N) {
        let (block, rest) = bytes.split_at(4 + G::bytes(numbers.len()));
        bytes = rest;
        let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
        let apart = f16::from_le_bytes([block[2], block[3]]).to_f32();
        let mut codes = [0; N];
        let codes = &mut codes[..numbers.len()];
        G::read(&block[4..], codes);
        for (number, &code) in numbers.iter_mut().zip(&*codes) {
            *number = if code == G::MARK { apart } else { f32::from(code) * scale };
        }
    }
}

/// Codes of a block of numbers, their scale, and the number apart.
#[inline(always)]
fn quantise<G: Grid, const N: usize>(block: &[f32; N], codes: &mut [i8; N]) -> (f16, f16) {
    // Magnitudes order as their bits do.
    let sizes = block.map(|number| (number.to_bits() & 0x7FFF_FFFF).cast_signed());
    let largest = sizes.iter().fold(0, |most, &size| size.max(most));
    let places: [i32; N] = std::array::from_fn(|index| index as i32);
    let place = |(&size, &place)| if size == largest { place } else { i32::MAX };
    let at = sizes.iter().zip(&places).map(place).fold(i32::MAX, i32::min);
    let apart = f16::from_f32(block[at as usize]);
    let other = |(&size, &place)| if place == at { 0 } else { size };
    let second = sizes.iter().zip(&places).map(other).fold(0, i32::max);
    let most = f32::from(G::MOST);
    let scale = f16::from_f32(f32::from_bits(second.cast_unsigned()) / most);
    let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
    for (code, &number) in codes.iter_mut().zip(block) {
        let rounded = (number * inverse).clamp(-most, most) + ROUND;
        *code = rounded.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed() as i8;
    }
    codes[at as usize] = G::MARK;
    (scale, apart)
}
