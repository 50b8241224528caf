//! ROWS and OUTPUT: hidden states on their way up and down. A payload is bytes with a row count.

use super::MessageError;
use super::wire::{Reader, Writer, last_id, value};

const FLAG_TREE: u8 = 1;
const FLAG_MORE: u8 = 2;
const FLAG_DECIDED: u8 = 4;

/// Rows of a ROWS frame that are to come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Want {
    /// None: rows of a prompt but its last.
    None = 0,
    /// The last row of this frame.
    Last = 1,
    /// All rows.
    All = 2,
}

/// Head of a ROWS frame, before its payload.
///
/// Ids are unique in a session and increase. Rows `first_id..first_id + count` form a chain below
/// `parent`, or a tree whose parent ids follow this head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowsHead {
    /// Id of the first row; ids start at 1.
    pub first_id: u32,
    /// Rows in this frame; at least 1.
    pub count: u16,
    /// Parent ids follow, one a row; otherwise each row's parent is the row before it.
    pub tree: bool,
    /// The chunk goes on in the next ROWS frame of this session.
    pub more: bool,
    /// The rows are committed as they arrive: rows of a prompt, and of plain decoding. They form a
    /// chain below the last committed row, so this goes without [`RowsHead::tree`].
    pub decided: bool,
    /// Rows that are to come back.
    pub want: Want,
    /// Parent of the first row; 0 is the session's root.
    pub parent: u32,
    /// Before these rows, keep the path to this row and prune the rest; 0 for nothing.
    pub commit: u32,
}

impl RowsHead {
    /// Bytes before the parent ids.
    pub const BYTES: usize = 16;

    /// Bytes before the payload.
    #[must_use]
    pub const fn payload_start(&self) -> usize {
        Self::BYTES + if self.tree { 4 * self.count as usize } else { 0 }
    }

    /// Writes the head, and `parents` if this is a tree, and returns the start of the payload. The
    /// caller writes the payload there, in place.
    ///
    /// # Panics
    /// If `to` is too short, or `parents` is not one id a row for a tree and empty otherwise.
    pub fn encode(&self, parents: &[u32], to: &mut [u8]) -> usize {
        let expected = if self.tree { usize::from(self.count) } else { 0 };
        assert_eq!(parents.len(), expected, "one parent a row, in trees alone");
        let mut to = Writer::new(to);
        self.write(&mut to);
        parents.iter().for_each(|parent| to.u32(*parent));
        to.written()
    }

    fn write(&self, to: &mut Writer<'_>) {
        to.u32(self.first_id);
        to.u16(self.count);
        to.u8(u8::from(self.tree) * FLAG_TREE
            + u8::from(self.more) * FLAG_MORE
            + u8::from(self.decided) * FLAG_DECIDED);
        to.u8(self.want as u8);
        to.u32(self.parent);
        to.u32(self.commit);
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, MessageError> {
        let (first_id, count) = (from.id("first_id")?, from.count("count")?);
        last_id(first_id, count)?;
        let flags = from.u8("flags")?;
        if flags & !(FLAG_TREE | FLAG_MORE | FLAG_DECIDED) != 0 {
            return Err(value("flags", "TREE (1), MORE (2) and DECIDED (4) only", flags));
        }
        if flags & FLAG_TREE != 0 && flags & FLAG_DECIDED != 0 {
            return Err(value("flags", "TREE or DECIDED, not both", flags));
        }
        let want = match from.u8("output")? {
            0 => Want::None,
            1 => Want::Last,
            2 => Want::All,
            output => return Err(value("output", "0 (none), 1 (last) or 2 (all)", output)),
        };
        let (parent, commit) = (from.u32("parent")?, from.u32("commit")?);
        if parent >= first_id {
            return Err(value("parent", "an id before first_id", parent));
        }
        if commit >= first_id {
            return Err(value("commit", "an id before first_id", commit));
        }
        let (tree, more) = (flags & FLAG_TREE != 0, flags & FLAG_MORE != 0);
        let decided = flags & FLAG_DECIDED != 0;
        Ok(Self { first_id, count, tree, more, decided, want, parent, commit })
    }
}

/// Row ids inside a body, which may stand at any address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Ids<'a> {
    /// Four bytes an id.
    bytes: &'a [u8],
}

impl<'a> Ids<'a> {
    /// Number of ids.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / 4
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The ids in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.bytes.chunks_exact(4).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]))
    }
}

/// A ROWS body.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rows<'a> {
    /// The fixed part.
    pub head: RowsHead,
    /// Parents of a tree, one a row; empty for a chain.
    pub parents: Ids<'a>,
    /// `count` rows of equal size, in the session's codec.
    pub payload: &'a [u8],
}

