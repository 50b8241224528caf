//! One power of two for a row, so that no row is too great or too small for f16.
//!
//! A row within reach has exponent 0, and its bytes are those that it would have without one.
//! Other rows are multiplied by a power of two that brings their largest magnitude just below
//! where f16 ends. Of a row whose numbers come back rounded, the exponent is the same.

/// Bits of the least f32 that f16 would round to infinity, 65520.
const BEYOND: i32 = 0x477F_F000;
/// Bits of the least f32 that f16 rounds to a normal number, 2^-14.
const LEAST: i32 = BEYOND - (30 << 23);
/// The byte of exponent 0. The byte 0 lifts the least f32, 2^-149, to 2^-7, where int8 has all
/// its bits; the byte of the largest f32 is [`EXCESS`] + 113.
const EXCESS: i32 = 142;

/// The numbers of a row are what its codec says times two to the power of this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exponent(i32);

impl Exponent {
    /// The exponent of a row of finite numbers. It is 0 if the largest magnitude, over two to the
    /// power of `bits`, is a normal f16 and the magnitude itself is one too.
    #[inline(always)]
    pub(super) fn of(row: &[f32], bits: i32) -> Self {
        // Magnitudes order as their bits do.
        let size = |number: &f32| (number.to_bits() & 0x7FFF_FFFF).cast_signed();
        let largest = row.iter().fold(0, |most, number| size(number).max(most));
        let within = LEAST + (bits << 23)..BEYOND;
        if largest == 0 || within.contains(&largest) {
            return Self(0);
        }
        // Subnormal numbers have no exponent of their own in their bits.
        let lift = if largest < 0x0080_0000 { 24 } else { 0 };
        let lifted = f32::from_bits(largest.cast_unsigned()) * power(lift);
        let steps = ((lifted.to_bits().cast_signed() - BEYOND) >> 23) + 1 - lift;
        Self(steps.max(-EXCESS))
    }

    pub(super) fn from_byte(byte: u8) -> Self {
        Self(i32::from(byte) - EXCESS)
    }

    pub(super) fn byte(self) -> u8 {
        u8::try_from(self.0 + EXCESS).expect("from -142 to 113")
    }

    /// Takes the power out of numbers, exactly but for what f16 has no bits for.
    #[inline(always)]
    pub(super) fn take_out(self, numbers: &mut [f32]) {
        // In two steps: 2^142 is no f32.
        let (half, rest) = (power(-self.0 / 2), power(-self.0 - -self.0 / 2));
        numbers.iter_mut().for_each(|number| *number = *number * half * rest);
    }

    /// The inverse. A number that was rounded up beyond f32 becomes its largest.
    pub(super) fn put_back(self, numbers: &mut [f32]) {
        if self.0 == 0 {
            return;
        }
        let (half, rest) = (power(self.0 / 2), power(self.0 - self.0 / 2));
        let back = |number: f32| (number * half * rest).clamp(f32::MIN, f32::MAX);
        numbers.iter_mut().for_each(|number| *number = back(*number));
    }
}

/// Two to the power of `exponent`, from -126 to 127.
#[inline(always)]
fn power(exponent: i32) -> f32 {
    f32::from_bits((exponent + 127).cast_unsigned() << 23)
}
