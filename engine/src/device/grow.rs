//! A draft tree as it grows: guesses, the rows that they need, and what those rows make the
//! trained drafter guess next.

use std::ops::Range;

use super::active::Active;
use super::compute::first_not_finite;
use super::run::Device;
use crate::Error;
use crate::draft::lookup::BRANCHES_MAX;
use crate::draft::trained::{Decided, Drafted, SessionId};
use crate::draft::{BUDGET_DEFAULT, DraftMode};
use crate::sequence::PENDING_ROWS_MAX;

/// Guesses of the trained drafter for one node.
const WIDTH: usize = 4;
/// Nodes that are computed together: more is fewer steps, less is a better choice of nodes.
const LEVEL_NODES: usize = 8;

impl Device {
    /// Begins a draft tree below the last decided token of a request, in `self.tree`, with what
    /// lookup guesses. Says whether there is, or may become, a tree.
    pub(super) fn draft(&mut self, index: usize) -> bool {
        let active = &mut self.actives[index];
        let root = *active.tokens.last().expect("a prompt has a token");
        // The last token of the answer needs no row, and so no row may lead beyond it.
        let depth_max = active.job.prepared.rows_max() - 1 - active.rows();
        self.tree.reset(root, depth_max);
        active.held_back.clear();
        let began = self.start.shared.clock.now();
        let mode = active.job.prepared.request.draft;
        if mode == DraftMode::Off || depth_max == 0 {
            return false;
        }
        let branches = if mode == DraftMode::Lookup { 1 } else { BRANCHES_MAX };
        let (tree, acceptance) = (&mut self.tree, &self.acceptance);
        if let Some(lookup) = &active.lookup {
            lookup.propose(
                branches,
                |source| acceptance.rate(source),
                |branch| tree.offer(0, branch.iter().copied()),
            );
        }
        let trains = mode != DraftMode::Lookup && self.start.trained.is_some();
        if trains && self.rows_max() > 1 {
            return true;
        }
        self.grow(index, self.rows_max());
        let took = self.start.shared.clock.now().duration_since(began);
        self.costs.draft.note(took.as_secs_f64());
        self.tree.nodes().len() > 1
    }

    /// Rows of one round at most.
    fn rows_max(&self) -> usize {
        PENDING_ROWS_MAX
            .min(self.peer_pending_max)
            .min(self.peer_rows_max as usize)
            .min(self.start.config.limits.step_rows_max as usize)
            .min(BUDGET_DEFAULT + 1)
    }

    /// Grows the tree to at most `rows_max` nodes, or to as many as pay.
    fn grow(&mut self, index: usize, rows_max: usize) -> Range<usize> {
        let active = &mut self.actives[index];
        let mut grown = self.tree.grow(rows_max, 0.0);
        if active.job.prepared.request.draft == DraftMode::Auto {
            let probabilities = self.tree.nodes().iter().skip(1).map(|node| node.probability);
            let end = (1 + self.costs.drafts_that_pay(probabilities)).max(grown.start);
            let held_back = self.tree.nodes().iter().skip(end).filter(|node| node.depth == 1);
            active.held_back.extend(held_back.filter_map(|node| Some((node.token, node.source?))));
            if end < grown.end {
                self.tree.truncate(end);
                grown.end = end;
            }
        }
        grown
    }

    /// Computes the rows of `self.tree`: the decided token's, and those of the drafts below it, as
    /// long as the trained drafter has better ones to add.
    pub(super) fn compute_tree(&mut self, index: usize) {
        let active = &mut self.actives[index];
        let position = active.computed();
        let (root_id, tip) = (active.sequence.last_id() + 1, active.sequence.tip());
        active.unsent.parents.clear();
        active.set_unsent(root_id, tip, 1, true);
        active.unsent.count = 0;
        active.unfed = position..position + 1;
        let mode = active.job.prepared.request.draft;
        let session = if mode == DraftMode::Lookup { None } else { active.trained };
        let rows_max = self.rows_max();
        let mut nodes = 0..self.tree.nodes().len();
        while self.compute_nodes(index, nodes.clone()) {
            let end = nodes.end;
            let Some(session) = session.filter(|_| end < rows_max) else { break };
            self.propose(index, session, nodes);
            nodes = self.grow(index, rows_max.min(end + self.level_nodes(index)));
            if nodes.is_empty() {
                break;
            }
        }
        if self.actives[index].unsent.count == 0 {
            return self.fail(index, Error::NotFinite { position });
        }
        self.note_drafts(index, tip);
    }

    /// Nodes that are computed together.
    fn level_nodes(&self, index: usize) -> usize {
        match self.actives[index].job.prepared.request.draft {
            DraftMode::Chain => 1,
            _ => LEVEL_NODES,
        }
    }

