//! What the device computes and sends: chunks of the prompt, and rounds of decoding.

use hat_transport::frame::{HEADER_BYTES, Kind, Priority};
use hat_transport::message::{RowsHead, Want};

use super::active::{Active, Phase, Unsent};
use super::run::Device;
use crate::config::ChunkPolicy;
use crate::draft::lookup::BRANCHES_MAX;
use crate::draft::{BUDGET_DEFAULT, DraftMode};
use crate::sequence::PENDING_ROWS_MAX;
use crate::{Error, Event, wire};

impl Device {
    /// Computes one chunk of one request, the one with the fewest rows left first: a decode step
    /// is not kept waiting by another's long prompt. Says whether there was anything to do.
    pub(super) fn compute_one(&mut self) -> bool {
        let next = (0..self.actives.len())
            .filter(|index| self.actives[*index].wants_compute())
            .min_by_key(|index| self.actives[*index].rows() - self.actives[*index].computed());
        let Some(index) = next else { return false };
        if self.actives[index].is_decoding() && self.draft(index) > 1 {
            self.compute_tree(index);
        } else {
            self.compute_chunk(index);
        }
        true
    }

    /// Computes decided rows: a chunk of the prompt, or the last token alone.
    fn compute_chunk(&mut self, index: usize) {
        let active = &mut self.actives[index];
        let first = active.computed();
        let policy = match self.start.config.chunks {
            ChunkPolicy::Off => u32::MAX,
            ChunkPolicy::Fixed(rows) => rows,
        };
        let rows_max = policy.min(self.peer_rows_max).min(self.start.config.limits.step_rows_max);
        let count = (active.rows() - first).min(rows_max);
        let (first_id, parent) = (active.sequence.last_id() + 1, active.sequence.tip());
        let place = active
            .sequence
            .append_committed(first_id, count, parent)
            .expect("ids go on after the last one, and the session reserved all rows");
        self.plan.clear();
        self.plan.push_committed(place, count);
        self.plan.end_sequence(&active.sequence);
        let end = (first + count) as usize;
        let tokens = &active.tokens[first as usize..end];
        let hidden_size = self.start.facts.hidden_size;
        active.unsent.hidden.resize(count as usize * hidden_size, 0.0);
        let began = self.start.shared.clock.now();
        self.start.model.input(&self.plan.plan(), tokens, &mut active.unsent.hidden);
        let took = self.start.shared.clock.now().duration_since(began);
        self.costs.device.note(count as usize, took.as_secs_f64());
        if let Some(row) = first_not_finite(&active.unsent.hidden, hidden_size) {
            let row = u32::try_from(row).expect("below the chunk's rows");
            return self.fail(index, Error::NotFinite { position: first + row });
        }
        let decides = end == active.tokens.len();
        active.set_unsent(first_id, parent, count as usize, decides);
        let in_prefill = active.answer.tokens().is_empty();
        if decides {
            let last_id = first_id + count - 1;
            let before = if count > 1 { last_id - 1 } else { parent };
            let round = if in_prefill { 0 } else { active.round + 1 };
            active.walk.push(last_id, before, active.tokens[end - 1], None, round);
        }
        if in_prefill {
            active.meter.counts.chunks.push(count);
            let event = Event::Prefill { sent: first + count, total: active.rows() };
            let _ = active.job.events.send(Ok(event));
        }
    }

