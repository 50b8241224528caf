//! Figures by category, as a table for people and as JSON.

use std::fmt;

use hat_core::draft::DraftPolicy;
use serde_json::{Value, json};

use super::play::{Player, Rule, Trial};
use crate::shard::Recording;

/// Ways of drafting that are compared. Trees count the nodes of the lookup in.
const RULES: usize = 8;

fn rules(shape: DraftPolicy) -> [(&'static str, Rule); RULES] {
    [
        ("lookup", Rule::lookup(32)),
        ("chain 4", Rule::chain(4)),
        ("tree 8", Rule::tree(8, false, shape)),
        ("tree 16", Rule::tree(16, false, shape)),
        ("tree 32", Rule::tree(32, false, shape)),
        ("tree 8 with lookup", Rule::tree(8, true, shape)),
        ("tree 16 with lookup", Rule::tree(16, true, shape)),
        ("tree 32 with lookup", Rule::tree(32, true, shape)),
    ]
}

/// Draft steps whose drafts are counted.
const STEPS: usize = 4;

/// Spec-Bench names the eight kinds of MT-bench one by one.
const MT_BENCH: [&str; 8] =
    ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"];

/// Sums over the answers of one category.
#[derive(Clone, Default)]
struct Sums {
    answers: usize,
    /// Positions, first drafts right, one of five right.
    hits: [[usize; 3]; STEPS],
    /// Tokens, rounds and nodes by rule.
    scores: [[usize; 3]; RULES],
    /// Sum of the answers' own tokens a round, by rule.
    ratios: [f64; RULES],
}

/// Figures of one set of answers.
pub(super) struct Table {
    /// The first is `all`.
    categories: Vec<(String, Sums)>,
    has_drafter: bool,
    rules: [(&'static str, Rule); RULES],
    /// A device for each rule.
    players: Vec<Player>,
}

fn category(source: &str) -> &str {
    if MT_BENCH.contains(&source) { "mt_bench" } else { source }
}

impl Table {
    pub(super) fn new(
        recordings: &[Recording],
        has_drafter: bool,
        shape: DraftPolicy,
        vocab_size: usize,
    ) -> Self {
        let mut categories = vec![("all".to_owned(), Sums::default())];
        for recording in recordings {
            let name = category(&recording.facts.source);
            if !categories.iter().any(|(known, _)| known == name) {
                categories.push((name.to_owned(), Sums::default()));
            }
        }
        let rules = rules(shape);
        let players = rules.iter().map(|(_, rule)| Player::new(*rule, vocab_size)).collect();
        Self { categories, has_drafter, rules, players }
    }

    pub(super) fn take(&mut self, trial: &Trial<'_>) -> anyhow::Result<()> {
        let scores: Vec<_> =
            self.players.iter_mut().map(|player| player.play(trial)).collect::<Result<_, _>>()?;
        let name = category(trial.source);
        for (_, sums) in self.categories.iter_mut().filter(|(n, _)| n == "all" || n == name) {
            sums.answers += 1;
            for (index, sum) in sums.hits.iter_mut().enumerate() {
                let hits = trial.hits(index + 1);
                sum.iter_mut().zip(hits).for_each(|(sum, hits)| *sum += hits);
            }
            for (index, score) in scores.iter().enumerate() {
                let counts = [score.tokens, score.rounds, score.nodes];
                sums.scores[index].iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
                sums.ratios[index] += score.tokens as f64 / score.rounds.max(1) as f64;
            }
        }
        Ok(())
    }

    /// The rules that there is a drafter for, by number and name.
    fn rules(&self) -> impl Iterator<Item = (usize, &'static str)> {
        let has_drafter = self.has_drafter;
        let rules = self.rules.iter().enumerate();
        rules
            .filter(move |(_, (_, rule))| has_drafter || !rule.needs_drafter())
            .map(|(index, (name, _))| (index, *name))
    }

    /// The same figures for programs.
    pub(super) fn json(&self, name: &str) -> Value {
        let mut categories = serde_json::Map::new();
        for (category, sums) in &self.categories {
            let steps: Vec<Value> = sums
                .hits
                .iter()
                .map(|hits| {
                    let [top1, top5] = [share(hits[1], hits[0]), share(hits[2], hits[0])];
                    json!({"positions": hits[0], "top1": top1, "top5": top5})
                })
                .collect();
            let rules: serde_json::Map<String, Value> = self
                .rules()
                .map(|(index, name)| {
                    let [tokens, rounds, nodes] = sums.scores[index];
                    let figures = json!({
                        "tokens_a_round": share(tokens, rounds),
                        "tokens_a_round_mean_of_answers": sums.ratios[index] / sums.answers as f64,
                        "nodes_a_round": share(nodes, rounds),
                        "rounds": rounds,
                        "tokens": tokens,
                    });
                    (name.to_owned(), figures)
                })
                .collect();
            let figures = json!({"answers": sums.answers, "steps": steps, "rules": rules});
            categories.insert(category.clone(), figures);
        }
        json!({"recordings": name, "categories": categories})
    }
}

fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole.max(1) as f64
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, cell: &dyn Fn(&str, &Sums) -> String| {
            let cells: Vec<String> =
                self.categories.iter().map(|(name, sums)| cell(name, sums)).collect();
            writeln!(f, "| {name} | {} |", cells.join(" | "))
        };
        line("", &|name, _| name.to_owned())?;
        line("---", &|_, _| "---".to_owned())?;
        line("answers", &|_, sums| sums.answers.to_string())?;
        for step in 0..if self.has_drafter { STEPS } else { 0 } {
            for (name, hit) in [("top-1", 1), ("top-5", 2)] {
                line(&format!("step {} {name}", step + 1), &|_, Sums { hits, .. }| {
                    format!("{:.3}", share(hits[step][hit], hits[step][0]))
                })?;
            }
        }
        for (index, name) in self.rules() {
            line(name, &|_, Sums { scores, .. }| {
                format!("{:.2}", share(scores[index][0], scores[index][1]))
            })?;
        }
        Ok(())
    }
}
