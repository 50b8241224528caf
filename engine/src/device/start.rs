//! The parts of a device, opened before its thread starts.

use std::sync::Arc;

use crossbeam::channel::Receiver;
use hat_core::device::{DeviceConfig, DeviceCore, PageNamer};
use hat_core::draft::drafter::Drafter;
use hat_core::wire::{self, BundleFacts};
use hat_loader::Bundle;
use hat_plan::{ARITHMETIC_CPU, DeviceForward};
use hat_transport::message::{Hello, Role};
use hat_transport::random::SystemRandom;

use super::calls::Calls;
use super::dial::Cloud;
use super::run::Device;
use super::{Described, Shared, Submission, load, load_drafter, open_bundle};
use crate::config::{self, CloudAddress, EngineConfig};
use crate::watch::Guard;
use crate::{Error, endpoint};

/// A device's layers, and what they are loaded from: another processor may take them over.
pub(super) struct Layers {
    pub(super) config: EngineConfig,
    pub(super) facts: BundleFacts,
    pub(super) model: Box<dyn DeviceForward>,
}

impl Layers {
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

    /// The maker of page names, if pages are reused and the model lets them be.
    fn namer(&self) -> Result<Option<PageNamer>, Error> {
        let config = &self.config;
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
        let namer = || PageNamer::new(config.codec(), &self.facts, arithmetic_id, secret);
        Ok(config.prefix.then(namer).flatten())
    }

    /// Opens the link of a device that serves these layers.
    pub(super) fn open(
        self,
        bundle: &Bundle,
        drafter: Option<Box<dyn Drafter>>,
        shared: Arc<Shared>,
        incoming: Receiver<Submission>,
    ) -> Result<Device, Error> {
        let config = &self.config;
        let CloudAddress::Remote(cloud) = &config.cloud else {
            unreachable!("a cloud in this process has been started and has an address")
        };
        let address = config::remote(cloud)?;
        let core_config = DeviceConfig {
            sessions_max: config.limits.sessions_max as usize,
            kv_rows_max: config.limits.kv_rows_max as usize,
            step_rows_max: config.limits.step_rows_max,
            chunks: config.chunks,
            codec: config.codec(),
            reconnect: config.reconnect,
            cloud: address.to_string(),
        };
        *shared.describe() = self.describe(drafter.as_deref());
        let (now, vocab_size) = (shared.clock.now(), shared.config.vocab_size);
        let random = Box::new(SystemRandom);
        let core =
            DeviceCore::new(now, core_config, &self.facts, vocab_size, self.namer()?, drafter);
        let core = core.with_link(now, self.hello(), config.cloud_arithmetic, random);
        let endpoint = endpoint::dialler(config, shared.clock.clone(), self.hello())?;
        Ok(Device {
            core,
            guard: Guard::start(bundle, &config.verify, endpoint.waker())?,
            cloud: Cloud::new(address, &endpoint),
            calls: Calls::new(shared.clone(), incoming, config.limits.queue_max as usize),
            endpoint,
            lost: None,
            arrived: Vec::new(),
            shared,
            layers: self,
        })
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
        let split_layer = self.facts.layers.start as usize;
        self.model = load(config, &bundle, split_layer)?;
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
