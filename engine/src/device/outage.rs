//! Outages: the cloud can't be reached, has closed the connection, or says nothing.
//!
//! A link that breaks is dialled again by the endpoint. A connection that one side has ended by a
//! CLOSE, or an address that could not be resolved, is dialled from here, for as long as the
//! device lives, each time after twice the pause. Requests wait for as long as they may.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hat_transport::message::Hello;
use hat_transport::turn::ConnectionId;

use super::request::{Request, RequestId, Session};
use super::resolve::Resolver;
use super::run::Device;
use super::violation::CloudViolation;
use crate::config::Address;
use crate::error::RequestError;
use crate::wire;

/// Length of an outage after which requests that come are not kept waiting for its end.
const OUTAGE_KNOWN: Duration = Duration::from_secs(2);
/// Patience of such a request: an attempt to reach the cloud ends within it.
const PATIENCE_KNOWN: Duration = Duration::from_secs(1);
/// A connected cloud may leave a request without any answer for so many times the patience with
/// one that is away.
pub(super) const SILENCE_FACTOR: u32 = 4;

/// The first pause.
const FIRST: Duration = Duration::from_millis(100);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(5);

/// When to dial next.
#[derive(Debug, Default)]
pub(super) struct Redial {
    at: Option<Instant>,
    pause: Duration,
}

impl Redial {
    /// Puts the next attempt off.
    pub(super) fn put_off(&mut self, now: Instant) {
        self.pause = (2 * self.pause).clamp(FIRST, LONGEST);
        self.at = Some(now + self.pause);
    }

    /// Dials at the next chance: somebody asks for an answer.
    pub(super) fn hurry(&mut self) {
        self.at = None;
    }

    /// The cloud works: the next outage begins with the first pause.
    pub(super) fn works(&mut self) {
        *self = Self::default();
    }

    /// True if an attempt is due.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.at.is_none_or(|at| at <= now)
    }

    /// Time of the next attempt; `None` if it is due.
    pub(super) fn at(&self) -> Option<Instant> {
        self.at
    }
}

/// The way to the cloud.
pub(super) struct Link {
    pub(super) address: Address,
    /// The same as text.
    pub(super) cloud: String,
    pub(super) connection: Option<ConnectionId>,
    pub(super) redial: Redial,
    pub(super) resolver: Resolver,
    pub(super) connected: bool,
    /// Begin of the outage at hand; `None` while the cloud is connected.
    down_since: Option<Instant>,
    /// Bytes that the cloud had acknowledged at the last look.
    acked_bytes: u64,
    /// Why the cloud is away, for people.
    pub(super) reason: String,
    /// Why this device does not want the cloud that it found.
    pub(super) refused: Option<String>,
}

impl Link {
    /// A link that has not been dialled.
    pub(super) fn new(address: Address, resolver: Resolver, now: Instant) -> Self {
        Self {
            resolver,
            cloud: address.to_string(),
            address,
            connection: None,
            redial: Redial::default(),
            connected: false,
            down_since: Some(now),
            acked_bytes: 0,
            reason: "not connected yet".into(),
            refused: None,
        }
    }

    /// The cloud is away, for a reason that is told once.
    pub(super) fn note_down(&mut self, reason: String, told: &str) {
        if self.connected || self.reason != reason {
            tracing::info!(cloud = %self.cloud, %reason, "{told}");
        }
        self.reason = reason;
    }

    /// How long a request that came at `asked` bears with a cloud that is away.
    fn patience(&self, asked: Instant, reconnect: Duration) -> Duration {
        let began = self.down_since.filter(|_| !self.connected);
        match began.is_some_and(|began| asked > began + OUTAGE_KNOWN) {
            true => reconnect.min(PATIENCE_KNOWN),
            false => reconnect,
        }
    }

    fn peer_error(&self, waited: Duration) -> RequestError {
        let waited = waited.as_secs_f32();
        let reason =
            format!("{} (waited {waited:.0} s); is `hat-engine cloud` running there?", self.reason);
        RequestError::Peer { peer: self.cloud.clone(), reason }
    }
}

/// A request's bearing with its cloud.
pub(super) struct Patience {
    /// When to give up on a cloud that is away.
    pub(super) deadline: Option<Instant>,
    /// Time of the last answer of the cloud that was waited for, or of the last moment in which
    /// none was due.
    pub(super) heard: Instant,
    /// Times that the cloud lost the session since the last token.
    lost_n: u32,
    /// The cloud is there and has no room: after how many ms it said it might.
    busy_ms: Option<u32>,
    /// Whether a session was ever asked for.
    has_opened: bool,
}

