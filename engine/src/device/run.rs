//! The engine thread's loop: compute, send, wait, until told to stop; and what requests are
//! before and after their rows.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};
use hat_transport::conn::Frame;
use hat_transport::frame::FRAME_BYTES_MAX;
use hat_transport::link::Waker;
use hat_transport::message::{CloseCode, Hello, Message, Open, Role, SessionErrorCode};
use hat_transport::turn::{ConnectionId, Endpoint, Event as LinkEvent};

use super::active::{Active, Chunk, Drafts, Phase, Unsent};
use super::outage::{Redial, SILENCE_FACTOR};
use super::plan::Sizing;
use super::prefix::PageNamer;
use super::violation::CloudViolation;
use super::walk::Walk;
use super::{Described, Job, Shared};
use crate::answer::Answer;
use crate::backend::{BackendFault, RowMove, TokenId};
use crate::chunk::Planner;
use crate::config::{self, Address, CloudAddress, EngineConfig};
use crate::draft::policy::Asking;
use crate::draft::trained::Trained;
use crate::draft::tree::Guess;
use crate::draft::{Acceptance, Costs, DraftMode};
use crate::error::RequestError;
use crate::metrics::Meter;
use crate::model::DeviceForward;
use crate::monitor::Monitor;
use crate::page::{PagePool, pages_for};
use crate::prefix::{PrefixCache, PrefixScope};
use crate::request::FinishReason;
use crate::sequence::{PENDING_ROWS_MAX, PlanBuffers, Sequence};
use crate::watch;
use crate::wire::{self, ARITHMETIC_ID, BundleFacts, KV_TYPE_F16};
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
            for active in &device.actives {
                active.fail(RequestError::Stopped(text.clone()));
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
        let facts = &self.facts;
        let clock = self.shared.clock.clone();
        let namer = PageNamer::new(&self.config, facts, self.model.arithmetic_id())?;
        let endpoint = wire::dialler(&self.config, clock, self.hello())?;
        let guard = self.watch.start(endpoint.waker())?;
        let limits = self.config.limits;
        let pages = pages_for(limits.kv_rows_max as usize + PENDING_ROWS_MAX);
        let step_rows = limits.step_rows_max as usize;
        Ok(Device {
            endpoint,
            guard,
            cloud: address.to_string(),
            address,
            connection: None,
            redial: Redial::default(),
            down_since: Some(self.shared.clock.now()),
            acked_bytes: 0,
            peer_rows_max: limits.step_rows_max,
            peer_frame_max: FRAME_BYTES_MAX,
            peer_stages: 1,
            peer_pending_max: PENDING_ROWS_MAX,
            peer_arithmetic: ARITHMETIC_ID,
            lost: None,
            connected: false,
            reason: "not connected yet".into(),
            refused: None,
            actives: Vec::new(),
            waiting: VecDeque::new(),
            pages: PagePool::new(u32::try_from(pages).expect("row counts are u32")),
            prefixes: PrefixCache::default(),
            namer,
            next_wire_id: 1,
            first_to_send: 0,
            missing: Missing::default(),
            acceptance: Acceptance::default(),
            costs: Costs::default(),
            events: Vec::new(),
            monitor: Monitor::default(),
            planner: Planner::default(),
            arrived: (0, Duration::ZERO),
            tokens: Vec::with_capacity(PENDING_ROWS_MAX),
            kept: Vec::with_capacity(PENDING_ROWS_MAX),
            guesses: Vec::with_capacity(PENDING_ROWS_MAX),
            shallow: Vec::new(),
            deep: Vec::new(),
            moves: Vec::with_capacity(PENDING_ROWS_MAX),
            pruned: Vec::with_capacity(PENDING_ROWS_MAX),
            plan: PlanBuffers::with_capacity(step_rows, 1, pages),
            logits: vec![0.0; self.shared.config.vocab_size],
            row: vec![0.0; facts.hidden_size],
            start: self,
        })
    }
}

