//! What a world is made of: its devices, the rates of their links, the lines that planners see.

use hat_engine::chunk::Line;
use hat_tools::random::{Purpose, unit};

use crate::costs::{CostFile, Roofline};
use crate::machine::{Device, Time};
use crate::policy::{Policy, Switches};

/// Sizes between which a planner's line over a roofline is drawn.
const LINE_ROWS: [usize; 2] = [1, 512];
/// How long a link keeps its rate.
const RATE_HOLDS: Time = 100_000_000;

/// A run.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) switches: Switches,
    pub(crate) seed: u64,
    /// Requests a second.
    pub(crate) rate: f64,
    pub(crate) requests: usize,
    pub(crate) replicas: usize,
    /// Measure what the scheduler takes, in real time.
    pub(crate) timed: bool,
    /// Keep who worked when.
    pub(crate) traced: bool,
}

impl Run {
    /// One cloud, nothing measured or kept; a rate and a number of requests are to be set.
    pub(crate) fn of(policy: &Policy, seed: u64) -> Self {
        let (rate, requests, replicas) = (1.0, 1, 1);
        Self {
            switches: policy.switches,
            seed,
            rate,
            requests,
            replicas,
            timed: false,
            traced: false,
        }
    }
}

/// Somebody worked from one time to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) lane: Lane,
    pub(crate) from_s: f64,
    pub(crate) to_s: f64,
    pub(crate) prompt: bool,
}

/// Who works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    Device,
    Uplink,
    Stage(usize),
    Downlink,
}

/// A line through a roofline at two sizes.
pub(super) fn line(roofline: Roofline) -> Line {
    let [low, high] = LINE_ROWS.map(|rows| roofline.seconds(rows));
    let per_row = (high - low) / (LINE_ROWS[1] - LINE_ROWS[0]) as f64;
    Line { fixed: (low - per_row * LINE_ROWS[0] as f64).max(0.0), per_row }
}

/// Bytes a second of one direction of a device's link at a time: drawn anew between the ends of its
/// range as time goes on.
pub(super) fn rate([low, high]: [f64; 2], seed: u64, device: usize, now: Time) -> f64 {
    let share = unit(seed, Purpose::Rate, device as u64, now / RATE_HOLDS);
    1e6 * (low + (high - low) * share)
}

/// Bytes a second in the long run.
pub(super) fn middle([low, high]: [f64; 2]) -> f64 {
    1e6 * f64::midpoint(low, high)
}

/// The devices of a run, before anything has happened.
pub(super) fn devices(file: &CostFile, run: &Run) -> Vec<Device> {
    let kinds = file.devices.iter().flat_map(|kind| std::iter::repeat_n(kind, kind.count));
    let replica = |index: usize| {
        let share = unit(run.seed, Purpose::Replica, index as u64, 0);
        (share * run.replicas as f64) as usize
    };
    kinds
        .enumerate()
        .map(|(index, kind)| Device {
            costs: file.device(kind),
            replica: replica(index),
            processor: Default::default(),
            up: Default::default(),
            down: Default::default(),
            estimator: Default::default(),
            acceptance: Default::default(),
            queue_s: Default::default(),
            open: 0,
            away: 0,
        })
        .collect()
}
