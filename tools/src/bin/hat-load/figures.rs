//! Figures of a run: for each device, and over all.

use std::path::Path;

use anyhow::Context as _;
use hat_program::out::OutError;
use hat_program::outln;
use hat_tools::plot::{Captions, Curve, curves, histogram};
use hat_tools::statistics::{mean, quantile};
use serde::Serialize;
use serde_json::{Value, json};

use crate::cloud::{CloudFigures, Memory};
use crate::compare::Compared;
use crate::protocol::{End, Outcome};

/// Number of devices up to which all are printed, and not only those with the slowest tokens.
const LINES_MAX: usize = 40;

/// Times of some requests, milliseconds, in rising order.
struct Times {
    /// From when a request was due to its first token.
    ttft: Vec<f64>,
    /// Between tokens.
    gap: Vec<f64>,
    /// Means of the gaps of each complete answer.
    tbt: Vec<f64>,
}

impl Times {
    fn of(outcomes: &[&Outcome]) -> Self {
        let ms = |us: &u32| f64::from(*us) / 1e3;
        let ttft = |outcome: &&Outcome| Some(outcome.late_ms + outcome.ttft_us? as f64 / 1e3);
        let complete =
            |outcome: &&&Outcome| outcome.end == End::Done && !outcome.gaps_us.is_empty();
        let tbt = |outcome: &&Outcome| {
            outcome.gaps_us.iter().map(ms).sum::<f64>() / outcome.gaps_us.len() as f64
        };
        let mut times = Self {
            ttft: outcomes.iter().filter_map(ttft).collect(),
            gap: outcomes.iter().flat_map(|outcome| outcome.gaps_us.iter().map(ms)).collect(),
            tbt: outcomes.iter().filter(complete).map(tbt).collect(),
        };
        for values in [&mut times.ttft, &mut times.gap, &mut times.tbt] {
            values.sort_by(f64::total_cmp);
        }
        times
    }
}

/// Mean and quantiles of times, milliseconds.
#[derive(Clone, Copy, Serialize)]
struct Quantiles {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Quantiles {
    fn of(sorted: &[f64]) -> Self {
        let [p50, p90, p99, max] =
            [0.5, 0.9, 0.99, 1.0].map(|share| rounded(quantile(sorted, share)));
        Self { mean: rounded(mean(sorted)), p50, p90, p99, max }
    }
}

/// To three places.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// Figures of one device, or of all.
#[derive(Serialize)]
pub(crate) struct Summary {
    requests: usize,
    done: usize,
    /// Given up as planned.
    cancelled: usize,
    /// Under way when its device was ended as planned.
    lost: usize,
    pub(crate) refused: usize,
    pub(crate) failed: usize,
    tokens: usize,
    tokens_per_second: f64,
    ttft_ms: Quantiles,
    gap_ms: Quantiles,
    tbt_ms: Quantiles,
    /// Tokens of a round trip, as in `timings`.
    accept_len: f64,
    bytes_up: u64,
    bytes_down: u64,
    pages_reused: u64,
}

impl Summary {
    fn of(outcomes: &[&Outcome], seconds: f64) -> Self {
        let count =
            |is: &dyn Fn(&End) -> bool| outcomes.iter().filter(|outcome| is(&outcome.end)).count();
        let sum = |of: &dyn Fn(&Outcome) -> u64| -> u64 {
            outcomes.iter().map(|outcome| of(outcome)).sum()
        };
        let tokens: u64 = sum(&|outcome| match outcome.ttft_us {
            Some(_) => 1 + outcome.gaps_us.len() as u64,
            None => 0,
        });
        let after_first: u64 = sum(&|outcome| u64::from(outcome.predicted_n.saturating_sub(1)));
        let rounds: u64 = sum(&|outcome| u64::from(outcome.rounds));
        let times = Times::of(outcomes);
        Self {
            requests: outcomes.len(),
            done: count(&|end| *end == End::Done),
            cancelled: count(&|end| *end == End::Cancelled),
            lost: count(&|end| *end == End::Lost),
            refused: count(&|end| matches!(end, End::Refused(_))),
            failed: count(&|end| matches!(end, End::Failed(_))),
            tokens: tokens as usize,
            tokens_per_second: rounded(tokens as f64 / seconds),
            ttft_ms: Quantiles::of(&times.ttft),
            gap_ms: Quantiles::of(&times.gap),
            tbt_ms: Quantiles::of(&times.tbt),
            accept_len: rounded(after_first as f64 / rounds.max(1) as f64),
            bytes_up: sum(&|outcome| outcome.bytes_up),
            bytes_down: sum(&|outcome| outcome.bytes_down),
            pages_reused: sum(&|outcome| u64::from(outcome.pages_reused)),
        }
    }

