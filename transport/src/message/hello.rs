//! HELLO and CLOSE: how a link begins and how it ends. Both keep their layout in all versions.

use super::MessageError;
use super::wire::{Reader, Writer, cut, value};
use crate::frame::FRAME_BYTES_MAX;

/// First bytes of a HELLO body.
pub const HELLO_MAGIC: [u8; 4] = *b"hat\0";

/// End of the link that speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// Dials; owns tokens; opens sessions.
    Device = 0,
    /// Listens; holds the middle layers.
    Cloud = 1,
}

/// The link that a HELLO is about, and the place where it goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkState {
    /// The device's random name for this link; a cloud repeats it.
    pub id: [u8; 16],
    /// The cloud's name for its memory of the link. A device says the last one that it heard, 0
    /// at first. Equal epochs on both sides mean that the link goes on.
    pub epoch: u64,
    /// The `seq` expected next: where the peer's replay starts.
    pub recv_next: u32,
}

/// Pages of keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvPages {
    /// Number format of keys and values.
    pub kv_type: u8,
    /// Rows of one page.
    pub page_size: u16,
}

/// The first frame of each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest and newest wire version spoken.
    pub versions: (u16, u16),
    /// Bits of optional features; none are defined yet.
    pub features: u64,
    /// End that speaks.
    pub role: Role,
    /// The link that is spoken of.
    pub link: LinkState,
    /// Longest frame that the speaker takes, header included.
    pub frame_bytes_max: u32,
    /// Identity of the split model; equal in both halves.
    pub model_id: [u8; 32],
    /// Arithmetic that the speaker computes in.
    pub arithmetic_id: u32,
    /// Numbers in one row.
    pub hidden_size: u32,
    /// Device: first layer that it wants computed; cloud: first layer that it holds.
    pub entry_layer: u16,
    /// The layer after the last one wanted, or held.
    pub exit_layer: u16,
    /// Bit `1 << codec` for each codec of rows that the speaker knows.
    pub codecs: u32,
    /// Cloud: rows that one of its steps takes at most. Device: 0.
    pub row_budget: u32,
    /// Uncommitted rows that a session may have beyond its prompt's.
    pub rows_pending_max: u16,
    /// Pages of keys and values.
    pub kv: KvPages,
    /// Cloud: pipeline stages of its middle layers, from 1 on. Device: 0.
    pub stages: u16,
}

impl Hello {
    /// Bytes of the body.
    pub const BYTES: usize = 108;

    /// A HELLO with everything unset but the role, this version and the frame size.
    #[must_use]
    pub const fn new(role: Role) -> Self {
        Self {
            versions: (crate::WIRE_VERSION as u16, crate::WIRE_VERSION as u16),
            features: 0,
            role,
            link: LinkState { id: [0; 16], epoch: 0, recv_next: 0 },
            frame_bytes_max: FRAME_BYTES_MAX as u32,
            model_id: [0; 32],
            arithmetic_id: 0,
            hidden_size: 0,
            entry_layer: 0,
            exit_layer: 0,
            codecs: 0,
            row_budget: 0,
            rows_pending_max: 0,
            kv: KvPages { kv_type: 0, page_size: 0 },
            stages: 0,
        }
    }

    /// The newest wire version that both speak.
    #[must_use]
    pub fn common_version(&self, peer: &Self) -> Option<u16> {
        let version = self.versions.1.min(peer.versions.1);
        (version >= self.versions.0.max(peer.versions.0)).then_some(version)
    }

