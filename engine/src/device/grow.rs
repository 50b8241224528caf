//! A draft tree as it grows: guesses, the rows that they need, and what those rows make the
//! trained drafter guess next.
//!
//! A tree goes up level by level, each while the next one is computed. Once it is away, requests
//! that stream add to it, below what is likely or, as verdicts come, below where the walk stands.

use std::io;
use std::ops::Range;

use super::active::{Active, Round};
use super::compute::first_not_finite;
use super::run::Device;
use crate::draft::lookup::BRANCHES_MAX;
use crate::draft::{BUDGET_DEFAULT, CHAIN_MAX, DraftMode};
use crate::error::RequestError;
use crate::sequence::PENDING_ROWS_MAX;

/// Nodes that are computed together: more is fewer steps, less is a better choice of nodes.
const LEVEL_NODES: usize = 8;
/// Nodes that are added to a tree at a time once it is away: they make a step of their own.
const WAVE_NODES: usize = 2 * LEVEL_NODES;

/// How far a tree may grow.
#[derive(Clone, Copy)]
struct Bounds {
    nodes_max: usize,
    /// Probability of a node at least.
    floor: f32,
    /// Whether it is cut to what pays in a round that waits for it.
    as_it_pays: bool,
}

impl Device {
    /// Begins a draft tree below the last decided token of a request with what lookup guesses.
    /// Says whether there is, or may become, a tree.
    pub(super) fn draft(&mut self, index: usize) -> bool {
        let now = self.start.shared.clock.now();
        let active = &mut self.actives[index];
        let tokens = active.answer.tokens().len();
        active.round_now = Some(Round { began: now, tokens, asked: false, drafting: 0.0 });
        active.held_back.clear();
        active.drafts.clear();
        let root = *active.tokens.last().expect("a prompt has a token");
        let (mode, depth_max) = (active.draft_mode(), active.depth_max());
        if mode == DraftMode::Off || depth_max == 0 {
            return false;
        }
        active.drafts.tree.reset(root, depth_max);
        self.look_up(index);
        let asks = self.start.trained.is_some() && mode.asks_trained();
        let active = &mut self.actives[index];
        let is_worth_it = mode != DraftMode::Auto || active.asking.is_worth_it();
        if let Some(round) = &mut active.round_now {
            round.asked = asks && is_worth_it && active.trained.is_some();
        }
        if self.asks(index) && self.rows_max(index) > 1 {
            return true;
        }
        self.grow(index, self.first_bounds(index));
        self.note_drafting(index, now);
        self.actives[index].drafts.tree.nodes().len() > 1
    }

    /// Offers what stood after the same words before.
    fn look_up(&mut self, index: usize) {
        let active = &mut self.actives[index];
        let branches = if active.draft_mode() == DraftMode::Lookup { 1 } else { BRANCHES_MAX };
        let (tree, acceptance) = (&mut active.drafts.tree, &self.acceptance);
        if let Some(lookup) = &active.lookup {
            lookup.propose(
                branches,
                |source| acceptance.rate(source),
                |branch| tree.offer(0, branch.iter().copied()),
            );
        }
    }

    /// Rows of one round at most.
    fn rows_max(&self, index: usize) -> usize {
        let nodes = match self.actives[index].draft_mode() {
            DraftMode::Chain => CHAIN_MAX,
            _ => BUDGET_DEFAULT,
        };
        self.pending_max().min(nodes + 1)
    }

    fn first_bounds(&self, index: usize) -> Bounds {
        let as_it_pays = self.actives[index].draft_mode() == DraftMode::Auto;
        Bounds { nodes_max: self.rows_max(index), floor: 0.0, as_it_pays }
    }

    /// Rows that may pend in the cloud, or run in one step there.
    fn pending_max(&self) -> usize {
        PENDING_ROWS_MAX
            .min(self.peer_pending_max)
            .min(self.peer_rows_max as usize)
            .min(self.start.config.limits.step_rows_max as usize)
    }

    /// Grows the tree as far as it may.
    fn grow(&mut self, index: usize, bounds: Bounds) -> Range<usize> {
        let active = &mut self.actives[index];
        let tree = &mut active.drafts.tree;
        let mut grown = tree.grow(bounds.nodes_max, bounds.floor);
        if bounds.as_it_pays {
            let drafting = active.round_now.map_or(0.0, |round| round.drafting);
            let probabilities = tree.nodes().iter().skip(1).map(|node| node.probability);
            let pay = self.costs.drafts_that_pay(probabilities, drafting);
            let end = (1 + pay).max(grown.start);
            active.held_back.clear();
            let held_back = tree.nodes().iter().skip(end).filter(|node| node.depth == 1);
            active.held_back.extend(held_back.filter_map(|node| Some((node.token, node.source?))));
            if end < grown.end {
                tree.truncate(end);
                grown.end = end;
            }
        }
        grown
    }

