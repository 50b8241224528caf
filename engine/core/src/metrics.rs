//! Measurements: one generation's timings, and a role's sums.
//!
//! Plain structs without locks or clocks: the thread that owns them passes the time in, and
//! others read a copy. Histograms are of fixed size.

mod histogram;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use serde::Serialize;

pub use self::histogram::Histogram;
use crate::estimate::Estimates;

/// The `timings` object of `generate --json` and of the HTTP API: one flat object, which scripts
/// read by its names, and so more fields than a struct has otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Timings {
    /// Tokens of the prompt.
    pub prompt_n: u32,
    /// Tokens of the answer.
    pub predicted_n: u32,
    /// From the request to the first token.
    pub ttft_ms: f64,
    /// Time between tokens: half of the gaps are shorter.
    pub tbt_ms_p50: f64,
    /// Time between tokens: 99 of 100 gaps are shorter.
    pub tbt_ms_p99: f64,
    /// Tokens after the first, over the time since the first; 0 with fewer than two tokens.
    pub tokens_per_second: f64,
    /// Serial waits for the cloud after prefill: the longest chain of rows in which each went up
    /// after an output of the one before had come down, up to the row of the last decision.
    pub rounds: u32,
    /// Drafted tokens that were sent.
    pub draft_n: u32,
    /// Drafted tokens that were compared with a decided token: their parents were right.
    pub draft_n_tested: u32,
    /// Drafted tokens that were right, and kept.
    pub draft_n_accepted: u32,
    /// Tokens after the first, over rounds: bonus tokens included; 0 without a round.
    pub accept_len: f64,
    /// The same counts for each drafter that drafted.
    pub drafters: BTreeMap<&'static str, DraftCounts>,
    /// Most rows away at one time, prompt included.
    pub rows_in_flight_max: u32,
    /// Times that verification went on into drafts made while those above were away.
    pub predraft_hits: u32,
    /// Time spent on drafts and on the device's own layers for them, decided rows of rounds with
    /// drafts included.
    pub drafting_ms: f64,
    /// Time spent in tail layers, LM head and sampling.
    pub head_ms: f64,
    /// Pages of prompt and answer that the cloud had already when the session opened, or opened
    /// again: their rows were not sent.
    pub pages_reused: u32,
    /// Bytes sent to the cloud.
    pub bytes_up: u64,
    /// Bytes that came from the cloud.
    pub bytes_down: u64,
    /// Rows of each chunk of the prompt.
    pub chunks: Vec<u32>,
    /// The chunks as they were first planned by measured times, those before that included; empty
    /// if no plan was made.
    pub chunks_planned: Vec<u32>,
    /// Time of the first token expected by that plan, from the request on; 0 without one.
    pub ttft_predicted_ms: f64,
    /// Arithmetics that the cloud's layers computed in, by id; more than one if the answer went on
    /// with a cloud of another kind. One alone gives the same text again.
    pub arithmetic_ids: Vec<u32>,
}

/// Tokens of one drafter in one generation. A token that two drafters proposed at one place counts
/// for the one that thought it more probable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DraftCounts {
    /// Tokens that were sent.
    pub drafted: u32,
    /// Tokens that were compared with a decided token.
    pub tested: u32,
    /// Tokens that were right.
    pub accepted: u32,
}

/// Measures one generation. The counters are public; times go through methods.
#[derive(Clone, Debug)]
pub struct Meter {
    started: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    gaps_us: Histogram,
    rows_in_flight: u32,
    /// Counters, as they will be in [`Meter::timings`]; its times and sums are not yet filled in.
    pub counts: Timings,
}

impl Meter {
    /// A request of `prompt_n` tokens comes in.
    #[must_use]
    pub fn new(now: Instant, prompt_n: u32) -> Self {
        Self {
            started: now,
            first_token: None,
            last_token: None,
            gaps_us: Histogram::default(),
            rows_in_flight: 0,
            counts: Timings { prompt_n, ..Timings::default() },
        }
    }

    /// A token of the answer is known. Tokens of one round come at one time, with gaps of 0.
    pub fn token(&mut self, now: Instant) {
        match self.last_token {
            None => self.first_token = Some(now),
            Some(last) => self.gaps_us.record(micros(now.saturating_duration_since(last))),
        }
        self.last_token = Some(now);
        self.counts.predicted_n += 1;
    }

    /// Notes a plan: the rest of the prompt goes in chunks of `sizes`, and the first token is
    /// expected `finish_s` from now. The first plan counts; later ones know more of what has
    /// happened.
    pub fn planned(&mut self, now: Instant, sizes: &[u32], finish_s: f64) {
        if !self.counts.chunks_planned.is_empty() {
            return;
        }
        self.counts.chunks_planned.extend_from_slice(&self.counts.chunks);
        self.counts.chunks_planned.extend_from_slice(sizes);
        let elapsed = now.saturating_duration_since(self.started).as_secs_f64();
        self.counts.ttft_predicted_ms = (elapsed + finish_s) * 1e3;
    }

