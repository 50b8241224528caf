//! The device without IO: what happened goes in by `handle_*`, what is to be done comes out by
//! `poll_*`. Link, threads, clock and model are its owner's.

mod budget;
mod context;
mod feed;
mod link;
mod outgoing;
mod prompt;
mod request;
mod select;
mod send;
mod session;
mod tree;
mod verifier;
mod verify;
mod violation;
mod way;
mod work;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::time::{Duration, Instant};

use hat_plan::BackendFault;
use hat_transport::codec::Codec;
use hat_transport::conn::{ConnectionId, Frame, FrameSink, Traffic};
use hat_transport::message::{CloseCode, Hello, KV_F16, Message, Open};
use hat_transport::planted::Planted;
use hat_transport::random::Random;

use self::budget::Budget;
use self::context::Common;
use self::feed::Drafting;
pub use self::request::RequestId;
use self::request::{Path, Request, Session};
use self::send::Leaving;
pub use self::way::LinkCommand;
use self::way::Way;
use self::work::Computations;
pub use self::work::{DeviceWork, DraftWork, Verdict};
use crate::answer::{Answer, Prepared};
use crate::chunk::ChunkPolicy;
use crate::draft::drafter::Drafter;
use crate::draft::{DraftMode, DraftPolicy, Lookup};
use crate::error::RequestError;
use crate::estimate::{Estimates, Estimator};
use crate::metrics::Meter;
use crate::page::pages_for;
pub use crate::prefix::PageNamer;
use crate::prefix::{PageStore, PrefixScope};
use crate::request::{Event, FinishReason, Metrics};
use crate::sequence::{PENDING_ROWS_MAX, Sequence};
use crate::wire::{self, BundleFacts};

/// News of one request.
pub enum RequestEvent {
    /// It runs: until then it waited.
    Runs,
    /// Something to report.
    Said(Event),
    /// It has its answer.
    Done(Box<Done>),
    /// It ends without one.
    Failed(RequestError),
}

/// A request with its answer.
pub struct Done {
    /// The request.
    pub prepared: Prepared,
    /// Text that was held back until the end.
    pub text: String,
    /// Reason of its end.
    pub finish_reason: FinishReason,
    /// The figures of this request.
    pub metrics: Metrics,
    /// The same, for sums over requests.
    pub meter: Meter,
    /// Estimates of link and cloud.
    pub estimates: Estimates,
}

/// Something that came over the link.
pub enum Inbound {
    /// The link is up, to a cloud that this device can work with; sessions are there still if it is
    /// `resumed`.
    Up {
        /// The HELLO of the cloud.
        hello: Hello,
        /// True if sessions are there still.
        resumed: bool,
    },
    /// The link is down; it comes back, or is gone.
    Down {
        /// The reason, for people.
        reason: String,
    },
    /// The connection is over, and with it all sessions. Waiting does not help if `is_final`.
    Gone {
        /// The reason, for people.
        reason: String,
        /// True if the cloud will not be another one later.
        is_final: bool,
    },
    /// A frame of a session.
    Frame(Frame),
}

/// Settings of a device.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Requests that run at once.
    pub sessions_max: usize,
    /// Positions of all requests together.
    pub kv_rows_max: usize,
    /// Rows of one step of the device's layers.
    pub step_rows_max: u32,
    /// Rule by which prompts are cut.
    pub chunks: ChunkPolicy,
    /// The codec of rows on the wire.
    pub codec: Codec,
    /// Time for which a request waits for a cloud that is away, or has no room.
    pub reconnect: Duration,
    /// The cloud's address, for people.
    pub cloud: String,
}

/// A request that has no pages so far.
struct Waiting {
    id: RequestId,
    prepared: Prepared,
    answer: Answer,
    asked: Instant,
}

/// A device: requests, their rows, and what is known of the cloud. What its owner calls stands
/// here; what follows from input in `link`, and from computations in `work`.
pub struct DeviceCore {
    config: DeviceConfig,
    /// Requests that run, by age.
    requests: BTreeMap<RequestId, Request>,
    waiting: VecDeque<Waiting>,
    next_request: RequestId,
    next_wire_id: u32,
    /// The request whose prompt is sent first.
    first_to_send: RequestId,
    /// Pages of the device's own layers.
    pages: PageStore,
    /// Names pages; `None` if all rows go up.
    namer: Option<PageNamer>,
    /// The trained drafter; it computes only within [`work::DeviceWork::run`].
    pub drafter: Option<Box<dyn Drafter>>,
    cx: Common,
    way: Way,
    work: Computations,
    /// Input from the link that is not handled yet, in order.
    inbox: VecDeque<Inbound>,
    leaving: VecDeque<Leaving>,
    /// True if a warning about a missing drafter was logged.
    missed_drafter: bool,
}

