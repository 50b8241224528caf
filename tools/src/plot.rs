//! Plots as SVG files, in one style.

use std::error::Error;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::statistics::quantile;

/// Pixels.
const SIZE: (u32, u32) = (860, 480);
/// Font and size of the labels at axes.
const TEXT: (&str, i32) = ("sans-serif", 15);
/// Font and size of the title.
const TITLE: (&str, i32) = ("sans-serif", 19);
/// Colours that also differ for those who see fewer.
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

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
/// True if there are names for a legend.
type Drawn = Result<bool, Box<dyn Error>>;

/// A frame whose axes begin at 0 and end at `most`, and what `draw` puts into it.
fn plot(
    path: &Path,
    captions: &Captions,
    most: (f64, f64),
    draw: impl FnOnce(&mut Chart<'_, '_>) -> Drawn,
) -> anyhow::Result<()> {
    let draw_all = || -> Result<(), Box<dyn Error>> {
        let area = SVGBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&captions.title, TITLE)
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(62)
            .build_cartesian_2d(0.0..most.0.max(1e-9), 0.0..most.1.max(1e-9))?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(captions.x).y_desc(captions.y).label_style(TEXT).light_line_style(TRANSPARENT);
        mesh.draw()?;
        if draw(&mut chart)? {
            let place = match captions.left {
                true => SeriesLabelPosition::LowerLeft,
                false => SeriesLabelPosition::LowerRight,
            };
            chart
                .configure_series_labels()
                .position(place)
                .label_font(TEXT)
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.3))
                .draw()?;
        }
        area.present()?;
        Ok(())
    };
    draw_all()
        .map_err(|error| anyhow!("{error}"))
        .with_context(|| format!("plot {}", path.display()))
}

/// Curves in one frame, whose axes begin at 0.
///
/// # Errors
/// The file cannot be written.
pub fn curves(path: &Path, captions: &Captions, curves: &[Curve]) -> anyhow::Result<()> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let most = points().fold((0.0f64, 0.0f64), |most, at| (most.0.max(at.0), most.1.max(at.1)));
    plot(path, captions, (most.0, 1.05 * most.1), |chart| {
        for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
            let style = colour.stroke_width(2);
            chart
                .draw_series(LineSeries::new(curve.points.iter().copied(), style))?
                .label(curve.name.as_str())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
        }
        Ok(true)
    })
}

/// Bars: how many of `values` (in rising order, not negative) are how large. Those beyond nine
/// eighths of the 99th percentile stand in the last bar, so that a few do not press the rest
/// together.
///
/// # Errors
/// The file cannot be written.
pub fn histogram(path: &Path, captions: &Captions, values: &[f64]) -> anyhow::Result<()> {
    let (counts, width) = bars(values);
    let most = f64::from(counts.iter().copied().max().unwrap_or(0).max(1));
    plot(path, captions, (width * BARS as f64, 1.05 * most), |chart| {
        let bars = counts.iter().enumerate().filter(|(_, count)| **count > 0);
        chart.draw_series(bars.map(|(index, count)| {
            let left = index as f64 * width;
            let colour = COLOURS[if index + 1 == BARS { 3 } else { 2 }];
            let corners = [(left, 0.0), (left + 0.9 * width, f64::from(*count))];
            Rectangle::new(corners, colour.filled())
        }))?;
        Ok(false)
    })
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

    fn attribute<'a>(line: &'a str, name: &str) -> &'a str {
        let start = line.find(&format!("{name}=\"")).unwrap() + name.len() + 2;
        line[start..].split('"').next().unwrap()
    }

    /// The corners of each drawn line of several, in pixels, and its colour.
    fn lines(svg: &str) -> Vec<(&str, Vec<(f64, f64)>)> {
        let is_line =
            |line: &&str| line.contains("stroke-width=\"2\"") && line.matches(',').count() > 2;
        let corner = |corner: &str| {
            let (x, y) = corner.split_once(',').unwrap();
            (x.parse().unwrap(), y.parse().unwrap())
        };
        let points = |line| attribute(line, "points").split_whitespace().map(corner).collect();
        let lines = svg.lines().filter(is_line);
        lines.map(|line| (attribute(line, "stroke"), points(line))).collect()
    }

    #[test]
    fn each_curve_is_a_line_through_its_points() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("curves.svg");
        let curve = |slope: u32| {
            let points = (0..=10).map(|x| (f64::from(x), f64::from(slope * x))).collect();
            Curve { name: format!("slope {slope}"), points }
        };
        let captions = Captions { title: "slopes".to_owned(), x: "x", y: "y", left: true };
        curves(&path, &captions, &[curve(1), curve(2), curve(4)]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        let lines = lines(&svg);
        assert_eq!(lines.len(), 3);
        let rise = |line: &[(f64, f64)]| line[0].1 - line[10].1;
        for ((colour, line), slope) in lines.iter().zip([1.0, 2.0, 4.0]) {
            assert_eq!(line.len(), 11);
            assert!(line.windows(2).all(|two| two[0].0 < two[1].0), "{line:?}");
            assert!((rise(line) - slope * rise(&lines[0].1)).abs() <= 2.0 * slope, "{lines:?}");
            assert_eq!(lines.iter().filter(|other| other.0 == *colour).count(), 1);
        }
    }
}