/// The engine thread's own: link, model, requests.
pub(super) struct Device {
    pub(super) start: Start,
    pub(super) endpoint: Endpoint,
    guard: watch::Guard,
    pub(super) address: Address,
    /// The same as text.
    pub(super) cloud: String,
    pub(super) connection: Option<ConnectionId>,
    pub(super) redial: Redial,
    pub(super) connected: bool,
    /// Begin of the outage at hand; `None` while the cloud is connected.
    pub(super) down_since: Option<Instant>,
    /// Bytes that the cloud had acknowledged at the last look.
    pub(super) acked_bytes: u64,
    /// The cloud's row budget for one chunk.
    pub(super) peer_rows_max: u32,
    /// Longest frame that the cloud takes, header included.
    pub(super) peer_frame_max: usize,
    /// Pipeline stages of the cloud.
    pub(super) peer_stages: u32,
    /// Rows of one session that may pend in the cloud.
    pub(super) peer_pending_max: usize,
    /// What the cloud's layers compute in.
    pub(super) peer_arithmetic: u32,
    /// Why this device's own backend is lost, if it is.
    pub(super) lost: Option<BackendFault>,
    /// Why the cloud is away, for people.
    pub(super) reason: String,
    /// Why this device does not want the cloud that it found.
    refused: Option<String>,
    pub(super) actives: Vec<Active>,
    /// Requests that have no session yet.
    waiting: VecDeque<Job>,
    pub(super) pages: PagePool,
    /// Pages of the device's own layers, kept from earlier requests.
    pub(super) prefixes: PrefixCache,
    /// Names pages; `None` if all rows go up.
    pub(super) namer: Option<PageNamer>,
    next_wire_id: u32,
    /// The request whose prompt is sent first.
    pub(super) first_to_send: usize,
    missing: Missing,
    /// How good guesses were, over all requests.
    pub(super) acceptance: Acceptance,
    /// What rounds cost, over all requests.
    pub(super) costs: Costs,
    /// What chunks cost, over all requests.
    pub(super) monitor: Monitor,
    pub(super) planner: Planner,
    /// Bytes from the cloud, and how long they took, that the monitor knows of.
    pub(super) arrived: (u64, Duration),
    pub(super) plan: PlanBuffers,
    /// What has arrived and has not been looked at.
    pub(super) events: Vec<LinkEvent>,
    pub(super) tokens: Vec<TokenId>, // of a tree's rows
    pub(super) kept: Vec<usize>,     // nodes of a tree
    pub(super) guesses: Vec<(usize, Guess)>,
    pub(super) shallow: Vec<f32>, // [accepted rows, hidden_size]
    pub(super) deep: Vec<f32>,    // [accepted rows, hidden_size]
    pub(super) moves: Vec<RowMove>,
    pub(super) pruned: Vec<u32>,
    pub(super) logits: Vec<f32>, // [vocab_size]
    pub(super) row: Vec<f32>,    // [rows of one OUTPUT frame, hidden_size]
}

