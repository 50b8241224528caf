//! One cloud: the engine's core, a pipeline of stages, and its ends of its devices' connections.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use hat_core::cloud::{CloudCore, CloudCoreConfig, CloudFigures, LinkEvent, StepBatch};
use hat_core::page::pages_for;
use hat_core::wire;
use hat_engine::options::CloudLimits;
use hat_transport::conn::{ConnectionEvent, ConnectionId};
use hat_transport::message::Hello;
use hat_transport::pool::Pool;

use crate::costs::{CostFile, Server};
use crate::device::{Around, facts};
use crate::end::{End, SendQueue, Way};
use crate::policy::Policy;
use crate::queue::{Event, Queue, Role, Time, nanoseconds, seconds};
use crate::simulation::UNCUT_ROWS_MAX;

/// Sessions of whole contexts that a cloud of a testbed has pages for.
const SESSIONS: usize = 256;

/// A step on its way.
struct Step {
    batch: StepBatch,
    /// In one stage.
    stage: Time,
}

/// Real time that planning took, by works that waited.
#[derive(Clone, Debug, Default)]
pub(crate) struct PlanClock {
    pub(crate) plans: u64,
    pub(crate) took: Duration,
    pub(crate) queued_max: usize,
}

/// One cloud.
pub(crate) struct Cloud {
    pub(crate) core: CloudCore,
    index: usize,
    hello: Hello,
    server: Server,
    ends: Vec<End>,
    /// Device of each end.
    devices: Vec<usize>,
    /// End of each device.
    clients: BTreeMap<usize, usize>,
    /// Ends that something was written to.
    written: Vec<usize>,
    /// One place before each stage and one in it.
    stages: Vec<VecDeque<Step>>,
    running: Vec<bool>,
    timer_at: Option<Time>,
    pub(crate) clock: PlanClock,
    /// Of each step, in one stage.
    pub(crate) step_s: Vec<f64>,
}

impl Cloud {
    /// Number `index`, which nobody has dialled.
    pub(crate) fn new(file: &CostFile, policy: &Policy, index: usize) -> Self {
        let facts = facts(file);
        let limits = CloudLimits::default();
        let stages = file.cloud.stages;
        let hello = Hello {
            row_budget: if policy.is_uncut() { UNCUT_ROWS_MAX } else { file.cloud.rows_max },
            stages: u16::try_from(stages).expect("stages are few"),
            ..wire::hello(Role::Cloud, facts.model_id, facts.hidden_size, facts.layers)
        };
        let config = CloudCoreConfig {
            sessions_max: limits.sessions_max,
            sessions_per_device_max: limits.sessions_per_device_max,
            context_max: limits.context_max.max(file.workload.context_max),
            idle_after: Duration::from_secs(3600),
            step_within: Duration::from_secs(3600),
        };
        let pages = SESSIONS * pages_for(limits.context_max as usize);
        let pages = u32::try_from(pages).expect("pages are few");
        let mut core = CloudCore::new(config, hello, pages, CloudFigures::default());
        if let Some(bound) = policy.bound() {
            core.bound_by(bound);
        }
        Self {
            core,
            index,
            hello,
            server: file.server(policy),
            ends: vec![],
            devices: vec![],
            clients: BTreeMap::new(),
            written: vec![],
            stages: (0..stages).map(|_| VecDeque::new()).collect(),
            running: vec![false; stages as usize],
            timer_at: None,
            clock: PlanClock::default(),
            step_s: vec![],
        }
    }

    /// A device has dialled.
    pub(crate) fn accept(&mut self, now: Instant, device: usize, pool: &Pool, way: Way) {
        self.clients.insert(device, self.ends.len());
        self.ends.push(End::new(now, self.hello, pool, way));
        self.devices.push(device);
    }

    /// Bytes of a device have come.
    pub(crate) fn take(&mut self, around: &mut Around<'_>, device: usize, bytes: &[u8]) {
        let now = around.queue.instant();
        let client = self.clients[&device];
        let from = ConnectionId(client as u64);
        for event in self.ends[client].take(now, bytes) {
            match event {
                ConnectionEvent::Up { hello, resumed } => {
                    self.core.handle_link(now, from, LinkEvent::Up { hello, resumed });
                }
                ConnectionEvent::Frame(frame) => self.core.handle_frame(now, from, frame),
                ConnectionEvent::Closed { .. } => self.core.handle_link(now, from, LinkEvent::Down),
            }
        }
        self.clock.queued_max = self.clock.queued_max.max(self.core.queued());
        self.written.push(client);
        self.drive(around);
    }

