//! Errors that end a connection, and errors that break its link.

use std::time::Duration;

use crate::frame::{FrameError, Kind};
use crate::message::{CloseCode, MessageError, Role};

/// A peer's breach of the protocol. The connection ends with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A frame is damaged, or the bytes are no frames at all.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A HELLO, CLOSE, PING or PONG has a wrong body.
    #[error("{kind:?}: {error}")]
    Message {
        /// Kind of the frame.
        kind: Kind,
        /// Description of the fault.
        error: MessageError,
    },
    /// The first frame is no HELLO.
    #[error("the first frame is of kind {kind}, not HELLO")]
    NoHello {
        /// Its kind.
        kind: u8,
    },
    /// A second HELLO came on one socket.
    #[error("a second HELLO")]
    SecondHello,
    /// Both ends have the same role.
    #[error("both ends are a {role:?}")]
    Role {
        /// The role.
        role: Role,
    },
    /// No wire version is common to both.
    #[error("no common wire version: {ours:?} here, {theirs:?} there")]
    Version {
        /// Oldest and newest version spoken here.
        ours: (u16, u16),
        /// Oldest and newest version spoken there.
        theirs: (u16, u16),
    },
    /// A frame carries another wire version than was agreed on.
    #[error("a frame of wire version {got}, expected {expected}")]
    FrameVersion {
        /// Agreed on.
        expected: u8,
        /// Value in the header.
        got: u8,
    },
    /// The cloud answered for another link.
    #[error("HELLO names another link")]
    Link,
    /// The peer wants a replay from a frame that is not kept, or was never sent.
    #[error("the peer wants a replay from {recv_next}, kept are {oldest}..{next}")]
    Replay {
        /// Sequence number that it asked for.
        recv_next: u32,
        /// Oldest frame kept.
        oldest: u32,
        /// Next frame to be sent.
        next: u32,
    },
    /// An acknowledgement of a frame that was never sent.
    #[error("ack {ack}, but {next} was not sent yet")]
    AckAhead {
        /// Value in the header.
        ack: u32,
        /// Next frame to be sent.
        next: u32,
    },
    /// A frame is missing.
    #[error("frame {got} came, expected {expected}")]
    Gap {
        /// The next in sequence.
        expected: u32,
        /// Value in the header.
        got: u32,
    },
    /// The peer sent more bytes than its credit.
    #[error("frames up to byte {offset} came, credit ends at {credit}")]
    Credit {
        /// End of the frame in the stream.
        offset: u32,
        /// Credit that was granted.
        credit: u32,
    },
    /// A frame that only the other role sends.
    #[error("a {kind:?} frame in the wrong direction")]
    Direction {
        /// Its kind.
        kind: Kind,
    },
}

impl ProtocolError {
    /// The code to close with.
    #[must_use]
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Version { .. } => CloseCode::Version,
            _ => CloseCode::Protocol,
        }
    }
}

/// Reason that a link counts as broken though its socket is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Expired {
    /// HELLO did not come.
    #[error("no HELLO within {0:?}")]
    Hello(Duration),
    /// Nothing came at all.
    #[error("silent for {0:?}")]
    Silent(Duration),
}
