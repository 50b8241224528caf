//! Input from the link: a cloud that is there or away, and frames of sessions.

use std::time::{Duration, Instant};

use hat_transport::conn::Frame;
use hat_transport::frame::Kind;
use hat_transport::message::{CloseCode, Message, SessionError, SessionErrorCode};
use hat_transport::planted::Fault;
use hat_transport::random::{Random, SeededRandom};

use super::budget::{LACKS_MAX, LOSSES_MAX, Limits, PAUSE_MIN, Waits};
use super::request::{Request, RequestId, Session};
use super::send::Leaving;
use super::violation::CloudViolation;
use super::{DeviceCore, Inbound};
use crate::error::{PeerEvent, RequestError};

/// Length of an outage after which requests that come are not kept waiting for its end.
const OUTAGE_KNOWN: Duration = Duration::from_secs(2);
/// Time of such a request: an attempt to reach the cloud ends within it.
const KNOWN_WAIT: Duration = Duration::from_secs(1);

/// State of the connection to the cloud.
pub(super) struct Cloud {
    pub(super) connected: bool,
    /// Begin of the outage at hand; `None` while the cloud is connected.
    down_since: Option<Instant>,
    /// Reason that the cloud is away, for people.
    reason: String,
    /// Source of the pauses between attempts.
    pub(super) random: Box<dyn Random>,
}

impl Cloud {
    /// A cloud that has not been dialled.
    pub(super) fn new(now: Instant) -> Self {
        let (reason, random) = ("not connected yet".into(), Box::new(SeededRandom::new(0)));
        Self { connected: false, down_since: Some(now), reason, random }
    }

    /// Begin of the outage that ends or begins now.
    fn set_connected(&mut self, now: Instant, connected: bool) -> Instant {
        self.connected = connected;
        let since = self.down_since.unwrap_or(now);
        self.down_since = if connected { None } else { Some(since) };
        since
    }

    /// The time without news of a request that came at `asked`.
    fn limits(&self, asked: Instant, reconnect: Duration) -> Limits {
        let limits = Limits::new(reconnect);
        match self.down_since.is_some_and(|began| asked > began + OUTAGE_KNOWN) {
            true => Limits { cloud: reconnect.min(KNOWN_WAIT), ..limits },
            false => limits,
        }
    }
}

impl DeviceCore {
    /// Takes what came over the link.
    pub(super) fn take(&mut self, now: Instant, inbound: Inbound) {
        match inbound {
            Inbound::Frame(frame) => return self.take_frame(now, &frame),
            // The wait so far was for what ends here.
            _ => self.charge(now),
        }
        match inbound {
            Inbound::Up { hello, resumed } => {
                if let Err(reason) = self.check_cloud(&hello) {
                    return self.close(now, CloseCode::Incompatible, reason, true);
                }
                self.tell_link(None);
                self.cx.cloud = (&hello).into();
                let since = self.cloud.set_connected(now, true);
                if !resumed {
                    self.lose_sessions(since);
                }
            }
            Inbound::Down { reason } => {
                self.set_away(now, reason);
                // A round that an outage falls into says nothing about rounds.
                let open = self.requests.values_mut().filter_map(|it| it.session.open_mut());
                open.for_each(|open| open.timed = None);
            }
            Inbound::Gone { reason, is_final } => {
                self.set_away(now, reason);
                self.way.put_off(now, &mut *self.cloud.random);
                if is_final {
                    let error = self.peer(PeerEvent::Refuses, self.cloud.reason.clone());
                    self.fail_each(&error);
                }
                self.lose_sessions(now);
                self.leaving.clear();
            }
            Inbound::Frame(_) => {}
        }
    }

    fn set_away(&mut self, now: Instant, reason: String) {
        self.tell_link(Some(&reason));
        self.cloud.reason = reason;
        self.cloud.set_connected(now, false);
    }

    fn take_frame(&mut self, now: Instant, frame: &Frame) {
        self.way.works();
        // Frames of sessions that this side has ended are late, not wrong.
        let Some(id) = self.owner(frame) else { return };
        if let Err(violation) = self.take_message(now, id, frame) {
            self.fail_by(id, &violation);
        }
    }

    /// The request whose session a frame is of.
    pub(super) fn owner(&self, frame: &Frame) -> Option<RequestId> {
        let own = |(id, request): (&RequestId, &Request)| {
            (request.session.wire_id() == Some(frame.session)).then_some(*id)
        };
        self.requests.iter().find_map(own)
    }

    /// Takes a frame of a request's session: it is decoded here, and nowhere else.
    fn take_message(
        &mut self,
        now: Instant,
        id: RequestId,
        frame: &Frame,
    ) -> Result<(), CloudViolation> {
        let (kind, bytes) = (frame.kind, frame.body.len());
        if matches!(kind, Kind::Opened | Kind::Busy) {
            self.charge(now);
        }
        let random = &mut *self.cloud.random;
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        request.session.expects(kind)?;
        let message = Message::decode(kind, &frame.body)
            .map_err(|error| CloudViolation::Malformed { kind, error })?;
        match message {
            Message::Opened(opened) => {
                request.opened(opened.pages)?;
                self.begin_behind_pages(id, opened.pages);
            }
            Message::Output(output) => {
                request.handle_output(now, &output, bytes, &mut self.cx)?;
                if request.has_head() {
                    self.work.heads(id);
                }
            }
            Message::Computed(computed) => {
                request.handle_computed(now, &computed, bytes, &mut self.cx)?;
            }
            Message::Dropped(dropped) => request.handle_dropped(&dropped)?,
            Message::Busy(busy) => {
                let at = request.budget.busy(now, busy.retry_after_ms, random);
                request.restart(Some(at));
            }
            Message::SessionError(SessionError {
                code: SessionErrorCode::Evicted | SessionErrorCode::NoSuchSession,
                ..
            }) if self.cx.planted.is(Fault::IgnoredEviction) => {}
            Message::SessionError(SessionError { code, text }) => {
                let ended = CloudViolation::Ended { code, text: text.to_owned() };
                let most = match code {
                    SessionErrorCode::NoSuchSession | SessionErrorCode::Evicted => LOSSES_MAX,
                    SessionErrorCode::Resource => LACKS_MAX,
                    _ => return Err(ended),
                };
                let at = request.budget.lost(now, ended.to_string(), most, random).ok_or(ended)?;
                if code == SessionErrorCode::Resource {
                    tracing::warn!(%text, "the cloud lost the session");
                }
                // Rows that have not left are of no use to anyone.
                self.leaving.push_back(Leaving::Lost { wire_id: frame.session });
                request.restart(Some(at));
            }
            Message::Ended | Message::Cancelled => {}
            _ => return Err(CloudViolation::Unexpected { kind }),
        }
        Ok(())
    }

