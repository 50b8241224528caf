//! The stages: threads that take steps from the io thread, one after the other, and give them back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded, never};
use hat_compute::backend::cpu::compute_priority;
use hat_core::cloud::StepBatch;
use hat_plan::MiddleForward;
use hat_transport::clock::Clock;
use hat_transport::link::Waker;

use crate::Error;

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
    pub(super) done: Sender<StepBatch>,
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
    jobs: Receiver<StepBatch>,
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
    jobs: Receiver<StepBatch>,
    next: Sender<StepBatch>,
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
            if self.next.send(job).is_err() {
                return;
            }
            if let Some(done) = &self.first {
                done.fetch_add(1, Ordering::Release);
            }
            if let Some(waker) = &self.wakes {
                waker.wake();
            }
        }
    }
}