/// A cloud that loses a session so often before it gives a token will not give one.
const LOST_MAX: u32 = 3;
/// The same for a cloud that forgets sessions in order: it restarts, or needs their pages.
const RETURNS_MAX: u32 = 16;

/// Shortest pause before a session is opened again, whatever the cloud says.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest one.
const PAUSE_MAX: Duration = Duration::from_secs(30);

impl Patience {
    /// That of a request that begins to run.
    pub(super) fn new(now: Instant) -> Self {
        Self { deadline: None, heard: now, lost_n: 0, busy_ms: None, has_opened: false }
    }

    /// A token was decided: losses before it are forgiven.
    pub(super) fn token(&mut self) {
        self.lost_n = 0;
    }

    /// A session is asked for.
    pub(super) fn opens(&mut self) {
        self.has_opened = true;
    }

    /// The session is open.
    pub(super) fn opened(&mut self, now: Instant) {
        self.busy_ms = None;
        self.deadline = None;
        self.heard = now;
    }

    /// Starts the clock on a cloud that is away, if it does not run already.
    pub(super) fn start(&mut self, now: Instant, limit: Duration) {
        self.deadline.get_or_insert(now + limit);
    }

    /// The cloud has no room; returns when to ask again.
    pub(super) fn busy(&mut self, now: Instant, retry_after_ms: u32) -> Instant {
        let wait = Duration::from_millis(u64::from(retry_after_ms)).clamp(PAUSE_MIN, PAUSE_MAX);
        self.busy_ms = Some(u32::try_from(wait.as_millis()).expect("at most PAUSE_MAX"));
        now + wait
    }

    /// The cloud lost the session; returns when to open the next, or `None` if that is not worth
    /// another try.
    pub(super) fn after_loss(&mut self, now: Instant) -> Option<Instant> {
        self.lost_n += 1;
        (self.lost_n <= LOST_MAX).then(|| now + self.pause())
    }

    /// The cloud has forgotten the session: as [`Patience::after_loss`].
    pub(super) fn after_return(&mut self, now: Instant) -> Option<Instant> {
        self.lost_n += 1;
        (self.lost_n <= RETURNS_MAX).then(|| now + self.pause())
    }

    fn pause(&self) -> Duration {
        (PAUSE_MIN * 2_u32.pow(self.lost_n.clamp(1, 12) - 1)).min(PAUSE_MAX)
    }
}

impl Device {
    /// Dials the cloud, as soon as its name is known.
    pub(super) fn dial(&mut self) {
        if self.link.connection.is_some() {
            return;
        }
        let Some(found) = self.link.resolver.poll(&self.link.address) else { return };
        match found {
            Ok(address) => self.link.connection = Some(self.endpoint.dial(address)),
            Err(error) => {
                self.link.note_down(error.to_string(), "the cloud can't be dialled");
                self.link.redial.put_off(self.start.shared.clock.now());
                if error.is_final {
                    self.fail_for_cloud();
                }
            }
        }
    }

    /// Compares the HELLO of the cloud that was found with this device's own, and with the rows
    /// that it sends.
    ///
    /// # Errors
    /// The reason to close with INCOMPATIBLE.
    pub(super) fn check_cloud(&self, hello: &Hello) -> Result<(), String> {
        wire::check_peer(&self.start.hello(), hello)?;
        let config = &self.start.config;
        wire::check_arithmetic(hello.arithmetic_id, config.cloud_arithmetic)?;
        wire::check_codec(config.codec(), self.start.facts.hidden_size, hello)
    }

    /// The link is up, to a cloud that has been checked.
    pub(super) fn take_up(&mut self, hello: &Hello, resumed: bool) {
        self.cx.cloud = hello.into();
        self.set_connected(true);
        tracing::info!(cloud = %self.link.cloud, resumed, "the cloud is connected");
        if !resumed {
            self.begin_anew();
        }
        self.requests.values_mut().for_each(|request| request.patience.deadline = None);
    }

    /// Ends all requests, since waiting for the cloud would not help them. The device dials on.
    pub(super) fn fail_for_cloud(&mut self) {
        while let Some(id) = self.requests.keys().next().copied() {
            let (peer, reason) = (self.link.cloud.clone(), self.link.reason.clone());
            self.fail(id, RequestError::Peer { peer, reason });
        }
    }

    /// Silence of a connected cloud after which a request ends.
    pub(super) fn silence_max(&self) -> Duration {
        self.start.config.reconnect * SILENCE_FACTOR
    }

