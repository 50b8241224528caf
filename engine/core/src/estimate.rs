//! A device's estimates of itself, its link and its cloud: moving averages of what it has measured.
//!
//! The draft policy asks what a round with this many rows takes, the chunk planner what a chunk of
//! a prompt costs at each place on its way. Both answers come from the same measurements, each of
//! which is noted once. Pure: times and counts are arguments.

#[cfg(test)]
pub(crate) mod tests;
mod times;

use std::time::Instant;

pub(crate) use self::times::{RowTimes, StepTimes};
use crate::chunk::{CostModel, StepCost};

/// Share of the past in a moving average, as in the paper (arXiv 2503.18989).
const PAST: f64 = 0.8;
/// Fewest rows of a size that says what chunks cost the device. Levels of a draft tree are smaller,
/// and run by other kernels: their times say nothing of a chunk's.
const CHUNK_ROWS_MIN: f64 = 16.0;
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
pub(crate) struct Average(Option<f64>);

impl Average {
    /// Takes one measurement; anything but a number from 0 up is ignored.
    pub(crate) fn note(&mut self, value: f64) {
        if value.is_finite() && value >= 0.0 {
            self.0 = Some(self.0.map_or(value, |past| PAST * past + (1.0 - PAST) * value));
        }
    }

    /// The average; `None` before the first measurement.
    pub(crate) fn value(&self) -> Option<f64> {
        self.0
    }

    /// The average; 0 before the first measurement.
    pub(crate) fn mean(&self) -> f64 {
        self.0.unwrap_or(0.0)
    }
}

/// One direction of the link: the seconds that a byte takes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flow {
    byte_s: Average,
    /// The sample at hand: bytes, and how long they took.
    bytes: u64,
    seconds: f64,
    /// True once anything was reported, be it that no byte was seen on its way.
    is_reported: bool,
}

impl Flow {
    pub(crate) fn note(&mut self, bytes: u64, seconds: f64) {
        self.is_reported = true;
        self.bytes = self.bytes.saturating_add(bytes);
        self.seconds += seconds.max(0.0);
        let is_long = self.seconds >= SAMPLE_S || self.bytes >= FAST_SAMPLE_BYTES;
        if self.bytes >= SAMPLE_BYTES && is_long {
            self.byte_s.note(self.seconds / self.bytes as f64);
            (self.bytes, self.seconds) = (0, 0.0);
        }
    }

    /// Bytes a second, if the link was seen at work.
    fn rate(&self) -> Option<f64> {
        self.byte_s.value().filter(|&byte_s| byte_s > 0.0).map(f64::recip)
    }
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
    /// Costs of a chunk of a prompt.
    pub chunk: Option<CostModel>,
}

/// The first output after rows were sent together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Returned {
    /// Rows that were sent together.
    pub(crate) rows: usize,
    /// Their bytes.
    pub(crate) sent_bytes: u64,
    /// Rows before them in their session.
    pub(crate) prefix: u32,
    /// Rows of the step, those of other sessions included.
    pub(crate) step_rows: u32,
    /// Seconds of the step.
    pub(crate) step_s: f64,
    /// Seconds that the rows waited for the step.
    pub(crate) queue_s: f64,
    /// Seconds from the end of sending to the output; `None` if others were ahead of these rows.
    pub(crate) away_s: Option<f64>,
}

