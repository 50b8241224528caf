//! Computation and sending, one request at a time: who is next, and what the model is given.

use std::io;
use std::ops::Bound;
use std::time::{Duration, Instant};

use hat_transport::frame::{HEADER_BYTES, Kind, Priority};
use hat_transport::message::Output;
use hat_transport::turn::{ConnectionId, Endpoint};

use super::common::Common;
use super::request::{Outcome, Request, RequestId};
use super::run::Device;
use super::session::Timed;
use super::tree::{Growth, Level};
use super::turn;
use super::verify::Verdict;
use super::violation::CloudViolation;
use crate::wire;

impl Device {
    /// Computes one piece of one request: see [`turn::choose`]. If there is none, adds drafts to a
    /// tree whose rows are away. Says whether there was anything to do.
    pub(super) fn compute_one(&mut self) -> io::Result<bool> {
        let may_upload = self.cx.learned.upload_pause().is_none();
        let asks = self.requests.iter();
        let next = turn::choose(asks.filter_map(|(id, it)| Some((*id, it.ask(may_upload)?))));
        if let Some(next) = next {
            for (id, request) in &mut self.requests {
                let is_passed = *id != next && request.ask(may_upload).is_some();
                request.passed =
                    if *id == next { 0 } else { request.passed + u32::from(is_passed) };
            }
            self.feed(next);
            self.compute(next)?;
            return Ok(true);
        }
        let wants =
            |(id, request): (&RequestId, &Request)| request.wants_more_drafts().then_some(*id);
        let Some(id) = self.requests.iter().find_map(wants) else { return Ok(false) };
        self.draft_more(id)?;
        Ok(true)
    }

    fn now(&self) -> Instant {
        self.start.shared.clock.now()
    }

    /// Computes the last decided token with drafts below it, or a piece of a prompt.
    fn compute(&mut self, id: RequestId) -> io::Result<()> {
        let began = self.now();
        let has_drafter = self.start.trained.is_some();
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        if request.is_decoding() {
            let level = request.begin_tree(began, has_drafter, &self.cx);
            if let Some(level) = level {
                return self.compute_tree(id, level, began);
            }
            let took = self.now().duration_since(began);
            self.requests.get_mut(&id).into_iter().for_each(|it| it.note_drafting(took));
        }
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        let Some(piece) = request.begin_piece(began, &mut self.cx) else { return Ok(()) };
        let Some(took) = self.run_input(id) else { return Ok(()) };
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        if let Err(error) = request.end_piece(piece, took, &mut self.cx) {
            self.fail(id, error);
        }
        Ok(())
    }

    /// Computes a tree level by level, as long as the trained drafter has better nodes to add.
    fn compute_tree(&mut self, id: RequestId, first: Level, began: Instant) -> io::Result<()> {
        let mut next = Some(first);
        while let Some(level) = next.take() {
            let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
            request.begin_level(&level, &mut self.cx);
            let Some(took) = self.run_input(id) else { return Ok(()) };
            let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
            match request.end_level(&level, took, &mut self.cx) {
                Ok(Growth::Whole) => {}
                Ok(Growth::MayGrow) => {
                    self.propose(id);
                    let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
                    next = request.next_level(&level, &self.cx);
                    if request.session.open().is_some_and(|open| open.outgoing.has_released()) {
                        self.send_ahead(id)?;
                    }
                }
                Err(error) => {
                    self.fail(id, error);
                    return Ok(());
                }
            }
        }
        let took = self.now().duration_since(began);
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        request.end_tree();
        request.note_drafting(took);
        Ok(())
    }

    /// Adds drafts to a tree that is away, or finds that none pay.
    fn draft_more(&mut self, id: RequestId) -> io::Result<()> {
        let began = self.now();
        self.feed(id);
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        request.follow_walk(&mut self.cx);
        let Some(bounds) = request.begin_wave(began, &self.cx) else { return Ok(()) };
        self.propose(id);
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        if let Some(level) = request.grow_wave(bounds, &self.cx) {
            self.compute_tree(id, level, began)?;
            let took = self.now().duration_since(began);
            self.cx.learned.costs.wave.note(took.as_secs_f64());
        } else {
            let took = self.now().duration_since(began);
            self.requests.get_mut(&id).into_iter().for_each(|it| it.note_drafting(took));
        }
        Ok(())
    }

