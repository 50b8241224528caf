//! One session in the cloud: frames gathered into chunks, and the rows they become.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hat_transport::conn::Frame;
use hat_transport::frame::{Kind, Priority};
use hat_transport::message::{Dropped, Message, Open, Rows, SessionErrorCode, Want};
use hat_transport::turn::ConnectionId;

use super::io::scope_of;
use crate::backend::RowMove;
use crate::pack::Codec;
use crate::prefix::{PageId, PrefixScope};
use crate::sched::SessionKey;
use crate::sequence::{PlanBuffers, Sequence, SequenceError};

/// What a peer did wrong in one session; the session ends with it, the connection lives on.
#[derive(Debug)]
pub(super) struct Offence {
    pub(super) code: SessionErrorCode,
    pub(super) text: String,
}

impl Offence {
    pub(super) fn new(code: SessionErrorCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

impl From<SequenceError> for Offence {
    fn from(error: SequenceError) -> Self {
        let code = match error {
            SequenceError::BadCommit { .. } => SessionErrorCode::BadCommit,
            SequenceError::BadParent { .. } => SessionErrorCode::BadParent,
            _ => SessionErrorCode::BadShape,
        };
        Self::new(code, error.to_string())
    }
}

/// What waits to be applied, in order of arrival.
pub(super) enum Item {
    Chunk(Chunk),
    Commit(u32),
}

/// Rows that run together: one frame, or several joined by `MORE`.
#[derive(Default)]
pub(super) struct Chunk {
    pub(super) frames: Vec<Frame>,
    rows: u32,
    urgent: bool,
    /// Whether any of its rows are.
    pub(super) decided: bool,
    /// When its last frame came; `None` before.
    complete_at: Option<Instant>,
}

/// Rows of one session in one step, and which of them go back.
#[derive(Debug, Default)]
pub(super) struct StepRows {
    /// Rows in the step's order. Their ids count up from the first of each run.
    pub(super) ids: Vec<u32>,
    /// Indices into `ids` of the rows to return.
    pub(super) wanted: Vec<u32>,
    /// Their ids. `[wanted]`
    pub(super) wanted_ids: Vec<u32>,
    /// When the last of them had come.
    pub(super) complete_at: Option<Instant>,
}

impl StepRows {
    pub(super) fn clear(&mut self) {
        self.ids.clear();
        self.wanted.clear();
        self.wanted_ids.clear();
    }
}

/// One session.
pub(super) struct Session {
    pub(super) key: SessionKey,
    pub(super) connection: ConnectionId,
    pub(super) wire_id: u32,
    pub(super) codec: Codec,
    pub(super) entry_layer: u32,
    pub(super) exit_layer: u32,
    pub(super) sequence: Sequence,
    /// What its rows depend on beside their tokens.
    pub(super) scope: PrefixScope,
    /// Names of its prompt's full pages; empty when all are known.
    names: Vec<PageId>,
    /// So many of them are known.
    named: usize,
    pub(super) items: VecDeque<Item>,
    pub(super) gathering: Chunk,
    /// Whether the scheduler knows of the first chunk. It hears of the next one when that has
    /// run, so what a session may have waiting is bounded by its device's credit alone.
    pub(super) is_queued: bool,
    /// Steps on their way that have rows of this session.
    pub(super) in_flight: u32,
    pub(super) opened_at: Instant,
    /// When a frame came last, or an output went.
    pub(super) active_at: Instant,
}

/// The chunk that is to run next: so many rows, and whether they are a verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Next {
    pub(super) rows: u32,
    pub(super) urgent: bool,
}

impl Session {
    pub(super) fn new(
        key: SessionKey,
        connection: ConnectionId,
        wire_id: u32,
        codec: Codec,
        open: &Open<'_>,
        sequence: Sequence,
        now: Instant,
    ) -> Self {
        Self {
            key,
            connection,
            wire_id,
            codec,
            entry_layer: u32::from(open.entry_layer),
            exit_layer: u32::from(open.exit_layer),
            named: sequence.full_pages(),
            sequence,
            scope: scope_of(open),
            names: open.pages.to_vec(),
            items: VecDeque::new(),
            gathering: Chunk::default(),
            is_queued: false,
            in_flight: 0,
            opened_at: now,
            active_at: now,
        }
    }

    /// Names of its first pages, if more of them are full than are known.
    pub(super) fn names_to_keep(&self) -> Option<&[PageId]> {
        let full = self.sequence.full_pages().min(self.names.len());
        (full > self.named).then(|| &self.names[..full])
    }

    /// The pages of [`Session::names_to_keep`] are known now.
    pub(super) fn names_were_kept(&mut self) {
        self.named = self.sequence.full_pages().min(self.names.len());
        if self.named == self.names.len() {
            self.names = Vec::new();
        }
    }

    /// Whether it has nothing to do, and nothing was heard of it for so long.
    pub(super) fn is_idle(&self, now: Instant, idle_after: Duration) -> bool {
        let silent = now.saturating_duration_since(self.active_at) >= idle_after;
        silent && self.next().is_none() && self.in_flight == 0
    }

    /// The first chunk that waits.
    pub(super) fn next(&self) -> Option<Next> {
        self.items.iter().find_map(|item| match item {
            Item::Chunk(Chunk { rows, urgent, .. }) => Some(Next { rows: *rows, urgent: *urgent }),
            Item::Commit(_) => None,
        })
    }

