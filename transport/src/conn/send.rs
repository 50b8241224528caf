//! The sending half: queues, the late choice of the next frame, credit, frames kept for replay.

use std::collections::VecDeque;
use std::fmt;
use std::time::Instant;

use super::{Connection, Phase, ProtocolError, may_send, write_control};
use crate::frame::{HEADER_BYTES, Header, Kind, Priority, before};
use crate::message::{Hello, Message, Role};
use crate::pool::Buf;

/// Small frames are put together up to this size, so that one system call carries many; what
/// comes after is chosen later.
const BATCH_BYTES: usize = 16 << 10;
/// Frames that one batch has at most.
const BATCH_FRAMES: usize = 32;
/// Control frames that may stand in a full queue.
const CONTROL_RESERVE: usize = 64;
/// Divisor of the queue, in frames and in bytes, for the part that is not for prompts: a verify
/// finds
/// room there whatever is uploaded.
const VERIFY_RESERVE: usize = 8;

/// An error in sending a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Too much is queued or unacknowledged: try again after the peer has acknowledged some.
    #[error("the send queue is full")]
    Full,
    /// No HELLO was exchanged yet.
    #[error("the connection was never up")]
    NotUp,
    /// The peer takes only shorter frames.
    #[error("the peer takes shorter frames only")]
    TooLong,
    /// The connection is closed, or was never there.
    #[error("there is no such connection")]
    Gone,
    /// The buffer pool is empty: try again after the next poll.
    #[error("the buffer pool is empty")]
    NoBuffer,
}

/// A frame was not taken; its body comes back.
#[derive(thiserror::Error)]
#[error("{refusal}")]
pub struct SendError {
    /// The protocol error.
    pub refusal: Refusal,
    /// The body; `None` only if there was no buffer to begin with.
    pub body: Option<Buf>,
}

impl fmt::Debug for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SendError").field(&self.refusal).finish()
    }
}

/// A frame that has no sequence number yet.
#[derive(Debug)]
struct Queued {
    kind: Kind,
    priority: Priority,
    body_crc: u32,
    buf: Buf,
}

/// The queue of one session. Lanes of session 0 are free.
#[derive(Debug)]
struct SessionQueue {
    session: u32,
    frames: VecDeque<Queued>,
}

/// A frame that has a sequence number and waits for its acknowledgement.
#[derive(Debug)]
struct Sent {
    session: u32,
    /// `None` while the link has it.
    buf: Option<Buf>,
    /// Header and body.
    bytes: usize,
    /// `None` once it was sent again: its round trip says nothing.
    at: Option<Instant>,
}

#[derive(Debug, Default)]
pub(super) struct SendState {
    queues: Vec<SessionQueue>,
    /// Sessions whose first queued frame has this priority, in turn.
    ready: [VecDeque<u32>; Priority::ALL.len()],
    sent: VecDeque<Sent>,
    /// Sequence number of the first in `sent`.
    oldest: u32,
    /// Index in `sent` of the next frame to be replayed; its length if there is none.
    replay: usize,
    /// Bytes of sequenced frames sent, wrapping; replays not counted.
    offset: u32,
    /// The peer's credit.
    credit: u32,
    /// Longest frame that the peer takes; 0 before its HELLO.
    peer_frame_max: usize,
    /// Changes when everything is forgotten, so that buffers of before are known.
    generation: u32,
    queued_frames: usize,
    /// Bytes of frames that are queued or sent.
    held_bytes: usize,
    /// Bytes of frames that were acknowledged.
    acked_bytes: u64,
}

impl SendState {
    pub(super) fn is_drained(&self) -> bool {
        self.queued_frames == 0 && self.sent.is_empty()
    }

    pub(super) fn held(&self, session: u32) -> usize {
        let queue = self.queues.iter().find(|queue| queue.session == session);
        let sent = self.sent.iter().filter(|sent| sent.session == session);
        queue.map_or(0, |queue| queue.frames.len()) + sent.count()
    }

