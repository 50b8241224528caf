//! One session in the cloud: frames gathered into chunks, and the rows they become.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hat_plan::{PAGE_SIZE, RowMove};
use hat_transport::conn::ConnectionId;
use hat_transport::frame::Priority;
use hat_transport::message::{Open, RowsHead, Want};

use super::prune::Pruning;
use super::rows::RowsFrame;
use super::violation::SessionViolation;
use crate::prefix::{PageId, PrefixScope};
use crate::sequence::{BatchBuffers, Sequence};
use hat_transport::codec::Codec;

/// Scope that the rows of a new session depend on.
pub(super) fn scope_of(open: &Open<'_>) -> PrefixScope {
    PrefixScope {
        entry_layer: open.entry_layer,
        exit_layer: open.exit_layer,
        codec: open.codec,
        kv_type: open.kv_type,
        arithmetic_id: open.arithmetic_id,
    }
}

/// Checks that an OPEN names no more pages than a prompt can fill: its last row is always computed.
pub(super) fn check_names(open: &Open<'_>) -> Result<(), SessionViolation> {
    let (named, rows_max) = (open.pages.len(), open.rows_max);
    let named_max = rows_max.saturating_sub(1) as usize / PAGE_SIZE;
    if named <= named_max {
        return Ok(());
    }
    Err(SessionViolation::Names { named, rows_max, named_max })
}

/// An item that waits to be applied, in order of arrival.
#[derive(Clone, Copy)]
pub(super) enum QueueItem {
    Chunk(Chunk),
    Commit(u32),
}

/// Rows of one frame, or of several joined by `MORE`. A verify runs in one step; decided rows may
/// run in several.
#[derive(Clone, Copy, Default)]
pub(super) struct Chunk {
    /// Frames of which not all rows are planned; they stand in [`Session::frames`].
    pub(super) frames: usize,
    /// Rows of the first of them that are planned.
    skip: u32,
    /// Rows that are not planned.
    rows: u32,
    urgent: bool,
    /// Rows that are decided.
    pub(super) decided: u32,
    /// Arrival of its last frame; `None` before.
    complete_at: Option<Instant>,
    planned: Planned,
}

/// The part of a chunk that is planned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Planned {
    /// Id of the chunk's first row; 0 before that is planned.
    pub(super) first_id: u32,
    pub(super) rows: u32,
    /// True if any of these rows go back.
    pub(super) answers: bool,
    /// True if these are all.
    pub(super) is_all: bool,
}

/// Time and rows of a chunk's steps that its device has not been told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Spent {
    /// Id of the chunk's first row.
    first_id: u32,
    /// Time that the chunk waited for its first step.
    pub(super) queue_us: u32,
    pub(super) step_us: u32,
    /// Rows of the steps, those of others included.
    pub(super) step_rows: u32,
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
    /// Arrival of the last row of their chunk.
    pub(super) complete_at: Option<Instant>,
    /// Their chunk up to them.
    pub(super) planned: Planned,
}

impl StepRows {
    /// The first row of a chunk that has run, of which no row goes back, and its rows; `None` if
    /// some do, or if it ran as zeros since something is wrong with it.
    pub(super) fn confirmed(&self) -> Option<(u32, u16)> {
        self.ids.first()?;
        let Planned { first_id, rows, answers, is_all } = self.planned;
        let count = u16::try_from(rows).ok().filter(|_| is_all && !answers)?;
        Some((first_id, count))
    }

    pub(super) fn clear(&mut self) {
        self.ids.clear();
        self.wanted.clear();
        self.wanted_ids.clear();
        self.planned = Planned::default();
    }
}

/// One session.
pub(super) struct Session {
    pub(super) connection: ConnectionId,
    pub(super) wire_id: u32,
    pub(super) codec: Codec,
    pub(super) sequence: Sequence,
    /// Scope that its rows depend on beside their tokens.
    pub(super) scope: PrefixScope,
    /// Names of its prompt's full pages; empty when all are known.
    names: Vec<PageId>,
    /// Number of them whose content is known.
    named: usize,
    pub(super) items: VecDeque<QueueItem>,
    /// The chunk whose end has not come.
    pub(super) gathering: Chunk,
    /// Frames of the chunks that wait, in order, then those of the chunk whose end has not come.
    pub(super) frames: VecDeque<RowsFrame>,
    /// Steps on their way that have rows of this session.
    pub(super) in_flight: u32,
    spent: Spent,
    pub(super) opened_at: Instant,
    /// Time of the last frame from it, or output to it.
    pub(super) active_at: Instant,
}

