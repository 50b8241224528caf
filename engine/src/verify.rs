//! The check that a bundle's files hold what was split, before the model in them is named.

use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use hat_loader::Bundle;
use hat_transport::clock::{Clock as _, SystemClock, unix_seconds};

use crate::Error;

/// Hashing that takes longer is said in the log.
const LONG: Duration = Duration::from_secs(1);

/// The way a role verifies its bundle's files before it names the model to a peer, if it does.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Verify {
    /// True if files are hashed and compared with the manifest. Without, a changed file gives wrong
    /// text.
    pub enabled: bool,
    /// The directory in which verdicts are remembered, so that a file is hashed once and not at
    /// every start. None are without.
    pub memory: Option<PathBuf>,
    /// Interval at which the files are looked at again while they are used. A changed one ends the
    /// role.
    pub every: Duration,
}

impl Default for Verify {
    fn default() -> Self {
        Self { enabled: true, memory: None, every: Duration::from_secs(60) }
    }
}

impl Verify {
    /// Verifies an open bundle on up to `threads` threads.
    ///
    /// # Errors
    /// [`Error::Load`] with the file that differs or can't be read.
    pub(crate) fn check(&self, bundle: &mut Bundle, threads: usize) -> Result<(), Error> {
        let path = bundle.directory().to_owned();
        let directory = path.display();
        if !self.enabled {
            tracing::warn!(%directory, "the bundle's files are not verified: changed ones give \
                wrong text");
            return Ok(());
        }
        let start = SystemClock.now();
        let mut is_said = false;
        let mut on_piece = |path: &std::path::Path| {
            if !is_said && SystemClock.now() - start > LONG {
                is_said = true;
                tracing::warn!(path = %path.display(), "verifying the file; its verdict is \
                    remembered for the next start");
            }
        };
        let memory = self.memory.as_deref();
        let now = UNIX_EPOCH + Duration::from_secs(unix_seconds());
        let verified = bundle
            .verify_remembered(memory, now, threads, &mut on_piece)
            .map_err(|error| Error::bundle(&path, error))?;
        let ms = (SystemClock.now() - start).as_millis();
        let (hashed, remembered) = (verified.hashed, verified.remembered);
        tracing::info!(%directory, hashed, remembered, ms, "the bundle's files are verified");
        Ok(())
    }
}
