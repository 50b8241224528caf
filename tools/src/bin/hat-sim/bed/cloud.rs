//! A cloud's process: its io thread and the threads of its stages, in virtual time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hat_core::cloud::{CloudCore, LinkEvent, StepBatch};
use hat_emulator::simulated::SimNet;
use hat_transport::endpoint::{Endpoint, Event};
use hat_transport::message::CloseCode;

use super::Compute;

/// Polls of the link for the last words of a cloud that ends.
const LAST_POLLS: usize = 4;

/// A stage: steps that wait for it, and the one that it runs, with the time of its end.
#[derive(Default)]
struct Stage {
    waiting: VecDeque<StepBatch>,
    running: Option<(Option<Instant>, StepBatch)>,
}

/// A cloud.
pub struct Cloud {
    pub core: CloudCore,
    /// `None` once it has ended.
    pub endpoint: Option<Endpoint>,
    link: u64,
    stages: Vec<Stage>,
    /// Steps whose last stage is done.
    done: Vec<StepBatch>,
    /// It does nothing until then.
    pub stands_until: Option<Instant>,
    events: Vec<Event>,
}

impl Cloud {
    pub(super) fn new(core: CloudCore, endpoint: Endpoint, link: u64, stages: usize) -> Self {
        let stages = (0..stages).map(|_| Stage::default()).collect();
        let endpoint = Some(endpoint);
        let (done, events) = (Vec::new(), Vec::new());
        Self { core, endpoint, link, stages, done, stands_until: None, events }
    }

    /// Its sockets close, and its steps are lost.
    pub(super) fn end(&mut self) {
        self.endpoint = None;
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
        if self.stands_until.is_some() {
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

    /// Sends what is queued and takes what has come; returns true if anything has.
    fn poll(&mut self, now: Instant, number: usize, compute: &mut impl Compute) -> bool {
        let Some(endpoint) = &mut self.endpoint else { return false };
        let events = &mut self.events;
        endpoint.poll(Some(Duration::ZERO), events).expect("a simulated link works");
        let came = !events.is_empty();
        for event in events.drain(..) {
            let (from, event) = match event {
                Event::Frame { connection, frame } => {
                    if compute.overhears(number, endpoint, connection, &frame) {
                        self.core.handle_frame(now, connection, frame);
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
            self.core.handle_link(now, from, event);
        }
        came
    }

    /// Steps that have ended go back to the core; returns true if there were any.
    fn take_back(&mut self, now: Instant, number: usize, compute: &mut impl Compute) -> bool {
        self.advance(now, number, compute);
        let Some(endpoint) = &mut self.endpoint else { return false };
        let went_on = !self.done.is_empty();
        for batch in self.done.drain(..) {
            for connection in batch.connections() {
                if let Some(traffic) = endpoint.traffic(connection) {
                    self.core.handle_traffic(connection, &traffic);
                }
            }
            self.core.handle_step(now, batch, endpoint);
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
        let Some(endpoint) = &mut self.endpoint else { return };
        self.core.poll_transmit(now, endpoint);
        while let Some((connection, code, reason)) = self.core.poll_close() {
            endpoint.close(connection, code, &reason);
        }
    }

    fn say_farewell(&mut self, now: Instant) {
        self.transmit(now);
        if let Some(endpoint) = &mut self.endpoint {
            for connection in self.core.connections() {
                endpoint.close(connection, CloseCode::Internal, "the cloud has failed");
            }
            for _ in 0..LAST_POLLS {
                endpoint.poll(Some(Duration::ZERO), &mut self.events).expect("it works");
            }
        }
        self.end();
    }

    /// Time at which it has to be run again, unless something happens before.
    pub(super) fn next_at(&self, now: Instant, net: &SimNet) -> Option<Instant> {
        let endpoint = self.endpoint.as_ref()?;
        if self.stands_until.is_some() {
            return self.stands_until;
        }
        let stages = self.stages.iter().enumerate();
        let ends = stages.filter_map(|(index, stage)| {
            let (end, _) = stage.running.as_ref()?;
            // One that can't hand its step on waits for the next.
            let is_blocked = self.stages.get(index + 1).is_some_and(|it| !it.waiting.is_empty());
            end.filter(|_| !is_blocked)
        });
        let own = [self.core.poll_timeout(), endpoint.poll_timeout(now), net.next_of(self.link)];
        own.into_iter().flatten().chain(ends).min()
    }
}
