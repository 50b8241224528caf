//! One step on its way from the io thread through the stages and back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded, never};
use hat_compute::backend::cpu::compute_priority;
use hat_transport::clock::Clock;
use hat_transport::link::Waker;

use super::session::{Session, StepRows};
use super::violation::SessionViolation;
use crate::Error;
use crate::backend::BackendFault;
use crate::model::{MiddleForward, MiddleStep};
use crate::sched::{SessionKey, Work};

/// A step, and what to do with its rows afterwards. There is one more of these than stages, so
/// that the next step is planned while all stages run.
#[derive(Default)]
pub(super) struct Job {
    pub(super) step: MiddleStep,
    /// Sessions in the order of the step's sequences.
    pub(super) sessions: Vec<SessionKey>,
    /// Rows of each of them. `[sessions]`
    pub(super) rows: Vec<StepRows>,
    /// Rows that its rows attend to, added up.
    pub(super) attended: u64,
    /// Rows that somebody waits for.
    pub(super) urgent_rows: u32,
    /// When the first stage began.
    pub(super) began: Option<Instant>,
    /// How long the stages computed, all together.
    pub(super) took: Duration,
    /// Why its rows mean nothing, if they don't.
    pub(super) fault: Option<BackendFault>,
}

impl Job {
    pub(super) fn clear(&mut self) {
        self.step.plan.clear();
        self.step.entry_layers.clear();
        self.step.moves.clear();
        self.step.hidden.clear();
        self.step.wanted.get_or_insert_default().clear();
        self.step.lent = None;
        self.sessions.clear();
        self.rows.iter_mut().for_each(StepRows::clear);
        self.attended = 0;
        self.urgent_rows = 0;
        self.began = None;
        self.took = Duration::ZERO;
        self.fault = None;
    }

    /// How long the rows of session `index` waited for the step.
    pub(super) fn queue_us(&self, index: usize) -> u32 {
        let waited = self.began.zip(self.rows[index].complete_at);
        let waited = waited
            .map_or(Duration::ZERO, |(began, complete)| began.saturating_duration_since(complete));
        u32::try_from(waited.as_micros()).unwrap_or(u32::MAX)
    }

    /// Puts `work`, rows of the oldest chunk of `session`, into this step. What is wrong with them
    /// comes back as a violation; they then run as zeros and nothing of them is returned.
    pub(super) fn put(
        &mut self,
        work: &Work,
        session: &mut Session,
        hidden_size: usize,
    ) -> Result<(), SessionViolation> {
        let index = self.sessions.len();
        if self.rows.len() == index {
            self.rows.push(StepRows::default());
        }
        let MiddleStep { plan, moves, hidden, .. } = &mut self.step;
        let rows = &mut self.rows[index];
        let (rows_before, numbers_before) = (plan.rows(), hidden.len());
        let put = session.put_rows(work.rows, hidden_size, plan, moves, hidden, rows);
        if put.is_err() {
            rows.clear();
            if plan.rows() == rows_before {
                return put;
            }
            hidden.truncate(numbers_before);
            hidden.resize(plan.rows() * hidden_size, 0.0);
            plan.end_sequence(session.sequence.pages());
        }
        let (count, context) = (u64::from(work.rows), u64::from(work.context));
        self.attended += count * (2 * context + count) / 2;
        self.urgent_rows += if work.urgent { work.rows } else { 0 };
        self.sessions.push(session.key);
        self.step.entry_layers.push(session.entry_layer);
        let wanted = self.step.wanted.get_or_insert_default();
        for row in &self.rows[index].wanted {
            let row = rows_before + *row as usize;
            match wanted.last_mut() {
                Some(last) if last.end == row => last.end += 1,
                _ => wanted.push(row..row + 1),
            }
        }
        put
    }
}

/// Wakes the io thread when a step thread ends, however it ends.
struct WakeAtEnd(Waker, #[expect(dead_code, reason = "held for its drop")] Sender<()>);

impl Drop for WakeAtEnd {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// The other ends of what the step threads speak into.
pub(super) struct Ends {
    /// Steps whose last stage is done.
    pub(super) done: Sender<Job>,
    /// The io thread's.
    pub(super) waker: Waker,
    /// Steps that the first stage is done with.
    pub(super) first_done: Arc<AtomicU64>,
    /// Closed when the last step thread has ended.
    pub(super) alive: Sender<()>,
}

/// Starts a thread for each of `stages`: steps come from `jobs`, go from stage to stage, and end
/// in `done`. A queue between two stages holds one step (`processor::LENT_MAX` counts on it).
/// When one thread ends, so do the others: their queues close.
///
/// # Errors
/// [`Error::Io`] if a thread cannot be had.
pub(super) fn spawn_stages(
    stages: Vec<Box<dyn MiddleForward>>,
    jobs: Receiver<Job>,
    ends: Ends,
    nice: u8,
    clock: &Arc<dyn Clock>,
) -> Result<Vec<JoinHandle<()>>, Error> {
    let (mut threads, mut incoming) = (Vec::new(), jobs);
    let last = stages.len() - 1;
    for (number, model) in stages.into_iter().enumerate() {
        let (sender, next) = match number == last {
            true => (ends.done.clone(), never()),
            false => bounded(1),
        };
        let (jobs, clock) = (std::mem::replace(&mut incoming, next), clock.clone());
        let wakes = (number == 0 || number == last).then(|| ends.waker.clone());
        let first = (number == 0).then(|| ends.first_done.clone());
        let at_end = WakeAtEnd(ends.waker.clone(), ends.alive.clone());
        let stage = Stage { model, jobs, next: sender, wakes, first, clock };
        threads.push(super::spawn(&format!("hat-cloud-step-{number}"), move || {
            // Dropped in this order: the queues first, so that the io thread wakes to their end.
            let _at_end = at_end;
            let stage = stage;
            compute_priority(nice);
            stage.run();
        })?);
    }
    Ok(threads)
}

/// A run of layers on a thread of its own.
struct Stage {
    model: Box<dyn MiddleForward>,
    jobs: Receiver<Job>,
    next: Sender<Job>,
    /// The io thread, if it plans the next step now or sends this one's rows.
    wakes: Option<Waker>,
    /// Steps that the first stage is done with, if this is it.
    first: Option<Arc<AtomicU64>>,
    clock: Arc<dyn Clock>,
}

impl Stage {
    /// Runs what comes, until a queue closes.
    fn run(mut self) {
        for mut job in &self.jobs {
            let start = self.clock.now();
            job.began.get_or_insert(start);
            if job.fault.is_none() {
                self.model.forward(&mut job.step);
                job.fault = self.model.fault();
            }
            if job.fault.is_some() {
                job.step.lent = None; // nobody will take them
            }
            job.took += self.clock.now().duration_since(start);
            if let Some(done) = &self.first {
                done.fetch_add(1, Ordering::Release);
            }
            if self.next.send(job).is_err() {
                return;
            }
            if let Some(waker) = &self.wakes {
                waker.wake();
            }
        }
    }
}
