//! A trained drafter that is known only by how well it drafts: the seam through which the engine's
//! device asks one, answered with a text's opinions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hat_core::draft::drafter::{Decided, Drafted, Drafter, SessionId};
use hat_core::draft::tree::{Node, Proposal};
use hat_core::prefix::PageId;
use hat_plan::TokenId;

use crate::costs::DeviceCosts;
use crate::policy::{AHEAD_WIDTH, Policy, Proposer};
use crate::text::{Opinion, Predictability, Text, Tokens, WIDTH_MAX, request_of};

/// All texts of a run.
pub(crate) struct Texts {
    pub(crate) predictability: Predictability,
    pub(crate) seed: u64,
    pub(crate) tokens: Vec<Tokens>,
}

impl Texts {
    fn of(&self, request: usize) -> Text<'_> {
        Text { predictability: &self.predictability, seed: self.seed, request: request as u64 }
    }
}

/// Work of a drafter, for the keeper of time.
#[derive(Debug, Default)]
pub(crate) struct Spent {
    /// Seconds that it computed.
    pub(crate) seconds: f64,
    /// Positions and tokens below the likeliest tails of each request's tree: those from which
    /// drafting would go on while its rows are away.
    pub(crate) tails: BTreeMap<usize, Vec<(u32, TokenId)>>,
}

/// [`Spent`], shared with the device's owner.
pub(crate) type Desk = Arc<Mutex<Spent>>;

/// Locked once a computation.
pub(crate) fn open(desk: &Desk) -> MutexGuard<'_, Spent> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The stand-in for a trained drafter of one device.
pub(crate) struct Modelled {
    pub(crate) texts: Arc<Texts>,
    pub(crate) policy: Policy,
    pub(crate) costs: DeviceCosts,
    pub(crate) desk: Desk,
    /// The request of each session, once its prompt has been seen.
    pub(crate) sessions: BTreeMap<SessionId, Option<usize>>,
    pub(crate) next: SessionId,
}

impl Modelled {
    fn spend(&self, seconds: f64) {
        open(&self.desk).seconds += seconds;
    }

    /// Opinions of each node from `first` on: of the token behind it.
    fn opinions(&self, request: usize, rows: &Drafted<'_>, first: usize) -> Vec<Opinion> {
        let heads = self.policy.proposer == Proposer::Heads;
        let (text, tokens) = (self.texts.of(request), &self.texts.tokens[request]);
        let mut right = vec![true; rows.nodes.len()];
        for (index, node) in rows.nodes.iter().enumerate().skip(1) {
            let at = (rows.root_position + node.depth) as usize;
            right[index] = right[node.parent] && tokens.tokens.get(at) == Some(&node.token);
        }
        let opinion = |(node, right): (&Node, &bool)| {
            let (step, at) = (node.depth + 1, rows.root_position + node.depth + 1);
            match right {
                true => text.opinion(at - tokens.prompt_rows as u32, step, heads),
                false => text.opinion_on_wrong(node.token, step, heads),
            }
        };
        rows.nodes.iter().zip(&right).skip(first).map(opinion).collect()
    }

    /// Drafts behind a node of which there is an opinion.
    fn proposals(
        &self,
        request: usize,
        (node, at): (&Node, u32),
        opinion: &Opinion,
        width: usize,
    ) -> impl Iterator<Item = Proposal> + use<> {
        let tokens = &self.texts.tokens[request].tokens;
        // Behind the last token of an answer nothing is asked for.
        let right = tokens.get(at as usize + 1).copied().unwrap_or_default();
        opinion.proposals(right, node.token, width)
    }

    /// Notes where drafting would go on below a tree whose rows are away.
    fn note_tails(&self, request: usize, rows: &Drafted<'_>) {
        let opinions = self.opinions(request, rows, 0);
        let is_leaf = |index: usize| !rows.nodes.iter().skip(1).any(|node| node.parent == index);
        let mut tails: Vec<(f32, (u32, TokenId))> = vec![];
        for (index, (node, opinion)) in rows.nodes.iter().zip(&opinions).enumerate() {
            let at = rows.root_position + node.depth;
            if is_leaf(index) {
                let above = if index == 0 { 1.0 } else { node.probability };
                let proposals = self.proposals(request, (node, at), opinion, AHEAD_WIDTH);
                tails.extend(
                    proposals
                        .map(|proposal| (above * proposal.probability, (at + 1, proposal.token))),
                );
            }
        }
        tails.sort_by(|a, b| b.0.total_cmp(&a.0));
        let tails = tails.into_iter().take(AHEAD_WIDTH).map(|(_, tail)| tail).collect();
        open(&self.desk).tails.insert(request, tails);
    }
}

impl Drafter for Modelled {
    fn describe(&self) -> String {
        "a drafter that is modelled".to_owned()
    }

    fn open(&mut self, _: u32) -> Option<SessionId> {
        self.next += 1;
        self.sessions.insert(self.next, None);
        Some(self.next)
    }

    fn begin_behind(&mut self, _: SessionId, pages: &[PageId]) -> usize {
        pages.len()
    }

    fn close(&mut self, session: SessionId) {
        if let Some(Some(request)) = self.sessions.remove(&session) {
            open(&self.desk).tails.remove(&request);
        }
    }

    fn commit(&mut self, session: SessionId, rows: &Decided<'_>) {
        let request = self.sessions.entry(session).or_default();
        *request = request.or_else(|| rows.tokens.iter().copied().find_map(request_of));
        // Heads read the last deep row and keep nothing.
        if self.policy.proposer == Proposer::Adapter {
            self.spend(self.costs.adapter.seconds(rows.tokens.len()));
        }
    }

    fn propose(
        &mut self,
        session: SessionId,
        rows: &Drafted<'_>,
        width: usize,
        proposals: &mut Vec<(usize, Proposal)>,
    ) {
        let Some(Some(request)) = self.sessions.get(&session).copied() else { return };
        let new = rows.new_nodes();
        let opinions = self.opinions(request, rows, new.start);
        for (index, opinion) in new.clone().zip(&opinions) {
            let node = &rows.nodes[index];
            let at = rows.root_position + node.depth;
            let of_node = self.proposals(request, (node, at), opinion, width.min(WIDTH_MAX));
            proposals.extend(of_node.map(|proposal| (index, proposal)));
        }
        self.spend(match self.policy.proposer {
            Proposer::Heads if new.start == 0 => self.costs.heads.seconds(1),
            Proposer::Heads | Proposer::Nobody => 0.0,
            Proposer::Adapter => self.policy.proposal_seconds(&self.costs, new.len()),
        });
        if self.policy.ahead {
            self.note_tails(request, rows);
        }
    }

    fn rollback(&mut self, _: SessionId) {}
}