/// Shortest pause before a session is opened again, whatever the cloud says.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest one.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// The pause before a session is opened for the `attempt`-th time, at least 1.
fn pause(attempt: u32) -> Duration {
    (PAUSE_MIN * 2_u32.pow(attempt.clamp(1, 12) - 1)).min(PAUSE_MAX)
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
            if self.connection.is_none() && self.redial.is_due(now) {
                self.dial();
            }
            self.drop_cancelled();
            self.drop_overdue(now);
            // Nothing is computed with weights that may have changed.
            let is_clear = self.guard.is_clear();
            if is_clear {
                self.open_sessions(now);
            }
            let mut busy = is_clear && self.compute_one()?;
            self.send_unsent();
            busy |= self.feed_sent();
            busy |= !self.events.is_empty();
            let timeout = if busy { Some(Duration::ZERO) } else { self.wait_for(now) };
            let mut events = std::mem::take(&mut self.events);
            self.endpoint.turn(timeout, &mut events)?;
            for event in events.drain(..) {
                self.take(event);
            }
            self.events = events;
        }
        for active in &self.actives {
            active.fail(RequestError::Stopped("it was closed".into()));
        }
        // What was said last may be the names of pages to keep.
        self.endpoint.turn(Some(Duration::ZERO), &mut self.events)
    }

    /// Gives waiting requests a session of their own while there is room.
    fn admit(&mut self) {
        // Whatever finds no place here stays in the bounded queue, and its makers are told.
        let room = self.start.config.limits.queue_max as usize - self.waiting.len();
        let before = self.waiting.len();
        self.waiting.extend(self.start.incoming.try_iter().take(room));
        if self.waiting.len() > before {
            self.redial.hurry();
        }
        while self.actives.len() < self.start.config.limits.sessions_max as usize {
            let Some(job) = self.waiting.front() else { return };
            let rows_max = job.prepared.rows_max();
            let wanted = pages_for(rows_max as usize + PENDING_ROWS_MAX);
            let admitted = self.prefixes.admit(&mut self.pages, PrefixScope::ONE, &[], wanted);
            let Some((pages, _)) = admitted else { return };
            let mut job = self.waiting.pop_front().expect("looked at above");
            job.waits = None;
            let shared = &self.start.shared;
            let answer = Answer::new(&job.prepared, &shared.tokenizer, &shared.config);
            let draft = job.prepared.request.draft;
            let has_trained = self.start.trained.is_some();
            self.missing.tell(draft, has_trained);
            let looks_up = draft.looks_up(has_trained);
            let lookup = looks_up.then(|| job.prepared.prompt.iter().copied().collect());
            let trained = match &mut self.start.trained {
                Some(trained) if draft.asks_trained() => trained.open(rows_max),
                _ => None,
            };
            self.actives.push(Active {
                answer,
                meter: Meter::new(job.asked, job.prepared.prompt_n()),
                phase: Phase::Closed { not_before: None },
                wire_id: 0,
                tokens: job.prepared.prompt.clone(),
                names: None,
                passed: 0,
                names_max: 0,
                held: 0,
                chunk: Chunk::default(),
                sequence: Sequence::new(pages, rows_max),
                unsent: Unsent::default(),
                walk: Walk::default(),
                drafts: Drafts::default(),
                round_now: None,
                asking: Asking::default(),
                sizing: Sizing::default(),
                commit: 0,
                round: 0,
                lookup,
                trained,
                has_draft_rows: false,
                fed: 0,
                unfed: 0..0,
                deep: Vec::new(),
                held_back: Vec::new(),
                timed: None,
                sent_id: 0,
                told_id: 0,
                decided: 1..1,
                deadline: None,
                heard: shared.clock.now(),
                lost_n: 0,
                busy_ms: None,
                job,
            });
            shared.metrics().sessions = self.actives.len() as u64;
        }
    }

    fn drop_cancelled(&mut self) {
        let waiting = self.waiting.len();
        self.waiting.retain(|job| !job.cancelled.load(Ordering::Acquire));
        let mut cancelled = waiting - self.waiting.len();
        for index in (0..self.actives.len()).rev() {
            if self.actives[index].job.cancelled.load(Ordering::Acquire) {
                self.retire(index);
                cancelled += 1;
            }
        }
        if cancelled > 0 {
            self.start.shared.metrics().requests_cancelled += cancelled as u64;
        }
    }

    fn open_sessions(&mut self, now: Instant) {
        let Some(connection) = self.connection.filter(|_| self.connected) else { return };
        let facts = &self.start.facts;
        let layer = |layer: u32| u16::try_from(layer).expect("layers are few");
        for active in &mut self.actives {
            let Phase::Closed { not_before } = active.phase else { continue };
            if not_before.is_some_and(|time| now < time) {
                continue;
            }
            let namer = self.namer.as_ref();
            active.names_max = wire::pages_per_frame(self.peer_frame_max);
            active.names = namer.map(|namer| namer.names(self.peer_arithmetic, &active.tokens));
            let open = Message::Open(Open {
                entry_layer: layer(facts.layers.start),
                exit_layer: layer(facts.layers.end),
                codec: self.start.config.codec().id(),
                kv_type: KV_TYPE_F16,
                arithmetic_id: self.peer_arithmetic,
                rows_max: active.job.prepared.rows_max(),
                pages: active.pages_to_find(),
            });
            let bytes = open.encoded_len();
            let wire_id = self.next_wire_id;
            if self.endpoint.send_message(connection, wire_id, &open).is_ok() {
                self.next_wire_id = self.next_wire_id.checked_add(1).unwrap_or(1);
                active.wire_id = wire_id;
                active.note_message(bytes);
                active.phase = Phase::Opening;
            }
        }
    }

    /// How long a turn may wait: until the next deadline, or until something happens.
    fn wait_for(&self, now: Instant) -> Option<Duration> {
        if self.actives.iter().any(|active| active.unsent.sent < active.unsent.count) {
            return Some(Duration::from_millis(1));
        }
        let retries = self.actives.iter().filter_map(|active| match active.phase {
            Phase::Closed { not_before } => not_before,
            _ => None,
        });
        let deadlines = self.actives.iter().filter_map(|active| active.deadline);
        let silence_max = self.start.config.reconnect * SILENCE_FACTOR;
        let silences = self.actives.iter().map(|active| active.heard + silence_max);
        let redial = self.redial.at().filter(|_| self.connection.is_none());
        let pause = self.upload_pause().filter(|_| self.actives.iter().any(Active::wants_compute));
        retries
            .chain(deadlines)
            .chain(silences)
            .chain(redial)
            .min()
            .map(|time| time.saturating_duration_since(now))
            .into_iter()
            .chain(pause)
            .min()
    }

    fn take(&mut self, event: LinkEvent) {
        // One that this device has closed itself has nothing more to say.
        if event.connection().is_some_and(|connection| Some(connection) != self.connection) {
            return;
        }
        match event {
            LinkEvent::Up { connection, hello, resumed, .. } => {
                self.guard.look();
                if let Err(reason) = self.check_cloud(&hello) {
                    self.endpoint.close(connection, CloseCode::Incompatible, &reason);
                    self.refused = Some(reason);
                    return;
                }
                self.take_up(&hello, resumed);
            }
            LinkEvent::Down { reason, .. } => {
                if self.connected || self.reason != reason {
                    tracing::info!(cloud = %self.cloud, %reason, "the cloud is away; dialling on");
                }
                self.reason = reason;
                self.set_connected(false);
                // A round that an outage falls into says nothing about rounds.
                self.actives.iter_mut().for_each(|active| active.timed = None);
            }
            LinkEvent::Gone { error, .. } => {
                let is_final = self.refused.is_some() || error.is_final();
                let reason = self.refused.take().unwrap_or_else(|| error.to_string());
                if self.connected || self.reason != reason {
                    tracing::info!(cloud = %self.cloud, %reason, "the cloud is gone; dialling on");
                }
                self.reason = reason;
                self.set_connected(false);
                self.connection = None;
                self.redial.put_off(self.start.shared.clock.now());
                if !is_final {
                    self.actives.iter_mut().for_each(|active| active.restart(None));
                    return;
                }
                self.fail_for_cloud();
            }
            LinkEvent::Frame { frame, .. } => {
                self.redial.works();
                self.take_frame(&frame);
            }
            _ => {}
        }
    }

    fn take_frame(&mut self, frame: &Frame) {
        // Frames of sessions that this side has ended are late, not wrong.
        let own = |active: &Active| active.wire_id == frame.session && active.has_session();
        let Some(index) = self.actives.iter().position(own) else { return };
        if let Err(violation) = self.take_message(index, frame) {
            self.fail_by(index, &violation);
        }
    }

    fn take_message(&mut self, index: usize, frame: &Frame) -> Result<(), CloudViolation> {
        let kind = frame.kind;
        let now = self.start.shared.clock.now();
        self.actives[index].phase.expects(kind)?;
        match Message::decode(kind, &frame.body) {
            Ok(Message::Opened(opened)) => {
                self.actives[index].busy_ms = None;
                self.opened(index, opened.pages)
            }
            Ok(Message::Output(output)) => self.take_output(index, &output, frame.body.len()),
            Ok(Message::Computed(computed)) => {
                self.take_computed(index, &computed, frame.body.len())
            }
            Ok(Message::Busy(busy)) => {
                let wait = Duration::from_millis(u64::from(busy.retry_after_ms));
                let wait = wait.clamp(PAUSE_MIN, PAUSE_MAX);
                self.reason = "it has no room for another session".into();
                let patience = self.start.config.reconnect;
                let active = &mut self.actives[index];
                active.busy_ms = Some(u32::try_from(wait.as_millis()).expect("at most PAUSE_MAX"));
                active.start_deadline(now, patience);
                active.restart(Some(now + wait));
                Ok(())
            }
            Ok(Message::SessionError(error)) => match error.code {
                SessionErrorCode::NoSuchSession | SessionErrorCode::Evicted
                    if self.actives[index].may_return() =>
                {
                    let active = &mut self.actives[index];
                    active.restart(Some(now + pause(active.lost_n)));
                    Ok(())
                }
                SessionErrorCode::Resource if self.actives[index].may_lose_session() => {
                    tracing::warn!(text = %error.text, "the cloud lost the session");
                    self.actives[index].start_deadline(now, self.start.config.reconnect);
                    let active = &mut self.actives[index];
                    active.restart(Some(now + pause(active.lost_n)));
                    Ok(())
                }
                code => Err(CloudViolation::Ended { code, text: error.text.to_owned() }),
            },
            Ok(Message::Dropped(dropped)) => self.take_dropped(index, &dropped),
            Ok(Message::Ended | Message::Cancelled) => Ok(()),
            Ok(_) => Err(CloudViolation::Unexpected { kind }),
            Err(error) => Err(CloudViolation::Malformed { kind, error }),
        }
    }

    pub(super) fn finish(&mut self, index: usize, finish_reason: FinishReason) {
        let estimates = self.estimates();
        let active = &mut self.actives[index];
        let text = active.answer.finish();
        let timings = active.meter.timings();
        active.note_turn(&self.start.shared);
        self.keep_pages(index);
        let active = &mut self.actives[index];
        let mut sums = self.start.shared.metrics();
        sums.add(&active.meter);
        sums.estimates = estimates;
        drop(sums);
        let metrics = Box::new(Metrics {
            timings,
            token_ids: active.answer.tokens().to_vec(),
            text: active.answer.text().to_owned(),
            logits_blake3: active.answer.logits_blake3(),
        });
        let _ = active.job.events.send(Ok(Event::Done { text, finish_reason, metrics }));
        self.retire(index);
    }

    /// Ends a request with an error; all of them, if what is wrong is this device's backend.
    pub(super) fn fail(&mut self, index: usize, error: RequestError) {
        if matches!(error, RequestError::NotFinite { .. })
            && let Some(fault) = self.start.model.fault()
        {
            return self.fail_all(&fault);
        }
        self.start.shared.metrics().requests_failed += 1;
        self.actives[index].fail(error);
        self.retire(index);
    }

    /// Forgets a request, and tells the cloud if it has a session.
    pub(super) fn retire(&mut self, index: usize) {
        let active = self.actives.swap_remove(index);
        self.start.shared.metrics().sessions = self.actives.len() as u64;
        if let Some(connection) = self.connection
            && !matches!(active.phase, Phase::Closed { .. })
            && active.wire_id != 0
        {
            self.end_session(connection, &active);
        }
        self.pages.give_back(active.sequence.into_pages());
        if let (Some(trained), Some(session)) = (&mut self.start.trained, active.trained) {
            trained.close(session);
        }
    }
}
