//! Tokens a round against the node budget, for each way of drafting.

use std::fmt;

use hat_core::draft::DraftPolicy;
use hat_core::draft::tree::NODES_MAX;
use hat_tools::plot::Curve;
use serde_json::{Value, json};

use super::play::{Player, Rule, Trial};

/// Most nodes of a tree, its root not counted; the last is all that may pend beside the root.
const BUDGETS: [usize; 9] = [1, 2, 4, 8, 16, 24, 32, 48, NODES_MAX - 1];

/// Ways of drafting.
const WAYS: [&str; 4] = ["tree with lookup", "tree", "lookup", "chain"];

/// Rules of [`WAYS`] with this many nodes.
fn rules(nodes: usize, shape: DraftPolicy) -> [Rule; WAYS.len()] {
    let trees = [Rule::tree(nodes, true, shape), Rule::tree(nodes, false, shape)];
    [trees[0], trees[1], Rule::lookup(nodes), Rule::chain(nodes)]
}

/// Tokens and rounds of each way of drafting and budget.
pub(super) struct Curves {
    points: [[Point; BUDGETS.len()]; WAYS.len()],
}

struct Point {
    player: Player,
    tokens: usize,
    rounds: usize,
}

impl Point {
    fn tokens_a_round(&self) -> f64 {
        self.tokens as f64 / self.rounds.max(1) as f64
    }
}

impl Curves {
    /// No answers yet; trees have the shape of `shape`.
    pub(super) fn new(shape: DraftPolicy, vocab_size: usize) -> Self {
        let point = |rule| Point { player: Player::new(rule, vocab_size), tokens: 0, rounds: 0 };
        let way = |way: usize| BUDGETS.map(|nodes| point(rules(nodes, shape)[way]));
        Self { points: std::array::from_fn(way) }
    }

    /// Plays one answer in each way.
    pub(super) fn take(&mut self, trial: &Trial<'_>) -> anyhow::Result<()> {
        for point in self.points.iter_mut().flatten() {
            let score = point.player.play(trial)?;
            point.tokens += score.tokens;
            point.rounds += score.rounds;
        }
        Ok(())
    }

    /// The figures for programs.
    pub(super) fn json(&self) -> Value {
        let curve = |(name, points): (&&str, &[Point; BUDGETS.len()])| {
            let figures: Vec<f64> = points.iter().map(Point::tokens_a_round).collect();
            ((*name).to_owned(), json!(figures))
        };
        let curves: serde_json::Map<String, Value> =
            WAYS.iter().zip(&self.points).map(curve).collect();
        json!({"nodes": BUDGETS, "tokens_a_round": curves})
    }

    /// The figures for a plot.
    pub(super) fn curves(&self) -> Vec<Curve> {
        let point = |(nodes, point): (usize, &Point)| (nodes as f64, point.tokens_a_round());
        let curve = |(name, points): (&&str, &[Point; BUDGETS.len()])| Curve {
            name: (*name).to_owned(),
            points: BUDGETS.into_iter().zip(points).map(point).collect(),
        };
        WAYS.iter().zip(&self.points).map(curve).collect()
    }
}

impl fmt::Display for Curves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells = |cells: &mut dyn Iterator<Item = String>| cells.collect::<Vec<_>>().join(" | ");
        writeln!(f, "| nodes | {} |", cells(&mut BUDGETS.iter().map(usize::to_string)))?;
        writeln!(f, "| --- | {} |", cells(&mut BUDGETS.iter().map(|_| "---".to_owned())))?;
        for (name, points) in WAYS.iter().zip(&self.points) {
            let figure = |point: &Point| format!("{:.2}", point.tokens_a_round());
            writeln!(f, "| {name} | {} |", cells(&mut points.iter().map(figure)))?;
        }
        Ok(())
    }
}