    /// Rows go up to the cloud.
    pub fn rows_sent(&mut self, rows: u32) {
        self.rows_in_flight += rows;
        self.counts.rows_in_flight_max = self.counts.rows_in_flight_max.max(self.rows_in_flight);
    }

    /// Rows are answered, or dropped.
    pub fn rows_settled(&mut self, rows: u32) {
        self.rows_in_flight = self.rows_in_flight.saturating_sub(rows);
    }

    /// Time to the first token, once there is one.
    #[must_use]
    pub fn ttft(&self) -> Option<Duration> {
        self.first_token.map(|first| first.saturating_duration_since(self.started))
    }

    /// Rows are computed in this arithmetic from now on.
    pub fn computed_in(&mut self, arithmetic_id: u32) {
        if self.counts.arithmetic_ids.last() != Some(&arithmetic_id) {
            self.counts.arithmetic_ids.push(arithmetic_id);
        }
    }

    /// Rows are on their way up no more: the link to them is lost.
    pub fn rows_lost(&mut self) {
        self.rows_in_flight = 0;
    }

    /// A drafted token goes up.
    pub fn drafted(&mut self, drafter: &'static str) {
        self.counts.drafters.entry(drafter).or_default().drafted += 1;
    }

    /// A drafted token was compared with the token that was decided.
    pub fn tested(&mut self, drafter: &'static str, accepted: bool) {
        let counts = self.counts.drafters.entry(drafter).or_default();
        counts.tested += 1;
        counts.accepted += u32::from(accepted);
    }

