//! A ROWS frame, decoded once: when it comes.

use std::ops::Range;

use hat_transport::conn::Frame;
use hat_transport::frame::Priority;
use hat_transport::message::{Dropped, RowsHead, Want};
use hat_transport::pool::Buf;

/// A ROWS frame that was decoded. Its buffer counts against its device's credit until it is
/// dropped.
pub(super) struct RowsFrame {
    pub(super) head: RowsHead,
    pub(super) priority: Priority,
    /// Parent ids of a tree, four bytes each. In `body`.
    parents: Range<usize>,
    /// The rows, in the session's codec. In `body`.
    payload: Range<usize>,
    body: Buf,
}

impl RowsFrame {
    /// `frame`, whose body was decoded as ROWS with this head.
    pub(super) fn new(frame: Frame, head: RowsHead) -> Self {
        let (start, end) = (head.payload_start(), frame.body.len());
        Self {
            head,
            priority: frame.priority,
            parents: RowsHead::BYTES..start,
            payload: start..end,
            body: frame.body,
        }
    }

    /// Ids of its rows.
    pub(super) fn ids(&self) -> Range<u32> {
        self.head.first_id..self.head.first_id + u32::from(self.head.count)
    }

    /// Parent of each row, of a chain and of a tree.
    pub(super) fn parents(&self) -> impl Iterator<Item = u32> + Clone {
        let RowsHead { first_id, parent, .. } = self.head;
        let of_tree = self.body[self.parents.clone()]
            .chunks_exact(4)
            .map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]));
        let of_chain = if self.head.tree { 0..0 } else { self.ids() };
        of_chain.map(move |id| if id == first_id { parent } else { id - 1 }).chain(of_tree)
    }

    /// Bytes of its rows.
    pub(super) fn payload_bytes(&self) -> usize {
        self.payload.len()
    }

    /// The rows that its device waits for.
    pub(super) fn awaited(&self) -> Option<Dropped> {
        let RowsHead { first_id, count, .. } = self.head;
        match self.head.want {
            Want::None => None,
            Want::Last => Some(Dropped { first_id: first_id + u32::from(count) - 1, count: 1 }),
            Want::All => Some(Dropped { first_id, count }),
        }
    }

    /// Its rows behind the first `skip`, at most `rows_max`, and their head as if they were all of
    /// a frame. Decided rows alone are cut.
    pub(super) fn part(&self, skip: u32, rows_max: u32) -> (RowsHead, &[u8]) {
        let head = self.head;
        let count = u32::from(head.count);
        let rows = (count - skip).min(rows_max);
        let is_last = skip + rows == count;
        if skip == 0 && is_last {
            return (head, &self.body[self.payload.clone()]);
        }
        debug_assert!(head.decided, "a verify runs in one step");
        let first_id = head.first_id + skip;
        let head = RowsHead {
            first_id,
            count: u16::try_from(rows).expect("at most as many as the frame has"),
            parent: if skip > 0 { first_id - 1 } else { head.parent },
            commit: if skip > 0 { 0 } else { head.commit },
            want: if head.want == Want::Last && !is_last { Want::None } else { head.want },
            ..head
        };
        let row_bytes = self.payload.len() / count as usize;
        let start = self.payload.start + skip as usize * row_bytes;
        (head, &self.body[start..start + rows as usize * row_bytes])
    }
}
