//! Figures of a run.

use anyhow::ensure;
use hat_core::metrics::Timings;
use hat_tools::statistics::{mean, quantile};
use serde_json::{Value, json};

use crate::costs::CostFile;
use crate::simulation::{Request, Run, Simulation};
use crate::text::Predictability;

/// Share of the requests at either end of a run that is not counted: the load is not there yet,
/// or not any more.
const EDGE: f64 = 0.1;

/// Result of a run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Figures {
    pub(crate) policy: String,
    /// Milliseconds of each counted request, in rising order.
    pub(crate) ttft_ms: Vec<f64>,
    pub(crate) tbt_ms: Vec<f64>,
    /// Tokens a round.
    pub(crate) accept_len: f64,
    /// Rows computed after the prompt, for each token.
    pub(crate) rows_a_token: f64,
    /// Of a request.
    pub(crate) bytes_up: f64,
    pub(crate) bytes_down: f64,
    /// A step in one stage: mean and standard deviation.
    pub(crate) step_ms: [f64; 2],
    pub(crate) chunks: f64,
}

impl Figures {
    /// Of a run, with all that happens in it; `progress` hears of each request that is over.
    pub(crate) fn run(
        file: &CostFile,
        predictability: &Predictability,
        run: Run,
        progress: &mut dyn FnMut(usize),
    ) -> anyhow::Result<Self> {
        let mut simulation = Simulation::new(file, predictability, run);
        simulation.simulate(progress);
        let (name, failed) = (&simulation.run.policy.name, &simulation.failed);
        ensure!(failed.is_empty(), "{name}: {}", failed.join(", "));
        Ok(Self::of(&simulation))
    }

    /// Of a world in which all has happened.
    pub(crate) fn of(simulation: &Simulation<'_>) -> Self {
        let count = simulation.requests().len();
        let edge = if count >= 20 { (count as f64 * EDGE) as usize } else { 0 };
        let counted = simulation.requests()[edge..count - edge].iter();
        let counted: Vec<(&Request, &Timings)> =
            counted.filter_map(|request| Some((request, request.timings.as_ref()?))).collect();
        let sum = |of: &dyn Fn(&Request, &Timings) -> f64| {
            counted.iter().map(|(request, timings)| of(request, timings)).sum::<f64>()
        };
        let sorted = |of: &dyn Fn(&Request) -> f64| {
            let mut values: Vec<f64> = counted.iter().map(|(request, _)| of(request)).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let requests = counted.len() as f64;
        let tokens = sum(&|request, _| f64::from(request.emitted - 1));
        let step_s: Vec<f64> = simulation.step_s().collect();
        let steps = step_s.len().max(1) as f64;
        let step = step_s.iter().sum::<f64>() / steps;
        let square = step_s.iter().map(|s| (s - step) * (s - step)).sum::<f64>() / steps;
        let way_s = 2.0 * simulation.one_way_s();
        Self {
            policy: simulation.run.policy.name.clone(),
            ttft_ms: sorted(&|request| 1e3 * (way_s + request.first_s - request.ask.at_s)),
            tbt_ms: sorted(&|request| {
                1e3 * (request.last_s - request.first_s) / f64::from(request.emitted - 1)
            }),
            accept_len: tokens / sum(&|_, timings| f64::from(timings.rounds)),
            rows_a_token: sum(&|request, _| request.rows_up as f64) / tokens,
            bytes_up: sum(&|_, timings| timings.bytes_up as f64) / requests,
            bytes_down: sum(&|_, timings| timings.bytes_down as f64) / requests,
            step_ms: [1e3 * step, 1e3 * square.sqrt()],
            chunks: sum(&|_, timings| timings.chunks.len() as f64) / requests,
        }
    }

    /// Of several runs of one policy, all of one length.
    pub(crate) fn pool(parts: Vec<Self>) -> Self {
        let count = parts.len() as f64;
        let mut parts = parts.into_iter();
        let mut all = parts.next().expect("there is a run");
        for mut part in parts {
            all.ttft_ms.append(&mut part.ttft_ms);
            all.tbt_ms.append(&mut part.tbt_ms);
            let numbers = all.numbers_mut().into_iter().zip(part.numbers_mut());
            numbers.for_each(|(sum, number)| *sum += *number);
        }
        all.numbers_mut().into_iter().for_each(|sum| *sum /= count);
        all.ttft_ms.sort_by(f64::total_cmp);
        all.tbt_ms.sort_by(f64::total_cmp);
        all
    }

    fn numbers_mut(&mut self) -> [&mut f64; 7] {
        let [step, spread] = &mut self.step_ms;
        [
            &mut self.accept_len,
            &mut self.rows_a_token,
            &mut self.bytes_up,
            &mut self.bytes_down,
            &mut self.chunks,
            step,
            spread,
        ]
    }

    pub(crate) fn ttft(&self) -> f64 {
        mean(&self.ttft_ms)
    }

    pub(crate) fn tbt(&self) -> f64 {
        mean(&self.tbt_ms)
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let round = |value: f64| (value * 1e3).round() / 1e3;
        json!({
            "policy": self.policy,
            "ttft_ms": round(self.ttft()),
            "tbt_ms": round(self.tbt()),
            "accept_len": round(self.accept_len),
            "bytes_up": self.bytes_up.round(),
            "bytes_down": self.bytes_down.round(),
            "ttft_ms_p50": round(quantile(&self.ttft_ms, 0.5)),
            "ttft_ms_p99": round(quantile(&self.ttft_ms, 0.99)),
            "tbt_ms_p50": round(quantile(&self.tbt_ms, 0.5)),
            "tbt_ms_p99": round(quantile(&self.tbt_ms, 0.99)),
            "rows_a_token": round(self.rows_a_token),
            "step_ms": round(self.step_ms[0]),
            "step_ms_sd": round(self.step_ms[1]),
            "chunks": round(self.chunks),
        })
    }

    /// Names of the columns of [`Figures::row`].
    pub(crate) const HEAD: &str = "| policy | TTFT ms (p50, p99) | TBT ms (p50, p99) | tokens a \
        round | rows a token | KB up | KB down | step ms (sd) | chunks |";

    /// For people.
    pub(crate) fn row(&self) -> String {
        let of = |values: &[f64]| {
            let [p50, p99] = [0.5, 0.99].map(|share| quantile(values, share));
            format!("{:.1} ({p50:.1}, {p99:.1})", mean(values))
        };
        format!(
            "| {} | {} | {} | {:.2} | {:.1} | {:.0} | {:.0} | {:.1} ({:.1}) | {:.1} |",
            self.policy,
            of(&self.ttft_ms),
            of(&self.tbt_ms),
            self.accept_len,
            self.rows_a_token,
            self.bytes_up / 1e3,
            self.bytes_down / 1e3,
            self.step_ms[0],
            self.step_ms[1],
            self.chunks,
        )
    }
}
