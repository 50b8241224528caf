//! What comes over the link: a cloud that is there or away, and frames of sessions.

use std::time::{Duration, Instant};

use hat_transport::conn::Frame;
use hat_transport::message::{Message, SessionError, SessionErrorCode};
use hat_transport::planted::Fault;

use super::patience::Patience;
use super::request::{Request, RequestId, Session};
use super::send::Leaving;
use super::violation::CloudViolation;
use super::{DeviceCore, Inbound};
use crate::error::RequestError;

/// Length of an outage after which requests that come are not kept waiting for its end.
const OUTAGE_KNOWN: Duration = Duration::from_secs(2);
/// Patience of such a request: an attempt to reach the cloud ends within it.
const PATIENCE_KNOWN: Duration = Duration::from_secs(1);
/// A connected cloud may leave a request without any answer for so many times the patience with
/// one that is away.
const SILENCE_FACTOR: u32 = 4;

/// Whether the cloud is there.
pub(super) struct Cloud {
    pub(super) connected: bool,
    /// Begin of the outage at hand; `None` while the cloud is connected.
    down_since: Option<Instant>,
    /// Bytes that the cloud had acknowledged at the last look.
    acked_bytes: u64,
    /// Why the cloud is away, for people.
    reason: String,
}

impl Cloud {
    /// A cloud that has not been dialled.
    pub(super) fn new(now: Instant) -> Self {
        let reason = "not connected yet".into();
        Self { connected: false, down_since: Some(now), acked_bytes: 0, reason }
    }

    fn set_connected(&mut self, now: Instant, connected: bool) {
        self.connected = connected;
        self.down_since = if connected { None } else { self.down_since.or(Some(now)) };
    }

    /// How long a request that came at `asked` bears with a cloud that is away.
    fn patience(&self, asked: Instant, reconnect: Duration) -> Duration {
        let began = self.down_since.filter(|_| !self.connected);
        match began.is_some_and(|began| asked > began + OUTAGE_KNOWN) {
            true => reconnect.min(PATIENCE_KNOWN),
            false => reconnect,
        }
    }
}

impl DeviceCore {
    /// Takes what came over the link.
    pub(super) fn take(&mut self, now: Instant, inbound: Inbound) {
        match inbound {
            Inbound::Up { hello, resumed } => {
                self.cx.cloud = (&hello).into();
                self.cloud.set_connected(now, true);
                if !resumed {
                    self.begin_anew(now);
                }
                self.requests.values_mut().for_each(|request| request.patience.deadline = None);
            }
            Inbound::Down { reason } => {
                self.cloud.reason = reason;
                self.cloud.set_connected(now, false);
                // A round that an outage falls into says nothing about rounds.
                let open = self.requests.values_mut().filter_map(|it| it.session.open_mut());
                open.for_each(|open| open.timed = None);
            }
            Inbound::Gone { reason, is_final } => {
                self.cloud.reason = reason;
                self.cloud.set_connected(now, false);
                self.leaving.clear();
                if is_final {
                    let error = self.peer(self.cloud.reason.clone());
                    self.fail_each(&error);
                }
                self.requests.values_mut().for_each(|request| request.restart(None));
            }
            Inbound::Frame(frame) => self.take_frame(now, &frame),
        }
    }

    fn take_frame(&mut self, now: Instant, frame: &Frame) {
        // Frames of sessions that this side has ended are late, not wrong.
        let own = |(id, request): (&RequestId, &Request)| {
            (request.session.wire_id() == Some(frame.session)).then_some(*id)
        };
        let Some(id) = self.requests.iter().find_map(own) else { return };
        if let Err(violation) = self.take_message(now, id, frame) {
            self.fail_by(id, &violation);
        }
    }

