//! A device's process: what the engine thread does around a core, in virtual time. It stands still
//! while it computes.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hat_core::answer::{Answer, EndTokens, Prepared};
use hat_core::device::{DeviceCore, Inbound, RequestEvent, RequestId};
use hat_emulator::simulated::SimNet;
use hat_transport::conn::ConnectionId;
use hat_transport::endpoint::{Endpoint, Event};
use hat_transport::message::CloseCode;

use super::{Compute, Ran};

/// Pauses before another connection is made, as the engine has them.
const REDIAL: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// A turn in which there was nothing to do is followed by the next after so long.
const TURN: Duration = Duration::from_millis(1);

/// A device.
pub struct Device {
    pub core: DeviceCore,
    /// `None` once it has ended.
    pub endpoint: Option<Endpoint>,
    link: u64,
    cloud: SocketAddr,
    connection: Option<ConnectionId>,
    /// Time of the next dial to the cloud, and the last pause.
    dial_at: Option<Instant>,
    pause: Duration,
    /// The computation that is out, and when it ends.
    out: Option<(Option<Instant>, Ran)>,
    cancelled: Vec<RequestId>,
    /// It does nothing until then.
    pub stands_until: Option<Instant>,
    events: Vec<Event>,
    /// News told to its callers.
    pub(super) news: Vec<(RequestId, RequestEvent)>,
}

impl Device {
    pub(super) fn new(core: DeviceCore, endpoint: Endpoint, link: u64, cloud: SocketAddr) -> Self {
        Self {
            core,
            endpoint: Some(endpoint),
            link,
            cloud,
            connection: None,
            dial_at: None,
            pause: Duration::ZERO,
            out: None,
            cancelled: Vec::new(),
            stands_until: None,
            events: Vec::new(),
            news: Vec::new(),
        }
    }

    pub(super) fn submit(&mut self, now: Instant, prepared: Prepared, answer: Answer) -> RequestId {
        self.dial_at = None;
        self.core.submit(now, prepared, answer)
    }

    pub(super) fn cancel(&mut self, id: RequestId) {
        self.cancelled.push(id);
    }

    /// Its sockets close, and its requests are lost.
    pub(super) fn end(&mut self) {
        self.endpoint = None;
        self.out = None;
    }

    /// Does what is due, until it computes or has nothing to do.
    pub(super) fn run(&mut self, now: Instant, number: usize, compute: &mut impl Compute) {
        self.stands_until = self.stands_until.filter(|until| *until > now);
        if self.stands_until.is_some() || self.endpoint.is_none() {
            return;
        }
        if let Some((end, _)) = &self.out {
            if end.is_none_or(|end| end > now) {
                return;
            }
            let (_, ran) = self.out.take().expect("looked at above");
            let took = ran.took.unwrap_or_default();
            self.core.handle_work(now, took, ran.fault.as_ref(), &EndTokens::default());
            if ran.fault.is_some_and(|fault| fault.lasts) {
                self.begin_anew();
            }
            self.exchange(now, number, compute);
        }
        let mut idle = 0;
        loop {
            for id in std::mem::take(&mut self.cancelled) {
                self.core.cancel(id);
            }
            let Some(endpoint) = &mut self.endpoint else { return };
            if self.connection.is_none() && self.dial_at.is_none_or(|at| at <= now) {
                self.connection = Some(endpoint.dial(self.cloud));
            }
            let connection = self.connection;
            let held = |session| connection.map_or(0, |id| endpoint.held(id, session));
            self.core.handle_timeout(now, &held);
            if let Some(work) = self.core.poll_work(now, true) {
                let ran = compute.device(number, work);
                self.out = Some((ran.took.and_then(|took| now.checked_add(took)), ran));
                return;
            }
            idle = if self.exchange(now, number, compute) { 0 } else { idle + 1 };
            if idle > 1 || (idle > 0 && self.core.poll_timeout(now) != Some(Duration::ZERO)) {
                return;
            }
        }
    }

    /// Its backend is lost: another goes on, over a connection of its own.
    fn begin_anew(&mut self) {
        if let (Some(endpoint), Some(connection)) = (&mut self.endpoint, self.connection.take()) {
            let reason = "the device's backend is lost";
            endpoint.close(connection, CloseCode::Internal, reason);
            self.core.handle_inbound(Inbound::Gone { reason: reason.into(), is_final: false });
        }
        self.core.handle_model(hat_plan::ARITHMETIC_CPU, None);
        self.dial_at = None;
    }

    /// Sends and receives; returns true if anything came.
    fn exchange(&mut self, now: Instant, number: usize, compute: &mut impl Compute) -> bool {
        self.news.extend(std::iter::from_fn(|| self.core.poll_event()));
        let Some(endpoint) = &mut self.endpoint else { return false };
        if let Some(to) = self.connection {
            self.core.poll_transmit(now, to, endpoint, true);
        }
        look_at_link(&mut self.core, endpoint, self.connection);
        let mut events = std::mem::take(&mut self.events);
        endpoint.poll(Some(Duration::ZERO), &mut events).expect("a simulated link works");
        let came = !events.is_empty();
        for event in events.drain(..) {
            if let Event::Frame { frame, .. } = &event {
                compute.hears(number, frame);
            }
            self.take(now, event);
        }
        self.events = events;
        if let Some(endpoint) = &self.endpoint {
            look_at_link(&mut self.core, endpoint, self.connection);
        }
        came
    }

    fn take(&mut self, now: Instant, event: Event) {
        if event.connection().is_some_and(|connection| Some(connection) != self.connection) {
            return;
        }
        let inbound = match event {
            Event::Up { hello, resumed, .. } => Inbound::Up { hello, resumed },
            Event::Down { reason, .. } => Inbound::Down { reason },
            Event::Gone { error, .. } => {
                self.connection = None;
                self.pause = (2 * self.pause).clamp(REDIAL[0], REDIAL[1]);
                self.dial_at = Some(now + self.pause);
                Inbound::Gone { reason: error.to_string(), is_final: error.is_final() }
            }
            Event::Frame { frame, .. } => {
                (self.dial_at, self.pause) = (None, Duration::ZERO);
                Inbound::Frame(frame)
            }
            Event::Refused { .. } | Event::Woken => return,
        };
        self.core.handle_inbound(inbound);
    }

    /// Time at which it has to be run again, unless something happens before.
    pub(super) fn next_at(&self, now: Instant, net: &SimNet) -> Option<Instant> {
        let endpoint = self.endpoint.as_ref()?;
        if self.stands_until.is_some() {
            return self.stands_until;
        }
        if let Some((end, _)) = &self.out {
            return *end;
        }
        let core = self.core.poll_timeout(now).map(|after| now + after.max(TURN));
        let dial = self.dial_at.filter(|_| self.connection.is_none());
        let own = [core, dial, endpoint.poll_timeout(now), net.next_of(self.link)];
        own.into_iter().flatten().min()
    }
}

fn look_at_link(core: &mut DeviceCore, endpoint: &Endpoint, connection: Option<ConnectionId>) {
    core.handle_traffic(connection.and_then(|id| endpoint.traffic(id)));
}
