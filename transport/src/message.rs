//! Bodies of frames. Byte tables are in `docs/PROTOCOL.md`.
//!
//! Numbers are little-endian. A body is read through a bounds-checked reader; each way of being
//! wrong has its own [`MessageError`], and bytes that nobody asked for are refused (HELLO alone
//! may be longer, since later versions append to it).

mod hello;
mod rows;
mod wire;

use crate::frame::Kind;
use wire::{Reader, Writer};

pub use hello::{Close, CloseCode, HELLO_MAGIC, Hello, KvPages, LinkState, Role};
pub use rows::{Arrivals, Ids, Output, OutputHead, Rows, RowsHead, Want};

/// Type of stored keys and values: IEEE binary16.
pub const KV_F16: u8 = 1;
/// Bytes of a [`PageId`].
pub const PAGE_ID_BYTES: usize = 16;
/// Most page ids in one OPEN or END.
pub const PAGE_IDS_MAX: usize = 4095;
/// Longest text in a CLOSE or SESSION_ERROR.
pub const TEXT_BYTES_MAX: usize = 512;

/// Name of a page of keys and values: the same name stands for the same rows. Only the device
/// knows how it is made, and only who knows it can have the page.
pub type PageId = [u8; PAGE_ID_BYTES];

/// An error in a frame's body.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// The body ends before the field does.
    #[error("{field} needs {needed} bytes, {left} are left")]
    Short {
        /// The field.
        field: &'static str,
        /// Its size.
        needed: usize,
        /// Bytes left in the body.
        left: usize,
    },
    /// The body goes on after its last field.
    #[error("{bytes} bytes after the last field")]
    Trailing {
        /// Number of bytes.
        bytes: usize,
    },
    /// A field has a value that it can't have.
    #[error("{field} is {got}, expected {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// Description of valid values.
        expected: &'static str,
        /// Value found.
        got: u64,
    },
    /// The payload is no whole number of rows.
    #[error("a payload of {bytes} bytes does not hold {rows} rows")]
    Payload {
        /// The payload's size.
        bytes: usize,
        /// The rows that it should hold.
        rows: usize,
    },
    /// Text is not UTF-8.
    #[error("{field} is not UTF-8")]
    Text {
        /// The field.
        field: &'static str,
    },
    /// Frames of this kind carry no message.
    #[error("frames of kind {kind:?} carry no message")]
    Kind {
        /// The kind.
        kind: Kind,
    },
}

/// A device opens a session. Its id is in the frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open<'a> {
    /// First layer that the cloud computes.
    pub entry_layer: u16,
    /// The layer after the last one that the cloud computes.
    pub exit_layer: u16,
    /// Codec of the rows, for the session's life.
    pub codec: u8,
    /// Number format of keys and values.
    pub kv_type: u8,
    /// Arithmetic that the session's rows are computed in.
    pub arithmetic_id: u32,
    /// Positions to reserve.
    pub rows_max: u32,
    /// Full pages of the prompt, from its first row on; at most [`PAGE_IDS_MAX`].
    pub pages: &'a [PageId],
}

/// The cloud has opened a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Number of leading pages of [`Open::pages`] that are there already: their rows are committed,
    /// and the ids from 1 on to the last of them are taken.
    pub pages: u16,
}

/// The device is done with a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct End<'a> {
    /// First keep the path to this row and prune the rest; 0 for nothing.
    pub commit: u32,
    /// Full pages of the committed path, from its first row on; at most [`PAGE_IDS_MAX`]. The
    /// cloud may keep them for sessions to come.
    pub pages: &'a [PageId],
}

/// The device keeps the path from the root to `row` and prunes everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Id of the last row of the path.
    pub row: u32,
}

/// Rows that will not be computed, since an ancestor was pruned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Id of the first.
    pub first_id: u32,
    /// Number of consecutive ids; at least 1.
    pub count: u16,
}

/// Rows of which none was to come back have been computed, and what their step took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Computed {
    /// Id of the first.
    pub first_id: u32,
    /// Number of consecutive ids; at least 1.
    pub count: u16,
    /// Microseconds that they waited for their step.
    pub queue_us: u32,
    /// Microseconds that the step took.
    pub step_us: u32,
    /// Rows in the step, other sessions' included.
    pub step_rows: u32,
    /// Arrival rate of the device's frames.
    pub arrivals: Arrivals,
}

