//! The first frame of an accepted socket, before it is known which connection it belongs to.

use std::time::{Duration, Instant};

use super::{Expired, HELLO_BYTES_MAX, ProtocolError};
use crate::frame::{Deframed, Deframer, Kind, RawFrame};
use crate::message::Hello;
use crate::pool::{Buf, Pool};

/// Waits for one HELLO. An unknown peer costs a buffer or two and a deadline, and nothing else.
#[derive(Debug)]
pub struct Handshake {
    deframer: Deframer,
    deadline: Instant,
    hello_within: Duration,
    hello: Option<(RawFrame, Hello)>,
}

impl Handshake {
    /// A socket was accepted.
    #[must_use]
    pub fn new(now: Instant, hello_within: Duration, pool: Pool) -> Self {
        let deadline = now + hello_within;
        let mut deframer = Deframer::new(pool);
        deframer.limit(HELLO_BYTES_MAX);
        Self { deframer, deadline, hello_within, hello: None }
    }

    /// As [`super::Connection::receive_room`].
    pub fn receive_room(&mut self) -> Option<Buf> {
        self.deframer.take_room()
    }

    /// The buffer of [`Handshake::receive_room`] comes back. Gives the HELLO when it is there.
    ///
    /// # Errors
    /// If the peer speaks something else.
    pub fn handle_received(&mut self, buf: Buf) -> Result<Option<Hello>, ProtocolError> {
        self.deframer.put_room(buf);
        let Deframed::Frame(frame) = self.deframer.next_frame()? else {
            return Ok(None);
        };
        if frame.header.kind != Kind::Hello as u8 {
            return Err(ProtocolError::NoHello { kind: frame.header.kind });
        }
        let message = |error| ProtocolError::Message { kind: Kind::Hello, error };
        let hello = Hello::decode(&frame.body).map_err(message)?;
        self.hello = Some((frame, hello));
        Ok(Some(hello))
    }

    /// Time has passed.
    ///
    /// # Errors
    /// If HELLO is late.
    pub fn handle_timeout(&self, now: Instant) -> Result<(), Expired> {
        if now < self.deadline { Ok(()) } else { Err(Expired::Hello(self.hello_within)) }
    }

    /// Deadline of HELLO.
    #[must_use]
    pub fn poll_timeout(&self) -> Instant {
        self.deadline
    }

    pub(super) fn into_parts(self) -> (Option<RawFrame>, Deframer) {
        (self.hello.map(|(frame, _)| frame), self.deframer)
    }
}
