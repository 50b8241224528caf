//! Computations, handed out one at a time: which is next, and what follows from it.
//!
//! The link is looked after between any two of them, so the rows of one level are on their way
//! while the next one is computed. What arrives for a request waits as long as its tree grows:
//! nothing changes under a computation.

use std::time::{Duration, Instant};

use hat_transport::message::Output;

use super::common::Common;
use super::prompt::Piece;
use super::request::{Outcome, Request, RequestId};
use super::run::Device;
use super::tree::{Bounds, Level, Stage};
use super::turn;
use super::verify::{Head, TailRows, Verdict};
use super::violation::CloudViolation;
use crate::backend::BackendFault;

/// One computation of one request.
pub(super) struct Work {
    id: RequestId,
    step: Step,
}

/// What is computed, and by what.
enum Step {
    /// Decided rows, by the device's layers.
    Piece(Piece),
    /// A level of a draft tree, by the device's layers.
    Level(Level),
    /// Decided rows that came back, by the tail layers.
    Tail(TailRows),
    /// A row that came back, by the LM head, and by the tail layers first if it was drafted.
    Head(Head, Verdict),
    /// Decided rows, by the trained drafter.
    Feed,
    /// Guesses of the trained drafter below a level.
    Guess(Level),
    /// Guesses of the trained drafter below a tree that is away.
    Wave(Bounds),
}

/// The requests with something in progress that goes before everything else.
#[derive(Default)]
pub(super) struct AtWork {
    /// Its tree grows, level by level.
    growing: Option<RequestId>,
    /// Rows came back for it: heads may be due.
    heading: Option<RequestId>,
    /// Rows that came back for it have to go through the tail layers first.
    tail: Option<TailRows>,
}

impl Device {
    /// The next computation: of the tree that grows; of rows that are back, in the order in which
    /// they came; of the request whose turn it is, see [`turn::choose`]; of the trained drafter
    /// over rows that are away; of drafts to add to a tree that is away. Beyond rows that are back
    /// nothing is computed unless `is_clear`.
    pub(super) fn poll_work(&mut self, now: Instant, is_clear: bool) -> Option<Work> {
        if let Some(work) = self.poll_tree().or_else(|| self.poll_head()) {
            return Some(work);
        }
        if !is_clear {
            return None;
        }
        let may_upload = self.cx.learned.upload_pause().is_none();
        let asks = self.requests.iter();
        let next = turn::choose(asks.filter_map(|(id, it)| Some((*id, it.ask(may_upload)?))));
        if let Some(id) = next {
            return self.poll_input(now, id, may_upload);
        }
        loop {
            if let Some(id) = self.first(Request::has_unfed) {
                return Some(Work { id, step: Step::Feed });
            }
            let id = self.first(Request::wants_more_drafts)?;
            self.requests.get_mut(&id)?.begin_wave(now, &mut self.cx);
            self.at_work.growing = Some(id);
            if let Some(work) = self.poll_tree() {
                return Some(work);
            }
        }
    }

    /// The oldest request of which something is true.
    fn first(&self, is_wanted: fn(&Request) -> bool) -> Option<RequestId> {
        self.requests.iter().find_map(|(id, request)| is_wanted(request).then_some(*id))
    }

    /// Whether a computation is due that does not wait for anything.
    pub(super) fn is_at_work(&self) -> bool {
        self.at_work.growing.is_some() || self.at_work.heading.is_some()
    }

    /// The next step of the tree that grows.
    fn poll_tree(&mut self) -> Option<Work> {
        let id = self.at_work.growing?;
        let request = self.requests.get_mut(&id);
        let stage = request.and_then(|it| Some(std::mem::take(&mut it.session.open_mut()?.stage)));
        let step = match stage.unwrap_or_default() {
            Stage::Idle => {
                self.at_work.growing = None;
                return None;
            }
            Stage::Level(level) => {
                self.requests.get_mut(&id)?.begin_level(&level, &mut self.cx);
                Step::Level(level)
            }
            Stage::Guess(level) => Step::Guess(level),
            Stage::Wave(bounds) => Step::Wave(bounds),
        };
        Some(Work { id, step })
    }

    /// Rows that are back, and the verdicts that they lead to. Frames are taken one at a time: the
    /// next one may end a session of which rows are still to be decided.
    fn poll_head(&mut self) -> Option<Work> {
        loop {
            if let Some(id) = self.at_work.heading
                && let Some(request) = self.requests.get_mut(&id)
            {
                if let Some(tail) = self.at_work.tail.take() {
                    return Some(Work { id, step: Step::Tail(tail) });
                }
                // The drafter takes the root before what the walk finds right below it.
                if request.is_unfed() {
                    return Some(Work { id, step: Step::Feed });
                }
                if let Some(head) = request.begin_head(&mut self.cx) {
                    return Some(Work { id, step: Step::Head(head, Verdict::Logits) });
                }
            }
            (self.at_work.heading, self.at_work.tail) = (None, None);
            let event = self.events.pop_front()?;
            self.take(event);
        }
    }

