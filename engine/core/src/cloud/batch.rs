//! One step: the rows that run in it, and what is to come back of them.

use std::ops::Range;
use std::time::{Duration, Instant};

use hat_plan::{BackendFault, MiddleStep};
use hat_transport::codec::{Codec, CodecError};
use hat_transport::conn::ConnectionId;
use hat_transport::message::OutputHead;

use super::session::{Session, StepRows};
use super::violation::SessionViolation;
use crate::sched::{BatchItem, SessionKey};

/// A step on its way: rows to compute, and whose they are. There is one more of these than stages,
/// so that the next step is planned while all stages run.
#[derive(Default)]
pub struct StepBatch {
    /// Rows, in and out, and what they attend to.
    pub step: MiddleStep,
    /// Begin of the first stage.
    pub began: Option<Instant>,
    /// Time that the stages computed, all together.
    pub took: Duration,
    /// Fault because of which its rows mean nothing, if there was one.
    pub fault: Option<BackendFault>,
    /// Sessions in the order of the step's sequences, and their connections.
    pub(super) sessions: Vec<(SessionKey, ConnectionId)>,
    /// Rows of each of them. `[sessions]`
    pub(super) rows: Vec<StepRows>,
    /// Rows that its rows attend to, added up.
    pub(super) attended: u64,
    /// Rows that somebody waits for.
    pub(super) urgent_rows: u32,
}

impl StepBatch {
    /// Connections that its outputs go to, in no order, and each as often as it has sessions.
    pub fn connections(&self) -> impl Iterator<Item = ConnectionId> {
        self.sessions.iter().map(|(_, connection)| *connection)
    }

    pub(super) fn clear(&mut self) {
        self.step.plan.clear();
        self.step.entry_layers.clear();
        self.step.moves.clear();
        self.step.hidden.clear();
        self.step.wanted.get_or_insert_default().clear();
        self.step.shared = None;
        self.sessions.clear();
        self.rows.iter_mut().for_each(StepRows::clear);
        self.attended = 0;
        self.urgent_rows = 0;
        self.began = None;
        self.took = Duration::ZERO;
        self.fault = None;
    }

    /// Time that the stages computed, all together, in microseconds.
    pub(super) fn took_us(&self) -> u32 {
        u32::try_from(self.took.as_micros()).unwrap_or(u32::MAX)
    }

    /// Time that the rows of session `index` waited for the step.
    pub(super) fn queue_us(&self, index: usize) -> u32 {
        let waited = self.began.zip(self.rows[index].complete_at);
        let waited = waited
            .map_or(Duration::ZERO, |(began, complete)| began.saturating_duration_since(complete));
        u32::try_from(waited.as_micros()).unwrap_or(u32::MAX)
    }

    /// Writes some of the wanted rows of session `index` as the body of an OUTPUT frame.
    ///
    /// # Errors
    /// If a row holds a number that is not finite.
    pub(super) fn encode_output(
        &self,
        index: usize,
        wanted: Range<usize>,
        head: &OutputHead,
        (codec, hidden_size): (Codec, usize),
        body: &mut [u8],
    ) -> Result<(), CodecError> {
        let rows = &self.rows[index];
        let start = head.encode(&rows.wanted_ids[wanted.clone()], body);
        let first = self.step.plan.rows_of(index).start;
        let payload = body[start..].chunks_exact_mut(codec.row_bytes(hidden_size));
        for (row, out) in rows.wanted[wanted].iter().zip(payload) {
            let row = &self.step.hidden[(first + *row as usize) * hidden_size..][..hidden_size];
            codec.encode(row, hidden_size, out)?;
        }
        Ok(())
    }

    /// Puts `item`, rows of the oldest chunk of `session`, into this step. What is wrong with them
    /// comes back as a violation; they then run as zeros and nothing of them is returned.
    pub(super) fn put(
        &mut self,
        item: &BatchItem,
        session: &mut Session,
        hidden_size: usize,
    ) -> Result<(), SessionViolation> {
        let index = self.sessions.len();
        if self.rows.len() == index {
            self.rows.push(StepRows::default());
        }
        let MiddleStep { plan, moves, hidden, .. } = &mut self.step;
        let rows = &mut self.rows[index];
        let (rows_before, numbers_before) = (plan.rows(), hidden.len());
        let put = session.put_rows(item.rows, hidden_size, plan, moves, hidden, rows);
        if put.is_err() {
            rows.clear();
            if plan.rows() == rows_before {
                return put;
            }
            hidden.truncate(numbers_before);
            hidden.resize(plan.rows() * hidden_size, 0.0);
            plan.end_sequence(session.sequence.pages());
        }
        let (count, context) = (u64::from(item.rows), u64::from(item.context));
        self.attended += count * (2 * context + count) / 2;
        self.urgent_rows += if item.urgent { item.rows } else { 0 };
        self.sessions.push((item.session, session.connection));
        self.step.entry_layers.push(session.entry_layer());
        let wanted = self.step.wanted.get_or_insert_default();
        for row in &self.rows[index].wanted {
            let row = rows_before + *row as usize;
            match wanted.last_mut() {
                Some(last) if last.end == row => last.end += 1,
                _ => wanted.push(row..row + 1),
            }
        }
        put
    }
}
