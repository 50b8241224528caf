//! The cloud that the tool starts: a child process, its counters, and what it holds in memory.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context as _, bail};
use hat_tools::statistics::quantile;
use serde_json::{Value, json};

use crate::child::Child;
use crate::speech::{CloudSaid, CloudSetup, Counters};

const PATIENCE: Duration = Duration::from_secs(60);
/// How long the first and the last part of a run are, where its memory is compared.
const PART_S: f64 = 60.0;

pub(crate) struct CloudProcess {
    child: Child,
    heard: Receiver<CloudSaid>,
    address: String,
    memory: Vec<Memory>,
}

/// Resident memory at one time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Memory {
    pub(crate) at_s: f64,
    /// All, files included.
    pub(crate) all_mb: f64,
    /// What is not in files: KV, activations, buffers.
    pub(crate) own_mb: f64,
}

impl CloudProcess {
    pub(crate) fn start(setup: &CloudSetup) -> anyhow::Result<Self> {
        let (say, heard) = channel();
        let child = Child::start("cloud", setup, move |line| {
            // An end, and what is no word of ours, closes the channel.
            if let Some(said) = line.and_then(|line| serde_json::from_str(line).ok()) {
                let _ = say.send(said);
            }
        })?;
        match heard.recv_timeout(PATIENCE).context("the cloud process did not start")? {
            CloudSaid::Listening(address, describe) => {
                eprintln!("cloud: {describe}; process {}, at {address}", child.id());
                Ok(Self { child, heard, address, memory: vec![] })
            }
            CloudSaid::Failed(reason) => bail!("cloud: {reason}"),
            CloudSaid::Counters(_) => bail!("the cloud process says counters before its address"),
        }
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn counters(&mut self) -> anyhow::Result<Counters> {
        self.child.say(&()).context("the cloud process has ended")?;
        match self.heard.recv_timeout(PATIENCE).context("the cloud process has ended")? {
            CloudSaid::Counters(counters) => Ok(counters),
            said => bail!("the cloud process says {said:?} for counters"),
        }
    }

    /// Looks at its memory, where the system tells.
    pub(crate) fn look(&mut self, at_s: f64) {
        let path = format!("/proc/{}/status", self.child.id());
        let Ok(status) = std::fs::read_to_string(path) else { return };
        if let (Some(all_mb), Some(own_mb)) = (field(&status, "VmRSS:"), field(&status, "RssAnon:"))
        {
            self.memory.push(Memory { at_s, all_mb, own_mb });
        }
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

/// Medians of the first and of the last part of a run: a minute each, or a quarter if the run is
/// shorter than four.
pub(crate) fn first_and_last(memory: &[Memory]) -> Option<[Memory; 2]> {
    let end_s = memory.last()?.at_s;
    let part_s = PART_S.min(end_s / 4.0);
    let median = |part: &dyn Fn(f64) -> bool| {
        let of = |field: &dyn Fn(&Memory) -> f64| {
            let looked = memory.iter().filter(|memory| part(memory.at_s));
            let mut values: Vec<f64> = looked.map(field).collect();
            values.sort_by(f64::total_cmp);
            quantile(&values, 0.5)
        };
        let [at_s, all_mb] = [of(&|memory| memory.at_s), of(&|memory| memory.all_mb)];
        Memory { at_s, all_mb, own_mb: of(&|memory| memory.own_mb) }
    };
    Some([median(&|at_s| at_s <= part_s), median(&|at_s| at_s >= end_s - part_s)])
}

/// What a cloud did in a run.
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

    pub(crate) fn print(&self) {
        let Counters { steps, rows, opened, refused, sessions, pages_free, .. } = self.counters;
        println!(
            "cloud: {steps} steps of {:.2} rows and {:.2} ms ({rows} rows), {opened} sessions \
             opened, {refused} refused; {sessions} open and {pages_free} pages free at the end",
            self.rows_a_step(),
            self.step_ms(),
        );
        if let Some([first, last]) = first_and_last(&self.memory) {
            println!(
                "cloud memory, medians around {:.0} s and {:.0} s: resident {:.1} and {:.1} MB, \
                 without files {:.1} and {:.1} MB",
                first.at_s, last.at_s, first.all_mb, last.all_mb, first.own_mb, last.own_mb,
            );
        }
    }

    pub(crate) fn json(&self) -> Value {
        let Counters { steps, rows, step_us, opened, refused, sessions, pages_free } =
            self.counters;
        let memory = first_and_last(&self.memory).map(|parts| {
            parts.map(|part| {
                json!({"at_s": part.at_s, "resident_mb": part.all_mb, "own_mb": part.own_mb})
            })
        });
        json!({
            "steps": steps,
            "rows": rows,
            "step_us": step_us,
            "rows_a_step": self.rows_a_step(),
            "opened": opened,
            "refused": refused,
            "sessions": sessions,
            "pages_free": pages_free,
            "memory": memory,
        })
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
    fn the_first_and_the_last_minute_are_compared() {
        let at = |second: u32| Memory {
            at_s: f64::from(second),
            all_mb: f64::from(second) * 2.0,
            own_mb: if second < 300 { 1.0 } else { 5.0 },
        };
        let memory: Vec<Memory> = (0..=600).map(at).collect();
        let [first, last] = first_and_last(&memory).unwrap();
        assert_eq!((first.at_s, first.all_mb, first.own_mb), (30.0, 60.0, 1.0));
        assert_eq!((last.at_s, last.all_mb, last.own_mb), (570.0, 1140.0, 5.0));
        let [first, last] = first_and_last(&memory[..9]).unwrap();
        assert_eq!((first.at_s, last.at_s), (1.0, 7.0));
        assert!(first_and_last(&[]).is_none());
    }
}
