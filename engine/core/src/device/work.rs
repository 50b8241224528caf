//! Computations, handed out one at a time: which is next, and what follows from it.
//!
//! The link is looked after between any two of them, so the rows of one level are on their way
//! while the next one is computed. A request that is at work is not touched: its frames wait as
//! long as its tree grows, and are taken one at a time until a head of it is due. What arrives for
//! others is taken meanwhile.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::context::Common;
use super::prompt::Piece;
use super::request::{Outcome, Request, RequestId};
use super::select;
use super::tree::TreePhase;
use super::verify::{Head, TailRows};
use super::{DeviceCore, Inbound};
use crate::answer::Vocabulary;
use crate::draft::drafter::Drafter;
use hat_plan::DeviceForward;
use hat_plan::{AttendBatch, BackendFault, RowMove, TokenId};

/// A computation for the owner of the model, in place.
pub enum DeviceWork<'a> {
    /// Moves in the KV store, then the device's first layers.
    Input {
        /// The request of the rows.
        request: RequestId,
        /// Moves that come first; they are taken.
        moves: &'a mut Vec<RowMove>,
        /// Rows and the keys that they attend to.
        plan: AttendBatch<'a>,
        /// Their tokens.
        tokens: &'a [TokenId],
        /// The rows, out. `[tokens, hidden_size]`
        hidden: &'a mut [f32],
    },
    /// Moves in the KV store, then the tail layers.
    Tail {
        /// Moves that come first; they are taken.
        moves: &'a mut Vec<RowMove>,
        /// Rows and the keys that they attend to.
        plan: AttendBatch<'a>,
        /// The rows, in and out. `[rows, hidden_size]`
        hidden: &'a mut [f32],
    },
    /// The tail layers where there is a plan for them, then the LM head.
    Head {
        /// The request of the row.
        request: RequestId,
        /// Position of the row.
        position: u32,
        /// Moves that come before the tail layers; they are taken with them.
        moves: &'a mut Vec<RowMove>,
        /// The row and its keys in the tail layers, if these are due.
        tail: Option<AttendBatch<'a>>,
        /// The row. `[hidden_size]`
        hidden: &'a mut [f32],
        /// The part of its logits that is asked for, out.
        verdict: Verdict<'a>,
    },
    /// The trained drafter.
    Draft(DraftWork<'a>),
}

/// The part of a row's logits that an answer wants to know.
pub enum Verdict<'a> {
    /// The token with the largest one, and that one; `None` if some are no numbers.
    Argmax(&'a mut Option<(TokenId, f32)>),
    /// All of them. `[vocab_size]`
    Logits(&'a mut [f32]),
}

/// Decided rows for the trained drafter to take, or nodes below which it drafts.
pub struct DraftWork<'a> {
    drafter: Option<&'a mut Box<dyn Drafter>>,
    request: &'a mut Request,
    cx: &'a mut Common,
    proposals: bool,
    fault: &'a mut Option<BackendFault>,
}

impl DeviceWork<'_> {
    /// Computes.
    pub fn run(self, model: &mut dyn DeviceForward) {
        match self {
            Self::Input { moves, plan, tokens, hidden, .. } => {
                compact(model, moves);
                model.input(&plan, tokens, hidden);
            }
            Self::Tail { moves, plan, hidden } => {
                compact(model, moves);
                model.tail(&plan, hidden);
            }
            Self::Head { moves, tail, hidden, verdict, .. } => {
                if let Some(plan) = tail {
                    compact(model, moves);
                    model.tail(&plan, hidden);
                }
                match verdict {
                    Verdict::Argmax(argmax) => *argmax = model.argmax(hidden),
                    Verdict::Logits(logits) => model.head(hidden, logits),
                }
            }
            Self::Draft(work) => work.run(),
        }
    }
}

impl DraftWork<'_> {
    /// The request whose drafts they are.
    #[must_use]
    pub fn request(&self) -> RequestId {
        self.request.id
    }

    /// Computes.
    pub fn run(self) {
        let Self { drafter, request, cx, proposals, fault } = self;
        let Request { drafting, path, session, prepared, .. } = request;
        let Some(open) = session.open_mut() else { return };
        if proposals {
            *fault = drafting.propose(drafter, path, open, &prepared.request, cx).err();
        } else {
            drafting.feed(drafter, path, open, cx.facts.hidden_size);
        }
    }
}

