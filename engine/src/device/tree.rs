//! A draft tree as it grows: guesses, the rows that they need, and what those rows make the
//! trained drafter guess next.
//!
//! A tree goes up level by level, each while the next one is computed. Once it is away, requests
//! that stream add to it, below what is likely or, as verdicts come, below where the walk stands.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::common::Common;
use super::prompt::first_not_finite;
use super::request::Request;
use super::session::Round;
use crate::draft::lookup::BRANCHES_MAX;
use crate::draft::{BUDGET_DEFAULT, CHAIN_MAX, DraftMode};
use crate::error::RequestError;

/// Nodes that are computed together: more is fewer steps, less is a better choice of nodes.
const LEVEL_NODES: usize = 8;
/// Nodes that are added to a tree at a time once it is away: they make a step of their own.
const WAVE_NODES: usize = 2 * LEVEL_NODES;

/// How far a tree may grow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    nodes_max: usize,
    /// Probability of a node at least.
    floor: f32,
    /// Whether it is cut to what pays in a round that waits for it.
    as_it_pays: bool,
}

/// Nodes of a tree that are computed next, and how far it may grow beyond.
#[derive(Clone, Debug)]
pub(super) struct Level {
    pub(super) nodes: Range<usize>,
    bounds: Bounds,
}

impl Level {
    /// Whether rows leave as soon as the level behind them is certain: those of a tree that is
    /// begun do. Rows that are added to a tree go up together, or not at all.
    fn goes_ahead(&self) -> bool {
        self.nodes.start == 0
    }
}

/// The next thing to do for a tree whose level is computed.
pub(super) enum Growth {
    /// The trained drafter may say what follows.
    MayGrow,
    /// It is whole: what is computed may leave.
    Whole,
}

impl Request {
    /// Begins a draft tree below the last decided token with what lookup guesses. Returns its first
    /// level, the decided token's own row included; `None` if there neither is nor may become a
    /// tree.
    pub(super) fn begin_tree(
        &mut self,
        now: Instant,
        has_drafter: bool,
        cx: &Common,
    ) -> Option<Level> {
        let (mode, depth_max) = (self.draft_mode(), self.depth_max());
        let tokens = self.answer.tokens().len();
        let root = *self.path.tokens.last().expect("a prompt has a token");
        let open = self.session.open_mut()?;
        open.round = Some(Round { began: now, tokens, asked: false, drafting: 0.0 });
        open.drafts.held_back.clear();
        open.drafts.clear();
        if mode == DraftMode::Off || depth_max == 0 {
            return None;
        }
        open.drafts.tree.reset(root, depth_max);
        self.look_up(cx);
        let is_worth_it = mode != DraftMode::Auto || self.drafting.asking.is_worth_it();
        let asked = has_drafter && mode.asks_trained() && self.drafting.session.is_some();
        if let Some(round) = self.session.open_mut().and_then(|open| open.round.as_mut()) {
            round.asked = asked && is_worth_it;
        }
        let bounds = self.first_bounds(cx);
        if !(self.asks() && bounds.nodes_max > 1) {
            self.grow(bounds, cx);
            if self.session.open()?.drafts.tree.nodes().len() == 1 {
                return None;
            }
        }
        let nodes = 0..self.session.open()?.drafts.tree.nodes().len();
        Some(Level { nodes, bounds })
    }

    /// Offers what stood after the same words before.
    fn look_up(&mut self, cx: &Common) {
        let branches = if self.draft_mode() == DraftMode::Lookup { 1 } else { BRANCHES_MAX };
        let (Some(open), Some(lookup)) = (self.session.open_mut(), &self.path.lookup) else {
            return;
        };
        lookup.propose(
            branches,
            |source| cx.learned.acceptance.rate(source),
            |branch| open.drafts.tree.offer(0, branch.iter().copied()),
        );
    }

    /// Bounds of a tree that is begun.
    fn first_bounds(&self, cx: &Common) -> Bounds {
        let mode = self.draft_mode();
        let nodes = if mode == DraftMode::Chain { CHAIN_MAX } else { BUDGET_DEFAULT };
        let nodes_max = cx.pending_max().min(nodes + 1);
        Bounds { nodes_max, floor: 0.0, as_it_pays: mode == DraftMode::Auto }
    }

