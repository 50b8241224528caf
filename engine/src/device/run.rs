//! The engine thread's loop: link, clock, model and callers around a [`DeviceCore`].

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use hat_core::answer::Answer;
use hat_core::device::{DeviceCore, Inbound, LinkCommand, RequestEvent, RequestId};
use hat_plan::BackendFault;
use hat_transport::conn::ConnectionId;
use hat_transport::endpoint::{Endpoint, Event as LinkEvent};

use super::resolve::Resolver;
use super::start::Start;
use super::{Submission, Waits};
use crate::config::{Address, Processor};
use crate::text::Rendered;
use crate::{Error, Event, watch};

/// The cloud's address.
struct Cloud {
    address: Address,
    resolver: Resolver,
    /// True if it is to be dialled as soon as it is known.
    dials: bool,
}

/// A request's caller.
struct Call {
    events: Sender<Result<Event, Error>>,
    cancelled: Arc<AtomicBool>,
    waits: Option<Waits>,
    rendered: Rendered,
}

/// The engine thread's own: a core, and everything that it does not know of.
pub(super) struct Device {
    start: Start,
    endpoint: Endpoint,
    guard: watch::Guard,
    cloud: Cloud,
    connection: Option<ConnectionId>,
    core: DeviceCore,
    calls: BTreeMap<RequestId, Call>,
    /// Reason that this device's own backend is lost, if it is.
    lost: Option<BackendFault>,
    /// Events of the last turn.
    arrived: Vec<LinkEvent>,
}

impl Device {
    /// A device that has not dialled its cloud.
    pub(super) fn new(
        start: Start,
        core: DeviceCore,
        address: Address,
        endpoint: Endpoint,
        guard: watch::Guard,
    ) -> Self {
        let waker = endpoint.waker();
        Self {
            start,
            endpoint,
            guard,
            cloud: Cloud { address, resolver: Resolver::new(move || waker.wake()), dials: false },
            connection: None,
            core,
            calls: BTreeMap::new(),
            lost: None,
            arrived: Vec::new(),
        }
    }