    /// Runs the moves that wait, then the device's layers over the rows that a request has planned.
    /// Returns how long these took; `None` if they were not computed, and all requests have ended.
    fn run_input(&mut self, id: RequestId) -> Option<Duration> {
        self.run_moves();
        let began = self.now();
        let Common { scratch, facts, .. } = &mut self.cx;
        let rows = self.requests.get_mut(&id)?.rows_mut(scratch.tokens.len(), facts);
        self.start.model.input(&scratch.plan.plan(), &scratch.tokens, rows);
        let took = self.now().duration_since(began);
        self.has_computed().then_some(took)
    }

    fn run_moves(&mut self) {
        if !self.cx.moves.is_empty() {
            self.start.model.compact(&self.cx.moves);
            self.cx.moves.clear();
        }
    }

    /// Whether the backend has computed what it was asked to; if not, all requests have ended.
    fn has_computed(&mut self) -> bool {
        let fault = self.start.model.fault();
        if let Some(fault) = &fault {
            self.fail_all(fault);
        }
        fault.is_none()
    }

    /// Lets the trained drafter take the decided rows of a request that it has not.
    fn feed(&mut self, id: RequestId) -> bool {
        let Some(request) = self.requests.get_mut(&id) else { return false };
        request.feed(self.start.trained.as_mut(), &self.cx)
    }

    /// Lets the trained drafter take decided rows that were just sent, while they are away. Says
    /// whether there were any.
    pub(super) fn feed_sent(&mut self) -> bool {
        let has_unfed = |(id, request): (&RequestId, &Request)| request.has_unfed().then_some(*id);
        let next = self.requests.iter().find_map(has_unfed);
        next.is_some_and(|id| self.feed(id))
    }

    /// Lets the trained drafter guess below a request's new nodes.
    fn propose(&mut self, id: RequestId) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let drafter = self.start.trained.as_mut();
        if let Err(fault) = request.propose(drafter, &mut self.cx) {
            self.draft_without(&fault);
        }
    }

    /// Takes rows that came back, and walks as far as they lead.
    pub(super) fn take_output(
        &mut self,
        id: RequestId,
        now: Instant,
        output: &Output<'_>,
        bytes: usize,
    ) -> Result<(), CloudViolation> {
        // The drafter takes the root before what the walk finds right below it.
        self.feed(id);
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        if let Some(tail) = request.handle_output(now, output, bytes, &mut self.cx)? {
            self.run_moves();
            let Common { scratch, facts, .. } = &mut self.cx;
            let rows = &mut scratch.rows[..tail.count * facts.hidden_size];
            self.start.model.tail(&scratch.plan.plan(), rows);
            if !self.has_computed() {
                return Ok(());
            }
            self.requests.get_mut(&id).into_iter().for_each(|it| it.end_tail(&tail, &self.cx));
        }
        while self.run_head(id) {}
        Ok(())
    }

    /// Runs the LM head for the row before which a request's walk stands, if it is back. Says
    /// whether another may be due.
    fn run_head(&mut self, id: RequestId) -> bool {
        let Some(request) = self.requests.get_mut(&id) else { return false };
        let Some(head) = request.begin_head(&mut self.cx) else { return false };
        let began = self.now();
        if head.needs_tail {
            self.run_moves();
        }
        let model = &mut self.start.model;
        let scratch = &mut self.cx.scratch;
        let Some(request) = self.requests.get_mut(&id) else { return false };
        if head.needs_tail {
            model.tail(&scratch.plan.plan(), request.head_row());
        }
        let verdict = if request.answer.wants_greatest() {
            Verdict::Greatest(model.greatest(request.head_row()).map(|(token, _)| token))
        } else {
            model.head(request.head_row(), &mut scratch.logits);
            Verdict::Logits
        };
        if !self.has_computed() {
            return false;
        }
        let now = self.now();
        let took = now.duration_since(began);
        let Some(request) = self.requests.get_mut(&id) else { return false };
        let tokenizer = &self.start.shared.tokenizer;
        match request.end_head(now, head, took, &verdict, tokenizer, &mut self.cx) {
            Outcome::Goes => return true,
            Outcome::Finished(reason) => self.finish(id, reason),
            Outcome::Unheard => self.retire(id),
            Outcome::Failed(error) => self.fail(id, error),
        }
        false
    }

    /// Sends what may leave, as far as there are buffers and credit: first what somebody waits for,
    /// then prompts, of which another one is the first each time.
    pub(super) fn send_released(&mut self) {
        let Some(connection) = self.link.connection.filter(|_| self.link.connected) else { return };
        let now = self.now();
        let Self { endpoint, requests, cx, .. } = self;
        for request in requests.values_mut().filter(|request| request.is_urgent()) {
            request.send_frames(now, endpoint, connection, cx);
        }
        let after = requests.range(self.first_to_send + 1..).next();
        let next = after.or_else(|| requests.iter().next()).map(|(id, _)| *id);
        self.first_to_send = next.unwrap_or_default();
        let first = self.first_to_send;
        let ranges = [
            (Bound::Included(first), Bound::Unbounded),
            (Bound::Unbounded, Bound::Excluded(first)),
        ];
        for range in ranges {
            for (_, request) in requests.range_mut(range) {
                let goes_on =
                    request.is_urgent() || request.send_frames(now, endpoint, connection, cx);
                if !goes_on {
                    return;
                }
            }
        }
    }

    /// Gives the link what a request has so far, so that it is on its way while more is computed.
    /// What arrives meanwhile is looked at later.
    fn send_ahead(&mut self, id: RequestId) -> io::Result<()> {
        let connection = self.link.connection.filter(|_| self.link.connected);
        let now = self.now();
        if let (Some(request), Some(connection)) = (self.requests.get_mut(&id), connection) {
            request.send_frames(now, &mut self.endpoint, connection, &self.cx);
        }
        self.endpoint.turn(Some(Duration::ZERO), &mut self.events)
    }
}

