//! What becomes of a device whose backend is lost: if the configuration says so, the CPU takes its
//! place.

use std::io;
use std::time::Duration;

use hat_core::device::Inbound;
use hat_core::draft::trained::Trained;
use hat_core::page::pages_for;
use hat_core::sequence::PENDING_ROWS_MAX;
use hat_plan::{ARITHMETIC_CPU, BackendFault};
use hat_transport::message::CloseCode;

use super::run::{Device, Start};
use super::{open_bundle, trained};
use crate::config::Processor;
use crate::{Error, processor};

impl Device {
    /// The backend is lost to this process: the CPU takes its place, if the processor is one that
    /// falls back. The link is made anew, since HELLO names this device's arithmetic; so no session
    /// is left in the cloud. Requests that come meanwhile wait.
    ///
    /// # Errors
    /// What was lost, and why the CPU can't go on where it may: the device ends.
    pub(super) fn go_on_without(&mut self, fault: BackendFault) -> io::Result<()> {
        if !self.start.config.processor.falls_back() {
            return Err(io::Error::other(fault));
        }
        self.start.config.processor = Processor::Auto;
        if let Some(connection) = self.link.connection.take() {
            let reason = "the device's backend is lost";
            self.endpoint.close(connection, CloseCode::Internal, reason);
            self.set_connected(false);
            self.core.handle_inbound(Inbound::Gone { reason: reason.into(), is_final: false });
        }
        self.endpoint.poll(Some(Duration::ZERO), &mut self.arrived)?; // the cloud hears of it
        let drafter = self.core.drafter.take();
        let drafter = self.start.load_again(drafter).map_err(|error| {
            io::Error::other(format!("{fault}; and the CPU can't go on: {error}"))
        })?;
        let now = self.start.model.describe();
        *self.start.shared.describe() = self.start.describe(drafter.as_deref());
        self.core.handle_model(self.start.model.arithmetic_id(), drafter);
        self.endpoint.set_hello(self.start.hello());
        self.link.redial.hurry();
        tracing::warn!(%fault, now, "the device's GPU is lost: the CPU computes from now on");
        Ok(())
    }
}

impl Start {
    /// The same layers of the same model by the processor that is configured now; returns the
    /// drafter that goes with them.
    fn load_again(
        &mut self,
        drafter: Option<Box<dyn Trained>>,
    ) -> Result<Option<Box<dyn Trained>>, Error> {
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
        let loaded = trained(config, &bundle, split_layer, ARITHMETIC_CPU);
        let loaded = loaded.map(|found| found.map(|(drafter, _)| drafter));
        Ok(loaded.unwrap_or_else(|error| {
            tracing::warn!(%error, "requests go on without the trained drafter");
            None
        }))
    }
}