/// A device's estimates of itself, its link and its cloud.
#[derive(Clone, Debug, Default)]
pub(crate) struct Estimator {
    /// Bytes that the cloud received, and their seconds, with the uplink at work all the time; no
    /// bytes where the link is so fast that frames are there at once.
    pub(crate) up: Flow,
    /// The same, from the cloud to here.
    pub(crate) down: Flow,
    /// The link's own average of its round trips, seconds.
    rtt: Option<f64>,
    /// The device's own layers.
    pub(crate) device: StepTimes,
    /// Tail layers and LM head of one visited row, seconds.
    pub(crate) head: Average,
    /// A batch of drafts made while rows are away, seconds.
    pub(crate) draft_batch: Average,
    /// Tokens of a round.
    pub(crate) tokens: Average,
    /// From the last byte sent to the first row back, the cloud's queue and step taken off: the
    /// link both ways, the upload of rows included.
    away_link: RowTimes,
    /// The same, the link and the step taken off: others' load in the cloud.
    away_cloud: Average,
    /// The cloud's steps: all their rows, and the rows before this device's own.
    pub(crate) step: StepTimes,
    /// Time in the cloud's queue, as a share of the step after it.
    queue: Average,
    /// Rows of a step for each of this device's; 1 where it is alone.
    crowd: Average,
    /// Rows of other sessions in a step.
    others: Average,
}

impl Estimator {
    /// The link's round-trip time is `seconds`, in the link's own average.
    pub(crate) fn note_rtt(&mut self, seconds: f64) {
        if seconds.is_finite() && seconds >= 0.0 {
            self.rtt = Some(seconds);
        }
    }

    /// Measures link and cloud by the first output of rows that were sent together.
    pub(crate) fn note_returned(&mut self, returned: &Returned) {
        let Returned { rows, sent_bytes, prefix, step_rows, step_s, queue_s, away_s } = *returned;
        self.step.note(step_rows, prefix, step_s);
        let Some(away_s) = away_s else { return };
        self.queue.note(queue_s / step_s.max(f64::MIN_POSITIVE));
        let (all, own) = (f64::from(step_rows), rows as f64);
        self.others.note((all - own).max(0.0));
        self.crowd.note(all / own.max(1.0));
        self.away_link.note(rows, (away_s - step_s - queue_s).max(0.0));
        // Where the link is taken for slower than it is, the cloud knows better.
        let link_s = self.rtt_s() + sent_bytes as f64 * self.byte_up_s();
        self.away_cloud.note((away_s - step_s - link_s).max(queue_s));
    }

    fn rtt_s(&self) -> f64 {
        self.rtt.unwrap_or(0.0)
    }

    /// Seconds of a byte on the uplink; 0 while that is unknown.
    fn byte_up_s(&self) -> f64 {
        self.up.byte_s.mean()
    }

    /// Seconds of a round with this many rows, its visited rows not counted; `None` if too little
    /// is known.
    ///
    /// Others share the step and decide by the same rules. Whoever took their rows for given would
    /// find that a few more of its own hardly lengthen a step that is long anyway; all would, and
    /// the cloud would compute little but drafts. So the step is that of a cloud whose rows all
    /// grow as one's own do, and the time in its queue grows with it.
    pub(crate) fn round(&self, rows: usize) -> Option<f64> {
        let crowd = self.crowd.mean().max(1.0);
        let step = self.step.by_rows.seconds((rows as f64 * crowd).round() as usize)?;
        let cloud = step * (1.0 + self.queue.mean());
        Some(self.device.by_rows.seconds(rows)? + self.away_link.seconds(rows)? + cloud)
    }

    /// Tokens a second without any drafts; `None` if too little is known.
    pub(crate) fn plain_rate(&self) -> Option<f64> {
        let round = self.round(1)? + self.head.mean();
        (round > 0.0).then_some(1.0 / round)
    }

    /// Seconds of a step with this many rows beside those of others.
    fn step_beside_others(&self, rows: usize) -> Option<f64> {
        self.step.by_rows.seconds(rows + self.others.mean().round() as usize)
    }

