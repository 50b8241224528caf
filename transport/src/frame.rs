//! The wire format: a 32-byte little-endian header and up to 65,536 body bytes. Byte tables are
//! in `docs/PROTOCOL.md`.
//!
//! The header carries a checksum of its own, so its length field is trusted before the body has
//! come in. Nothing here reads a clock, a socket or a shape.

mod deframe;

pub use deframe::{Deframed, Deframer, FrameError, RawFrame};

/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 32;
/// Largest body that a frame may carry.
pub const BODY_BYTES_MAX: usize = 65_536;
/// Largest frame.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + BODY_BYTES_MAX;
/// Flag: a receiver that doesn't know the kind skips the frame instead of failing.
pub const FLAG_IGNORABLE: u8 = 1;
/// Kinds from here on are sequenced: counted by `seq`, charged to the credit, kept until
/// acknowledged, replayed after a reconnect.
pub const SEQUENCED_FROM: u8 = 16;

/// Kind of a frame. The numbers are the wire's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Kind {
    /// First frame of each direction of a link: who speaks, what is offered, where to go on.
    Hello = 1,
    /// Carries nothing but the header's `ack` and `credit`.
    Ack = 2,
    /// Asks for a [`Kind::Pong`] with the same eight bytes.
    Ping = 3,
    /// The answer to [`Kind::Ping`].
    Pong = 4,
    /// The connection ends, with a code and a reason.
    Close = 5,
    /// Device: a session begins.
    Open = 16,
    /// Cloud: the session exists and its rows are reserved.
    Opened = 17,
    /// Device: rows to compute.
    Rows = 18,
    /// Cloud: computed rows.
    Output = 19,
    /// Device: keep one root-to-row path, prune the rest.
    Commit = 20,
    /// Device: stop computing what pends.
    Cancel = 21,
    /// Cloud: the work of a [`Kind::Cancel`] has stopped.
    Cancelled = 22,
    /// Device: the session is over.
    End = 23,
    /// Cloud: the session's memory is free again.
    Ended = 24,
    /// Cloud: rows that will never be computed, because their ancestor was pruned.
    Dropped = 25,
    /// Cloud: the session has failed.
    SessionError = 26,
    /// Cloud: not now; try again later.
    Busy = 27,
    /// Cloud: rows of which none was to come back have been computed.
    Computed = 28,
}

impl Kind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 18] = [
        Self::Hello,
        Self::Ack,
        Self::Ping,
        Self::Pong,
        Self::Close,
        Self::Open,
        Self::Opened,
        Self::Rows,
        Self::Output,
        Self::Commit,
        Self::Cancel,
        Self::Cancelled,
        Self::End,
        Self::Ended,
        Self::Dropped,
        Self::SessionError,
        Self::Busy,
        Self::Computed,
    ];

    /// The kind with this number, if this version knows it.
    #[must_use]
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// True if frames of this kind are counted, kept and replayed.
    #[must_use]
    pub const fn is_sequenced(self) -> bool {
        self as u8 >= SEQUENCED_FROM
    }
}

/// Order in which waiting frames go out. Frames of one session never overtake each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Priority {
    /// Opening, cancelling, ending.
    Control = 0,
    /// Rows that an answer waits for.
    Verify = 1,
    /// Rows of a prompt.
    Prompt = 2,
    /// Frames that may wait.
    Bulk = 3,
}

impl Priority {
    /// All priorities, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Control, Self::Verify, Self::Prompt, Self::Bulk];

    /// The priority with this number.
    #[must_use]
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

/// A frame header whose checksum, length, flags and priority have been found right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Body bytes, at most [`BODY_BYTES_MAX`].
    pub len: u32,
    /// Number of the [`Kind`]. An unknown one is possible only with [`FLAG_IGNORABLE`].
    pub kind: u8,
    /// [`FLAG_IGNORABLE`] or 0.
    pub flags: u8,
    /// Urgency of the frame.
    pub priority: Priority,
    /// Wire version that the sender speaks.
    pub version: u8,
    /// The session, chosen by the device; 0 is the connection itself.
    pub session: u32,
    /// CRC-32C of the body.
    pub body_crc: u32,
    /// Number of a sequenced frame, from 0 in each link epoch, wrapping.
    pub seq: u32,
    /// The `seq` that the sender expects next: everything before it has arrived.
    pub ack: u32,
    /// Absolute byte offset up to which the peer may send sequenced frames, wrapping.
    pub credit: u32,
}

