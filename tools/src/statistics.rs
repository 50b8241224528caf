//! Figures over many values.

/// The mean; 0 of nothing.
#[must_use]
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The value at the place nearest to `share` (0 to 1) of the way from the first to the last, of
/// values in rising order; 0 of nothing.
#[must_use]
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * share).round() as usize).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, permutation};

    #[test]
    fn quantiles_are_places_in_a_sorted_list() {
        let shuffled = permutation(1, Purpose::Prompt, 201);
        let mut values: Vec<f64> = shuffled.into_iter().map(|place| place as f64 * 0.5).collect();
        values.sort_by(f64::total_cmp);
        for percent in 0..=100 {
            let share = f64::from(percent) / 100.0;
            assert_eq!(quantile(&values, share), f64::from(percent), "{percent}");
        }
        assert_eq!((mean(&values), quantile(&values, 2.0)), (50.0, 0.0));
        assert_eq!((mean(&[]), quantile(&[], 0.5), quantile(&[7.0], 0.9)), (0.0, 0.0, 7.0));
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 10.0], 0.99), 10.0);
    }
}
