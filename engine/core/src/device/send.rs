//! Frames on their way into the link.

use std::time::Instant;

use hat_transport::conn::{ConnectionId, FrameSink};
use hat_transport::frame::{HEADER_BYTES, Kind, Priority};
use hat_transport::message::{End, Message};

use super::context::Common;
use super::request::{Path, Request, Session};
use super::session::{OpenSession, Timed};
use crate::wire;

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
    pub(super) fn send(&self, to: ConnectionId, sink: &mut dyn FrameSink) {
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

impl OpenSession {
    /// Sends one frame of what may leave; its rows are timed if the chunk is `alone` on its way.
    /// Returns the frame's rows and bytes; `None` if it could not leave.
    pub(super) fn send_frame(
        &mut self,
        now: Instant,
        to: ConnectionId,
        priority: Priority,
        alone: bool,
        sink: &mut dyn FrameSink,
        cx: &Common,
    ) -> Option<(u32, u64)> {
        let (hidden_size, codec) = (cx.facts.hidden_size, cx.facts.codec);
        let out = &mut self.outgoing;
        let rows_max = wire::rows_per_frame(codec, hidden_size, wire::frame_bytes_max(&cx.cloud));
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
        sink.send(to, Kind::Rows, self.wire_id, priority, body).ok()?;
        if let Some(ids) = out.note_sent(&head).filter(|_| alone) {
            let timed = Timed { at: now, first_id: ids.start, rows: ids.len() };
            self.timed.get_or_insert(timed);
        }
        Some((u32::from(head.count), (HEADER_BYTES + bytes) as u64))
    }
}
