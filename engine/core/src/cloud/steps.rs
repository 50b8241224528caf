//! Begin and end of a step.

use std::time::Instant;

use hat_plan::BackendFault;
use hat_transport::codec::CodecError;
use hat_transport::conn::FrameSink;
use hat_transport::frame::{Kind, Priority};
use hat_transport::message::{Arrivals, Computed, Message, OutputHead};

use super::CloudCore;
use super::batch::StepBatch;
use super::session::Spent;
use super::violation::SessionEnd;
use crate::sched::{BatchItem, Bound, SessionKey};
use crate::wire;

impl CloudCore {
    /// Bounds every step so, instead of by what steps took, and lets chunks of prompts be as long
    /// as the row budget: for comparisons.
    pub fn bound_by(&mut self, bound: Bound) {
        self.planner.bound = Some(bound);
        self.begun_frames_max = usize::MAX;
    }

    /// Works that wait for a step.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.planner.scheduler.queued()
    }

    /// Steps that the first stage may have, the one that it runs included, when another one is
    /// asked for.
    pub fn steps_ahead(&mut self, now: Instant) -> u64 {
        self.planner.ahead(now)
    }

    /// The next step, if there are rows for one and a batch to put them into. To be asked when the
    /// first stage has fewer than [`Self::steps_ahead`].
    pub fn poll_step(&mut self, now: Instant) -> Option<StepBatch> {
        let mut items = std::mem::take(&mut self.items);
        let batch = self.planner.begin(now, &mut items);
        let batch = batch.map(|batch| self.fill(now, batch, &mut items));
        self.items = items;
        batch
    }

    fn fill(&mut self, now: Instant, mut batch: StepBatch, items: &mut [BatchItem]) -> StepBatch {
        items.sort_by_key(|item| self.sessions.session(item.session).entry_layer());
        for item in items.iter() {
            batch.step.exit_layer = item.class;
            let hidden_size = self.hidden_size();
            let session = self.sessions.session(item.session);
            session.in_flight += 1;
            match batch.put(item, session, hidden_size) {
                Ok(()) => self.name_prompt(item.session),
                Err(violation) => self.end_for(now, item.session, violation),
            }
        }
        items.iter().for_each(|item| self.enqueue_next(now, item.session));
        self.planner.hand_out(now, &batch);
        batch
    }

    /// Tells the scheduler of a session's first chunk, unless it holds one, or the rest of one that
    /// it has cut. It hears of the next one when that has run, so what a session may have waiting
    /// is bounded by its device's credit alone.
    pub(super) fn enqueue_next(&mut self, now: Instant, key: SessionKey) {
        let is_new = !self.planner.scheduler.holds(key);
        let Some(session) = self.sessions.find(key).filter(|_| is_new) else { return };
        let Some(next) = session.next() else { return };
        let item = BatchItem {
            session: key,
            device: self.clients.device(session.connection).expect("a session has a connection"),
            rows: next.rows,
            context: session.sequence.committed(),
            urgent: next.urgent,
            divisible: next.divisible,
            class: session.exit_layer(),
        };
        self.planner.enqueue(now, item);
    }

    /// Names the pages of a session's prompt that its planned rows fill. Others may have them from
    /// now on: the rows of whoever asks run in a later step.
    fn name_prompt(&mut self, key: SessionKey) {
        let session = self.sessions.session(key);
        let Some(names) = session.names_to_keep() else { return };
        self.pages.keep(session.scope, names, session.sequence.pages());
        session.names_were_kept();
    }

    /// A step has ended: sends back what it computed. [`Self::handle_traffic`] of its connections
    /// goes before.
    pub fn handle_step(&mut self, now: Instant, mut batch: StepBatch, sink: &mut dyn FrameSink) {
        // What was answered before goes before these outputs.
        self.clients.send_answers(sink);
        if let Some(fault) = batch.fault.take() {
            self.close_all(now, fault);
        }
        let rows = batch.step.plan.rows();
        self.figures.steps += 1;
        self.figures.rows += rows as u64;
        self.figures.step_us += u64::from(batch.took_us());
        self.planner.note_step(&batch);
        for index in 0..batch.sessions.len() {
            let (key, _) = batch.sessions[index];
            if let Some(session) = self.sessions.find(key) {
                session.in_flight -= 1;
                session.active_at = now;
            }
            if let Err(error) = self.send_outputs(now, &batch, index, sink) {
                // Its rows may be no numbers from an early page on: nobody shall go on from them.
                self.pages.forget(self.sessions.session(key).sequence.pages());
                self.end_for(now, key, SessionEnd::Output(error));
            }
        }
        self.planner.take_back(now, batch);
    }

    /// Sends what one session gets out of a finished step.
    fn send_outputs(
        &mut self,
        now: Instant,
        batch: &StepBatch,
        index: usize,
        sink: &mut dyn FrameSink,
    ) -> Result<(), CodecError> {
        let hidden_size = self.hidden_size();
        let (key, to) = batch.sessions[index];
        let Some(session) = self.sessions.find(key) else { return Ok(()) };
        let (wire_id, codec) = (session.wire_id, session.codec.down());
        let rows = &batch.rows[index];
        let of_step = u32::try_from(batch.step.plan.rows()).expect("within the row budget");
        let goes_back = !rows.wanted.is_empty();
        if goes_back {
            self.planner.pace.note_decoder(key, now);
        }
        let queue_us = batch.queue_us(index);
        let spent =
            session.note_ran(&rows.planned, goes_back, queue_us, (batch.took_us(), of_step));
        let Some(spent) = spent else { return Ok(()) };
        let Spent { queue_us, step_us, step_rows, .. } = spent;
        let arrivals = self.clients.arrivals(to);
        if let Some((first_id, count)) = rows.confirmed() {
            let computed = Computed { first_id, count, queue_us, step_us, step_rows, arrivals };
            self.clients.answer(to, wire_id, Message::Computed(computed));
            return Ok(());
        }
        let mut head = OutputHead { count: 0, queue_us, step_us, step_rows, arrivals };
        let per_frame = wire::rows_per_frame(codec, hidden_size, self.clients.frame_bytes_max(to));
        let mut left = 0..rows.wanted.len();
        while !left.is_empty() && per_frame > 0 {
            let wanted = left.start..left.end.min(left.start + per_frame);
            left.start = wanted.end;
            head.count = u16::try_from(wanted.len()).expect("a frame holds few rows");
            let bytes = OutputHead::BYTES + wanted.len() * (4 + codec.row_bytes(hidden_size));
            let encode = |body: &mut [u8]| {
                batch.encode_output(index, wanted, &head, (codec, hidden_size), body)
            };
            let waiting = match self.clients.output_buffer(to, bytes, sink) {
                Some(mut body) => {
                    encode(body.body_mut())?;
                    sink.send(to, Kind::Output, wire_id, Priority::Verify, body)
                        .err()
                        .and_then(|refused| refused.body)
                        .map(|body| body.to_vec())
                }
                None => {
                    let mut body = vec![0; bytes];
                    encode(&mut body)?;
                    Some(body)
                }
            };
            if let Some(body) = waiting {
                self.clients.keep_output(to, wire_id, body);
            }
            head.arrivals = Arrivals::default();
        }
        Ok(())
    }

    /// Ends every session: what the KV store holds is not what the plans before said, also for
    /// sessions that had no row in the step. Their devices replay them.
    fn close_all(&mut self, now: Instant, fault: BackendFault) {
        let sessions = self.sessions.len();
        tracing::error!(%fault, lasts = fault.lasts, sessions, "a step was not computed");
        self.figures.faults += 1;
        self.planner.moves.clear();
        // Pages have their names from when their rows are planned.
        self.pages.clear();
        for key in self.sessions.keys() {
            self.end_for(now, key, SessionEnd::Fault(fault.clone()));
        }
        if fault.lasts {
            self.fault = Some(fault);
        }
    }
}