    /// Fails requests that have waited for the cloud as long as they may.
    pub(super) fn drop_overdue(&mut self, now: Instant) {
        let acks_come = self.acks_come();
        let mut overdue: Vec<(RequestId, RequestError)> = Vec::new(); // empty as a rule
        let (reconnect, silence_max) = (self.start.config.reconnect, self.silence_max());
        let Self { requests, endpoint, link, .. } = self;
        for (id, request) in requests {
            let limit = link.patience(request.job.asked, reconnect);
            if !link.connected {
                request.patience.start(now, limit);
            }
            let wire_id = request.session.wire_id();
            let holds = link.connection.zip(wire_id).is_some_and(|(c, id)| endpoint.holds(c, id));
            // Frames on their way are taken by a slow link, or by a cloud that is there.
            let is_due =
                wire_id.is_some() && if holds { !acks_come } else { request.awaits_cloud() };
            let Patience { heard, deadline, busy_ms, .. } = &mut request.patience;
            if !link.connected || !is_due {
                *heard = now;
            }
            if now.saturating_duration_since(*heard) >= silence_max {
                let silent = CloudViolation::Silent { waited: silence_max };
                overdue.push((*id, link.error_of(&silent)));
            } else if deadline.is_some_and(|deadline| deadline <= now) {
                let error = match busy_ms.filter(|_| link.connected) {
                    Some(retry_after_ms) => RequestError::Busy {
                        reason: format!("cloud {} has no room for another session", link.cloud),
                        retry_after_ms: u64::from(retry_after_ms),
                    },
                    None => link.peer_error(limit),
                };
                overdue.push((*id, error));
            }
        }
        for (id, error) in overdue {
            self.fail(id, error);
        }
    }

    /// Time at which a request is overdue or may open its session, or the cloud is dialled.
    pub(super) fn next_time(&self) -> Option<Instant> {
        let silence_max = self.silence_max();
        let times = self.requests.values().flat_map(|request| {
            let retry = match request.session {
                Session::Closed { not_before } => not_before,
                _ => None,
            };
            [retry, request.patience.deadline, Some(request.patience.heard + silence_max)]
        });
        let dials = self.link.connection.is_none() && !self.link.resolver.is_asking();
        let redial = self.link.redial.at().filter(|_| dials);
        times.flatten().chain(redial).min()
    }

    /// True if the cloud has acknowledged bytes since the last look.
    fn acks_come(&mut self) -> bool {
        let acked = self.cx.learned.traffic.map_or(0, |traffic| traffic.acked_bytes);
        std::mem::replace(&mut self.link.acked_bytes, acked) != acked
    }

    /// Ends a request whose cloud does not keep to the protocol.
    pub(super) fn fail_by(&mut self, id: RequestId, violation: &CloudViolation) {
        let error = self.link.error_of(violation);
        self.fail(id, error);
    }

    /// The cloud knows none of the sessions: each is opened again, within reason.
    fn begin_anew(&mut self) {
        let now = self.start.shared.clock.now();
        let mut lost: Vec<(RequestId, u32)> = Vec::new(); // empty as a rule
        for (id, request) in &mut self.requests {
            if request.may_begin_anew(now) {
                request.restart(None);
            } else {
                lost.push((*id, request.patience.lost_n));
            }
        }
        for (id, times) in lost {
            self.fail_by(id, &CloudViolation::Forgets { times });
        }
    }

    pub(super) fn set_connected(&mut self, connected: bool) {
        let link = &mut self.link;
        link.connected = connected;
        if connected {
            link.down_since = None;
        } else if link.down_since.is_none() {
            link.down_since = Some(self.start.shared.clock.now());
        }
        self.start.shared.connected.store(connected, Ordering::Release);
    }
}

impl Link {
    /// The end of a request whose cloud does not keep to the protocol.
    fn error_of(&self, violation: &CloudViolation) -> RequestError {
        RequestError::Peer { peer: self.cloud.clone(), reason: violation.to_string() }
    }
}

impl Request {
    /// The cloud knows no session any more: whether another try is worth it.
    fn may_begin_anew(&mut self, now: Instant) -> bool {
        !self.patience.has_opened || self.patience.after_return(now).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_once_it_works() {
        let mut now = Instant::now();
        let mut redial = Redial::default();
        assert!(redial.is_due(now));
        let mut pauses = Vec::new();
        for _ in 0..8 {
            redial.put_off(now);
            assert!(!redial.is_due(now));
            let at = redial.at().unwrap();
            pauses.push((at - now).as_millis());
            now = at;
            assert!(redial.is_due(now));
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        redial.hurry();
        assert!(redial.is_due(now));
        redial.put_off(now);
        assert_eq!(redial.at().unwrap() - now, LONGEST, "hurry alone proves nothing");
        redial.works();
        redial.put_off(now);
        assert_eq!(redial.at().unwrap() - now, FIRST);
    }
}
