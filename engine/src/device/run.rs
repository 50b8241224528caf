//! The engine thread's loop: link, clock, model and callers around a [`DeviceCore`].

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hat_core::device::{DeviceCore, Inbound};
use hat_plan::BackendFault;
use hat_transport::endpoint::{Endpoint, Event};

use super::Shared;
use super::calls::Calls;
use super::dial::Cloud;
use super::start::Layers;
use crate::config::Processor;
use crate::watch::Guard;

/// The engine thread's own: a core, and everything that it does not know of.
pub(super) struct Device {
    pub(super) core: DeviceCore,
    pub(super) layers: Layers,
    pub(super) endpoint: Endpoint,
    pub(super) guard: Guard,
    pub(super) cloud: Cloud,
    /// Reason that this device's own backend is lost, if it is.
    pub(super) lost: Option<BackendFault>,
    /// Events of the last turn.
    pub(super) arrived: Vec<Event>,
    pub(super) shared: Arc<Shared>,
    pub(super) calls: Calls, // dropped last
}

impl Device {
    /// Serves until told to stop, or until link, files or backend fail.
    pub(super) fn run(mut self) {
        if let Err(error) = self.serve() {
            tracing::error!(%error, "the device stops");
            self.calls.stop(&error.to_string());
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        while !self.shared.stop.load(Ordering::Acquire) {
            if let Some(fault) = self.lost.take() {
                self.go_on_without(fault)?;
            }
            if let Some(reason) = self.guard.changed() {
                return Err(io::Error::other(reason.to_owned()));
            }
            let now = self.now();
            self.calls.submit(&mut self.core);
            self.calls.drop_cancelled(&mut self.core);
            let (endpoint, connection) = (&self.endpoint, self.cloud.connection);
            let held = |session| connection.map_or(0, |id| endpoint.held(id, session));
            self.core.handle_timeout(now, &held);
            // Nothing is computed with weights that may have changed.
            let begins = self.guard.is_clear();
            let has_computed = self.compute(now, begins);
            self.cloud.obey(now, &mut self.core, &mut self.endpoint);
            self.calls.tell(&mut self.core);
            if let Some(to) = self.cloud.connection {
                self.core.poll_transmit(self.now(), to, &mut self.endpoint, begins);
            }
            self.look_at_link();
            let timeout =
                if has_computed { Some(Duration::ZERO) } else { self.core.poll_timeout(now) };
            let mut arrived = std::mem::take(&mut self.arrived);
            self.endpoint.poll(timeout, &mut arrived)?;
            arrived.drain(..).for_each(|event| self.take(event));
            self.arrived = arrived;
            self.look_at_link();
        }
        self.calls.stop("it was closed");
        // What was said last may be the names of pages to keep.
        self.endpoint.poll(Some(Duration::ZERO), &mut self.arrived)
    }

    fn take(&mut self, event: Event) {
        if let Some(inbound) = self.cloud.inbound(event) {
            if matches!(inbound, Inbound::Up { .. }) {
                self.guard.look();
            }
            self.core.handle_inbound(inbound);
        }
    }

    /// Runs one computation; returns true if there was one.
    fn compute(&mut self, now: Instant, begins: bool) -> bool {
        let Some(work) = self.core.poll_work(now, begins) else { return false };
        let (shared, model) = (&self.shared, &mut self.layers.model);
        let began = shared.clock.now();
        work.run(&mut **model);
        let ended = shared.clock.now();
        let (took, fault) = (ended.duration_since(began), model.fault());
        self.core.handle_work(ended, took, fault.as_ref(), shared.text.vocabulary());
        self.lost = fault.filter(|fault| fault.lasts);
        if self.core.drafter.is_none() && shared.describe().drafter.is_some() {
            shared.describe().drafter = None;
        }
        true
    }

    /// The backend is lost to this process: the CPU takes its place, if the processor is one that
    /// falls back. The link is made anew, since HELLO names this device's arithmetic; so no session
    /// is left in the cloud. Requests that come meanwhile wait.
    ///
    /// # Errors
    /// The backend is lost, and the CPU can't or may not go on in its place: the device ends.
    fn go_on_without(&mut self, fault: BackendFault) -> io::Result<()> {
        if !self.layers.config.processor.falls_back() {
            return Err(io::Error::other(fault));
        }
        self.layers.config.processor = Processor::Auto;
        let now = self.now();
        self.core.leave_link(now);
        self.cloud.obey(now, &mut self.core, &mut self.endpoint);
        self.calls.tell(&mut self.core);
        self.endpoint.poll(Some(Duration::ZERO), &mut self.arrived)?; // the cloud hears of it
        let drafter = self.core.drafter.take();
        let drafter = self.layers.load_again(drafter).map_err(|error| {
            io::Error::other(format!("{fault}; and the CPU can't go on: {error}"))
        })?;
        let computes = self.layers.model.describe();
        *self.shared.describe() = self.layers.describe(drafter.as_deref());
        let hello = self.layers.hello();
        self.core.handle_model(hello.arithmetic_id, drafter);
        self.core.dial_again(self.now(), hello);
        self.endpoint.set_hello(hello);
        tracing::warn!(%fault, computes, "the device's GPU is lost: the CPU computes from now on");
        Ok(())
    }

    fn now(&self) -> Instant {
        self.shared.clock.now()
    }

    /// Looks at what the link counts.
    fn look_at_link(&mut self) {
        let traffic = self.cloud.connection.and_then(|id| self.endpoint.traffic(id));
        self.core.handle_traffic(traffic);
    }
}
