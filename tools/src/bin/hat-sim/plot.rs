//! Plots as SVG files.

use std::path::Path;

use anyhow::{Context as _, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::figures::Figures;
use crate::world::{Lane, Span};

const SIZE: (u32, u32) = (860, 480);
const TEXT: (&str, i32) = ("sans-serif", 15);
const TITLE: (&str, i32) = ("sans-serif", 19);
const COLOURS: [RGBColor; 7] = [
    RGBColor(86, 86, 86),
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];

/// A line of a plot.
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Captions of a plot.
pub(crate) struct Captions {
    pub(crate) title: String,
    pub(crate) x: &'static str,
    pub(crate) y: &'static str,
    /// Whether there is room below the curves on the left; if not, on the right.
    pub(crate) left: bool,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Curves in one frame, whose axes begin at 0.
pub(crate) fn curves(path: &Path, captions: &Captions, curves: &[Curve]) -> anyhow::Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    draw_curves(&area, captions, curves)
        .map_err(|error| anyhow!("{error}"))
        .with_context(|| format!("plot {}", path.display()))
}

fn draw_curves(
    area: &Area<'_>,
    captions: &Captions,
    curves: &[Curve],
) -> Result<(), Box<dyn std::error::Error>> {
    let most = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let points = curves.iter().flat_map(|curve| &curve.points);
        points.map(of).fold(0.0, f64::max).max(1e-9)
    };
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(&captions.title, TITLE)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(62)
        .build_cartesian_2d(0.0..most(&|point| point.0), 0.0..1.05 * most(&|point| point.1))?;
    chart
        .configure_mesh()
        .x_desc(captions.x)
        .y_desc(captions.y)
        .label_style(TEXT)
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let style = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), style))?
            .label(curve.name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
    }
    let left = captions.left;
    let place = if left { SeriesLabelPosition::LowerLeft } else { SeriesLabelPosition::LowerRight };
    chart
        .configure_series_labels()
        .position(place)
        .label_font(TEXT)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}

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
