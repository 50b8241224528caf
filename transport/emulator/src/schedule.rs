//! Moments drawn from a seed: stalls, cuts, and the lateness of each moment. Each is a function of
//! the seed and of link time alone, so traffic doesn't change it.

use hat_transport::random::SeededRandom;

use super::{CutConfig, StallConfig, nanos};

/// Jitter changes in steps of this length.
const JITTER_STEP_NS: u64 = 10_000_000;

/// Random numbers for one use; draws of different uses are independent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draws {
    seed: u64,
    stream: u64,
}

impl Draws {
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream }
    }

    /// The draw `index` of this stream, in [0, 1).
    fn at(self, index: u64) -> f64 {
        // SplitMix64, twice: its steps over (seed, stream), then over the index.
        let key = mix(self.seed.wrapping_add(mix(self.stream)));
        (mix(key.wrapping_add(index)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn mix(value: u64) -> u64 {
    SeededRandom::new(value).next_u64()
}

/// Delay beyond the plain one, by the moment of leaving the bottleneck.
#[derive(Clone, Copy, Debug)]
pub(super) struct Jitter {
    draws: Draws,
    max_ns: u64,
}

impl Jitter {
    pub(super) fn new(draws: Draws, max_ns: u64) -> Self {
        Self { draws, max_ns }
    }

    /// Evenly spread over [0, max), one value for each step of 10 ms.
    pub(super) fn at(self, now: u64) -> u64 {
        (self.draws.at(now / JITTER_STEP_NS) * self.max_ns as f64) as u64
    }
}

/// One stall in each period, at a place in it that the seed chooses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stalls {
    draws: Draws,
    every_ns: u64,
    lasts_ns: u64,
}

impl Stalls {
    pub(super) fn new(draws: Draws, config: StallConfig) -> Self {
        Self { draws, every_ns: nanos(config.every), lasts_ns: nanos(config.lasts) }
    }

    fn start(self, period: u64) -> u64 {
        let slack = (self.every_ns - self.lasts_ns) as f64;
        period * self.every_ns + (self.draws.at(period) * slack) as u64
    }

    /// End of `work` ns of work that could begin at `from`, if none is done in a stall.
    pub(super) fn finish(self, from: u64, mut work: u64) -> u64 {
        let mut at = from;
        for period in from / self.every_ns.. {
            let start = self.start(period);
            if at < start {
                if work <= start - at {
                    break;
                }
                work -= start - at;
            }
            at = at.max(start + self.lasts_ns);
        }
        at + work
    }

    /// Number of stalls that began up to `now`.
    pub(super) fn begun(self, now: u64) -> u64 {
        let period = now / self.every_ns;
        period + u64::from(self.start(period) <= now)
    }
}

/// The moments at which the link is cut, and the count of bytes.
#[derive(Clone, Debug)]
pub(super) struct Cuts {
    draws: Draws,
    every_ns: Option<u64>,
    /// Periods whose cut is done.
    done: u64,
    after_ns: Option<u64>,
    after_bytes: Option<u64>,
}

impl Cuts {
    pub(super) fn new(draws: Draws, config: CutConfig) -> Self {
        Self {
            draws,
            every_ns: config.every.map(nanos),
            done: 0,
            after_ns: config.after.map(nanos),
            after_bytes: config.after_bytes,
        }
    }

    /// Time of the next cut by time.
    pub(super) fn next(&self) -> Option<u64> {
        // In the second half of each period: the gap between two is 0.5 to 1.5 periods.
        let periodic = self.every_ns.map(|every| {
            self.done * every + every / 2 + (self.draws.at(self.done) * 0.5 * every as f64) as u64
        });
        periodic.into_iter().chain(self.after_ns).min()
    }

    /// True if there is a cut at `now`; it is taken. Several that were missed are one.
    pub(super) fn take(&mut self, now: u64) -> bool {
        let mut cut = false;
        while self.next().is_some_and(|at| at <= now) {
            cut = true;
            if self.after_ns.is_some_and(|at| at <= now) {
                self.after_ns = None;
            } else {
                self.done += 1;
            }
        }
        cut
    }

    /// Bytes that may pass before the cut, if there is one by bytes.
    pub(super) fn bytes_left(&self) -> Option<u64> {
        self.after_bytes
    }

    /// Counts bytes that passed; whether this is the cut.
    pub(super) fn pass(&mut self, bytes: u64) -> bool {
        self.after_bytes = self.after_bytes.map(|left| left.saturating_sub(bytes));
        let cut = self.after_bytes == Some(0);
        if cut {
            self.after_bytes = None;
        }
        cut
    }
}
