//! A cloud's process: its io thread and the threads of its stages, in virtual time. It has one port
//! or many: those alone take a turn to which something has happened.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use hat_core::cloud::{CloudCore, LinkEvent, StepBatch};
use hat_emulator::simulated::SimNet;
use hat_transport::conn::{ConnectionId, FrameSink, SendError};
use hat_transport::endpoint::{Endpoint, Event};
use hat_transport::frame::{Kind, Priority};
use hat_transport::message::CloseCode;
use hat_transport::pool::Buf;

use super::Compute;

/// Polls of the link for the last words of a cloud that ends.
const LAST_POLLS: usize = 4;

/// A stage: steps that wait for it, and the one that it runs, with the time of its end.
#[derive(Default)]
struct Stage {
    waiting: VecDeque<StepBatch>,
    running: Option<(Option<Instant>, StepBatch)>,
}

/// Ports, each with the number of its link, and those that are to take a turn.
#[derive(Default)]
struct Ports {
    all: Vec<(Endpoint, u64)>,
    due: BTreeSet<usize>,
    /// Ports that have taken one since their next time was asked for.
    polled: BTreeSet<usize>,
}

/// A connection of all ports, by the number of its port and its own.
fn id_of(port: usize, id: ConnectionId) -> ConnectionId {
    ConnectionId((port as u64) << 32 | id.0)
}

impl Ports {
    fn port(&self, id: ConnectionId) -> (usize, ConnectionId) {
        ((id.0 >> 32) as usize, ConnectionId(id.0 & u64::from(u32::MAX)))
    }

    /// The port of a connection, which is due now.
    fn of(&mut self, id: ConnectionId) -> (&mut Endpoint, ConnectionId) {
        let (port, id) = self.port(id);
        self.due.insert(port);
        (&mut self.all[port].0, id)
    }

    fn close(&mut self, id: ConnectionId, code: CloseCode, reason: &str) {
        let (endpoint, id) = self.of(id);
        endpoint.close(id, code, reason);
    }
}

impl FrameSink for Ports {
    fn buffer(&mut self, priority: Priority, body_bytes: usize) -> Option<Buf> {
        self.all.first_mut()?.0.buffer(priority, body_bytes)
    }

    fn send(
        &mut self,
        to: ConnectionId,
        kind: Kind,
        session: u32,
        priority: Priority,
        body: Buf,
    ) -> Result<(), SendError> {
        let (endpoint, to) = self.of(to);
        endpoint.send(to, kind, session, priority, body)
    }

    fn discard(&mut self, to: ConnectionId, session: u32) -> usize {
        let (endpoint, to) = self.of(to);
        endpoint.discard(to, session)
    }
}

/// A cloud.
pub struct Cloud {
    pub core: CloudCore,
    ports: Ports,
    has_ended: bool,
    stages: Vec<Stage>,
    /// Steps whose last stage is done.
    done: Vec<StepBatch>,
    /// It does nothing until then.
    pub stands_until: Option<Instant>,
    events: Vec<Event>,
}

impl Cloud {
    pub(super) fn new(core: CloudCore, stages: usize) -> Self {
        let stages = (0..stages).map(|_| Stage::default()).collect();
        let (ports, done, events) = (Ports::default(), Vec::new(), Vec::new());
        Self { core, ports, has_ended: false, stages, done, stands_until: None, events }
    }

    /// It listens at one more port.
    pub(super) fn listen(&mut self, endpoint: Endpoint, link: u64) {
        self.ports.due.insert(self.ports.all.len());
        self.ports.all.push((endpoint, link));
    }

    /// Number of its ports.
    pub(super) fn ports(&self) -> usize {
        self.ports.all.len()
    }

    /// Its first port; `None` once it has ended.
    pub fn endpoint(&self) -> Option<&Endpoint> {
        self.ports.all.first().map(|(endpoint, _)| endpoint)
    }

    /// Something may have happened to a port.
    pub(super) fn touch(&mut self, port: usize) {
        if port < self.ports.all.len() {
            self.ports.due.insert(port);
        }
    }

    /// Its sockets close, and its steps are lost.
    pub(super) fn end(&mut self) {
        self.has_ended = true;
        self.ports = Ports::default();
        self.events.clear();
        self.stages.iter_mut().for_each(|stage| *stage = Stage::default());
    }

    /// True if no step is out.
    pub fn is_idle(&self) -> bool {
        self.stages.iter().all(|stage| stage.waiting.is_empty() && stage.running.is_none())
    }

    /// Does what is due; true if the process has ended.
    pub(super) fn run(&mut self, now: Instant, number: usize, compute: &mut impl Compute) -> bool {
        self.stands_until = self.stands_until.filter(|until| *until > now);
        if self.stands_until.is_some() || self.has_ended {
            return false;
        }
        loop {
            let mut went_on = self.poll(now, number, compute);
            went_on |= self.take_back(now, number, compute);
            if self.core.poll_fault(now).is_some() {
                self.say_farewell(now);
                return true;
            }
            went_on |= self.plan(now);
            self.advance(now, number, compute);
            self.transmit(now);
            if !went_on && !self.poll(now, number, compute) {
                return false;
            }
        }
    }

