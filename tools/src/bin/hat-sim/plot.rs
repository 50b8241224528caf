//! Plots of a simulation.

use std::path::Path;

use hat_tools::plot::{self, Bar, Captions, Curve};

use crate::figures::Figures;
use crate::world::{Lane, Span};

/// Shares of the requests below each value.
pub(crate) fn distribution(figures: &Figures, values: &[f64]) -> Curve {
    let count = values.len() as f64;
    let points =
        values.iter().enumerate().map(|(index, value)| (*value, (index + 1) as f64 / count));
    Curve { name: figures.policy.clone(), points: points.collect() }
}

/// Work of each machine over time, a lane for each.
pub(crate) fn timeline(path: &Path, title: &str, spans: &[Span]) -> anyhow::Result<()> {
    let stage = |span: &Span| if let Lane::Stage(stage) = span.lane { stage + 1 } else { 0 };
    let stages = spans.iter().map(stage).max().unwrap_or(1);
    let bar = |span: &Span| Bar {
        lane: match span.lane {
            Lane::Downlink => 0,
            Lane::Stage(stage) => stages - stage,
            Lane::Uplink => stages + 1,
            Lane::Device => stages + 2,
        },
        ends: (1e3 * span.from_s, 1e3 * span.to_s),
        dark: span.prompt,
    };
    let mut names = vec!["downlink".to_owned()];
    names.extend((1..=stages).rev().map(|stage| format!("stage {stage}")));
    names.extend(["uplink", "device"].map(str::to_owned));
    let (title, x) = (title.to_owned(), "ms (dark: the prompt)");
    let captions = Captions { title, x, y: "", left: true };
    plot::lanes(path, &captions, &names, &spans.iter().map(bar).collect::<Vec<_>>())
}
