//! Work that may never end, on threads of its own.
//!
//! A thread can't be ended from outside. One that is over its limit is abandoned: it runs on, and
//! counts until it ends. With [`ABANDONED_MAX`] of them nothing more is started, so a template that
//! hangs costs that many threads and no more, and nobody waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::TokenError;

/// Most abandoned threads at a time.
const ABANDONED_MAX: usize = 2;

/// A limit for each piece of work, and how many are over it.
pub(super) struct Limited {
    limit: Duration,
    /// Threads over the limit that still run.
    abandoned: Arc<AtomicUsize>,
}

impl Limited {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, abandoned: Arc::default() }
    }

    /// The result of `work`.
    ///
    /// # Errors
    /// [`TokenError::TemplateHangs`] if it is over the limit, or too many are already;
    /// [`TokenError::Template`] if it has no thread or panics.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, TokenError> {
        if self.abandoned.load(Ordering::Acquire) >= ABANDONED_MAX {
            return Err(TokenError::TemplateHangs);
        }
        let (sender, receiver) = sync_channel(1);
        let (decision, decided) = sync_channel::<Arc<AtomicUsize>>(1);
        let thread = std::thread::Builder::new().name("hat-template".into());
        let body = move || {
            // A receiver that is gone has abandoned this thread, and counts it.
            let _ = sender.send(work());
            if let Ok(abandoned) = decided.recv() {
                abandoned.fetch_sub(1, Ordering::AcqRel);
            }
        };
        if let Err(error) = thread.spawn(body) {
            return Err(TokenError::Template(format!("no thread to render it: {error}")));
        }
        match receiver.recv_timeout(self.limit) {
            Ok(made) => Ok(made),
            Err(RecvTimeoutError::Disconnected) => {
                Err(TokenError::Template("its rendering panicked".into()))
            }
            Err(RecvTimeoutError::Timeout) => {
                self.abandoned.fetch_add(1, Ordering::AcqRel);
                // Room for one, so this neither waits nor fails while the thread lives.
                if decision.send(Arc::clone(&self.abandoned)).is_err() {
                    self.abandoned.fetch_sub(1, Ordering::AcqRel);
                }
                Err(TokenError::TemplateHangs)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hanging_work_is_abandoned_twice_and_then_refused_until_it_ends() {
        let limited = Limited::new(Duration::from_millis(1));
        let (release, gate) = sync_channel::<()>(0);
        let gate = Arc::new(std::sync::Mutex::new(gate));
        for _ in 0..ABANDONED_MAX {
            let gate = Arc::clone(&gate);
            let hangs = limited.run(move || gate.lock().map(|gate| gate.recv().is_ok()).is_ok());
            assert!(matches!(hangs, Err(TokenError::TemplateHangs)));
        }
        let refused = limited.run(|| panic!("not started"));
        assert!(matches!(refused, Err::<(), _>(TokenError::TemplateHangs)));
        // What ends after all makes room.
        drop(release);
        while limited.abandoned.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        let patient = Limited { limit: Duration::from_secs(600), ..limited };
        assert_eq!(patient.run(|| 7).unwrap(), 7);
        assert!(matches!(patient.run(|| panic!("broken")), Err::<(), _>(TokenError::Template(_))));
    }
}
