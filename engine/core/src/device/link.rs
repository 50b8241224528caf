//! Input from the link: a cloud that is there or away, and frames of sessions.

use std::time::Instant;

use hat_transport::conn::Frame;
use hat_transport::frame::Kind;
use hat_transport::message::{CloseCode, Message, SessionError, SessionErrorCode};
use hat_transport::planted::Fault;

use super::budget::{LACKS_MAX, LOSSES_MAX, Limits, PAUSE_MIN, Waits};
use super::request::{Request, RequestId, Session};
use super::send::Leaving;
use super::violation::CloudViolation;
use super::{DeviceCore, Inbound};
use crate::error::{PeerEvent, RequestError};

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
                if let Err(reason) = self.way.check(&hello, &self.cx.facts) {
                    return self.close(now, CloseCode::Incompatible, reason, true);
                }
                self.way.tell(&self.config.cloud, None);
                self.cx.cloud = hello;
                let since = self.way.set_connected(now);
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
                self.way.put_off(now);
                if is_final {
                    let error = self.peer(PeerEvent::Refuses, self.way.reason.clone());
                    self.fail_each(&error);
                }
                self.lose_sessions(now);
                self.leaving.clear();
            }
            Inbound::Frame(_) => {}
        }
    }

    fn set_away(&mut self, now: Instant, reason: String) {
        self.way.tell(&self.config.cloud, Some(&reason));
        self.way.set_away(now, reason);
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
        let random = &mut *self.way.random;
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        request.session.expects(kind)?;
        let message = Message::decode(kind, &frame.body)
            .map_err(|error| CloudViolation::Malformed { kind, error })?;
        match message {
            Message::Opened(opened) => {
                request.opened(opened.pages, &mut self.pages, self.drafter.as_mut())?;
            }
            Message::Output(output) => {
                request.handle_output(now, &output, bytes, &mut self.cx)?;
                if request.has_head() {
                    self.work.heading.push_back(id);
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

    /// Ends the connection, if there is one, and with it all sessions. Waiting does not help if
    /// `is_final`.
    pub(super) fn close(&mut self, now: Instant, code: CloseCode, reason: String, is_final: bool) {
        if self.way.dial_at.is_none() {
            self.way.close = Some((code, reason.clone()));
            self.take(now, Inbound::Gone { reason, is_final });
        }
    }

    /// Sessions are over since `then`: each is opened again, within reason.
    fn lose_sessions(&mut self, then: Instant) {
        let Self { requests, way, .. } = self;
        let mut over: Vec<(RequestId, u32)> = Vec::new(); // empty as a rule
        for (id, request) in requests {
            if request.session.wire_id().is_none() {
                continue;
            }
            let (why, random) = (way.reason.clone(), &mut *way.random);
            match request.budget.lost(then, why, LOSSES_MAX, random) {
                Some(at) => request.restart(Some(at)),
                None => over.push((*id, request.budget.losses)),
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
        let Self { requests, way, config, cx, .. } = self;
        let may_upload = cx.learned.upload_pause().is_none();
        for request in requests.values_mut() {
            let limits = way.limits(request.asked, config.reconnect);
            let waits = request.waits(way.connected, may_upload);
            request.budget.charge(now, waits, limits);
        }
    }

    /// The wait of a request, and its limits.
    fn wait_of(&self, request: &Request) -> (Waits, Limits) {
        let limits = self.way.limits(request.asked, self.config.reconnect);
        let may_upload = self.cx.learned.upload_pause().is_none();
        (request.waits(self.way.connected, may_upload), limits)
    }

    /// Error of a request that has waited in vain.
    fn overdue(&self, request: &Request, over: Waits, limits: Limits) -> RequestError {
        let cloud = &self.config.cloud;
        if let Some(pause) = request.budget.refused.filter(|_| self.way.connected) {
            return RequestError::Busy {
                reason: format!("cloud {cloud} has no room for another session"),
                retry_after_ms: u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
            };
        }
        let (event, reason) = match (over, &request.budget.setback) {
            (Waits::Cloud, _) => {
                let (reason, waited) = (&self.way.reason, limits.cloud.as_secs_f32());
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
                Session::Closed { not_before } if self.way.connected => {
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
