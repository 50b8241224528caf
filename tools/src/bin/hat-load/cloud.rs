//! The cloud that the tool starts: a child process, its counters, and what it holds in memory.

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context as _, bail};
use hat_program::out::OutError;
use hat_program::{note, outln};
use hat_tools::statistics::quantile;
use serde::Serialize;
use serde_json::{Value, json};

use crate::child::Child;
use crate::protocol::{Counters, Report};

const PATIENCE: Duration = Duration::from_secs(60);
/// Length of the parts of a run whose memory is compared, in seconds.
const PART_S: f64 = 60.0;

pub(crate) struct CloudProcess {
    child: Child,
    heard: Receiver<Report>,
    address: String,
    memory: Vec<Memory>,
}

/// Resident memory at one time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Memory {
    pub(crate) at_s: f64,
    /// All, files included.
    #[serde(rename = "resident_mb")]
    pub(crate) all_mb: f64,
    /// Memory that is not in files: KV, activations, buffers.
    pub(crate) own_mb: f64,
}

impl CloudProcess {
    pub(crate) fn start(bundle: &Path) -> anyhow::Result<Self> {
        let (say, heard) = channel();
        // Nobody listens once the run is over.
        let child = Child::start("cloud", bundle, "", move |report| _ = say.send(report))?;
        match heard.recv_timeout(PATIENCE).context("the cloud process did not start")? {
            Report::Listening(address, describe) => {
                note!("cloud: {describe}; process {}, at {address}", child.id());
                Ok(Self { child, heard, address, memory: vec![] })
            }
            Report::Failed(reason) => bail!("cloud: {reason}"),
            report => bail!("the cloud process says {report:?} for its address"),
        }
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn counters(&mut self) -> anyhow::Result<Counters> {
        self.child.say(&()).context("the cloud process has ended")?;
        match self.heard.recv_timeout(PATIENCE).context("the cloud process has ended")? {
            Report::Counters(counters) => Ok(counters),
            report => bail!("the cloud process says {report:?} for counters"),
        }
    }

    /// Looks whether it lives, and at its memory, where the system tells.
    pub(crate) fn look(&mut self, at_s: f64) -> anyhow::Result<()> {
        if let Some(status) = self.child.ended() {
            bail!("the cloud process ended by itself: {status}");
        }
        let path = format!("/proc/{}/status", self.child.id());
        let Ok(status) = std::fs::read_to_string(path) else { return Ok(()) };
        if let (Some(all_mb), Some(own_mb)) = (field(&status, "VmRSS:"), field(&status, "RssAnon:"))
        {
            self.memory.push(Memory { at_s, all_mb, own_mb });
        }
        Ok(())
    }

    pub(crate) fn memory(&self) -> &[Memory] {
        &self.memory
    }
}

/// A field of `/proc/PID/status`, which are in kB of 1024 bytes, in MB of 1,000,000.
fn field(status: &str, name: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kb: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kb * 1024.0 / 1e6)
}

/// Medians of each part of a run: minutes from its end backwards, or quarters if it is shorter
/// than four.
pub(crate) fn parts(memory: &[Memory]) -> Vec<Memory> {
    let Some(end_s) = memory.last().map(|memory| memory.at_s) else { return vec![] };
    let count = (end_s / PART_S).floor().max(4.0);
    let part_s = PART_S.min(end_s / count);
    let part = |index: f64| {
        let from_s = end_s - (count - index) * part_s;
        let of = |field: &dyn Fn(&Memory) -> f64| {
            let of_part = memory.iter().filter(|at| (from_s..=from_s + part_s).contains(&at.at_s));
            let mut values: Vec<f64> = of_part.map(field).collect();
            values.sort_by(f64::total_cmp);
            quantile(&values, 0.5)
        };
        let [at_s, all_mb] = [of(&|memory| memory.at_s), of(&|memory| memory.all_mb)];
        Memory { at_s, all_mb, own_mb: of(&|memory| memory.own_mb) }
    };
    (0..count as u32).map(|index| part(f64::from(index))).collect()
}

/// Totals of a cloud over a run.
#[derive(Clone, Debug)]
pub(crate) struct CloudFigures {
    /// After the run.
    pub(crate) counters: Counters,
    pub(crate) memory: Vec<Memory>,
}

impl CloudFigures {
    fn rows_a_step(&self) -> f64 {
        self.counters.rows as f64 / self.counters.steps.max(1) as f64
    }

    fn step_ms(&self) -> f64 {
        self.counters.step_us as f64 / 1e3 / self.counters.steps.max(1) as f64
    }

    pub(crate) fn print(&self) -> Result<(), OutError> {
        let Counters { steps, rows, opened, refused, sessions, pages_free, .. } = self.counters;
        outln!(
            "cloud: {steps} steps of {:.2} rows and {:.2} ms ({rows} rows), {opened} sessions \
             opened, {refused} refused; {sessions} open and {pages_free} pages free at the end",
            self.rows_a_step(),
            self.step_ms(),
        )?;
        let parts = parts(&self.memory);
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return Ok(()) };
        let own: Vec<String> = parts.iter().map(|part| format!("{:.1}", part.own_mb)).collect();
        outln!(
            "cloud memory, medians around {:.0} s and {:.0} s: resident {:.1} and {:.1} MB; \
             without files {} MB",
            first.at_s,
            last.at_s,
            first.all_mb,
            last.all_mb,
            own.join(", "),
        )
    }

    pub(crate) fn json(&self) -> Value {
        let mut json = json!(self.counters);
        json["rows_a_step"] = json!(self.rows_a_step());
        json["memory"] = json!(parts(&self.memory));
        json
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_name() {
        let status = "Name:\tx\nVmRSS:\t   1000 kB\nRssAnon:\t 500 kB\nRssFile:\t  7 kB\n";
        assert_eq!(field(status, "VmRSS:"), Some(1.024));
        assert_eq!(field(status, "RssAnon:"), Some(0.512));
        assert_eq!(field(status, "VmSwap:"), None);
    }

    #[test]
    fn minutes_are_compared_and_quarters_of_short_runs() {
        let at = |second: u32| Memory {
            at_s: f64::from(second),
            all_mb: f64::from(second) * 2.0,
            own_mb: if second < 300 { 1.0 } else { 5.0 },
        };
        let memory: Vec<Memory> = (0..=630).map(at).collect();
        let minutes = parts(&memory);
        assert_eq!(minutes.len(), 10);
        // What is over ten minutes is at the beginning.
        assert_eq!(minutes[0], Memory { at_s: 60.0, all_mb: 120.0, own_mb: 1.0 });
        assert_eq!(minutes[9], Memory { at_s: 600.0, all_mb: 1200.0, own_mb: 5.0 });
        assert_eq!((minutes[3].own_mb, minutes[5].own_mb), (1.0, 5.0));
        let quarters = parts(&memory[..9]);
        assert_eq!(quarters.iter().map(|part| part.at_s).collect::<Vec<_>>(), [1.0, 3.0, 5.0, 7.0]);
        assert!(parts(&[]).is_empty());
    }
}
