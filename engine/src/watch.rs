//! A thread beside a role that looks at the files of its bundle: each minute, and when the role
//! asks, since a session is about to begin or to go on. The role computes nothing while a file
//! that may have changed is hashed, and ends if it did.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use hat_loader::{Bundle, BundleError, Watch};
use hat_transport::link::Waker;

use crate::verify::Verify;
use crate::{Error, spawn};

/// State that the role and the thread share.
#[derive(Default)]
struct Seen {
    /// Looks that the role has asked for.
    asked: AtomicU64,
    /// Looks, of those, that are done.
    done: AtomicU64,
    /// A file that may have changed is being hashed.
    hashing: AtomicBool,
    /// The file that changed, and what to do.
    changed: OnceLock<String>,
}

/// The role's side. The thread ends when this is dropped.
pub(crate) struct Guard {
    seen: Arc<Seen>,
    ask: Option<Sender<()>>,
}

impl Guard {
    /// Starts the thread that watches the files of `bundle`, if they are verified at all. It wakes
    /// its role by `waker`.
    ///
    /// # Errors
    /// [`Error::Io`] if the thread can't be had.
    pub(crate) fn start(bundle: &Bundle, verify: &Verify, waker: Waker) -> Result<Self, Error> {
        let seen = Arc::new(Seen::default());
        if !verify.enabled {
            return Ok(Self { seen, ask: None });
        }
        let (ask, asked) = bounded(1);
        let (watch, every) = (bundle.watch(), verify.every);
        let looker = Looker { watch, seen: seen.clone(), waker, asked, every };
        spawn("hat-watch", move || looker.run())?;
        Ok(Self { seen, ask: Some(ask) })
    }

    /// Asks for a look; nothing is [clear](Self::is_clear) before it is done.
    pub(crate) fn look(&self) {
        if let Some(ask) = &self.ask {
            self.seen.asked.fetch_add(1, Ordering::SeqCst);
            let _ = ask.try_send(()); // one that waits already is for this one, too
        }
    }

    /// True if the weights may be used now.
    pub(crate) fn is_clear(&self) -> bool {
        let Seen { asked, done, hashing, changed } = &*self.seen;
        done.load(Ordering::SeqCst) >= asked.load(Ordering::SeqCst)
            && !hashing.load(Ordering::SeqCst)
            && changed.get().is_none()
    }

    /// Reason that the role has to end, if it has to.
    pub(crate) fn changed(&self) -> Option<&str> {
        self.seen.changed.get().map(String::as_str)
    }
}

/// The thread's side.
struct Looker {
    watch: Watch,
    seen: Arc<Seen>,
    waker: Waker,
    asked: Receiver<()>,
    every: Duration,
}

impl Looker {
    fn run(mut self) {
        loop {
            match self.asked.recv_timeout(self.every) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let asked = self.seen.asked.load(Ordering::SeqCst);
            if let Err(error) = self.look() {
                let text = format!("{error}. It changed while it was in use: nothing is served");
                let _ = self.seen.changed.set(text);
                return self.waker.wake();
            }
            self.seen.hashing.store(false, Ordering::SeqCst);
            self.seen.done.store(asked, Ordering::SeqCst);
            self.waker.wake();
        }
    }

    fn look(&mut self) -> Result<(), BundleError> {
        if !self.watch.may_have_changed()? {
            return Ok(());
        }
        self.seen.hashing.store(true, Ordering::SeqCst);
        self.watch.verify_changed(1)
    }
}
