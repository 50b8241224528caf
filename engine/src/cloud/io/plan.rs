//! When a step is planned, and what is put into it.

use std::sync::atomic::Ordering;

use super::Io;
use crate::sched::{SessionKey, Work};

impl Io {
    /// Tells the scheduler of a session's first chunk, if it does not know one.
    pub(super) fn enqueue_next(&mut self, key: SessionKey) {
        let Some(session) = self.sessions.get_mut(&key).filter(|session| !session.is_queued) else {
            return;
        };
        let Some(next) = session.next() else { return };
        let guest = self.guests.get(&session.connection).expect("a session has a connection");
        session.is_queued = true;
        if next.urgent {
            self.pace.note_decoder(key, self.now);
        }
        let work = Work {
            session: key,
            device: guest.device,
            rows: next.rows,
            context: session.sequence.committed(),
            urgent: next.urgent,
            divisible: next.divisible,
            class: session.exit_layer,
        };
        self.scheduler.enqueue(work);
    }

    /// True if it is time to plan a step: the first stage has none that waits for it. While
    /// somebody decodes, or the step in it is long, it must have nothing at all to do, so that
    /// what comes during a step is in the next one.
    fn may_plan(&self, is_decoding: bool) -> bool {
        let at_first = self.sent_steps - self.start.first_done.load(Ordering::Acquire);
        at_first < if is_decoding || self.is_step_long { 1 } else { 2 }
    }

    /// Plans steps while there is work, time, and a job to put it in.
    pub(super) fn plan(&mut self) {
        let is_decoding = self.pace.is_decoding(self.now);
        while self.scheduler.queued() > 0 && self.may_plan(is_decoding) {
            let bound = self.pace.bound(is_decoding);
            let Some(mut job) = self.jobs.pop() else { return };
            job.clear();
            job.step.moves.append(&mut self.moves);
            let mut works = std::mem::take(&mut self.works);
            self.scheduler.plan(bound, &mut works);
            works.sort_by_key(|work| self.sessions[&work.session].entry_layer);
            for work in &works {
                job.step.exit_layer = work.class;
                let session = self.sessions.get_mut(&work.session).expect("forgotten when ended");
                // The scheduler keeps the rest of a chunk that it has cut.
                session.is_queued = session.next().is_some_and(|next| work.rows < next.rows);
                session.in_flight += 1;
                if let Err(violation) = job.put(work, session, self.start.bundle.hidden_size) {
                    self.end_for(work.session, violation);
                }
                self.name_prompt(work.session);
            }
            works.iter().for_each(|work| self.enqueue_next(work.session));
            self.works = works;
            if !self.is_stepping(1) {
                self.step_moved = self.now;
            }
            self.sent_steps += 1;
            self.is_step_long = self.pace.is_long(job.step.plan.rows(), job.attended);
            if self.start.to_step.send(job).is_err() {
                return;
            }
        }
    }
}
