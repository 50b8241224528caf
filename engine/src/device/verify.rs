//! Outputs that come back, and the walk that turns them into tokens.

use hat_transport::frame::HEADER_BYTES;
use hat_transport::message::{Dropped, Output};

use super::active::Timed;
use super::run::Device;
use super::violation::CloudViolation;
use super::walk::{Taken, Visit};
use crate::backend::TokenId;
use crate::error::RequestError;
use crate::sequence::RowPlace;

impl Device {
    /// Takes rows that came back, and walks as far as they lead.
    pub(super) fn take_output(
        &mut self,
        index: usize,
        output: &Output<'_>,
        bytes: usize,
    ) -> Result<(), CloudViolation> {
        let hidden_size = self.start.facts.hidden_size;
        let active = &mut self.actives[index];
        active.meter.counts.bytes_down += (HEADER_BYTES + bytes) as u64;
        active.meter.computed_in(self.peer_arithmetic);
        active.deadline = None;
        let count = usize::from(output.head.count);
        self.row.resize(count.max(1) * hidden_size, 0.0);
        let codec = self.start.config.codec().down();
        if output.payload.len() != count * codec.row_bytes(hidden_size) {
            return Err(CloudViolation::Payload { bytes: output.payload.len(), rows: count });
        }
        codec.unpack(output.payload, hidden_size, &mut self.row)?;
        if let Some(row) = output.ids.iter().find(|id| *id > active.sent_id) {
            return Err(CloudViolation::NotSent { row });
        }
        self.note_costs(index, output);
        let active = &self.actives[index];
        // Decided rows come before those that pend below them.
        let decided = output.ids.iter().take_while(|id| active.decided.contains(id)).count();
        if decided > 0 {
            self.take_decided(index, output, decided)?;
        }
        let has_news = self.take_pending(index, output, decided)? || decided > 0;
        if has_news {
            self.actives[index].heard = self.start.shared.clock.now();
        }
        self.walk(index);
        Ok(())
    }

    /// Takes the news that rows will not come back. They were void before the cloud was told so,
    /// and nobody here waits for them.
    pub(super) fn take_dropped(
        &mut self,
        index: usize,
        dropped: &Dropped,
    ) -> Result<(), CloudViolation> {
        let active = &mut self.actives[index];
        let ids = dropped.first_id..=dropped.first_id + u32::from(dropped.count - 1);
        if *ids.end() > active.sent_id {
            return Err(CloudViolation::DroppedUnsent { row: *ids.end() });
        }
        if let Some(row) = ids.clone().find(|id| active.walk.awaits(*id)) {
            return Err(CloudViolation::DroppedAwaited { row });
        }
        active.meter.rows_settled(u32::from(dropped.count));
        // The output that would have told how long they were away does not come.
        active.timed = active.timed.filter(|timed| !ids.contains(&timed.first_id));
        Ok(())
    }

    /// What the first output after rows were sent says of link and cloud.
    fn note_costs(&mut self, index: usize, output: &Output<'_>) {
        let now = self.start.shared.clock.now();
        let head = &output.head;
        self.note_arrivals(head.arrivals);
        let timed = &mut self.actives[index].timed;
        let Some(Timed { at, rows, .. }) =
            timed.take_if(|timed| output.ids.iter().any(|id| id >= timed.first_id))
        else {
            let active = &self.actives[index];
            if active.answer.tokens().is_empty() {
                self.note_returned(index, active.unsent.count, head, None);
            }
            return;
        };
        let step = f64::from(head.step_us) * 1e-6;
        let total = now.duration_since(at).as_secs_f64();
        let step_rows = head.step_rows as usize;
        let queue = f64::from(head.queue_us) * 1e-6;
        self.costs.note_step(rows, step_rows, step, queue);
        self.costs.wait.note(rows, (total - step - queue).max(0.0));
        self.note_returned(index, rows, head, Some(total));
    }

    /// Takes the first `count` rows of `self.row`, which are decided. Such rows come back in
    /// order: the last one, or, for the tail layers, all.
    fn take_decided(
        &mut self,
        index: usize,
        output: &Output<'_>,
        count: usize,
    ) -> Result<(), CloudViolation> {
        let hidden_size = self.start.facts.hidden_size;
        let active = &mut self.actives[index];
        let expected = match self.start.facts.has_tail {
            true => active.decided.start,
            false => active.decided.end - 1,
        };
        if let Some((row, expected)) =
            output.ids.iter().take(count).zip(expected..).find(|(id, expected)| id != expected)
        {
            return Err(CloudViolation::OutOfTurn { row, expected });
        }
        let rows = &mut self.row[..count * hidden_size];
        let end = expected + u32::try_from(count).expect("a frame holds few rows");
        if self.start.facts.has_tail {
            let first = active.sequence.committed() - (active.decided.end - expected);
            self.plan.clear();
            self.plan.push_committed(RowPlace { position: first, slot: first }, end - expected);
            self.plan.end_sequence(&active.sequence);
            self.start.model.tail(&self.plan.plan(), rows);
        }
        active.meter.rows_settled(end - active.decided.start);
        active.decided.start = end;
        // The last of all leads to a token; the walk doesn't know the others.
        active.walk.take(end - 1, &rows[rows.len() - hidden_size..]);
        Ok(())
    }

