//! Rows on their way up: computed, released, sent.

use std::ops::Range;

use hat_transport::message::{RowsHead, Want};

/// Rows of one chunk: decided rows, or those of the draft tree's nodes, in order. Of all rows that
/// are `computed`, the first `released` may leave, and the first `sent` have.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// Rows. `[computed, hidden_size]`
    pub(super) hidden: Vec<f32>,
    pub(super) computed: usize,
    pub(super) released: usize,
    pub(super) sent: usize,
    /// Row that the chunk at hand begins with.
    pub(super) begin: usize,
    /// Id of the first row that is not sent; the ids of the others follow.
    pub(super) next_id: u32,
    /// The last row that was sent.
    pub(super) sent_id: u32,
    /// Parent of the first row, if that is decided.
    pub(super) parent: u32,
    /// Leading rows that are decided, and so a chain; the others pend.
    pub(super) decided: usize,
    /// Parents of the rows of the chunk at hand that pend.
    pub(super) parents: Vec<u32>,
    /// True if the last decided row leads to a token; pending rows do.
    pub(super) decides: bool,
    /// True if more rows are being made that run together with these.
    pub(super) grows: bool,
    /// The last row of the path that the cloud has not been told to keep; 0 if there is none. It
    /// goes with the first frame of a chunk.
    pub(super) commit: u32,
}

impl Outgoing {
    /// True if nothing waits to be sent.
    pub(super) fn is_sent(&self) -> bool {
        self.sent == self.computed
    }

    /// True if something may leave.
    pub(super) fn has_released(&self) -> bool {
        self.sent < self.released
    }

    /// All that is computed may leave; `grows` if more rows of the same chunk are being made.
    pub(super) fn release(&mut self, grows: bool) {
        self.released = self.computed;
        self.grows = grows;
    }

    /// Nothing is to be sent.
    pub(super) fn clear(&mut self) {
        (self.computed, self.released, self.sent, self.begin) = (0, 0, 0, 0);
        self.grows = false;
    }

    /// A chunk that begins with `decided` rows, which are to be computed or are already; `ids` are
    /// theirs.
    pub(super) fn begin_decided(&mut self, ids: &Range<u32>, parent: u32, decides: bool) {
        self.clear();
        self.next_id = ids.start;
        self.parent = parent;
        self.decided = ids.len();
        self.parents.clear();
        self.decides = decides;
    }

    /// A chunk of rows that all pend, behind the `rows` that are here already.
    pub(super) fn begin_pending(&mut self, rows: usize, first_id: u32) {
        self.begin = rows;
        self.next_id = first_id;
        self.decided = 0;
        self.parents.clear();
    }

    /// The first `rows` rows stay, all of them sent.
    pub(super) fn keep_sent(&mut self, rows: usize) {
        (self.begin, self.sent, self.released, self.computed) = (rows, rows, rows, rows);
    }

    /// Parents of the next `rows` rows, which pend.
    pub(super) fn parents_of(&self, rows: usize) -> &[u32] {
        &self.parents[self.sent - self.begin.max(self.decided)..][..rows]
    }

    /// Rows of which the cloud has not heard are stale; a chunk that it has in part goes up whole.
    pub(super) fn drop_unheard(&mut self) {
        if self.sent == self.begin {
            (self.computed, self.released) = (self.sent, self.sent);
        }
    }

    /// The head of the next frame, of at most `rows_max` rows. Decided rows and those that pend
    /// never share a frame.
    pub(super) fn head(&self, rows_max: usize, has_tail: bool) -> RowsHead {
        let sent = self.sent;
        let tree = sent >= self.decided;
        let end = if tree { self.released } else { self.decided.min(self.released) };
        let rows = (end - sent).min(rows_max);
        let is_last_decided = self.decides && sent + rows == self.decided;
        RowsHead {
            first_id: self.next_id,
            count: u16::try_from(rows).expect("a frame holds few rows"),
            tree,
            decided: !tree,
            more: sent + rows < self.released || self.grows,
            want: match (tree || has_tail, is_last_decided) {
                (true, _) => Want::All,
                (false, true) => Want::Last,
                (false, false) => Want::None,
            },
            parent: match (sent, tree) {
                (_, true) => self.parents_of(1)[0],
                (0, false) => self.parent,
                (_, false) => self.next_id - 1,
            },
            commit: if sent == self.begin { self.commit } else { 0 },
        }
    }

    /// A frame with this head was sent. Returns the ids of the chunk's rows if that was the last of
    /// a chunk that leads to a token.
    pub(super) fn note_sent(&mut self, head: &RowsHead) -> Option<Range<u32>> {
        if self.sent == self.begin {
            self.commit = 0;
        }
        self.sent += usize::from(head.count);
        self.next_id = head.first_id + u32::from(head.count);
        self.sent_id = self.next_id - 1;
        let is_whole = self.sent == self.released && !self.grows && self.decides;
        let rows = u32::try_from(self.sent - self.begin).expect("a chunk is small");
        is_whole.then(|| self.next_id - rows..self.next_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(out: &mut Outgoing, rows_max: usize) -> Vec<(u32, u16, bool, bool, u32)> {
        let mut frames = Vec::new();
        while out.has_released() {
            let head = out.head(rows_max, false);
            frames.push((head.first_id, head.count, head.tree, head.more, head.commit));
            out.note_sent(&head);
        }
        frames
    }

    #[test]
    fn a_level_leaves_when_it_is_released_and_promises_the_next() {
        let mut out = Outgoing { commit: 7, ..Outgoing::default() };
        out.begin_decided(&(8..9), 7, true);
        out.computed = 3;
        out.parents.extend([8, 8]);
        assert_eq!(frames(&mut out, 9), [], "what is computed may not leave yet");
        assert!(!out.is_sent());
        out.release(true);
        assert_eq!(frames(&mut out, 9), [(8, 1, false, true, 7), (9, 2, true, true, 0)]);
        out.computed = 4;
        out.parents.push(9);
        out.release(false);
        assert_eq!(frames(&mut out, 9), [(11, 1, true, false, 0)]);
        assert!(out.is_sent() && out.sent_id == 11);
    }

    #[test]
    fn a_chunk_of_which_the_cloud_has_heard_goes_up_whole() {
        let mut out = Outgoing::default();
        out.keep_sent(2);
        out.begin_pending(2, 20);
        out.computed = 6;
        out.parents.extend([18, 20, 21, 22]);
        out.release(false);
        let head = out.head(1, false);
        out.note_sent(&head);
        out.drop_unheard();
        assert_eq!(frames(&mut out, 2), [(21, 2, true, true, 0), (23, 1, true, false, 0)]);
        out.begin_pending(6, 24);
        out.computed = 8;
        out.release(false);
        out.drop_unheard();
        assert!(out.is_sent() && !out.has_released(), "nobody has heard of these");
    }

    #[test]
    fn the_last_frame_of_a_chunk_that_decides_tells_its_rows() {
        let mut out = Outgoing::default();
        out.begin_decided(&(1..6), 0, true);
        out.computed = 5;
        out.release(false);
        let first = out.head(3, false);
        assert_eq!(out.note_sent(&first), None);
        let last = out.head(3, false);
        assert_eq!((last.count, last.want), (2, Want::Last));
        assert_eq!(out.note_sent(&last), Some(1..6));
    }
}