impl Request {
    /// Sends what may leave; says whether all of it could.
    fn send_frames(
        &mut self,
        now: Instant,
        endpoint: &mut Endpoint,
        connection: ConnectionId,
        cx: &Common,
    ) -> bool {
        while self.session.open().is_some_and(|open| open.outgoing.has_released()) {
            if self.send_frame(now, endpoint, connection, cx).is_none() {
                return false;
            }
        }
        true
    }

    /// Sends one frame of what may leave; `None` if it could not.
    fn send_frame(
        &mut self,
        now: Instant,
        endpoint: &mut Endpoint,
        connection: ConnectionId,
        cx: &Common,
    ) -> Option<()> {
        let (hidden_size, codec) = (cx.facts.hidden_size, cx.facts.codec);
        let priority = if self.is_urgent() { Priority::Verify } else { Priority::Prompt };
        let (in_answer, computed) = (!self.in_prefill(), self.computed());
        let open = self.session.open_mut()?;
        let out = &mut open.outgoing;
        let rows_max = wire::rows_per_frame(codec, hidden_size, cx.cloud.frame_max);
        let head = out.head(rows_max, cx.facts.has_tail);
        let rows = usize::from(head.count);
        let parents = if head.tree { out.parents_of(rows) } else { &[] };
        let bytes = head.payload_start() + rows * codec.row_bytes(hidden_size);
        let mut body = endpoint.buffer_for(priority, bytes)?;
        let start = head.encode(parents, body.body_mut());
        let hidden = &out.hidden[out.sent * hidden_size..][..rows * hidden_size];
        codec
            .pack(hidden, hidden_size, &mut body.body_mut()[start..])
            .expect("rows are checked when they are computed");
        endpoint.send(connection, Kind::Rows, open.wire_id, priority, body).ok()?;
        // A chunk of a longer prompt waits for those before it as well.
        let alone = in_answer || computed - open.held == open.chunk.rows;
        if let Some(ids) = out.note_sent(&head).filter(|_| alone) {
            let timed = Timed { at: now, first_id: ids.start, rows: ids.len() };
            open.timed.get_or_insert(timed);
        }
        self.meter.rows_sent(u32::from(head.count));
        self.meter.counts.bytes_up += (HEADER_BYTES + bytes) as u64;
        Some(())
    }
}
