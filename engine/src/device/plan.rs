//! How many rows of a prompt go next, by what was measured; and what is measured.

use std::time::Duration;

use hat_transport::frame::HEADER_BYTES;
use hat_transport::message::{Arrivals, Computed, OutputHead};

use super::run::Device;
use super::turn;
use super::violation::CloudViolation;
use crate::chunk::{Ahead, CHUNK_ROWS_DEFAULT, ChunkPolicy, Limits};
use crate::monitor::{Estimates, Returned};

/// Seconds for which a chunk keeps one of the cloud's stages from others at most: what this cloud
/// cuts its steps to by itself, and another may not.
const STEP_S_MAX: f64 = 0.15;

/// Where a prompt stands on its way.
#[derive(Debug, Default)]
pub(super) struct Sizing {
    /// What is ahead of the next chunk, and when that was so.
    ahead: Option<(Ahead, std::time::Instant)>,
}

impl Device {
    /// Rows of the next chunk of request `index`. While too little is known for a plan, chunks
    /// have the default size; later ones of the same prompt may know more.
    pub(super) fn chunk_rows(&mut self, index: usize) -> u32 {
        // Looked at for each chunk, whatever the policy: between two looks only the mean is seen.
        let left_bytes = self.note_link();
        let active = &self.actives[index];
        let done = active.computed();
        let left = active.rows() - done;
        let rows_max = self.peer_rows_max.min(self.start.config.limits.step_rows_max);
        let in_prefill = active.answer.tokens().is_empty();
        let policy = self.start.config.chunks;
        let rows = match policy {
            ChunkPolicy::Off => left,
            ChunkPolicy::Fixed(rows) => rows,
            ChunkPolicy::Paper | ChunkPolicy::Auto if in_prefill => {
                let planned = self.planned_rows(index, policy, rows_max, left_bytes);
                planned.unwrap_or(CHUNK_ROWS_DEFAULT)
            }
            _ => CHUNK_ROWS_DEFAULT,
        };
        rows.min(left).min(rows_max)
    }

    /// The first chunk of a plan for what is left of a prompt; `None` if too little is known.
    fn planned_rows(
        &mut self,
        index: usize,
        policy: ChunkPolicy,
        rows_max: u32,
        left_bytes: u64,
    ) -> Option<u32> {
        let costs = self.monitor.costs(self.row_bytes(), self.layers(), self.peer_stages)?;
        let now = self.start.shared.clock.now();
        let active = &mut self.actives[index];
        let (done, rows) = (active.computed(), active.rows() - active.computed());
        let mut ahead = active.sizing.ahead.map_or_else(Ahead::default, |(ahead, at)| {
            ahead.later(now.duration_since(at).as_secs_f64())
        });
        ahead.uplink_s = ahead.uplink_s.max(self.monitor.uplink_busy_s(left_bytes));
        let limits = Limits { rows_max, step_s_max: STEP_S_MAX, ..Limits::default() };
        let plan = self.planner.plan_after(policy, &costs, &limits, ahead, done, rows);
        let next = *plan.sizes.first()?;
        active.meter.planned(now, plan.sizes, plan.finish_s);
        active.sizing.ahead = Some((ahead.behind(&costs, next, done), now));
        Some(next)
    }

    /// Looks at what the link counts; returns the bytes that are not acknowledged.
    fn note_link(&mut self) -> u64 {
        let counters = self.connection.and_then(|id| self.endpoint.counters(id));
        let Some(counters) = counters else { return 0 };
        let traffic = counters.traffic;
        let arrived = (traffic.arrived_bytes, traffic.arrived_in);
        let (bytes, time) = std::mem::replace(&mut self.arrived, arrived);
        let took = arrived.1.saturating_sub(time).as_secs_f64();
        self.monitor.note_downlink(arrived.0.saturating_sub(bytes), took);
        if let Some(rtt) = traffic.rtt {
            self.monitor.note_rtt(rtt.as_secs_f64());
        }
        traffic.unacked_bytes
    }

    /// For how long no more of a prompt is computed, since the uplink has enough; `None` if it may
    /// go on.
    pub(super) fn upload_pause(&self) -> Option<Duration> {
        let counters = self.connection.and_then(|id| self.endpoint.counters(id))?;
        turn::upload_pause(counters.traffic.unacked_bytes, |bytes| {
            self.monitor.knows_uplink().then(|| self.monitor.uplink_busy_s(bytes))
        })
    }

    /// How fast the cloud saw this device's frames come in.
    pub(super) fn note_arrivals(&mut self, arrivals: Arrivals) {
        self.monitor.note_uplink(u64::from(arrivals.bytes), f64::from(arrivals.us) * 1e-6);
    }

    /// A chunk of a prompt has been computed, long before the prompt's first output.
    pub(super) fn take_computed(
        &mut self,
        index: usize,
        computed: &Computed,
        bytes: usize,
    ) -> Result<(), CloudViolation> {
        let Computed { first_id, count, step_us, step_rows, arrivals, .. } = *computed;
        let last_id = first_id + u32::from(count) - 1;
        let active = &mut self.actives[index];
        active.meter.counts.bytes_down += (HEADER_BYTES + bytes) as u64;
        active.deadline = None;
        if last_id > active.sent_id {
            return Err(CloudViolation::NotSent { row: last_id });
        }
        // Said once more it is no news.
        if last_id > active.told_id {
            active.told_id = last_id;
            active.heard = self.start.shared.clock.now();
        }
        self.note_arrivals(arrivals);
        // Ids count the positions of a prompt from 1 on; later rows all come back.
        self.monitor.note_step(step_rows, first_id - 1, f64::from(step_us) * 1e-6);
        Ok(())
    }

    /// An output came back for `rows` rows that were sent together, `away_s` after that if no
    /// others were ahead of them.
    pub(super) fn note_returned(
        &mut self,
        index: usize,
        rows: usize,
        head: &OutputHead,
        away_s: Option<f64>,
    ) {
        self.note_link();
        let prefix = self.actives[index].computed();
        self.monitor.note_returned(&Returned {
            sent_bytes: (rows * self.row_bytes()) as u64,
            prefix: prefix.saturating_sub(u32::try_from(rows).unwrap_or(u32::MAX)),
            step_rows: head.step_rows,
            step_s: f64::from(head.step_us) * 1e-6,
            queue_s: f64::from(head.queue_us) * 1e-6,
            away_s,
        });
    }

    /// What is known now.
    pub(super) fn estimates(&self) -> Estimates {
        self.monitor.estimates(self.row_bytes(), self.layers(), self.peer_stages)
    }

    fn row_bytes(&self) -> usize {
        self.start.config.codec().row_bytes(self.start.facts.hidden_size)
    }

    /// Layers here before the cloud's, and the cloud's.
    fn layers(&self) -> (u32, u32) {
        let layers = &self.start.facts.layers;
        (layers.start, layers.end - layers.start)
    }
}