    /// Bytes that were acknowledged, and those that are queued or sent and were not.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.acked_bytes, self.held_bytes as u64)
    }

    fn next_seq(&self) -> u32 {
        self.oldest.wrapping_add(self.sent.len() as u32)
    }

    /// The peer states how far it takes bytes. Only news counts, and only forward.
    pub(super) fn grant(&mut self, credit: u32) {
        if before(self.credit, credit) {
            self.credit = credit;
        }
    }

    /// The peer has everything before `ack`. Gives the time at which the last frame of these was
    /// sent.
    pub(super) fn acknowledge(&mut self, ack: u32) -> Result<Option<Instant>, ProtocolError> {
        let mut sent_at = None;
        if before(self.next_seq(), ack) {
            return Err(ProtocolError::AckAhead { ack, next: self.next_seq() });
        }
        while before(self.oldest, ack) {
            let sent = self.sent.pop_front().expect("ack is not ahead of what was sent");
            sent_at = sent.at;
            self.held_bytes -= sent.bytes;
            self.acked_bytes += sent.bytes as u64;
            self.oldest = self.oldest.wrapping_add(1);
            self.replay = self.replay.saturating_sub(1);
        }
        Ok(sent_at)
    }

    /// True if the frame `seq` was acknowledged, so that it can't be sent again.
    pub(super) fn has_forgotten(&self, seq: u32) -> bool {
        before(seq, self.oldest)
    }

    /// The link goes on: frames from `recv_next` on are sent again, but `without` so many.
    pub(super) fn resume(&mut self, recv_next: u32, without: usize) -> Result<(), ProtocolError> {
        let (oldest, next) = (self.oldest, self.next_seq());
        if self.has_forgotten(recv_next) || before(next, recv_next) {
            return Err(ProtocolError::Replay { recv_next, oldest, next });
        }
        self.acknowledge(recv_next)?;
        self.replay = without.min(self.sent.len());
        Ok(())
    }

    /// Forgets everything: a new epoch.
    pub(super) fn reset(&mut self) {
        let generation = self.generation.wrapping_add(1);
        *self = Self { generation, ..Self::default() };
    }

    pub(super) fn set_peer(&mut self, hello: &Hello) {
        self.peer_frame_max = hello.frame_bytes_max as usize;
    }

    fn enqueue(&mut self, session: u32, queued: Queued) {
        self.queued_frames += 1;
        self.held_bytes += queued.buf.wire().len();
        let priority = queued.priority;
        let queue = self.queues.iter().position(|queue| queue.session == session);
        if let Some(queue) = queue {
            self.queues[queue].frames.push_back(queued);
            return;
        }
        let queue = self.queues.iter().position(|queue| queue.session == 0).unwrap_or_else(|| {
            self.queues.push(SessionQueue { session: 0, frames: VecDeque::new() });
            self.queues.len() - 1
        });
        self.queues[queue].session = session;
        self.queues[queue].frames.push_back(queued);
        self.ready[priority as usize].push_back(session);
    }

    /// Takes the next frame out of the queues if the peer's credit covers it: the most urgent
    /// first; sessions of equal urgency in turn; a session's own frames in order.
    fn choose(&mut self) -> Option<(u32, Queued)> {
        let urgency = self.ready.iter().position(|ready| !ready.is_empty())?;
        let session = *self.ready[urgency].front()?;
        let queue = self.queues.iter_mut().find(|queue| queue.session == session)?;
        let bytes = queue.frames.front()?.buf.wire().len();
        if before(self.credit, self.offset.wrapping_add(bytes as u32)) {
            return None;
        }
        self.ready[urgency].pop_front();
        let queued = queue.frames.pop_front()?;
        match queue.frames.front() {
            Some(next) => self.ready[next.priority as usize].push_back(session),
            None => queue.session = 0,
        }
        self.queued_frames -= 1;
        self.offset = self.offset.wrapping_add(bytes as u32);
        Some((session, queued))
    }
}

