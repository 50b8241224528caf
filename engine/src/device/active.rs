//! One request that runs: where its rows are, and what has come back.

use std::time::{Duration, Instant};

use crate::Error;
use crate::answer::Answer;
use crate::backend::TokenId;
use crate::metrics::Meter;
use crate::sequence::Sequence;

use super::Job;

/// Where a request's session in the cloud stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// There is none; it is opened as soon as the cloud is connected and `not_before` has passed.
    Closed { not_before: Option<Instant> },
    /// `OPEN` is on its way.
    Opening,
    /// Rows go up, outputs come back.
    Open,
}

/// Rows that are computed and not sent yet.
#[derive(Default)]
pub(super) struct Unsent {
    /// Position of the first of them.
    pub(super) first: u32,
    /// Rows. `[count, hidden_size]`
    pub(super) hidden: Vec<f32>,
    /// Rows of `hidden` already sent.
    pub(super) sent: usize,
    /// Rows in `hidden`.
    pub(super) count: usize,
}

/// One request that runs.
pub(super) struct Active {
    pub(super) job: Job,
    pub(super) answer: Answer,
    pub(super) meter: Meter,
    pub(super) phase: Phase,
    /// The session's id on the wire; a new one at each opening.
    pub(super) wire_id: u32,
    /// Prompt and answer so far.
    pub(super) tokens: Vec<TokenId>,
    /// KV of the device's own layers. In plain decoding a row's id is its position plus one.
    pub(super) sequence: Sequence,
    pub(super) unsent: Unsent,
    /// Rows whose output has come back; only the tail layers need all of them.
    pub(super) returned: u32,
    /// Rows that no longer are in flight, for the figures.
    pub(super) settled: u32,
    /// When to give up on a cloud that is away.
    pub(super) deadline: Option<Instant>,
}

impl Active {
    /// Rows that the device's own layers have computed.
    pub(super) fn computed(&self) -> u32 {
        self.sequence.committed()
    }

    /// Rows that there are.
    pub(super) fn rows(&self) -> u32 {
        u32::try_from(self.tokens.len()).expect("within the context")
    }

    /// Whether there is something to compute now.
    pub(super) fn wants_compute(&self) -> bool {
        self.phase == Phase::Open
            && self.unsent.sent == self.unsent.count
            && self.computed() < self.rows()
    }

    /// Begins again from the tokens: the cloud no longer knows the session. What was emitted
    /// stays; the rows go up once more and the answer goes on after its last token.
    pub(super) fn restart(&mut self, not_before: Option<Instant>) {
        let pages = std::mem::replace(&mut self.sequence, Sequence::new(Vec::new(), 0));
        let rows_max = self.job.prepared.rows_max();
        self.sequence = Sequence::new(pages.into_pages(), rows_max);
        self.unsent.count = 0;
        self.unsent.sent = 0;
        self.returned = 0;
        self.settled = 0;
        self.phase = Phase::Closed { not_before };
    }

    /// Starts the clock on a cloud that is away, if it does not run already.
    pub(super) fn start_deadline(&mut self, now: Instant, patience: Duration) {
        self.deadline.get_or_insert(now + patience);
    }

    /// Ends the request with an error.
    pub(super) fn fail(&self, error: Error) {
        let _ = self.job.events.send(Err(error));
    }
}
