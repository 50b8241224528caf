//! The io thread: the shell of a [`CloudCore`]. It owns the link, the clock and the queues to the
//! stages, says to the core what happened, and does what the core says.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hat_core::cloud::{CloudCore, LinkEvent};
use hat_plan::BackendFault;
use hat_transport::clock::Clock;
use hat_transport::endpoint::{Endpoint, Event};
use hat_transport::message::CloseCode;

use super::step::Stages;
use super::{CloudCounters, publish};
use crate::watch::Guard;

/// Turns of the link for the last frames of a cloud that ends, and the time of each at most.
const LAST_POLLS: usize = 10;
const LAST_POLL_TIME: Duration = Duration::from_millis(20);
/// The same for the errors that sessions are closed with when the backend is lost.
const CLOSE_POLL_TIME: Duration = Duration::from_millis(5);

/// The io thread's own.
pub(super) struct Shell {
    pub(super) core: CloudCore,
    pub(super) endpoint: Endpoint,
    pub(super) guard: Guard,
    pub(super) stages: Stages,
    pub(super) clock: Arc<dyn Clock>,
    /// Time at the start of this round.
    pub(super) now: Instant,
    pub(super) counters: Arc<CloudCounters>,
    pub(super) stop: Arc<AtomicBool>,
    /// Cell for a fault that lasts.
    pub(super) fault: Arc<OnceLock<BackendFault>>,
}

impl Shell {
    /// Serves until told to stop, or until link, files or backend fail; then tells every device.
    pub(super) fn run(mut self) {
        let (code, reason) = match self.serve() {
            Ok(()) => (CloseCode::ShuttingDown, "the cloud is shutting down"),
            Err(error) => {
                tracing::error!(%error, "the cloud stops");
                // The error may name files of this machine, which are no business of a device.
                (CloseCode::Internal, "the cloud has failed; its log says why")
            }
        };
        self.send_close(code, reason);
    }

    fn serve(&mut self) -> std::io::Result<()> {
        let mut events = Vec::new();
        while !self.stop.load(Ordering::Acquire) {
            let until = self.core.poll_timeout();
            let timeout = until.map(|until| until.saturating_duration_since(self.now));
            self.endpoint.poll(timeout, &mut events)?;
            self.now = self.clock.now();
            events.drain(..).for_each(|event| self.take(event));
            self.take_steps()?;
            if let Some(fault) = self.core.poll_fault(self.now) {
                self.transmit();
                self.poll_link(LAST_POLLS, CLOSE_POLL_TIME);
                let _ = self.fault.set(fault.clone());
                return Err(std::io::Error::other(fault));
            }
            if let Some(reason) = self.guard.changed() {
                return Err(std::io::Error::other(reason.to_owned()));
            }
            if self.guard.is_clear() {
                self.schedule();
            }
            self.transmit();
        }
        Ok(())
    }

    fn take(&mut self, event: Event) {
        let (connection, event) = match event {
            Event::Frame { connection, frame } => {
                return self.core.handle_frame(self.now, connection, frame);
            }
            Event::Up { connection, hello, resumed, .. } => {
                self.guard.look();
                (connection, LinkEvent::Up { hello, resumed })
            }
            Event::Down { connection, reason, .. } => {
                tracing::info!(%reason, "connection down");
                (connection, LinkEvent::Down)
            }
            Event::Gone { connection, error } => {
                tracing::info!(%error, "connection gone");
                (connection, LinkEvent::Gone)
            }
            _ => return,
        };
        self.core.handle_link(self.now, connection, event);
    }

    /// Takes back the steps that have ended.
    fn take_steps(&mut self) -> std::io::Result<()> {
        while let Some(batch) = self.stages.take()? {
            for connection in batch.connections() {
                if let Some(traffic) = self.endpoint.traffic(connection) {
                    self.core.handle_traffic(connection, &traffic);
                }
            }
            self.core.handle_step(self.now, batch, &mut self.endpoint);
        }
        Ok(())
    }

    /// Hands out steps while the first stage has room for one.
    fn schedule(&mut self) {
        while self.stages.at_first() < self.core.steps_ahead(self.now)
            && let Some(batch) = self.core.poll_step(self.now)
        {
            self.stages.give(batch);
        }
    }

    /// Queues what is to go out at the next turn of the link. Whoever reads it finds it counted.
    fn transmit(&mut self) {
        self.core.poll_transmit(self.now, &mut self.endpoint);
        self.publish();
        while let Some((connection, code, reason)) = self.core.poll_close() {
            self.endpoint.close(connection, code, &reason);
        }
    }

    /// Shows what the core has done.
    pub(super) fn publish(&self) {
        publish(&self.counters, &self.core.figures());
    }

    /// Tells every device that the connection is over, so that it comes back instead of waiting
    /// for the silence to be long enough.
    fn send_close(&mut self, code: CloseCode, reason: &str) {
        let mut polls = 0;
        for connection in self.core.connections() {
            self.endpoint.close(connection, code, reason);
            polls = LAST_POLLS;
        }
        self.poll_link(polls, LAST_POLL_TIME);
    }

    /// Lets the link send what is queued; what comes meanwhile is dropped.
    fn poll_link(&mut self, polls: usize, time: Duration) {
        let mut events = Vec::new();
        for _ in 0..polls {
            if self.endpoint.poll(Some(time), &mut events).is_err() {
                return; // the link has failed, and the sockets close with it
            }
            events.clear();
        }
    }
}
