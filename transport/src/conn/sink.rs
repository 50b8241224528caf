//! [`FrameSink`]: where a role writes its frames, whatever carries them.

use std::fmt;

use super::{Refusal, SendError};
use crate::frame::{Kind, Priority};
use crate::message::Message;
use crate::pool::Buf;

/// Number of a connection, chosen by whoever holds the connections and never used twice there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Takes frames for connections; their bodies are written in place, into buffers of its pool.
///
/// [`crate::endpoint::Endpoint`] is the sink of a process. A simulator or a test has its own, so
/// that a role that writes through this trait needs no link.
pub trait FrameSink {
    /// A buffer with room for the header and `body_bytes` of body of a frame of this priority.
    /// `None` while the pool keeps the rest in reserve, for receiving: try again after the next
    /// poll of the link. Prompts leave buffers to more urgent frames; control messages may use the
    /// reserve, since they are few and free memory at the peer.
    #[must_use]
    fn buffer(&mut self, priority: Priority, body_bytes: usize) -> Option<Buf>;

    /// Queues a frame; frames of one session never overtake each other.
    ///
    /// # Errors
    /// If it can't be taken now, or ever. The body comes back.
    ///
    /// # Panics
    /// If this role does not send frames of `kind`, or `session` is 0.
    fn send(
        &mut self,
        to: ConnectionId,
        kind: Kind,
        session: u32,
        priority: Priority,
        body: Buf,
    ) -> Result<(), SendError>;

    /// Queues a small message at control priority.
    ///
    /// # Errors
    /// As [`FrameSink::send`], or if the pool is empty.
    ///
    /// # Panics
    /// As [`FrameSink::send`], or if the message exceeds a frame.
    fn send_message(
        &mut self,
        to: ConnectionId,
        session: u32,
        message: &Message<'_>,
    ) -> Result<(), SendError> {
        let Some(mut body) = self.buffer(Priority::Control, message.encoded_len()) else {
            return Err(SendError { refusal: Refusal::NoBuffer, body: None });
        };
        message.encode(body.body_mut());
        self.send(to, message.kind(), session, Priority::Control, body)
    }

    /// Drops the frames of a session that has ended and of which nothing was sent yet, and says
    /// how many.
    fn discard(&mut self, to: ConnectionId, session: u32) -> usize;
}