    /// All of it, as of now.
    #[must_use]
    pub fn timings(&self) -> Timings {
        let ms = |us: u64| us as f64 / 1e3;
        let after_first = f64::from(self.counts.predicted_n.saturating_sub(1));
        let drafts =
            |of: fn(&DraftCounts) -> u32| self.counts.drafters.values().map(of).sum::<u32>();
        let ratio = |over: f64| if over > 0.0 { after_first / over } else { 0.0 };
        let decode = match (self.first_token, self.last_token) {
            (Some(first), Some(last)) => last.saturating_duration_since(first).as_secs_f64(),
            _ => 0.0,
        };
        Timings {
            ttft_ms: self.ttft().map_or(0.0, |ttft| ttft.as_secs_f64() * 1e3),
            tbt_ms_p50: ms(self.gaps_us.percentile(0.5)),
            tbt_ms_p99: ms(self.gaps_us.percentile(0.99)),
            tokens_per_second: ratio(decode),
            accept_len: ratio(f64::from(self.counts.rounds)),
            draft_n: drafts(|counts| counts.drafted),
            draft_n_tested: drafts(|counts| counts.tested),
            draft_n_accepted: drafts(|counts| counts.accepted),
            ..self.counts.clone()
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Sums over the life of a role. One thread owns it; a clone is a snapshot.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct EngineMetrics {
    /// Requests that ended with an answer.
    pub requests_done: u64,
    /// Requests that their client gave up.
    pub requests_cancelled: u64,
    /// Requests that ended with an error.
    pub requests_failed: u64,
    /// Sessions that are open now.
    pub sessions: u64,
    /// Prompt tokens.
    pub tokens_prompt: u64,
    /// Answer tokens.
    pub tokens_predicted: u64,
    /// Drafted tokens that were sent.
    pub drafts: u64,
    /// Drafted tokens that were kept.
    pub drafts_accepted: u64,
    /// Bytes from device to cloud.
    pub bytes_up: u64,
    /// Bytes from cloud to device.
    pub bytes_down: u64,
    /// Time to the first token, microseconds.
    pub ttft_us: Histogram,
    /// Time between tokens, microseconds.
    pub tbt_us: Histogram,
    /// The device's estimates of link and cloud when the last request ended.
    pub estimates: Estimates,
}

impl EngineMetrics {
    /// A generation has ended with an answer.
    pub fn add(&mut self, meter: &Meter) {
        let counts = meter.timings();
        self.requests_done += 1;
        self.tokens_prompt += u64::from(counts.prompt_n);
        self.tokens_predicted += u64::from(counts.predicted_n);
        self.drafts += u64::from(counts.draft_n);
        self.drafts_accepted += u64::from(counts.draft_n_accepted);
        self.bytes_up += counts.bytes_up;
        self.bytes_down += counts.bytes_down;
        if let Some(ttft) = meter.ttft() {
            self.ttft_us.record(micros(ttft));
        }
        self.tbt_us.merge(&meter.gaps_us);
    }

    /// The text of `/metrics`, in the format of Prometheus: counters, gauges, and percentiles.
    #[must_use]
    pub fn to_prometheus(&self) -> String {
        let mut out = String::with_capacity(4096);
        let single = [
            ("hat_requests_done_total", "counter", self.requests_done),
            ("hat_requests_cancelled_total", "counter", self.requests_cancelled),
            ("hat_requests_failed_total", "counter", self.requests_failed),
            ("hat_sessions", "gauge", self.sessions),
            ("hat_tokens_prompt_total", "counter", self.tokens_prompt),
            ("hat_tokens_predicted_total", "counter", self.tokens_predicted),
            ("hat_drafts_total", "counter", self.drafts),
            ("hat_drafts_accepted_total", "counter", self.drafts_accepted),
            ("hat_bytes_up_total", "counter", self.bytes_up),
            ("hat_bytes_down_total", "counter", self.bytes_down),
        ];
        for (name, kind, value) in single {
            write_lines(&mut out, format_args!("# TYPE {name} {kind}\n{name} {value}\n"));
        }
        let summaries =
            [("hat_ttft_seconds", 1e-6, &self.ttft_us), ("hat_tbt_seconds", 1e-6, &self.tbt_us)];
        for (name, unit, histogram) in summaries {
            write_lines(&mut out, format_args!("# TYPE {name} summary\n"));
            for quantile in [0.5, 0.9, 0.99] {
                let value = histogram.percentile(quantile) as f64 * unit;
                write_lines(&mut out, format_args!("{name}{{quantile=\"{quantile}\"}} {value}\n"));
            }
            let (sum, count) = (histogram.sum() as f64 * unit, histogram.count());
            write_lines(&mut out, format_args!("{name}_sum {sum}\n{name}_count {count}\n"));
        }
        out
    }
}

fn write_lines(out: &mut String, lines: std::fmt::Arguments<'_>) {
    out.write_fmt(lines).expect("a string takes all");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timings_add_up() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut meter = Meter::new(start, 7);
        assert_eq!(meter.timings().tokens_per_second, 0.0);
        meter.rows_sent(7);
        meter.rows_settled(7);
        meter.token(at(100));
        assert_eq!(meter.ttft(), Some(Duration::from_millis(100)));
        for round in 1..=4u64 {
            meter.rows_sent(3);
            meter.counts.rounds += 1;
            meter.drafted("lookup");
            meter.drafted("lookup");
            meter.drafted("lookup");
            meter.tested("lookup", false);
            meter.tested("lookup", true);
            meter.rows_settled(3);
            meter.token(at(100 + round * 50));
            meter.token(at(100 + round * 50));
        }
        let timings = meter.timings();
        assert_eq!((timings.prompt_n, timings.predicted_n, timings.rounds), (7, 9, 4));
        assert_eq!((timings.accept_len, timings.ttft_ms), (2.0, 100.0));
        assert_eq!(timings.tokens_per_second, 40.0);
        assert_eq!(timings.rows_in_flight_max, 7);
        let counts = DraftCounts { drafted: 12, tested: 8, accepted: 4 };
        assert_eq!(timings.drafters.iter().collect::<Vec<_>>(), [(&"lookup", &counts)]);
        let sums = (timings.draft_n, timings.draft_n_tested, timings.draft_n_accepted);
        assert_eq!(sums, (12, 8, 4));
        assert_eq!(timings.tbt_ms_p50, 0.0);
        assert!((timings.tbt_ms_p99 - 50.0).abs() < 1.7, "{}", timings.tbt_ms_p99);

        let mut metrics = EngineMetrics::default();
        metrics.add(&meter);
        metrics.add(&meter);
        assert_eq!((metrics.requests_done, metrics.tokens_predicted), (2, 18));
        assert_eq!((metrics.tbt_us.count(), metrics.ttft_us.count()), (16, 2));
    }

    #[test]
    fn the_first_plan_counts() {
        let start = Instant::now();
        let mut meter = Meter::new(start, 300);
        meter.counts.chunks.push(128);
        meter.planned(start + Duration::from_millis(40), &[100, 72], 0.2);
        meter.planned(start + Duration::from_millis(90), &[72], 0.5);
        let timings = meter.timings();
        assert_eq!(timings.chunks_planned, [128, 100, 72]);
        assert!((timings.ttft_predicted_ms - 240.0).abs() < 1e-6, "{}", timings.ttft_predicted_ms);
    }

    /// The names are a contract: scripts read them.
    #[test]
    fn json_names_are_fixed() {
        let value = serde_json::to_value(Timings::default()).unwrap();
        let names: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            names.join(" "),
            "prompt_n predicted_n ttft_ms tbt_ms_p50 tbt_ms_p99 tokens_per_second rounds draft_n \
             draft_n_tested draft_n_accepted accept_len drafters rows_in_flight_max predraft_hits \
             drafting_ms head_ms pages_reused bytes_up bytes_down chunks \
             chunks_planned ttft_predicted_ms arithmetic_ids"
        );
    }

    #[test]
    fn the_text_of_metrics_has_a_type_for_each_name() {
        let mut metrics = EngineMetrics { requests_done: 3, ..EngineMetrics::default() };
        metrics.tbt_us.record(2000);
        let text = metrics.to_prometheus();
        assert!(
            text.contains("# TYPE hat_requests_done_total counter\nhat_requests_done_total 3\n")
        );
        assert!(text.contains("hat_tbt_seconds{quantile=\"0.99\"} 0.002\n"), "{text}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            let base = name.trim_end_matches("_sum").trim_end_matches("_count");
            assert!(text.contains(&format!("# TYPE {base} ")), "{name}");
            assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
        }
    }
}
