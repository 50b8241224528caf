//! The cloud role: an io thread that owns link, sessions, scheduler and pages, and a step thread
//! that owns the backend, with two bounded queues between them.

mod admission;
mod io;
mod outbox;
mod output;
mod session;
mod step;
mod void;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::bounded;
use hat_loader::{Bundle, Role, Submodel};
use hat_transport::clock::{Clock, SystemClock};
use hat_transport::link::Waker;

use crate::backend::cpu::lower_priority;
use crate::config::CloudConfig;
use crate::model::{MiddleForward, MiddleModel};
use crate::page::pages_for;
use crate::sequence::PENDING_ROWS_MAX;
use crate::{Error, processor};

/// Counters of a cloud, for `/metrics` and people. All only grow, but `sessions` and
/// `pages_free`, which are what they are now.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct CloudCounters {
    /// Steps run.
    pub steps: AtomicU64,
    /// Rows run.
    pub rows: AtomicU64,
    /// Microseconds spent in steps.
    pub step_us: AtomicU64,
    /// Sessions opened.
    pub opened: AtomicU64,
    /// Sessions and connections refused or ended for something that the peer did.
    pub refused: AtomicU64,
    /// Idle sessions ended for the sake of others.
    pub evicted: AtomicU64,
    /// Devices told to come back later.
    pub busy: AtomicU64,
    /// Rows not computed, since their device had gone another way before their step.
    pub dropped: AtomicU64,
    /// Sessions open now.
    pub sessions: AtomicU64,
    /// Free KV pages now.
    pub pages_free: AtomicU64,
}

/// A running cloud. Dropping it stops it.
pub struct Cloud {
    address: SocketAddr,
    describe: String,
    counters: Arc<CloudCounters>,
    stop: Arc<AtomicBool>,
    waker: Waker,
    threads: Vec<JoinHandle<()>>,
}

impl Cloud {
    /// Opens the bundle, listens, and serves on two threads of its own.
    ///
    /// # Errors
    /// [`Error::Field`] for a listen address that other machines can reach, [`Error::Bundle`],
    /// [`Error::Backend`], [`Error::Io`] if the address cannot be had.
    pub fn start(config: CloudConfig) -> Result<Self, Error> {
        config.check()?;
        let bundle = open_bundle(&config)?;
        let pages = pool_pages(&config);
        let model = load(&config, &bundle, pages)?;
        Self::serve(config, &bundle, model, pages)
    }

    /// Serves a model that is already loaded (tests that plant faults in its backend).
    #[doc(hidden)]
    pub fn serve(
        config: CloudConfig,
        bundle: &Bundle,
        mut model: Box<dyn MiddleForward>,
        pages: u32,
    ) -> Result<Self, Error> {
        config.check()?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let describe = model.describe();
        let counters = Arc::new(CloudCounters::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (to_step, jobs) = bounded(1);
        let (done, from_step) = bounded(2);
        let (ready, is_ready) = bounded(1);
        let io = io::Start {
            config,
            bundle: crate::wire::BundleFacts::for_cloud(bundle),
            pages,
            clock: clock.clone(),
            counters: counters.clone(),
            stop: stop.clone(),
            to_step,
            from_step,
        };
        let io_thread = spawn("hat-cloud-io", move || io.run(&ready))?;
        let (address, waker): (SocketAddr, Waker) = match is_ready.recv() {
            Ok(Ok(ready)) => ready,
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(Error::Stopped("the cloud's io thread ended at start".into())),
        };
        let step_waker = waker.clone();
        let step_thread = spawn("hat-cloud-step", move || {
            // Dropped in this order: the queue first, so that the io thread wakes to its end.
            let _wake = step::WakeAtEnd(step_waker.clone());
            let done = done;
            lower_priority();
            step::run_steps(model.as_mut(), &jobs, &done, &step_waker, clock.as_ref());
        })?;
        let threads = vec![io_thread, step_thread];
        Ok(Self { address, describe, counters, stop, waker, threads })
    }

    /// Where it listens; the port is the one that the system chose if 0 was configured.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// One line about the backend.
    #[must_use]
    pub fn describe(&self) -> &str {
        &self.describe
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> &CloudCounters {
        &self.counters
    }

    /// Waits until it stops by itself, which it does only when its io thread fails.
    pub fn join(mut self) {
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.waker.wake();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Opens a cloud's bundle.
///
/// # Errors
/// [`Error::Bundle`].
#[doc(hidden)]
pub fn open_bundle(config: &CloudConfig) -> Result<Bundle, Error> {
    let bundle = Bundle::open(&config.bundle).map_err(|error| Error::Bundle {
        path: config.bundle.clone(),
        reason: error.to_string(),
    })?;
    if bundle.role() != Role::Cloud {
        let reason = "it holds no middle layers; a cloud needs the cloud half".to_owned();
        return Err(Error::Bundle { path: config.bundle.clone(), reason });
    }
    Ok(bundle)
}

/// Pages of the KV store: the configured rows, and room for pending rows.
#[doc(hidden)]
#[must_use]
pub fn pool_pages(config: &CloudConfig) -> u32 {
    let rows = config.limits.kv_rows_max as usize + PENDING_ROWS_MAX;
    u32::try_from(pages_for(rows)).expect("row counts are u32")
}

fn load(
    config: &CloudConfig,
    bundle: &Bundle,
    pages: u32,
) -> Result<Box<dyn MiddleForward>, Error> {
    let backend = processor::cpu(config.processor, config.threads)?;
    let rows = config.limits.step_rows_max as usize;
    let layers = bundle.split().layers(Submodel::Middle);
    let model = MiddleModel::load(backend, bundle, layers, rows, pages as usize)?;
    Ok(Box::new(model))
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(|error| Error::io(format!("starting thread {name}"), error))
}
