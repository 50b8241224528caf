//! Requests of a workload: when they come, to whom, how long their prompts are.

use hat_tools::random::{Purpose, exponential, normal_quantile, permutation};

use crate::costs::Workload;

/// A request before anybody has worked on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ask {
    pub(crate) at_s: f64,
    pub(crate) prompt_rows: u32,
}

/// `count` requests, `rate` a second. Gaps are exponential; lengths are the quantiles of the
/// workload's parts in an order by the seed, so their mean does not depend on it.
pub(crate) fn requests(workload: &Workload, rate: f64, count: usize, seed: u64) -> Vec<Ask> {
    let lengths = lengths(workload, count);
    let order = permutation(seed, Purpose::Prompt, count);
    let mut at_s = 0.0;
    order
        .into_iter()
        .enumerate()
        .map(|(index, length)| {
            at_s += exponential(rate, seed, Purpose::Arrival, index as u64, 0);
            Ask { at_s, prompt_rows: lengths[length] }
        })
        .collect()
}

fn lengths(workload: &Workload, count: usize) -> Vec<u32> {
    let shares: f64 = workload.prompts.iter().map(|part| part.share).sum();
    let mut lengths = Vec::with_capacity(count);
    let mut end = 0.0;
    for part in &workload.prompts {
        end += part.share / shares * count as f64;
        let of_part = (end.round() as usize).min(count) - lengths.len();
        let middle = part.mean_rows.ln() - part.sigma * part.sigma / 2.0;
        for index in 0..of_part {
            let share = (index as f64 + 0.5) / of_part as f64;
            let rows = (middle + part.sigma * normal_quantile(share)).exp();
            let most = f64::from(workload.context_max - workload.new_tokens);
            lengths.push(rows.round().clamp(2.0, most) as u32);
        }
    }
    lengths.resize(count, lengths.last().copied().unwrap_or(2));
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::costs::CostFile;

    #[test]
    fn prompts_have_the_published_mean_and_ninetieth_percentile() {
        for (name, mean, p90) in [("specbench-7b", 351.2, 891.0), ("cnndm-13b", 1036.6, 1772.0)] {
            let workload = CostFile::open(name).unwrap().workload;
            let mut rows: Vec<u32> =
                requests(&workload, 1.0, 3000, 1).iter().map(|ask| ask.prompt_rows).collect();
            rows.sort_unstable();
            let got = rows.iter().map(|rows| f64::from(*rows)).sum::<f64>() / 3000.0;
            assert!((got / mean - 1.0).abs() < 0.01, "{name}: mean {got}, {mean} published");
            let got = f64::from(rows[2700]);
            assert!((got / p90 - 1.0).abs() < 0.02, "{name}: p90 {got}, {p90} published");
        }
    }

    #[test]
    fn arrivals_are_poisson_and_seeded() {
        let workload = CostFile::open("specbench-7b").unwrap().workload;
        let asks = requests(&workload, 4.0, 4000, 7);
        let gaps: Vec<f64> = asks.windows(2).map(|pair| pair[1].at_s - pair[0].at_s).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let square = gaps.iter().map(|gap| gap * gap).sum::<f64>() / gaps.len() as f64;
        assert!((mean * 4.0 - 1.0).abs() < 0.05, "{mean}");
        assert!((square / (mean * mean) - 2.0).abs() < 0.2, "an exponential's square is twice");
        assert_eq!(asks, requests(&workload, 4.0, 4000, 7));
        assert_ne!(asks, requests(&workload, 4.0, 4000, 8));
    }
}