    /// Ports that are due send what is queued and take what has come; returns true if anything has.
    fn poll(&mut self, now: Instant, number: usize, compute: &mut impl Compute) -> bool {
        let mut came = false;
        for port in std::mem::take(&mut self.ports.due) {
            let endpoint = &mut self.ports.all[port].0;
            let events = &mut self.events;
            endpoint.poll(Some(Duration::ZERO), events).expect("a simulated link works");
            self.ports.polled.insert(port);
            if events.is_empty() {
                continue;
            }
            // More may be there.
            self.ports.due.insert(port);
            came = true;
            for event in events.drain(..) {
                let (from, event) = match event {
                    Event::Frame { connection, frame } => {
                        if compute.overhears(number, endpoint, connection, &frame) {
                            self.core.handle_frame(now, id_of(port, connection), frame);
                        }
                        continue;
                    }
                    Event::Up { connection, hello, resumed, .. } => {
                        (connection, LinkEvent::Up { hello, resumed })
                    }
                    Event::Down { connection, .. } => (connection, LinkEvent::Down),
                    Event::Gone { connection, .. } => (connection, LinkEvent::Gone),
                    Event::Refused { .. } | Event::Woken => continue,
                };
                self.core.handle_link(now, id_of(port, from), event);
            }
        }
        came
    }

    /// Steps that have ended go back to the core; returns true if there were any.
    fn take_back(&mut self, now: Instant, number: usize, compute: &mut impl Compute) -> bool {
        self.advance(now, number, compute);
        let went_on = !self.done.is_empty();
        for batch in self.done.drain(..) {
            for connection in batch.connections() {
                let (port, id) = self.ports.port(connection);
                if let Some(traffic) = self.ports.all[port].0.traffic(id) {
                    self.core.handle_traffic(connection, &traffic);
                }
            }
            self.core.handle_step(now, batch, &mut self.ports);
        }
        went_on
    }

    /// Moves steps from stage to stage, as far as they have come by now. A queue between two holds
    /// one.
    fn advance(&mut self, now: Instant, number: usize, compute: &mut impl Compute) {
        let is_over =
            |stage: &mut Stage| stage.running.take_if(|(end, _)| end.is_some_and(|end| end <= now));
        for index in (0..self.stages.len()).rev() {
            let next_has_room = |next: &Stage| next.waiting.is_empty();
            if self.stages.get(index + 1).is_none_or(next_has_room)
                && let Some((_, batch)) = is_over(&mut self.stages[index])
            {
                match self.stages.get_mut(index + 1) {
                    Some(next) => next.waiting.push_back(batch),
                    None => self.done.push(batch),
                }
            }
            // What was handed on is begun there at once, and makes room behind it.
            for later in index..self.stages.len() {
                self.begin(later, now, number, compute);
            }
        }
    }

    fn begin(&mut self, index: usize, now: Instant, number: usize, compute: &mut impl Compute) {
        let stage = &mut self.stages[index];
        if stage.running.is_some() {
            return;
        }
        let Some(mut batch) = stage.waiting.pop_front() else { return };
        batch.began.get_or_insert(now);
        let mut end = Some(now);
        if batch.fault.is_none() {
            let ran = compute.stage((number, index), &mut batch.step);
            batch.took += ran.took.unwrap_or_default();
            batch.fault = ran.fault;
            end = ran.took.and_then(|took| now.checked_add(took));
        }
        stage.running = Some((end, batch));
    }

    /// Plans steps while the first stage has room for one; returns true if it did.
    fn plan(&mut self, now: Instant) -> bool {
        let mut planned = false;
        loop {
            let first = &mut self.stages[0];
            let has = first.waiting.len() + usize::from(first.running.is_some());
            if has as u64 >= self.core.steps_ahead(now) {
                return planned;
            }
            let Some(batch) = self.core.poll_step(now) else { return planned };
            first.waiting.push_back(batch);
            planned = true;
        }
    }

    fn transmit(&mut self, now: Instant) {
        self.core.poll_transmit(now, &mut self.ports);
        while let Some((connection, code, reason)) = self.core.poll_close() {
            self.ports.close(connection, code, &reason);
        }
    }

    fn say_farewell(&mut self, now: Instant) {
        self.transmit(now);
        for connection in self.core.connections() {
            self.ports.close(connection, CloseCode::Internal, "the cloud has failed");
        }
        for (endpoint, _) in &mut self.ports.all {
            for _ in 0..LAST_POLLS {
                endpoint.poll(Some(Duration::ZERO), &mut self.events).expect("it works");
            }
        }
        self.end();
    }

    /// Time of its next turn, unless something happens before.
    pub(super) fn next_at(&self) -> Option<Instant> {
        if self.stands_until.is_some() || self.has_ended {
            return self.stands_until.filter(|_| !self.has_ended);
        }
        let stages = self.stages.iter().enumerate();
        let ends = stages.filter_map(|(index, stage)| {
            let (end, _) = stage.running.as_ref()?;
            // One that can't hand its step on waits for the next.
            let is_blocked = self.stages.get(index + 1).is_some_and(|it| !it.waiting.is_empty());
            end.filter(|_| !is_blocked)
        });
        self.core.poll_timeout().into_iter().chain(ends).min()
    }

    /// The same of the ports that have taken a turn, by number from 1 on.
    pub(super) fn next_of_ports(
        &mut self,
        now: Instant,
        net: &SimNet,
    ) -> impl Iterator<Item = (usize, Instant)> {
        let polled = std::mem::take(&mut self.ports.polled).into_iter();
        polled.filter_map(move |port| {
            let (endpoint, link) = self.ports.all.get(port)?;
            let times = [endpoint.poll_timeout(now), net.next_of(*link)];
            Some((port + 1, times.into_iter().flatten().min()?))
        })
    }
}