    /// Takes a `ROWS` frame. Rows that wait and are void by it come to the end of `dropped`. Says
    /// whether chunks were taken out of the queue.
    pub(super) fn take_rows(
        &mut self,
        now: Instant,
        frame: Frame,
        hidden_size: usize,
        rows_max: u32,
        dropped: &mut Vec<Dropped>,
    ) -> Result<bool, Offence> {
        let Rows { head, payload, .. } = rows_of(&frame)?;
        let count = u32::from(head.count);
        let bytes = self.codec.row_bytes(hidden_size) * usize::from(head.count);
        if payload.len() != bytes {
            let text = format!(
                "{count} rows of {hidden_size} as {} are {bytes} bytes, but {} came",
                self.codec.name(),
                payload.len()
            );
            return Err(Offence::new(SessionErrorCode::BadShape, text));
        }
        if head.first_id.checked_add(count).is_none() {
            let text = format!("row ids end below {}, but {} came", u32::MAX, head.first_id);
            return Err(Offence::new(SessionErrorCode::BadShape, text));
        }
        let rows = self.gathering.rows + count;
        if rows > rows_max {
            let text = format!("a chunk of {rows} rows exceeds the row budget of {rows_max}");
            return Err(Offence::new(SessionErrorCode::BadShape, text));
        }
        let (more, decided, commit) = (head.more, head.decided, head.commit);
        let any_void = decided && self.drop_void(commit, dropped);
        self.gathering.rows = rows;
        self.gathering.urgent = frame.priority == Priority::Verify;
        self.gathering.decided |= decided;
        self.gathering.frames.push(frame);
        if !more {
            self.gathering.complete_at = Some(now);
            self.items.push_back(Item::Chunk(std::mem::take(&mut self.gathering)));
        }
        Ok(any_void)
    }

    /// Takes a commit. It is applied after the rows that came before it have run.
    pub(super) fn take_commit(
        &mut self,
        row: u32,
        moves: &mut Vec<RowMove>,
    ) -> Result<(), Offence> {
        if self.items.is_empty() {
            self.sequence.commit(row, moves, &mut Vec::new())?;
        } else {
            self.items.push_back(Item::Commit(row));
        }
        Ok(())
    }

    /// Forgets all rows that wait. Rows that were computed stay.
    pub(super) fn cancel(&mut self) {
        self.items.clear();
        self.gathering = Chunk::default();
        self.is_queued = false;
    }

    /// Puts the oldest chunk into a step: its rows' places into `plan`, its numbers to the end of
    /// `hidden`, row ids and wishes into `rows`.
    pub(super) fn put_chunk(
        &mut self,
        hidden_size: usize,
        plan: &mut PlanBuffers,
        moves: &mut Vec<RowMove>,
        hidden: &mut Vec<f32>,
        rows: &mut StepRows,
    ) -> Result<(), Offence> {
        let chunk = loop {
            match self.items.pop_front().expect("the scheduler counts the chunks") {
                Item::Commit(row) => self.sequence.commit(row, moves, &mut Vec::new())?,
                Item::Chunk(chunk) => break chunk,
            }
        };
        rows.complete_at = chunk.complete_at;
        for frame in &chunk.frames {
            let wire = rows_of(frame)?;
            let first = rows.ids.len();
            self.put_frame(&wire, plan, moves, rows)?;
            self.unpack(wire.payload, hidden_size, hidden)?;
            let end = rows.ids.len();
            let wanted = match wire.head.want {
                Want::None => end..end,
                Want::Last => end - 1..end,
                Want::All => first..end,
            };
            rows.wanted_ids.extend_from_slice(&rows.ids[wanted.clone()]);
            rows.wanted.extend(wanted.map(|index| u32::try_from(index).expect("few rows")));
        }
        plan.end_sequence(&self.sequence);
        Ok(())
    }

    fn put_frame(
        &mut self,
        wire: &Rows<'_>,
        plan: &mut PlanBuffers,
        moves: &mut Vec<RowMove>,
        rows: &mut StepRows,
    ) -> Result<(), Offence> {
        let head = &wire.head;
        let count = u32::from(head.count);
        if head.commit != 0 {
            // What it prunes and is still here has run, or runs now, and is answered by OUTPUT.
            self.sequence.commit(head.commit, moves, &mut Vec::new())?;
        }
        if head.decided {
            let first = self.sequence.append_committed(head.first_id, count, head.parent)?;
            plan.push_committed(first, count);
        } else {
            let parents: Vec<u32> = wire.parents_of_rows().collect();
            self.sequence.append_pending(head.first_id, &parents)?;
            for id in head.first_id..head.first_id + count {
                let known = plan.push_pending(&self.sequence, id);
                debug_assert!(known, "it was appended above");
            }
        }
        rows.ids.extend(head.first_id..head.first_id + count);
        Ok(())
    }

    fn unpack(
        &self,
        payload: &[u8],
        hidden_size: usize,
        hidden: &mut Vec<f32>,
    ) -> Result<(), Offence> {
        let start = hidden.len();
        let rows = payload.len() / self.codec.row_bytes(hidden_size);
        hidden.resize(start + rows * hidden_size, 0.0);
        self.codec
            .unpack(payload, hidden_size, &mut hidden[start..])
            .map_err(|error| Offence::new(SessionErrorCode::BadValue, error.to_string()))
    }
}

pub(super) fn rows_of(frame: &Frame) -> Result<Rows<'_>, Offence> {
    match Message::decode(Kind::Rows, &frame.body) {
        Ok(Message::Rows(rows)) => Ok(rows),
        Ok(other) => unreachable!("ROWS decoded as {:?}", other.kind()),
        Err(error) => Err(Offence::new(SessionErrorCode::BadShape, error.to_string())),
    }
}