/// Reason that a session failed. The numbers are the wire's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[non_exhaustive]
pub enum SessionErrorCode {
    /// The session is not, or no longer, known: open it again and replay.
    NoSuchSession = 1,
    /// Row bytes, counts or limits do not fit the session.
    BadShape = 2,
    /// A row holds a number that is not finite.
    BadValue = 3,
    /// A parent id names no row that is computed or pending.
    BadParent = 4,
    /// A commit names no row that is computed.
    BadCommit = 5,
    /// The session's memory was needed elsewhere: open it again and replay.
    Evicted = 6,
    /// The cloud does not hold the layers asked for.
    Layers = 7,
    /// The cloud does not offer the codec or KV type asked for.
    Codec = 8,
    /// The cloud computes in another arithmetic.
    Arithmetic = 9,
    /// A resource ran out or failed.
    Resource = 10,
    /// A fault of the cloud's own.
    Internal = 11,
}

impl SessionErrorCode {
    /// All codes, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::NoSuchSession,
        Self::BadShape,
        Self::BadValue,
        Self::BadParent,
        Self::BadCommit,
        Self::Evicted,
        Self::Layers,
        Self::Codec,
        Self::Arithmetic,
        Self::Resource,
        Self::Internal,
    ];

    fn from_wire(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|code| *code as u16 == number)
    }
}

/// A session failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionError<'a> {
    /// Reason, for programs.
    pub code: SessionErrorCode,
    /// Reason, for people. Longer text is cut at [`TEXT_BYTES_MAX`].
    pub text: &'a str,
}

/// The cloud has no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy {
    /// Time after which to try again.
    pub retry_after_ms: u32,
}

