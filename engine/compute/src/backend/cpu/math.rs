//! Elementwise and row-wise arithmetic, written once over plain numbers.
//!
//! Every function is `inline(always)`: a level instantiates it inside a function of its own
//! instruction set, where the compiler makes vectors of it. No operation here may be reordered or
//! contracted by a compiler, so the bits are the same at every vector width. Of the mathematical
//! functions only fused multiply-add, division and square root are used: IEEE 754 fixes those to
//! the bit, and nothing else.

/// Activations of one row are quantised in blocks of this many numbers.
pub(super) const BLOCK: usize = 32;
/// Interleaved partial sums of a norm.
const LANES: usize = 16;
/// Adding this rounds an f32 of magnitude below 2^22 to a whole number, ties to even.
const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
/// Blocks whose largest magnitude is below this count as zeros; 127 / it is still finite.
pub(super) const AMAX_MIN: f32 = 1e-30;

/// 32 activations: `x = d * q`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Block {
    /// Whole numbers in -127..=127.
    pub(super) q: [i8; BLOCK],
    /// Largest magnitude / 127.
    pub(super) d: f32,
    /// `d` times the sum of `q`.
    pub(super) s: f32,
    /// Sums of `q[..16]` and `q[16..]`.
    pub(super) sums: [i16; 2],
}

