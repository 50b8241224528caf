//! Plots as SVG files, in one style.

use std::path::Path;

use anyhow::{Context as _, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::statistics::quantile;

/// Pixels.
pub const SIZE: (u32, u32) = (860, 480);
/// Font and size of what stands at axes.
pub const TEXT: (&str, i32) = ("sans-serif", 15);
/// Font and size of the title.
pub const TITLE: (&str, i32) = ("sans-serif", 19);
/// Colours that also differ for those who see fewer.
pub const COLOURS: [RGBColor; 7] = [
    RGBColor(86, 86, 86),
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];

/// A line of a plot.
pub struct Curve {
    /// Shown in the legend.
    pub name: String,
    /// x and y.
    pub points: Vec<(f64, f64)>,
}

/// Captions of a plot.
pub struct Captions {
    /// Above the plot.
    pub title: String,
    /// Below the horizontal axis.
    pub x: &'static str,
    /// Beside the vertical axis.
    pub y: &'static str,
    /// True if there is room below the curves on the left; if not, on the right.
    pub left: bool,
}

/// Area of a plot.
pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Curves in one frame, whose axes begin at 0.
///
/// # Errors
/// The file cannot be written.
pub fn curves(path: &Path, captions: &Captions, curves: &[Curve]) -> anyhow::Result<()> {
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

/// Bars: how many of `values` (in rising order, not negative) are how large. Those beyond nine
/// eighths of the 99th percentile stand in the last bar, so that a few do not press the rest
/// together.
///
/// # Errors
/// The file cannot be written.
pub fn histogram(path: &Path, captions: &Captions, values: &[f64]) -> anyhow::Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    draw_histogram(&area, captions, values)
        .map_err(|error| anyhow!("{error}"))
        .with_context(|| format!("plot {}", path.display()))
}

/// Bars of a histogram.
const BARS: usize = 60;

/// Counts of the bars, and the width of each.
fn bars(values: &[f64]) -> ([u32; BARS], f64) {
    let width = (1.125 * quantile(values, 0.99)).max(1e-9) / (BARS - 1) as f64;
    let mut counts = [0; BARS];
    for value in values {
        counts[((value / width) as usize).min(BARS - 1)] += 1;
    }
    (counts, width)
}

fn draw_histogram(
    area: &Area<'_>,
    captions: &Captions,
    values: &[f64],
) -> Result<(), Box<dyn std::error::Error>> {
    let (counts, width) = bars(values);
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(&captions.title, TITLE)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(62)
        .build_cartesian_2d(0.0..width * BARS as f64, 0.0..1.05 * f64::from(most))?;
    chart
        .configure_mesh()
        .x_desc(captions.x)
        .y_desc(captions.y)
        .label_style(TEXT)
        .light_line_style(TRANSPARENT)
        .disable_x_mesh()
        .draw()?;
    chart.draw_series(counts.iter().enumerate().filter(|(_, count)| **count > 0).map(
        |(index, count)| {
            let left = index as f64 * width;
            let colour = COLOURS[if index + 1 == BARS { 3 } else { 2 }];
            let corners = [(left, 0.0), (left + 0.9 * width, f64::from(*count))];
            Rectangle::new(corners, colour.filled())
        },
    ))?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_hold_all_values_and_the_last_holds_the_tail() {
        let mut values: Vec<f64> = (0..1000).map(|value| f64::from(value) / 10.0).collect();
        values.extend([5e3, 6e3]);
        let (counts, width) = bars(&values);
        assert_eq!(counts.iter().sum::<u32>(), 1002);
        assert_eq!(counts[BARS - 1], 2);
        assert!((width * (BARS - 1) as f64 / 99.0 / 1.125 - 1.0).abs() < 0.01, "{width}");
        assert_eq!(bars(&[]).0, [0; BARS]);
        assert_eq!(bars(&[0.0, 0.0]).0[0], 2);
    }
}
