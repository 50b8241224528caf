//! Rows on their way into the link.

use std::ops::Bound;
use std::time::Instant;

use hat_transport::frame::{HEADER_BYTES, Kind, Priority};
use hat_transport::turn::{ConnectionId, Endpoint};

use super::common::Common;
use super::request::Request;
use super::run::Device;
use super::session::Timed;
use crate::wire;

impl Device {
    /// Sends what may leave, as far as there are buffers and credit: first what somebody waits for,
    /// then prompts, of which another one is the first each time.
    pub(super) fn send_released(&mut self) {
        let Some(connection) = self.link.connection.filter(|_| self.link.connected) else { return };
        let now = self.now();
        let Self { endpoint, requests, cx, .. } = self;
        for request in requests.values_mut().filter(|request| request.is_urgent()) {
            request.send_frames(now, endpoint, connection, cx);
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
                let goes_on =
                    request.is_urgent() || request.send_frames(now, endpoint, connection, cx);
                if !goes_on {
                    return;
                }
            }
        }
    }
}

impl Request {
    /// Sends what may leave; says whether all of it could.
    fn send_frames(
        &mut self,
        now: Instant,
        endpoint: &mut Endpoint,
        connection: ConnectionId,
        cx: &Common,
    ) -> bool {
        while self.session.open().is_some_and(|open| open.outgoing.has_released()) {
            if self.send_frame(now, endpoint, connection, cx).is_none() {
                return false;
            }
        }
        true
    }

    /// Sends one frame of what may leave; `None` if it could not.
    fn send_frame(
        &mut self,
        now: Instant,
        endpoint: &mut Endpoint,
        connection: ConnectionId,
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
        let mut body = endpoint.buffer_for(priority, bytes)?;
        let start = head.encode(parents, body.body_mut());
        let hidden = &out.hidden[out.sent * hidden_size..][..rows * hidden_size];
        codec
            .pack(hidden, hidden_size, &mut body.body_mut()[start..])
            .expect("rows are checked when they are computed");
        endpoint.send(connection, Kind::Rows, open.wire_id, priority, body).ok()?;
        // A chunk of a longer prompt waits for those before it as well.
        let alone = in_answer || computed - open.held == open.chunk.rows;
        if let Some(ids) = out.note_sent(&head).filter(|_| alone) {
            let timed = Timed { at: now, first_id: ids.start, rows: ids.len() };
            open.timed.get_or_insert(timed);
        }
        self.meter.rows_sent(u32::from(head.count));
        self.meter.counts.bytes_up += (HEADER_BYTES + bytes) as u64;
        Some(())
    }
}