    /// Drafts below the last decided token of a request, into `self.tree`. Returns the rows of a
    /// round, that token's own included.
    fn draft(&mut self, index: usize) -> usize {
        let active = &mut self.actives[index];
        let root = *active.tokens.last().expect("a prompt has a token");
        // The last token of the answer needs no row, and so no row may lead beyond it.
        let depth_max = active.job.prepared.rows_max() - 1 - active.rows();
        self.tree.reset(root, depth_max);
        active.held_back.clear();
        let Some(lookup) = &active.lookup else { return 1 };
        let began = self.start.shared.clock.now();
        let mode = active.job.prepared.request.draft;
        let branches = match mode {
            DraftMode::Off => return 1,
            DraftMode::Chain | DraftMode::Lookup => 1,
            _ => BRANCHES_MAX,
        };
        let (tree, acceptance) = (&mut self.tree, &self.acceptance);
        lookup.propose(
            branches,
            |source| acceptance.rate(source),
            |branch| tree.offer(0, branch.iter().copied()),
        );
        let rows_max = PENDING_ROWS_MAX
            .min(self.peer_pending_max)
            .min(self.peer_rows_max as usize)
            .min(self.start.config.limits.step_rows_max as usize)
            .min(BUDGET_DEFAULT + 1);
        tree.grow(rows_max, 0.0);
        if mode == DraftMode::Auto {
            let probabilities = tree.nodes().iter().skip(1).map(|node| node.probability);
            let drafts = self.costs.drafts_that_pay(probabilities);
            let held_back = tree.nodes().iter().skip(1 + drafts).filter(|node| node.depth == 1);
            active.held_back.extend(held_back.filter_map(|node| Some((node.token, node.source?))));
            tree.truncate(1 + drafts);
        }
        let took = self.start.shared.clock.now().duration_since(began);
        self.costs.draft.note(took.as_secs_f64());
        tree.nodes().len()
    }

    /// Computes the rows of `self.tree`: the decided token's, and those of the drafts below it.
    fn compute_tree(&mut self, index: usize) {
        let active = &mut self.actives[index];
        let position = active.computed();
        let (root_id, tip) = (active.sequence.last_id() + 1, active.sequence.tip());
        let id = |node: usize| root_id + u32::try_from(node).expect("a tree is small");
        let nodes = self.tree.nodes();
        let place = active
            .sequence
            .append_committed(root_id, 1, tip)
            .expect("ids go on after the last one, and the session reserved all rows");
        let parents = &mut active.unsent.parents;
        parents.clear();
        parents.extend(nodes.iter().skip(1).map(|node| id(node.parent)));
        active
            .sequence
            .append_pending(root_id + 1, parents)
            .expect("nothing else pends, and a tree fits what was reserved for it");
        self.plan.clear();
        self.plan.push_committed(place, 1);
        for node in 1..nodes.len() {
            let known = self.plan.push_pending(&active.sequence, id(node));
            debug_assert!(known, "it was appended above");
        }
        self.plan.end_sequence(&active.sequence);
        self.tokens.clear();
        self.tokens.extend(nodes.iter().map(|node| node.token));
        let hidden_size = self.start.facts.hidden_size;
        active.unsent.hidden.resize(nodes.len() * hidden_size, 0.0);
        let began = self.start.shared.clock.now();
        self.start.model.input(&self.plan.plan(), &self.tokens, &mut active.unsent.hidden);
        let took = self.start.shared.clock.now().duration_since(began);
        self.costs.device.note(nodes.len(), took.as_secs_f64());
        let finite = first_not_finite(&active.unsent.hidden, hidden_size).unwrap_or(nodes.len());
        if finite == 0 {
            return self.fail(index, Error::NotFinite { position });
        }
        // A guess may be as wrong as it likes: its row is left out, and those after it.
        active.sequence.retract(id(finite));
        active.unsent.parents.truncate(finite - 1);
        active.set_unsent(root_id, tip, 1, true);
        active.unsent.count = finite;
        let round = active.round + 1;
        for (place, node) in nodes[..finite].iter().enumerate() {
            let parent = if place == 0 { tip } else { id(node.parent) };
            active.walk.push(id(place), parent, node.token, node.source, round);
            if let Some(source) = node.source {
                active.meter.drafted(source.drafter.name());
            }
        }
    }

    /// Sends what is computed, as far as there are buffers and credit.
    pub(super) fn send_unsent(&mut self) {
        for index in 0..self.actives.len() {
            while self.actives[index].phase == Phase::Open
                && self.actives[index].unsent.sent < self.actives[index].unsent.count
            {
                if !self.send_frame(index) {
                    return;
                }
            }
        }
    }

