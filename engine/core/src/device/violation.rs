//! Violations of the protocol by a cloud: values, each of which ends the request that it befalls.

use std::time::Duration;

use hat_transport::frame::Kind;
use hat_transport::message::{MessageError, SessionErrorCode};

use hat_transport::codec::CodecError;

use crate::error::PeerEvent;

/// Reason that a request can't go on with its cloud.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CloudViolation {
    /// An output, or the news of one, for a row that never left.
    #[error("row {row}, which was not sent")]
    NotSent { row: u32 },
    /// A second output for one row.
    #[error("row {row} for the second time")]
    Twice { row: u32 },
    /// Decided rows come back in order.
    #[error("row {row} comes out of turn, not row {expected}")]
    OutOfTurn { row: u32, expected: u32 },
    /// DROPPED for a row that never left.
    #[error("it dropped row {row}, which was not sent")]
    DroppedUnsent { row: u32 },
    /// DROPPED for a row that decides a token.
    #[error("it dropped row {row}, which is waited for")]
    DroppedAwaited { row: u32 },
    /// OPENED with more pages than OPEN named.
    #[error("it holds {cached} pages of the {named} that were named")]
    PagesBeyond { cached: usize, named: usize },
    /// An output whose payload is no whole number of rows.
    #[error("{bytes} bytes for {rows} rows")]
    Payload { bytes: usize, rows: usize },
    /// A row that is no number.
    #[error(transparent)]
    Value(#[from] CodecError),
    /// A body that can't be read.
    #[error("a {kind:?} frame is malformed: {error}")]
    Malformed { kind: Kind, error: MessageError },
    /// A frame of a session that has not been opened.
    #[error("it sent {kind:?} before it opened the session")]
    BeforeOpened { kind: Kind },
    /// An answer to OPEN for a session that is open.
    #[error("it sent {kind:?} for a session that is open")]
    AfterOpened { kind: Kind },
    /// A message that only devices send.
    #[error("it sent {kind:?}, which a cloud does not")]
    Unexpected { kind: Kind },
    /// SESSION_ERROR that no replay mends.
    #[error("it ended the session: {code:?}: {text}")]
    Ended { code: SessionErrorCode, text: String },
    /// Sessions that are lost again and again.
    #[error("it forgot the session {times} times before the next token")]
    Forgets { times: u32 },
    /// Nothing new while an answer is due.
    #[error("it is connected, but has said nothing new for {:.0} s", waited.as_secs_f32())]
    Silent { waited: Duration },
}

impl CloudViolation {
    /// Kind of the event, for programs.
    pub(super) fn event(&self) -> PeerEvent {
        match self {
            Self::Silent { .. } => PeerEvent::Silent,
            Self::Forgets { .. }
            | Self::Ended {
                code:
                    SessionErrorCode::Evicted
                    | SessionErrorCode::NoSuchSession
                    | SessionErrorCode::Resource,
                ..
            } => PeerEvent::Loses,
            _ => PeerEvent::Violates,
        }
    }
}