/// Moves come before any row, also those of other requests: pages may have changed hands.
fn compact(model: &mut dyn DeviceForward, moves: &mut Vec<RowMove>) {
    if !moves.is_empty() {
        model.compact(moves);
        moves.clear();
    }
}

/// One computation of one request.
#[derive(Debug)]
pub(super) enum Computation {
    /// Decided rows, by the device's layers.
    Piece(Piece),
    /// A step of a draft tree: a level by the device's layers, or drafts of the trained drafter.
    Tree(TreePhase),
    /// Decided rows that came back, by the tail layers.
    Tail(TailRows),
    /// A row that came back, by the LM head, and by the tail layers first if it was drafted.
    Head(Head),
    /// Decided rows, by the trained drafter.
    Feed,
}

/// The computation that is out, and the requests that go before all others.
#[derive(Default)]
pub(super) struct Computations {
    pub(super) out: Option<(RequestId, Computation)>,
    /// Its tree grows, level by level.
    pub(super) growing: Option<RequestId>,
    /// Requests whose heads are due, in the order in which their rows came back.
    pub(super) heading: VecDeque<RequestId>,
    /// The trained drafter did not compute.
    draft_fault: Option<BackendFault>,
}

impl Computations {
    /// True if it is not to be touched now.
    fn has(&self, id: RequestId) -> bool {
        self.growing == Some(id) || self.heading.contains(&id)
    }
}

