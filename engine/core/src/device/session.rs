//! An open session: the rows that have gone up, those that have not, and those that came back.

use std::ops::Range;
use std::time::Instant;

use super::outgoing::Outgoing;
use super::prompt::Chunk;
use super::request::Path;
use super::tree::TreePhase;
use super::verifier::Verifier;
use super::verify::Tail;
use crate::chunk::Ahead;
use crate::draft::{Source, Tree};
use crate::sequence::{PENDING_ROWS_MAX, Sequence};
use hat_plan::{PAGE_SIZE, TokenId};

/// The draft tree below the last decided token; its rows stand in [`Outgoing::hidden`].
#[derive(Default)]
pub(super) struct Drafts {
    /// Empty if the last decided token has no row, or one without drafts.
    pub(super) tree: Tree,
    /// Row ids of its nodes.
    pub(super) ids: Vec<u32>,
    /// Its leading nodes that the trained drafter was asked about.
    pub(super) asked: usize,
    /// True if the last token of a chain was not probable enough to go on below it.
    pub(super) is_unsure: bool,
    /// True if nothing is to be added before the next verdict.
    pub(super) is_full: bool,
    /// Drafts right below the last decided token that were not sent: they are tested all the
    /// same, so that a drafter that is not asked can become better.
    pub(super) withheld: Vec<(TokenId, Source)>,
}

impl Drafts {
    /// Forgets the tree, but not the drafts that were held back.
    pub(super) fn clear(&mut self) {
        self.tree.clear();
        self.ids.clear();
        self.asked = 0;
        self.is_unsure = false;
        self.is_full = false;
    }
}

/// Rows that were sent, whose way there and back is timed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timed {
    /// Time at which the last of them was sent.
    pub(super) at: Instant,
    /// Id of the first.
    pub(super) first_id: u32,
    /// Number of rows.
    pub(super) rows: usize,
}

/// One round of decoding so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    /// Time at which its first row was begun.
    pub(super) began: Instant,
    /// Tokens of the answer before it.
    pub(super) tokens: usize,
    /// True if the trained drafter is asked in it.
    pub(super) asked: bool,
    /// Seconds spent on drafts and their rows.
    pub(super) drafting: f64,
}

/// A session in the cloud, and everything that is lost with it.
#[derive(Default)]
pub(super) struct OpenSession {
    /// Its id on the wire; a new one at each opening.
    pub(super) wire_id: u32,
    /// Rows that the cloud held when the session opened: they are not sent.
    pub(super) cached: u32,
    /// The chunk of decided rows at hand.
    pub(super) chunk: Chunk,
    /// Work ahead of the prompt's next chunk, and the time at which it was measured.
    pub(super) ahead: Option<(Ahead, Instant)>,
    pub(super) outgoing: Outgoing,
    pub(super) verifier: Verifier,
    pub(super) drafts: Drafts,
    /// The next step of the tree, if it grows.
    pub(super) tree_phase: TreePhase,
    /// The round at hand; `None` before the first.
    pub(super) round: Option<Round>,
    /// Rows that lead to tokens; `None` if they are back, or can't be timed.
    pub(super) timed: Option<Timed>,
    /// Decided rows whose output has not come back; only the tail layers get all of them.
    pub(super) due: Range<u32>,
    /// The last row that COMPUTED told of.
    pub(super) told_id: u32,
    /// Positions whose shallow rows stand at the front of [`Outgoing::hidden`], decided, and have
    /// not been looked at for the trained drafter.
    pub(super) unfed: Range<u32>,
    /// The deep row of the last visited position; empty if it is not known. `[hidden_size]`
    pub(super) deep: Vec<f32>,
    /// The last decided rows that came back for the tail layers.
    pub(super) tail: Tail,
}

impl OpenSession {
    /// A session that the cloud opened behind `cached` rows.
    pub(super) fn new(wire_id: u32, cached: u32) -> Self {
        Self { wire_id, cached, due: 1..1, ..Self::default() }
    }

    /// True if the trained drafter is asked in the round at hand.
    pub(super) fn asks(&self) -> bool {
        self.round.is_some_and(|round| round.asked)
    }

    /// Decided rows are to be sent: their outputs are due.
    pub(super) fn expect_decided(&mut self, ids: Range<u32>) {
        if self.due.is_empty() {
            self.due = ids.start..ids.start;
        }
        self.due.end = ids.end;
    }

    /// The row that END tells the cloud to keep the path to; 0 for none. If frames were dropped
    /// that had not left, the frame that told so may have been one of them, and so may the row: of
    /// rows that went up, only the last one of a whole answer is known to have arrived, since it is
    /// back.
    pub(super) fn last_commit(&self, tip: u32, dropped: bool, is_whole: bool) -> u32 {
        match (dropped, is_whole) {
            (false, _) => self.outgoing.commit,
            (true, true) => tip,
            (true, false) => 0,
        }
    }

    /// The invariants of an open session.
    ///
    /// # Panics
    /// If one does not hold.
    pub(super) fn check(&self, kv: &Sequence, path: &Path) {
        let out = &self.outgoing;
        assert!(out.sent <= out.released && out.released <= out.computed, "{out:?}");
        assert!(out.sent_id <= kv.last_id(), "row {} was sent and is not there", out.sent_id);
        assert!(kv.committed() <= path.rows(), "a row without a token is committed");
        assert!(kv.pending() <= PENDING_ROWS_MAX);
        assert!((self.cached as usize).is_multiple_of(PAGE_SIZE), "{} rows are held", self.cached);
        assert!(self.due.start <= self.due.end && self.due.end <= kv.last_id() + 1);
        assert!(self.told_id <= out.sent_id, "COMPUTED told of row {}", self.told_id);
        assert!(self.drafts.ids.is_sorted(), "{:?}", self.drafts.ids);
        assert!(self.drafts.ids.len() <= self.drafts.tree.nodes().len());
        assert!(self.chunk.left == 0 || self.verifier.is_over(), "a token of half a chunk");
        let grows = !matches!(self.tree_phase, TreePhase::Idle);
        assert!(!out.grows || self.chunk.left > 0 || grows, "MORE is promised, and nothing comes");
        self.verifier.check(kv);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A batch of drafts is queued below row 2, where verification stands; row 2 has not come back.
    #[test]
    fn end_names_no_row_that_may_never_have_left() {
        let mut kv = Sequence::new(vec![0, 1, 2, 3], 64);
        kv.append_committed(1, 1, 0).unwrap();
        kv.append_pending(2, [1]).unwrap();
        let mut open = OpenSession::new(7, 0);
        open.outgoing.commit = 2;
        kv.commit(2, &mut Vec::new()).unwrap();
        assert_eq!(open.last_commit(kv.tip(), false, false), 2, "all of it is on its way");
        assert_eq!(open.last_commit(kv.tip(), true, false), 0, "row 2 may have been dropped");
        open.outgoing.commit = 0;
        assert_eq!(open.last_commit(kv.tip(), true, true), 2, "its commit may have been dropped");
        assert_eq!(open.last_commit(kv.tip(), false, true), 0, "its commit is on its way");
    }
}
