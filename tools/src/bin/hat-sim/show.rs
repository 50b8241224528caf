//! Plots that a comparison of policies comes with.

use std::path::Path;

use anyhow::Context as _;
use hat_tools::plot::{Captions, Curve, curves};

use crate::costs::CostFile;
use crate::figures::Figures;
use crate::trial::Trials;

/// Requests a second of the plots against the rate, as shares of the workload's own.
const RATES: [f64; 6] = [0.17, 0.33, 0.5, 0.67, 0.83, 1.0];

/// Writes all plots of `names` below `out`; returns how many.
pub(crate) fn plots(
    out: &Path,
    file: &CostFile,
    trials: &mut Trials<'_>,
    names: &[&str],
    rate: f64,
) -> anyhow::Result<usize> {
    std::fs::create_dir_all(out).with_context(|| format!("folder {}", out.display()))?;
    against_rate(out, file, trials, names, rate)?;
    distributions(out, file, trials, names, rate)?;
    Ok(4)
}

fn against_rate(
    out: &Path,
    file: &CostFile,
    trials: &mut Trials<'_>,
    names: &[&str],
    rate: f64,
) -> anyhow::Result<()> {
    let (mut ttft, mut tbt) = (vec![], vec![]);
    for name in names {
        let mut of_name = |of: &dyn Fn(&Figures) -> f64| -> anyhow::Result<Curve> {
            let mut points = vec![];
            for share in RATES {
                points.push((share * rate, of(&trials.figures(name, share * rate)?)));
            }
            Ok(Curve { name: (*name).to_owned(), points })
        };
        ttft.push(of_name(&Figures::ttft)?);
        tbt.push(of_name(&Figures::tbt)?);
    }
    for (what, lines) in [("TTFT", ttft), ("TBT", tbt)] {
        let title = format!("{what}, {}", file.name);
        let y = if what == "TTFT" { "TTFT, ms (mean)" } else { "TBT, ms (mean)" };
        let captions = Captions { title, x: "requests a second", y, left: true };
        curves(&out.join(format!("{}-rate.svg", what.to_lowercase())), &captions, &lines)?;
    }
    Ok(())
}

fn distributions(
    out: &Path,
    file: &CostFile,
    trials: &mut Trials<'_>,
    names: &[&str],
    rate: f64,
) -> anyhow::Result<()> {
    let (mut ttft, mut tbt) = (vec![], vec![]);
    for name in names {
        let figures = trials.figures(name, rate)?;
        ttft.push(distribution(&figures, &figures.ttft_ms));
        tbt.push(distribution(&figures, &figures.tbt_ms));
    }
    for (what, lines) in [("TTFT", ttft), ("TBT", tbt)] {
        let title = format!("{what} at {rate} requests a second, {}", file.name);
        let captions = Captions { title, x: "ms", y: "share of requests", left: false };
        curves(&out.join(format!("{}-cdf.svg", what.to_lowercase())), &captions, &lines)?;
    }
    Ok(())
}

/// Shares of the requests below each value.
fn distribution(figures: &Figures, values: &[f64]) -> Curve {
    let count = values.len() as f64;
    let points =
        values.iter().enumerate().map(|(index, value)| (*value, (index + 1) as f64 / count));
    Curve { name: figures.policy.clone(), points: points.collect() }
}