    /// Number of rows, at most `rows_max`, that may be added while others are away, and the least
    /// probability of each.
    ///
    /// They run in a step of their own. If the verdict comes by, a wait is saved; if it leaves the
    /// tree before, the next root may find the cloud busy with them. It does not if that step is
    /// shorter than the link's way there and back, and so no longer step is sent. A row that the
    /// verdict comes by saves the time that a token takes; it has to be worth more than the time
    /// that the row costs device and cloud.
    pub(crate) fn draft_batch(&self, rows_max: usize) -> (usize, f32) {
        let none = (0, 0.0);
        let step = |rows: usize| self.step_beside_others(rows);
        let device = |rows: usize| self.device.by_rows.seconds(rows);
        let (Some(wait), Some(round)) = (self.away_link.seconds(1), self.round(1)) else {
            return none;
        };
        let Some(rows) = (1..=rows_max).rev().find(|rows| step(*rows).is_some_and(|s| s <= wait))
        else {
            return none;
        };
        let each = |of: &dyn Fn(usize) -> Option<f64>| {
            Some((of(rows.max(2))? - of(1)?).max(0.0) / (rows.max(2) - 1) as f64)
        };
        let (Some(step), Some(device)) = (each(&step), each(&device)) else { return none };
        let token = (round + self.head.mean()) / self.tokens.mean().max(1.0);
        (rows, ((step + device) / token.max(f64::MIN_POSITIVE)).min(1.0) as f32)
    }

    /// True if the output of `rows` rows that were sent at `sent` will be back before another
    /// batch of drafts could be made.
    pub(crate) fn is_due(&self, now: Instant, sent: Instant, rows: usize) -> bool {
        let away = self.away_link.seconds(rows).zip(self.step_beside_others(rows));
        let (wait, step) = away.unwrap_or_default();
        let away = wait + step * (1.0 + self.queue.mean());
        now.duration_since(sent).as_secs_f64() + self.draft_batch.mean() > away
    }

    /// Seconds until `unacked` bytes that are sent or queued have left; `None` until the cloud has
    /// said how fast frames come in there.
    pub(crate) fn uplink_busy_s(&self, unacked: u64) -> Option<f64> {
        let busy_s = (unacked as f64 * self.byte_up_s() - self.rtt_s()).max(0.0);
        self.up.is_reported.then_some(busy_s)
    }

    /// Seconds of a piece of a prompt in the device's own layers, if they have computed anything.
    pub(crate) fn device_cost(&self) -> Option<StepCost> {
        self.device.cost(CHUNK_ROWS_MIN)
    }

    /// Costs of a chunk whose rows have `row_bytes` bytes; `None` while device or uplink are
    /// unknown. A cloud that has not answered yet is taken to be as fast, layer by layer, as this
    /// device: `layers` are those of the device and of the cloud, which are `stages` runs.
    pub(crate) fn cost_model(
        &self,
        row_bytes: usize,
        layers: (u32, u32),
        stages: u32,
    ) -> Option<CostModel> {
        let device = self.device.by_rows.line(CHUNK_ROWS_MIN)?;
        let byte_s = self.up.is_reported.then(|| self.byte_up_s())?;
        let assumed = || {
            let ratio = f64::from(layers.1) / f64::from(layers.0.max(1));
            let StepCost { fixed, per_row, .. } = device;
            StepCost { fixed: fixed * ratio, per_row: per_row * ratio, per_row_context: 0.0 }
        };
        Some(CostModel {
            device,
            frame_s: FRAME_S + FRAME_BYTES * byte_s,
            row_up_s: byte_s * row_bytes as f64,
            up_latency_s: self.rtt_s() / 2.0,
            cloud: self.step.cost(0.0).unwrap_or_else(assumed),
            stages,
            cloud_wait_s: self.away_cloud.mean(),
            return_s: self.rtt_s() / 2.0
                + self.down.byte_s.mean() * row_bytes as f64
                + self.head.mean(),
        })
    }

    /// A copy of the estimates as of now; arguments as for [`Estimator::cost_model`].
    pub(crate) fn estimates(&self, row_bytes: usize, layers: (u32, u32), stages: u32) -> Estimates {
        Estimates {
            uplink_bytes_s: self.up.rate(),
            downlink_bytes_s: self.down.rate(),
            rtt_s: self.rtt,
            chunk: self.cost_model(row_bytes, layers, stages),
        }
    }
}
