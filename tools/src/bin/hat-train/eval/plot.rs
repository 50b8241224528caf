//! Tokens a round against the node budget, for each way of drafting: figures and a drawing.

use std::fmt;
use std::path::Path;

use anyhow::Context as _;
use hat_engine::draft::Acceptance;
use hat_engine::draft::lookup::BRANCHES_MAX;
use hat_engine::draft::tree::NODES_MAX;
use plotters::prelude::*;
use serde_json::{Value, json};

use super::simulate::{Growth, Rule, Trial};

/// Most nodes of a tree, its root not counted; the last is all that may pend beside the root.
const BUDGETS: [usize; 9] = [1, 2, 4, 8, 16, 24, 32, 48, NODES_MAX - 1];

/// Ways of drafting, and the colours of their curves.
const WAYS: [(&str, RGBColor); 4] = [
    ("tree with lookup", RGBColor(0, 90, 160)),
    ("tree", RGBColor(0, 150, 110)),
    ("lookup", RGBColor(210, 130, 0)),
    ("chain", RGBColor(150, 60, 140)),
];

/// How each of [`WAYS`] grows, and its branches of lookup.
const fn growths(tree: Growth) -> [(Growth, usize); WAYS.len()] {
    [(tree, BRANCHES_MAX), (tree, 0), (Growth::None, 1), (Growth::Chain, 0)]
}

/// Pixels.
const SIZE: (u32, u32) = (720, 440);

/// Tokens and rounds of each way of drafting and budget.
pub(super) struct Curves {
    growths: [(Growth, usize); WAYS.len()],
    points: [[Point; BUDGETS.len()]; WAYS.len()],
}

#[derive(Clone, Default)]
struct Point {
    tokens: usize,
    rounds: usize,
    acceptance: Acceptance,
}

impl Point {
    fn tokens_a_round(&self) -> f64 {
        self.tokens as f64 / self.rounds.max(1) as f64
    }
}

impl Curves {
    /// No answers yet; trees grow as `tree` says.
    pub(super) fn new(tree: Growth) -> Self {
        Self { growths: growths(tree), points: Default::default() }
    }

    /// Plays one answer in each way.
    pub(super) fn take(&mut self, trial: &Trial<'_>) {
        for ((growth, lookup), points) in self.growths.into_iter().zip(&mut self.points) {
            for (nodes, point) in BUDGETS.into_iter().zip(points) {
                let score = trial.play(&Rule { nodes, growth, lookup }, &mut point.acceptance);
                point.tokens += score.tokens;
                point.rounds += score.rounds;
            }
        }
    }

    /// The figures for programs.
    pub(super) fn json(&self) -> Value {
        let curve =
            |points: &[Point]| -> Vec<f64> { points.iter().map(Point::tokens_a_round).collect() };
        let curves: serde_json::Map<String, Value> = WAYS
            .iter()
            .zip(&self.points)
            .map(|((name, ..), points)| ((*name).to_owned(), json!(curve(points))))
            .collect();
        json!({"nodes": BUDGETS, "tokens_a_round": curves})
    }

    /// Draws the curves into an SVG file.
    pub(super) fn draw(&self, path: &Path) -> anyhow::Result<()> {
        let mut svg = String::new();
        self.draw_into(&mut svg).map_err(|error| anyhow::anyhow!("drawing: {error}"))?;
        std::fs::write(path, svg).with_context(|| format!("writing {}", path.display()))
    }

    fn draw_into(&self, svg: &mut String) -> Result<(), Box<dyn std::error::Error + '_>> {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let highest = self.points.iter().flatten().map(Point::tokens_a_round).fold(1.0, f64::max);
        let mut chart = ChartBuilder::on(&root)
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(48)
            .build_cartesian_2d(0..BUDGETS[BUDGETS.len() - 1] + 1, 1.0..highest * 1.05)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_labels(9)
            .y_labels(8)
            .x_desc("nodes of a draft tree at most")
            .y_desc("tokens a round trip")
            .label_style(("sans-serif", 14))
            .draw()?;
        for ((name, colour), points) in WAYS.into_iter().zip(&self.points) {
            let at = |(nodes, point): (usize, &Point)| (nodes, point.tokens_a_round());
            let line = || BUDGETS.into_iter().zip(points).map(at);
            chart.draw_series(LineSeries::new(line(), colour.stroke_width(2)))?.label(name).legend(
                move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)),
            );
            chart.draw_series(line().map(|at| Circle::new(at, 3, colour.filled())))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .label_font(("sans-serif", 14))
            .draw()?;
        root.present()?;
        Ok(())
    }
}

impl fmt::Display for Curves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells = |cells: &mut dyn Iterator<Item = String>| cells.collect::<Vec<_>>().join(" | ");
        writeln!(f, "| nodes | {} |", cells(&mut BUDGETS.iter().map(usize::to_string)))?;
        writeln!(f, "| --- | {} |", cells(&mut BUDGETS.iter().map(|_| "---".to_owned())))?;
        for ((name, ..), points) in WAYS.iter().zip(&self.points) {
            let figure = |point: &Point| format!("{:.2}", point.tokens_a_round());
            writeln!(f, "| {name} | {} |", cells(&mut points.iter().map(figure)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The points of each drawn line, in pixels, by colour.
    fn lines(svg: &str) -> Vec<(String, Vec<(f64, f64)>)> {
        let attribute = |line: &str, name: &str| -> String {
            let start = line.find(&format!("{name}=\"")).unwrap() + name.len() + 2;
            line[start..].split('"').next().unwrap().to_owned()
        };
        let curves = svg.lines().filter(|line| {
            line.contains("stroke-width=\"2\"") && line.matches(',').count() == BUDGETS.len()
        });
        let point = |point: &str| {
            let (x, y) = point.split_once(',').unwrap();
            (x.parse().unwrap(), y.parse().unwrap())
        };
        curves
            .map(|line| {
                let points = attribute(line, "points");
                let points = points.split_whitespace().map(point).collect();
                (attribute(line, "stroke"), points)
            })
            .collect()
    }

    #[test]
    fn each_way_is_a_line_through_its_figures() {
        let mut curves = Curves::new(Growth::None);
        for (way, points) in (1..).zip(&mut curves.points) {
            for (budget, point) in (1..).zip(points) {
                (point.tokens, point.rounds) = (way * budget + 10, 10);
            }
        }
        let mut svg = String::new();
        curves.draw_into(&mut svg).unwrap();
        assert!(svg.len() < 30_000, "{} bytes", svg.len());
        let lines = lines(&svg);
        assert_eq!(lines.len(), WAYS.len());
        let mut colours: Vec<&String> = lines.iter().map(|(colour, _)| colour).collect();
        colours.sort();
        colours.dedup();
        assert_eq!(colours.len(), WAYS.len());
        for (way, (_, points)) in (1..).zip(&lines) {
            assert_eq!(points.len(), BUDGETS.len());
            // Larger budgets stand further right, and more tokens a round higher up: as much as
            // their figures say, but for the rounding to pixels.
            let (first, last) = (points[0], points[BUDGETS.len() - 1]);
            assert!(first.0 < last.0);
            let (rise, of_first_way) = (first.1 - last.1, lines[0].1[0].1 - lines[0].1[8].1);
            assert!((rise - f64::from(way) * of_first_way).abs() <= 2.0 * f64::from(way));
            for pair in points.windows(2) {
                assert!(pair[0].0 < pair[1].0 && pair[0].1 > pair[1].1, "{pair:?}");
            }
        }
        assert!(curves.to_string().contains("| tree | 1.20 | 1.40 |"), "{curves}");
    }
}
