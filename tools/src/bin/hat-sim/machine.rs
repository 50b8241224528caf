//! What takes time: a device's processor, the two directions of its link, the cloud's pipeline.
//! Each is a queue with one server; the world says when the server is done.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use hat_engine::draft::Acceptance;
use hat_engine::estimate::{Average, Estimator};
use hat_engine::sched::{Bound, Scheduler, Work};
use hat_transport::frame::HEADER_BYTES;

use crate::costs::{DeviceCosts, Stage};

/// Virtual time, nanoseconds.
pub(crate) type Time = u64;

pub(crate) fn nanoseconds(seconds: f64) -> Time {
    (seconds * 1e9).round() as Time
}

pub(crate) fn seconds(time: Time) -> f64 {
    time as f64 * 1e-9
}

/// Payload of a frame at most.
const FRAME_BYTES: u64 = 65_536;
/// A frame's header and the head of its rows.
const FRAME_HEAD_BYTES: u64 = HEADER_BYTES as u64 + 24;

/// Something that a device computes. The first kinds go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Task {
    /// Norm and head of rows that came back.
    Head { request: usize, reply: Reply },
    /// A round's rows: all at once, or level `level` of its tree.
    Round { request: usize, level: usize },
    /// A chunk of a prompt.
    Chunk { request: usize, chunk: usize },
    /// More rows while those of this round are away.
    Extend { request: usize, round: u32 },
}

impl Task {
    fn class(self) -> u8 {
        match self {
            Self::Head { .. } => 0,
            Self::Round { .. } => 1,
            Self::Chunk { .. } => 2,
            Self::Extend { .. } => 3,
        }
    }
}

/// One device.
pub(crate) struct Device {
    pub(crate) costs: DeviceCosts,
    pub(crate) replica: usize,
    pub(crate) processor: Processor,
    pub(crate) up: Uplink,
    pub(crate) down: Downlink,
    /// What it has measured, in the engine's own terms.
    pub(crate) estimator: Estimator,
    pub(crate) acceptance: Acceptance,
    /// How long works wait for a step in the cloud.
    pub(crate) queue_s: Average,
    /// Requests that are not finished.
    pub(crate) open: u32,
    /// Requests whose rows are away.
    pub(crate) away: u32,
}

/// A device's processor: one task at a time, none is interrupted.
#[derive(Default)]
pub(crate) struct Processor {
    queue: Vec<(u8, u64, Task)>,
    arrivals: u64,
    pub(crate) running: Option<Task>,
    busy: Time,
    since: Time,
}

impl Processor {
    pub(crate) fn push(&mut self, task: Task) {
        self.arrivals += 1;
        self.queue.push((task.class(), self.arrivals, task));
    }

    /// The next task, if none runs.
    pub(crate) fn next(&mut self) -> Option<Task> {
        if self.running.is_some() {
            return None;
        }
        let (index, _) = self.queue.iter().enumerate().min_by_key(|(_, waiting)| **waiting)?;
        Some(self.queue.swap_remove(index).2)
    }

    pub(crate) fn start(&mut self, now: Time, task: Task) {
        self.running = Some(task);
        self.since = now;
    }

    pub(crate) fn finish(&mut self, now: Time) -> Task {
        self.busy += now - self.since;
        self.running.take().expect("an end belongs to a start")
    }

    /// How long it has had nothing to do, ever.
    pub(crate) fn idle(&self, now: Time) -> Time {
        let running = if self.running.is_some() { now - self.since } else { 0 };
        now - self.busy - running
    }
}

/// Rows on their way to the cloud.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message {
    pub(crate) request: usize,
    pub(crate) rows: u32,
    /// Rows of the session before these.
    pub(crate) context: u32,
    /// Somebody waits for a token.
    pub(crate) urgent: bool,
    /// The first of its round: what came before and has not run is void.
    pub(crate) first: bool,
    pub(crate) reply: Option<Reply>,
    pub(crate) bytes_left: u64,
    /// Not yet begun: the sender pays for the message itself.
    pub(crate) fresh: bool,
    pub(crate) enqueued: Time,
}

/// What comes back for a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Reply {
    pub(crate) rows: u32,
    /// Id of the last row; 0 for the prompt's.
    pub(crate) last_id: u32,
}