impl DeviceCore {
    /// A device that has heard of no cloud so far.
    pub fn new(
        now: Instant,
        config: DeviceConfig,
        bundle: &BundleFacts,
        vocab_size: usize,
        namer: Option<PageNamer>,
        drafter: Option<Box<dyn Drafter>>,
    ) -> Self {
        Self {
            requests: BTreeMap::new(),
            waiting: VecDeque::new(),
            next_request: 1,
            next_wire_id: 1,
            first_to_send: 0,
            pages: PageStore::new(pages_for(config.kv_rows_max + PENDING_ROWS_MAX)),
            namer,
            drafter,
            cx: Common::new(&config, bundle, vocab_size),
            way: Way::new(now),
            work: Computations::default(),
            inbox: VecDeque::new(),
            leaving: VecDeque::new(),
            missed_drafter: false,
            config,
        }
    }

    /// The core sees to the way to its cloud from now on: [`DeviceCore::poll_link`] says when to
    /// dial, and a cloud whose HELLO does not go with this one, or whose arithmetic is not the one
    /// that is wanted, is closed. `random` draws the pauses between attempts.
    #[must_use]
    pub fn with_link(
        mut self,
        now: Instant,
        hello: Hello,
        cloud_arithmetic: Option<u32>,
        random: Box<dyn Random>,
    ) -> Self {
        self.way.own = Some((hello, cloud_arithmetic));
        self.way.dial_at = Some(now);
        self.way.random = random;
        self
    }

    /// Does this wrong from now on, in tests.
    pub fn plant(&mut self, planted: Planted) {
        self.cx.planted = planted;
    }

    /// Drafts by another policy than the engine's own, and computes chunks of prompts as a whole
    /// before any of their rows leave, if `whole_chunks`: for comparisons.
    pub fn work_by(&mut self, drafts: DraftPolicy, whole_chunks: bool) {
        self.cx.policy = drafts;
        self.cx.facts.whole_chunks = whole_chunks;
    }

    /// Takes a request. It runs as soon as there is room.
    pub fn submit(&mut self, asked: Instant, prepared: Prepared, answer: Answer) -> RequestId {
        self.way.hurry(asked);
        let id = self.next_request;
        self.next_request += 1;
        self.waiting.push_back(Waiting { id, prepared, answer, asked });
        id
    }

    /// Requests that wait for room.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// True if the cloud is connected.
    pub fn is_connected(&self) -> bool {
        self.way.connected
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        self.requests.len()
    }

    /// Pages that a request can have now, those that are kept for others included.
    pub fn pages_free(&self) -> usize {
        self.pages.pool.available()
    }

    /// Nobody wants a request's answer any more. No computation may be out.
    pub fn cancel(&mut self, id: RequestId) {
        debug_assert!(self.work.out.is_none(), "a request is cancelled under its computation");
        self.waiting.retain(|waiting| waiting.id != id);
        self.retire(id, false);
    }

    /// Something came over the link. It is looked at when nothing before it has to be computed.
    pub fn handle_inbound(&mut self, inbound: Inbound) {
        self.inbox.push_back(inbound);
    }

    /// The link's counters now; `None` without a connection.
    pub fn handle_traffic(&mut self, traffic: Option<Traffic>) {
        self.cx.learned.traffic = traffic;
    }

    /// Other layers compute from now on, in another arithmetic, and maybe another drafter.
    pub fn handle_model(&mut self, arithmetic_id: u32, drafter: Option<Box<dyn Drafter>>) {
        if let Some(namer) = &mut self.namer {
            namer.arithmetic_id = arithmetic_id;
        }
        // Times of one processor say nothing of another's.
        self.cx.learned.estimator = Estimator::default();
        self.drafter = drafter;
    }

    /// The layers that compute are lost. The link ends, since HELLO names this device's arithmetic,
    /// and so no session is left in the cloud.
    pub fn leave_link(&mut self, now: Instant) {
        let reason = "the device's backend is lost".to_owned();
        self.inbox.clear();
        self.close(now, CloseCode::Internal, reason, false);
    }

    /// The cloud is dialled again, with this HELLO.
    pub fn dial_again(&mut self, now: Instant, hello: Hello) {
        self.way.own = self.way.own.map(|(_, wanted)| (hello, wanted));
        self.way.hurry(now);
    }

    /// Next command for the link.
    pub fn poll_link(&mut self, now: Instant) -> Option<LinkCommand> {
        if let Some((code, reason)) = self.way.close.take() {
            return Some(LinkCommand::Close { code, reason });
        }
        self.way.dial_at.take_if(|at| *at <= now).map(|_| LinkCommand::Dial)
    }

