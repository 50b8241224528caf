//! The engine thread's loop: compute, send, wait, until told to stop; and what requests are
//! before and after their rows.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};
use hat_transport::conn::{Frame, FrameSink};
use hat_transport::link::Waker;
use hat_transport::message::{
    CloseCode, Hello, Message, Open, Role, SessionError, SessionErrorCode,
};
use hat_transport::turn::{Endpoint, Event as LinkEvent};

use super::common::Common;
use super::feed::Drafting;
use super::outage::{Link, Patience};
use super::prefix::{PageNamer, Pages};
use super::request::{Path, Request, RequestId, Session};
use super::resolve::Resolver;
use super::violation::CloudViolation;
use super::work::AtWork;
use super::{Described, Job, Shared};
use crate::answer::{Answer, Prepared};
use crate::backend::BackendFault;
use crate::config::{self, CloudAddress, EngineConfig};
use crate::draft::DraftMode;
use crate::draft::trained::Trained;
use crate::error::RequestError;
use crate::metrics::Meter;
use crate::model::DeviceForward;
use crate::page::pages_for;
use crate::request::FinishReason;
use crate::sequence::{PENDING_ROWS_MAX, Sequence};
use crate::watch;
use crate::wire::{self, BundleFacts, KV_TYPE_F16};
use crate::{Error, Event, Metrics};

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
            let text = error.to_string();
            for request in device.requests.values() {
                request.fail(RequestError::Stopped(text.clone()));
            }
        }
    }

    /// What computes now.
    pub(super) fn describe(&self) -> Described {
        let drafter = self.trained.as_ref().map(|trained| trained.describe());
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

    fn open(self) -> Result<Device, Error> {
        let CloudAddress::Remote(cloud) = &self.config.cloud else {
            unreachable!("a cloud in this process has been started and has an address")
        };
        let address = config::remote(cloud)?;
        let (config, facts) = (&self.config, &self.facts);
        let clock = self.shared.clock.clone();
        let namer = PageNamer::new(config, facts, self.model.arithmetic_id())?;
        let endpoint = wire::dialler(config, clock, self.hello())?;
        let waker = endpoint.waker();
        let resolver = Resolver::new(move || waker.wake());
        let guard = self.watch.start(endpoint.waker())?;
        let pages = pages_for(config.limits.kv_rows_max as usize + PENDING_ROWS_MAX);
        Ok(Device {
            endpoint,
            guard,
            link: Link::new(address, resolver, self.shared.clock.now()),
            lost: None,
            requests: BTreeMap::new(),
            next_request: 1,
            next_wire_id: 1,
            first_to_send: 0,
            waiting: VecDeque::new(),
            pages: Pages::new(pages, namer),
            missing: Missing::default(),
            cx: Common::new(config, facts, self.shared.config.vocab_size),
            at_work: AtWork::default(),
            events: VecDeque::new(),
            arrived: Vec::new(),
            start: self,
        })
    }
}

/// The engine thread's own: link, model, requests.
pub(super) struct Device {
    pub(super) start: Start,
    pub(super) endpoint: Endpoint,
    guard: watch::Guard,
    pub(super) link: Link,
    /// Why this device's own backend is lost, if it is.
    pub(super) lost: Option<BackendFault>,
    /// Requests that run, by age.
    pub(super) requests: BTreeMap<RequestId, Request>,
    next_request: RequestId,
    next_wire_id: u32,
    /// The request whose prompt is sent first.
    pub(super) first_to_send: RequestId,
    /// Requests that have no session yet.
    waiting: VecDeque<Job>,
    pub(super) pages: Pages,
    missing: Missing,
    pub(super) cx: Common,
    pub(super) at_work: AtWork,
    /// Events of the link that have not been looked at, in the order in which they came.
    pub(super) events: VecDeque<LinkEvent>,
    /// Those of the last turn.
    pub(super) arrived: Vec<LinkEvent>,
}

/// What was said to be missing: each is said once.
#[derive(Default)]
struct Missing {
    trained: bool,
}