/// Bytes of so many rows with the frames around them.
pub(crate) fn bytes(rows: u32, row_bytes: u64) -> u64 {
    let payload = u64::from(rows) * row_bytes;
    payload + payload.div_ceil(FRAME_BYTES) * FRAME_HEAD_BYTES
}

/// The uplink: frame by frame, urgent ones first.
#[derive(Default)]
pub(crate) struct Uplink {
    queues: [VecDeque<Message>; 2],
    pub(crate) sending: Option<(Message, u64)>,
}

impl Uplink {
    pub(crate) fn push(&mut self, message: Message) {
        self.queues[usize::from(!message.urgent)].push_back(message);
    }

    /// Drops the messages of a request that are not begun; returns their rows and bytes.
    pub(crate) fn forget(&mut self, request: usize) -> (u64, u64) {
        let (mut rows, mut bytes) = (0, 0);
        let mut stays = |message: &Message| {
            let goes = message.request == request && message.fresh;
            if goes {
                rows += u64::from(message.rows);
                bytes += message.bytes_left;
            }
            !goes
        };
        self.queues.iter_mut().for_each(|queue| queue.retain(&mut stays));
        (rows, bytes)
    }

    /// Begins the next frame; returns its bytes, and whether its message is new.
    pub(crate) fn start(&mut self) -> Option<(u64, bool)> {
        if self.sending.is_some() {
            return None;
        }
        let mut message = self.queues.iter_mut().find_map(VecDeque::pop_front)?;
        let frame = message.bytes_left.min(FRAME_BYTES + FRAME_HEAD_BYTES);
        let fresh = std::mem::take(&mut message.fresh);
        self.sending = Some((message, frame));
        Some((frame, fresh))
    }

    /// A frame has left; returns the message if that was its last.
    pub(crate) fn finish(&mut self) -> Option<Message> {
        let (mut message, frame) = self.sending.take().expect("an end belongs to a start");
        message.bytes_left -= frame;
        if message.bytes_left == 0 {
            return Some(message);
        }
        self.queues[usize::from(!message.urgent)].push_front(message);
        None
    }
}

/// The downlink: replies in order.
#[derive(Default)]
pub(crate) struct Downlink {
    pub(crate) queue: VecDeque<Delivery>,
    pub(crate) busy: bool,
}

/// A reply with what the cloud says of its step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delivery {
    pub(crate) request: usize,
    pub(crate) reply: Reply,
    pub(crate) step_rows: u32,
    pub(crate) step_s: f64,
    pub(crate) queue_s: f64,
}

/// Things between two machines, by number; numbers are used again.
#[derive(Debug)]
pub(crate) struct OnTheWay<T> {
    places: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for OnTheWay<T> {
    fn default() -> Self {
        Self { places: vec![], free: vec![] }
    }
}

impl<T> OnTheWay<T> {
    pub(crate) fn put(&mut self, thing: T) -> usize {
        match self.free.pop() {
            Some(place) => {
                self.places[place] = Some(thing);
                place
            }
            None => {
                self.places.push(Some(thing));
                self.places.len() - 1
            }
        }
    }

    pub(crate) fn take(&mut self, place: usize) -> T {
        self.free.push(place);
        self.places[place].take().expect("it arrives once")
    }
}

/// Works that run together.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) messages: Vec<Message>,
    pub(crate) rows: u32,
    /// In one stage.
    pub(crate) stage: Time,
    pub(crate) began: Time,
}

/// Rows of one request that wait for a step, and their device.
struct Waiting {
    device: usize,
    messages: VecDeque<Message>,
}

/// One cloud: the engine's scheduler in front of a pipeline of stages.
pub(crate) struct Replica {
    scheduler: Scheduler,
    /// By request. The scheduler holds the first message of each.
    waiting: HashMap<usize, Waiting>,
    /// One place before each stage and one in it.
    stages: Vec<VecDeque<Step>>,
    running: Vec<bool>,
    in_flight: usize,
    plan: Vec<Work>,
    pub(crate) clock: PlanClock,
}

/// What the scheduler itself took, in real time, by works that waited.
#[derive(Clone, Debug, Default)]
pub(crate) struct PlanClock {
    pub(crate) on: bool,
    pub(crate) plans: u64,
    pub(crate) took: Duration,
    pub(crate) longest: Duration,
    pub(crate) queued_max: usize,
}