/// The chunk that is to run next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Next {
    /// Rows of it that are not planned.
    pub(super) rows: u32,
    /// Somebody waits for it. A peer may say so of a verify alone, not of a piece of a prompt.
    pub(super) urgent: bool,
    /// It may run in several steps.
    pub(super) divisible: bool,
}

impl Next {
    fn of(chunk: &Chunk) -> Self {
        let urgent = chunk.urgent && chunk.decided <= 1;
        let divisible = !urgent && chunk.decided == chunk.rows + chunk.planned.rows;
        Self { rows: chunk.rows, urgent, divisible }
    }
}

impl Session {
    pub(super) fn new(
        connection: ConnectionId,
        wire_id: u32,
        codec: Codec,
        open: &Open<'_>,
        sequence: Sequence,
        now: Instant,
    ) -> Self {
        Self {
            connection,
            wire_id,
            codec,
            named: sequence.full_pages(),
            sequence,
            scope: scope_of(open),
            names: open.pages.to_vec(),
            items: VecDeque::new(),
            gathering: Chunk::default(),
            frames: VecDeque::new(),
            in_flight: 0,
            spent: Spent::default(),
            opened_at: now,
            active_at: now,
        }
    }

    /// First layer of its rows.
    pub(super) fn entry_layer(&self) -> u32 {
        u32::from(self.scope.entry_layer)
    }

