//! Plots of a simulation.

use std::path::Path;

use anyhow::{Context as _, anyhow};
use hat_tools::plot::{Area, COLOURS, Curve, SIZE, TEXT, TITLE};
use plotters::prelude::*;

use crate::figures::Figures;
use crate::world::{Lane, Span};

/// Shares of the requests below each value.
pub(crate) fn distribution(figures: &Figures, values: &[f64]) -> Curve {
    let count = values.len() as f64;
    let points =
        values.iter().enumerate().map(|(index, value)| (*value, (index + 1) as f64 / count));
    Curve { name: figures.policy.clone(), points: points.collect() }
}

/// Who worked when, a lane for each machine.
pub(crate) fn timeline(path: &Path, title: &str, spans: &[Span]) -> anyhow::Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    draw_timeline(&area, title, spans)
        .map_err(|error| anyhow!("{error}"))
        .with_context(|| format!("plot {}", path.display()))
}

fn draw_timeline(
    area: &Area<'_>,
    title: &str,
    spans: &[Span],
) -> Result<(), Box<dyn std::error::Error>> {
    let place = |lane: Lane, stages: usize| match lane {
        Lane::Downlink => 0,
        Lane::Stage(stage) => stages - stage,
        Lane::Uplink => stages + 1,
        Lane::Device => stages + 2,
    };
    let stage = |span: &Span| if let Lane::Stage(stage) = span.lane { stage + 1 } else { 0 };
    let stages = spans.iter().map(stage).max().unwrap_or(1);
    let end_ms = spans.iter().map(|span| 1e3 * span.to_s).fold(1.0, f64::max);
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(title, TITLE)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(82)
        .build_cartesian_2d(0.0..end_ms, 0.0..(stages + 3) as f64)?;
    let name = |at: &f64| match at.floor() as usize {
        0 => "downlink".to_owned(),
        lane if lane <= stages => format!("stage {}", stages + 1 - lane),
        lane if lane == stages + 1 => "uplink".to_owned(),
        lane if lane == stages + 2 => "device".to_owned(),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc("ms (dark: the prompt)")
        .y_labels(stages + 4)
        .y_label_formatter(&name)
        .label_style(TEXT)
        .light_line_style(TRANSPARENT)
        .draw()?;
    chart.draw_series(spans.iter().map(|span| {
        let low = place(span.lane, stages) as f64;
        let colour = if span.prompt { COLOURS[2] } else { COLOURS[6] };
        let corners = [(1e3 * span.from_s, low + 0.15), (1e3 * span.to_s, low + 0.85)];
        Rectangle::new(corners, colour.filled())
    }))?;
    area.present()?;
    Ok(())
}