    /// The downlink to a device is free.
    pub(crate) fn freed(&mut self, around: &mut Around<'_>, device: usize) {
        let client = self.clients[&device];
        self.ends[client].freed();
        self.written.push(client);
        self.drive(around);
    }

    /// A stage is done.
    pub(crate) fn staged(&mut self, around: &mut Around<'_>, stage: usize) {
        self.running[stage] = false;
        let step = self.stages[stage].pop_front().expect("an end belongs to a start");
        match self.stages.get_mut(stage + 1) {
            Some(next) => next.push_back(step),
            None => self.end_step(around, step),
        }
        self.drive(around);
    }

    fn end_step(&mut self, around: &Around<'_>, step: Step) {
        let Step { mut batch, stage } = step;
        self.step_s.push(seconds(stage));
        batch.took = Duration::from_nanos(stage * self.stages.len() as u64);
        for connection in batch.connections() {
            let traffic = self.ends[connection.0 as usize].traffic();
            self.core.handle_traffic(connection, &traffic);
        }
        let mut send_queue = SendQueue { ends: &mut self.ends, written: &mut self.written };
        self.core.handle_step(around.queue.instant(), batch, &mut send_queue);
    }

    /// Does all that is to be done now, as the engine's threads do.
    pub(crate) fn drive(&mut self, around: &mut Around<'_>) {
        let now = around.queue.instant();
        self.plan(around.queue);
        for index in 0..self.stages.len() {
            self.start(around, index);
        }
        let mut send_queue = SendQueue { ends: &mut self.ends, written: &mut self.written };
        self.core.poll_transmit(now, &mut send_queue);
        if let Some((_, _, reason)) = self.core.poll_close() {
            around.failed.push(reason);
        }
        let mut written = std::mem::take(&mut self.written);
        written.sort_unstable();
        written.dedup();
        written.drain(..).for_each(|client| self.pump(around, client));
        self.written = written;
        if let Some(at) = self.core.poll_timeout() {
            let at = around.queue.time(at);
            around.queue.set_timer(&mut self.timer_at, at, Event::CloudTimer(self.index));
        }
    }

    /// Hands out steps while the first stage has room for one.
    fn plan(&mut self, queue: &Queue) {
        let now = queue.instant();
        while (self.stages[0].len() as u64) < self.core.steps_ahead(now) {
            let began = Instant::now();
            let Some(batch) = self.core.poll_step(now) else { return };
            self.clock.took += began.elapsed();
            self.clock.plans += 1;
            let stage = nanoseconds(self.server.seconds(&batch.step.plan.batch()));
            self.stages[0].push_back(Step { batch, stage });
        }
    }

    /// Begins the next step in a stage that has none.
    fn start(&mut self, around: &mut Around<'_>, stage: usize) {
        if self.running[stage] {
            return;
        }
        let now = around.queue.now;
        let Some(step) = self.stages[stage].front_mut() else { return };
        if stage == 0 {
            step.batch.began = Some(around.queue.instant());
        }
        self.running[stage] = true;
        let until = now + step.stage;
        around.queue.push(until, Event::Staged(self.index, stage));
    }

    /// Sends what a device's end has, and looks after it again when it asks for that.
    fn pump(&mut self, around: &mut Around<'_>, client: usize) {
        let (now, at, device) = (around.queue.now, around.queue.instant(), self.devices[client]);
        let end = &mut self.ends[client];
        if let Some(frames) = end.pump(now, at) {
            for (arrives, bytes) in frames.each {
                around.queue.push(arrives, Event::Arrived(device, Role::Device, bytes));
            }
            around.queue.push(frames.left, Event::Freed(device, Role::Cloud));
        }
        if let Some(at) = end.connection.poll_timeout() {
            let at = around.queue.time(at);
            around.queue.set_timer(&mut end.timer_at, at, Event::Timer(device, Role::Cloud));
        }
    }

    /// The timer of a device's end has come.
    pub(crate) fn end_timer(&mut self, around: &mut Around<'_>, device: usize) {
        let client = self.clients[&device];
        let end = &mut self.ends[client];
        if end.timer_at.is_some_and(|at| at <= around.queue.now) {
            end.timer_at = None;
            end.connection.handle_timeout(around.queue.instant()).expect("nobody is silent");
            self.pump(around, client);
        }
    }

    /// The core's timer has come.
    pub(crate) fn timer(&mut self, around: &mut Around<'_>) {
        if self.timer_at.is_some_and(|at| at <= around.queue.now) {
            self.timer_at = None;
            self.drive(around);
        }
    }

    /// True if nothing is on its way.
    #[cfg(test)]
    pub(crate) fn is_quiet(&self) -> bool {
        self.running.iter().all(|running| !running) && self.core.figures().sessions == 0
    }
}
