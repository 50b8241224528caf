//! The engine thread's loop: link, clock, model and callers around a [`DeviceCore`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};
use hat_core::answer::Answer;
use hat_core::device::{DeviceConfig, DeviceCore, PageNamer, RequestEvent, RequestId};
use hat_core::draft::trained::Trained;
use hat_core::wire::{self, BundleFacts};
use hat_plan::{BackendFault, DeviceForward};
use hat_transport::endpoint::{Endpoint, Event as LinkEvent};
use hat_transport::link::Waker;
use hat_transport::message::{Hello, Role};

use super::link::Link;
use super::resolve::Resolver;
use super::{Described, Job, Shared, Waits};
use crate::config::{self, CloudAddress, EngineConfig};
use crate::text::Rendered;
use crate::watch;
use crate::{Error, Event, endpoint};

/// What the engine thread starts with.
pub(super) struct Start {
    pub(super) config: EngineConfig,
    pub(super) facts: BundleFacts,
    pub(super) model: Box<dyn DeviceForward>,
    pub(super) trained: Option<Box<dyn Trained>>,
    pub(super) shared: Arc<Shared>,
    pub(super) incoming: Receiver<Job>,
    pub(super) watch: watch::Start,
}

/// The end of the engine thread, whatever ends it: nobody waits for it after that. A bounded
/// channel keeps what is in it when its receiver goes, so the last requests are taken out; one
/// that comes later finds the flag.
struct Ending {
    shared: Arc<Shared>,
    incoming: Receiver<Job>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.incoming.try_iter().for_each(drop);
    }
}

impl Start {
    /// Opens the link, says so, and serves until told to stop.
    pub(super) fn run(self, ready: &Sender<Result<Waker, Error>>) {
        let _last_of_all = Ending { shared: self.shared.clone(), incoming: self.incoming.clone() };
        let mut device = match self.open() {
            Ok(device) => {
                let _ = ready.send(Ok(device.endpoint.waker()));
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

    /// What computes now.
    pub(super) fn describe(&self, drafter: Option<&dyn Trained>) -> Described {
        let drafter = drafter.map(Trained::describe);
        Described { device: self.model.describe(), drafter }
    }

    /// What this device says of itself.
    pub(super) fn hello(&self) -> Hello {
        let BundleFacts { hidden_size, layers, model_id, .. } = &self.facts;
        Hello {
            arithmetic_id: self.model.arithmetic_id(),
            ..wire::hello(Role::Device, *model_id, *hidden_size, layers.clone())
        }
    }

    fn open(mut self) -> Result<Device, Error> {
        let CloudAddress::Remote(cloud) = &self.config.cloud else {
            unreachable!("a cloud in this process has been started and has an address")
        };
        let address = config::remote(cloud)?;
        let drafter = self.trained.take();
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
        let vocab_size = self.shared.config.vocab_size;
        let core = DeviceCore::new(clock.now(), core_config, facts, vocab_size, namer, drafter);
        let endpoint = endpoint::dialler(config, clock, self.hello())?;
        let waker = endpoint.waker();
        let guard = self.watch.start(endpoint.waker())?;
        Ok(Device {
            endpoint,
            guard,
            link: Link::new(address, Resolver::new(move || waker.wake())),
            core,
            calls: BTreeMap::new(),
            lost: None,
            arrived: Vec::new(),
            start: self,
        })
    }
}

/// Whoever asked for an answer.
struct Call {
    events: Sender<Result<Event, Error>>,
    cancelled: Arc<AtomicBool>,
    waits: Option<Waits>,
    rendered: Rendered,
}

/// The engine thread's own: a core, and everything that it does not know of.
pub(super) struct Device {
    pub(super) start: Start,
    pub(super) endpoint: Endpoint,
    pub(super) guard: watch::Guard,
    pub(super) link: Link,
    pub(super) core: DeviceCore,
    calls: BTreeMap<RequestId, Call>,
    /// Why this device's own backend is lost, if it is.
    lost: Option<BackendFault>,
    /// Events of the last turn.
    pub(super) arrived: Vec<LinkEvent>,
}

impl Device {
    fn serve(&mut self) -> std::io::Result<()> {
        while !self.start.shared.stop.load(Ordering::Acquire) {
            if let Some(fault) = self.lost.take() {
                self.go_on_without(fault)?;
            }
            if let Some(reason) = self.guard.changed() {
                return Err(std::io::Error::other(reason.to_owned()));
            }
            let now = self.now();
            self.submit();
            self.drop_cancelled();
            self.dial(now);
            let (endpoint, connection) = (&self.endpoint, self.link.connection);
            let holds = |session| connection.is_some_and(|id| endpoint.holds(id, session));
            self.core.handle_timeout(now, &holds);
            // Nothing is computed with weights that may have changed.
            let begins = self.guard.is_clear();
            let has_computed = self.compute(now, begins);
            self.tell();
            if let Some(to) = self.link.connection {
                let now = self.start.shared.clock.now();
                self.core.poll_transmit(now, to, &mut self.endpoint, begins);
            }
            self.look_at_link();
            let dials = self.dials_at().map(|time| time.saturating_duration_since(now));
            let timeout = self.core.poll_timeout(now).into_iter().chain(dials).min();
            let timeout = if has_computed { Some(Duration::ZERO) } else { timeout };
            let mut arrived = std::mem::take(&mut self.arrived);
            self.endpoint.poll(timeout, &mut arrived)?;
            let now = self.now();
            arrived.drain(..).for_each(|event| self.take(now, event));
            self.arrived = arrived;
            self.look_at_link();
        }
        self.stop("it was closed");
        // What was said last may be the names of pages to keep.
        self.endpoint.poll(Some(Duration::ZERO), &mut self.arrived)
    }

    /// Ends all requests.
    fn stop(&mut self, why: &str) {
        for call in std::mem::take(&mut self.calls).into_values() {
            let _ = call.events.send(Err(Error::Stopped(why.to_owned())));
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
        for job in incoming.try_iter().take(room) {
            self.link.redial.hurry();
            let Job { prepared, rendered, events, cancelled, asked, waits } = job;
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

    /// Runs one computation; says whether there was one.
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
        let counters = self.link.connection.and_then(|id| self.endpoint.counters(id));
        self.core.handle_traffic(counters.map(|counters| counters.traffic));
    }
}
