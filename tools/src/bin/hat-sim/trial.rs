//! Runs of policies on a cost file, each done once, pooled over seeds.

use indicatif::ProgressBar;

use crate::costs::{CostFile, Published};
use crate::figures::Figures;
use crate::policy::Policy;
use crate::simulation::Run;
use crate::text::Predictability;

/// Requests of a run in which each device is alone, and their rate.
const ALONE: (usize, f64) = (90, 0.01);

/// Runs on one cost file.
pub(crate) struct Trials<'a> {
    file: &'a CostFile,
    predictability: Predictability,
    /// First seed, and how many.
    seed: u64,
    runs: u64,
    requests: usize,
    bar: ProgressBar,
    done: Vec<(String, f64, Figures)>,
}

impl<'a> Trials<'a> {
    /// `runs` of so many requests for each figure, with seeds from `seed` on.
    pub(crate) fn new(
        file: &'a CostFile,
        predictability: Predictability,
        (seed, runs, requests): (u64, u64, usize),
        bar: ProgressBar,
    ) -> Self {
        Self { file, predictability, seed, runs, requests, bar, done: vec![] }
    }

    /// Figures of a policy at a rate.
    pub(crate) fn figures(&mut self, name: &str, rate: f64) -> anyhow::Result<Figures> {
        let known = |(policy, at, _): &&(String, f64, Figures)| policy == name && *at == rate;
        if let Some((_, _, figures)) = self.done.iter().find(known) {
            return Ok(figures.clone());
        }
        let policy = Policy::named(name)?;
        let requests = if rate <= ALONE.1 { ALONE.0 } else { self.requests };
        self.bar.set_length(self.runs * requests as u64);
        self.bar.set_message(name.to_owned());
        let mut parts = vec![];
        for index in 0..self.runs {
            let run = Run { rate, requests, ..Run::of(&policy, self.seed + index) };
            let before = index * requests as u64;
            let mut progress = |over| self.bar.set_position(before + over as u64);
            parts.push(Figures::run(self.file, &self.predictability, run, &mut progress)?);
        }
        self.bar.finish_and_clear();
        let figures = Figures::pool(parts);
        self.done.push((name.to_owned(), rate, figures.clone()));
        Ok(figures)
    }

    /// Published figures beside ours: of all tables, or of one.
    pub(crate) fn compare(&mut self, table: Option<&str>) -> anyhow::Result<Vec<Compared>> {
        let mut all = vec![];
        for row in &self.file.published {
            if table.is_none_or(|table| table == row.table) {
                self.compare_row(row, &mut all)?;
            }
        }
        Ok(all)
    }

    fn compare_row(&mut self, row: &Published, all: &mut Vec<Compared>) -> anyhow::Result<()> {
        let Published { policy, table, rate, calibrates, .. } = row;
        let figures = self.figures(policy, *rate)?;
        let mut push = |what: &'static str, published: Option<f64>, predicted: f64| {
            let Some(published) = published else { return };
            let (policy, table) = (policy.clone(), table.clone());
            let (rate, calibrates) = (*rate, *calibrates);
            all.push(Compared { policy, table, rate, what, published, predicted, calibrates });
        };
        push("TTFT ms", row.ttft_ms, figures.ttft());
        push("TBT ms", row.tbt_ms, figures.tbt());
        push("step ms", row.step_ms.map(|step| step[0]), figures.step_ms[0]);
        push("step ms, sd", row.step_ms.map(|step| step[1]), figures.step_ms[1]);
        if row.tbt_cut.is_some() {
            let hat = self.figures("hat", *rate)?;
            push("TBT, HAT / this", row.tbt_cut.map(|cut| 1.0 - cut), hat.tbt() / figures.tbt());
        }
        if row.speed_up.is_some() {
            let plain = self.figures("u-shape", *rate)?;
            push("TBT, U-shape / this", row.speed_up, plain.tbt() / figures.tbt());
        }
        Ok(())
    }
}

/// A published figure and ours.
#[derive(Clone, Debug)]
pub(crate) struct Compared {
    pub(crate) policy: String,
    pub(crate) table: String,
    pub(crate) rate: f64,
    pub(crate) what: &'static str,
    pub(crate) published: f64,
    pub(crate) predicted: f64,
    pub(crate) calibrates: bool,
}

impl Compared {
    pub(crate) const HEAD: &str =
        "| table | policy | requests / s | figure | published | simulated | off |";

    /// For people.
    pub(crate) fn row(&self) -> String {
        let Self { policy, table, rate, what, published, predicted, .. } = self;
        let off = 100.0 * (predicted / published - 1.0);
        let mark = if self.calibrates { " (calibrates)" } else { "" };
        let digits = if *published < 5.0 { 2 } else { 1 };
        format!(
            "| {table} | {policy} | {rate} | {what} | {published:.digits$} | \
             {predicted:.digits$} | {off:+.1} %{mark} |"
        )
    }
}