    /// Serves until told to stop.
    ///
    /// # Errors
    /// The fault that keeps the device from serving on.
    pub(super) fn serve(&mut self) -> io::Result<()> {
        while !self.start.shared.stop.load(Ordering::Acquire) {
            if let Some(fault) = self.lost.take() {
                self.go_on_without(fault)?;
            }
            if let Some(reason) = self.guard.changed() {
                return Err(io::Error::other(reason.to_owned()));
            }
            let now = self.now();
            self.submit();
            self.drop_cancelled();
            let (endpoint, connection) = (&self.endpoint, self.connection);
            let held = |session| connection.map_or(0, |id| endpoint.held(id, session));
            self.core.handle_timeout(now, &held);
            // Nothing is computed with weights that may have changed.
            let begins = self.guard.is_clear();
            let has_computed = self.compute(now, begins);
            self.obey(now);
            self.tell();
            if let Some(to) = self.connection {
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
        self.stop("it was closed");
        // What was said last may be the names of pages to keep.
        self.endpoint.poll(Some(Duration::ZERO), &mut self.arrived)
    }

    /// Dials and closes as the core says.
    fn obey(&mut self, now: Instant) {
        while let Some(command) = self.core.poll_link(now) {
            self.cloud.dials = command == LinkCommand::Dial;
            if let LinkCommand::Close { code, reason } = command
                && let Some(connection) = self.connection.take()
            {
                self.endpoint.close(connection, code, &reason);
            }
        }
        let Cloud { address, resolver, dials } = &mut self.cloud;
        let Some(found) = dials.then(|| resolver.poll(address)).flatten() else { return };
        *dials = false;
        match found {
            Ok(address) => self.connection = Some(self.endpoint.dial(address)),
            Err(error) => {
                let (reason, is_final) = (error.to_string(), error.is_final);
                self.core.handle_inbound(Inbound::Gone { reason, is_final });
            }
        }
    }

    /// Hands an event of the endpoint on.
    fn take(&mut self, event: LinkEvent) {
        // A connection that this device has closed has nothing more to say.
        if event.connection().is_some_and(|connection| Some(connection) != self.connection) {
            return;
        }
        self.core.handle_inbound(match event {
            LinkEvent::Up { hello, resumed, .. } => {
                self.guard.look();
                Inbound::Up { hello, resumed }
            }
            LinkEvent::Down { reason, .. } => Inbound::Down { reason },
            LinkEvent::Gone { error, .. } => {
                self.connection = None;
                Inbound::gone(&error)
            }
            LinkEvent::Frame { frame, .. } => Inbound::Frame(frame),
            LinkEvent::Refused { .. } | LinkEvent::Woken => return,
        });
    }

    /// The backend is lost to this process: the CPU takes its place, if the processor is one that
    /// falls back. The link is made anew, since HELLO names this device's arithmetic; so no session
    /// is left in the cloud. Requests that come meanwhile wait.
    ///
    /// # Errors
    /// The backend is lost, and the CPU can't or may not go on in its place: the device ends.
    fn go_on_without(&mut self, fault: BackendFault) -> io::Result<()> {
        if !self.start.config.processor.falls_back() {
            return Err(io::Error::other(fault));
        }
        self.start.config.processor = Processor::Auto;
        let now = self.now();
        self.core.leave_link(now);
        self.obey(now);
        self.tell();
        self.endpoint.poll(Some(Duration::ZERO), &mut self.arrived)?; // the cloud hears of it
        let drafter = self.core.drafter.take();
        let drafter = self.start.load_again(drafter).map_err(|error| {
            io::Error::other(format!("{fault}; and the CPU can't go on: {error}"))
        })?;
        let computes = self.start.model.describe();
        *self.start.shared.describe() = self.start.describe(drafter.as_deref());
        let hello = self.start.hello();
        self.core.handle_model(hello.arithmetic_id, drafter);
        self.core.dial_again(self.now(), hello);
        self.endpoint.set_hello(hello);
        tracing::warn!(%fault, computes, "the device's GPU is lost: the CPU computes from now on");
        Ok(())
    }

    /// Ends all requests.
    pub(super) fn stop(&mut self, why: &str) {
        for call in std::mem::take(&mut self.calls).into_values() {
            let _ = call.events.send(Err(Error::stopped(why)));
        }
    }

    fn now(&self) -> Instant {
        self.start.shared.clock.now()
    }

    /// Hands requests on to the core. Those beyond its queue stay in the bounded channel, and their
    /// makers are told.
    fn submit(&mut self) {
        let Start { shared, incoming, config, .. } = &self.start;
        let room = config.limits.queue_max as usize - self.core.waiting();
        for submission in incoming.try_iter().take(room) {
            let Submission { prepared, rendered, events, cancelled, asked, waits } = submission;
            let vocab_size = shared.config.vocab_size;
            let answer = Answer::new(&prepared, shared.text.vocabulary(), vocab_size);
            let id = self.core.submit(asked, prepared, answer);
            self.calls.insert(id, Call { events, cancelled, waits, rendered });
        }
    }

    fn drop_cancelled(&mut self) {
        let is_cancelled =
            |(id, call): (&RequestId, &Call)| call.cancelled.load(Ordering::Acquire).then_some(*id);
        while let Some(id) = self.calls.iter().find_map(is_cancelled) {
            self.core.cancel(id);
            self.calls.remove(&id);
            let mut sums = self.start.shared.metrics();
            sums.requests_cancelled += 1;
            sums.sessions = self.core.running() as u64;
        }
    }

    /// Runs one computation; returns true if there was one.
    fn compute(&mut self, now: Instant, begins: bool) -> bool {
        let Some(work) = self.core.poll_work(now, begins) else { return false };
        let Start { shared, model, .. } = &mut self.start;
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

    /// Passes news on to whom they are for.
    fn tell(&mut self) {
        self.start.shared.connected.store(self.core.is_connected(), Ordering::Release);
        while let Some((id, event)) = self.core.poll_event() {
            let shared = &self.start.shared;
            if !matches!(event, RequestEvent::Said(_)) {
                shared.metrics().sessions = self.core.running() as u64;
            }
            let Some(call) = self.calls.get_mut(&id) else { continue };
            let said = match event {
                RequestEvent::Runs => {
                    drop(call.waits.take());
                    continue;
                }
                RequestEvent::Said(event) => {
                    let _ = call.events.send(Ok(event)); // who does not listen has cancelled
                    continue;
                }
                RequestEvent::Done(done) => {
                    shared.text.note(&call.rendered, &done.prepared, &done.metrics);
                    let mut sums = shared.metrics();
                    sums.add(&done.meter);
                    sums.estimates = done.estimates;
                    drop(sums);
                    let (text, finish_reason) = (done.text, done.finish_reason);
                    Ok(Event::Done { text, finish_reason, metrics: Box::new(done.metrics) })
                }
                RequestEvent::Failed(error) => {
                    shared.metrics().requests_failed += 1;
                    Err(error.into())
                }
            };
            let _ = call.events.send(said);
            self.calls.remove(&id);
        }
    }

    /// Looks at what the link counts.
    fn look_at_link(&mut self) {
        let counters = self.connection.and_then(|id| self.endpoint.counters(id));
        self.core.handle_traffic(counters.map(|counters| counters.traffic));
    }
}