impl<'a> Rows<'a> {
    /// Parent of each row, for chains and trees alike.
    pub fn parents_of_rows(&self) -> impl Iterator<Item = u32> + use<'a> {
        let (head, parents) = (self.head, self.parents);
        let chain = (0..if head.tree { 0 } else { u32::from(head.count) })
            .map(move |row| if row == 0 { head.parent } else { head.first_id + row - 1 });
        chain.chain(parents.iter())
    }

    pub(super) fn read(from: &mut Reader<'a>) -> Result<Self, MessageError> {
        let head = RowsHead::read(from)?;
        let parent_bytes = if head.tree { 4 * usize::from(head.count) } else { 0 };
        let parents = Ids { bytes: from.bytes("parents", parent_bytes)? };
        for (row, parent) in parents.iter().enumerate() {
            if row == 0 && parent != head.parent {
                return Err(value("parents[0]", "the same as parent", parent));
            }
            if u64::from(parent) >= u64::from(head.first_id) + row as u64 {
                return Err(value("parents", "ids before their child's", parent));
            }
        }
        Ok(Self { head, parents, payload: from.payload(head.count)? })
    }

    pub(super) fn write(&self, to: &mut Writer<'_>) {
        self.head.write(to);
        to.bytes(self.parents.bytes);
        to.bytes(self.payload);
    }
}

/// Head of an OUTPUT frame, before the row ids and the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputHead {
    /// Rows in this frame; at least 1.
    pub count: u16,
    /// Time that the rows waited for their step.
    pub queue_us: u32,
    /// Duration of the step.
    pub step_us: u32,
    /// Rows in the step, other sessions' included.
    pub step_rows: u32,
    /// Arrival rate of the device's frames.
    pub arrivals: Arrivals,
}

/// Arrivals of a connection's frames at a cloud since its last report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// Bytes that came while a frame was on its way in, so that the link was at work.
    pub bytes: u32,
    /// Microseconds that those bytes took.
    pub us: u32,
}

impl Arrivals {
    pub(super) fn read(from: &mut Reader<'_>) -> Result<Self, MessageError> {
        Ok(Self { bytes: from.u32("arrived_bytes")?, us: from.u32("arrived_us")? })
    }

    pub(super) fn write(self, to: &mut Writer<'_>) {
        to.u32(self.bytes);
        to.u32(self.us);
    }
}

impl OutputHead {
    /// Bytes before the row ids.
    pub const BYTES: usize = 24;

    /// Bytes before the payload.
    #[must_use]
    pub const fn payload_start(&self) -> usize {
        Self::BYTES + 4 * self.count as usize
    }

    /// Writes the head and `ids`, and returns the start of the payload. The caller writes the
    /// payload there, in place.
    ///
    /// # Panics
    /// If `to` is too short, or `ids` is not one a row.
    pub fn encode(&self, ids: &[u32], to: &mut [u8]) -> usize {
        assert_eq!(ids.len(), usize::from(self.count), "one id a row");
        let mut to = Writer::new(to);
        self.write(&mut to);
        ids.iter().for_each(|id| to.u32(*id));
        to.written()
    }

    fn write(&self, to: &mut Writer<'_>) {
        to.u16(self.count);
        to.u16(0);
        to.u32(self.queue_us);
        to.u32(self.step_us);
        to.u32(self.step_rows);
        self.arrivals.write(to);
    }
}

/// An OUTPUT body.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Output<'a> {
    /// The fixed part.
    pub head: OutputHead,
    /// Row that each row of the payload answers.
    pub ids: Ids<'a>,
    /// `count` rows of equal size, in the session's codec.
    pub payload: &'a [u8],
}

impl<'a> Output<'a> {
    pub(super) fn read(from: &mut Reader<'a>) -> Result<Self, MessageError> {
        let count = from.count("count")?;
        let reserved = from.u16("reserved")?;
        if reserved != 0 {
            return Err(value("reserved", "0", reserved));
        }
        let head = OutputHead {
            count,
            queue_us: from.u32("queue_us")?,
            step_us: from.u32("step_us")?,
            step_rows: from.u32("step_rows")?,
            arrivals: Arrivals::read(from)?,
        };
        let ids = Ids { bytes: from.bytes("ids", 4 * usize::from(count))? };
        if ids.iter().any(|id| id == 0) {
            return Err(value("ids", "row ids, from 1 on", 0u32));
        }
        Ok(Self { head, ids, payload: from.payload(count)? })
    }

    pub(super) fn write(&self, to: &mut Writer<'_>) {
        self.head.write(to);
        to.bytes(self.ids.bytes);
        to.bytes(self.payload);
    }
}