    /// Computes the rows of the tree: the decided token's, and those of the drafts below it, as
    /// long as the trained drafter has better ones to add.
    pub(super) fn compute_tree(&mut self, index: usize) -> io::Result<()> {
        let began = self.start.shared.clock.now();
        let active = &mut self.actives[index];
        let position = active.computed();
        let (root_id, tip) = (active.sequence.last_id() + 1, active.sequence.tip());
        active.set_unsent(root_id, tip, 1, true);
        active.unsent.count = 0;
        active.unfed = position..position + 1;
        let nodes = 0..active.drafts.tree.nodes().len();
        self.compute_growing(index, nodes, self.first_bounds(index))?;
        self.note_drafting(index, began);
        if self.actives[index].unsent.count == 0 {
            self.fail(index, RequestError::NotFinite { position });
        }
        Ok(())
    }

    /// Adds drafts to a tree that is away, or finds that none pay.
    pub(super) fn draft_more(&mut self, index: usize) -> io::Result<()> {
        let began = self.start.shared.clock.now();
        self.follow_walk(index);
        let active = &mut self.actives[index];
        let (mode, away) = (active.draft_mode(), active.sequence.pending());
        let nodes = active.drafts.tree.nodes().len();
        let (wave, floor) = match mode {
            DraftMode::All => (WAVE_NODES, 0.0),
            _ => match active.timed {
                Some(timed) if self.costs.is_due(began, timed.at, timed.rows) => (0, 0.0),
                _ => self.costs.wave(WAVE_NODES),
            },
        };
        active.drafts.is_full = true;
        let nodes_max = nodes + wave.min(self.pending_max().saturating_sub(away));
        if nodes_max == nodes {
            return Ok(());
        }
        let bounds = Bounds { nodes_max, floor, as_it_pays: false };
        let active = &mut self.actives[index];
        active.unsent.begin = nodes;
        active.unsent.decided = 0;
        active.unsent.next_id = active.sequence.last_id() + 1;
        active.unsent.parents.clear();
        active.walk.begin_wave();
        self.ask(index);
        let new = self.grow(index, bounds);
        if !new.is_empty() {
            self.actives[index].drafts.is_full = false;
            self.compute_growing(index, new, bounds)?;
            let took = self.start.shared.clock.now().duration_since(began);
            self.costs.wave.note(took.as_secs_f64());
        }
        self.note_drafting(index, began);
        Ok(())
    }

    /// The walk stands further down the tree, before a row that is away: what it has passed is
    /// decided and committed, and the tree begins there.
    fn follow_walk(&mut self, index: usize) {
        let at = self.actives[index].walk.at();
        let Some(at) = at.filter(|at| self.actives[index].drafts.ids[0] != *at) else { return };
        self.feed_trained(index);
        let end = self.actives[index].tokens.len();
        self.feed_path(index, end);
        self.commit(index, at);
        let hidden_size = self.start.facts.hidden_size;
        let active = &mut self.actives[index];
        let depth_max = active.depth_max();
        let drafts = &mut active.drafts;
        let node = drafts.ids.iter().position(|id| *id == at).expect("the walk is in the tree");
        drafts.tree.reroot(node, depth_max, &mut self.kept);
        for (new, old) in self.kept.iter().enumerate() {
            drafts.ids[new] = drafts.ids[*old];
            let row = old * hidden_size..(old + 1) * hidden_size;
            active.unsent.hidden.copy_within(row, new * hidden_size);
        }
        drafts.ids.truncate(self.kept.len());
        drafts.asked = 0;
        active.unsent.begin = self.kept.len();
        active.unsent.sent = self.kept.len();
        active.unsent.count = self.kept.len();
        active.walk.begin_here();
        self.look_up(index);
    }

