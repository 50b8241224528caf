//! A cloud's threads from their start to their end, and what comes after it: where the processor
//! falls back and its GPU is lost, another run on the CPU.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};
use hat_core::cloud::{CloudCore, CloudCoreConfig};
use hat_core::wire::{self, BundleFacts};
use hat_loader::{Bundle, ModelId};
use hat_plan::{BackendFault, MiddleForward};
use hat_transport::clock::{Clock, SystemClock};
use hat_transport::link::Waker;
use hat_transport::message::{Hello, Role};

use super::shell::Shell;
use super::step::{self, Stages};
use super::{
    CloudConfig, CloudCounters, arithmetic_of, describe, figures, load, open_bundle, pool_pages,
};
use crate::config::Processor;
use crate::watch::Guard;
use crate::{Error, endpoint, spawn};

/// State shared by a cloud's owner and its threads, over all runs.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) counters: Arc<CloudCounters>,
    stop: Arc<AtomicBool>,
    /// Of the run at hand. Locked once a run, and once a look.
    now: Mutex<Now>,
}

#[derive(Default)]
struct Now {
    describe: String,
    waker: Option<Waker>,
}

impl Seen {
    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn describe(&self) -> String {
        self.now().describe.clone()
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Ends the run at hand, and any that begins.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        if let Some(waker) = &self.now().waker {
            waker.wake();
        }
    }

    /// A run has begun. One that was told to stop before its waker was known is woken here.
    fn begin(&self, describe: String, waker: &Waker) {
        *self.now() = Now { describe, waker: Some(waker.clone()) };
        if self.is_stopped() {
            waker.wake();
        }
    }
}

/// The threads of one run, on one kind of processor.
pub(super) struct Run {
    pub(super) address: SocketAddr,
    fault: Arc<OnceLock<BackendFault>>,
    io: JoinHandle<()>,
    stages: Vec<JoinHandle<()>>,
    /// Closed when the last stage's thread has ended.
    alive: Receiver<()>,
    step_within: Duration,
}

impl Run {
    /// Listens, and serves until told to stop or until its backend fails.
    pub(super) fn start(
        config: &CloudConfig,
        bundle: &Bundle,
        stages: Vec<Box<dyn MiddleForward>>,
        pages: u32,
        seen: &Seen,
    ) -> Result<Self, Error> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let facts = endpoint::cloud_facts(bundle);
        let (hello, limits) = (hello(config, &facts, &stages)?, config.limits);
        let core = CloudCoreConfig {
            sessions_max: limits.sessions_max,
            sessions_per_device_max: limits.sessions_per_device_max,
            context_max: facts.context.min(limits.context_max),
            idle_after: config.idle_after,
            step_within: config.step_within,
        };
        let (to_stages, queues) = Stages::new(stages.len());
        let (endpoint, address) = endpoint::listen(config, clock.clone(), hello)?;
        let (waker, fault) = (endpoint.waker(), Arc::new(OnceLock::new()));
        let shell = Shell {
            core: CloudCore::new(core, hello, pages, figures(&seen.counters)),
            endpoint,
            guard: Guard::start(bundle, &config.verify, waker.clone())?,
            stages: to_stages,
            now: clock.now(),
            clock: clock.clone(),
            counters: seen.counters.clone(),
            stop: seen.stop.clone(),
            fault: fault.clone(),
        };
        shell.publish();
        let describe = describe(&stages);
        let (stages, alive) = step::spawn_stages(stages, queues, &waker, config.nice, &clock)?;
        let io = spawn("hat-cloud-io", move || shell.run())?;
        seen.begin(describe, &waker);
        Ok(Self { address, fault, io, stages, alive, step_within: config.step_within })
    }

    /// Waits for its end; says whether its backend was lost. A step that hangs is left to the
    /// thread that it hangs in.
    fn join(self) -> Option<BackendFault> {
        let _ = self.io.join();
        if self.alive.recv_timeout(self.step_within) == Err(RecvTimeoutError::Disconnected) {
            for thread in self.stages {
                let _ = thread.join();
            }
        } else {
            tracing::warn!("a step has not ended: its threads are left behind");
        }
        self.fault.get().cloned()
    }
}

/// HELLO of a cloud.
fn hello(
    config: &CloudConfig,
    facts: &BundleFacts,
    stages: &[Box<dyn MiddleForward>],
) -> Result<Hello, Error> {
    let BundleFacts { hidden_size, layers, model_id, .. } = facts;
    Ok(Hello {
        row_budget: config.limits.step_rows_max,
        arithmetic_id: arithmetic_of(stages)?,
        stages: u16::try_from(stages.len()).unwrap_or(u16::MAX),
        ..wire::hello(Role::Cloud, *model_id, *hidden_size, layers.clone())
    })
}

/// Waiter for the end of a run.
pub(super) struct Supervisor {
    pub(super) config: CloudConfig,
    pub(super) model_id: ModelId,
    pub(super) seen: Arc<Seen>,
}

impl Supervisor {
    /// Waits for the end of the last run; says whether its backend was lost.
    pub(super) fn supervise(mut self, mut run: Run) -> Option<BackendFault> {
        loop {
            let address = run.address;
            let fault = run.join()?;
            if !self.config.processor.falls_back() || self.seen.is_stopped() {
                return Some(fault);
            }
            self.config.processor = Processor::Auto;
            self.config.listen = address;
            run = match self.start_again() {
                Ok(run) => run,
                Err(error) => {
                    let reason = format!("{}; and the CPU can't go on: {error}", fault.reason);
                    return Some(BackendFault { reason, ..fault });
                }
            };
            let now = self.seen.describe();
            tracing::warn!(%fault, now, "the cloud's GPU is lost: the CPU computes from now on");
        }
    }

    /// The same layers of the same model, at the same address.
    fn start_again(&self) -> Result<Run, Error> {
        let bundle = open_bundle(&self.config)?;
        if bundle.model_id() != self.model_id {
            return Err(Error::bundle(&self.config.bundle, "it holds another model than at start"));
        }
        let pages = pool_pages(&self.config);
        let stages = load(&self.config, &bundle, pages)?;
        Run::start(&self.config, &bundle, stages, pages, &self.seen)
    }
}
