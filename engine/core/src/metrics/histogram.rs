//! A histogram of fixed size over whole numbers.

/// Numbers from here on share the last bucket: 2^40 microseconds are twelve days.
const VALUE_MAX: u64 = (1 << 40) - 1;

/// Counts numbers in buckets that grow with them: exact below 16, then 16 buckets a doubling.
/// 5 KB; recording is a few instructions and allocates nothing.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: hdrhistogram::Histogram<u64>,
    sum: u64,
    min: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        // One digit: 16 buckets a doubling, so a percentile is off by at most one part in 32.
        let buckets = hdrhistogram::Histogram::new_with_bounds(1, VALUE_MAX, 1);
        Self { buckets: buckets.expect("constant bounds"), sum: 0, min: u64::MAX, max: 0 }
    }
}

impl Histogram {
    /// Counts a number.
    pub fn record(&mut self, value: u64) {
        self.buckets.saturating_record(value);
        self.sum = self.sum.saturating_add(value);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// Adds all of another histogram's numbers.
    pub fn merge(&mut self, other: &Self) {
        self.buckets.add(&other.buckets).expect("the same bounds");
        self.sum = self.sum.saturating_add(other.sum);
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// The number that a share of `quantile` (0 to 1) does not exceed; 0 if there is none. Between
    /// the least and the largest number, within one part in 32.
    #[must_use]
    pub fn percentile(&self, quantile: f64) -> u64 {
        if self.count() == 0 {
            return 0;
        }
        let bucket = self.buckets.value_at_quantile(quantile);
        self.buckets.median_equivalent(bucket).clamp(self.min, self.max)
    }

    /// Number of samples.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.len()
    }

    /// Their sum.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Samples of all times: the middle of one of 16 buckets a doubling.
    #[test]
    fn buckets_are_those_of_a_doubling_in_sixteen() {
        for value in (0..100_000u64).chain((0..40).map(|bits| (1 << bits) + (1 << bits) / 3)) {
            let shift = value.checked_ilog2().map_or(0, |bits| bits.saturating_sub(4));
            let middle = (value >> shift << shift) + (1 << shift) / 2;
            let mut histogram = Histogram::default();
            [0, value, value, 1 << 40].iter().for_each(|value| histogram.record(*value));
            assert_eq!(histogram.percentile(0.6), middle);
        }
    }

    #[test]
    fn empty_and_huge() {
        let mut histogram = Histogram::default();
        assert_eq!((histogram.percentile(0.5), histogram.count()), (0, 0));
        histogram.record(u64::MAX);
        histogram.record(u64::MAX);
        assert_eq!((histogram.percentile(0.5), histogram.sum()), (u64::MAX, u64::MAX));
    }

    proptest! {
        #[test]
        fn percentiles_are_near_the_exact_ones(
            mut values in prop::collection::vec(0u64..5_000_000, 1..300), split in 0usize..300,
        ) {
            let split = split.min(values.len());
            let (mut whole, mut part) = (Histogram::default(), Histogram::default());
            values[..split].iter().for_each(|&value| whole.record(value));
            values[split..].iter().for_each(|&value| part.record(value));
            whole.merge(&part);
            prop_assert_eq!(whole.sum(), values.iter().sum::<u64>());
            values.sort_unstable();
            for quantile in [0.0, 0.5, 0.9, 0.99, 1.0] {
                let rank = ((values.len() as f64 * quantile).ceil() as usize).max(1);
                let exact = values[rank - 1];
                let got = whole.percentile(quantile);
                prop_assert!(got.abs_diff(exact) * 32 <= exact, "{quantile}: {got}, not {exact}");
            }
        }
    }
}
