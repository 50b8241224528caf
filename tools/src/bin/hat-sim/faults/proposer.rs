//! A trained drafter that knows the whole model: it drafts right, second or not at all, as chance
//! has it, and it looks at each row that it is given.

use std::collections::BTreeMap;

use hat_core::draft::Source;
use hat_core::draft::drafter::{Decided, Drafted, Drafter, SessionId};
use hat_core::draft::tree::Proposal;
use hat_plan::{BackendFault, TokenId};
use hat_transport::message::PageId;
use hat_transport::random::SeededRandom;

use super::ledger::{self, LAYERS, ReferenceRun, read, token_of};

/// Rows of a page.
const PAGE: usize = hat_plan::PAGE_SIZE;

/// A drafter, and the facts that it drafts by.
pub struct Proposer {
    random: SeededRandom,
    width: usize,
    /// Layers before the cloud's.
    split: usize,
    alphabet: u32,
    /// True if it fails now and then.
    fails: bool,
    /// Sessions: the whole model behind each number of decided tokens.
    sessions: BTreeMap<SessionId, Vec<ReferenceRun>>,
    /// Paths whose pages were kept.
    kept: BTreeMap<PageId, Vec<ReferenceRun>>,
    next: SessionId,
    fault: Option<BackendFault>,
}

impl Proposer {
    /// A drafter over rows of this width, behind the device's layers, of this many tokens.
    pub fn new(
        random: SeededRandom,
        (width, split, alphabet): (usize, usize, u32),
        fails: bool,
    ) -> Self {
        let (sessions, kept) = (BTreeMap::new(), BTreeMap::new());
        Self { random, width, split, alphabet, fails, sessions, kept, next: 0, fault: None }
    }

    fn check(&self, numbers: &[f32], row: u64, what: &str, position: u32) {
        assert_eq!(read(numbers), row, "a wrong {what} row at position {position}");
    }

    /// The token behind a node, and a wrong one in most cases, in any order.
    fn proposals(&mut self, rows: &[u64; LAYERS]) -> [TokenId; 2] {
        let right = token_of(rows[LAYERS - 1], self.alphabet);
        let other = 300 + self.random.below(u64::from(self.alphabet)) as TokenId;
        match self.random.below(10) {
            0..4 => [right, other],
            4..8 => [other, right],
            _ => [other, 300 + (other + 1) % self.alphabet],
        }
    }
}

impl Drafter for Proposer {
    fn describe(&self) -> String {
        "a guesser".to_owned()
    }

    fn fault(&mut self) -> Option<BackendFault> {
        self.fault.take()
    }

    fn open(&mut self, _: u32) -> Option<SessionId> {
        if self.random.below(8) == 0 {
            return None;
        }
        self.next += 1;
        self.sessions.insert(self.next, vec![ReferenceRun::new()]);
        Some(self.next)
    }

    fn begin_behind(&mut self, session: SessionId, pages: &[PageId]) -> usize {
        let known = pages.iter().take_while(|page| self.kept.contains_key(*page)).count();
        if let Some(last) = pages[..known].last() {
            self.sessions.insert(session, self.kept[last].clone());
        }
        known
    }

    fn keep(&mut self, session: SessionId, pages: &[PageId]) {
        let path = &self.sessions[&session];
        for (index, page) in pages.iter().enumerate() {
            if let Some(path) = path.get(..=(index + 1) * PAGE) {
                self.kept.insert(*page, path.to_vec());
            }
        }
    }

    fn forget(&mut self) {
        self.kept.clear();
    }

    fn close(&mut self, session: SessionId) {
        assert!(self.sessions.remove(&session).is_some(), "session {session} is closed twice");
    }

    fn commit(&mut self, session: SessionId, rows: &Decided<'_>) {
        let mut path = self.sessions.remove(&session).expect("it is open");
        assert_eq!(rows.first as usize + 1, path.len(), "positions come once, and in order");
        for (index, token) in rows.tokens.iter().enumerate() {
            let before = *path.last().expect("it begins with one");
            let mut whole = before;
            let of_token = whole.push(*token);
            let numbers = |all: &[f32]| all[index * self.width..][..self.width].to_vec();
            let position = before.position();
            self.check(&numbers(rows.shallow), of_token[self.split - 1], "shallow", position);
            if let Some(deep) = rows.deep_before {
                let behind = before.row(LAYERS - 1);
                self.check(&numbers(deep), behind, "deep", position);
            }
            path.push(whole);
        }
        self.sessions.insert(session, path);
    }

    fn propose(
        &mut self,
        session: SessionId,
        rows: &Drafted<'_>,
        width: usize,
        proposals: &mut Vec<(usize, Proposal)>,
    ) {
        if self.fails && self.random.below(64) == 0 {
            self.fault = Some(ledger::fault(self.random.below(2) == 0));
            return;
        }
        let path = &self.sessions[&session];
        let root = path[rows.root_position as usize];
        let mut behind: Vec<(ReferenceRun, [u64; LAYERS])> = Vec::new(); // each node
        for node in rows.nodes {
            let mut whole = if behind.is_empty() { root } else { behind[node.parent].0 };
            let of_node = whole.push(node.token);
            behind.push((whole, of_node));
        }
        for (index, numbers) in rows.new_nodes().zip(rows.shallow.chunks_exact(self.width)) {
            let (whole, of_node) = behind[index];
            self.check(numbers, of_node[self.split - 1], "drafted", whole.position() - 1);
            for (rank, token) in self.proposals(&of_node).into_iter().take(width).enumerate() {
                let probability = self.random.below(1000) as f32 / 1000.0;
                let source = Source::of_model(rank, probability);
                proposals.push((index, Proposal { token, probability, source }));
            }
        }
    }

    fn rollback(&mut self, session: SessionId) {
        assert!(self.sessions.contains_key(&session), "session {session} is closed");
    }
}