    /// News for those who asked, in order.
    pub fn poll_event(&mut self) -> Option<(RequestId, RequestEvent)> {
        self.cx.events.pop_front()
    }

    /// Time that the owner may wait: until the next deadline, or until something happens (`None`).
    pub fn poll_timeout(&self, now: Instant) -> Option<Duration> {
        if self.is_at_work() || !self.inbox.is_empty() || !self.cx.events.is_empty() {
            return Some(Duration::ZERO);
        }
        let mut open = self.requests.values().filter_map(|request| request.session.open());
        if open.any(|open| open.outgoing.has_released()) || !self.leaving.is_empty() {
            return Some(Duration::from_millis(1));
        }
        let pause = self.cx.learned.upload_pause();
        let pause = pause.filter(|_| self.requests.values().any(Request::wants_compute));
        let until = self.next_time(now).map(|time| time.saturating_duration_since(now));
        until.into_iter().chain(pause).min()
    }

    /// Writes frames of all that may leave into a connection, as far as it takes them: ends of
    /// sessions, rows that somebody waits for, and rows of prompts, of which another one is the
    /// first each time. `opens` says whether sessions are opened, too.
    pub fn poll_transmit(
        &mut self,
        now: Instant,
        to: ConnectionId,
        sink: &mut dyn FrameSink,
        opens: bool,
    ) {
        while let Some(leaving) = self.leaving.pop_front() {
            leaving.send(to, sink);
        }
        if !self.way.connected {
            return;
        }
        if opens {
            self.open_sessions(now, to, sink);
        }
        let Self { requests, cx, .. } = self;
        for request in requests.values_mut().filter(|request| request.is_urgent()) {
            request.send_frames(now, to, sink, cx);
        }
        let after = requests.range(self.first_to_send + 1..).next();
        let next = after.or_else(|| requests.iter().next()).map(|(id, _)| *id);
        self.first_to_send = next.unwrap_or_default();
        let first = self.first_to_send;
        let ranges = [
            (Bound::Included(first), Bound::Unbounded),
            (Bound::Unbounded, Bound::Excluded(first)),
        ];
        for range in ranges {
            for (_, request) in requests.range_mut(range) {
                if !request.is_urgent() && !request.send_frames(now, to, sink, cx) {
                    return;
                }
            }
        }
    }

    /// Asks for the sessions that are to be opened by now.
    fn open_sessions(&mut self, now: Instant, to: ConnectionId, sink: &mut dyn FrameSink) {
        let (cloud, (first, count)) = (self.cx.cloud, self.cx.facts.layers);
        let layer = |layer: u32| u16::try_from(layer).expect("layers are few");
        for request in self.requests.values_mut() {
            let Session::Closed { not_before } = request.session else { continue };
            if not_before.is_some_and(|time| now < time) {
                continue;
            }
            let path = &mut request.path;
            path.names_max = wire::pages_per_frame(wire::frame_bytes_max(&cloud));
            let namer = self.namer.as_ref();
            let rows_max = request.prepared.rows_max();
            path.names =
                namer.map(|namer| namer.names(cloud.arithmetic_id, &path.tokens, rows_max));
            let open = Message::Open(Open {
                entry_layer: layer(first),
                exit_layer: layer(first + count),
                codec: self.cx.facts.codec.id(),
                kv_type: KV_F16,
                arithmetic_id: cloud.arithmetic_id,
                rows_max,
                pages: path.pages_to_find(),
            });
            let bytes = open.encoded_len();
            let wire_id = self.next_wire_id;
            if sink.send_message(to, wire_id, &open).is_ok() {
                self.next_wire_id = self.next_wire_id.checked_add(1).unwrap_or(1);
                request.budget.opens();
                request.note_message(bytes);
                request.session = Session::Opening { wire_id };
            }
        }
    }

    /// Gives waiting requests pages while there is room.
    fn admit(&mut self, now: Instant) {
        while self.requests.len() < self.config.sessions_max {
            let Some(waiting) = self.waiting.front() else { return };
            let rows_max = waiting.prepared.rows_max();
            let wanted = pages_for(rows_max as usize + PENDING_ROWS_MAX);
            let admitted = self.pages.admit(PrefixScope::ONE, &[], wanted);
            let Some((pages, _)) = admitted else { return };
            let kv = Sequence::new(pages, rows_max);
            let waiting = self.waiting.pop_front().expect("looked at above");
            let id = waiting.id;
            let request = self.begin(now, waiting, kv);
            self.requests.insert(id, request);
            self.cx.tell(id, RequestEvent::Runs);
        }
    }

