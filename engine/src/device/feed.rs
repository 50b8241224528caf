//! What the trained drafter is told and asked: decided rows in order, each once, and the nodes of
//! a tree.

use super::active::Active;
use super::run::Device;
use crate::draft::foresee::Draw;
use crate::draft::trained::{Decided, Drafted};
use crate::draft::{CHAIN_PROBABILITY_MIN, DraftMode};
use crate::sequence::PENDING_ROWS_MAX;

/// Guesses of the trained drafter for one node.
const WIDTH: usize = 8;

impl Device {
    /// Whether the trained drafter is asked in this round.
    pub(super) fn asks(&self, index: usize) -> bool {
        self.actives[index].round_now.is_some_and(|round| round.asked)
    }

    /// Offers what the trained drafter guesses below the nodes that it has not been asked about;
    /// their rows are computed.
    pub(super) fn ask(&mut self, index: usize) {
        if !self.asks(index) {
            return;
        }
        self.feed_trained(index);
        let active = &mut self.actives[index];
        let (Some(trained), Some(session)) = (&mut self.start.trained, active.trained) else {
            return;
        };
        let hidden_size = self.start.facts.hidden_size;
        let drafts = &mut active.drafts;
        let (first, end) = (drafts.asked, drafts.ids.len());
        if first == end {
            return;
        }
        let request = &active.job.prepared.request;
        let is_chain = request.draft == DraftMode::Chain;
        let rows = Drafted {
            draw: Draw::new(&request.sampler, request.choice),
            nodes: &drafts.tree.nodes()[..end],
            first,
            root_position: active.sequence.committed() - 1,
            shallow: &active.unsent.hidden[first * hidden_size..end * hidden_size],
        };
        self.guesses.clear();
        trained.propose(session, &rows, if is_chain { 1 } else { WIDTH }, &mut self.guesses);
        if let Some(fault) = trained.fault() {
            return self.draft_without(&fault);
        }
        active.has_draft_rows = true;
        drafts.asked = end;
        for (node, mut guess) in self.guesses.drain(..) {
            assert!((first..end).contains(&node), "guesses are for nodes that were asked about");
            if is_chain {
                // The paper's rule: the first guess that is not sure enough is the last.
                if drafts.is_unsure {
                    continue;
                }
                drafts.is_unsure = guess.probability < CHAIN_PROBABILITY_MIN;
            } else {
                guess.probability = self.acceptance.corrected(&guess);
            }
            drafts.tree.offer(node, [guess]);
        }
    }

    /// Lets the trained drafter take decided rows that were just sent, while they are away. Says
    /// whether there were any.
    pub(super) fn feed_sent(&mut self) -> bool {
        let waits =
            |active: &Active| !active.unfed.is_empty() && active.unsent.sent == active.unsent.count;
        match self.actives.iter().position(waits) {
            Some(index) => self.feed_trained(index),
            None => false,
        }
    }

    /// Lets the trained drafter take the decided rows at the front of `unsent.hidden`, if it has
    /// not. Says whether it did.
    pub(super) fn feed_trained(&mut self, index: usize) -> bool {
        let active = &mut self.actives[index];
        let unfed = std::mem::take(&mut active.unfed);
        let (Some(trained), Some(session)) = (&mut self.start.trained, active.trained) else {
            return false;
        };
        // A replay brings rows again that it has.
        let first = unfed.start.max(active.fed);
        if first >= unfed.end {
            return false;
        }
        if std::mem::take(&mut active.has_draft_rows) {
            trained.rollback(session);
        }
        let hidden_size = self.start.facts.hidden_size;
        let skip = (first - unfed.start) as usize * hidden_size;
        let end = unfed.len() * hidden_size;
        trained.commit(
            session,
            &Decided {
                first,
                tokens: &active.tokens[first as usize..unfed.end as usize],
                shallow: &active.unsent.hidden[skip..end],
                deep_before: (end - skip == active.deep.len()).then_some(&active.deep),
            },
        );
        active.fed = unfed.end;
        true
    }

    /// The walk has moved: lets the trained drafter take what was right of the tree, up to the
    /// row before which the walk stands, or that it has visited last, whose position is `end - 1`.
    /// Keeps the deep row that the next guesses may read.
    pub(super) fn feed_path(&mut self, index: usize, end: usize) {
        let active = &mut self.actives[index];
        let (Some(trained), Some(session)) = (&mut self.start.trained, active.trained) else {
            return;
        };
        if std::mem::take(&mut active.has_draft_rows) {
            trained.rollback(session);
        }
        let hidden_size = self.start.facts.hidden_size;
        let Active { walk, unsent, drafts, tokens, .. } = active;
        self.shallow.clear();
        self.deep.clear();
        let mut ids = [0; PENDING_ROWS_MAX];
        let mut count = 0;
        for row in walk.path().filter(|row| row.source.is_some()) {
            (ids[count], count) = (row.id, count + 1);
        }
        let rows = walk.path().map(|row| row.output());
        active.deep.clear();
        active.deep.extend(rows.clone().next().into_iter().flatten().flatten());
        if count == 0 {
            return;
        }
        for id in ids[..count].iter().rev() {
            let node = drafts.ids.binary_search(id).expect("the walk is in the tree");
            let at = node * hidden_size;
            self.shallow.extend_from_slice(&unsent.hidden[at..at + hidden_size]);
        }
        // The rows before them: the first of the walk comes first, the last one is left out.
        for back in (1..=count).rev() {
            let before = rows.clone().nth(back).flatten();
            self.deep.extend_from_slice(before.expect("the walk has been there"));
        }
        let first = end - count;
        trained.commit(
            session,
            &Decided {
                first: u32::try_from(first).expect("within the context"),
                tokens: &tokens[first..end],
                shallow: &self.shallow,
                deep_before: Some(&self.deep),
            },
        );
        active.fed = u32::try_from(end).expect("within the context");
    }
}