/// An error in a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The checksum over bytes 0..28 does not match: not a header at all, or a damaged one.
    #[error("header checksum is {got:#010x}, expected {expected:#010x}")]
    Checksum {
        /// Computed here.
        expected: u32,
        /// Value in the header.
        got: u32,
    },
    /// As [`HeaderError::Checksum`], and the bytes begin as HTTP does.
    #[error("it {verb} like HTTP")]
    Http {
        /// "answered" for a response, "asked" for a request.
        verb: &'static str,
    },
    /// The body would be longer than any body may be.
    #[error("body length {len} exceeds {max}")]
    Length {
        /// Value in the header.
        len: u32,
        /// The limit: [`BODY_BYTES_MAX`], or less before HELLO.
        max: u32,
    },
    /// A flag that this version does not know is set.
    #[error("unknown flags {flags:#04x}")]
    Flags {
        /// Value in the header.
        flags: u8,
    },
    /// There are four priorities.
    #[error("unknown priority {priority}")]
    Priority {
        /// Value in the header.
        priority: u8,
    },
    /// A kind that this version does not know, not marked ignorable.
    #[error("unknown frame kind {kind}")]
    Kind {
        /// Value in the header.
        kind: u8,
    },
    /// Session 0 is the connection itself: unsequenced frames name it, and no other do.
    #[error("session {session} does not fit frame kind {kind}")]
    Session {
        /// Value in the header.
        kind: u8,
        /// Value in the header.
        session: u32,
    },
}

/// Verb of the error message, `answered` or `asked`, if the first bytes are HTTP.
fn http_verb(bytes: &[u8; HEADER_BYTES]) -> Option<&'static str> {
    const METHODS: [&[u8]; 6] = [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"OPTIONS ", b"CONNECT "];
    if bytes.starts_with(b"HTTP/") {
        return Some("answered");
    }
    METHODS.iter().any(|method| bytes.starts_with(method)).then_some("asked")
}

impl Header {
    /// Writes the 32 bytes, checksum included.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&self.len.to_le_bytes());
        bytes[4] = self.kind;
        bytes[5] = self.flags;
        bytes[6] = self.priority as u8;
        bytes[7] = self.version;
        bytes[8..12].copy_from_slice(&self.session.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.body_crc.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.seq.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.ack.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.credit.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..28]);
        bytes[28..32].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads the 32 bytes; the checksum comes first, and nothing is believed before it.
    ///
    /// # Errors
    /// One variant for each way of being wrong.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        let expected = crc32c::crc32c(&bytes[..28]);
        let got = word(bytes, 28);
        if got != expected {
            return Err(match http_verb(bytes) {
                Some(verb) => HeaderError::Http { verb },
                None => HeaderError::Checksum { expected, got },
            });
        }
        let len = word(bytes, 0);
        if len as usize > BODY_BYTES_MAX {
            let max = BODY_BYTES_MAX as u32;
            return Err(HeaderError::Length { len, max });
        }
        let [kind, flags, priority, version] = [bytes[4], bytes[5], bytes[6], bytes[7]];
        if flags & !FLAG_IGNORABLE != 0 {
            return Err(HeaderError::Flags { flags });
        }
        let priority = Priority::from_wire(priority).ok_or(HeaderError::Priority { priority })?;
        if Kind::from_wire(kind).is_none() && flags & FLAG_IGNORABLE == 0 {
            return Err(HeaderError::Kind { kind });
        }
        let session = word(bytes, 8);
        if (kind >= SEQUENCED_FROM) != (session != 0) {
            return Err(HeaderError::Session { kind, session });
        }
        Ok(Self {
            len,
            kind,
            flags,
            priority,
            version,
            session,
            body_crc: word(bytes, 12),
            seq: word(bytes, 16),
            ack: word(bytes, 20),
            credit: word(bytes, 24),
        })
    }
}