    /// Takes the rows of `self.row` from number `first` on, which pend, in whatever order. Says if
    /// any was waited for; those that have become void are let go.
    fn take_pending(
        &mut self,
        index: usize,
        output: &Output<'_>,
        first: usize,
    ) -> Result<bool, CloudViolation> {
        let mut has_news = false;
        let active = &mut self.actives[index];
        let rows = self.row.chunks_exact(self.start.facts.hidden_size);
        for (id, row) in output.ids.iter().zip(rows).skip(first) {
            active.meter.rows_settled(1);
            match active.walk.take(id, row) {
                Taken::Awaited => has_news = true,
                Taken::Unknown => {}
                Taken::Twice => return Err(CloudViolation::Twice { row: id }),
            }
        }
        Ok(has_news)
    }

    /// Goes from row to row as long as their outputs are back; each leads to a token. The LM head
    /// runs for these rows alone.
    fn walk(&mut self, index: usize) {
        loop {
            let active = &mut self.actives[index];
            let Some(visit) = active.walk.next() else { return };
            let Visit { id, round, was_drafted, output } = visit;
            let began = self.start.shared.clock.now();
            // Drafted rows have not been through the tail layers; their ancestors have.
            if self.start.facts.has_tail && was_drafted {
                self.plan.clear();
                if !self.plan.push_pending(&active.sequence, id) {
                    // Its token was decided before it came back: it is the last of the path.
                    let last = active.sequence.committed() - 1;
                    self.plan.push_committed(RowPlace { position: last, slot: last }, 1);
                }
                self.plan.end_sequence(&active.sequence);
                self.start.model.tail(&self.plan.plan(), output);
            }
            let greatest = if active.answer.wants_greatest() {
                Some(self.start.model.greatest(output))
            } else {
                self.start.model.head(output, &mut self.logits);
                None
            };
            active.round = round;
            active.meter.counts.rounds = round;
            let took = self.start.shared.clock.now().duration_since(began).as_secs_f64();
            self.costs.head.note(took);
            self.monitor.note_head(took);
            active.meter.counts.head_ms += took * 1e3;
            if !self.decide(index, id, greatest) {
                return;
            }
        }
    }

    /// The logits behind row `id` are there, or `greatest` of them if the answer wants no more:
    /// decides the next token. Says whether the walk goes on below; if not, the request has ended
    /// or the token's row is yet to be made.
    fn decide(&mut self, index: usize, id: u32, greatest: Option<Option<(TokenId, f32)>>) -> bool {
        let shared = &self.start.shared;
        let active = &mut self.actives[index];
        let position = active.rows() - 1;
        let emitted = match greatest {
            Some(Some((token, _))) => Ok(active.answer.take_greatest(token, &shared.tokenizer)),
            Some(None) => Err(RequestError::NotFinite { position }),
            None => active.answer.take(&self.logits, position, &shared.tokenizer),
        };
        let emitted = match emitted {
            Ok(emitted) => emitted,
            Err(error) => {
                self.fail(index, error);
                return false;
            }
        };
        if let Some(token) = emitted.token {
            active.meter.token(shared.clock.now());
            for (guess, source) in active.held_back.drain(..) {
                self.acceptance.note(source, guess == token);
            }
            for (guess, source) in active.walk.drafts() {
                active.meter.tested(source.drafter.name(), guess == token);
                self.acceptance.note(source, guess == token);
            }
            active.push_token(token);
        }
        let heard = emitted.event.is_none_or(|event| active.job.events.send(Ok(event)).is_ok());
        if let Some(reason) = emitted.finish {
            if self.actives[index].sequence.place(id).is_some() {
                self.commit(index, id);
            }
            self.finish(index, reason);
            return false;
        }
        if !heard {
            self.retire(index);
            return false;
        }
        if let Some(step) = emitted.token.and_then(|token| active.walk.step(token)) {
            active.meter.counts.predraft_hits += u32::from(step.into_next_wave);
            // Where the walk stands now, more may be drafted.
            active.drafts.is_full = false;
            return true;
        }
        self.leave_tree(index, id);
        false
    }

    /// The walk has left the tree after row `id`: keeps the path to it, here now and in the cloud
    /// with the next rows, and forgets the rest.
    fn leave_tree(&mut self, index: usize, id: u32) {
        // The last decided token has no row yet.
        let end = self.actives[index].tokens.len() - 1;
        self.feed_path(index, end);
        let now = self.start.shared.clock.now();
        let active = &mut self.actives[index];
        active.walk.clear();
        active.drafts.clear();
        active.unsent.drop_unheard();
        if let Some(round) = active.round_now.take() {
            let took = now.duration_since(round.began).as_secs_f64();
            let tokens = active.answer.tokens().len() - round.tokens;
            self.costs.note_round(tokens);
            if round.asked {
                active.asking.note(tokens, took, self.costs.plain_rate());
            }
        }
        if active.sequence.place(id).is_some() {
            self.commit(index, id);
        }
    }

    /// Keeps the path to row `id`, which pends, here now and in the cloud with the next rows.
    pub(super) fn commit(&mut self, index: usize, id: u32) {
        let active = &mut self.actives[index];
        self.moves.clear();
        self.pruned.clear();
        active
            .sequence
            .commit(id, &mut self.moves, &mut self.pruned)
            .expect("the walk stands on rows that pend");
        self.start.model.compact(&self.moves);
        active.commit = id;
    }
}
