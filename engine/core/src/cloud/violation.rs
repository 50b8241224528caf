//! Reasons that a session ends before its device ends it, and the error that the device is sent.

use std::time::Duration;

use hat_plan::BackendFault;
use hat_transport::frame::Kind;
use hat_transport::message::{MessageError, SessionErrorCode as Code};

use crate::sequence::SequenceError;
use hat_transport::codec::CodecError;

/// A frame that breaks the rules of its session. The session ends with it, the connection lives on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(super) enum SessionViolation {
    /// A frame of a session that is not open.
    #[error("there is no session {session} on this connection")]
    NoSession { session: u32 },
    /// OPEN of a session that is open, or of session 0.
    #[error("session id {session} is taken")]
    Taken { session: u32 },
    /// OPEN asks for layers that are not here.
    #[error("{reason}")]
    Layers { reason: String },
    /// OPEN names a row codec that this build does not know.
    #[error("row codec {id} is not offered")]
    Codec { id: u8 },
    /// No row of the codec fits a frame that the device takes.
    #[error("{reason}")]
    RowTooLong { reason: String },
    /// OPEN asks for another arithmetic, or another type of keys and values.
    #[error(
        "arithmetic {asked} and KV type {kv_type} were asked for, {here} and {kv_type_here} run \
         here"
    )]
    Arithmetic { asked: u32, kv_type: u8, here: u32, kv_type_here: u8 },
    /// OPEN asks for no position, or for more than a session may have.
    #[error("{asked} positions asked for, the context is {max}")]
    Context { asked: u32, max: u32 },
    /// OPEN names more pages than a prompt can fill: its last row is always computed.
    #[error(
        "{named} full pages of a prompt are named, {rows_max} positions have at most {named_max}"
    )]
    Names { named: usize, rows_max: u32, named_max: usize },
    /// The payload of ROWS is not as long as its rows.
    #[error("{rows} rows of {hidden_size} as {codec} are {expected} bytes, but {got} came")]
    Payload { rows: u16, hidden_size: usize, codec: &'static str, expected: usize, got: usize },
    /// Row ids end where numbers do.
    #[error("row ids end below {}, but {first_id} came", u32::MAX)]
    LastId { first_id: u32 },
    /// A chunk that fits no step.
    #[error("a chunk of {rows} rows exceeds the row budget of {rows_max}")]
    Budget { rows: u32, rows_max: u32 },
    /// A device has too many frames in chunks whose end has not come.
    #[error("chunks that do not end have more than {frames_max} frames")]
    Begun { frames_max: usize },
    /// Ids, parents or a commit that the session's rows do not allow.
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    /// A row holds a number that is not finite.
    #[error(transparent)]
    Value(CodecError),
    /// A body that is no message of its kind.
    #[error(transparent)]
    Malformed(#[from] MessageError),
    /// A frame of a kind that a device does not send.
    #[error("a device does not send {kind:?}")]
    Unexpected { kind: Kind },
}

impl SessionViolation {
    /// The code on the wire. The text on the wire is the violation's own.
    pub(super) fn code(&self) -> Code {
        match self {
            Self::NoSession { .. } | Self::Taken { .. } => Code::NoSuchSession,
            Self::Layers { .. } => Code::Layers,
            Self::Codec { .. } | Self::RowTooLong { .. } => Code::Codec,
            Self::Arithmetic { .. } => Code::Arithmetic,
            Self::Sequence(SequenceError::BadParent { .. }) => Code::BadParent,
            Self::Sequence(SequenceError::BadCommit { .. }) => Code::BadCommit,
            Self::Value(_) => Code::BadValue,
            Self::Context { .. }
            | Self::Names { .. }
            | Self::Payload { .. }
            | Self::LastId { .. }
            | Self::Budget { .. }
            | Self::Begun { .. }
            | Self::Sequence(_)
            | Self::Malformed(_)
            | Self::Unexpected { .. } => Code::BadShape,
        }
    }
}

/// Reason that the cloud ends a session.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(super) enum SessionEnd {
    /// Its device broke the rules.
    #[error(transparent)]
    Violation(#[from] SessionViolation),
    /// Another session needs its pages or its place.
    #[error("idle for {:.1} s, and others need its memory", silent.as_secs_f32())]
    Evicted { silent: Duration },
    /// The model's rows hold numbers that cannot be sent.
    #[error("the model's output cannot be sent: {0}")]
    Output(CodecError),
    /// An output is longer than any frame that the device takes.
    #[error("an output exceeds the frames that you take")]
    TooLong,
    /// A step was not computed.
    #[error(transparent)]
    Fault(BackendFault),
}

impl SessionEnd {
    /// The code on the wire.
    pub(super) fn code(&self) -> Code {
        match self {
            Self::Violation(violation) => violation.code(),
            Self::Evicted { .. } => Code::Evicted,
            Self::Output(_) | Self::TooLong => Code::Internal,
            Self::Fault(_) => Code::Resource,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Case = (SessionViolation, Code, &'static str);

    fn of_open() -> Vec<Case> {
        let layers = "layers 0..9 are wanted, the cloud holds 1..4";
        vec![
            (
                SessionViolation::NoSession { session: 7 },
                Code::NoSuchSession,
                "there is no session 7 on this connection",
            ),
            (SessionViolation::Taken { session: 7 }, Code::NoSuchSession, "session id 7 is taken"),
            (SessionViolation::Layers { reason: layers.to_owned() }, Code::Layers, layers),
            (SessionViolation::Codec { id: 9 }, Code::Codec, "row codec 9 is not offered"),
            (
                SessionViolation::RowTooLong { reason: "too short".to_owned() },
                Code::Codec,
                "too short",
            ),
            (
                SessionViolation::Arithmetic { asked: 7, kv_type: 2, here: 1, kv_type_here: 1 },
                Code::Arithmetic,
                "arithmetic 7 and KV type 2 were asked for, 1 and 1 run here",
            ),
            (
                SessionViolation::Context { asked: 9, max: 8 },
                Code::BadShape,
                "9 positions asked for, the context is 8",
            ),
            (
                SessionViolation::Names { named: 3, rows_max: 64, named_max: 1 },
                Code::BadShape,
                "3 full pages of a prompt are named, 64 positions have at most 1",
            ),
        ]
    }

    fn of_rows() -> Vec<Case> {
        vec![
            (
                SessionViolation::Payload {
                    rows: 2,
                    hidden_size: 64,
                    codec: "f32",
                    expected: 512,
                    got: 256,
                },
                Code::BadShape,
                "2 rows of 64 as f32 are 512 bytes, but 256 came",
            ),
            (
                SessionViolation::LastId { first_id: u32::MAX },
                Code::BadShape,
                "row ids end below 4294967295, but 4294967295 came",
            ),
            (
                SessionViolation::Budget { rows: 540, rows_max: 512 },
                Code::BadShape,
                "a chunk of 540 rows exceeds the row budget of 512",
            ),
            (
                SessionViolation::Begun { frames_max: 512 },
                Code::BadShape,
                "chunks that do not end have more than 512 frames",
            ),
            (
                SequenceError::BadParent { id: 5, parent: 4, tip: 0 }.into(),
                Code::BadParent,
                "row 5 has parent 4, which is neither the committed tip 0 nor pending",
            ),
            (
                SequenceError::BadCommit { row: 3, tip: 0 }.into(),
                Code::BadCommit,
                "commit of row 3, which is neither the committed tip 0 nor pending",
            ),
            (
                SequenceError::TooManyPending { pending: 65 }.into(),
                Code::BadShape,
                "65 rows would pend, at most 64 may",
            ),
            (
                SessionViolation::Value(NOT_FINITE),
                Code::BadValue,
                "row 1 holds a value that is not finite, at column 2",
            ),
            (
                MessageError::Trailing { bytes: 3 }.into(),
                Code::BadShape,
                "3 bytes after the last field",
            ),
            (
                SessionViolation::Unexpected { kind: Kind::Opened },
                Code::BadShape,
                "a device does not send Opened",
            ),
        ]
    }

    const NOT_FINITE: CodecError = CodecError::NotFinite { row: 1, column: 2 };

    /// Programs go by codes, people by texts; both are the protocol's.
    #[test]
    fn each_end_has_its_code_and_its_text() {
        for (violation, code, text) in of_open().into_iter().chain(of_rows()) {
            assert_eq!((violation.code(), violation.to_string().as_str()), (code, text));
            let end = SessionEnd::from(violation);
            assert_eq!((end.code(), end.to_string().as_str()), (code, text));
        }
        let fault = BackendFault { backend: "gpu", reason: "lost".to_owned(), lasts: true };
        for (end, code, text) in [
            (
                SessionEnd::Evicted { silent: Duration::from_millis(1250) },
                Code::Evicted,
                "idle for 1.2 s, and others need its memory",
            ),
            (
                SessionEnd::Output(NOT_FINITE),
                Code::Internal,
                "the model's output cannot be sent: row 1 holds a value that is not finite, at \
                 column 2",
            ),
            (SessionEnd::TooLong, Code::Internal, "an output exceeds the frames that you take"),
            (SessionEnd::Fault(fault), Code::Resource, "gpu: lost"),
        ] {
            assert_eq!((end.code(), end.to_string().as_str()), (code, text));
        }
    }
}