/// The little-endian u32 at `offset` of a header.
fn word(bytes: &[u8; HEADER_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes([bytes[offset], bytes[offset + 1], bytes[offset + 2], bytes[offset + 3]])
}

/// `true` if wrapping counter `a` stands before `b` (RFC 1982 comparison).
pub(crate) const fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            len: 1168,
            kind: Kind::Rows as u8,
            flags: 0,
            priority: Priority::Verify,
            version: 1,
            session: 7,
            body_crc: 0xdead_beef,
            seq: 1,
            ack: 2,
            credit: u32::MAX,
        }
    }

    /// `header()` with one byte changed and the checksum made right again.
    fn patched(offset: usize, bytes: &[u8]) -> [u8; HEADER_BYTES] {
        let mut wire = header().encode();
        wire[offset..offset + bytes.len()].copy_from_slice(bytes);
        let checksum = crc32c::crc32c(&wire[..28]);
        wire[28..].copy_from_slice(&checksum.to_le_bytes());
        wire
    }

    #[test]
    fn kinds_keep_their_numbers() {
        for number in 0..=255 {
            match Kind::from_wire(number) {
                Some(kind) => {
                    assert_eq!(kind as u8, number);
                    assert!(Kind::ALL.contains(&kind));
                }
                None => assert!(Kind::ALL.iter().all(|kind| *kind as u8 != number)),
            }
        }
    }

    #[test]
    fn a_damaged_header_is_a_checksum_error() {
        for bit in 0..HEADER_BYTES * 8 {
            let mut wire = header().encode();
            wire[bit / 8] ^= 1 << (bit % 8);
            let error = Header::decode(&wire).unwrap_err();
            assert!(matches!(error, HeaderError::Checksum { .. }), "bit {bit}: {error}");
        }
    }

    #[test]
    fn each_field_has_its_error() {
        let decode = |offset, bytes: &[u8]| Header::decode(&patched(offset, bytes));
        let max = BODY_BYTES_MAX as u32;
        assert_eq!(decode(0, &max.to_le_bytes()).unwrap().len, max);
        let len = max + 1;
        assert_eq!(decode(0, &len.to_le_bytes()), Err(HeaderError::Length { len, max }));
        assert_eq!(decode(4, &[200]), Err(HeaderError::Kind { kind: 200 }));
        assert_eq!(decode(4, &[200, FLAG_IGNORABLE]).unwrap().kind, 200);
        assert_eq!(decode(5, &[2]), Err(HeaderError::Flags { flags: 2 }));
        assert_eq!(decode(6, &[4]), Err(HeaderError::Priority { priority: 4 }));
        let none = HeaderError::Session { kind: Kind::Rows as u8, session: 0 };
        assert_eq!(decode(8, &[0; 4]), Err(none));
        let one = HeaderError::Session { kind: Kind::Ping as u8, session: 7 };
        assert_eq!(decode(4, &[Kind::Ping as u8]), Err(one));
    }

    #[test]
    fn wrapping_order() {
        assert!(before(u32::MAX, 0));
        assert!(!before(0, u32::MAX));
        assert!(!before(5, 5));
    }

    proptest! {
        #[test]
        fn headers_round_trip(
            len in 0..=BODY_BYTES_MAX as u32, kind in 0..Kind::ALL.len(), priority in 0u8..4,
            words in any::<[u32; 5]>(), version in any::<u8>(),
        ) {
            let kind = Kind::ALL[kind];
            let header = Header {
                len,
                kind: kind as u8,
                flags: 0,
                priority: Priority::from_wire(priority).unwrap(),
                version,
                session: if kind.is_sequenced() { words[0].max(1) } else { 0 },
                body_crc: words[1],
                seq: words[2],
                ack: words[3],
                credit: words[4],
            };
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }
}