impl Replica {
    pub(crate) fn new(rows_max: u32, stages: u32, timed: bool) -> Self {
        let stages = stages as usize;
        Self {
            scheduler: Scheduler::new(rows_max),
            waiting: HashMap::new(),
            stages: (0..stages).map(|_| VecDeque::new()).collect(),
            running: vec![false; stages],
            in_flight: 0,
            plan: vec![],
            clock: PlanClock { on: timed, ..PlanClock::default() },
        }
    }

    /// Takes rows that arrived from a device, in works of at most `cut` rows.
    pub(crate) fn enqueue(&mut self, now: Time, device: usize, message: Message, cut: u32) {
        let began = self.clock.on.then(Instant::now);
        let mut left = message.rows;
        let mut context = message.context;
        let new = || Waiting { device, messages: VecDeque::new() };
        let waiting = self.waiting.entry(message.request).or_insert_with(new);
        while left > 0 {
            let rows = left.min(cut);
            left -= rows;
            let reply = message.reply.filter(|_| left == 0);
            waiting.messages.push_back(Message { rows, context, reply, enqueued: now, ..message });
            context += rows;
        }
        self.enqueue_next(message.request);
        self.clock.queued_max = self.clock.queued_max.max(self.scheduler.queued());
        if let Some(began) = began {
            self.clock.took += began.elapsed();
        }
    }

    /// Tells the scheduler of a request's next rows, if it holds none, as the engine's cloud does.
    fn enqueue_next(&mut self, request: usize) {
        let session = request as u64;
        if self.scheduler.holds(session) {
            return;
        }
        let Some(waiting) = self.waiting.get(&request) else { return };
        let Some(Message { rows, context, urgent, .. }) = waiting.messages.front().copied() else {
            return;
        };
        let (device, divisible, class) = (waiting.device as u64, false, 0);
        self.scheduler.enqueue(Work { session, device, rows, context, urgent, divisible, class });
    }

    /// Drops what a request has waiting.
    pub(crate) fn forget(&mut self, request: usize) {
        if self.waiting.remove(&request).is_some() {
            self.scheduler.forget(request as u64);
        }
    }

    /// Plans the next step, if the first stage is free and no stage has a second one waiting.
    pub(crate) fn plan(&mut self, now: Time, stage: &Stage) -> bool {
        let full = self.in_flight >= self.stages.len() || !self.stages[0].is_empty();
        if full || self.scheduler.queued() == 0 {
            return false;
        }
        let began = self.clock.on.then(Instant::now);
        self.scheduler.plan(Bound::NONE, &mut self.plan);
        if let Some(began) = began {
            let took = began.elapsed();
            self.clock.plans += 1;
            self.clock.took += took;
            self.clock.longest = self.clock.longest.max(took);
        }
        let mut messages = Vec::with_capacity(self.plan.len());
        for work in &self.plan {
            let session = work.session as usize;
            let waiting = self.waiting.get_mut(&session).expect("what is planned was enqueued");
            let next = waiting.messages.pop_front();
            messages.push(next.expect("works of a session keep their order"));
            if waiting.messages.is_empty() {
                self.waiting.remove(&session);
            }
        }
        messages.iter().for_each(|message| self.enqueue_next(message.request));
        let rows: u32 = messages.iter().map(|message| message.rows).sum();
        let context: usize = messages.iter().map(|message| message.context as usize).sum();
        let stage = nanoseconds(stage.seconds(rows as usize, context));
        self.in_flight += 1;
        self.stages[0].push_back(Step { messages, rows, stage, began: now });
        true
    }

    /// Begins the next step in stage `index`; returns how long it takes.
    pub(crate) fn start(&mut self, index: usize) -> Option<Time> {
        if self.running[index] {
            return None;
        }
        let step = self.stages[index].front()?;
        self.running[index] = true;
        Some(step.stage)
    }

    /// Stage `index` is done; returns the step if it was the last one.
    pub(crate) fn finish(&mut self, index: usize) -> Option<Step> {
        self.running[index] = false;
        let step = self.stages[index].pop_front().expect("an end belongs to a start");
        if index + 1 < self.stages.len() {
            self.stages[index + 1].push_back(step);
            return None;
        }
        self.in_flight -= 1;
        Some(step)
    }
}
