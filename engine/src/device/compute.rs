//! What the device computes next, and how it goes up: chunks of the prompt, rounds of decoding.

use std::io;
use std::time::Duration;

use hat_transport::frame::{HEADER_BYTES, Kind, Priority};
use hat_transport::message::{RowsHead, Want};

use super::active::{Active, Chunk, Phase, Timed, Unsent};
use super::run::Device;
use super::turn::{self, Ask};
use crate::error::RequestError;
use crate::{Event, wire};

/// Rows of a chunk that are computed, and sent, before the next ones are: the uplink does not wait
/// for a whole chunk, and is looked after in between.
const PIECE_ROWS: u32 = 64;

impl Device {
    /// Computes one piece of one request: see [`turn::choose`]. If there is none, adds drafts to a
    /// tree whose rows are away. Says whether there was anything to do.
    pub(super) fn compute_one(&mut self) -> io::Result<bool> {
        let may_upload = self.upload_pause().is_none();
        let next = turn::choose(self.actives.iter().map(|active| active.ask(may_upload)));
        if let Some(index) = next {
            for active in &mut self.actives {
                active.passed += u32::from(active.ask(may_upload).is_some());
            }
            self.actives[index].passed = 0;
            self.feed_trained(index);
            if self.actives[index].is_decoding() && self.draft(index) {
                self.compute_tree(index)?;
            } else {
                self.compute_chunk(index);
            }
            return Ok(true);
        }
        let Some(index) = self.actives.iter().position(Active::wants_more_drafts) else {
            return Ok(false);
        };
        self.draft_more(index)?;
        Ok(true)
    }

    /// Computes decided rows: a piece of a chunk of the prompt, or the last token alone. Those
    /// that the cloud holds are not sent.
    fn compute_chunk(&mut self, index: usize) {
        let held = self.actives[index].held_left();
        if held == 0 && self.actives[index].chunk.left == 0 {
            let rows = self.chunk_rows(index);
            self.actives[index].chunk = Chunk { rows, left: rows };
        }
        let active = &mut self.actives[index];
        let count = match held {
            0 => active.chunk.left.min(PIECE_ROWS),
            _ => held.min(self.start.config.limits.step_rows_max),
        };
        let count = turn::piece_rows(self.monitor.device_cost(), active.computed(), count);
        active.drafts.clear();
        let first = active.computed();
        let (first_id, parent) = (active.sequence.last_id() + 1, active.sequence.tip());
        let place = active
            .sequence
            .append_committed(first_id, count, parent)
            .expect("ids go on after the last one, and the session reserved all rows");
        self.plan.clear();
        self.plan.push_committed(place, count);
        self.plan.end_sequence(&active.sequence);
        let end = (first + count) as usize;
        let tokens = &active.tokens[first as usize..end];
        let hidden_size = self.start.facts.hidden_size;
        active.unsent.hidden.resize(count as usize * hidden_size, 0.0);
        let began = self.start.shared.clock.now();
        self.start.model.input(&self.plan.plan(), tokens, &mut active.unsent.hidden);
        let took = self.start.shared.clock.now().duration_since(began);
        self.costs.device.note(count as usize, took.as_secs_f64());
        self.monitor.note_device(count, took.as_secs_f64());
        if let Some(row) = first_not_finite(&active.unsent.hidden, hidden_size) {
            let row = u32::try_from(row).expect("below the chunk's rows");
            return self.fail(index, RequestError::NotFinite { position: first + row });
        }
        if held > 0 {
            active.unfed = first..first + count;
            active.unsent.sent = 0;
            active.unsent.count = 0;
            return;
        }
        let decides = end == active.tokens.len();
        active.set_unsent(first_id, parent, count as usize, decides);
        active.chunk.left -= count;
        active.unsent.grows = active.chunk.left > 0;
        active.unfed = first..first + count;
        let in_prefill = active.answer.tokens().is_empty();
        if decides {
            let last_id = first_id + count - 1;
            let before = if count > 1 { last_id - 1 } else { parent };
            let round = if in_prefill { 0 } else { active.round + 1 };
            active.walk.push(last_id, before, active.tokens[end - 1], None, round);
        }
        if in_prefill && !active.unsent.grows {
            active.meter.counts.chunks.push(active.chunk.rows);
            let event = Event::Prefill { sent: first + count, total: active.rows() };
            let _ = active.job.events.send(Ok(event));
        }
    }

    /// Sends what is computed, as far as there are buffers and credit: first what somebody waits
    /// for, then prompts, of which another one is the first each time.
    pub(super) fn send_unsent(&mut self) {
        let count = self.actives.len();
        for index in 0..count {
            if self.actives[index].is_urgent() {
                self.send_frames(index);
            }
        }
        self.first_to_send = (self.first_to_send + 1) % count.max(1);
        let first = self.first_to_send;
        for index in (0..count).map(|index| (first + index) % count) {
            if !self.actives[index].is_urgent() && !self.send_frames(index) {
                return;
            }
        }
    }

    /// Sends what one request has; says whether it could send all.
    fn send_frames(&mut self, index: usize) -> bool {
        while self.actives[index].phase == Phase::Open
            && self.actives[index].unsent.sent < self.actives[index].unsent.count
        {
            if !self.send_frame(index) {
                return false;
            }
        }
        true
    }

    /// Gives the link what a request has so far, so that it is on its way while more is computed.
    /// What arrives meanwhile is looked at later.
    pub(super) fn send_ahead(&mut self, index: usize) -> io::Result<()> {
        self.send_frames(index);
        self.endpoint.turn(Some(Duration::ZERO), &mut self.events)
    }

