//! A device's process: what the engine thread does around a core, in virtual time.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hat_core::answer::EndTokens;
use hat_core::device::{DeviceCore, Inbound, LinkCommand, RequestEvent, RequestId};
use hat_emulator::simulated::SimNet;
use hat_transport::conn::ConnectionId;
use hat_transport::endpoint::{Endpoint, Event};
use hat_transport::message::Hello;

use super::{Compute, Ran};

/// A device.
pub struct Device {
    pub core: DeviceCore,
    /// `None` once it has ended.
    pub endpoint: Option<Endpoint>,
    link: u64,
    hello: Hello,
    cloud: SocketAddr,
    connection: Option<ConnectionId>,
    /// The computation that is out, and when it ends.
    out: Option<(Option<Instant>, Ran)>,
    cancelled: Vec<RequestId>,
    /// It does nothing until then.
    pub stands_until: Option<Instant>,
    events: Vec<Event>,
    /// News for its callers.
    pub(super) news: Vec<(RequestId, RequestEvent)>,
}

impl Device {
    pub(super) fn new(
        core: DeviceCore,
        endpoint: Endpoint,
        link: u64,
        (hello, cloud): (Hello, SocketAddr),
    ) -> Self {
        Self {
            core,
            endpoint: Some(endpoint),
            link,
            hello,
            cloud,
            connection: None,
            out: None,
            cancelled: Vec::new(),
            stands_until: None,
            events: Vec::new(),
            news: Vec::new(),
        }
    }

    pub(super) fn cancel(&mut self, id: RequestId) {
        self.cancelled.push(id);
    }

    /// Its sockets close, and its requests are lost.
    pub(super) fn end(&mut self) {
        self.endpoint = None;
        self.out = None;
    }

    /// Does what is due, until it computes, has news or has nothing to do. While it computes it
    /// stands still, but for its link if that is served.
    pub(super) fn run(
        &mut self,
        now: Instant,
        (at, number, serves_link): (Duration, usize, bool),
        compute: &mut impl Compute,
    ) {
        self.stands_until = self.stands_until.filter(|until| *until > now);
        if self.stands_until.is_some() || self.endpoint.is_none() {
            return;
        }
        match self.out.take_if(|(end, _)| end.is_some_and(|end| end <= now)) {
            Some((_, ran)) => {
                let took = ran.took.unwrap_or_default();
                self.core.handle_work(now, took, ran.fault.as_ref(), &EndTokens::default());
                if ran.fault.is_some_and(|fault| fault.lasts) {
                    self.begin_anew(now);
                }
                self.exchange(now, number, compute);
            }
            None if self.out.is_some() && serves_link => {
                self.exchange(now, number, compute);
            }
            None => {}
        }
        while self.out.is_none() && self.news.is_empty() {
            for id in std::mem::take(&mut self.cancelled) {
                self.core.cancel(id);
            }
            self.obey(now);
            let (endpoint, connection) = (self.endpoint.as_ref(), self.connection);
            let held = |session| {
                endpoint.zip(connection).map_or(0, |(endpoint, id)| endpoint.held(id, session))
            };
            self.core.handle_timeout(now, &held);
            if let Some(work) = self.core.poll_work(now, true) {
                let ran = compute.device(at, number, work);
                self.out = Some((ran.took.and_then(|took| now.checked_add(took)), ran));
            } else if !self.exchange(now, number, compute) {
                return;
            }
        }
    }

    /// Dials and closes as the core says.
    fn obey(&mut self, now: Instant) {
        let Some(endpoint) = &mut self.endpoint else { return };
        while let Some(command) = self.core.poll_link(now) {
            match (command, self.connection.take()) {
                (LinkCommand::Dial, _) => self.connection = Some(endpoint.dial(self.cloud)),
                (LinkCommand::Close { code, reason }, Some(id)) => {
                    endpoint.close(id, code, &reason)
                }
                (LinkCommand::Close { .. }, None) => {}
            }
        }
    }

    /// Its backend is lost: another goes on, over a connection of its own.
    fn begin_anew(&mut self, now: Instant) {
        self.core.leave_link(now);
        self.obey(now);
        self.core.handle_model(hat_plan::ARITHMETIC_CPU, None);
        self.core.dial_again(now, self.hello);
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
            self.take(event);
        }
        self.events = events;
        if let Some(endpoint) = &self.endpoint {
            look_at_link(&mut self.core, endpoint, self.connection);
        }
        came
    }

    fn take(&mut self, event: Event) {
        if event.connection().is_some_and(|connection| Some(connection) != self.connection) {
            return;
        }
        self.core.handle_inbound(match event {
            Event::Up { hello, resumed, .. } => Inbound::Up { hello, resumed },
            Event::Down { reason, .. } => Inbound::Down { reason },
            Event::Gone { error, .. } => {
                self.connection = None;
                Inbound::gone(&error)
            }
            Event::Frame { frame, .. } => Inbound::Frame(frame),
            Event::Refused { .. } | Event::Woken => return,
        });
    }

    /// Time of its next turn, unless something happens before.
    pub(super) fn next_at(&self, now: Instant, net: &SimNet, serves_link: bool) -> Option<Instant> {
        let endpoint = self.endpoint.as_ref()?;
        if self.stands_until.is_some() {
            return self.stands_until;
        }
        let own = match &self.out {
            Some((end, _)) if !serves_link => return *end,
            Some((end, _)) => *end,
            None => self.core.poll_timeout(now).map(|after| now + after),
        };
        let of_link = [endpoint.poll_timeout(now), net.next_of(self.link)];
        own.into_iter().chain(of_link.into_iter().flatten()).min()
    }
}

fn look_at_link(core: &mut DeviceCore, endpoint: &Endpoint, connection: Option<ConnectionId>) {
    core.handle_traffic(connection.and_then(|id| endpoint.traffic(id)));
}