impl Connection {
    /// Queues a frame. It is chosen when the link can take it, the most urgent first; frames of
    /// one session never overtake each other. Frames may be queued while the link is down, once
    /// it has been up.
    ///
    /// # Errors
    /// If there is no room, or the peer takes no such frame. The body comes back.
    ///
    /// # Panics
    /// If this role does not send frames of `kind`, or `session` is 0.
    pub fn send(
        &mut self,
        kind: Kind,
        session: u32,
        priority: Priority,
        mut body: Buf,
    ) -> Result<(), SendError> {
        let role = self.config.hello.role;
        assert!(may_send(role, kind), "a {role:?} does not send {kind:?} frames");
        assert!(session != 0, "session 0 is the connection itself");
        let is_control = priority == Priority::Control;
        let (frames, bytes) = (self.send.queued_frames + self.send.sent.len(), body.wire().len());
        let reserve = if priority == Priority::Prompt { VERIFY_RESERVE } else { usize::MAX };
        let without = |max: usize| max - max / reserve;
        let frames_max = without(self.config.queue_frames_max);
        let frames_max = frames_max + usize::from(is_control) * CONTROL_RESERVE;
        let bytes_max = without(self.config.queue_bytes_max);
        let bytes_full = self.send.held_bytes + bytes > bytes_max && !is_control;
        let refusal = if self.send.peer_frame_max == 0 {
            Refusal::NotUp
        } else if bytes > self.send.peer_frame_max {
            Refusal::TooLong
        } else if frames >= frames_max || bytes_full {
            Refusal::Full
        } else {
            body.set_charge(None);
            let body_crc = crc32c::crc32c(&body);
            self.send.enqueue(session, Queued { kind, priority, body_crc, buf: body });
            return Ok(());
        };
        Err(SendError { refusal, body: Some(body) })
    }

    /// Drops the frames of `session` that have not been sent, and returns how many. A cancelled
    /// prompt needs no upload.
    pub fn discard(&mut self, session: u32) -> usize {
        let state = &mut self.send;
        let queue = state.queues.iter_mut().find(|queue| queue.session == session);
        let Some(queue) = queue.filter(|_| session != 0) else {
            return 0;
        };
        queue.session = 0;
        let count = queue.frames.len();
        state.queued_frames -= count;
        state.held_bytes -=
            queue.frames.drain(..).map(|queued| queued.buf.wire().len()).sum::<usize>();
        state.ready.iter_mut().for_each(|ready| ready.retain(|other| *other != session));
        count
    }

    /// Puts what goes on the wire next into `batch`, each buffer one frame or several, and says
    /// whether there is anything. The buffers come back through
    /// [`Connection::handle_transmitted`], sent or not; until then nothing else is to be sent.
    pub fn poll_transmit(&mut self, now: Instant, batch: &mut Vec<Buf>) -> bool {
        debug_assert!(batch.is_empty());
        match self.phase {
            Phase::Down | Phase::Closed => return false,
            // The device speaks first: what the cloud says depends on it.
            Phase::Handshake if self.config.hello.role == Role::Cloud => return false,
            Phase::Handshake | Phase::Up => {}
        }
        let mut control = self.control.buf.take();
        let mut bytes = control.as_mut().map_or(0, |buf| {
            buf.clear();
            self.write_unsequenced(now, buf);
            buf.wire().len()
        });
        let first = batch.len();
        if self.phase == Phase::Up && self.control.hello_sent {
            while batch.len() < BATCH_FRAMES
                && let Some(buf) = self.next_sequenced(now, bytes)
            {
                bytes += buf.wire().len();
                batch.push(buf);
            }
        }
        if let Some(mut buf) = control {
            if batch.len() == first && self.control.hello_sent && self.receive.ack_is_due(now) {
                let (ack, credit) = self.receive.state();
                self.traffic.sent_frames += 1;
                write_control(&mut buf, Kind::Ack, ack, credit, &[]);
            }
            if buf.wire().is_empty() {
                self.control.buf = Some(buf);
            } else {
                buf.set_tag(self.send.generation);
                batch.insert(first, buf);
            }
        }
        self.traffic.sent_bytes += batch.iter().map(|buf| buf.wire().len() as u64).sum::<u64>();
        self.control.transmitting = batch.len() > first;
        self.control.transmitting
    }

