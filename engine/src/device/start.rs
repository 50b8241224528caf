//! The engine thread's beginning: what it starts with, and how that is opened.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crossbeam::channel::{Receiver, Sender};
use hat_core::device::{DeviceConfig, DeviceCore, PageNamer};
use hat_core::draft::drafter::Drafter;
use hat_core::page::pages_for;
use hat_core::sequence::PENDING_ROWS_MAX;
use hat_core::wire::{self, BundleFacts};
use hat_plan::{ARITHMETIC_CPU, DeviceForward};
use hat_transport::link::Waker;
use hat_transport::message::{Hello, Role};
use hat_transport::random::SystemRandom;

use super::run::Device;
use super::{Described, Shared, Submission, load_drafter, open_bundle};
use crate::config::{self, CloudAddress, EngineConfig};
use crate::{Error, endpoint, processor, watch};

/// Parts that the engine thread starts with.
pub(super) struct Start {
    pub(super) config: EngineConfig,
    pub(super) facts: BundleFacts,
    pub(super) model: Box<dyn DeviceForward>,
    pub(super) drafter: Option<Box<dyn Drafter>>,
    pub(super) shared: Arc<Shared>,
    pub(super) incoming: Receiver<Submission>,
    pub(super) watch: watch::Start,
}

/// The end of the engine thread, whatever ends it: nobody waits for it after that. A bounded
/// channel keeps what is in it when its receiver goes, so the last requests are taken out; one
/// that comes later finds the flag.
struct ShutdownGuard {
    shared: Arc<Shared>,
    incoming: Receiver<Submission>,
}

impl Drop for ShutdownGuard {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.incoming.try_iter().for_each(drop);
    }
}

impl Start {
    /// Opens the link, says so, and serves until told to stop.
    pub(super) fn run(self, ready: &Sender<Result<Waker, Error>>) {
        let _last_of_all =
            ShutdownGuard { shared: self.shared.clone(), incoming: self.incoming.clone() };
        let mut device = match self.open() {
            Ok((device, waker)) => {
                let _ = ready.send(Ok(waker));
                device
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        if let Err(error) = device.serve() {
            tracing::error!(%error, "the device stops");
            device.stop(&error.to_string());
        }
    }

    /// Description of the present backends.
    pub(super) fn describe(&self, drafter: Option<&dyn Drafter>) -> Described {
        let drafter = drafter.map(Drafter::describe);
        Described { device: self.model.describe(), drafter }
    }

    /// HELLO of this device.
    pub(super) fn hello(&self) -> Hello {
        let BundleFacts { hidden_size, layers, model_id, .. } = &self.facts;
        Hello {
            arithmetic_id: self.model.arithmetic_id(),
            ..wire::hello(Role::Device, *model_id, *hidden_size, layers.clone())
        }
    }

    fn open(mut self) -> Result<(Device, Waker), Error> {
        let CloudAddress::Remote(cloud) = &self.config.cloud else {
            unreachable!("a cloud in this process has been started and has an address")
        };
        let address = config::remote(cloud)?;
        let drafter = self.drafter.take();
        let (config, facts) = (&self.config, &self.facts);
        let secret = match config.prefix_secret {
            Some(known) => known,
            None => {
                let mut secret = [0; 32];
                getrandom::fill(&mut secret)
                    .map_err(|error| Error::io("making a secret for page names", error.into()))?;
                secret.into()
            }
        };
        let arithmetic_id = self.model.arithmetic_id();
        let namer = || PageNamer::new(config.codec(), facts, arithmetic_id, secret);
        let namer = config.prefix.then(namer).flatten();
        let clock = self.shared.clock.clone();
        let core_config = DeviceConfig {
            sessions_max: config.limits.sessions_max as usize,
            kv_rows_max: config.limits.kv_rows_max as usize,
            step_rows_max: config.limits.step_rows_max,
            chunks: config.chunks,
            codec: config.codec(),
            reconnect: config.reconnect,
            cloud: address.to_string(),
        };
        let (now, vocab_size) = (clock.now(), self.shared.config.vocab_size);
        let random = Box::new(SystemRandom);
        let core = DeviceCore::new(now, core_config, facts, vocab_size, namer, drafter);
        let core = core.with_link(now, self.hello(), config.cloud_arithmetic, random);
        let endpoint = endpoint::dialler(config, clock, self.hello())?;
        let waker = endpoint.waker();
        let guard = self.watch.start(endpoint.waker())?;
        Ok((Device::new(self, core, address, endpoint, guard), waker))
    }

    /// The same layers of the same model by the processor that is configured now; returns the
    /// drafter that goes with them.
    pub(super) fn load_again(
        &mut self,
        drafter: Option<Box<dyn Drafter>>,
    ) -> Result<Option<Box<dyn Drafter>>, Error> {
        let config = &self.config;
        let bundle = open_bundle(&config.bundle, &config.verify, config.threads)?;
        if *bundle.model_id().as_bytes() != self.facts.model_id {
            return Err(Error::bundle(&config.bundle, "it holds another model than at start"));
        }
        let pages = pages_for(config.limits.kv_rows_max as usize + PENDING_ROWS_MAX);
        let split_layer = self.facts.layers.start as usize;
        self.model = processor::device(config, &bundle, split_layer, pages)?;
        // It may have computed on the same GPU. Nothing else is lost without it.
        if drafter.as_ref().is_some_and(|drafter| drafter.arithmetic_id() == ARITHMETIC_CPU) {
            return Ok(drafter);
        }
        let loaded = load_drafter(config, &bundle, split_layer, ARITHMETIC_CPU);
        let loaded = loaded.map(|found| found.map(|(drafter, _)| drafter));
        Ok(loaded.unwrap_or_else(|error| {
            tracing::warn!(%error, "requests go on without the trained drafter");
            None
        }))
    }
}
