//! Outputs that come back, and verification that turns them into tokens.

use std::time::{Duration, Instant};

use hat_transport::frame::HEADER_BYTES;
use hat_transport::message::{Computed, Dropped, Output};

use super::RequestEvent;
use super::context::{Common, Facts};
use super::request::{Outcome, Request};
use super::session::Timed;
use super::verifier::Taken;
use super::violation::CloudViolation;
use crate::answer::Vocabulary;
use crate::error::RequestError;
use crate::estimate::Returned;
use hat_plan::TokenId;

/// Decided rows that came back and have to go through the tail layers.
#[derive(Clone, Copy, Debug)]
pub(super) struct TailRows {
    /// Id of the last.
    last_id: u32,
    /// Position of the first.
    first: u32,
    count: u32,
}

/// Decided rows for the tail layers.
#[derive(Default)]
pub(super) struct Tail {
    /// Rows that the tail layers have not seen.
    new: Option<TailRows>,
    /// The rows, and then what the tail layers made of them. `[count, hidden_size]`
    rows: Vec<f32>,
}

/// A row that is back and decides the next token: `scratch.argmax` or `scratch.logits` say which,
/// as the answer wants it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    id: u32,
    /// Round trips completed with it.
    round: u32,
    /// True if the tail layers have to see it first, by `scratch.plan`.
    pub(super) needs_tail: bool,
}

impl Request {
    /// Takes rows that came back. Tail layers take those that are decided, all of them in order,
    /// before [`Request::end_tail`] does.
    pub(super) fn handle_output(
        &mut self,
        now: Instant,
        output: &Output<'_>,
        bytes: usize,
        cx: &mut Common,
    ) -> Result<(), CloudViolation> {
        let hidden_size = cx.facts.hidden_size;
        self.meter.counts.bytes_down += (HEADER_BYTES + bytes) as u64;
        self.meter.computed_in(cx.cloud.arithmetic_id);
        let count = usize::from(output.head.count);
        let codec = cx.facts.codec.down();
        if output.payload.len() != count * codec.row_bytes(hidden_size) {
            return Err(CloudViolation::Payload { bytes: output.payload.len(), rows: count });
        }
        cx.scratch.rows.resize(count * hidden_size, 0.0);
        codec.decode(output.payload, hidden_size, &mut cx.scratch.rows)?;
        let Some(open) = self.session.open() else { return Ok(()) };
        if let Some(row) = output.ids.iter().find(|id| *id > open.outgoing.sent_id) {
            return Err(CloudViolation::NotSent { row });
        }
        // Decided rows come before those that pend below them.
        let decided = output.ids.iter().take_while(|id| open.due.contains(id)).count();
        self.note_costs(now, output, cx);
        self.take_decided(output, decided, cx)?;
        if self.take_pending(output, decided, cx)? || decided > 0 {
            self.budget.rows(now, output.ids.iter().max().unwrap_or(0));
        }
        Ok(())
    }

    /// Times of the first output after rows were sent, which tell of link and cloud.
    fn note_costs(&mut self, now: Instant, output: &Output<'_>, cx: &mut Common) {
        let (in_prefill, computed) = (self.in_prefill(), self.computed());
        let Some(open) = self.session.open_mut() else { return };
        cx.learned.note_arrivals(output.head.arrivals);
        let is_first = |timed: &mut Timed| output.ids.iter().any(|id| id >= timed.first_id);
        // Rows of a prompt with others before them have no time of their own.
        let (rows, away_s) = match open.timed.take_if(is_first) {
            Some(Timed { at, rows, .. }) => (rows, Some(now.duration_since(at).as_secs_f64())),
            None if in_prefill => (open.outgoing.computed, None),
            None => return,
        };
        cx.learned.note_link();
        cx.learned.estimator.note_returned(&Returned {
            rows,
            sent_bytes: (rows * cx.facts.row_bytes()) as u64,
            prefix: computed.saturating_sub(u32::try_from(rows).unwrap_or(u32::MAX)),
            step_rows: output.head.step_rows,
            step_s: f64::from(output.head.step_us) * 1e-6,
            queue_s: f64::from(output.head.queue_us) * 1e-6,
            away_s,
        });
    }