    /// Sends one frame of what is computed; says whether it could.
    fn send_frame(&mut self, index: usize) -> bool {
        let Some(connection) = self.connection.filter(|_| self.connected) else { return false };
        let hidden_size = self.start.facts.hidden_size;
        let codec = self.start.config.codec();
        let active = &mut self.actives[index];
        let rows_max = wire::rows_per_frame(codec, hidden_size, self.peer_frame_max);
        let head = active.head(rows_max, self.start.facts.has_tail);
        let unsent = &active.unsent;
        let rows = usize::from(head.count);
        let parents = if head.tree { unsent.parents_of(rows) } else { &[] };
        let bytes = head.payload_start() + rows * codec.row_bytes(hidden_size);
        let priority = if active.is_urgent() { Priority::Verify } else { Priority::Prompt };
        let Some(mut body) = self.endpoint.buffer_for(priority, bytes) else { return false };
        let start = head.encode(parents, body.body_mut());
        let hidden = &unsent.hidden[unsent.sent * hidden_size..][..rows * hidden_size];
        codec
            .pack(hidden, hidden_size, &mut body.body_mut()[start..])
            .expect("rows are checked when they are computed");
        let sent = self.endpoint.send(connection, Kind::Rows, active.wire_id, priority, body);
        if sent.is_err() {
            return false;
        }
        active.meter.rows_sent(u32::from(head.count));
        active.meter.counts.bytes_up += (HEADER_BYTES + bytes) as u64;
        active.note_sent(&head, self.start.shared.clock.now());
        true
    }
}

impl Active {
    /// What it asks of the processor now, if anything; `may_upload` says whether the uplink takes
    /// more of prompts.
    fn ask(&self, may_upload: bool) -> Option<Ask> {
        let goes_up = self.is_decoding() || self.held_left() > 0 || may_upload;
        (self.wants_compute() && goes_up)
            .then(|| Ask { rows: self.rows() - self.computed(), passed: self.passed })
    }

    /// True if somebody waits for a token of what it has to send: its rows are a verify.
    fn is_urgent(&self) -> bool {
        !self.answer.tokens().is_empty() && self.unsent.decided <= 1
    }

    /// `count` decided rows of `unsent.hidden` are to be sent, and with them what the cloud shall
    /// keep.
    pub(super) fn set_unsent(&mut self, first_id: u32, parent: u32, count: usize, decides: bool) {
        if self.decided.is_empty() {
            self.decided = first_id..first_id;
        }
        self.decided.end = first_id + u32::try_from(count).expect("a chunk is small");
        let hidden = std::mem::take(&mut self.unsent.hidden);
        let mut parents = std::mem::take(&mut self.unsent.parents);
        parents.clear();
        self.unsent = Unsent {
            next_id: first_id,
            parent,
            decided: count,
            parents,
            decides,
            grows: false,
            hidden,
            begin: 0,
            sent: 0,
            count,
        };
    }

    /// The head of the next frame, of at most `rows_max` rows. Decided rows and those that pend
    /// never share a frame.
    fn head(&self, rows_max: usize, has_tail: bool) -> RowsHead {
        let unsent = &self.unsent;
        let sent = unsent.sent;
        let tree = sent >= unsent.decided;
        let end = if tree { unsent.count } else { unsent.decided };
        let rows = (end - sent).min(rows_max);
        let is_last_decided = unsent.decides && sent + rows == unsent.decided;
        RowsHead {
            first_id: unsent.next_id,
            count: u16::try_from(rows).expect("a frame holds few rows"),
            tree,
            decided: !tree,
            more: sent + rows < unsent.count || unsent.grows,
            want: match (tree || has_tail, is_last_decided) {
                (true, _) => Want::All,
                (false, true) => Want::Last,
                (false, false) => Want::None,
            },
            parent: match (sent, tree) {
                (_, true) => unsent.parents_of(1)[0],
                (0, false) => unsent.parent,
                (_, false) => unsent.next_id - 1,
            },
            commit: if sent == unsent.begin { self.commit } else { 0 },
        }
    }

    /// A frame with this head was sent.
    fn note_sent(&mut self, head: &RowsHead, now: std::time::Instant) {
        let in_answer = !self.answer.tokens().is_empty();
        // A chunk of a longer prompt waits for those before it as well.
        let alone = in_answer || self.computed() - self.held == self.chunk.rows;
        let unsent = &mut self.unsent;
        if unsent.sent == unsent.begin {
            self.commit = 0;
        }
        unsent.sent += usize::from(head.count);
        unsent.next_id = head.first_id + u32::from(head.count);
        self.sent_id = unsent.next_id - 1;
        let is_whole = unsent.sent == unsent.count && !unsent.grows;
        if is_whole && unsent.decides && alone {
            let rows = unsent.sent - unsent.begin;
            let first_id = unsent.next_id - u32::try_from(rows).expect("a chunk is small");
            self.timed.get_or_insert(Timed { at: now, first_id, rows });
        }
    }
}

impl Unsent {
    /// Parents of the next `rows` rows, which pend.
    fn parents_of(&self, rows: usize) -> &[u32] {
        &self.parents[self.sent - self.begin.max(self.decided)..][..rows]
    }

    /// Rows of which the cloud has not heard are void; a chunk that it has in part goes up whole.
    pub(super) fn drop_unheard(&mut self) {
        if self.sent == self.begin {
            self.count = self.sent;
        }
    }
}

/// The first row that holds something that is no number.
pub(super) fn first_not_finite(hidden: &[f32], hidden_size: usize) -> Option<usize> {
    hidden.iter().position(|number| !number.is_finite()).map(|at| at / hidden_size)
}