    const HEAD: &str = "| device | requests (done) | tokens/s | TTFT ms p50, p90, p99 | gap ms \
        mean; p50, p90, p99, max | tokens a round | KB up, down an answer |\n\
        |---|---|---|---|---|---|---|";

    fn row(&self, name: &str) -> String {
        let Self { requests, done, ttft_ms: ttft, gap_ms: gap, .. } = self;
        let kb = |bytes: u64| bytes as f64 / (*done).max(1) as f64 / 1e3;
        format!(
            "| {name} | {requests} ({done}) | {:.1} | {:.1}, {:.1}, {:.1} | {:.2}; {:.2}, {:.2}, \
             {:.2}, {:.1} | {:.2} | {:.1}, {:.1} |",
            self.tokens_per_second,
            ttft.p50,
            ttft.p90,
            ttft.p99,
            gap.mean,
            gap.p50,
            gap.p90,
            gap.p99,
            gap.max,
            self.accept_len,
            kb(self.bytes_up),
            kb(self.bytes_down),
        )
    }
}

/// The largest of the devices' means, over the median of them; `None` without any.
fn largest_over_median(means: impl Iterator<Item = f64>) -> Option<f64> {
    let mut means: Vec<f64> = means.filter(|mean| *mean > 0.0).collect();
    means.sort_by(f64::total_cmp);
    Some(means.last()? / quantile(&means, 0.5))
}

/// All figures of a run.
pub(crate) struct Figures {
    seconds: f64,
    each: Vec<Summary>,
    pub(crate) all: Summary,
    times: Times,
    pub(crate) cloud: Option<CloudFigures>,
    pub(crate) compared: Option<Compared>,
    /// Devices that were ended and replaced as planned.
    pub(crate) replaced: u64,
    late_ms_max: f64,
}

impl Figures {
    /// Figures of the requests of each device, over so many seconds.
    pub(crate) fn new(outcomes: &[Vec<Outcome>], seconds: f64) -> Self {
        let all: Vec<&Outcome> = outcomes.iter().flatten().collect();
        let each = |outcomes: &Vec<Outcome>| Summary::of(&Vec::from_iter(outcomes), seconds);
        Self {
            seconds,
            each: outcomes.iter().map(each).collect(),
            all: Summary::of(&all, seconds),
            times: Times::of(&all),
            cloud: None,
            compared: None,
            replaced: 0,
            late_ms_max: all.iter().map(|outcome| outcome.late_ms).fold(0.0, f64::max),
        }
    }

    /// Max/median over devices of the mean gap, and of the mean TTFT.
    fn fairness(&self) -> [Option<f64>; 2] {
        [
            largest_over_median(self.each.iter().map(|summary| summary.gap_ms.mean)),
            largest_over_median(self.each.iter().map(|summary| summary.ttft_ms.mean)),
        ]
    }

    pub(crate) fn print(&self) -> Result<(), OutError> {
        outln!("{}", Summary::HEAD)?;
        let mut order: Vec<usize> = (0..self.each.len()).collect();
        if order.len() > LINES_MAX {
            let slowness = |index: &usize| self.each[*index].gap_ms.mean;
            order.sort_by(|a, b| slowness(b).total_cmp(&slowness(a)));
            order.truncate(LINES_MAX / 4);
        }
        for index in order {
            outln!("{}", self.each[index].row(&index.to_string()))?;
        }
        outln!("{}", self.all.row("all"))?;
        let Summary { cancelled, lost, refused, failed, .. } = self.all;
        outln!(
            "{:.1} s; {cancelled} given up as planned, {lost} lost with their devices ({} of them \
             replaced); {refused} refused, {failed} failed; begun at most {:.1} ms late",
            self.seconds,
            self.replaced,
            self.late_ms_max,
        )?;
        if let [Some(gap), Some(ttft)] = self.fairness() {
            outln!("max/median over devices: mean gap {gap:.2}, mean TTFT {ttft:.2}")?;
        }
        if let Some(cloud) = &self.cloud {
            cloud.print()?;
        }
        if let Some(Compared { answers, beginnings, tokens, different, .. }) = self.compared {
            outln!(
                "beside the whole model: {answers} answers and {beginnings} beginnings, {tokens} \
                 tokens; {different} differ"
            )?;
        }
        Ok(())
    }