    /// Takes the first `count` of `scratch.rows`, which are decided. Such rows come back in order:
    /// the last one, or, for the tail layers, all.
    fn take_decided(
        &mut self,
        output: &Output<'_>,
        count: usize,
        cx: &Common,
    ) -> Result<(), CloudViolation> {
        let Some(open) = self.session.open_mut().filter(|_| count > 0) else { return Ok(()) };
        let expected = if cx.facts.has_tail { open.due.start } else { open.due.end - 1 };
        if let Some((row, expected)) =
            output.ids.iter().take(count).zip(expected..).find(|(id, expected)| id != expected)
        {
            return Err(CloudViolation::OutOfTurn { row, expected });
        }
        let rows = u32::try_from(count).expect("a frame holds few rows");
        let end = expected + rows;
        let first = self.kv.committed() - (open.due.end - expected);
        self.meter.rows_settled(end - open.due.start);
        open.due.start = end;
        let taken = &cx.scratch.rows[..count * cx.facts.hidden_size];
        if cx.facts.has_tail {
            open.tail.rows.clear();
            open.tail.rows.extend_from_slice(taken);
            open.tail.new = Some(TailRows { last_id: end - 1, first, count: rows });
        } else {
            open.verifier.take(end - 1, &taken[taken.len() - cx.facts.hidden_size..]);
        }
        Ok(())
    }

    /// True if rows that are back are to go through the tail layers, or the LM head.
    pub(super) fn has_head(&mut self) -> bool {
        let open = self.session.open_mut();
        open.is_some_and(|open| open.tail.new.is_some() || open.verifier.next().is_some())
    }

    /// Decided rows that came back, for the tail layers, by `scratch.plan`.
    pub(super) fn begin_tail(&mut self, cx: &mut Common) -> Option<TailRows> {
        let tail = self.session.open_mut()?.tail.new.take()?;
        let plan = &mut cx.scratch.plan;
        plan.clear();
        plan.push_committed(tail.first, tail.count);
        plan.end_sequence(self.kv.pages());
        Some(tail)
    }

    /// Rows for the tail layers. `[count, hidden_size]`
    pub(super) fn tail_rows(&mut self) -> &mut [f32] {
        self.session.open_mut().map_or(&mut [], |open| &mut open.tail.rows)
    }

    /// The tail layers have seen decided rows. The last of all leads to a token; verification
    /// doesn't know the others.
    pub(super) fn end_tail(&mut self, tail: TailRows, facts: &Facts) {
        let Some(open) = self.session.open_mut() else { return };
        let row = open.tail.rows.chunks_exact(facts.hidden_size).next_back();
        open.verifier.take(tail.last_id, row.unwrap_or_default());
    }

    /// Takes `scratch.rows` from number `first` on, which pend, in whatever order. Returns true if
    /// any was waited for; those that have become stale are let go.
    fn take_pending(
        &mut self,
        output: &Output<'_>,
        first: usize,
        cx: &Common,
    ) -> Result<bool, CloudViolation> {
        let Some(open) = self.session.open_mut() else { return Ok(false) };
        let mut has_news = false;
        let rows = cx.scratch.rows.chunks_exact(cx.facts.hidden_size);
        for (row, output) in output.ids.iter().zip(rows).skip(first) {
            self.meter.rows_settled(1);
            match open.verifier.take(row, output) {
                Taken::Awaited => has_news = true,
                Taken::Unknown => {}
                Taken::Twice => return Err(CloudViolation::Twice { row }),
            }
        }
        Ok(has_news)
    }

    /// Takes the news that rows will not come back. They were stale before the cloud was told so,
    /// and nobody here waits for them.
    pub(super) fn handle_dropped(&mut self, dropped: &Dropped) -> Result<(), CloudViolation> {
        let Some(open) = self.session.open_mut() else { return Ok(()) };
        let ids = dropped.first_id..=dropped.first_id + u32::from(dropped.count - 1);
        if *ids.end() > open.outgoing.sent_id {
            return Err(CloudViolation::DroppedUnsent { row: *ids.end() });
        }
        if let Some(row) = ids.clone().find(|id| open.verifier.awaits(*id)) {
            return Err(CloudViolation::DroppedAwaited { row });
        }
        self.meter.rows_settled(u32::from(dropped.count));
        // The output that would have told how long they were away does not come.
        open.timed = open.timed.filter(|timed| !ids.contains(&timed.first_id));
        Ok(())
    }

    /// A chunk of a prompt has been computed, long before the prompt's first output.
    pub(super) fn handle_computed(
        &mut self,
        now: Instant,
        computed: &Computed,
        bytes: usize,
        cx: &mut Common,
    ) -> Result<(), CloudViolation> {
        let Some(open) = self.session.open_mut() else { return Ok(()) };
        let row = computed.first_id + u32::from(computed.count) - 1;
        self.meter.counts.bytes_down += (HEADER_BYTES + bytes) as u64;
        if row > open.outgoing.sent_id {
            return Err(CloudViolation::NotSent { row });
        }
        // Said once more it is no news.
        if row > open.told_id {
            open.told_id = row;
            self.budget.rows(now, row);
        }
        cx.learned.note_computed(computed);
        Ok(())
    }

