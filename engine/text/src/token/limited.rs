//! Work that may never end, on threads of its own.
//!
//! A thread can't be ended from outside. One that is over its limit is abandoned: it runs on, and
//! keeps its place until it ends. There are [`RUNNING_MAX`] places, so that many threads are all
//! that callers can lose, however many call at a time; with [`ABANDONED_MAX`] abandoned ones
//! nothing more is started, and nobody waits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most abandoned threads at a time, before more work is refused.
const ABANDONED_MAX: usize = 2;
/// Most threads at a time.
const RUNNING_MAX: usize = 4;

/// The reason for which there is no result.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// The text is over the limit, or too much work before it is.
    Hangs,
    /// There was no thread, or the work panicked; with the message.
    Failed(String),
}

/// A limit for each piece of work, and its places.
pub(super) struct Limited {
    limit: Duration,
    places: Arc<Places>,
}

#[derive(Default)]
struct Places {
    counts: Mutex<Counts>,
    freed: Condvar,
}

#[derive(Default)]
struct Counts {
    /// Threads that run, the abandoned ones too.
    running: usize,
    abandoned: usize,
}

/// A place of one thread, free when dropped.
struct Place {
    places: Arc<Places>,
    /// Set while the counts are locked.
    is_abandoned: Arc<AtomicBool>,
}

impl Limited {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, places: Arc::default() }
    }

    /// The result of `work`.
    ///
    /// # Errors
    /// [`Unfinished::Hangs`] if it is over the limit, or others hold all places that long;
    /// [`Unfinished::Failed`] if it has no thread or panics.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unfinished> {
        let place = self.places.wait(self.limit)?;
        let is_abandoned = Arc::clone(&place.is_abandoned);
        let (sender, receiver) = sync_channel(1);
        let body = move || {
            let _place = place;
            // A receiver that is gone has abandoned this thread.
            let _ = sender.send(work());
        };
        if let Err(error) = std::thread::Builder::new().name("hat-limited".into()).spawn(body) {
            return Err(Unfinished::Failed(format!("there is no thread for it: {error}")));
        }
        match receiver.recv_timeout(self.limit) {
            Ok(made) => Ok(made),
            Err(RecvTimeoutError::Disconnected) => Err(Unfinished::Failed("it panicked".into())),
            Err(RecvTimeoutError::Timeout) => {
                let mut counts = self.places.counts();
                // The thread that has just ended holds the other reference no longer.
                if Arc::strong_count(&is_abandoned) > 1 {
                    is_abandoned.store(true, Ordering::Relaxed);
                    counts.abandoned += 1;
                    self.places.freed.notify_all(); // those that wait are refused
                }
                Err(Unfinished::Hangs)
            }
        }
    }
}

impl Places {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place, as soon as there is one.
    fn wait(self: &Arc<Self>, limit: Duration) -> Result<Place, Unfinished> {
        let all_taken =
            |counts: &mut Counts| counts.running >= RUNNING_MAX && counts.abandoned < ABANDONED_MAX;
        let waited = self.freed.wait_timeout_while(self.counts(), limit, all_taken);
        let mut counts = waited.unwrap_or_else(PoisonError::into_inner).0;
        if counts.running >= RUNNING_MAX || counts.abandoned >= ABANDONED_MAX {
            return Err(Unfinished::Hangs);
        }
        counts.running += 1;
        Ok(Place { places: Arc::clone(self), is_abandoned: Arc::default() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.places.counts();
        counts.running -= 1;
        // Still locked: whoever abandons this thread now sees that it has ended.
        let is_abandoned = std::mem::take(&mut self.is_abandoned);
        counts.abandoned -= usize::from(is_abandoned.load(Ordering::Relaxed));
        drop(is_abandoned);
        self.places.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hanging_work_is_abandoned_twice_and_then_refused_until_it_ends() {
        let limited = Limited::new(Duration::from_millis(1));
        let (release, gate) = sync_channel::<()>(0);
        let gate = Arc::new(Mutex::new(gate));
        for _ in 0..ABANDONED_MAX {
            let gate = Arc::clone(&gate);
            let hangs = limited.run(move || gate.lock().map(|gate| gate.recv().is_ok()).is_ok());
            assert_eq!(hangs, Err(Unfinished::Hangs));
        }
        let refused = limited.run(|| panic!("not started"));
        assert_eq!(refused, Err::<(), _>(Unfinished::Hangs));
        // What ends after all makes room.
        drop(release);
        while limited.places.counts().running > 0 {
            std::thread::yield_now();
        }
        assert_eq!(limited.places.counts().abandoned, 0);
        let patient = Limited { limit: Duration::from_secs(600), ..limited };
        assert_eq!(patient.run(|| 7).unwrap(), 7);
        let panics = patient.run(|| panic!("broken"));
        assert!(matches!(panics, Err::<(), _>(Unfinished::Failed(_))));
    }

    /// No more threads run than there are places, however many call at a time: each may come to
    /// hang.
    #[test]
    fn no_more_threads_run_than_there_are_places() {
        let places = Arc::new(Places::default());
        let now = Duration::ZERO;
        let mut held: Vec<_> = (0..RUNNING_MAX).map(|_| places.wait(now).unwrap()).collect();
        assert!(matches!(places.wait(now), Err(Unfinished::Hangs)));
        drop(held.pop());
        held.push(places.wait(now).unwrap());
        assert!(places.wait(now).is_err());
        // A patient caller waits for a place.
        let waits = Arc::clone(&places);
        let limit = Duration::from_secs(600);
        let waiter = std::thread::spawn(move || waits.wait(limit).map(drop));
        drop(held);
        waiter.join().unwrap().unwrap();
        assert_eq!(places.counts().running, 0);
    }
}