impl DeviceCore {
    /// The next computation, if none is out: of the tree that grows; of rows that are back, in the
    /// order in which they came; of the request whose turn it is, see `turn::choose`; of the
    /// trained drafter over rows that are away; of drafts to add to a tree that is away. Unless
    /// `begins`, nothing but the first two.
    pub fn poll_work(&mut self, now: Instant, begins: bool) -> Option<DeviceWork<'_>> {
        if self.work.out.is_some() {
            return None;
        }
        self.take_arrived(now);
        let next = self.poll_tree().or_else(|| self.poll_head(now));
        let next = next.or_else(|| if begins { self.poll_input(now) } else { None });
        let next = next.or_else(|| if begins { self.poll_draft(now) } else { None });
        self.work.out = next;
        self.lend()
    }

    /// Buffers and drafter for the computation that is out.
    fn lend(&mut self) -> Option<DeviceWork<'_>> {
        let (id, step) = self.work.out.as_ref()?;
        let request = self.requests.get_mut(id)?;
        let cx = &mut self.cx;
        let proposals = matches!(step, Computation::Tree(phase) if phase.asks());
        if proposals || matches!(step, Computation::Feed) {
            let (drafter, fault) = (self.drafter.as_mut(), &mut self.work.draft_fault);
            return Some(DeviceWork::Draft(DraftWork { drafter, request, cx, proposals, fault }));
        }
        let Common { scratch, facts, moves, .. } = cx;
        let plan = scratch.plan.batch();
        Some(match step {
            Computation::Tail(_) => DeviceWork::Tail { moves, plan, hidden: request.tail_rows() },
            Computation::Head(head) => {
                let verdict = match request.answer.wants_argmax() {
                    true => Verdict::Argmax(&mut scratch.argmax),
                    false => Verdict::Logits(&mut scratch.logits),
                };
                let (tail, position) = (head.needs_tail.then_some(plan), request.path.rows() - 1);
                let (request, hidden) = (*id, request.head_row());
                DeviceWork::Head { request, position, moves, tail, hidden, verdict }
            }
            _ => {
                let (tokens, count) = (&scratch.tokens[..], scratch.tokens.len());
                let hidden = request.rows_mut(count, facts);
                DeviceWork::Input { request: *id, moves, plan, tokens, hidden }
            }
        })
    }

    /// The computation that was out is done: it took so long, or was not computed.
    pub fn handle_work(
        &mut self,
        now: Instant,
        took: Duration,
        fault: Option<&BackendFault>,
        vocabulary: &dyn Vocabulary,
    ) {
        let Some((id, step)) = self.work.out.take() else { return };
        if let Some(fault) = fault {
            return self.fail_all(fault);
        }
        if let Some(fault) = self.work.draft_fault.take() {
            self.draft_without(&fault);
        }
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.budget.forgive(now);
        let cx = &mut self.cx;
        let outcome = match step {
            Computation::Piece(piece) => request.end_piece(piece, took, cx).into(),
            Computation::Tree(phase) => request.end_phase(now, phase, took, cx).into(),
            Computation::Head(head) => request.end_head(now, head, took, vocabulary, cx),
            Computation::Tail(tail) => {
                request.end_tail(tail, &cx.facts);
                Outcome::Goes
            }
            Computation::Feed => Outcome::Goes,
        };
        match outcome {
            Outcome::Goes => {}
            Outcome::Finished(reason) => self.finish(id, reason),
            Outcome::Failed(error) => self.fail(id, error),
        }
    }

    /// True if a computation is due that waits for nothing.
    pub(super) fn is_at_work(&self) -> bool {
        self.work.growing.is_some() || !self.work.heading.is_empty()
    }

    /// The next step of the tree that grows.
    fn poll_tree(&mut self) -> Option<(RequestId, Computation)> {
        let id = self.work.growing?;
        let request = self.requests.get_mut(&id);
        let phase = request.and_then(|request| request.begin_phase(&mut self.cx));
        if phase.is_none() {
            self.work.growing = None;
        }
        Some((id, Computation::Tree(phase?)))
    }

    /// Takes what has arrived, in order, but for frames of requests that are at work, and what
    /// concerns these and all others: the state of the link.
    fn take_arrived(&mut self, now: Instant) {
        let mut next = 0;
        while let Some(inbound) = self.inbox.get(next) {
            let is_cached = match inbound {
                Inbound::Frame(frame) => self.owner(frame).is_some_and(|id| self.work.has(id)),
                _ if self.is_at_work() => return,
                _ => false,
            };
            if is_cached {
                next += 1;
            } else if let Some(inbound) = self.inbox.remove(next) {
                self.take(now, inbound);
            }
        }
    }

    /// Rows that are back, and the verdicts that they lead to. The frames of one request are taken
    /// one at a time: the next one may end a session of which rows are still to be decided.
    fn poll_head(&mut self, now: Instant) -> Option<(RequestId, Computation)> {
        self.take_arrived(now);
        while let Some(id) = self.work.heading.front().copied() {
            if let Some(request) = self.requests.get_mut(&id) {
                if let Some(tail) = request.begin_tail(&mut self.cx) {
                    return Some((id, Computation::Tail(tail)));
                }
                // The drafter takes the root before what verification finds right below it.
                if request.is_unfed() {
                    return Some((id, Computation::Feed));
                }
                if let Some(head) = request.begin_head(&mut self.cx) {
                    return Some((id, Computation::Head(head)));
                }
            }
            self.work.heading.pop_front();
            self.take_arrived(now);
        }
        None
    }

    /// A piece of a prompt, or the last decided token with drafts below it.
    fn poll_input(&mut self, now: Instant) -> Option<(RequestId, Computation)> {
        let may_upload = self.cx.learned.upload_pause().is_none();
        let asks = self.requests.iter();
        let asks = asks.filter_map(|(id, request)| Some((*id, request.ask(may_upload)?)));
        let next = select::choose(asks)?;
        if self.requests.get(&next)?.is_unfed() {
            return Some((next, Computation::Feed));
        }
        for (id, request) in &mut self.requests {
            let is_passed = *id != next && request.ask(may_upload).is_some();
            request.passed = if *id == next { 0 } else { request.passed + u32::from(is_passed) };
        }
        let has_drafter = self.drafter.is_some();
        let request = self.requests.get_mut(&next)?;
        if request.is_decoding() && request.begin_tree(now, has_drafter, &self.cx).is_some() {
            self.work.growing = Some(next);
            return self.poll_tree();
        }
        let piece = request.begin_piece(now, &mut self.cx)?;
        Some((next, Computation::Piece(piece)))
    }

    /// Decided rows that are away, for the trained drafter, or drafts to add to a tree that is.
    fn poll_draft(&mut self, now: Instant) -> Option<(RequestId, Computation)> {
        loop {
            if let Some(id) = self.first(Request::has_unfed) {
                return Some((id, Computation::Feed));
            }
            let id = self.first(Request::wants_more_drafts)?;
            self.requests.get_mut(&id)?.begin_batch(now, &mut self.cx);
            self.work.growing = Some(id);
            if let Some(next) = self.poll_tree() {
                return Some(next);
            }
        }
    }

    /// The oldest request of which something is true.
    fn first(&self, is_wanted: fn(&Request) -> bool) -> Option<RequestId> {
        self.requests.iter().find_map(|(id, request)| is_wanted(request).then_some(*id))
    }
}
