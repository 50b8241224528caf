//! An open session: the rows that have gone up, those that have not, and those that came back.

use std::ops::Range;
use std::time::Instant;

use super::outgoing::Outgoing;
use super::prompt::{Chunk, Sizing};
use super::request::Path;
use super::walk::Walk;
use crate::backend::{PAGE_SIZE, TokenId};
use crate::draft::{Source, Tree};
use crate::sequence::{PENDING_ROWS_MAX, Sequence};

/// The draft tree below the last decided token; its rows stand in [`Outgoing::hidden`].
#[derive(Default)]
pub(super) struct Drafts {
    /// Empty if the last decided token has no row, or one without drafts.
    pub(super) tree: Tree,
    /// Row ids of its nodes.
    pub(super) ids: Vec<u32>,
    /// Its leading nodes that the trained drafter was asked about.
    pub(super) asked: usize,
    /// Whether the last guess of a chain was not sure enough to go on below it.
    pub(super) is_unsure: bool,
    /// Whether nothing is to be added before the walk has moved.
    pub(super) is_full: bool,
    /// Guesses right below the last decided token that were not sent: they are tested all the
    /// same, so that a drafter that is not asked can become better.
    pub(super) held_back: Vec<(TokenId, Source)>,
}

impl Drafts {
    /// Forgets the tree, but not the guesses that were held back.
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
    /// When the last of them was sent.
    pub(super) at: Instant,
    /// Id of the first.
    pub(super) first_id: u32,
    /// How many there are.
    pub(super) rows: usize,
}

/// One round of decoding so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    /// When its first row was begun.
    pub(super) began: Instant,
    /// Tokens of the answer before it.
    pub(super) tokens: usize,
    /// Whether the trained drafter is asked in it.
    pub(super) asked: bool,
    /// Seconds spent on drafts and their rows.
    pub(super) drafting: f64,
}

/// A session in the cloud, and everything that is lost with it.
pub(super) struct OpenSession {
    /// Its id on the wire; a new one at each opening.
    pub(super) wire_id: u32,
    /// Rows that the cloud held when the session opened: they are not sent.
    pub(super) held: u32,
    /// The chunk of decided rows at hand.
    pub(super) chunk: Chunk,
    /// Chunks of the prompt that are on their way.
    pub(super) sizing: Sizing,
    pub(super) outgoing: Outgoing,
    pub(super) walk: Walk,
    pub(super) drafts: Drafts,
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
}

impl OpenSession {
    /// A session that the cloud opened behind `held` rows.
    pub(super) fn new(wire_id: u32, held: u32) -> Self {
        Self {
            wire_id,
            held,
            chunk: Chunk::default(),
            sizing: Sizing::default(),
            outgoing: Outgoing::default(),
            walk: Walk::default(),
            drafts: Drafts::default(),
            round: None,
            timed: None,
            due: 1..1,
            told_id: 0,
            unfed: 0..0,
            deep: Vec::new(),
        }
    }

    /// Decided rows are to be sent: their outputs are due.
    pub(super) fn expect_decided(&mut self, ids: Range<u32>) {
        if self.due.is_empty() {
            self.due = ids.start..ids.start;
        }
        self.due.end = ids.end;
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
        assert!((self.held as usize).is_multiple_of(PAGE_SIZE), "{} rows are held", self.held);
        assert!(self.due.start <= self.due.end && self.due.end <= kv.last_id() + 1);
        assert!(self.told_id <= out.sent_id, "COMPUTED told of row {}", self.told_id);
        assert!(self.drafts.ids.is_sorted(), "{:?}", self.drafts.ids);
        assert!(self.drafts.ids.len() <= self.drafts.tree.nodes().len());
        assert!(self.chunk.left == 0 || self.walk.is_over(), "a token of half a chunk");
        assert!(
            !out.grows || self.chunk.left > 0 || !self.drafts.ids.is_empty(),
            "MORE of nothing"
        );
        self.walk.check(kv);
    }
}