    /// A piece of a prompt, or the last decided token with drafts below it.
    fn poll_input(&mut self, now: Instant, next: RequestId, may_upload: bool) -> Option<Work> {
        if self.requests.get(&next)?.is_unfed() {
            return Some(Work { id: next, step: Step::Feed });
        }
        for (id, request) in &mut self.requests {
            let is_passed = *id != next && request.ask(may_upload).is_some();
            request.passed = if *id == next { 0 } else { request.passed + u32::from(is_passed) };
        }
        let has_drafter = self.start.trained.is_some();
        let request = self.requests.get_mut(&next)?;
        if request.is_decoding() && request.begin_tree(now, has_drafter, &self.cx) {
            self.at_work.growing = Some(next);
            return self.poll_tree();
        }
        let piece = request.begin_piece(now, &mut self.cx)?;
        Some(Work { id: next, step: Step::Piece(piece) })
    }

    /// Computes, and takes what came of it.
    pub(super) fn run(&mut self, mut work: Work) {
        let began = self.now();
        let drafter_fault = self.compute(&mut work);
        let now = self.now();
        if let Some(fault) = self.start.model.fault() {
            return self.fail_all(&fault);
        }
        if let Some(fault) = drafter_fault {
            self.draft_without(&fault);
        }
        self.end_work(now, work, now.duration_since(began));
    }

    /// The computation itself. A fault that is returned is the trained drafter's.
    fn compute(&mut self, work: &mut Work) -> Option<BackendFault> {
        let model = &mut self.start.model;
        let request = self.requests.get_mut(&work.id)?;
        let Common { scratch, facts, moves, .. } = &mut self.cx;
        // They come before any row, also those of other requests: pages may have changed hands.
        if work.step.touches_kv() && !moves.is_empty() {
            model.compact(moves);
            moves.clear();
        }
        match &mut work.step {
            Step::Piece(_) | Step::Level(_) => {
                let rows = request.rows_mut(scratch.tokens.len(), facts);
                model.input(&scratch.plan.plan(), &scratch.tokens, rows);
            }
            Step::Tail(tail) => {
                let rows = &mut scratch.rows[..tail.count * facts.hidden_size];
                model.tail(&scratch.plan.plan(), rows);
            }
            Step::Head(head, verdict) => {
                let wants_greatest = request.answer.wants_greatest();
                let row = request.head_row();
                if head.needs_tail {
                    model.tail(&scratch.plan.plan(), row);
                }
                if wants_greatest {
                    *verdict = Verdict::Greatest(model.greatest(row).map(|(token, _)| token));
                } else {
                    model.head(row, &mut scratch.logits);
                }
            }
            Step::Feed => {
                request.feed(self.start.trained.as_mut(), &self.cx);
            }
            Step::Guess(_) | Step::Wave(_) => {
                return request.propose(self.start.trained.as_mut(), &mut self.cx).err();
            }
        }
        None
    }

    /// What follows from a computation that took so long.
    fn end_work(&mut self, now: Instant, work: Work, took: Duration) {
        let Work { id, step } = work;
        let Some(request) = self.requests.get_mut(&id) else { return };
        let cx = &mut self.cx;
        let outcome = match step {
            Step::Piece(piece) => request.end_piece(piece, took, cx).into(),
            Step::Level(level) => request.end_level(now, level, took, cx).into(),
            Step::Tail(tail) => {
                request.end_tail(&tail, cx);
                Outcome::Goes
            }
            Step::Head(head, verdict) => {
                let tokenizer = &self.start.shared.tokenizer;
                request.end_head(now, head, took, &verdict, tokenizer, cx)
            }
            Step::Feed => Outcome::Goes,
            Step::Guess(level) => {
                request.grow_level(now, &level, cx);
                Outcome::Goes
            }
            Step::Wave(bounds) => {
                request.grow_wave(now, bounds, cx);
                Outcome::Goes
            }
        };
        match outcome {
            Outcome::Goes => {}
            Outcome::Finished(reason) => self.finish(id, reason),
            Outcome::Unheard => self.retire(id, false),
            Outcome::Failed(error) => self.fail(id, error),
        }
    }

    /// Takes rows that came back: [`Device::poll_work`] hands out what they are for.
    pub(super) fn take_output(
        &mut self,
        id: RequestId,
        now: Instant,
        output: &Output<'_>,
        bytes: usize,
    ) -> Result<(), CloudViolation> {
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        self.at_work.tail = request.handle_output(now, output, bytes, &mut self.cx)?;
        self.at_work.heading = Some(id);
        Ok(())
    }
}

impl Step {
    /// Whether rows are written to, or read from, the KV store of the device's layers.
    fn touches_kv(&self) -> bool {
        match self {
            Self::Piece(_) | Self::Level(_) | Self::Tail(_) => true,
            Self::Head(head, _) => head.needs_tail,
            Self::Feed | Self::Guess(_) | Self::Wave(_) => false,
        }
    }
}