    /// The row before which verification stands, if it is back. The LM head runs for such rows
    /// alone.
    pub(super) fn begin_head(&mut self, cx: &mut Common) -> Option<Head> {
        let open = self.session.open_mut()?;
        let visit = open.verifier.next()?;
        let (id, round) = (visit.id, visit.round);
        // Drafted rows have not been through the tail layers; their ancestors have.
        let needs_tail = cx.facts.has_tail && visit.was_drafted;
        if needs_tail {
            let plan = &mut cx.scratch.plan;
            plan.clear();
            if !self.kv.push_row(id, plan) {
                // Its token was decided before it came back: it is the last of the path.
                plan.push_committed(self.kv.committed() - 1, 1);
            }
            plan.end_sequence(self.kv.pages());
        }
        Some(Head { id, round, needs_tail })
    }

    /// That row, for tail layers and LM head to work on in place. `[hidden_size]`
    pub(super) fn head_row(&mut self) -> &mut [f32] {
        let visit = self.session.open_mut().and_then(|open| open.verifier.next());
        visit.map_or(&mut [], |visit| visit.output)
    }

    /// The LM head has seen a row: decides the next token.
    pub(super) fn end_head(
        &mut self,
        now: Instant,
        head: Head,
        took: Duration,
        vocabulary: &dyn Vocabulary,
        cx: &mut Common,
    ) -> Outcome {
        self.round = head.round;
        self.meter.counts.rounds = head.round;
        self.meter.counts.head_ms += took.as_secs_f64() * 1e3;
        cx.learned.estimator.head.note(took.as_secs_f64());
        let position = self.path.rows() - 1;
        let emitted = if self.answer.wants_argmax() {
            let argmax = cx.scratch.argmax.take();
            let emitted = argmax.map(|(token, _)| self.answer.take_argmax(token, vocabulary));
            emitted.ok_or(RequestError::NotFinite { position })
        } else {
            self.answer.take(&cx.scratch.logits, position, vocabulary)
        };
        let emitted = match emitted {
            Ok(emitted) => emitted,
            Err(error) => return Outcome::Failed(error),
        };
        if let Some(token) = emitted.token {
            self.meter.token(now);
            self.note_drafts_tested(token, cx);
            self.push_token(token);
        }
        if let Some(event) = emitted.event {
            cx.tell(self.id, RequestEvent::Said(event));
        }
        if let Some(reason) = emitted.finish {
            if self.kv.place(head.id).is_some() {
                self.commit(head.id, cx);
            }
            return Outcome::Finished(reason);
        }
        let Some(open) = self.session.open_mut() else { return Outcome::Goes };
        if let Some(is_ahead) = emitted.token.and_then(|token| open.verifier.step(token)) {
            self.meter.counts.predraft_hits += u32::from(is_ahead);
            // Where verification stands now, more may be drafted.
            open.drafts.is_full = false;
        } else {
            self.leave_tree(now, head.id, cx);
        }
        self.check();
        Outcome::Goes
    }

    /// Drafts at `token`, which is decided, are right or wrong.
    fn note_drafts_tested(&mut self, token: TokenId, cx: &mut Common) {
        let Some(open) = self.session.open_mut() else { return };
        for (proposal, source) in open.drafts.withheld.drain(..) {
            cx.learned.acceptance.note(source, proposal == token);
        }
        for (proposal, source) in open.verifier.drafts() {
            self.meter.tested(source.drafter.name(), proposal == token);
            cx.learned.acceptance.note(source, proposal == token);
        }
    }

    /// Verification has left the tree after row `id`: keeps the path to it, here now and in the
    /// cloud with the next rows, and forgets the rest.
    fn leave_tree(&mut self, now: Instant, id: u32, cx: &mut Common) {
        // The last decided token has no row yet.
        let (end, tokens) = (self.path.tokens.len() - 1, self.answer.tokens().len());
        let Some(open) = self.session.open_mut() else { return };
        self.drafting.keep_right_rows(open, end, cx.facts.hidden_size);
        open.verifier.clear();
        open.drafts.clear();
        open.outgoing.drop_unheard();
        if let Some(round) = open.round.take() {
            let took = now.duration_since(round.began).as_secs_f64();
            let estimator = &mut cx.learned.estimator;
            estimator.tokens.note((tokens - round.tokens) as f64);
            if round.asked {
                self.drafting.asking.note(tokens - round.tokens, took, estimator.plain_rate());
            }
        }
        if self.kv.place(id).is_some() {
            self.commit(id, cx);
        }
    }
}
