//! An answer on its way to its caller.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};
use hat_core::request::Event;
use hat_transport::link::Waker;

use crate::Error;

/// An answer on its way: an iterator of [`Event`]s. Dropping it cancels the request on both sides.
pub struct Generation {
    pub(crate) events: Receiver<Result<Event, Error>>,
    pub(crate) prompt_tokens: usize,
    /// Guard that is held for its drop.
    pub(crate) _cancel: CancelOnDrop,
    pub(crate) finished: bool,
}

/// Tells the engine thread that nobody listens any more.
pub(crate) struct CancelOnDrop {
    pub(crate) cancelled: Arc<AtomicBool>,
    pub(crate) waker: Waker,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Release);
        self.waker.wake();
    }
}

impl Generation {
    /// Tokens of the prompt, template included.
    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// The next event if there is one already.
    pub fn try_next(&mut self) -> Option<Result<Event, Error>> {
        self.next_timeout(Duration::ZERO)
    }

    /// The next event, waiting at most `timeout`; `None` if there was none, or none will come
    /// (see [`Generation::is_finished`]).
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<Result<Event, Error>> {
        if self.finished {
            return None;
        }
        match self.events.recv_timeout(timeout) {
            Ok(event) => Some(self.note(event)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(self.note(Err(stopped()))),
        }
    }

    /// True if the last event has been given out.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    fn note(&mut self, event: Result<Event, Error>) -> Result<Event, Error> {
        self.finished = !matches!(event, Ok(Event::Prefill { .. } | Event::Token { .. }));
        event
    }
}

impl Iterator for Generation {
    type Item = Result<Event, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finished {
            return None;
        }
        let event = self.events.recv().unwrap_or_else(|_| Err(stopped()));
        Some(self.note(event))
    }
}

fn stopped() -> Error {
    Error::stopped("its thread ended before the answer did")
}