    /// The link gives the buffers of [`Connection::poll_transmit`] back, also those of a socket
    /// that is gone.
    pub fn handle_transmitted(&mut self, batch: &mut Vec<Buf>) {
        self.control.transmitting = false;
        for buf in batch.drain(..) {
            if Kind::from_wire(buf.wire()[4]).is_some_and(|kind| !kind.is_sequenced()) {
                self.control.buf = Some(buf);
            } else if buf.tag() == self.send.generation {
                let seq = u32::from_le_bytes(
                    buf.wire()[16..20].try_into().expect("a header is 32 bytes"),
                );
                let index = seq.wrapping_sub(self.send.oldest) as usize;
                // What was acknowledged meanwhile goes back to the pool.
                if let Some(sent) = self.send.sent.get_mut(index) {
                    sent.buf = Some(buf);
                }
            }
        }
    }

    /// HELLO, or PING and PONG.
    fn write_unsequenced(&mut self, now: Instant, buf: &mut Buf) {
        let mut write = |kind: Kind, body: &[u8], (ack, credit): (u32, u32)| {
            self.traffic.sent_frames += 1;
            write_control(buf, kind, ack, credit, body);
        };
        if !self.control.hello_sent {
            let mut body = [0; Hello::BYTES];
            let mut hello = self.config.hello;
            (hello.link.epoch, hello.link.recv_next) = (self.epoch.number, self.receive.next());
            Message::Hello(hello).encode(&mut body);
            write(Kind::Hello, &body, self.receive.state());
            self.control.hello_sent = true;
        }
        if self.phase != Phase::Up {
            return;
        }
        if let Some(body) = self.control.pong.take() {
            write(Kind::Pong, &body, self.receive.state());
        }
        if let Some(body) = self.timers.ping(now) {
            write(Kind::Ping, &body, self.receive.state());
        }
    }

    /// The next sequenced frame for a batch that has `batch_bytes` already, header written.
    fn next_sequenced(&mut self, now: Instant, batch_bytes: usize) -> Option<Buf> {
        let state = &mut self.send;
        let fits = |bytes: usize| batch_bytes == 0 || batch_bytes + bytes <= BATCH_BYTES;
        if let Some(sent) = state.sent.get_mut(state.replay) {
            if !fits(sent.bytes) {
                return None;
            }
            let mut buf = sent.buf.take()?;
            sent.at = None;
            state.replay += 1;
            let header = buf.raw().first_chunk().and_then(|bytes| Header::decode(bytes).ok());
            let header = header.expect("a frame that was sent has a header");
            let (ack, credit) = self.receive.state();
            buf.write_header(&Header { ack, credit, ..header }.encode());
            self.traffic.sent_frames += 1;
            self.traffic.replayed_frames += 1;
            return Some(buf);
        }
        if batch_bytes > 0 && !fits(state.head_bytes()?) {
            return None;
        }
        let seq = state.next_seq();
        let (session, Queued { kind, priority, body_crc, mut buf }) = state.choose()?;
        let (ack, credit) = self.receive.state();
        let header = Header {
            len: (buf.wire().len() - HEADER_BYTES) as u32,
            kind: kind as u8,
            flags: 0,
            priority,
            version: self.version,
            session,
            body_crc,
            seq,
            ack,
            credit,
        };
        buf.write_header(&header.encode());
        buf.set_tag(state.generation);
        let sent = Sent { session, buf: None, bytes: buf.wire().len(), at: Some(now) };
        state.sent.push_back(sent);
        state.replay = state.sent.len();
        self.traffic.sent_frames += 1;
        Some(buf)
    }
}

impl SendState {
    /// Bytes of the frame that [`SendState::choose`] would look at.
    fn head_bytes(&self) -> Option<usize> {
        let session = *self.ready.iter().find_map(|ready| ready.front())?;
        let queue = self.queues.iter().find(|queue| queue.session == session)?;
        queue.frames.front().map(|queued| queued.buf.wire().len())
    }
}

#[cfg(test)]
impl SendState {
    /// As if frames before `seq`, of `offset` bytes, had been sent and acknowledged.
    pub(super) fn start_at(&mut self, seq: u32, offset: u32) {
        let window = self.credit.wrapping_sub(self.offset);
        (self.oldest, self.offset) = (seq, offset);
        self.credit = offset.wrapping_add(window);
    }
}
