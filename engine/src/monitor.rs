//! What a device knows of itself, its link and its cloud: moving averages of what it has seen.
//!
//! The device notes how long its own layers took, and what the cloud says of each step and of how
//! fast frames came in there. [`Monitor::costs`] makes of that what
//! the chunk planner asks for. Pure: times and counts are arguments, seconds from any fixed start.

mod fit;
#[cfg(test)]
mod tests;

pub use self::fit::Fit;
use crate::chunk::{ChunkCosts, CloudCost, Line};

/// Share of the past in a moving average, as in the paper (arXiv 2503.18989).
pub const PAST_SHARE: f64 = 0.8;
/// Bytes of a rate's sample: of fewer, one segment more or less says much.
const SAMPLE_BYTES: u64 = 8 << 10;
/// Seconds of a rate's sample, where the link is not so fast that it takes very many bytes.
const SAMPLE_S: f64 = 2e-3;
/// Bytes of a sample however short it is.
const FAST_SAMPLE_BYTES: u64 = 512 << 10;
/// Processor time of sending a chunk: checksum and system call.
const FRAME_S: f64 = 30e-6;
/// Bytes of a chunk that are no rows: the frame's header and the head of ROWS.
const FRAME_BYTES: f64 = 48.0;

/// A moving average.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moving(Option<f64>);

impl Moving {
    /// Takes one measurement; what is no number from 0 up says nothing.
    pub fn note(&mut self, past: f64, value: f64) {
        if value.is_finite() && value >= 0.0 {
            self.0 = Some(self.0.map_or(value, |before| past * before + (1.0 - past) * value));
        }
    }

    /// What it is now; `None` before the first measurement.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        self.0
    }
}

/// Seconds a byte takes.
#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    byte_s: Moving,
    /// The sample at hand: bytes, and how long they took.
    bytes: u64,
    seconds: f64,
}

impl Flow {
    /// So many bytes came in so long, with the link at work all the time.
    fn note(&mut self, past: f64, bytes: u64, seconds: f64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.seconds += seconds.max(0.0);
        let is_long = self.seconds >= SAMPLE_S || self.bytes >= FAST_SAMPLE_BYTES;
        if self.bytes >= SAMPLE_BYTES && is_long {
            self.byte_s.note(past, self.seconds / self.bytes as f64);
            (self.bytes, self.seconds) = (0, 0.0);
        }
    }
}

/// What was measured of a device, its link and its cloud.
#[derive(Clone, Debug, Default)]
pub struct Monitor {
    uplink: Flow,
    is_uplink_seen: bool,
    downlink: Flow,
    rtt: Moving,
    wait: Moving,
    head: Moving,
    device: Fit,
    step: Fit,
}

/// A copy of the estimates, for people and reports. What is not known yet is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Estimates {
    /// Bytes a second to the cloud.
    pub uplink_bytes_s: Option<f64>,
    /// Bytes a second from the cloud.
    pub downlink_bytes_s: Option<f64>,
    /// Round-trip time, seconds.
    pub rtt_s: Option<f64>,
    /// What a chunk of a prompt costs.
    pub chunk: Option<ChunkCosts>,
}

/// What the first output after rows were sent says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Returned {
    /// Bytes of the rows that were sent together.
    pub sent_bytes: u64,
    /// Rows before them in their session.
    pub prefix: u32,
    /// Rows of the step, those of other sessions included.
    pub step_rows: u32,
    /// How long the step took.
    pub step_s: f64,
    /// How long the rows waited for the step.
    pub queue_s: f64,
    /// From the end of sending to the output; `None` if others were ahead of these rows.
    pub away_s: Option<f64>,
}

impl Monitor {
    /// The device's own layers took so long for a chunk.
    pub fn note_device(&mut self, rows: u32, seconds: f64) {
        self.device.note(PAST_SHARE, rows, 0, seconds);
    }

    /// The cloud says that so many bytes came in so long, with the uplink at work all the time. It
    /// saw none where the link is so fast that frames are there at once.
    pub fn note_uplink(&mut self, bytes: u64, seconds: f64) {
        self.is_uplink_seen = true;
        self.uplink.note(PAST_SHARE, bytes, seconds);
    }

