//! The seam of drafters that compute: small models over rows that the device has anyway.
//!
//! A trained drafter reads the device's own *shallow* rows (the output of the input submodel), and
//! may read the *deep* rows that came back for decided tokens, as they go into the final norm. It
//! keeps KV of its own. For each session the device calls, in this order:
//!
//! 1. [`Drafter::commit`] with rows of the decided path: the prompt's, then each round's. Each
//!    position once, in order, also over reconnects.
//! 2. [`Drafter::propose`] for node 0 of a new tree, which is the last committed row; then, as the
//!    tree grows level by level, for the nodes whose shallow rows were computed since.
//! 3. [`Drafter::rollback`] when the verdict is there: the tree's rows are stale. What was right
//!    comes again as step 1, now with deep rows.

use std::ops::Range;

use hat_plan::{ARITHMETIC_CPU, BackendFault, TokenId};

use super::gumbel::Draw;
use super::tree::{Node, Proposal};
use crate::prefix::PageId;

/// A session of a trained drafter.
pub type SessionId = u32;

/// Rows of the decided path, at the positions that follow those committed before.
#[derive(Clone, Copy, Debug)]
pub struct Decided<'a> {
    /// Position of the first.
    pub first: u32,
    /// Their tokens. `[rows]`
    pub tokens: &'a [TokenId],
    /// Their shallow rows. `[rows, hidden_size]`
    pub shallow: &'a [f32],
    /// The deep rows of the positions before each of them, `[rows, hidden_size]`; `None` where
    /// these did not come back: in a prompt.
    pub deep_before: Option<&'a [f32]>,
}

/// Nodes of a draft tree whose shallow rows are new.
#[derive(Clone, Copy, Debug)]
pub struct Drafted<'a> {
    /// All nodes so far; parents come first, and node 0 is the last committed row.
    pub nodes: &'a [Node],
    /// Index of the first new one; the new ones are the last.
    pub first: usize,
    /// Position of node 0; that of a node is as much greater as it is deep.
    pub root_position: u32,
    /// Shallow rows of the new ones. `[nodes.len() - first, hidden_size]`
    pub shallow: &'a [f32],
    /// Sampling of the tokens that follow; `None` if the likeliest token is taken.
    pub draw: Option<Draw<'a>>,
}

impl Drafted<'_> {
    /// Indices of the new nodes.
    #[must_use]
    pub fn new_nodes(&self) -> Range<usize> {
        self.first..self.nodes.len()
    }
}

/// A drafter that computes.
pub trait Drafter: Send {
    /// One line for people: what it reads, and what computes it.
    fn describe(&self) -> String;

    /// See [`hat_plan::Computes::arithmetic_id`].
    fn arithmetic_id(&self) -> u32 {
        ARITHMETIC_CPU
    }

    /// Fault of the drafter since the last call, if there was one; its state means nothing then.
    /// A fault that lasts is the answer from then on.
    fn fault(&mut self) -> Option<BackendFault> {
        None
    }

    /// Opens a session of at most `rows_max` positions; `None` if there is no room for it, and the
    /// request is drafted without.
    fn open(&mut self, rows_max: u32) -> Option<SessionId>;

    /// A session without rows begins behind those of these pages of its path, from the first on,
    /// that are kept from earlier sessions; returns how many these are.
    fn begin_behind(&mut self, _session: SessionId, _pages: &[PageId]) -> usize {
        0
    }

    /// These pages of a session's decided path may be kept for others.
    fn keep(&mut self, _session: SessionId, _pages: &[PageId]) {}

    /// Forgets all pages that it keeps.
    fn forget(&mut self) {}

    /// Ends a session.
    fn close(&mut self, session: SessionId);

    /// Takes rows of the decided path.
    fn commit(&mut self, session: SessionId, rows: &Decided<'_>);

    /// Drafts what follows each of the new nodes, at most `width` tokens each: index of the node,
    /// and a draft with its probability, into `proposals`. [`Drafter::fault`] is asked after that.
    fn propose(
        &mut self,
        session: SessionId,
        rows: &Drafted<'_>,
        width: usize,
        proposals: &mut Vec<(usize, Proposal)>,
    );

    /// Forgets the rows of the tree.
    fn rollback(&mut self, session: SessionId);
}