impl Missing {
    fn tell(&mut self, draft: DraftMode, has_trained: bool) {
        let mode = draft.name();
        if draft.wants_trained() && !has_trained && !std::mem::replace(&mut self.trained, true) {
            tracing::warn!(
                mode,
                "no trained drafter for this model and split: lookup drafts alone"
            );
        }
    }
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
            let now = self.start.shared.clock.now();
            self.admit();
            if self.link.connection.is_none() && self.link.redial.is_due(now) {
                self.dial();
            }
            self.drop_cancelled();
            self.drop_overdue(now);
            // Nothing is computed with weights that may have changed.
            let is_clear = self.guard.is_clear();
            if is_clear {
                self.open_sessions(now);
            }
            let work = self.poll_work(now, is_clear);
            let has_worked = work.is_some();
            work.into_iter().for_each(|work| self.run(work));
            self.send_released();
            self.look_at_link();
            let is_busy = has_worked || self.is_at_work() || !self.events.is_empty();
            let timeout = if is_busy { Some(Duration::ZERO) } else { self.wait_for(now) };
            self.endpoint.turn(timeout, &mut self.arrived)?;
            self.events.extend(self.arrived.drain(..));
            self.look_at_link();
        }
        for request in self.requests.values() {
            request.fail(RequestError::Stopped("it was closed".into()));
        }
        // What was said last may be the names of pages to keep.
        self.endpoint.turn(Some(Duration::ZERO), &mut self.arrived)
    }

    pub(super) fn now(&self) -> Instant {
        self.start.shared.clock.now()
    }

    /// Looks at what the link counts.
    fn look_at_link(&mut self) {
        let counters = self.link.connection.and_then(|id| self.endpoint.counters(id));
        self.cx.learned.traffic = counters.map(|counters| counters.traffic);
    }

    /// Gives waiting requests a session of their own while there is room.
    fn admit(&mut self) {
        let limits = self.start.config.limits;
        // Whatever finds no place here stays in the bounded queue, and its makers are told.
        let room = limits.queue_max as usize - self.waiting.len();
        let before = self.waiting.len();
        self.waiting.extend(self.start.incoming.try_iter().take(room));
        if self.waiting.len() > before {
            self.link.redial.hurry();
        }
        while self.requests.len() < limits.sessions_max as usize {
            let Some(job) = self.waiting.front() else { return };
            let Some(kv) = self.pages.reserve(job.prepared.rows_max()) else { return };
            let mut job = self.waiting.pop_front().expect("looked at above");
            job.waits = None;
            let request = self.begin(job, kv);
            self.requests.insert(self.next_request, request);
            self.next_request += 1;
            self.start.shared.metrics().sessions = self.requests.len() as u64;
        }
    }

    /// A request that runs from now on, on reserved pages.
    fn begin(&mut self, job: Job, kv: Sequence) -> Request {
        let Start { shared, trained, .. } = &mut self.start;
        let prompt = &job.prepared.prompt;
        let draft = job.prepared.request.draft;
        self.missing.tell(draft, trained.is_some());
        let lookup = draft.looks_up(trained.is_some()).then(|| prompt.iter().copied().collect());
        let drafter = trained.as_mut().filter(|_| draft.asks_trained());
        let drafting = Drafting::new(drafter.and_then(|drafter| drafter.open(kv.rows_max())));
        Request {
            answer: Answer::new(&job.prepared, &shared.tokenizer, &shared.config),
            meter: Meter::new(job.asked, job.prepared.prompt_n()),
            path: Path { tokens: prompt.clone(), names: None, names_max: 0, lookup },
            kv,
            drafting,
            patience: Patience::new(shared.clock.now()),
            passed: 0,
            round: 0,
            session: Session::Closed { not_before: None },
            job,
        }
    }

    fn drop_cancelled(&mut self) {
        let waiting = self.waiting.len();
        self.waiting.retain(|job| !job.cancelled.load(Ordering::Acquire));
        let mut cancelled = waiting - self.waiting.len();
        let is_cancelled =
            |(id, request): (&RequestId, &Request)| request.is_cancelled().then_some(*id);
        while let Some(id) = self.requests.iter().find_map(is_cancelled) {
            self.retire(id, false);
            cancelled += 1;
        }
        if cancelled > 0 {
            self.start.shared.metrics().requests_cancelled += cancelled as u64;
        }
    }

    fn open_sessions(&mut self, now: Instant) {
        let Some(connection) = self.link.connection.filter(|_| self.link.connected) else { return };
        let facts = &self.start.facts;
        let cloud = self.cx.cloud;
        let layer = |layer: u32| u16::try_from(layer).expect("layers are few");
        for request in self.requests.values_mut() {
            let Session::Closed { not_before } = request.session else { continue };
            if not_before.is_some_and(|time| now < time) {
                continue;
            }
            let namer = self.pages.namer.as_ref();
            let path = &mut request.path;
            path.names_max = wire::pages_per_frame(cloud.frame_max);
            path.names = namer.map(|namer| namer.names(cloud.arithmetic, &path.tokens));
            let open = Message::Open(Open {
                entry_layer: layer(facts.layers.start),
                exit_layer: layer(facts.layers.end),
                codec: self.start.config.codec().id(),
                kv_type: KV_TYPE_F16,
                arithmetic_id: cloud.arithmetic,
                rows_max: request.job.prepared.rows_max(),
                pages: path.pages_to_find(),
            });
            let bytes = open.encoded_len();
            let wire_id = self.next_wire_id;
            if self.endpoint.send_message(connection, wire_id, &open).is_ok() {
                self.next_wire_id = self.next_wire_id.checked_add(1).unwrap_or(1);
                request.patience.opens();
                request.note_message(bytes);
                request.session = Session::Opening { wire_id };
            }
        }
    }

    /// How long a turn may wait: until the next deadline, or until something happens.
    fn wait_for(&self, now: Instant) -> Option<Duration> {
        let mut open = self.requests.values().filter_map(|request| request.session.open());
        if open.any(|open| open.outgoing.has_released()) {
            return Some(Duration::from_millis(1));
        }
        let pause = self.cx.learned.upload_pause();
        let pause = pause.filter(|_| self.requests.values().any(Request::wants_compute));
        let until = self.next_time().map(|time| time.saturating_duration_since(now));
        until.into_iter().chain(pause).min()
    }

    pub(super) fn take(&mut self, event: LinkEvent) {
        // One that this device has closed itself has nothing more to say.
        if event.connection().is_some_and(|connection| Some(connection) != self.link.connection) {
            return;
        }
        match event {
            LinkEvent::Up { connection, hello, resumed, .. } => {
                self.guard.look();
                if let Err(reason) = self.check_cloud(&hello) {
                    self.endpoint.close(connection, CloseCode::Incompatible, &reason);
                    self.link.refused = Some(reason);
                    return;
                }
                self.take_up(&hello, resumed);
            }
            LinkEvent::Down { reason, .. } => {
                self.link.note_down(reason, "the cloud is away; dialling on");
                self.set_connected(false);
                // A round that an outage falls into says nothing about rounds.
                let open = self.requests.values_mut().filter_map(|it| it.session.open_mut());
                open.for_each(|open| open.timed = None);
            }
            LinkEvent::Gone { error, .. } => {
                let is_final = self.link.refused.is_some() || error.is_final();
                let reason = self.link.refused.take().unwrap_or_else(|| error.to_string());
                self.link.note_down(reason, "the cloud is gone; dialling on");
                self.set_connected(false);
                self.link.connection = None;
                self.link.redial.put_off(self.start.shared.clock.now());
                if !is_final {
                    self.requests.values_mut().for_each(|request| request.restart(None));
                    return;
                }
                self.fail_for_cloud();
            }
            LinkEvent::Frame { frame, .. } => {
                self.link.redial.works();
                self.take_frame(&frame);
            }
            _ => {}
        }
    }

    fn take_frame(&mut self, frame: &Frame) {
        // Frames of sessions that this side has ended are late, not wrong.
        let own = |(id, request): (&RequestId, &Request)| {
            (request.session.wire_id() == Some(frame.session)).then_some(*id)
        };
        let Some(id) = self.requests.iter().find_map(own) else { return };
        if let Err(violation) = self.take_message(id, frame) {
            self.fail_by(id, &violation);
        }
    }

    /// Takes a frame of a request's session: it is decoded here, and nowhere else.
    fn take_message(&mut self, id: RequestId, frame: &Frame) -> Result<(), CloudViolation> {
        let (kind, bytes) = (frame.kind, frame.body.len());
        let now = self.start.shared.clock.now();
        let reconnect = self.start.config.reconnect;
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        request.session.expects(kind)?;
        let message = Message::decode(kind, &frame.body)
            .map_err(|error| CloudViolation::Malformed { kind, error })?;
        match message {
            Message::Opened(opened) => return self.opened(id, opened.pages),
            Message::Output(output) => return self.take_output(id, now, &output, bytes),
            Message::Computed(computed) => {
                request.handle_computed(now, &computed, bytes, &mut self.cx)?;
            }
            Message::Dropped(dropped) => request.handle_dropped(&dropped)?,
            Message::Busy(busy) => {
                self.link.reason = "it has no room for another session".into();
                let at = request.patience.busy(now, busy.retry_after_ms);
                request.patience.start(now, reconnect);
                request.restart(Some(at));
            }
            Message::SessionError(SessionError { code, text }) => {
                let ended = || CloudViolation::Ended { code, text: text.to_owned() };
                let at = match code {
                    SessionErrorCode::NoSuchSession | SessionErrorCode::Evicted => {
                        request.patience.after_return(now).ok_or_else(ended)?
                    }
                    SessionErrorCode::Resource => {
                        let at = request.patience.after_loss(now).ok_or_else(ended)?;
                        tracing::warn!(%text, "the cloud lost the session");
                        request.patience.start(now, reconnect);
                        at
                    }
                    _ => return Err(ended()),
                };
                // Rows that have not left are of no use to anyone.
                if let (Some(connection), Some(id)) =
                    (self.link.connection, request.session.wire_id())
                {
                    self.endpoint.discard(connection, id);
                }
                request.restart(Some(at));
            }
            Message::Ended | Message::Cancelled => {}
            _ => return Err(CloudViolation::Unexpected { kind }),
        }
        Ok(())
    }

    pub(super) fn finish(&mut self, id: RequestId, finish_reason: FinishReason) {
        let estimates = self.cx.learned.estimates(&self.cx.facts, self.cx.cloud.stages);
        let Some(request) = self.requests.get_mut(&id) else { return };
        let text = request.answer.finish();
        let timings = request.meter.timings();
        let shared = &self.start.shared;
        if let Prepared { rendered: Some(rendered), prompt, .. } = &request.job.prepared {
            let (answer, text) = (request.answer.tokens(), request.answer.text());
            shared.turns().note(rendered, prompt, answer, text, &shared.tokenizer);
        }
        let mut sums = shared.metrics();
        sums.add(&request.meter);
        sums.estimates = estimates;
        drop(sums);
        let metrics = Box::new(Metrics {
            timings,
            token_ids: request.answer.tokens().to_vec(),
            text: request.answer.text().to_owned(),
            logits_blake3: request.answer.logits_blake3(),
        });
        request.tell(Event::Done { text, finish_reason, metrics });
        self.keep_pages(id);
        self.retire(id, true);
    }

    /// Ends a request with an error.
    pub(super) fn fail(&mut self, id: RequestId, error: RequestError) {
        let Some(request) = self.requests.get(&id) else { return };
        self.start.shared.metrics().requests_failed += 1;
        request.fail(error);
        self.retire(id, false);
    }

    /// Forgets a request, and tells the cloud if it has a session. `is_whole` if it has its answer.
    pub(super) fn retire(&mut self, id: RequestId, is_whole: bool) {
        let Some(request) = self.requests.remove(&id) else { return };
        self.start.shared.metrics().sessions = self.requests.len() as u64;
        if let Some(connection) = self.link.connection {
            self.end_session(connection, &request, is_whole);
        }
        if let (Some(trained), Some(session)) = (&mut self.start.trained, request.drafting.session)
        {
            trained.close(session);
        }
        self.pages.give_back(request.kv);
    }
}