/// Quantises one row; `x.len()` is `32 * out.len()`.
#[inline(always)]
pub(super) fn quantise_row(x: &[f32], out: &mut [Block]) {
    let (x, rest) = x.as_chunks::<BLOCK>();
    assert!(rest.is_empty() && x.len() == out.len(), "{} blocks for {} rows", x.len(), out.len());
    for (x, out) in x.iter().zip(out) {
        // The order of magnitudes is that of the bit patterns without sign.
        let amax = x.iter().map(|v| v.to_bits() & 0x7fff_ffff).fold(0, u32::max);
        let amax = f32::from_bits(amax);
        let (d, inverse) = if amax >= AMAX_MIN { (amax / 127.0, 127.0 / amax) } else { (0.0, 0.0) };
        let mut whole = [0i32; BLOCK];
        for (whole, x) in whole.iter_mut().zip(x) {
            let bits = (x * inverse + ROUND).to_bits().cast_signed();
            *whole = (bits - ROUND.to_bits().cast_signed()).clamp(-127, 127);
        }
        for (q, whole) in out.q.iter_mut().zip(&whole) {
            *q = *whole as i8;
        }
        let first: i32 = whole[..16].iter().sum();
        let second: i32 = whole[16..].iter().sum();
        out.sums = [first as i16, second as i16];
        out.d = d;
        out.s = d * (first + second) as f32;
    }
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`; `weight` is the bytes of f32 numbers.
///
/// Square `i` goes to lane `i % 16` by fused multiply-add; the lanes are added in halves.
#[inline(always)]
pub(super) fn rms_norm_row(x: &[f32], weight: &[u8], eps: f32, out: &mut [f32]) {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = x.mul_add(*x, *lane);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = x.mul_add(*x, *lane);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    let scale = 1.0 / (lanes[0] / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight.as_chunks::<4>().0) {
        *out = x * scale * f32::from_le_bytes(*weight);
    }
}

/// `gate = silu(gate) * up`, with `silu(x) = x / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// e^x within 1.1 units in the last place; 0 below the normal range, 1 at 0, infinite above
/// the range, never NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const SMALLEST: f32 = -87.336_54; // e^x is the smallest normal f32
    const LARGEST: f32 = 89.0; // e^x is infinite
    const LN_2_HIGH: f32 = core::f32::consts::LN_2;
    const LN_2_LOW: f32 = -1.904_654_3e-9; // ln 2 - LN_2_HIGH
    // 1/7!, 1/6!, ... : the series on |r| <= ln 2 / 2 is off by less than 6e-9.
    const SERIES: [f32; 8] =
        [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

    let inside = if x > SMALLEST { x } else { SMALLEST };
    let inside = if inside < LARGEST { inside } else { LARGEST };
    let shifted = inside.mul_add(core::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let r = whole.mul_add(-LN_2_LOW, whole.mul_add(-LN_2_HIGH, inside));
    let mut sum = SERIES[0];
    let mut i = 1;
    while i < SERIES.len() {
        sum = sum.mul_add(r, SERIES[i]);
        i += 1;
    }
    // 2^whole in two factors, since 2^128 is no f32.
    let n = shifted.to_bits().cast_signed() - ROUND.to_bits().cast_signed();
    let power = |n: i32| f32::from_bits(((n + 127) << 23).cast_unsigned());
    let y = sum * power(n >> 1) * power(n - (n >> 1));
    if x >= SMALLEST { y } else { 0.0 }
}

/// (cos x, sin x), each within one unit in the last place, for |x| up to 2^32.
#[inline(always)]
pub(super) fn cos_sin(x: f32) -> (f32, f32) {
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
    const HALF_PI_HIGH: f64 = core::f64::consts::FRAC_PI_2;
    const HALF_PI_LOW: f64 = 6.123_233_995_736_766e-17; // pi/2 - HALF_PI_HIGH
    // (-1)^n / (2n+1)! and (-1)^n / (2n)!, from the highest: on |r| <= pi/4 off by less than 5e-17.
    const SIN: [f64; 8] = [
        -1.0 / 1_307_674_368_000.0,
        1.0 / 6_227_020_800.0,
        -1.0 / 39_916_800.0,
        1.0 / 362_880.0,
        -1.0 / 5040.0,
        1.0 / 120.0,
        -1.0 / 6.0,
        1.0,
    ];
    const COS: [f64; 9] = [
        1.0 / 20_922_789_888_000.0,
        -1.0 / 87_178_291_200.0,
        1.0 / 479_001_600.0,
        -1.0 / 3_628_800.0,
        1.0 / 40_320.0,
        -1.0 / 720.0,
        1.0 / 24.0,
        -0.5,
        1.0,
    ];
    let x = f64::from(x);
    let shifted = x.mul_add(core::f64::consts::FRAC_2_PI, ROUND);
    let turns = shifted - ROUND;
    // The fused product keeps all bits of the reduced angle.
    let r = turns.mul_add(-HALF_PI_LOW, turns.mul_add(-HALF_PI_HIGH, x));
    let r2 = r * r;
    let series = |terms: &[f64]| terms[1..].iter().fold(terms[0], |sum, c| sum.mul_add(r2, *c));
    let (sin, cos) = ((series(&SIN) * r) as f32, series(&COS) as f32);
    match shifted.to_bits() & 3 {
        0 => (cos, sin),
        1 => (-sin, cos),
        2 => (-cos, -sin),
        _ => (sin, -cos),
    }
}

/// `angles = [cos.., sin..]` of `position * inv_freq`, the product rounded to f32.
#[inline(always)]
pub(super) fn rope_angles_row(position: u32, inv_freq: &[f32], angles: &mut [f32]) {
    let (cos, sin) = angles.split_at_mut(inv_freq.len());
    for ((cos, sin), inv_freq) in cos.iter_mut().zip(sin).zip(inv_freq) {
        (*cos, *sin) = cos_sin(position as f32 * inv_freq);
    }
}

/// Rotates one head by half-split pairs; `angles` is `[cos.., sin..]`, as long as the head.
#[inline(always)]
pub(super) fn rotate(head: &mut [f32], angles: &[f32]) {
    let (first, second) = head.split_at_mut(angles.len() / 2);
    let (cos, sin) = angles.split_at(angles.len() / 2);
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (x, y) = (*a, *b);
        *a = x.mul_add(*cos, -(y * sin));
        *b = y.mul_add(*cos, x * sin);
    }
}

/// f16 to f32, exact; without a branch.
#[inline(always)]
pub(super) fn f16_to_f32(half: u16) -> f32 {
    let half = u32::from(half);
    let (sign, rest) = ((half & 0x8000) << 16, half & 0x7fff);
    let normal = (rest << 13) + (112 << 23);
    let special = normal + (112 << 23);
    let subnormal = (rest as f32 * f32::from_bits(103 << 23)).to_bits(); // rest * 2^-24
    let magnitude = if rest < 0x400 { subnormal } else { normal };
    f32::from_bits(sign | if rest >= 0x7c00 { special } else { magnitude })
}

/// f32 to f16, to nearest, ties to even, infinite beyond the range; without a branch.
#[inline(always)]
pub(super) fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let (sign, rest) = (bits >> 16 & 0x8000, bits & 0x7fff_ffff);
    let normal = rest.wrapping_sub(112 << 23).wrapping_add(0xfff + (rest >> 13 & 1)) >> 13;
    // 0.5 has the last place 2^-24, the first place of f16.
    let subnormal = (f32::from_bits(rest) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let special = if rest > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    let magnitude = if rest < 113 << 23 { subnormal } else { normal };
    (sign | if rest >= 143 << 23 { special } else { magnitude }) as u16
}

/// [`f32_to_f16`] of each number.
#[inline(always)]
pub(super) fn f32_to_f16_all(from: &[f32], to: &mut [u16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32_to_f16(*from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ulps(got: f32, want: f64) -> f64 {
        let near = want as f32;
        let step = f64::from(f32::from_bits(near.abs().max(f32::MIN_POSITIVE).to_bits() + 1))
            - f64::from(near.abs().max(f32::MIN_POSITIVE));
        (f64::from(got) - want).abs() / step
    }

    #[test]
    fn exp_is_close_and_has_no_surprise() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        for x in [f32::NEG_INFINITY, f32::MIN, -1e9] {
            assert_eq!(exp(x), 0.0);
        }
        for x in [f32::MAX, 1e9, 88.8] {
            assert_eq!(exp(x), f32::INFINITY);
        }
        let mut worst = 0f64;
        for i in 0..400_000 {
            let x = -87.3 + i as f32 * (88.7 + 87.3) / 400_000.0;
            worst = worst.max(ulps(exp(x), f64::from(x).exp()));
        }
        assert!(worst < 1.1, "{worst}");
    }

    #[test]
    fn cos_and_sin_are_within_one_unit() {
        let mut worst = 0f64;
        for i in 0..200_000u32 {
            let x = f32::from_bits(i.wrapping_mul(2_654_435_761) % 0x4980_0000); // 0..2^20
            let (cos, sin) = cos_sin(x);
            worst = worst.max(ulps(cos, f64::from(x).cos())).max(ulps(sin, f64::from(x).sin()));
        }
        for i in 0..200_000 {
            let x = i as f32 * 5.242_88;
            let (cos, sin) = cos_sin(x);
            worst = worst.max(ulps(cos, f64::from(x).cos())).max(ulps(sin, f64::from(x).sin()));
        }
        assert!(worst < 1.0, "{worst}");
        assert_eq!(cos_sin(0.0), (1.0, 0.0));
    }

    #[test]
    fn halves_convert_as_ieee_says() {
        for half in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(half), half::f16::from_bits(half).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan());
        }
        for i in 0..1u32 << 22 {
            let x = f32::from_bits(i << 10 | i.wrapping_mul(2_654_435_761) >> 22);
            let (ours, theirs) = (f32_to_f16(x), half::f16::from_f32(x));
            assert!(ours == theirs.to_bits() || x.is_nan() && theirs.is_nan(), "{x:e}");
        }
        // Ties and the ends of the ranges.
        for base in 0..0x7c00u16 {
            let (low, high) = (f16_to_f32(base), f16_to_f32(base + 1));
            let middle = if high.is_finite() { low / 2.0 + high / 2.0 } else { 65520.0 };
            for x in [middle.next_down(), middle, middle.next_up(), -middle] {
                assert_eq!(f32_to_f16(x), half::f16::from_f32(x).to_bits(), "{x:e}");
            }
        }
    }

    #[test]
    fn a_block_keeps_its_largest_number_and_nothing_overflows() {
        let mut x = [0.25f32; 96];
        x[3] = -2.0;
        x[32..64].fill(1e-38);
        x[64..].fill(f32::MAX);
        let mut blocks = [Block::default(); 3];
        quantise_row(&x, &mut blocks);
        assert_eq!(blocks[0].q[3], -127);
        assert_eq!(blocks[0].q[0], 16); // 15.875
        assert_eq!(blocks[0].sums, [15 * 16 - 127, 16 * 16]);
        assert_eq!(blocks[0].d, 2.0 / 127.0);
        assert_eq!((blocks[1].d, blocks[1].q), (0.0, [0; 32]));
        assert_eq!(blocks[2].q, [127; 32]);
    }
}