    /// Computes the rows of `nodes`, the tree's last; asks the trained drafter what may follow,
    /// and goes on with the nodes that grow from it.
    fn compute_growing(
        &mut self,
        index: usize,
        mut nodes: Range<usize>,
        bounds: Bounds,
    ) -> io::Result<()> {
        // What is added to a tree goes up at once, or not at all.
        let goes_ahead = nodes.start == 0;
        self.actives[index].unsent.grows = goes_ahead;
        while self.compute_nodes(index, nodes.clone()) {
            self.note_drafts(index, nodes.clone());
            let end = nodes.end;
            if end >= bounds.nodes_max || !self.asks(index) {
                break;
            }
            self.ask(index);
            let level = match self.actives[index].draft_mode() {
                DraftMode::Chain => 1,
                _ if end < LEVEL_NODES => LEVEL_NODES / 2,
                _ => LEVEL_NODES,
            };
            let nodes_max = bounds.nodes_max.min(end + level);
            nodes = self.grow(index, Bounds { nodes_max, ..bounds });
            if nodes.is_empty() {
                break;
            }
            if goes_ahead {
                self.send_ahead(index)?;
            }
        }
        self.actives[index].unsent.grows = false;
        Ok(())
    }

    /// Computes the rows of `nodes`, the tree's last. A guess may be as wrong as it likes: if its
    /// row holds something that is no number, zeros go up instead, the walk never goes there, and
    /// the tree ends. Says whether it did not.
    fn compute_nodes(&mut self, index: usize, nodes: Range<usize>) -> bool {
        let Active { unsent, sequence, drafts, .. } = &mut self.actives[index];
        let first_id = sequence.last_id() + 1;
        drafts.ids.extend((first_id..).take(nodes.len()));
        self.plan.clear();
        if nodes.start == 0 {
            let place = sequence
                .append_committed(first_id, 1, unsent.parent)
                .expect("ids go on after the last one, and the session reserved all rows");
            self.plan.push_committed(place, 1);
        }
        let below = nodes.start.max(1)..nodes.end;
        if !below.is_empty() {
            let before = unsent.parents.len();
            let parents = drafts.tree.nodes()[below.clone()].iter();
            unsent.parents.extend(parents.map(|node| drafts.ids[node.parent]));
            sequence
                .append_pending(drafts.ids[below.start], &unsent.parents[before..])
                .expect("a tree fits what was reserved for it");
        }
        for node in below {
            let known = self.plan.push_pending(sequence, drafts.ids[node]);
            debug_assert!(known, "it was appended above");
        }
        self.plan.end_sequence(sequence);
        self.tokens.clear();
        self.tokens.extend(drafts.tree.nodes()[nodes.clone()].iter().map(|node| node.token));
        let hidden_size = self.start.facts.hidden_size;
        unsent.hidden.resize(nodes.end * hidden_size, 0.0);
        let hidden = &mut unsent.hidden[nodes.start * hidden_size..];
        let began = self.start.shared.clock.now();
        self.start.model.input(&self.plan.plan(), &self.tokens, hidden);
        let took = self.start.shared.clock.now().duration_since(began);
        self.costs.device.note(nodes.len(), took.as_secs_f64());
        unsent.count = nodes.end;
        let Some(bad) = first_not_finite(hidden, hidden_size) else { return true };
        let end = nodes.start + bad + 1;
        unsent.count = if end == 1 { 0 } else { end };
        hidden[bad * hidden_size..].fill(0.0);
        if end < nodes.end {
            sequence.retract(drafts.ids[end]);
        }
        drafts.ids.truncate(end);
        drafts.tree.end(end);
        drafts.is_full = true;
        self.note_drafts(index, nodes.start..end - 1);
        false
    }

    /// The rows of `nodes` are to be sent: they lead to tokens, and drafts are counted.
    fn note_drafts(&mut self, index: usize, nodes: Range<usize>) {
        let active = &mut self.actives[index];
        let round = active.round + 1;
        for node in nodes {
            let id = active.drafts.ids[node];
            let node = active.drafts.tree.nodes()[node];
            let parent = match node.source {
                Some(_) => active.drafts.ids[node.parent],
                None => active.unsent.parent,
            };
            active.walk.push(id, parent, node.token, node.source, round);
            if let Some(source) = node.source {
                active.meter.drafted(source.drafter.name());
            }
        }
    }

    /// Since `began` drafts were made for a request.
    fn note_drafting(&mut self, index: usize, began: std::time::Instant) {
        let took = self.start.shared.clock.now().duration_since(began);
        let active = &mut self.actives[index];
        active.meter.counts.drafting_ms += took.as_secs_f64() * 1e3;
        if let Some(round) = &mut active.round_now {
            round.drafting += took.as_secs_f64();
        }
    }
}
