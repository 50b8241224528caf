//! A draft tree as it grows: drafts, the rows that they need, and what those rows make the
//! trained drafter draft next.
//!
//! A tree goes up level by level, each while the next one is computed. Once it is away, requests
//! that stream add to it, below what is likely or, as verdicts come, below where verification
//! stands.

use std::ops::Range;
use std::time::{Duration, Instant};

use hat_transport::planted::Fault;

use super::context::Common;
use super::prompt::first_not_finite;
use super::request::Request;
use super::session::{Round, Timed};
use crate::draft::DraftMode;
use crate::draft::policy::drafts_that_pay;
use crate::error::RequestError;

/// Bounds on the growth of a tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    nodes_max: usize,
    /// Probability of a node at least.
    floor: f32,
    /// True if it is cut to the size that pays in a round that waits for it.
    as_it_pays: bool,
    /// True if it grows while its first rows are away. Rows that are added then go up together, or
    /// not at all; those of a tree that is begun leave level by level.
    is_pipelined: bool,
    /// Time at which its first row was begun.
    began: Instant,
}

/// Nodes of a tree that are computed together, and how far it may grow beyond.
#[derive(Clone, Debug)]
pub(super) struct Level {
    nodes: Range<usize>,
    bounds: Bounds,
}

/// The next step of a tree that grows.
#[derive(Debug, Default)]
pub(super) enum TreePhase {
    /// None grows.
    #[default]
    Idle,
    /// The rows of a level are to be computed.
    Level(Level),
    /// The level is computed: the trained drafter may say what follows.
    Propose(Level),
    /// The trained drafter may say what to add to a tree that is away.
    Pipelined(Bounds),
}

impl TreePhase {
    /// True if the trained drafter is asked.
    pub(super) fn asks(&self) -> bool {
        matches!(self, Self::Propose(_) | Self::Pipelined(_))
    }
}

impl Request {
    /// The next step of the tree, if it grows.
    pub(super) fn begin_phase(&mut self, cx: &mut Common) -> Option<TreePhase> {
        let phase = std::mem::take(&mut self.session.open_mut()?.tree_phase);
        match &phase {
            TreePhase::Idle => return None,
            TreePhase::Level(level) => self.begin_level(level, cx),
            TreePhase::Propose(_) | TreePhase::Pipelined(_) => {}
        }
        Some(phase)
    }

    /// A step of the tree is done, which took so long: says what the next one is, if there is any.
    ///
    /// # Errors
    /// The decided token's own row is no number.
    pub(super) fn end_phase(
        &mut self,
        now: Instant,
        phase: TreePhase,
        took: Duration,
        cx: &mut Common,
    ) -> Result<(), RequestError> {
        match phase {
            TreePhase::Idle => {}
            TreePhase::Level(level) => self.end_level(now, level, took, cx)?,
            TreePhase::Propose(level) => self.grow_level(now, &level, cx),
            TreePhase::Pipelined(bounds) => self.grow_batch(now, bounds, cx),
        }
        Ok(())
    }

    /// Begins a draft tree below the last decided token with what lookup drafts; its first level
    /// has the decided token's own row. `None` if there is no tree, and will be none.
    pub(super) fn begin_tree(
        &mut self,
        now: Instant,
        has_drafter: bool,
        cx: &Common,
    ) -> Option<()> {
        let mode = self.draft_mode();
        let depth_max = self.depth_max() + 2 * u32::from(cx.planted.is(Fault::RowBeyond));
        let tokens = self.answer.tokens().len();
        let root = *self.path.tokens.last().expect("a prompt has a token");
        let open = self.session.open_mut()?;
        open.round = Some(Round { began: now, tokens, asked: false, drafting: 0.0 });
        open.drafts.withheld.clear();
        open.drafts.clear();
        if mode == DraftMode::Off || depth_max == 0 {
            return None;
        }
        open.drafts.tree.reset(root, depth_max);
        self.look_up(cx);
        let is_worth_it = mode != DraftMode::Auto || self.drafting.asking.is_worth_it();
        let asked = has_drafter && mode.asks_trained() && self.drafting.session.is_some();
        let asked = asked && is_worth_it;
        if let Some(round) = self.session.open_mut().and_then(|open| open.round.as_mut()) {
            round.asked = asked;
        }
        let bounds = self.first_bounds(now, cx);
        if !(asked && bounds.nodes_max > 1) {
            self.grow(bounds, cx);
            if self.session.open()?.drafts.tree.nodes().len() == 1 {
                return None;
            }
        }
        let open = self.session.open_mut()?;
        let nodes = 0..open.drafts.tree.nodes().len();
        open.tree_phase = TreePhase::Level(Level { nodes, bounds });
        Some(())
    }