    /// Takes a frame of a request's session: it is decoded here, and nowhere else.
    fn take_message(
        &mut self,
        now: Instant,
        id: RequestId,
        frame: &Frame,
    ) -> Result<(), CloudViolation> {
        let (kind, bytes) = (frame.kind, frame.body.len());
        let reconnect = self.config.reconnect;
        let Some(request) = self.requests.get_mut(&id) else { return Ok(()) };
        request.session.expects(kind)?;
        let message = Message::decode(kind, &frame.body)
            .map_err(|error| CloudViolation::Malformed { kind, error })?;
        match message {
            Message::Opened(opened) => {
                request.opened(opened.pages, now)?;
                self.begin_behind_pages(id, opened.pages);
            }
            Message::Output(output) => {
                self.work.tail = request.handle_output(now, &output, bytes, &mut self.cx)?;
                self.work.heading = Some(id);
            }
            Message::Computed(computed) => {
                request.handle_computed(now, &computed, bytes, &mut self.cx)?;
            }
            Message::Dropped(dropped) => request.handle_dropped(&dropped)?,
            Message::Busy(busy) => {
                self.cloud.reason = "it has no room for another session".into();
                let at = request.patience.busy(now, busy.retry_after_ms);
                request.patience.start(now, reconnect);
                request.restart(Some(at));
            }
            Message::SessionError(SessionError {
                code: SessionErrorCode::Evicted | SessionErrorCode::NoSuchSession,
                ..
            }) if self.cx.planted.is(Fault::IgnoredEviction) => {}
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
                self.leaving.push_back(Leaving::Lost { wire_id: frame.session });
                request.restart(Some(at));
            }
            Message::Ended | Message::Cancelled => {}
            _ => return Err(CloudViolation::Unexpected { kind }),
        }
        Ok(())
    }

    /// The cloud knows none of the sessions: each is opened again, within reason.
    fn begin_anew(&mut self, now: Instant) {
        let mut lost: Vec<(RequestId, u32)> = Vec::new(); // empty as a rule
        for (id, request) in &mut self.requests {
            let patience = &mut request.patience;
            if !patience.has_opened || patience.after_return(now).is_some() {
                request.restart(None);
            } else {
                lost.push((*id, patience.lost_n));
            }
        }
        for (id, times) in lost {
            self.fail_by(id, &CloudViolation::Forgets { times });
        }
    }

    /// Silence of a connected cloud after which a request ends.
    fn silence_max(&self) -> Duration {
        self.config.reconnect * SILENCE_FACTOR
    }

    /// Fails requests that have waited for the cloud as long as they may, and lets others run.
    /// `holds` says of which sessions frames are queued, or sent and not acknowledged.
    pub fn handle_timeout(&mut self, now: Instant, holds: &dyn Fn(u32) -> bool) {
        self.admit(now);
        let acks_come = self.acks_come();
        let mut overdue: Vec<(RequestId, RequestError)> = Vec::new(); // empty as a rule
        let (reconnect, silence_max) = (self.config.reconnect, self.silence_max());
        for (id, request) in &mut self.requests {
            let limit = self.cloud.patience(request.asked, reconnect);
            if !self.cloud.connected {
                request.patience.start(now, limit);
            }
            let wire_id = request.session.wire_id();
            let holds = wire_id.is_some_and(holds);
            // Frames on their way are taken by a slow link, or by a cloud that is there.
            let is_due =
                wire_id.is_some() && if holds { !acks_come } else { request.awaits_cloud() };
            let Patience { heard, deadline, busy_ms, .. } = &mut request.patience;
            if !self.cloud.connected || !is_due {
                *heard = now;
            }
            let cloud = &self.config.cloud;
            let peer = |reason: String| RequestError::Peer { peer: cloud.clone(), reason };
            if now.saturating_duration_since(*heard) >= silence_max {
                let silent = CloudViolation::Silent { waited: silence_max };
                overdue.push((*id, peer(silent.to_string())));
            } else if deadline.is_some_and(|deadline| deadline <= now) {
                let error = match busy_ms.filter(|_| self.cloud.connected) {
                    Some(retry_after_ms) => RequestError::Busy {
                        reason: format!("cloud {cloud} has no room for another session"),
                        retry_after_ms: u64::from(retry_after_ms),
                    },
                    None => {
                        let (reason, waited) = (&self.cloud.reason, limit.as_secs_f32());
                        peer(format!(
                            "{reason} (waited {waited:.0} s); is `hat-engine cloud` running there?"
                        ))
                    }
                };
                overdue.push((*id, error));
            }
        }
        for (id, error) in overdue {
            self.fail(id, error);
        }
    }

    /// Time at which a request is overdue, or may open its session.
    pub(super) fn next_time(&self) -> Option<Instant> {
        let silence_max = self.silence_max();
        let times = self.requests.values().flat_map(|request| {
            let retry = match request.session {
                Session::Closed { not_before } => not_before,
                _ => None,
            };
            [retry, request.patience.deadline, Some(request.patience.heard + silence_max)]
        });
        times.flatten().min()
    }

    /// True if the cloud has acknowledged bytes since the last look.
    fn acks_come(&mut self) -> bool {
        let acked = self.cx.learned.traffic.map_or(0, |traffic| traffic.acked_bytes);
        std::mem::replace(&mut self.cloud.acked_bytes, acked) != acked
    }

    /// Ends a request whose cloud does not keep to the protocol.
    fn fail_by(&mut self, id: RequestId, violation: &CloudViolation) {
        let error = self.peer(violation.to_string());
        self.fail(id, error);
    }

    fn peer(&self, reason: String) -> RequestError {
        RequestError::Peer { peer: self.config.cloud.clone(), reason }
    }
}
