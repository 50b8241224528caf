//! The stages: threads that take steps from the io thread, one after the other, and give them back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded, never};
use hat_compute::backend::cpu::compute_priority;
use hat_core::cloud::StepBatch;
use hat_plan::MiddleForward;
use hat_transport::clock::Clock;
use hat_transport::link::Waker;

use crate::Error;

/// Steps whose rows a stage may hold for the next one: one whose job it can't send yet, one in the
/// queue between them, one that the next stage computes; and one to spare.
pub(super) const SHARED_MAX: usize = 4;

/// Wakes the io thread when a step thread ends, however it ends.
struct WakeAtEnd(Waker, #[expect(dead_code, reason = "held for its drop")] Sender<()>);

impl Drop for WakeAtEnd {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// The io thread's ends of the queues to the stages and back.
pub(super) struct Stages {
    to_first: Sender<StepBatch>,
    from_last: Receiver<StepBatch>,
    /// Steps that went to the first stage.
    sent: u64,
    /// Steps that it is done with.
    first_done: Arc<AtomicU64>,
}

impl Stages {
    /// Queues to so many stages, and the ends of their threads, which speak into them and wake the
    /// io thread by `waker`.
    pub(super) fn new(count: usize) -> (Self, Queues) {
        // One step in each stage, and one that is planned meanwhile.
        let (to_first, jobs) = bounded(count + 1);
        let (done, from_last) = bounded(count + 1);
        let first_done = Arc::new(AtomicU64::new(0));
        let queues = Queues { jobs, done, first_done: first_done.clone() };
        (Self { to_first, from_last, sent: 0, first_done }, queues)
    }

    /// Steps that the first stage has.
    pub(super) fn at_first(&self) -> u64 {
        self.sent - self.first_done.load(Ordering::Acquire)
    }

    /// Gives a step to the first stage. One whose thread has ended takes none, and
    /// [`Stages::take`] says so.
    pub(super) fn give(&mut self, batch: StepBatch) {
        self.sent += 1;
        let _ = self.to_first.send(batch);
    }

    /// A step that has ended.
    ///
    /// # Errors
    /// If no more will come.
    pub(super) fn take(&self) -> io::Result<Option<StepBatch>> {
        match self.from_last.try_recv() {
            Ok(batch) => Ok(Some(batch)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(io::Error::other("the step thread has ended")),
        }
    }
}

/// The stages' ends of the queues.
pub(super) struct Queues {
    jobs: Receiver<StepBatch>,
    done: Sender<StepBatch>,
    first_done: Arc<AtomicU64>,
}

/// Starts a thread for each of `stages`: steps go from stage to stage, and back to the io thread,
/// which is woken by `waker`. A queue between two stages holds one step ([`SHARED_MAX`]
/// counts on it). When one thread ends, so do the others: their queues close, and with the last of
/// them so does the queue that is returned.
///
/// # Errors
/// [`Error::Io`] if a thread cannot be had.
pub(super) fn spawn_stages(
    stages: Vec<Box<dyn MiddleForward>>,
    queues: Queues,
    waker: &Waker,
    nice: u8,
    clock: &Arc<dyn Clock>,
) -> Result<(Vec<JoinHandle<()>>, Receiver<()>), Error> {
    let Queues { jobs, done, first_done } = queues;
    let (is_alive, alive) = bounded(0);
    let (mut threads, mut incoming) = (Vec::new(), jobs);
    let last = stages.len() - 1;
    for (number, model) in stages.into_iter().enumerate() {
        let (sender, next) = match number == last {
            true => (done.clone(), never()),
            false => bounded(1),
        };
        let (jobs, clock) = (std::mem::replace(&mut incoming, next), clock.clone());
        let wakes = (number == 0 || number == last).then(|| waker.clone());
        let first = (number == 0).then(|| first_done.clone());
        let at_end = WakeAtEnd(waker.clone(), is_alive.clone());
        let stage = Stage { model, jobs, next: sender, wakes, first, clock };
        threads.push(crate::spawn(&format!("hat-cloud-step-{number}"), move || {
            // Dropped in this order: the queues first, so that the io thread wakes to their end.
            let _at_end = at_end;
            let stage = stage;
            compute_priority(nice);
            stage.run();
        })?);
    }
    Ok((threads, alive))
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
                job.step.shared = None; // nobody will take them
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
