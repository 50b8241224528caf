//! Events of an endpoint.

use std::net::SocketAddr;

use crate::conn::{ConnectionId, Frame, ProtocolError};
use crate::log::Untrusted;
use crate::message::{CloseCode, Hello};

/// Event of an endpoint.
#[derive(Debug)]
pub enum Event {
    /// Frames flow. If `resumed` is false, everything queued or unacknowledged before is gone,
    /// and all sessions of the connection are: the device opens them again and replays, the cloud
    /// frees them.
    Up {
        /// The connection.
        connection: ConnectionId,
        /// The peer's HELLO.
        hello: Hello,
        /// True if everything goes on where it was.
        resumed: bool,
    },
    /// A frame came, exactly once and in order.
    Frame {
        /// Over which connection.
        connection: ConnectionId,
        /// The frame. Drop its body soon: the peer's credit comes back with it.
        frame: Frame,
    },
    /// The link broke, or could not be made. It is tried again (device) or waited for (cloud).
    Down {
        /// The connection.
        connection: ConnectionId,
        /// Description of the event, for people.
        reason: String,
    },
    /// The connection is over, and its id means nothing any more.
    Gone {
        /// The connection.
        connection: ConnectionId,
        /// Reason.
        error: GoneError,
    },
    /// A socket was closed before it became a connection.
    Refused {
        /// Address of the peer.
        address: SocketAddr,
        /// Reason.
        error: GoneError,
    },
    /// [`crate::link::Waker::wake`] was called.
    Woken,
}

impl Event {
    /// The connection that it is about, if it is about one.
    #[must_use]
    pub fn connection(&self) -> Option<ConnectionId> {
        match self {
            Self::Up { connection, .. }
            | Self::Frame { connection, .. }
            | Self::Down { connection, .. }
            | Self::Gone { connection, .. } => Some(*connection),
            Self::Refused { .. } | Self::Woken => None,
        }
    }
}

/// Reason that a connection is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GoneError {
    /// [`super::Endpoint::close`] was called.
    #[error("closed here")]
    Closed,
    /// The peer has closed it.
    #[error("{address} closed the connection ({code:?}): {}", Untrusted(reason))]
    ClosedByPeer {
        /// The peer.
        address: SocketAddr,
        /// Reason, for programs.
        code: CloseCode,
        /// Reason in the peer's words: show it as [`Untrusted`] text.
        reason: String,
    },
    /// The first bytes were no frame.
    #[error("{address} is not speaking hat: {error}")]
    NotHat {
        /// The peer.
        address: SocketAddr,
        /// The peer's breach of the protocol.
        error: ProtocolError,
    },
    /// The peer broke the protocol.
    #[error("{address} broke the protocol: {error}")]
    Protocol {
        /// The peer.
        address: SocketAddr,
        /// The peer's breach of the protocol.
        error: ProtocolError,
    },
    /// The device did not come back in time, or before its place was needed for another.
    #[error("the device did not come back in time")]
    GraceOver,
    /// HELLO did not come in time.
    #[error("{address} said nothing in time")]
    HelloLate {
        /// The peer.
        address: SocketAddr,
    },
    /// HELLO came after its device had been here over another socket: it was long on its way.
    #[error("{address} comes late: its device has been here over another socket since")]
    Overtaken {
        /// The peer.
        address: SocketAddr,
    },
    /// There is no room for one more.
    #[error("no room for {address}: {limit} connections are open")]
    Overload {
        /// The peer.
        address: SocketAddr,
        /// The limit that was reached.
        limit: usize,
    },
    /// A connection needs a buffer of its own, and none is free.
    #[error("no room for {address}: all buffers are in use")]
    NoBuffer {
        /// The peer.
        address: SocketAddr,
    },
}

impl GoneError {
    /// True if another try would end the same way; see [`CloseCode::is_final`].
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::ClosedByPeer { code, .. } => code.is_final(),
            Self::NotHat { .. } | Self::Protocol { .. } => true,
            Self::Closed
            | Self::GraceOver
            | Self::HelloLate { .. }
            | Self::Overtaken { .. }
            | Self::Overload { .. }
            | Self::NoBuffer { .. } => false,
        }
    }
}