    /// Computes the rows of `nodes`, the tree's last. A guess may be as wrong as it likes: if its
    /// row holds something that is no number, the tree ends before it. Says whether it did not.
    fn compute_nodes(&mut self, index: usize, nodes: Range<usize>) -> bool {
        let Active { unsent, sequence, .. } = &mut self.actives[index];
        let (first_id, tip) = (unsent.first_id, unsent.parent);
        let id = |node: usize| first_id + u32::try_from(node).expect("a tree is small");
        self.plan.clear();
        if nodes.start == 0 {
            let place = sequence
                .append_committed(first_id, 1, tip)
                .expect("ids go on after the last one, and the session reserved all rows");
            self.plan.push_committed(place, 1);
        }
        let drafts = nodes.start.max(1)..nodes.end;
        if !drafts.is_empty() {
            let before = unsent.parents.len();
            let parents = self.tree.nodes()[drafts.clone()].iter().map(|node| id(node.parent));
            unsent.parents.extend(parents);
            sequence
                .append_pending(id(drafts.start), &unsent.parents[before..])
                .expect("a tree fits what was reserved for it");
        }
        for node in drafts {
            let known = self.plan.push_pending(sequence, id(node));
            debug_assert!(known, "it was appended above");
        }
        self.plan.end_sequence(sequence);
        self.tokens.clear();
        self.tokens.extend(self.tree.nodes()[nodes.clone()].iter().map(|node| node.token));
        let hidden_size = self.start.facts.hidden_size;
        unsent.hidden.resize(nodes.end * hidden_size, 0.0);
        let hidden = &mut unsent.hidden[nodes.start * hidden_size..];
        let began = self.start.shared.clock.now();
        self.start.model.input(&self.plan.plan(), &self.tokens, hidden);
        let took = self.start.shared.clock.now().duration_since(began);
        self.costs.device.note(nodes.len(), took.as_secs_f64());
        let bad = first_not_finite(hidden, hidden_size);
        unsent.count = bad.map_or(nodes.end, |row| nodes.start + row);
        if bad.is_some() {
            sequence.retract(id(unsent.count.max(1)));
            unsent.parents.truncate(unsent.count.saturating_sub(1));
            self.tree.truncate(unsent.count);
        }
        bad.is_none()
    }

    /// Offers what the trained drafter guesses below `nodes`, whose rows were just computed.
    fn propose(&mut self, index: usize, session: SessionId, nodes: Range<usize>) {
        if nodes.start == 0 {
            self.feed_trained(index);
        }
        let Some(trained) = &mut self.start.trained else { return };
        let active = &mut self.actives[index];
        let hidden_size = self.start.facts.hidden_size;
        let rows = Drafted {
            nodes: self.tree.nodes(),
            first: nodes.start,
            root_position: active.computed() - 1,
            shallow: &active.unsent.hidden[nodes.start * hidden_size..nodes.end * hidden_size],
        };
        let width = if active.job.prepared.request.draft == DraftMode::Chain { 1 } else { WIDTH };
        self.guesses.clear();
        trained.propose(session, &rows, width, &mut self.guesses);
        active.has_draft_rows = true;
        for (node, guess) in self.guesses.drain(..) {
            assert!(nodes.contains(&node), "guesses are for the nodes that were asked about");
            self.tree.offer(node, [guess]);
        }
    }

    /// The rows of the tree are to be sent: they lead to tokens, and drafts are counted.
    fn note_drafts(&mut self, index: usize, tip: u32) {
        let active = &mut self.actives[index];
        let first_id = active.unsent.first_id;
        let id = |node: usize| first_id + u32::try_from(node).expect("a tree is small");
        let round = active.round + 1;
        for (index, node) in self.tree.nodes().iter().enumerate() {
            let parent = if index == 0 { tip } else { id(node.parent) };
            active.walk.push(id(index), parent, node.token, node.source, round);
            if let Some(source) = node.source {
                active.meter.drafted(source.drafter.name());
            }
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

    /// The walk is over: lets the trained drafter take what was right of the tree, and keeps the
    /// deep row that the next root's guesses may read.
    pub(super) fn feed_path(&mut self, index: usize) {
        let active = &mut self.actives[index];
        let (Some(trained), Some(session)) = (&mut self.start.trained, active.trained) else {
            return;
        };
        if std::mem::take(&mut active.has_draft_rows) {
            trained.rollback(session);
        }
        let hidden_size = self.start.facts.hidden_size;
        let Active { walk, unsent, tokens, .. } = active;
        self.shallow.clear();
        self.deep.clear();
        let mut ids = [0; PENDING_ROWS_MAX];
        let mut drafts = 0;
        for row in walk.path().filter(|row| row.source.is_some()) {
            (ids[drafts], drafts) = (row.id, drafts + 1);
        }
        let rows = walk.path().map(|row| row.output().expect("the walk has been there"));
        active.deep.clear();
        active.deep.extend(rows.clone().next().into_iter().flatten());
        if drafts == 0 {
            return;
        }
        for id in ids[..drafts].iter().rev() {
            let at = (id - unsent.first_id) as usize * hidden_size;
            self.shallow.extend_from_slice(&unsent.hidden[at..at + hidden_size]);
        }
        // The rows before them: the root first, and not the last one.
        for back in (1..=drafts).rev() {
            self.deep.extend(rows.clone().nth(back).into_iter().flatten());
        }
        let end = tokens.len() - 1; // the last decided token has no row yet
        let first = end - drafts;
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