    /// Reads a HELLO body. Bytes behind the known fields belong to later versions.
    ///
    /// # Errors
    /// One variant for each way of being wrong.
    pub fn decode(body: &[u8]) -> Result<Self, MessageError> {
        let mut from = Reader::new(body);
        let magic: [u8; 4] = from.array("magic")?;
        if magic != HELLO_MAGIC {
            return Err(value("magic", "\"hat\\0\"", u32::from_le_bytes(magic)));
        }
        let hello = Self {
            versions: (from.u16("min_version")?, from.u16("max_version")?),
            features: from.u64("features")?,
            link: LinkState {
                id: from.array("link_id")?,
                epoch: from.u64("link_epoch")?,
                recv_next: from.u32("recv_next")?,
            },
            frame_bytes_max: from.u32("frame_bytes_max")?,
            model_id: from.array("model_id")?,
            arithmetic_id: from.u32("arithmetic_id")?,
            hidden_size: from.u32("hidden_size")?,
            entry_layer: from.u16("entry_layer")?,
            exit_layer: from.u16("exit_layer")?,
            codecs: from.u32("codecs")?,
            row_budget: from.u32("row_budget")?,
            rows_pending_max: from.u16("rows_pending_max")?,
            kv: KvPages::read(&mut from)?,
            role: match from.u8("role")? {
                0 => Role::Device,
                1 => Role::Cloud,
                role => return Err(value("role", "0 (device) or 1 (cloud)", role)),
            },
            stages: from.u16("stages")?,
        };
        if hello.versions.0 > hello.versions.1 {
            return Err(value("min_version", "at most max_version", hello.versions.0));
        }
        if hello.entry_layer > hello.exit_layer {
            return Err(value("entry_layer", "at most exit_layer", hello.entry_layer));
        }
        if (hello.frame_bytes_max as usize) < 4096 {
            return Err(value("frame_bytes_max", "at least 4096", hello.frame_bytes_max));
        }
        Ok(hello)
    }

    pub(super) fn write(&self, to: &mut Writer<'_>) {
        to.bytes(&HELLO_MAGIC);
        to.u16(self.versions.0);
        to.u16(self.versions.1);
        to.u64(self.features);
        to.bytes(&self.link.id);
        to.u64(self.link.epoch);
        to.u32(self.link.recv_next);
        to.u32(self.frame_bytes_max);
        to.bytes(&self.model_id);
        to.u32(self.arithmetic_id);
        to.u32(self.hidden_size);
        to.u16(self.entry_layer);
        to.u16(self.exit_layer);
        to.u32(self.codecs);
        to.u32(self.row_budget);
        to.u16(self.rows_pending_max);
        to.u16(self.kv.page_size);
        to.u8(self.kv.kv_type);
        to.u8(self.role as u8);
        to.u16(self.stages);
    }
}

impl KvPages {
    fn read(from: &mut Reader<'_>) -> Result<Self, MessageError> {
        let page_size = from.u16("page_size")?;
        Ok(Self { page_size, kv_type: from.u8("kv_type")? })
    }
}

/// Reason that a connection was closed. Numbers are the wire's; an unknown one is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CloseCode {
    /// The work is done.
    Done,
    /// The peer broke the protocol.
    Protocol,
    /// No common wire version; the reason states both ranges.
    Version,
    /// Model, layers, arithmetic or codecs do not go together; the reason says which.
    Incompatible,
    /// No room for this connection.
    Overload,
    /// The speaker goes away; another cloud may answer.
    ShuttingDown,
    /// A fault of the speaker's own.
    Internal,
    /// A code of a later version.
    Other(u16),
}

impl CloseCode {
    /// The wire's number.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        match self {
            Self::Done => 0,
            Self::Protocol => 1,
            Self::Version => 2,
            Self::Incompatible => 3,
            Self::Overload => 4,
            Self::ShuttingDown => 5,
            Self::Internal => 6,
            Self::Other(number) => number,
        }
    }

    /// True if another try with the same peers would end the same way. All other codes, those of
    /// later versions among them, are an outage: what was asked may be asked again.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Protocol | Self::Version | Self::Incompatible)
    }

    /// The code with this number.
    #[must_use]
    pub const fn from_wire(number: u16) -> Self {
        match number {
            0 => Self::Done,
            1 => Self::Protocol,
            2 => Self::Version,
            3 => Self::Incompatible,
            4 => Self::Overload,
            5 => Self::ShuttingDown,
            6 => Self::Internal,
            number => Self::Other(number),
        }
    }
}

/// The last frame of a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Close<'a> {
    /// Reason, for programs.
    pub code: CloseCode,
    /// Reason, for people. Longer text is cut at [`super::TEXT_BYTES_MAX`].
    pub reason: &'a str,
}

impl<'a> Close<'a> {
    pub(super) fn read(from: &mut Reader<'a>) -> Result<Self, MessageError> {
        let code = CloseCode::from_wire(from.u16("code")?);
        Ok(Self { code, reason: from.text("reason")? })
    }

    pub(super) fn write(&self, to: &mut Writer<'_>) {
        to.u16(self.code.to_wire());
        to.bytes(cut(self.reason).as_bytes());
    }
}