    /// Offers what stood after the same words before.
    fn look_up(&mut self, cx: &Common) {
        let only_lookup = self.draft_mode() == DraftMode::Lookup;
        let branches = if only_lookup { 1 } else { cx.policy.branches_max };
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
    fn first_bounds(&self, began: Instant, cx: &Common) -> Bounds {
        let mode = self.draft_mode();
        let is_chain = mode == DraftMode::Chain;
        let nodes = if is_chain { cx.policy.chain_max } else { cx.policy.nodes_max };
        let nodes_max = cx.pending_max().min(nodes + 1);
        let as_it_pays = mode == DraftMode::Auto;
        Bounds { nodes_max, floor: 0.0, as_it_pays, is_pipelined: false, began }
    }

    /// Grows the tree as far as it may.
    fn grow(&mut self, bounds: Bounds, cx: &Common) -> Range<usize> {
        let Some(open) = self.session.open_mut() else { return 0..0 };
        let tree = &mut open.drafts.tree;
        let mut grown = tree.grow(bounds.nodes_max, bounds.floor);
        if bounds.as_it_pays {
            let drafting = open.round.map_or(0.0, |round| round.drafting);
            let probabilities = tree.nodes().iter().skip(1).map(|node| node.probability);
            let pay = drafts_that_pay(&cx.learned.estimator, probabilities, drafting);
            let end = (1 + pay).max(grown.start);
            let withheld = tree.nodes().iter().skip(end).filter(|node| node.depth == 1);
            open.drafts.withheld.clear();
            open.drafts
                .withheld
                .extend(withheld.filter_map(|node| Some((node.token, node.source?))));
            if end < grown.end {
                tree.truncate(end);
                grown.end = end;
            }
        }
        grown
    }

    /// Begins an addition to a tree that is away, if one is worth asking for; what is there to add
    /// is said when the trained drafter has been asked.
    pub(super) fn begin_batch(&mut self, now: Instant, cx: &mut Common) {
        self.follow_verdict(cx);
        if let Some(bounds) = self.batch_bounds(now, cx)
            && let Some(open) = self.session.open_mut()
        {
            open.tree_phase = TreePhase::Pipelined(bounds);
        }
    }

    fn batch_bounds(&mut self, now: Instant, cx: &Common) -> Option<Bounds> {
        let mode = self.draft_mode();
        let (away, first_id) = (self.kv.pending(), self.kv.last_id() + 1);
        let open = self.session.open_mut()?;
        let nodes = open.drafts.tree.nodes().len();
        let estimator = &cx.learned.estimator;
        let is_due = |timed: Timed| estimator.is_due(now, timed.at, timed.rows);
        let (batch, floor) = match mode {
            DraftMode::All => (cx.policy.batch_nodes, 0.0),
            // What is away will be back before another batch could be made.
            _ if open.timed.is_some_and(is_due) => (0, 0.0),
            _ => estimator.draft_batch(cx.policy.batch_nodes),
        };
        open.drafts.is_full = true;
        let nodes_max = nodes + batch.min(cx.pending_max().saturating_sub(away));
        if nodes_max == nodes {
            return None;
        }
        open.outgoing.begin_pending(nodes, first_id);
        open.verifier.begin_batch();
        Some(Bounds { nodes_max, floor, as_it_pays: false, is_pipelined: true, began: now })
    }

    /// The trained drafter has been asked for an addition: its first level, if there is anything to
    /// add.
    fn grow_batch(&mut self, now: Instant, bounds: Bounds, cx: &Common) {
        let nodes = self.grow(bounds, cx);
        if nodes.is_empty() {
            return self.note_drafting(now.duration_since(bounds.began));
        }
        if let Some(open) = self.session.open_mut() {
            open.drafts.is_full = false;
            open.tree_phase = TreePhase::Level(Level { nodes, bounds });
        }
    }

    /// Verification stands further down the tree, before a row that is away: what it has passed is
    /// decided and committed, and the tree begins there.
    fn follow_verdict(&mut self, cx: &mut Common) {
        let Some(open) = self.session.open_mut() else { return };
        let Some(at) = open.verifier.at().filter(|at| open.drafts.ids[0] != *at) else { return };
        self.drafting.keep_right_rows(open, self.path.tokens.len(), cx.facts.hidden_size);
        self.commit(at, cx);
        let depth_max = self.depth_max();
        let hidden_size = cx.facts.hidden_size;
        let Some(open) = self.session.open_mut() else { return };
        let (drafts, out) = (&mut open.drafts, &mut open.outgoing);
        let node = drafts.ids.iter().position(|id| *id == at).expect("verification is in the tree");
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
        open.verifier.begin_here();
        self.look_up(cx);
    }

    /// Takes the rows of a level in, and plans their computation: of `scratch.tokens`, into
    /// [`Request::rows_mut`].
    fn begin_level(&mut self, level: &Level, cx: &mut Common) {
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
        out.grows = !level.bounds.is_pipelined;
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
            let known = self.kv.push_row(drafts.ids[node], &mut scratch.plan);
            debug_assert!(known, "it was appended above");
        }
        scratch.plan.end_sequence(self.kv.pages());
        scratch.tokens.clear();
        scratch.tokens.extend(drafts.tree.nodes()[nodes.clone()].iter().map(|node| node.token));
        out.hidden.resize(nodes.end * cx.facts.hidden_size, 0.0);
    }