    /// Grows the tree as far as it may.
    fn grow(&mut self, bounds: Bounds, cx: &Common) -> Range<usize> {
        let Some(open) = self.session.open_mut() else { return 0..0 };
        let tree = &mut open.drafts.tree;
        let mut grown = tree.grow(bounds.nodes_max, bounds.floor);
        if bounds.as_it_pays {
            let drafting = open.round.map_or(0.0, |round| round.drafting);
            let probabilities = tree.nodes().iter().skip(1).map(|node| node.probability);
            let pay = cx.learned.costs.drafts_that_pay(probabilities, drafting);
            let end = (1 + pay).max(grown.start);
            let held_back = tree.nodes().iter().skip(end).filter(|node| node.depth == 1);
            open.drafts.held_back.clear();
            open.drafts
                .held_back
                .extend(held_back.filter_map(|node| Some((node.token, node.source?))));
            if end < grown.end {
                tree.truncate(end);
                grown.end = end;
            }
        }
        grown
    }

    /// Begins an addition to a tree that is away. Returns whether one is worth asking for; what is
    /// there to add is for [`Request::grow_wave`] to say.
    pub(super) fn begin_wave(&mut self, now: Instant, cx: &Common) -> Option<Bounds> {
        let mode = self.draft_mode();
        let (away, first_id) = (self.kv.pending(), self.kv.last_id() + 1);
        let open = self.session.open_mut()?;
        let nodes = open.drafts.tree.nodes().len();
        let (wave, floor) = match mode {
            DraftMode::All => (WAVE_NODES, 0.0),
            _ if cx.learned.is_due(now, open.timed) => (0, 0.0),
            _ => cx.learned.costs.wave(WAVE_NODES),
        };
        open.drafts.is_full = true;
        let nodes_max = nodes + wave.min(cx.pending_max().saturating_sub(away));
        if nodes_max == nodes {
            return None;
        }
        open.outgoing.begin_pending(nodes, first_id);
        open.walk.begin_wave();
        Some(Bounds { nodes_max, floor, as_it_pays: false })
    }

    /// The first level of an addition, if there is anything to add.
    pub(super) fn grow_wave(&mut self, bounds: Bounds, cx: &Common) -> Option<Level> {
        let nodes = self.grow(bounds, cx);
        if nodes.is_empty() {
            return None;
        }
        self.session.open_mut()?.drafts.is_full = false;
        Some(Level { nodes, bounds })
    }

    /// The walk stands further down the tree, before a row that is away: what it has passed is
    /// decided and committed, and the tree begins there.
    pub(super) fn follow_walk(&mut self, cx: &mut Common) {
        let Some(open) = self.session.open() else { return };
        let Some(at) = open.walk.at().filter(|at| open.drafts.ids[0] != *at) else { return };
        self.keep_right_rows(self.path.tokens.len(), cx);
        self.commit(at, cx);
        let depth_max = self.depth_max();
        let hidden_size = cx.facts.hidden_size;
        let Some(open) = self.session.open_mut() else { return };
        let (drafts, out) = (&mut open.drafts, &mut open.outgoing);
        let node = drafts.ids.iter().position(|id| *id == at).expect("the walk is in the tree");
        let kept = &mut cx.scratch.kept;
        drafts.tree.reroot(node, depth_max, kept);
        for (new, old) in kept.iter().enumerate() {
            drafts.ids[new] = drafts.ids[*old];
            let row = old * hidden_size..(old + 1) * hidden_size;
            out.hidden.copy_within(row, new * hidden_size);
        }
        drafts.ids.truncate(kept.len());
        drafts.asked = 0;
        out.keep_sent(kept.len());
        open.walk.begin_here();
        self.look_up(cx);
    }

