//! The receiving half: sequence numbers, duplicates, credit that is given, acknowledgements owed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::{Connection, ConnectionEvent, Frame, ProtocolError, may_send};
use crate::frame::{HEADER_BYTES, Header, Kind, before};
use crate::message::Role;
use crate::planted::Fault;
use crate::pool::{Buf, Charge};

/// Frames after which an acknowledgement waits no longer.
const ACK_FRAMES: u32 = 16;

#[derive(Debug)]
pub(super) struct ReceiveState {
    window_bytes: u32,
    /// The `seq` expected next.
    next: u32,
    /// Bytes of sequenced frames that came, wrapping.
    offset: u32,
    /// Bytes, of those, whose buffers were dropped since; wrapping.
    released: Arc<AtomicU32>,
    /// The credit in the last header that went out.
    granted: u32,
    /// Frames that came since `ack` last went out.
    unacked_frames: u32,
    ack_at: Option<Instant>,
}

impl ReceiveState {
    pub(super) fn new(window_bytes: u32) -> Self {
        Self {
            window_bytes,
            next: 0,
            offset: 0,
            released: Arc::new(AtomicU32::new(0)),
            granted: window_bytes,
            unacked_frames: 0,
            ack_at: None,
        }
    }

    pub(super) fn next(&self) -> u32 {
        self.next
    }

    /// The credit to state now.
    pub(super) fn credit(&self) -> u32 {
        self.released.load(Ordering::Acquire).wrapping_add(self.window_bytes)
    }

    /// The header fields `ack` and `credit` are about to go out.
    pub(super) fn state(&mut self) -> (u32, u32) {
        self.granted = self.credit();
        self.unacked_frames = 0;
        self.ack_at = None;
        (self.next, self.granted)
    }

    /// Asks for an acknowledgement at the next opportunity.
    pub(super) fn want_ack(&mut self, now: Instant) {
        self.ack_at = Some(now);
    }

    /// Time at which an acknowledgement is to go out alone, if no frame carries it before.
    pub(super) fn ack_at(&self) -> Option<Instant> {
        self.ack_at
    }

    /// True if an acknowledgement, or news about the credit, is to go out by itself.
    pub(super) fn ack_is_due(&self, now: Instant) -> bool {
        let news = self.credit().wrapping_sub(self.granted);
        news >= self.window_bytes / 4 || self.ack_at.is_some_and(|ack_at| ack_at <= now)
    }

    /// The frame `seq` of `bytes` came: whether it is new.
    fn accept(
        &mut self,
        now: Instant,
        seq: u32,
        bytes: u32,
        ack_delay: Duration,
    ) -> Result<bool, ProtocolError> {
        if before(seq, self.next) {
            // The peer has not heard of it: tell it again, soon.
            self.want_ack(now);
            return Ok(false);
        }
        if seq != self.next {
            return Err(ProtocolError::Gap { expected: self.next, got: seq });
        }
        let offset = self.offset.wrapping_add(bytes);
        if before(self.granted, offset) {
            return Err(ProtocolError::Credit { offset, credit: self.granted });
        }
        (self.offset, self.next) = (offset, self.next.wrapping_add(1));
        self.unacked_frames += 1;
        if self.unacked_frames >= ACK_FRAMES {
            self.want_ack(now);
        }
        self.ack_at.get_or_insert(now + ack_delay);
        Ok(true)
    }

    fn charge(&self, bytes: u32) -> Charge {
        Charge { released: Arc::clone(&self.released), bytes }
    }
}

impl Connection {
    pub(super) fn handle_sequenced(
        &mut self,
        now: Instant,
        header: &Header,
        kind: Option<Kind>,
        mut body: Buf,
    ) -> Result<(), ProtocolError> {
        let peer = match self.config.hello.role {
            Role::Device => Role::Cloud,
            Role::Cloud => Role::Device,
        };
        if let Some(kind) = kind
            && !may_send(peer, kind)
        {
            return Err(ProtocolError::Direction { kind });
        }
        let bytes = HEADER_BYTES as u32 + header.len;
        if !self.receive.accept(now, header.seq, bytes, self.config.ack_delay)? {
            self.traffic.duplicate_frames += 1;
            return Ok(());
        }
        let has_charge = !self.config.planted.is(Fault::KeptCredit);
        body.set_charge(has_charge.then(|| self.receive.charge(bytes)));
        // An ignorable frame of an unknown kind is counted, and its buffer dropped here.
        if let Some(kind) = kind {
            let Header { session, priority, .. } = *header;
            let frame = Frame { kind, session, priority, body };
            self.events.push_back(ConnectionEvent::Frame(frame));
        }
        Ok(())
    }
}

#[cfg(test)]
impl ReceiveState {
    /// As if frames before `seq`, of `offset` bytes, had come and been released.
    pub(super) fn start_at(&mut self, seq: u32, offset: u32) {
        (self.next, self.offset) = (seq, offset);
        self.released.store(offset, Ordering::Release);
        self.granted = self.credit();
    }
}