    /// The rows of a level are computed. A draft may be as wrong as it likes: if its row holds
    /// something that is no number, zeros go up instead, verification never goes there, and the
    /// tree ends.
    fn end_level(
        &mut self,
        now: Instant,
        level: Level,
        took: Duration,
        cx: &mut Common,
    ) -> Result<(), RequestError> {
        let nodes = level.nodes.clone();
        let Some(open) = self.session.open_mut() else { return Ok(()) };
        cx.learned.note_input(nodes.len(), self.kv.committed(), took);
        let (drafts, out) = (&mut open.drafts, &mut open.outgoing);
        let hidden = &mut out.hidden[nodes.start * cx.facts.hidden_size..];
        let bad = first_not_finite(hidden, cx.facts.hidden_size);
        let good = nodes.start..bad.map_or(nodes.end, |bad| nodes.start + bad);
        out.computed = good.end;
        if let Some(bad) = bad {
            if good.end == 0 {
                return Err(RequestError::NotFinite { position: self.kv.committed() - 1 });
            }
            let end = good.end + 1;
            out.computed = end;
            hidden[bad * cx.facts.hidden_size..].fill(0.0);
            if end < nodes.end {
                self.kv.retract(drafts.ids[end]);
            }
            drafts.ids.truncate(end);
            drafts.tree.end(end);
            drafts.is_full = true;
        }
        self.note_drafts(good);
        let open = self.session.open_mut().filter(|open| bad.is_none() && open.asks());
        match open.filter(|_| nodes.end < level.bounds.nodes_max) {
            Some(open) => open.tree_phase = TreePhase::Propose(level),
            None => self.end_tree(now, level.bounds, cx),
        }
        Ok(())
    }

    /// The trained drafter has been asked about a level: the next one, if there is any. With it the
    /// rows before may leave, since it is certain that more of their chunk follow.
    fn grow_level(&mut self, now: Instant, level: &Level, cx: &mut Common) {
        let (end, bounds) = (level.nodes.end, level.bounds);
        let nodes = match self.draft_mode() {
            DraftMode::Chain => 1,
            _ => cx.policy.level(end),
        };
        let nodes_max = bounds.nodes_max.min(end + nodes);
        let nodes = self.grow(Bounds { nodes_max, ..bounds }, cx);
        if nodes.is_empty() {
            return self.end_tree(now, bounds, cx);
        }
        let Some(open) = self.session.open_mut() else { return };
        if !bounds.is_pipelined && cx.policy.sends_levels {
            open.outgoing.release(true);
        }
        open.tree_phase = TreePhase::Level(Level { nodes, bounds });
        self.check();
    }

    /// A tree, or what is added to one, is whole: its rows leave.
    fn end_tree(&mut self, now: Instant, bounds: Bounds, cx: &mut Common) {
        if let Some(open) = self.session.open_mut() {
            open.outgoing.release(false);
        }
        let took = now.duration_since(bounds.began);
        self.note_drafting(took);
        if bounds.is_pipelined {
            cx.learned.estimator.draft_batch.note(took.as_secs_f64());
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
            open.verifier.push(id, parent, node.token, node.source, round);
            if let Some(source) = node.source {
                self.meter.drafted(source.drafter.name());
            }
        }
    }
}
