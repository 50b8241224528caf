//! One step on its way between the io thread and the step thread.

use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};
use hat_transport::clock::Clock;
use hat_transport::link::Waker;

use super::session::{Session, StepRows};
use crate::model::{MiddleForward, MiddleStep};
use crate::sched::SessionKey;

/// A step, and what to do with its rows afterwards. Two of these circulate, so that the next
/// step is planned while one runs.
#[derive(Default)]
pub(super) struct Job {
    pub(super) step: MiddleStep,
    /// Sessions in the order of the step's sequences.
    pub(super) sessions: Vec<SessionKey>,
    /// Rows of each of them. `[sessions]`
    pub(super) rows: Vec<StepRows>,
    /// When the step began.
    pub(super) began: Option<Instant>,
    /// How long the step took.
    pub(super) took: Duration,
}

impl Job {
    pub(super) fn clear(&mut self) {
        self.step.plan.clear();
        self.step.entry_layers.clear();
        self.step.moves.clear();
        self.step.hidden.clear();
        self.sessions.clear();
        self.rows.iter_mut().for_each(StepRows::clear);
    }

    /// How long the rows of session `index` waited for the step.
    pub(super) fn queue_us(&self, index: usize) -> u32 {
        let waited = self.began.zip(self.rows[index].complete_at);
        let waited = waited
            .map_or(Duration::ZERO, |(began, complete)| began.saturating_duration_since(complete));
        u32::try_from(waited.as_micros()).unwrap_or(u32::MAX)
    }

    /// Puts the oldest chunk of `session` into this step. What is wrong with it comes back as an
    /// offence; its rows then run as zeros and nothing of them is returned.
    pub(super) fn put(
        &mut self,
        session: &mut Session,
        hidden_size: usize,
    ) -> Result<(), super::session::Offence> {
        let index = self.sessions.len();
        if self.rows.len() == index {
            self.rows.push(StepRows::default());
        }
        let MiddleStep { plan, moves, hidden, .. } = &mut self.step;
        let rows = &mut self.rows[index];
        let (rows_before, numbers_before) = (plan.rows(), hidden.len());
        let put = session.put_chunk(hidden_size, plan, moves, hidden, rows);
        if put.is_err() {
            rows.clear();
            if plan.rows() == rows_before {
                return put;
            }
            hidden.truncate(numbers_before);
            hidden.resize(plan.rows() * hidden_size, 0.0);
            plan.end_sequence(&session.sequence);
        }
        self.sessions.push(session.key);
        self.step.entry_layers.push(session.entry_layer);
        put
    }
}

/// Wakes the io thread when the step thread ends, however it ends.
pub(super) struct WakeAtEnd(pub(super) Waker);

impl Drop for WakeAtEnd {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// The step thread: runs what comes, wakes the io thread, until the queue closes.
pub(super) fn run_steps(
    model: &mut dyn MiddleForward,
    jobs: &Receiver<Job>,
    done: &Sender<Job>,
    waker: &Waker,
    clock: &dyn Clock,
) {
    for mut job in jobs {
        let start = clock.now();
        job.began = Some(start);
        model.forward(&mut job.step);
        job.took = clock.now().duration_since(start);
        if done.send(job).is_err() {
            return;
        }
        waker.wake();
    }
}
