//! The trained drafter at work: which rows of which session stand where in its KV.

use std::collections::BTreeMap;

use crate::draft::Source;
use crate::draft::drafter::{Decided, Drafted, Drafter, SessionId};
use crate::draft::gumbel::SHORTLIST;
use crate::draft::tree::Proposal;
use crate::page::pages_for;
use crate::prefix::{PageId, PageStore, PrefixScope};
use crate::sequence::{BatchBuffers, PENDING_ROWS_MAX, Sequence};
use hat_plan::{BackendFault, TokenId};
use hat_plan::{DraftForward, Likely};

/// A [`DraftForward`] over the sessions of a device.
pub struct ModelDrafter {
    model: Box<dyn DraftForward>,
    hidden_size: usize,
    step_rows_max: usize,
    pages: PageStore,
    sessions: BTreeMap<SessionId, Session>,
    next: SessionId,
    plan: BatchBuffers,
    zeros: Vec<f32>, // [step_rows_max, hidden_size]
    level: Level,
    likely: Vec<Likely>,
    shortlist: Vec<(TokenId, f32)>,
}

/// Nodes of one depth on their way through the model.
#[derive(Default)]
struct Level {
    nodes: Vec<usize>,
    parents: Vec<u32>,  // ids
    shallow: Vec<f32>,  // [nodes, hidden_size]
    y_before: Vec<f32>, // [nodes, hidden_size]
    y: Vec<f32>,        // [nodes, hidden_size]
}

/// One session's rows.
struct Session {
    sequence: Sequence,
    /// The drafter's hidden states of the last decided row, and of each node of the tree below it.
    /// `[nodes, hidden_size]`
    said: Vec<f32>,
    /// The ids of the tree's nodes in `sequence`, the last decided row's first.
    ids: Vec<u32>,
}

impl ModelDrafter {
    /// Sessions of a model whose KV store has `pages` pages and whose steps take `step_rows_max`
    /// rows.
    pub fn new(
        model: Box<dyn DraftForward>,
        hidden_size: usize,
        step_rows_max: usize,
        pages: usize,
    ) -> Self {
        assert!(step_rows_max >= PENDING_ROWS_MAX, "a tree is at most {PENDING_ROWS_MAX} rows");
        Self {
            model,
            hidden_size,
            step_rows_max,
            pages: PageStore::new(pages),
            sessions: BTreeMap::new(),
            next: 1,
            plan: BatchBuffers::with_capacity(step_rows_max, 1, pages),
            zeros: vec![0.0; step_rows_max * hidden_size],
            level: Level::default(),
            likely: Vec::new(),
            shortlist: Vec::with_capacity(SHORTLIST),
        }
    }

    /// One step of decided rows; `says` if something is drafted from the last of them.
    fn commit_step(&mut self, session: SessionId, shallow: &[f32], deep: &[f32], says: bool) {
        let Some(Session { sequence, said, .. }) = self.sessions.get_mut(&session) else { return };
        let count = u32::try_from(shallow.len() / self.hidden_size).expect("a step is small");
        let place = sequence
            .append_committed(sequence.last_id() + 1, count, sequence.tip())
            .expect("ids go on after the last one, and the session reserved all rows");
        self.plan.clear();
        self.plan.push_committed(place, count);
        self.plan.end_sequence(sequence.pages());
        if says {
            said.resize(shallow.len(), 0.0);
            self.model.decide(&self.plan.batch(), shallow, deep, said);
            said.drain(..shallow.len() - self.hidden_size);
        } else {
            self.model.remember(&self.plan.batch(), shallow, deep);
        }
    }
}

impl ModelDrafter {
    /// Runs the new nodes of one depth: what was said for their parents is known by now.
    fn draft_level(&mut self, session: SessionId, rows: &Drafted<'_>, depth: u32) {
        let Self { model, hidden_size, plan, level, sessions, .. } = self;
        let hidden_size = *hidden_size;
        let Some(Session { sequence, said, ids }) = sessions.get_mut(&session) else { return };
        let row = |node: usize| node * hidden_size..(node + 1) * hidden_size;
        said.resize(rows.nodes.len() * hidden_size, 0.0);
        ids.resize(rows.nodes.len(), 0);
        ids[0] = sequence.tip();
        let Level { nodes, parents, shallow, y_before, y } = level;
        nodes.clear();
        nodes.extend(rows.new_nodes().filter(|node| rows.nodes[*node].depth == depth));
        if nodes.is_empty() {
            return;
        }
        parents.clear();
        shallow.clear();
        y_before.clear();
        let first_id = sequence.last_id() + 1;
        for (id, node) in (first_id..).zip(&*nodes) {
            let parent = rows.nodes[*node].parent;
            ids[*node] = id;
            parents.push(ids[parent]);
            shallow.extend_from_slice(&rows.shallow[row(node - rows.first)]);
            y_before.extend_from_slice(&said[row(parent)]);
        }
        sequence
            .append_pending(first_id, &*parents)
            .expect("ids go on after the last one, and a tree fits what was reserved for it");
        plan.clear();
        for id in (first_id..).take(nodes.len()) {
            let known = sequence.push_row(id, plan);
            debug_assert!(known, "it was appended above");
        }
        plan.end_sequence(sequence.pages());
        y.resize(shallow.len(), 0.0);
        model.draft(&plan.batch(), shallow, y_before, y);
        for (node, y) in nodes.iter().zip(y.chunks_exact(hidden_size)) {
            said[row(*node)].copy_from_slice(y);
        }
    }
}