    /// Takes the rows of a level in, and plans their computation: of `scratch.tokens`, into
    /// [`Request::rows_mut`].
    pub(super) fn begin_level(&mut self, level: &Level, cx: &mut Common) {
        let Level { nodes, .. } = level;
        let first_id = self.kv.last_id() + 1;
        let (tip, position) = (self.kv.tip(), self.kv.committed());
        let Some(open) = self.session.open_mut() else { return };
        let (drafts, out, scratch) = (&mut open.drafts, &mut open.outgoing, &mut cx.scratch);
        drafts.ids.extend((first_id..).take(nodes.len()));
        scratch.plan.clear();
        if nodes.start == 0 {
            let ids = first_id..first_id + 1;
            out.begin_decided(&ids, tip, true);
            open.due = if open.due.is_empty() { ids.clone() } else { open.due.start..ids.end };
            open.unfed = position..position + 1;
            let place = self
                .kv
                .append_committed(first_id, 1, tip)
                .expect("ids go on after the last one, and the session reserved all rows");
            scratch.plan.push_committed(place, 1);
        }
        out.grows |= level.goes_ahead();
        let below = nodes.start.max(1)..nodes.end;
        if !below.is_empty() {
            let before = out.parents.len();
            let parents = drafts.tree.nodes()[below.clone()].iter();
            out.parents.extend(parents.map(|node| drafts.ids[node.parent]));
            self.kv
                .append_pending(drafts.ids[below.start], &out.parents[before..])
                .expect("a tree fits what was reserved for it");
        }
        for node in below {
            let known = scratch.plan.push_pending(&self.kv, drafts.ids[node]);
            debug_assert!(known, "it was appended above");
        }
        scratch.plan.end_sequence(&self.kv);
        scratch.tokens.clear();
        scratch.tokens.extend(drafts.tree.nodes()[nodes.clone()].iter().map(|node| node.token));
        out.hidden.resize(nodes.end * cx.facts.hidden_size, 0.0);
    }

    /// The rows of a level are computed. A guess may be as wrong as it likes: if its row holds
    /// something that is no number, zeros go up instead, the walk never goes there, and the tree
    /// ends.
    ///
    /// # Errors
    /// The decided token's own row is no number.
    pub(super) fn end_level(
        &mut self,
        level: &Level,
        took: Duration,
        cx: &mut Common,
    ) -> Result<Growth, RequestError> {
        let nodes = level.nodes.clone();
        let Some(open) = self.session.open_mut() else { return Ok(Growth::Whole) };
        cx.learned.note_input(nodes.len(), took, false);
        let (drafts, out) = (&mut open.drafts, &mut open.outgoing);
        let hidden = &mut out.hidden[nodes.start * cx.facts.hidden_size..];
        let Some(bad) = first_not_finite(hidden, cx.facts.hidden_size) else {
            out.computed = nodes.end;
            self.note_drafts(nodes.clone());
            let may_grow = nodes.end < level.bounds.nodes_max && self.asks();
            return Ok(if may_grow { Growth::MayGrow } else { Growth::Whole });
        };
        let end = nodes.start + bad + 1;
        if end == 1 {
            return Err(RequestError::NotFinite { position: self.kv.committed() - 1 });
        }
        out.computed = end;
        hidden[bad * cx.facts.hidden_size..].fill(0.0);
        if end < nodes.end {
            self.kv.retract(drafts.ids[end]);
        }
        drafts.ids.truncate(end);
        drafts.tree.end(end);
        drafts.is_full = true;
        self.note_drafts(nodes.start..end - 1);
        Ok(Growth::Whole)
    }

    /// The trained drafter has been asked about a level: the next one. With it the rows before may
    /// leave, since it is certain that more of their chunk follow.
    pub(super) fn next_level(&mut self, level: &Level, cx: &Common) -> Option<Level> {
        let (end, bounds) = (level.nodes.end, level.bounds);
        let nodes = match self.draft_mode() {
            DraftMode::Chain => 1,
            _ if end < LEVEL_NODES => LEVEL_NODES / 2,
            _ => LEVEL_NODES,
        };
        let nodes_max = bounds.nodes_max.min(end + nodes);
        let nodes = self.grow(Bounds { nodes_max, ..bounds }, cx);
        if nodes.is_empty() {
            return None;
        }
        let open = self.session.open_mut()?;
        if open.outgoing.grows {
            open.outgoing.release(true);
        }
        Some(Level { nodes, bounds })
    }

    /// A tree, or what is added to one, is whole: its rows leave.
    pub(super) fn end_tree(&mut self) {
        if let Some(open) = self.session.open_mut() {
            open.outgoing.release(false);
        }
        self.check();
    }

    /// The rows of `nodes` are to be sent: they lead to tokens, and drafts are counted.
    fn note_drafts(&mut self, nodes: Range<usize>) {
        let round = self.round + 1;
        let Some(open) = self.session.open_mut() else { return };
        let drafts = &open.drafts;
        for node in nodes {
            let id = drafts.ids[node];
            let node = drafts.tree.nodes()[node];
            let parent = match node.source {
                Some(_) => drafts.ids[node.parent],
                None => open.outgoing.parent,
            };
            open.walk.push(id, parent, node.token, node.source, round);
            if let Some(source) = node.source {
                self.meter.drafted(source.drafter.name());
            }
        }
    }
}