    /// The layer before which its rows leave.
    pub(super) fn exit_layer(&self) -> u32 {
        u32::from(self.scope.exit_layer)
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

    /// True if it has nothing to do, and nothing was heard of it for `idle_after`.
    pub(super) fn is_idle(&self, now: Instant, idle_after: Duration) -> bool {
        let silent = now.saturating_duration_since(self.active_at) >= idle_after;
        silent && self.next().is_none() && self.in_flight == 0
    }

    /// The first chunk that waits.
    pub(super) fn next(&self) -> Option<Next> {
        self.items.iter().find_map(|item| match item {
            QueueItem::Chunk(chunk) => Some(Next::of(chunk)),
            QueueItem::Commit(_) => None,
        })
    }

    /// Takes a `ROWS` frame. Rows that wait and are stale by it come to the end of
    /// `pruning.dropped`. Returns true if chunks were taken out of the queue.
    pub(super) fn take_rows(
        &mut self,
        now: Instant,
        rows: RowsFrame,
        hidden_size: usize,
        rows_max: u32,
        pruning: &mut Pruning,
    ) -> Result<bool, SessionViolation> {
        let RowsHead { first_id, count, more, decided, commit, .. } = rows.head;
        let (expected, got) =
            (self.codec.row_bytes(hidden_size) * usize::from(count), rows.payload_bytes());
        if got != expected {
            let codec = self.codec.name();
            return Err(SessionViolation::Payload {
                rows: count,
                hidden_size,
                codec,
                expected,
                got,
            });
        }
        let count = u32::from(count);
        if first_id.checked_add(count).is_none() {
            return Err(SessionViolation::LastId { first_id });
        }
        let of_chunk = self.gathering.rows + count;
        if of_chunk > rows_max {
            return Err(SessionViolation::Budget { rows: of_chunk, rows_max });
        }
        let any_stale = decided && self.prune_stale(commit, pruning);
        self.gathering.rows = of_chunk;
        self.gathering.urgent = rows.priority == Priority::Verify;
        self.gathering.decided += if decided { count } else { 0 };
        self.gathering.frames += 1;
        self.frames.push_back(rows);
        if !more {
            self.gathering.complete_at = Some(now);
            self.items.push_back(QueueItem::Chunk(std::mem::take(&mut self.gathering)));
        }
        Ok(any_stale)
    }

    /// Takes a commit. It is applied after the rows that came before it have run.
    pub(super) fn take_commit(
        &mut self,
        row: u32,
        moves: &mut Vec<RowMove>,
    ) -> Result<(), SessionViolation> {
        if self.items.is_empty() {
            self.sequence.commit(row, moves)?;
        } else {
            self.items.push_back(QueueItem::Commit(row));
        }
        Ok(())
    }

    /// Forgets all rows that wait. Rows that were computed stay.
    pub(super) fn cancel(&mut self) {
        self.items.clear();
        self.frames.clear();
        self.gathering = Chunk::default();
    }

    /// Puts the next `count` rows of the oldest chunk into a step: their places into `plan`, their
    /// numbers to the end of `hidden`, row ids and wishes into `rows`.
    pub(super) fn put_rows(
        &mut self,
        count: u32,
        hidden_size: usize,
        plan: &mut BatchBuffers,
        moves: &mut Vec<RowMove>,
        hidden: &mut Vec<f32>,
        rows: &mut StepRows,
    ) -> Result<(), SessionViolation> {
        let mut chunk = loop {
            match self.items.pop_front().expect("the scheduler counts the chunks") {
                QueueItem::Commit(row) => self.sequence.commit(row, moves)?,
                QueueItem::Chunk(chunk) => break chunk,
            }
        };
        rows.complete_at = chunk.complete_at;
        let mut left = count;
        while left > 0 && chunk.frames > 0 {
            let frame = self.frames.pop_front().expect("those of the chunks that wait");
            let (head, payload) = frame.part(chunk.skip, left);
            let first = rows.ids.len();
            self.put_part(&frame, &head, plan, moves, rows)?;
            let start = hidden.len();
            hidden.resize(start + usize::from(head.count) * hidden_size, 0.0);
            let decoded = self.codec.decode(payload, hidden_size, &mut hidden[start..]);
            decoded.map_err(SessionViolation::Value)?;
            let end = rows.ids.len();
            let wanted = match head.want {
                Want::None => end..end,
                Want::Last => end - 1..end,
                Want::All => first..end,
            };
            rows.wanted_ids.extend_from_slice(&rows.ids[wanted.clone()]);
            rows.wanted.extend(wanted.map(|index| u32::try_from(index).expect("few rows")));
            let put = u32::from(head.count);
            (left, chunk.skip) = (left - put, chunk.skip + put);
            if chunk.skip == u32::from(frame.head.count) {
                (chunk.skip, chunk.frames) = (0, chunk.frames - 1);
            } else {
                self.frames.push_front(frame);
            }
        }
        plan.end_sequence(self.sequence.pages());
        chunk.rows -= count - left;
        let planned = &mut chunk.planned;
        if planned.rows == 0 {
            planned.first_id = rows.ids.first().copied().unwrap_or(0);
        }
        planned.rows += count - left;
        planned.answers |= !rows.wanted.is_empty();
        planned.is_all = chunk.rows == 0;
        rows.planned = *planned;
        if !planned.is_all {
            self.items.push_front(QueueItem::Chunk(chunk));
        }
        Ok(())
    }

    /// A step with the rows of `planned` took so long. Says what the chunk has taken since its
    /// device was told, if it is to be told now: rows go back, or all of the chunk has run.
    pub(super) fn note_ran(
        &mut self,
        planned: &Planned,
        goes_back: bool,
        queue_us: u32,
        (step_us, step_rows): (u32, u32),
    ) -> Option<Spent> {
        let spent = &mut self.spent;
        if spent.first_id != planned.first_id || spent.step_rows == 0 {
            *spent = Spent { first_id: planned.first_id, queue_us, ..Spent::default() };
        }
        spent.step_us = spent.step_us.saturating_add(step_us);
        spent.step_rows = spent.step_rows.saturating_add(step_rows);
        (goes_back || planned.is_all).then(|| std::mem::take(spent))
    }

    fn put_part(
        &mut self,
        frame: &RowsFrame,
        head: &RowsHead,
        plan: &mut BatchBuffers,
        moves: &mut Vec<RowMove>,
        rows: &mut StepRows,
    ) -> Result<(), SessionViolation> {
        let count = u32::from(head.count);
        if head.commit != 0 {
            // What it prunes and is still here has run, or runs now, and is answered by OUTPUT.
            self.sequence.commit(head.commit, moves)?;
        }
        if head.decided {
            let first = self.sequence.append_committed(head.first_id, count, head.parent)?;
            plan.push_committed(first, count);
        } else {
            self.sequence.append_pending(head.first_id, frame.parents())?;
            for id in frame.ids() {
                let known = self.sequence.push_row(id, plan);
                debug_assert!(known, "it was appended above");
            }
        }
        rows.ids.extend(head.first_id..head.first_id + count);
        Ok(())
    }
}