impl Drafter for ModelDrafter {
    fn describe(&self) -> String {
        let reads = if self.model.reads_deep() { "shallow and deep rows" } else { "shallow rows" };
        format!("a trained layer that reads {reads}; {}", self.model.describe())
    }

    fn arithmetic_id(&self) -> u32 {
        self.model.arithmetic_id()
    }

    fn fault(&mut self) -> Option<BackendFault> {
        self.model.fault()
    }

    fn open(&mut self, rows_max: u32) -> Option<SessionId> {
        let wanted = pages_for(rows_max as usize + PENDING_ROWS_MAX);
        let (pages, _) = self.pages.admit(PrefixScope::ONE, &[], wanted)?;
        let session = self.next;
        self.next += 1;
        let sequence = Sequence::new(pages, rows_max);
        let (said, ids) = (Vec::new(), Vec::new());
        self.sessions.insert(session, Session { sequence, said, ids });
        Some(session)
    }

    fn begin_behind(&mut self, session: SessionId, pages: &[PageId]) -> usize {
        let Some(Session { sequence, .. }) = self.sessions.get_mut(&session) else { return 0 };
        debug_assert_eq!(sequence.committed(), 0, "the session has rows");
        self.pages.begin_behind(sequence, pages)
    }

    fn keep(&mut self, session: SessionId, pages: &[PageId]) {
        if let Some(Session { sequence, .. }) = self.sessions.get(&session) {
            let full = pages.len().min(sequence.full_pages());
            self.pages.keep(PrefixScope::ONE, &pages[..full], sequence.pages());
        }
    }

    fn forget(&mut self) {
        self.pages.clear();
    }

    fn close(&mut self, session: SessionId) {
        if let Some(session) = self.sessions.remove(&session) {
            self.pages.pool.give_back(session.sequence.into_pages());
        }
    }

    fn commit(&mut self, session: SessionId, rows: &Decided<'_>) {
        // Of a long run only the last row's answer counts, and that takes a query for each row.
        const SAYS_MAX: usize = 8;
        let (count, hidden_size) = (rows.tokens.len(), self.hidden_size);
        let zeros = std::mem::take(&mut self.zeros);
        let mut first = 0;
        while first < count {
            let left = count - first;
            let says = left <= SAYS_MAX;
            let step = if says { left } else { (left - 1).min(self.step_rows_max) };
            let range = first * hidden_size..(first + step) * hidden_size;
            let deep = rows.deep_before.map_or(&zeros[..range.len()], |deep| &deep[range.clone()]);
            self.commit_step(session, &rows.shallow[range], deep, says);
            first += step;
        }
        self.zeros = zeros;
    }

    fn propose(
        &mut self,
        session: SessionId,
        rows: &Drafted<'_>,
        width: usize,
        proposals: &mut Vec<(usize, Proposal)>,
    ) {
        let hidden_size = self.hidden_size;
        let depths = rows.nodes[rows.first..].iter().map(|node| node.depth);
        let deepest = depths.max().unwrap_or(0);
        for depth in 1..=deepest {
            self.draft_level(session, rows, depth);
        }
        let Some(Session { said, .. }) = self.sessions.get(&session) else { return };
        let new = rows.new_nodes();
        self.likely.clear();
        let y = &said[new.start * hidden_size..new.end * hidden_size];
        let wide = if rows.draw.is_some() { SHORTLIST.max(width) } else { width };
        self.model.likeliest(y, wide, &mut self.likely);
        let each = self.likely.len() / new.len().max(1);
        for (node, likely) in new.zip(self.likely.chunks_exact(each.max(1))) {
            self.shortlist.clear();
            self.shortlist.extend(likely.iter().map(|likely| (likely.token, likely.probability)));
            if let Some(draw) = rows.draw {
                // The token after a node stands one behind it.
                let position = rows.root_position + rows.nodes[node].depth + 1;
                draw.gumbel_rank(position, &mut self.shortlist);
            }
            for (rank, (token, probability)) in self.shortlist.iter().take(width).enumerate() {
                let (token, probability) = (*token, *probability);
                let source = Source::of_model(rank, probability);
                proposals.push((node, Proposal { token, probability, source }));
            }
        }
    }

    fn rollback(&mut self, session: SessionId) {
        if let Some(Session { sequence, said, ids }) = self.sessions.get_mut(&session) {
            sequence.retract(sequence.tip() + 1);
            said.truncate(self.hidden_size);
            ids.clear();
        }
    }
}
