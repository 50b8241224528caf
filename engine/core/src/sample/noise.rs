//! The noise of sampling: a pure function of (seed, choice, position, token).
//!
//! Sampling is `argmax(logit / temperature + noise)` with Gumbel noise, which draws from the
//! softmax. The noise of a token does not depend on how many were drafted, verified or thrown away
//! before, so a draft tree is verified by walking the same argmax, and every split and schedule
//! gives the same tokens.
//!
//! # Definition
//! - `w` is word `token % 4` of Philox4x32-10 (Salmon et al., SC 2011) with
//!   key `[seed's low half, seed's high half]` and counter `[token / 4, position, choice, 0]`.
//! - `u = (w + 1/2) / 2^32`, exact in f64 and strictly between 0 and 1.
//! - `noise = -ln(-ln(u))` in f64, with `ln` of this file.
//!
//! Only additions, multiplications and divisions of f64 are used, each rounded once by IEEE 754,
//! so every platform gives the same bits.

/// Names the draw among the streams of one seed; a second use of Philox takes another number.
const STREAM: u32 = 0;

/// Noise is below this for every `u`: `-ln(-ln(1 - 2^-33))` is 22.87.
pub(super) const NOISE_MAX: f64 = 22.875;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32-10: four words that look random, from a counter and a key.
#[must_use]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c0);
        let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c2);
        (c0, c1, c2, c3) =
            ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// Gumbel noise by token, for one (seed, choice, position). Neighbouring tokens share a block of
/// four words, so ascending ids cost a quarter of a Philox each.
pub(super) struct Noise {
    key: [u32; 2],
    position: u32,
    choice: u32,
    block: u32,
    words: [u32; 4],
}

impl Noise {
    pub(super) fn new(seed: u64, choice: u32, position: u32) -> Self {
        let key = [seed as u32, (seed >> 32) as u32];
        let words = philox([0, position, choice, STREAM], key);
        Self { key, position, choice, block: 0, words }
    }

    /// The noise is [`gumbel`] of this.
    pub(super) fn word(&mut self, token: u32) -> u32 {
        if self.block != token / 4 {
            self.block = token / 4;
            self.words = philox([self.block, self.position, self.choice, STREAM], self.key);
        }
        self.words[token as usize % 4]
    }
}

/// Not below [`gumbel`], for a tenth of the price: `noise <= -ln(1 - u)`, and `1 - u` is at least
/// a power of two that the leading ones of the word tell.
pub(super) fn gumbel_max(word: u32) -> f64 {
    // A little more than ln(2), so that rounding can't turn it.
    const STEP: f64 = std::f64::consts::LN_2 * (1.0 + 1e-9);
    f64::from(word.leading_ones() + 1) * STEP
}

pub(super) fn gumbel(word: u32) -> f64 {
    let u = (f64::from(word) + 0.5) * (1.0 / 4_294_967_296.0);
    -ln(-ln(u))
}

const LN2_HI: f64 = 0.693_147_180_369_123_8;
const LN2_LO: f64 = 1.908_214_929_270_587_7e-10;

/// Natural logarithm of a positive, normal `x`, to about an ulp, the same on every platform.
///
/// `x = m 2^e` with `m` in `[sqrt(1/2), sqrt(2))`; `ln m = 2 atanh((m - 1) / (m + 1))` by its
/// series, whose first term left out is below 2^-60 of the sum.
pub(super) fn ln(x: f64) -> f64 {
    let mut exponent = (x.to_bits() >> 52) as i64 - 1023;
    let mut m = f64::from_bits(x.to_bits() & ((1 << 52) - 1) | 1023 << 52);
    if m >= std::f64::consts::SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    let f = (m - 1.0) / (m + 1.0);
    let square = f * f;
    let mut series = 0.0;
    for reciprocal in ODD_RECIPROCALS {
        series = (series + reciprocal) * square;
    }
    let e = exponent as f64;
    e * LN2_HI + (e * LN2_LO + (2.0 * f + 2.0 * f * series))
}

/// `1/23, 1/21 .. 1/3`
const ODD_RECIPROCALS: [f64; 11] = {
    let mut table = [0.0; 11];
    let mut i = 0;
    while i < 11 {
        table[i] = 1.0 / (23 - 2 * i) as f64;
        i += 1;
    }
    table
};