    /// A request that runs from now on, on reserved pages.
    fn begin(&mut self, now: Instant, waiting: Waiting, kv: Sequence) -> Request {
        let Waiting { id, prepared, answer, asked } = waiting;
        let draft = prepared.request.draft;
        self.tell_missing(draft);
        let has_drafter = self.drafter.is_some();
        // All that grows with the answer has its room now: a round allocates nothing.
        let rows_max = kv.rows_max() as usize;
        let mut tokens = Vec::with_capacity(rows_max);
        tokens.extend_from_slice(&prepared.prompt);
        let lookup = draft.looks_up(has_drafter).then(|| {
            let mut lookup = Lookup::with_room(rows_max);
            tokens.iter().for_each(|token| lookup.push(*token));
            lookup
        });
        let drafter = self.drafter.as_mut().filter(|_| draft.asks_trained());
        Request {
            id,
            asked,
            answer,
            meter: Meter::new(asked, prepared.prompt_n()),
            path: Path { tokens, names: None, names_max: 0, lookup },
            drafting: Drafting::new(drafter.and_then(|drafter| drafter.open(kv.rows_max()))),
            kv,
            budget: Budget::new(now),
            passed: 0,
            round: 0,
            session: Session::Closed { not_before: None },
            prepared,
        }
    }

    fn tell_missing(&mut self, draft: DraftMode) {
        let mode = draft.name();
        let is_missing = draft.wants_trained() && self.drafter.is_none();
        if is_missing && !std::mem::replace(&mut self.missed_drafter, true) {
            tracing::warn!(
                mode,
                "no trained drafter for this model and split: lookup drafts alone"
            );
        }
    }

    /// A request has its answer.
    fn finish(&mut self, id: RequestId, finish_reason: FinishReason) {
        if let Some(request) = self.requests.get(&id) {
            request.keep_pages(&mut self.pages, self.drafter.as_mut());
        }
        let Common { facts, cloud, learned, .. } = &self.cx;
        let estimates =
            learned.estimator.estimates(facts.row_bytes(), facts.layers, cloud.stages.into());
        let Some(request) = self.retire(id, true) else { return };
        let Request { mut answer, meter, prepared, .. } = request;
        let text = answer.finish();
        let metrics = answer.metrics(&meter);
        let done = Done { prepared, text, finish_reason, metrics, meter, estimates };
        self.cx.tell(id, RequestEvent::Done(Box::new(done)));
    }

    /// Ends a request with an error.
    fn fail(&mut self, id: RequestId, error: RequestError) {
        if self.retire(id, false).is_some() {
            self.cx.tell(id, RequestEvent::Failed(error));
        }
    }

    /// Ends all requests that run.
    pub fn fail_each(&mut self, error: &RequestError) {
        while let Some(id) = self.requests.keys().next().copied() {
            self.fail(id, error.clone());
        }
    }

    /// The backend did not compute what it was asked to, and its KV store means nothing now.
    fn fail_all(&mut self, fault: &BackendFault) {
        tracing::error!(%fault, lasts = fault.lasts, "rows were not computed");
        self.fail_each(&RequestError::Backend(fault.clone()));
        self.cx.moves.clear();
        self.pages.clear();
        if let Some(drafter) = &mut self.drafter {
            drafter.forget();
        }
    }

    /// The trained drafter's backend did not compute: what it keeps and what it has just said mean
    /// nothing. Requests that run go on without it; if the fault lasts, so do all others.
    fn draft_without(&mut self, fault: &BackendFault) {
        tracing::warn!(%fault, lasts = fault.lasts, "requests go on without the trained drafter");
        let Some(drafter) = &mut self.drafter else { return };
        for request in self.requests.values_mut() {
            request.drafting.has_rows = false;
            if let Some(session) = request.drafting.session.take() {
                drafter.close(session);
            }
        }
        drafter.forget();
        if fault.lasts {
            self.drafter = None;
        }
    }

    /// Forgets a request; the cloud is told if it has a session. `is_whole` if it has its answer.
    fn retire(&mut self, id: RequestId, is_whole: bool) -> Option<Request> {
        let mut request = self.requests.remove(&id)?;
        self.leaving.extend(Leaving::of(&mut request, is_whole));
        if let (Some(drafter), Some(session)) = (&mut self.drafter, request.drafting.session) {
            drafter.close(session);
        }
        let kv = std::mem::replace(&mut request.kv, Sequence::new(Vec::new(), 0));
        self.pages.pool.give_back(kv.into_pages());
        Some(request)
    }
}