    /// As [`Monitor::note_uplink`], from the cloud to here.
    pub fn note_downlink(&mut self, bytes: u64, seconds: f64) {
        self.downlink.note(PAST_SHARE, bytes, seconds);
    }

    /// The link's round-trip time, as it stands.
    pub fn note_rtt(&mut self, seconds: f64) {
        // The link smooths it already.
        self.rtt.note(0.0, seconds);
    }

    /// A step of `rows` rows took so long; this device's own had `prefix` rows before them.
    pub fn note_step(&mut self, rows: u32, prefix: u32, seconds: f64) {
        self.step.note(PAST_SHARE, rows, prefix, seconds);
    }

    /// The first output of rows that were sent together.
    pub fn note_returned(&mut self, returned: &Returned) {
        let Returned { sent_bytes, prefix, step_rows, step_s, queue_s, away_s } = *returned;
        self.note_step(step_rows, prefix, step_s);
        if let Some(away_s) = away_s {
            let link_s = self.rtt.value().unwrap_or(0.0) + sent_bytes as f64 * self.byte_up_s();
            // Where the link is taken for slower than it is, the cloud knows better.
            self.wait.note(PAST_SHARE, (away_s - step_s - link_s).max(queue_s));
        }
    }

    /// Tail layers, LM head and sampling of one row took so long.
    pub fn note_head(&mut self, seconds: f64) {
        self.head.note(PAST_SHARE, seconds);
    }

    fn byte_up_s(&self) -> f64 {
        self.uplink.byte_s.value().unwrap_or(0.0)
    }

    /// Until bytes that are sent or queued, and not acknowledged, have left: seconds.
    #[must_use]
    pub fn uplink_busy_s(&self, left: u64) -> f64 {
        (left as f64 * self.byte_up_s() - self.rtt.value().unwrap_or(0.0)).max(0.0)
    }

    /// True if the cloud has said how fast frames come in there.
    #[must_use]
    pub fn knows_uplink(&self) -> bool {
        self.is_uplink_seen
    }

    /// Seconds of the device's own layers, if they have computed anything.
    #[must_use]
    pub fn device_cost(&self) -> Option<CloudCost> {
        self.device.cost()
    }

    /// What a chunk costs whose rows have `row_bytes` bytes; `None` while device or uplink are
    /// unknown. A cloud that has not answered yet is taken to be as fast, layer by layer, as this
    /// device: `layers` are those of the device and of the cloud, which are `stages` runs.
    #[must_use]
    pub fn costs(&self, row_bytes: usize, layers: (u32, u32), stages: u32) -> Option<ChunkCosts> {
        let CloudCost { fixed, per_row, .. } = self.device.cost()?;
        let device = Line { fixed, per_row };
        let byte_s = self.uplink.byte_s.value().or(self.is_uplink_seen.then_some(0.0))?;
        let rtt_s = self.rtt.value().unwrap_or(0.0);
        let guess = || {
            let ratio = f64::from(layers.1) / f64::from(layers.0.max(1));
            CloudCost { fixed: fixed * ratio, per_row: per_row * ratio, per_row_context: 0.0 }
        };
        Some(ChunkCosts {
            device,
            frame_s: FRAME_S + FRAME_BYTES * byte_s,
            row_up_s: byte_s * row_bytes as f64,
            up_latency_s: rtt_s / 2.0,
            cloud: self.step.cost().unwrap_or_else(guess),
            stages,
            cloud_wait_s: self.wait.value().unwrap_or(0.0),
            return_s: rtt_s / 2.0
                + self.downlink.byte_s.value().unwrap_or(0.0) * row_bytes as f64
                + self.head.value().unwrap_or(0.0),
        })
    }

    /// All of it, as of now.
    #[must_use]
    pub fn estimates(&self, row_bytes: usize, layers: (u32, u32), stages: u32) -> Estimates {
        let rate = |flow: &Flow| flow.byte_s.value().filter(|&byte_s| byte_s > 0.0).map(f64::recip);
        Estimates {
            uplink_bytes_s: rate(&self.uplink),
            downlink_bytes_s: rate(&self.downlink),
            rtt_s: self.rtt.value(),
            chunk: self.costs(row_bytes, layers, stages),
        }
    }
}