/// `e^x` for `x <= 0`, to about an ulp, the same on every platform; 0 below -700.
///
/// `x = k ln 2 + r` with `|r| <= ln(2) / 2`; `e^r` by its series to `r^13`.
pub(super) fn exp(x: f64) -> f64 {
    if x < -700.0 {
        return 0.0;
    }
    // A cast cuts towards zero, so this rounds to the nearest for x <= 0.
    let power = (x * std::f64::consts::LOG2_E - 0.5) as i64;
    let k = power as f64;
    let r = (x - k * LN2_HI) - k * LN2_LO;
    let mut series = 0.0;
    for reciprocal in FACTORIAL_RECIPROCALS {
        series = series * r + reciprocal;
    }
    series * f64::from_bits(((power + 1023) as u64) << 52)
}

/// `1/13!, 1/12! .. 1/0!`
const FACTORIAL_RECIPROCALS: [f64; 14] = {
    let mut table = [1.0; 14];
    let mut factorial = 1u64;
    let mut n = 0;
    while n < 14 {
        if n > 0 {
            factorial *= n as u64;
        }
        table[13 - n] = 1.0 / factorial as f64;
        n += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors of Random123 publish.
    #[test]
    fn philox_gives_its_known_answers() {
        let ones = u32::MAX;
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(
            philox([ones; 4], [ones; 2]),
            [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]
        );
        assert_eq!(
            philox(
                [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344],
                [0xA409_3822, 0x299F_31D0]
            ),
            [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]
        );
    }

    #[test]
    fn ln_and_exp_are_within_two_ulp_of_the_platform() {
        let close = |ours: f64, theirs: f64| {
            (ours - theirs).abs() <= 2.0 * f64::EPSILON * theirs.abs().max(f64::MIN_POSITIVE)
        };
        for step in 1..=200_000u32 {
            let x = f64::from(step).powi(3) * 1e-9;
            assert!(close(ln(x), x.ln()) || x == 1.0, "ln {x}: {} {}", ln(x), x.ln());
            let y = -f64::from(step) * 0.0035;
            assert!(close(exp(y), y.exp()) || y < -690.0, "exp {y}: {} {}", exp(y), y.exp());
        }
        assert_eq!((ln(1.0), exp(0.0), exp(-701.0), exp(f64::NEG_INFINITY)), (0.0, 1.0, 0.0, 0.0));
    }

    /// Bits, not decimals: a change here changes what seeds mean, and is a new arithmetic.
    #[test]
    fn noise_is_frozen() {
        let mut noise = Noise::new(0x0123_4567_89AB_CDEF, 0, 17);
        let bits: Vec<u64> =
            [0, 1, 2, 3, 4, 49_151].map(|id| gumbel(noise.word(id)).to_bits()).to_vec();
        let frozen = [
            0x3FD2_8024_4E33_0886,
            0xBFF5_EF07_28FC_9703,
            0x3FC9_558B_5999_23AC,
            0x3FD0_335E_6F29_15D5,
            0xBFC1_B025_EB9F_BDB4,
            0xBFE7_28DF_CCDF_6279,
        ];
        assert_eq!(bits, frozen);
        assert_eq!(gumbel(u32::MAX).to_bits(), 0x4036_DFB5_16F1_CBBF);
        assert!(gumbel(u32::MAX) < NOISE_MAX && gumbel(0) > -3.2);
    }

    #[test]
    fn the_bound_holds_and_is_near() {
        for i in 0..100_000u32 {
            let word = philox([i, 0, 0, 0], [1, 2])[0];
            for word in [word, !(word >> (i % 32)), u32::MAX - i, i, 1 << (i % 32)] {
                let (noise, max) = (gumbel(word), gumbel_max(word));
                assert!(noise <= max && max <= NOISE_MAX, "{word:x}: {noise} {max}");
            }
            let word = word | 1 << 31;
            assert!(gumbel_max(word) - gumbel(word) < 1.1, "{word:x}");
        }
    }

    #[test]
    fn each_argument_matters() {
        let of =
            |seed, choice, position, token| gumbel(Noise::new(seed, choice, position).word(token));
        let base = of(1, 2, 3, 4);
        for other in [
            of(2, 2, 3, 4),
            of(1 | 1 << 32, 2, 3, 4),
            of(1, 3, 3, 4),
            of(1, 2, 4, 4),
            of(1, 2, 3, 5),
            of(1, 2, 3, 8),
        ] {
            assert_ne!(base.to_bits(), other.to_bits());
        }
    }
}