    pub(crate) fn json(&self) -> Value {
        let [gap, ttft] = self.fairness();
        json!({
            "devices": self.each.len(),
            "seconds": self.seconds,
            "all": self.all,
            "fairness": {"gap_max_over_median": gap, "ttft_max_over_median": ttft},
            "replaced": self.replaced,
            "late_ms_max": self.late_ms_max,
            "cloud": self.cloud.as_ref().map(CloudFigures::json),
            "whole": self.compared,
            "each": self.each,
        })
    }

    /// Writes the plots; returns how many.
    pub(crate) fn plot(&self, folder: &Path) -> anyhow::Result<usize> {
        std::fs::create_dir_all(folder).with_context(|| format!("folder {}", folder.display()))?;
        let devices = self.each.len();
        let plots = [
            ("ttft", "TTFT", "answers", &self.times.ttft),
            ("gap", "time between tokens", "tokens", &self.times.gap),
            ("tbt", "mean time between tokens of an answer", "answers", &self.times.tbt),
        ];
        for (file, what, y, values) in plots {
            let title = format!("{what}, {devices} devices");
            let captions = Captions { title, x: "ms (red: this and more)", y, left: false };
            histogram(&folder.join(format!("{file}.svg")), &captions, values)?;
        }
        let memory = self.cloud.as_ref().map_or(&[][..], |cloud| &cloud.memory);
        if memory.is_empty() {
            return Ok(plots.len());
        }
        let curve = |name: &str, of: &dyn Fn(&Memory) -> f64| Curve {
            name: name.to_owned(),
            points: memory.iter().map(|memory| (memory.at_s, of(memory))).collect(),
        };
        let lines = [
            curve("resident", &|memory| memory.all_mb),
            curve("without files", &|memory| memory.own_mb),
        ];
        let title = format!("memory of the cloud, {devices} devices");
        let captions = Captions { title, x: "seconds", y: "MB", left: false };
        curves(&folder.join("memory.svg"), &captions, &lines)?;
        Ok(plots.len() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(ttft_us: u64, gaps_us: &[u32]) -> Outcome {
        Outcome {
            end: End::Done,
            ttft_us: Some(ttft_us),
            gaps_us: gaps_us.to_vec(),
            predicted_n: 1 + gaps_us.len() as u32,
            rounds: 2,
            bytes_up: 3000,
            bytes_down: 1000,
            ..Outcome::default()
        }
    }

    #[test]
    fn figures_add_up() {
        let first = [
            Outcome { late_ms: 1.0, ..outcome(4000, &[0, 2000, 0, 2000]) },
            Outcome { end: End::Cancelled, ttft_us: None, ..outcome(0, &[]) },
        ];
        let second = [outcome(9000, &[8000]), Outcome::of(3, End::Failed("x".into()))];
        let figures = Figures::new(&[first.to_vec(), second.to_vec()], 2.0);
        let json = figures.json();
        let all = &json["all"];
        assert_eq!(
            (&all["requests"], &all["done"], &all["cancelled"], &all["failed"]),
            (&4.into(), &2.into(), &1.into(), &1.into())
        );
        assert_eq!((&all["tokens"], &all["tokens_per_second"]), (&7.into(), &3.5.into()));
        assert_eq!(all["ttft_ms"]["mean"], 7.0);
        assert_eq!((&all["gap_ms"]["mean"], &all["gap_ms"]["max"]), (&2.4.into(), &8.0.into()));
        assert_eq!((&all["tbt_ms"]["p50"], &all["tbt_ms"]["max"]), (&8.0.into(), &8.0.into()));
        // Five tokens after the first, in two rounds each of two answers; a third has two rounds.
        assert_eq!(all["accept_len"], 0.833);
        assert_eq!(json["fairness"]["ttft_max_over_median"], 1.0);
        assert_eq!(
            (&json["each"][1]["gap_ms"]["p50"], &json["late_ms_max"]),
            (&8.0.into(), &1.0.into())
        );
    }

    #[test]
    fn one_starved_device_shows() {
        assert_eq!(largest_over_median([2.0, 2.0, 0.0, 20.0].into_iter()), Some(10.0));
        assert_eq!(largest_over_median(std::iter::empty()), None);
    }
}