    /// Sessions are over since `then`: each is opened again, within reason.
    fn lose_sessions(&mut self, then: Instant) {
        let Self { requests, cloud, .. } = self;
        let mut over: Vec<(RequestId, u32)> = Vec::new(); // empty as a rule
        for (id, request) in requests {
            if request.session.wire_id().is_none() {
                continue;
            }
            let (why, random) = (cloud.reason.clone(), &mut *cloud.random);
            match request.budget.lost(then, why, LOSSES_MAX, random) {
                Some(at) => request.restart(Some(at)),
                None => over.push((*id, request.budget.losses())),
            }
        }
        for (id, times) in over {
            self.fail_by(id, &CloudViolation::Forgets { times });
        }
    }

    /// Fails requests that have waited as long as they may, and lets others run. `cached` says how
    /// many frames of a session are queued, or sent and not acknowledged.
    pub fn handle_timeout<N: Into<usize>>(&mut self, now: Instant, cached: &dyn Fn(u32) -> N) {
        self.admit(now);
        for request in self.requests.values_mut() {
            if let Some(wire_id) = request.session.wire_id() {
                request.budget.cached(now, cached(wire_id).into());
            }
        }
        self.charge(now);
        let overdue = self.requests.iter().filter_map(|(id, request)| {
            let (waits, limits) = self.wait_of(request);
            let over = request.budget.over(waits, limits)?;
            Some((*id, self.overdue(request, over, limits)))
        });
        let overdue: Vec<(RequestId, RequestError)> = overdue.collect(); // empty as a rule
        for (id, error) in overdue {
            self.fail(id, error);
        }
    }

    /// Charges the time since the last look to all requests.
    fn charge(&mut self, now: Instant) {
        let Self { requests, cloud, config, cx, .. } = self;
        let may_upload = cx.learned.upload_pause().is_none();
        for request in requests.values_mut() {
            let limits = cloud.limits(request.asked, config.reconnect);
            let waits = request.waits(cloud.connected, may_upload);
            request.budget.charge(now, waits, limits);
        }
    }

    /// The wait of a request, and its limits.
    fn wait_of(&self, request: &Request) -> (Waits, Limits) {
        let limits = self.cloud.limits(request.asked, self.config.reconnect);
        let may_upload = self.cx.learned.upload_pause().is_none();
        (request.waits(self.cloud.connected, may_upload), limits)
    }

    /// Error of a request that has waited in vain.
    fn overdue(&self, request: &Request, over: Waits, limits: Limits) -> RequestError {
        let cloud = &self.config.cloud;
        if let Some(pause) = request.budget.refused().filter(|_| self.cloud.connected) {
            return RequestError::Busy {
                reason: format!("cloud {cloud} has no room for another session"),
                retry_after_ms: u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
            };
        }
        let (event, reason) = match (over, request.budget.setback()) {
            (Waits::Cloud, _) => {
                let (reason, waited) = (&self.cloud.reason, limits.cloud.as_secs_f32());
                let remedy = "is `hat-engine cloud` running there?";
                (PeerEvent::Away, format!("{reason} (waited {waited:.0} s); {remedy}"))
            }
            (_, Some(setback)) => {
                let waited = limits.all.as_secs_f32();
                (PeerEvent::Loses, format!("{setback} (no token in {waited:.0} s of trying)"))
            }
            (_, None) => {
                let violation = CloudViolation::Silent { waited: limits.all };
                (violation.event(), violation.to_string())
            }
        };
        self.peer(event, reason)
    }

    /// Time at which a request may be overdue, or its session may be opened.
    pub(super) fn next_time(&self, now: Instant) -> Option<Instant> {
        let times = self.requests.values().flat_map(|request| {
            let retry = match request.session {
                Session::Closed { not_before } if self.cloud.connected => {
                    not_before.filter(|at| *at > now).or(Some(now + PAUSE_MIN))
                }
                _ => None,
            };
            let (waits, limits) = self.wait_of(request);
            [retry, request.budget.next_look(waits, limits)]
        });
        times.flatten().chain(self.way.next_time(now)).min()
    }

    /// Ends a request whose cloud does not keep to the protocol.
    fn fail_by(&mut self, id: RequestId, violation: &CloudViolation) {
        let error = self.peer(violation.event(), violation.to_string());
        self.fail(id, error);
    }

    fn peer(&self, event: PeerEvent, reason: String) -> RequestError {
        RequestError::Peer { peer: self.config.cloud.clone(), event, reason }
    }
}
