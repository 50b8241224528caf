//! Chance without state: a draw is a hash of what it is for, so it does not depend on what else
//! was drawn before, and all policies meet the same requests and the same texts.

/// Purpose of a draw. The order is part of all results: new purposes go to the end.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// Time of a request.
    Arrival,
    /// Device of a request.
    Device,
    /// Prompt of a request.
    Prompt,
    /// Rate of a link.
    Rate,
    /// Confidence of a drafter.
    Confidence,
    /// Rank of the right one among a drafter's candidates.
    Rank,
    /// True if text is copied from the prompt.
    Copied,
    /// True if a drafter is wrong.
    Wrong,
    /// Cloud replica that serves a device.
    Replica,
    /// A point of a space that is searched.
    Point,
    /// Number of a prompt's tokens.
    Length,
    /// Words of a prompt.
    Word,
    /// Time at which an answer is given up, if it is.
    Cancel,
    /// Lifetime of a device, and the kind of its end.
    Life,
}

/// SplitMix64's mixing step.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// A number in `0.0..1.0`, the same for the same arguments.
#[must_use]
pub fn unit(seed: u64, purpose: Purpose, first: u64, second: u64) -> f64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut bits = mix(seed.wrapping_add(GOLDEN));
    for part in [purpose as u64, first, second] {
        bits = mix(bits ^ part.wrapping_add(1).wrapping_mul(GOLDEN));
    }
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Time to the next of events that come by themselves, `rate` of them in a unit of time: the gaps
/// of a Poisson process.
#[must_use]
pub fn exponential(rate: f64, seed: u64, purpose: Purpose, first: u64, second: u64) -> f64 {
    -(1.0 - unit(seed, purpose, first, second)).ln() / rate
}

/// `0..count` in an order that depends on the seed.
#[must_use]
pub fn permutation(seed: u64, purpose: Purpose, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        let at = (unit(seed, purpose, last as u64, count as u64) * (last + 1) as f64) as usize;
        order.swap(last, at.min(last));
    }
    order
}

/// The value below which a share `share` of the standard normal distribution lies, to 0.0005
/// (Abramowitz and Stegun 26.2.23).
#[must_use]
pub fn normal_quantile(share: f64) -> f64 {
    let tail = share.min(1.0 - share).max(1e-12);
    let t = (-2.0 * tail.ln()).sqrt();
    let above = 2.515_517 + t * (0.802_853 + t * 0.010_328);
    let below = 1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308));
    let value = t - above / below;
    if share < 0.5 { -value } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_even_and_depend_on_each_argument() {
        let mean: f64 = (0..10_000).map(|i| unit(1, Purpose::Rank, i, 7)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let base = unit(1, Purpose::Rank, 2, 3);
        assert_eq!(base, unit(1, Purpose::Rank, 2, 3));
        for other in [
            unit(2, Purpose::Rank, 2, 3),
            unit(1, Purpose::Rate, 2, 3),
            unit(1, Purpose::Rank, 3, 3),
            unit(1, Purpose::Rank, 2, 4),
            unit(1, Purpose::Rank, 3, 2),
        ] {
            assert!((base - other).abs() > 1e-9);
        }
    }

    #[test]
    fn exponential_times_have_mean_and_spread() {
        let draws: Vec<f64> =
            (0..20_000).map(|i| exponential(4.0, 3, Purpose::Arrival, i, 0)).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let square = draws.iter().map(|draw| draw * draw).sum::<f64>() / draws.len() as f64;
        assert!((mean - 0.25).abs() < 0.005, "{mean}");
        // The standard deviation of an exponential distribution is its mean.
        assert!(((square - mean * mean).sqrt() / mean - 1.0).abs() < 0.03, "{square}");
        assert!(draws.iter().all(|draw| *draw >= 0.0 && draw.is_finite()));
    }

    #[test]
    fn a_permutation_has_each_once() {
        let mut order = permutation(5, Purpose::Prompt, 100);
        assert_ne!(order[..5], [0, 1, 2, 3, 4]);
        order.sort_unstable();
        assert!(order.into_iter().eq(0..100));
    }

    #[test]
    fn quantiles_of_the_normal_distribution() {
        for (share, value) in [(0.5, 0.0), (0.9, 1.2816), (0.975, 1.96), (0.1, -1.2816)] {
            assert!((normal_quantile(share) - value).abs() < 1e-3, "{share}");
        }
    }
}
