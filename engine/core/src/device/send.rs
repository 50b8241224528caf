//! Frames on their way into the link.

use std::ops::Bound;
use std::time::Instant;

use hat_transport::conn::{ConnectionId, FrameSink};
use hat_transport::frame::{HEADER_BYTES, Kind, Priority};
use hat_transport::message::{End, Message, Open};

use super::DeviceCore;
use super::context::Common;
use super::request::{Path, Request, Session};
use super::session::Timed;
use crate::wire::{self, KV_TYPE_F16};

/// A session that is over on this side. Frames of it that have not left are dropped: nobody waits
/// for their rows.
pub(super) enum Leaving {
    /// The cloud has lost it.
    Lost { wire_id: u32 },
    /// Its request is done with it.
    Ended {
        session: Session,
        path: Box<Path>,
        /// Rows that are committed, and the id of the last.
        committed: (usize, u32),
        is_whole: bool,
    },
}

impl Leaving {
    /// The session that a request leaves behind, if it has one.
    pub(super) fn of(request: &mut Request, is_whole: bool) -> Option<Self> {
        request.session.wire_id()?;
        let session = std::mem::replace(&mut request.session, Session::Closed { not_before: None });
        let committed = (request.kv.committed() as usize, request.kv.tip());
        let path = Box::new(std::mem::take(&mut request.path));
        Some(Self::Ended { session, path, committed, is_whole })
    }

    /// Tells the cloud, and which pages may be kept.
    fn send(&self, to: ConnectionId, sink: &mut dyn FrameSink) {
        let (session, path, committed, is_whole) = match self {
            Self::Lost { wire_id } => {
                sink.discard(to, *wire_id);
                return;
            }
            Self::Ended { session, path, committed, is_whole } => {
                (session, path, committed, *is_whole)
            }
        };
        let Some(wire_id) = session.wire_id() else { return };
        let dropped = sink.discard(to, wire_id);
        let pages = path.pages_of(committed.0);
        let open = session.open().filter(|_| !pages.is_empty());
        let commit = open.map_or(0, |open| open.last_commit(committed.1, dropped > 0, is_whole));
        if sink.send_message(to, wire_id, &Message::End(End { commit, pages })).is_err() {
            // Without names it is shorter.
            let _ = sink.send_message(to, wire_id, &Message::End(End::default()));
        }
    }
}

impl DeviceCore {
    /// Writes frames of all that may leave into a connection, as far as it takes them: ends of
    /// sessions, rows that somebody waits for, and rows of prompts, of which another one is the
    /// first each time. `opens` says whether sessions are opened, too.
    pub fn poll_transmit(
        &mut self,
        now: Instant,
        to: ConnectionId,
        sink: &mut dyn FrameSink,
        opens: bool,
    ) {
        while let Some(leaving) = self.leaving.pop_front() {
            leaving.send(to, sink);
        }
        if !self.cloud.connected {
            return;
        }
        if opens {
            self.open_sessions(now, to, sink);
        }
        let Self { requests, cx, .. } = self;
        for request in requests.values_mut().filter(|request| request.is_urgent()) {
            request.send_frames(now, to, sink, cx);
        }
        let after = requests.range(self.first_to_send + 1..).next();
        let next = after.or_else(|| requests.iter().next()).map(|(id, _)| *id);
        self.first_to_send = next.unwrap_or_default();
        let first = self.first_to_send;
        let ranges = [
            (Bound::Included(first), Bound::Unbounded),
            (Bound::Unbounded, Bound::Excluded(first)),
        ];
        for range in ranges {
            for (_, request) in requests.range_mut(range) {
                if !request.is_urgent() && !request.send_frames(now, to, sink, cx) {
                    return;
                }
            }
        }
    }

    /// Asks for the sessions that are to be opened by now.
    fn open_sessions(&mut self, now: Instant, to: ConnectionId, sink: &mut dyn FrameSink) {
        let (cloud, (first, count)) = (self.cx.cloud, self.cx.facts.layers);
        let layer = |layer: u32| u16::try_from(layer).expect("layers are few");
        for request in self.requests.values_mut() {
            let Session::Closed { not_before } = request.session else { continue };
            if not_before.is_some_and(|time| now < time) {
                continue;
            }
            let path = &mut request.path;
            path.names_max = wire::pages_per_frame(cloud.frame_max);
            let namer = self.namer.as_ref();
            let rows_max = request.prepared.rows_max();
            path.names = namer.map(|namer| namer.names(cloud.arithmetic, &path.tokens, rows_max));
            let open = Message::Open(Open {
                entry_layer: layer(first),
                exit_layer: layer(first + count),
                codec: self.cx.facts.codec.id(),
                kv_type: KV_TYPE_F16,
                arithmetic_id: cloud.arithmetic,
                rows_max,
                pages: path.pages_to_find(),
            });
            let bytes = open.encoded_len();
            let wire_id = self.next_wire_id;
            if sink.send_message(to, wire_id, &open).is_ok() {
                self.next_wire_id = self.next_wire_id.checked_add(1).unwrap_or(1);
                request.budget.opens();
                request.note_message(bytes);
                request.session = Session::Opening { wire_id };
            }
        }
    }
}

impl Request {
    /// Sends what may leave; returns true if all of it could.
    fn send_frames(
        &mut self,
        now: Instant,
        to: ConnectionId,
        sink: &mut dyn FrameSink,
        cx: &Common,
    ) -> bool {
        while self.session.open().is_some_and(|open| open.outgoing.has_released()) {
            if self.send_frame(now, to, sink, cx).is_none() {
                return false;
            }
        }
        true
    }

    /// Sends one frame of what may leave; `None` if it could not.
    fn send_frame(
        &mut self,
        now: Instant,
        to: ConnectionId,
        sink: &mut dyn FrameSink,
        cx: &Common,
    ) -> Option<()> {
        let (hidden_size, codec) = (cx.facts.hidden_size, cx.facts.codec);
        let priority = if self.is_urgent() { Priority::Verify } else { Priority::Prompt };
        let (in_answer, computed) = (!self.in_prefill(), self.computed());
        let open = self.session.open_mut()?;
        let out = &mut open.outgoing;
        let rows_max = wire::rows_per_frame(codec, hidden_size, cx.cloud.frame_max);
        let head = out.head(rows_max, cx.facts.has_tail);
        let rows = usize::from(head.count);
        let parents = if head.tree { out.parents_of(rows) } else { &[] };
        let bytes = head.payload_start() + rows * codec.row_bytes(hidden_size);
        let mut body = sink.buffer(priority, bytes)?;
        let start = head.encode(parents, body.body_mut());
        let hidden = &out.hidden[out.sent * hidden_size..][..rows * hidden_size];
        codec
            .encode(hidden, hidden_size, &mut body.body_mut()[start..])
            .expect("rows are checked when they are computed");
        sink.send(to, Kind::Rows, open.wire_id, priority, body).ok()?;
        // A chunk of a longer prompt waits for those before it as well.
        let alone = in_answer || computed - open.cached == open.chunk.rows;
        if let Some(ids) = out.note_sent(&head).filter(|_| alone) {
            let timed = Timed { at: now, first_id: ids.start, rows: ids.len() };
            open.timed.get_or_insert(timed);
        }
        self.budget.sends();
        self.meter.rows_sent(u32::from(head.count));
        self.meter.counts.bytes_up += (HEADER_BYTES + bytes) as u64;
        Some(())
    }
}
