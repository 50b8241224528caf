//! A histogram of fixed size over whole numbers.

/// Buckets of one doubling: a percentile is off by at most one part in 32.
const PER_DOUBLING: u64 = 16;
const SHIFT: u32 = PER_DOUBLING.trailing_zeros();
/// Numbers from here on share the last bucket: 2^40 microseconds are twelve days.
const VALUE_MAX: u64 = (1 << 40) - 1;
const BUCKETS: usize = bucket_of(VALUE_MAX) + 1;

/// Counts numbers in buckets that grow with them: exact below 16, then 16 buckets a doubling.
/// 5 KB; recording is a few instructions and allocates nothing.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    sum: u64,
    min: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], count: 0, sum: 0, min: u64::MAX, max: 0 }
    }
}

const fn bucket_of(value: u64) -> usize {
    if value < PER_DOUBLING {
        return value as usize;
    }
    let doublings = value.ilog2() - SHIFT;
    let within = (value >> doublings) - PER_DOUBLING;
    ((doublings as u64 + 1) * PER_DOUBLING + within) as usize
}

/// The number in the middle of a bucket.
const fn middle_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < PER_DOUBLING {
        return bucket;
    }
    let doublings = bucket / PER_DOUBLING - 1;
    let low = (PER_DOUBLING + bucket % PER_DOUBLING) << doublings;
    low + (1 << doublings) / 2
}

impl Histogram {
    /// Counts a number.
    pub fn record(&mut self, value: u64) {
        self.buckets[bucket_of(value.min(VALUE_MAX))] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// Adds all of another histogram's numbers.
    pub fn merge(&mut self, other: &Self) {
        for (to, from) in self.buckets.iter_mut().zip(&other.buckets) {
            *to += from;
        }
        self.count += other.count;
        self.sum = self.sum.saturating_add(other.sum);
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// The number that a share of `quantile` (0 to 1) does not exceed; 0 if there is none. Between
    /// the least and the greatest number, within one part in 32.
    #[must_use]
    pub fn percentile(&self, quantile: f64) -> u64 {
        if self.count == 0 {
            return 0;
        }
        let rank = ((self.count as f64 * quantile).ceil() as u64).clamp(1, self.count);
        let mut seen = 0;
        for (bucket, &count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle_of(bucket).clamp(self.min, self.max);
            }
        }
        self.max
    }

    /// Number of samples.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
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

    #[test]
    fn buckets_are_in_order_and_none_is_missing() {
        let mut last = 0;
        for value in 0..100_000u64 {
            let bucket = bucket_of(value);
            assert!(bucket == last || bucket == last + 1, "{value}");
            last = bucket;
            assert_eq!(bucket_of(middle_of(bucket)), bucket);
        }
        assert_eq!(bucket_of(VALUE_MAX), BUCKETS - 1);
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
