//! Figures of a run: for each device, and over all.

use std::path::Path;

use anyhow::Context as _;
use hat_program::out::OutError;
use hat_program::outln;
use hat_tools::plot::{Captions, Curve, curves, histogram};
use hat_tools::statistics::{mean, quantile};
use serde_json::{Value, json};

use crate::cloud::CloudFigures;
use crate::compare::Compared;
use crate::protocol::{End, Outcome};

/// Number of devices up to which all are printed, and not only those with the slowest tokens.
const LINES_MAX: usize = 40;

/// Sums and values of one device, or of all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) done: u64,
    /// Given up as planned.
    pub(crate) cancelled: u64,
    /// Under way when its device was ended as planned.
    pub(crate) lost: u64,
    pub(crate) refused: u64,
    pub(crate) failed: u64,
    pub(crate) retries: u64,
    /// From when a request was due to its first token, milliseconds.
    ttft_ms: Vec<f64>,
    /// Between tokens.
    gap_ms: Vec<f64>,
    /// Means of the gaps of each complete answer.
    tbt_ms: Vec<f64>,
    /// Sums over complete answers: tokens after the first, round trips, bytes, pages.
    after_first: u64,
    rounds: u64,
    bytes_up: u64,
    bytes_down: u64,
    pages_reused: u64,
    tokens: u64,
}

impl Tally {
    /// A request is over that began `late_ms` after it was due.
    pub(crate) fn note(&mut self, outcome: &Outcome, late_ms: f64) {
        match &outcome.end {
            End::Done => self.done += 1,
            End::Cancelled => self.cancelled += 1,
            End::Refused(_) => self.refused += 1,
            End::Failed(_) => self.failed += 1,
        }
        self.retries += u64::from(outcome.retries);
        if let Some(ttft_us) = outcome.ttft_us {
            self.ttft_ms.push(late_ms + ttft_us as f64 / 1e3);
            self.tokens += 1 + outcome.gaps_us.len() as u64;
        }
        let gaps = outcome.gaps_us.iter().map(|us| f64::from(*us) / 1e3);
        self.gap_ms.extend(gaps.clone());
        if outcome.end == End::Done && !outcome.gaps_us.is_empty() {
            self.tbt_ms.push(gaps.sum::<f64>() / outcome.gaps_us.len() as f64);
        }
        self.after_first += u64::from(outcome.predicted_n.saturating_sub(1));
        self.rounds += u64::from(outcome.rounds);
        self.bytes_up += outcome.bytes_up;
        self.bytes_down += outcome.bytes_down;
        self.pages_reused += u64::from(outcome.pages_reused);
    }

    fn add(&mut self, other: &Self) {
        self.ttft_ms.extend(&other.ttft_ms);
        self.gap_ms.extend(&other.gap_ms);
        self.tbt_ms.extend(&other.tbt_ms);
        let theirs = other.clone().sums().map(|sum| *sum);
        self.sums().into_iter().zip(theirs).for_each(|(sum, more)| *sum += more);
    }

    fn sums(&mut self) -> [&mut u64; 12] {
        [
            &mut self.done,
            &mut self.cancelled,
            &mut self.lost,
            &mut self.refused,
            &mut self.failed,
            &mut self.retries,
            &mut self.after_first,
            &mut self.rounds,
            &mut self.bytes_up,
            &mut self.bytes_down,
            &mut self.pages_reused,
            &mut self.tokens,
        ]
    }

    fn sort(&mut self) {
        for values in [&mut self.ttft_ms, &mut self.gap_ms, &mut self.tbt_ms] {
            values.sort_by(f64::total_cmp);
        }
    }

    fn requests(&self) -> u64 {
        self.done + self.cancelled + self.lost + self.refused + self.failed
    }

    /// Tokens of a round trip, as in `timings`.
    fn accept_len(&self) -> f64 {
        self.after_first as f64 / self.rounds.max(1) as f64
    }

    const HEAD: &str = "| device | requests (done) | tokens/s | TTFT ms p50, p90, p99 | gap ms \
        mean; p50, p90, p99, max | tokens a round | KB up, down an answer |\n\
        |---|---|---|---|---|---|---|";

    fn row(&self, name: &str, seconds: f64) -> String {
        let [ttft, gap] = [&self.ttft_ms, &self.gap_ms]
            .map(|values| [0.5, 0.9, 0.99, 1.0].map(|share| quantile(values, share)));
        let done = self.done.max(1) as f64;
        format!(
            "| {name} | {} ({}) | {:.1} | {:.1}, {:.1}, {:.1} | {:.2}; {:.2}, {:.2}, {:.2}, {:.1} \
             | {:.2} | {:.1}, {:.1} |",
            self.requests(),
            self.done,
            self.tokens as f64 / seconds,
            ttft[0],
            ttft[1],
            ttft[2],
            mean(&self.gap_ms),
            gap[0],
            gap[1],
            gap[2],
            gap[3],
            self.accept_len(),
            self.bytes_up as f64 / done / 1e3,
            self.bytes_down as f64 / done / 1e3,
        )
    }