    /// Sends one frame of what is computed; says whether it could.
    fn send_frame(&mut self, index: usize) -> bool {
        let Some(connection) = self.connection.filter(|_| self.connected) else { return false };
        let hidden_size = self.start.facts.hidden_size;
        let codec = self.start.config.wire;
        let active = &mut self.actives[index];
        let unsent = &active.unsent;
        let rows_max = wire::rows_per_frame(codec, hidden_size);
        let head = unsent.head(rows_max, self.start.facts.has_tail);
        let rows = usize::from(head.count);
        let bytes = head.payload_start() + rows * codec.row_bytes(hidden_size);
        let Some(mut body) = self.endpoint.buffer(bytes) else { return false };
        let parents = if head.tree { unsent.parents_of(rows) } else { &[] };
        let start = head.encode(parents, body.body_mut());
        let hidden = &unsent.hidden[unsent.sent * hidden_size..][..rows * hidden_size];
        let cut = codec
            .pack(hidden, hidden_size, &mut body.body_mut()[start..])
            .expect("rows are checked when they are computed");
        if cut > 0 {
            tracing::warn!(cut, "numbers beyond the wire codec's range were cut");
        }
        let in_answer = !active.answer.tokens().is_empty();
        let urgent = in_answer && unsent.decided == 1;
        let priority = if urgent { Priority::Verify } else { Priority::Prompt };
        let sent = self.endpoint.send(connection, Kind::Rows, active.wire_id, priority, body);
        if sent.is_err() {
            return false;
        }
        active.meter.rows_sent(u32::from(head.count));
        active.sent_id = head.first_id + u32::from(head.count) - 1;
        active.meter.counts.bytes_up += (HEADER_BYTES + bytes) as u64;
        active.unsent.sent += rows;
        // A chunk of a longer prompt waits for those before it as well.
        let alone = in_answer || active.computed() as usize == active.unsent.count;
        if active.unsent.sent == active.unsent.count && active.unsent.decides && alone {
            active.sent_at = Some((self.start.shared.clock.now(), active.unsent.count));
        }
        true
    }
}

impl Active {
    /// `count` decided rows of `unsent.hidden` are to be sent, and with them what the cloud shall
    /// keep.
    fn set_unsent(&mut self, first_id: u32, parent: u32, count: usize, decides: bool) {
        if self.decided.is_empty() {
            self.decided = first_id..first_id;
        }
        self.decided.end = first_id + u32::try_from(count).expect("a chunk is small");
        self.unsent.first_id = first_id;
        self.unsent.parent = parent;
        self.unsent.commit = std::mem::take(&mut self.commit);
        self.unsent.decided = count;
        self.unsent.decides = decides;
        self.unsent.count = count;
        self.unsent.sent = 0;
    }
}

impl Unsent {
    /// The head of the next frame, of at most `rows_max` rows. Decided rows and those that pend
    /// never share a frame.
    fn head(&self, rows_max: usize, has_tail: bool) -> RowsHead {
        let tree = self.sent >= self.decided;
        let end = if tree { self.count } else { self.decided };
        let rows = (end - self.sent).min(rows_max);
        let first_id = self.first_id + u32::try_from(self.sent).expect("a chunk is small");
        let is_last_decided = self.decides && self.sent + rows == self.decided;
        RowsHead {
            first_id,
            count: u16::try_from(rows).expect("a frame holds few rows"),
            tree,
            decided: !tree,
            more: self.sent + rows < self.count,
            want: match (tree || has_tail, is_last_decided) {
                (true, _) => Want::All,
                (false, true) => Want::Last,
                (false, false) => Want::None,
            },
            parent: match (self.sent, tree) {
                (0, _) => self.parent,
                (_, true) => self.parents_of(1)[0],
                (_, false) => first_id - 1,
            },
            commit: if self.sent == 0 { self.commit } else { 0 },
        }
    }

    /// Parents of the next `rows` rows, which pend.
    fn parents_of(&self, rows: usize) -> &[u32] {
        &self.parents[self.sent - self.decided..][..rows]
    }
}

/// The first row that holds something that is no number.
fn first_not_finite(hidden: &[f32], hidden_size: usize) -> Option<usize> {
    hidden.iter().position(|number| !number.is_finite()).map(|at| at / hidden_size)
}
