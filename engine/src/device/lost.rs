//! What becomes of a device whose backend does not compute: requests that run end; and if the
//! backend is lost and the configuration says so, the CPU takes its place.

use std::io;
use std::time::Duration;

use hat_transport::message::CloseCode;

use super::run::{Device, Start};
use super::{bundle_error, open_bundle, trained};
use crate::backend::{ARITHMETIC_CPU, BackendFault};
use crate::config::Processor;
use crate::error::RequestError;
use crate::page::pages_for;
use crate::sequence::PENDING_ROWS_MAX;
use crate::{Error, processor};

impl Device {
    /// The backend did not compute what it was asked to, and its KV store means nothing now: ends
    /// every request. If the fault lasts, [`Device::go_on_without`] says what comes after that.
    pub(super) fn fail_all(&mut self, fault: &BackendFault) {
        tracing::error!(%fault, lasts = fault.lasts, "rows were not computed");
        while let Some(id) = self.requests.keys().next().copied() {
            self.fail(id, RequestError::Backend(fault.clone()));
        }
        self.forget_pages();
        self.lost = fault.lasts.then(|| fault.clone());
    }

    /// The trained drafter's backend did not compute: what it keeps and what it has just said mean
    /// nothing. Requests that run go on without it; if the fault lasts, so do all others.
    pub(super) fn draft_without(&mut self, fault: &BackendFault) {
        tracing::warn!(%fault, lasts = fault.lasts, "requests go on without the trained drafter");
        let Some(trained) = &mut self.start.trained else { return };
        for request in self.requests.values_mut() {
            request.drafting.has_rows = false;
            if let Some(session) = request.drafting.session.take() {
                trained.close(session);
            }
        }
        trained.forget();
        if fault.lasts {
            self.start.trained = None;
            self.start.shared.describe().drafter = None;
        }
    }

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
        }
        self.endpoint.turn(Some(Duration::ZERO), &mut self.arrived)?; // the cloud hears of it
        if let Err(error) = self.start.load_again() {
            let both = format!("{fault}; and the CPU can't go on: {error}");
            return Err(io::Error::other(both));
        }
        let now = self.start.model.describe();
        if let Some(namer) = &mut self.pages.namer {
            namer.computes_in(self.start.model.arithmetic_id());
        }
        // What the GPU's rows cost says nothing of the CPU's.
        self.cx.learned.forget_times();
        self.endpoint.set_hello(self.start.hello());
        self.dial();
        tracing::warn!(%fault, now, "the device's GPU is lost: the CPU computes from now on");
        *self.start.shared.describe() = self.start.describe();
        Ok(())
    }
}

impl Start {
    /// The same layers of the same model by the processor that is configured now.
    fn load_again(&mut self) -> Result<(), Error> {
        let config = &self.config;
        let bundle = open_bundle(&config.bundle, &config.verify, config.threads)?;
        if *bundle.model_id().as_bytes() != self.facts.model_id {
            return Err(bundle_error(&config.bundle, "it holds another model than at start"));
        }
        let pages = pages_for(config.limits.kv_rows_max as usize + PENDING_ROWS_MAX);
        let split_layer = self.facts.layers.start as usize;
        self.model = processor::device(config, &bundle, split_layer, pages)?;
        // It may have computed on the same GPU. Nothing else is lost without it.
        if self.trained.as_ref().is_none_or(|trained| trained.arithmetic_id() != ARITHMETIC_CPU) {
            let loaded = trained(config, &bundle, split_layer, ARITHMETIC_CPU);
            let loaded = loaded.map(|found| found.map(|(trained, _)| trained));
            self.trained = loaded.unwrap_or_else(|error| {
                tracing::warn!(%error, "requests go on without the trained drafter");
                None
            });
        }
        Ok(())
    }
}
