//! Feeding of the trained drafter: decided rows in order, each once, and the nodes of a tree.

use std::ops::Range;

use super::context::Common;
use super::request::Path;
use super::session::OpenSession;
use crate::draft::DraftMode;
use crate::draft::drafter::{Decided, Drafted, Drafter, SessionId};
use crate::draft::gumbel::Draw;
use crate::draft::policy::Asking;
use crate::sequence::PENDING_ROWS_MAX;
use hat_plan::BackendFault;

/// A request's dealings with the trained drafter: they outlive its sessions in the cloud, since the
/// drafter takes each row once.
#[derive(Default)]
pub(super) struct Drafting {
    /// Its session with the drafter.
    pub(super) session: Option<SessionId>,
    /// True if the drafter holds rows of a tree.
    pub(super) has_rows: bool,
    /// Positions that the drafter has taken.
    pub(super) fed: u32,
    /// Tokens and time that asking it has brought.
    pub(super) asking: Asking,
    /// Rows of a tree that turned out right, for the drafter to take.
    right: RightRows,
}

/// Drafted rows that were decided, copied when verification passed them.
#[derive(Default)]
struct RightRows {
    /// True if there is a verdict on a tree that the drafter has not been told of.
    is_new: bool,
    positions: Range<usize>,
    shallow: Vec<f32>, // [positions, hidden_size]
    /// The deep rows of the positions before.
    deep: Vec<f32>, // [positions, hidden_size]
}

impl Drafting {
    /// A request that has a session with the drafter, or none.
    pub(super) fn new(session: Option<SessionId>) -> Self {
        Self { session, ..Self::default() }
    }

    /// True if there is a verdict on a tree that the drafter has not been told of.
    pub(super) fn has_verdict(&self) -> bool {
        self.right.is_new
    }

    /// Lets the trained drafter take the decided rows that it has not: the tree's that were right,
    /// then those at the front of the rows at hand.
    pub(super) fn feed(
        &mut self,
        drafter: Option<&mut Box<dyn Drafter>>,
        path: &Path,
        open: &mut OpenSession,
        hidden_size: usize,
    ) {
        let unfed = std::mem::take(&mut open.unfed);
        let (Some(drafter), Some(session)) = (drafter, self.session) else { return };
        let right = &mut self.right;
        if std::mem::take(&mut right.is_new) {
            if std::mem::take(&mut self.has_rows) {
                drafter.rollback(session);
            }
            let positions = std::mem::take(&mut right.positions);
            if !positions.is_empty() {
                let rows = Decided {
                    first: u32::try_from(positions.start).expect("within the context"),
                    tokens: &path.tokens[positions.clone()],
                    shallow: &right.shallow,
                    deep_before: Some(&right.deep),
                };
                drafter.commit(session, &rows);
                self.fed = u32::try_from(positions.end).expect("within the context");
            }
        }
        // A replay brings rows again that it has.
        let first = unfed.start.max(self.fed);
        if first >= unfed.end {
            return;
        }
        if std::mem::take(&mut self.has_rows) {
            drafter.rollback(session);
        }
        let skip = (first - unfed.start) as usize * hidden_size;
        let end = unfed.len() * hidden_size;
        let rows = Decided {
            first,
            tokens: &path.tokens[first as usize..unfed.end as usize],
            shallow: &open.outgoing.hidden[skip..end],
            deep_before: (end - skip == open.deep.len()).then_some(&open.deep),
        };
        drafter.commit(session, &rows);
        self.fed = unfed.end;
    }

    /// Offers what the trained drafter drafts below the nodes that it has not been asked about,
    /// and whose rows are computed.
    ///
    /// # Errors
    /// The drafter's backend did not compute.
    pub(super) fn propose(
        &mut self,
        drafter: Option<&mut Box<dyn Drafter>>,
        path: &Path,
        open: &mut OpenSession,
        request: &crate::request::Request,
        cx: &mut Common,
    ) -> Result<(), BackendFault> {
        let Some(drafter) = drafter.filter(|_| open.asks()) else { return Ok(()) };
        let hidden_size = cx.facts.hidden_size;
        self.feed(Some(&mut *drafter), path, open, hidden_size);
        let Some(session) = self.session else { return Ok(()) };
        let drafts = &mut open.drafts;
        let (first, end) = (drafts.asked, drafts.ids.len());
        if first == end {
            return Ok(());
        }
        let is_chain = request.draft == DraftMode::Chain;
        let rows = Drafted {
            draw: Draw::new(&request.sampler, request.choice),
            nodes: &drafts.tree.nodes()[..end],
            first,
            root_position: path.rows() - 1,
            shallow: &open.outgoing.hidden[first * hidden_size..end * hidden_size],
        };
        let proposals = &mut cx.scratch.proposals;
        proposals.clear();
        let width = if is_chain { 1 } else { cx.policy.width };
        drafter.propose(session, &rows, width, proposals);
        if let Some(fault) = drafter.fault() {
            proposals.clear();
            return Err(fault);
        }
        self.has_rows = true;
        drafts.asked = end;
        for (node, mut proposal) in proposals.drain(..) {
            assert!((first..end).contains(&node), "drafts are for nodes that were asked about");
            if is_chain {
                // The paper's rule: the first draft that is not sure enough is the last.
                if drafts.is_unsure {
                    continue;
                }
                drafts.is_unsure = proposal.probability < cx.policy.chain_probability_min;
                if drafts.is_unsure && !cx.policy.sends_unsure {
                    continue;
                }
            } else {
                proposal.probability = cx.learned.acceptance.corrected(&proposal);
            }
            drafts.tree.offer(node, [proposal]);
        }
        Ok(())
    }

    /// Verification has moved: copies the rows of the tree that were right, up to the row before
    /// which verification stands, or that it has visited last, whose position is `end - 1`. Keeps
    /// the deep row that the next drafts may read.
    ///
    /// The drafter has taken the root before: [`Drafting::feed`] runs before heads do.
    pub(super) fn keep_right_rows(
        &mut self,
        open: &mut OpenSession,
        end: usize,
        hidden_size: usize,
    ) {
        if self.session.is_none() {
            return;
        }
        debug_assert!(open.unfed.is_empty(), "the root comes before what hangs below it");
        let right = &mut self.right;
        debug_assert!(!right.is_new, "rows of one verdict are fed before the next");
        right.is_new = true;
        right.shallow.clear();
        right.deep.clear();
        let mut ids = [0; PENDING_ROWS_MAX];
        let mut count = 0;
        for row in open.verifier.path().filter(|row| row.source.is_some()) {
            (ids[count], count) = (row.id, count + 1);
        }
        let rows = open.verifier.path().map(|row| row.output());
        open.deep.clear();
        open.deep.extend(rows.clone().next().into_iter().flatten().flatten());
        right.positions = end - count..end;
        for id in ids[..count].iter().rev() {
            let node = open.drafts.ids.binary_search(id).expect("verification is in the tree");
            let at = node * hidden_size;
            right.shallow.extend_from_slice(&open.outgoing.hidden[at..at + hidden_size]);
        }
        // The rows before them: the first of verification comes first, the last one is left out.
        for back in (1..=count).rev() {
            let before = rows.clone().nth(back).flatten();
            right.deep.extend_from_slice(before.expect("verification has passed it"));
        }
    }
}
