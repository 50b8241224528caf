//! Plots that a comparison of policies comes with.

use std::path::Path;

use anyhow::Context as _;
use hat_tools::plot::{Captions, Curve, curves};
use hat_tools::statistics::mean;

use crate::costs::CostFile;
use crate::figures::Figures;
use crate::trial::Trials;

/// Requests a second of the plots against the rate, as shares of the workload's own.
const RATES: [f64; 6] = [0.17, 0.33, 0.5, 0.67, 0.83, 1.0];

/// Figures of each request.
type Values = fn(&Figures) -> &[f64];

/// Writes all plots of `names` below `out`; returns how many.
pub(crate) fn plots(
    out: &Path,
    file: &CostFile,
    trials: &mut Trials<'_>,
    names: &[&str],
    rate: f64,
) -> anyhow::Result<usize> {
    std::fs::create_dir_all(out).with_context(|| format!("folder {}", out.display()))?;
    let values: [(&str, &str, Values); 2] = [
        ("TTFT", "TTFT, ms (mean)", |figures| &figures.ttft_ms),
        ("TBT", "TBT, ms (mean)", |figures| &figures.tbt_ms),
    ];
    for (what, y, values) in values {
        let (mut against_rate, mut distributions) = (vec![], vec![]);
        for name in names {
            let mut points = vec![];
            for rate in RATES.map(|share| share * rate) {
                points.push((rate, mean(values(&trials.figures(name, rate)?))));
            }
            against_rate.push(Curve { name: (*name).to_owned(), points });
            distributions.push(distribution(name, values(&trials.figures(name, rate)?)));
        }
        let path = |plot: &str| out.join(format!("{}-{plot}.svg", what.to_lowercase()));
        let title = format!("{what}, {}", file.name);
        let captions = Captions { title, x: "requests a second", y, left: true };
        curves(&path("rate"), &captions, &against_rate)?;
        let title = format!("{what} at {rate} requests a second, {}", file.name);
        let captions = Captions { title, x: "ms", y: "share of requests", left: false };
        curves(&path("cdf"), &captions, &distributions)?;
    }
    Ok(4)
}

/// Shares of the requests below each value.
fn distribution(name: &str, values: &[f64]) -> Curve {
    let count = values.len() as f64;
    let points =
        values.iter().enumerate().map(|(index, value)| (*value, (index + 1) as f64 / count));
    Curve { name: name.to_owned(), points: points.collect() }
}