/// Any message, borrowed from the body that it was read from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Message<'a> {
    /// HELLO.
    Hello(Hello),
    /// CLOSE.
    Close(Close<'a>),
    /// OPEN.
    Open(Open<'a>),
    /// OPENED.
    Opened(Opened),
    /// ROWS.
    Rows(Rows<'a>),
    /// OUTPUT.
    Output(Output<'a>),
    /// COMMIT.
    Commit(Commit),
    /// CANCEL.
    Cancel,
    /// CANCELLED.
    Cancelled,
    /// END.
    End(End<'a>),
    /// ENDED.
    Ended,
    /// DROPPED.
    Dropped(Dropped),
    /// SESSION_ERROR.
    SessionError(SessionError<'a>),
    /// BUSY.
    Busy(Busy),
    /// COMPUTED.
    Computed(Computed),
}

impl<'a> Message<'a> {
    /// Reads the body of a frame of `kind`.
    ///
    /// # Errors
    /// One variant for each way of being wrong.
    pub fn decode(kind: Kind, body: &'a [u8]) -> Result<Self, MessageError> {
        let mut from = Reader::new(body);
        let message = match kind {
            Kind::Hello => return Hello::decode(body).map(Self::Hello),
            Kind::Close => Self::Close(Close::read(&mut from)?),
            Kind::Open => Self::Open(Open::read(&mut from)?),
            Kind::Opened => Self::Opened(Opened { pages: from.u16("pages")? }),
            Kind::Rows => Self::Rows(Rows::read(&mut from)?),
            Kind::Output => Self::Output(Output::read(&mut from)?),
            Kind::Commit => Self::Commit(Commit { row: from.id("row")? }),
            Kind::Cancel => Self::Cancel,
            Kind::Cancelled => Self::Cancelled,
            Kind::End => Self::End(End::read(&mut from)?),
            Kind::Ended => Self::Ended,
            Kind::Dropped => Self::Dropped(Dropped::read(&mut from)?),
            Kind::SessionError => Self::SessionError(SessionError::read(&mut from)?),
            Kind::Busy => Self::Busy(Busy { retry_after_ms: from.u32("retry_after_ms")? }),
            Kind::Computed => Self::Computed(Computed::read(&mut from)?),
            Kind::Ack | Kind::Ping | Kind::Pong => return Err(MessageError::Kind { kind }),
        };
        from.finish()?;
        Ok(message)
    }

    /// The kind of frame that carries this message.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Close(_) => Kind::Close,
            Self::Open(_) => Kind::Open,
            Self::Opened(_) => Kind::Opened,
            Self::Rows(_) => Kind::Rows,
            Self::Output(_) => Kind::Output,
            Self::Commit(_) => Kind::Commit,
            Self::Cancel => Kind::Cancel,
            Self::Cancelled => Kind::Cancelled,
            Self::End(_) => Kind::End,
            Self::Ended => Kind::Ended,
            Self::Dropped(_) => Kind::Dropped,
            Self::SessionError(_) => Kind::SessionError,
            Self::Busy(_) => Kind::Busy,
            Self::Computed(_) => Kind::Computed,
        }
    }

    /// Bytes of the encoded body.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        let mut to = Writer::counting();
        self.write(&mut to);
        to.written()
    }

    /// Writes the body to the front of `to` and returns how many bytes it is.
    ///
    /// # Panics
    /// If `to` is shorter than [`Message::encoded_len`], or there are more than [`PAGE_IDS_MAX`]
    /// page ids.
    pub fn encode(&self, to: &mut [u8]) -> usize {
        let mut to = Writer::new(to);
        self.write(&mut to);
        to.written()
    }

    fn write(&self, to: &mut Writer<'_>) {
        match self {
            Self::Hello(hello) => hello.write(to),
            Self::Close(close) => close.write(to),
            Self::Open(open) => open.write(to),
            Self::Opened(opened) => to.u16(opened.pages),
            Self::End(end) => {
                to.u32(end.commit);
                to.page_ids(end.pages);
            }
            Self::Rows(rows) => rows.write(to),
            Self::Output(output) => output.write(to),
            Self::Commit(commit) => to.u32(commit.row),
            Self::Dropped(dropped) => {
                to.u32(dropped.first_id);
                to.u16(dropped.count);
            }
            Self::SessionError(error) => {
                to.u16(error.code as u16);
                to.bytes(wire::cut(error.text).as_bytes());
            }
            Self::Busy(busy) => to.u32(busy.retry_after_ms),
            Self::Computed(computed) => computed.write(to),
            Self::Cancel | Self::Cancelled | Self::Ended => {}
        }
    }
}

impl<'a> Open<'a> {
    fn read(from: &mut Reader<'a>) -> Result<Self, MessageError> {
        let (entry_layer, exit_layer) = from.layers()?;
        Ok(Self {
            entry_layer,
            exit_layer,
            codec: from.u8("codec")?,
            kv_type: from.u8("kv_type")?,
            arithmetic_id: from.u32("arithmetic_id")?,
            rows_max: from.u32("rows_max")?,
            pages: from.page_ids()?,
        })
    }

    fn write(&self, to: &mut Writer<'_>) {
        to.u16(self.entry_layer);
        to.u16(self.exit_layer);
        to.u8(self.codec);
        to.u8(self.kv_type);
        to.u32(self.arithmetic_id);
        to.u32(self.rows_max);
        to.page_ids(self.pages);
    }
}

impl<'a> End<'a> {
    fn read(from: &mut Reader<'a>) -> Result<Self, MessageError> {
        Ok(Self { commit: from.u32("commit")?, pages: from.page_ids()? })
    }
}

impl Dropped {
    fn read(from: &mut Reader<'_>) -> Result<Self, MessageError> {
        let (first_id, count) = (from.id("first_id")?, from.count("count")?);
        wire::last_id(first_id, count)?;
        Ok(Self { first_id, count })
    }
}

impl Computed {
    fn read(from: &mut Reader<'_>) -> Result<Self, MessageError> {
        let (first_id, count) = (from.id("first_id")?, from.count("count")?);
        wire::last_id(first_id, count)?;
        Ok(Self {
            first_id,
            count,
            queue_us: from.u32("queue_us")?,
            step_us: from.u32("step_us")?,
            step_rows: from.u32("step_rows")?,
            arrivals: Arrivals::read(from)?,
        })
    }

    fn write(&self, to: &mut Writer<'_>) {
        to.u32(self.first_id);
        to.u16(self.count);
        to.u32(self.queue_us);
        to.u32(self.step_us);
        to.u32(self.step_rows);
        self.arrivals.write(to);
    }
}

impl<'a> SessionError<'a> {
    fn read(from: &mut Reader<'a>) -> Result<Self, MessageError> {
        let number = from.u16("code")?;
        let code = SessionErrorCode::from_wire(number)
            .ok_or_else(|| wire::value("code", "a known session error", number))?;
        Ok(Self { code, text: from.text("text")? })
    }
}

#[cfg(test)]
mod tests;