    fn json(&self, seconds: f64) -> Value {
        let round = |value: f64| (value * 1e3).round() / 1e3;
        let quantiles = |values: &[f64]| {
            json!({
                "mean": round(mean(values)),
                "p50": round(quantile(values, 0.5)),
                "p90": round(quantile(values, 0.9)),
                "p99": round(quantile(values, 0.99)),
                "max": round(quantile(values, 1.0)),
            })
        };
        json!({
            "requests": self.requests(),
            "done": self.done,
            "cancelled": self.cancelled,
            "lost": self.lost,
            "refused": self.refused,
            "failed": self.failed,
            "retries": self.retries,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens as f64 / seconds),
            "ttft_ms": quantiles(&self.ttft_ms),
            "gap_ms": quantiles(&self.gap_ms),
            "tbt_ms": quantiles(&self.tbt_ms),
            "accept_len": round(self.accept_len()),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "pages_reused": self.pages_reused,
        })
    }
}

/// The largest of the devices' means, over the median of them; `None` without any.
fn largest_over_median(means: &[f64]) -> Option<f64> {
    let mut means: Vec<f64> = means.iter().copied().filter(|mean| *mean > 0.0).collect();
    means.sort_by(f64::total_cmp);
    Some(means.last()? / quantile(&means, 0.5))
}

/// All figures of a run.
pub(crate) struct Figures {
    pub(crate) seconds: f64,
    each: Vec<Tally>,
    all: Tally,
    pub(crate) cloud: Option<CloudFigures>,
    pub(crate) compared: Option<Compared>,
    /// Devices that were ended and replaced as planned.
    pub(crate) replaced: u64,
    /// The longest that a request began after it was due.
    pub(crate) late_ms_max: f64,
}

impl Figures {
    pub(crate) fn new(mut each: Vec<Tally>, seconds: f64) -> Self {
        let mut all = Tally::default();
        for tally in &mut each {
            tally.sort();
            all.add(tally);
        }
        all.sort();
        Self { seconds, each, all, cloud: None, compared: None, replaced: 0, late_ms_max: 0.0 }
    }

    pub(crate) fn all(&self) -> &Tally {
        &self.all
    }

    /// Max/median over devices of the mean gap, and of the mean TTFT.
    fn fairness(&self) -> [Option<f64>; 2] {
        let over = |of: &dyn Fn(&Tally) -> f64| {
            largest_over_median(&self.each.iter().map(of).collect::<Vec<_>>())
        };
        [over(&|tally| mean(&tally.gap_ms)), over(&|tally| mean(&tally.ttft_ms))]
    }

    pub(crate) fn print(&self) -> Result<(), OutError> {
        outln!("{}", Tally::HEAD)?;
        let mut order: Vec<usize> = (0..self.each.len()).collect();
        if order.len() > LINES_MAX {
            let slowness = |index: &usize| mean(&self.each[*index].gap_ms);
            order.sort_by(|a, b| slowness(b).total_cmp(&slowness(a)));
            order.truncate(LINES_MAX / 4);
        }
        for index in order {
            outln!("{}", self.each[index].row(&index.to_string(), self.seconds))?;
        }
        outln!("{}", self.all.row("all", self.seconds))?;
        let Tally { cancelled, lost, refused, failed, retries, .. } = self.all;
        outln!(
            "{:.1} s; {cancelled} given up as planned, {lost} lost with their devices ({} of them \
             replaced); {refused} refused after {retries} retries, {failed} failed; begun at most \
             {:.1} ms late",
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
        let each: Vec<Value> = self.each.iter().map(|tally| tally.json(self.seconds)).collect();
        json!({
            "devices": self.each.len(),
            "seconds": self.seconds,
            "all": self.all.json(self.seconds),
            "fairness": {"gap_max_over_median": gap, "ttft_max_over_median": ttft},
            "replaced": self.replaced,
            "late_ms_max": self.late_ms_max,
            "cloud": self.cloud.as_ref().map(CloudFigures::json),
            "whole": self.compared.as_ref().map(Compared::json),
            "each": each,
        })
    }

    /// Writes the plots; returns how many.
    pub(crate) fn plot(&self, folder: &Path) -> anyhow::Result<usize> {
        std::fs::create_dir_all(folder).with_context(|| format!("folder {}", folder.display()))?;
        let devices = self.each.len();
        let plots = [
            ("ttft", "TTFT", "answers", &self.all.ttft_ms),
            ("gap", "time between tokens", "tokens", &self.all.gap_ms),
            ("tbt", "mean time between tokens of an answer", "answers", &self.all.tbt_ms),
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
        let curve = |name: &str, of: &dyn Fn(&crate::cloud::Memory) -> f64| Curve {
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
        let mut first = Tally::default();
        first.note(&outcome(4000, &[0, 2000, 0, 2000]), 1.0);
        first.note(&Outcome { end: End::Cancelled, ttft_us: None, ..outcome(0, &[]) }, 0.0);
        let mut second = Tally::default();
        second.note(&outcome(9000, &[8000]), 0.0);
        second.note(&Outcome { end: End::Failed("x".into()), ..Outcome::default() }, 0.0);
        let figures = Figures::new(vec![first, second], 2.0);
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
        assert_eq!(json["each"][1]["gap_ms"]["p50"], 8.0);
    }

    #[test]
    fn one_starved_device_shows() {
        assert_eq!(largest_over_median(&[2.0, 2.0, 0.0, 20.0]), Some(10.0));
        assert_eq!(largest_over_median(&[]), None);
    }
}
