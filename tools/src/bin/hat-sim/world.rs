//! The world in virtual time: requests come, devices and clouds work, tokens appear.

mod request;
mod setting;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use hat_engine::chunk::{ChunkCosts, CloudCost, Limits, Planner};
use hat_engine::estimate::Returned;
use hat_tools::random::{Purpose, unit};

pub(crate) use self::request::Request;
pub(crate) use self::setting::{Lane, Run, Span};
use self::setting::{devices, line, middle, rate};
use crate::costs::{CostFile, Stage};
use crate::load::requests;
use crate::machine::{
    Delivery, Device, Message, OnTheWay, Replica, Reply, Step, Task, Time, bytes, nanoseconds,
    seconds,
};
use crate::policy::Chunking;
use crate::round::Making;
use crate::text::{Guessing, Text};

/// Rows of a step where prompts go through in one piece.
const UNCUT_ROWS_MAX: u32 = 16_384;

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Ask(usize),
    TaskDone(usize),
    FrameSent(usize),
    Arrives(usize, usize),
    StageDone(usize, usize),
    Delivered(usize),
    Returns(usize),
}

/// Rows that go up together.
struct Rows {
    rows: u32,
    /// On the link: rows of a tree may be on their way already.
    bytes: u64,
    context: u32,
    reply: Option<Reply>,
    urgent: bool,
    first: bool,
}

/// All there is.
pub(crate) struct World<'a> {
    file: &'a CostFile,
    guessing: &'a Guessing,
    run: Run,
    row_bytes: u64,
    stage: Stage,
    now: Time,
    events: BinaryHeap<Reverse<(Time, u64, Event)>>,
    event_count: u64,
    devices: Vec<Device>,
    pub(crate) replicas: Vec<Replica>,
    pub(crate) requests: Vec<Request>,
    messages: OnTheWay<Message>,
    deliveries: OnTheWay<Delivery>,
    planner: Planner,
    /// Where virtual time begins, for those who want an `Instant`.
    epoch: Instant,
    pub(crate) step_s: Vec<f64>,
    pub(crate) spans: Vec<Span>,
    pub(crate) finished: usize,
}

impl<'a> World<'a> {
    /// A world in which nothing has happened.
    pub(crate) fn new(file: &'a CostFile, guessing: &'a Guessing, run: Run) -> Self {
        let rows_max = match run.switches.chunking {
            Chunking::Off => UNCUT_ROWS_MAX,
            _ => file.cloud.rows_max,
        };
        let replica = || Replica::new(rows_max, file.cloud.stages, run.timed);
        let replicas = (0..run.replicas).map(|_| replica()).collect();
        let asks = requests(&file.workload, run.rate, run.requests, run.seed);
        let mut world = Self {
            file,
            guessing,
            row_bytes: run.switches.row_bytes(file.model.hidden_size),
            stage: file.stage(),
            now: 0,
            events: BinaryHeap::new(),
            event_count: 0,
            devices: devices(file, &run),
            replicas,
            requests: asks.into_iter().map(Request::new).collect(),
            messages: OnTheWay::default(),
            deliveries: OnTheWay::default(),
            planner: Planner::default(),
            epoch: Instant::now(),
            step_s: vec![],
            spans: vec![],
            finished: 0,
            run,
        };
        for index in 0..world.requests.len() {
            let at = nanoseconds(world.requests[index].ask.at_s);
            world.push(at, Event::Ask(index));
        }
        world
    }

    /// Lets all happen; `progress` hears of each finished request.
    pub(crate) fn live(&mut self, progress: &mut dyn FnMut(usize)) {
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            self.now = at;
            let before = self.finished;
            self.happen(event);
            if self.finished != before {
                progress(self.finished);
            }
        }
    }

    fn push(&mut self, at: Time, event: Event) {
        self.event_count += 1;
        self.events.push(Reverse((at, self.event_count, event)));
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Ask(request) => self.admit(request),
            Event::TaskDone(device) => self.task_done(device),
            Event::FrameSent(device) => {
                if let Some(message) = self.devices[device].up.finish() {
                    let at = self.now + nanoseconds(self.file.link.one_way_ms * 1e-3);
                    let message = self.messages.put(message);
                    self.push(at, Event::Arrives(device, message));
                }
                self.start_frame(device);
            }
            Event::Arrives(device, message) => self.arrives(device, message),
            Event::StageDone(replica, stage) => self.stage_done(replica, stage),
            Event::Delivered(device) => {
                let delivery = self.devices[device].down.queue.pop_front();
                let delivery = delivery.expect("an end belongs to a start");
                self.devices[device].down.busy = false;
                let delivery = self.deliveries.put(delivery);
                let at = self.now + nanoseconds(self.file.link.one_way_ms * 1e-3);
                self.push(at, Event::Returns(delivery));
                self.start_delivery(device);
            }
            Event::Returns(delivery) => self.returns(delivery),
        }
    }

    /// A request goes to the device with the fewest open ones, and its prompt is cut.
    fn admit(&mut self, index: usize) {
        let start = unit(self.run.seed, Purpose::Device, index as u64, 0);
        let count = self.devices.len();
        let start = (start * count as f64) as usize;
        let near = count.min(64);
        let device = (0..near)
            .map(|step| (start + step) % count)
            .min_by_key(|device| self.devices[*device].open)
            .expect("there is a device");
        let request = &mut self.requests[index];
        request.device = device;
        self.devices[device].open += 1;
        let rows = request.ask.prompt_rows;
        if self.run.switches.prefix {
            request.held = self.file.workload.known_rows.min(rows - 1);
        }
        let (held, rows) = (request.held, rows - request.held);
        let costs = self.chunk_costs(device);
        let limits = Limits { rows_max: self.file.cloud.rows_max, ..Limits::default() };
        let sizes = match self.run.switches.chunking {
            Chunking::Off | Chunking::Cloud(_) => vec![rows],
            Chunking::Device(policy) => {
                self.planner.plan(policy, &costs, &limits, held, rows).sizes.to_vec()
            }
        };
        self.requests[index].sizes = sizes;
        self.devices[device].processor.push(Task::Chunk { request: index, chunk: 0 });
        self.start_task(device);
    }

    /// What the chunk sizer is told: lines over what a device and a cloud measure.
    pub(crate) fn chunk_costs(&self, device: usize) -> ChunkCosts {
        let device = &self.devices[device];
        let stages = f64::from(self.file.cloud.stages);
        let cloud = line(self.stage.work);
        let one_way_s = self.file.link.one_way_ms * 1e-3;
        let row_s = self.row_bytes as f64 / middle(self.file.link.down_mb_s);
        ChunkCosts {
            device: line(device.costs.layers),
            frame_s: self.file.calibrated.message_ms.value * 1e-3,
            row_up_s: self.row_bytes as f64 / middle(self.file.link.up_mb_s),
            up_latency_s: one_way_s,
            cloud: CloudCost {
                fixed: cloud.fixed * stages,
                per_row: cloud.per_row * stages,
                per_row_context: 0.0,
            },
            stages: self.file.cloud.stages,
            cloud_wait_s: device.queue_s.mean(),
            return_s: row_s + one_way_s + device.costs.head.seconds(1),
        }
    }

    fn start_task(&mut self, device: usize) {
        while let Some(task) = self.devices[device].processor.next() {
            let Some(took) = self.begin(device, task) else { continue };
            self.devices[device].processor.start(self.now, task);
            let prompt = matches!(task, Task::Chunk { .. });
            self.trace(Lane::Device, nanoseconds(took), prompt);
            self.push(self.now + nanoseconds(took), Event::TaskDone(device));
        }
    }

    /// What a task takes, or `None` if there is nothing to do any more.
    fn begin(&mut self, device: usize, task: Task) -> Option<f64> {
        let Self { devices, requests, guessing, run, file, now, epoch, .. } = self;
        let of_device = &mut devices[device];
        let idle = of_device.processor.idle(*now);
        let (Task::Head { request: index, .. }
        | Task::Round { request: index, .. }
        | Task::Chunk { request: index, .. }
        | Task::Extend { request: index, .. }) = task;
        let request = &mut requests[index];
        let switches = run.switches;
        let left = file.workload.new_tokens - request.emitted;
        let text = Text { guessing, seed: run.seed, request: index as u64 };
        let mut making = Making {
            switches,
            text,
            device: &of_device.costs,
            estimator: &mut of_device.estimator,
            acceptance: &mut of_device.acceptance,
        };
        match task {
            Task::Chunk { chunk, .. } => {
                let rows = request.sizes[chunk];
                let took = making.device.layers.seconds(rows as usize);
                making.estimator.note_device(rows, request.held + request.sent_rows, took);
                Some(took)
            }
            Task::Head { reply, .. } => {
                let prompt = reply.last_id == 0;
                let rows = if prompt { 1 } else { request.round.awaited(reply.last_id) };
                if rows == 0 {
                    return None;
                }
                if !prompt && switches.parallel && !request.round.waved {
                    let idle_s = seconds(idle - request.idle_at_send.min(idle));
                    let share = idle_s / f64::from(of_device.away.max(1));
                    request.ahead = (share / making.ahead_seconds()) as usize;
                }
                request.head_s = making.device.head.seconds(rows);
                Some(request.head_s)
            }
            Task::Round { level, .. } if level > 0 => Some(request.levels[level].seconds),
            Task::Round { .. } => {
                request.rounds += 1;
                request.asked = request.asking.is_worth_it();
                let root = request.emitted - 1;
                let levels = request.round.make(&mut making, root, left, request.asked);
                // The policy is told what the rows of a tree cost in all.
                let all = levels.iter().map(|level| level.seconds).sum();
                let prefix = request.held + request.sent_rows + root;
                making.estimator.note_device(request.round.unsent() as u32, prefix, all);
                request.set_levels(levels, switches.levels);
                Some(request.levels[0].seconds)
            }
            Task::Extend { round, .. } => {
                let at = |time: Time| *epoch + Duration::from_nanos(time);
                let is_due = request.sent.is_some_and(|(sent, rows)| {
                    making.estimator.is_due(at(*now), at(sent), rows as usize)
                });
                request.extend(&mut making, left == 0 || request.rounds != round, is_due)
            }
        }
    }

    fn task_done(&mut self, device: usize) {
        match self.devices[device].processor.finish(self.now) {
            Task::Chunk { request, chunk } => self.chunk_done(device, request, chunk),
            Task::Head { request, reply } => self.head_done(device, request, reply),
            Task::Round { request, level } => {
                if level + 1 < self.requests[request].levels.len() {
                    self.send_level(device, request, level);
                    let next = Task::Round { request, level: level + 1 };
                    self.devices[device].processor.push(next);
                } else {
                    self.send_round(device, request, true);
                    if self.run.switches.streaming {
                        self.want_more(device, request);
                    }
                }
            }
            Task::Extend { request, .. } => {
                self.requests[request].extending = false;
                if self.requests[request].round.unsent() > 0 {
                    self.send_round(device, request, false);
                }
                self.want_more(device, request);
            }
        }
        self.start_task(device);
    }

    fn chunk_done(&mut self, device: usize, index: usize, chunk: usize) {
        let request = &mut self.requests[index];
        let rows = request.sizes[chunk];
        let last = chunk + 1 == request.sizes.len();
        let context = request.held + request.sent_rows;
        request.sent_rows += rows;
        if last {
            // A chunk behind others waits for them as well, and is not timed.
            request.sent = (request.sizes.len() == 1).then_some((self.now, rows));
        } else {
            self.devices[device].processor.push(Task::Chunk { request: index, chunk: chunk + 1 });
        }
        let reply = last.then_some(Reply { rows: 1, last_id: 0 });
        let bytes = bytes(rows, self.row_bytes);
        let (urgent, first) = (false, false);
        self.send(device, index, Rows { rows, bytes, context, reply, urgent, first });
    }

    /// A level that others will follow goes up: bytes alone, since the cloud runs the rows of a
    /// tree in one step, when the last has arrived.
    fn send_level(&mut self, device: usize, index: usize, level: usize) {
        let rows = self.requests[index].levels[level].rows as u32;
        let bytes = bytes(rows, self.row_bytes);
        let (reply, urgent, first) = (None, true, false);
        self.send(device, index, Rows { rows: 0, bytes, context: 0, reply, urgent, first });
    }

    /// What is new of a round goes up.
    fn send_round(&mut self, device: usize, index: usize, first: bool) {
        let request = &mut self.requests[index];
        let rows = request.round.unsent() as u32;
        // The levels before the last are on their way already.
        let levels = std::mem::take(&mut request.levels);
        let before: usize = levels.iter().rev().skip(1).map(|level| level.rows).sum();
        let last_id = request.round.send();
        let reply = Reply { rows, last_id };
        if request.sent.is_none() && request.idle_at_send == 0 {
            request.sent = Some((self.now, rows));
            request.idle_at_send = self.devices[device].processor.idle(self.now).max(1);
            self.devices[device].away += 1;
        }
        let context = request.held + request.sent_rows + request.emitted - 1;
        let bytes = bytes(rows - before as u32, self.row_bytes);
        let reply = Some(reply);
        self.send(device, index, Rows { rows, bytes, context, reply, urgent: true, first });
    }

    fn send(&mut self, device: usize, request: usize, sent: Rows) {
        let Rows { rows, bytes: bytes_left, context, reply, urgent, first } = sent;
        self.requests[request].bytes_up += bytes_left;
        self.requests[request].rows_up += u64::from(rows);
        let (fresh, enqueued) = (true, 0);
        self.devices[device].up.push(Message {
            request,
            rows,
            context,
            urgent,
            first,
            reply,
            bytes_left,
            fresh,
            enqueued,
        });
        self.start_frame(device);
    }

    /// The drafter may go on while rows are away.
    fn want_more(&mut self, device: usize, index: usize) {
        let request = &mut self.requests[index];
        if !request.extending {
            request.extending = true;
            let round = request.rounds;
            self.devices[device].processor.push(Task::Extend { request: index, round });
        }
    }

    fn head_done(&mut self, device: usize, index: usize, reply: Reply) {
        let request = &mut self.requests[index];
        let now_s = seconds(self.now);
        if reply.last_id == 0 {
            request.emitted = 1;
            request.first_s = now_s;
            request.last_s = now_s;
            return self.next_round(device, index);
        }
        let of_device = &mut self.devices[device];
        let text = Text { guessing: self.guessing, seed: self.run.seed, request: index as u64 };
        let mut making = Making {
            switches: self.run.switches,
            text,
            device: &of_device.costs,
            estimator: &mut of_device.estimator,
            acceptance: &mut of_device.acceptance,
        };
        let walked = request.round.walk(&mut making, reply.last_id);
        request.emitted += walked.tokens;
        if walked.tokens > 0 {
            request.last_s = now_s;
            making.estimator.note_head(request.head_s / f64::from(walked.tokens));
        }
        if !walked.ahead {
            request.ahead = 0;
        }
        if request.emitted >= self.file.workload.new_tokens {
            self.finished += 1;
            of_device.open -= 1;
            of_device.away -= u32::from(std::mem::take(&mut request.idle_at_send) > 0);
        } else if walked.over {
            of_device.away -= u32::from(std::mem::take(&mut request.idle_at_send) > 0);
            self.next_round(device, index);
        } else {
            self.want_more(device, index);
        }
    }

    fn next_round(&mut self, device: usize, index: usize) {
        let request = &mut self.requests[index];
        let of_device = &mut self.devices[device];
        if request.rounds > 0 {
            let tokens = (request.emitted - request.began.1) as usize;
            of_device.estimator.note_round(tokens);
            if request.asked {
                let took_s = seconds(self.now - request.began.0);
                request.asking.note(tokens, took_s, of_device.estimator.plain_rate());
            }
        }
        request.began = (self.now, request.emitted);
        request.extending = false;
        request.sent = None;
        if self.run.switches.streaming {
            let (rows, bytes) = self.devices[device].up.forget(index);
            request.rows_up -= rows;
            request.bytes_up -= bytes;
        }
        self.devices[device].processor.push(Task::Round { request: index, level: 0 });
    }

    fn start_frame(&mut self, device: usize) {
        let of_device = &mut self.devices[device];
        let Some((bytes, fresh)) = of_device.up.start() else { return };
        let message_s = if fresh { self.file.calibrated.message_ms.value * 1e-3 } else { 0.0 };
        let rate = rate(self.file.link.up_mb_s, self.run.seed, device, self.now);
        let took = nanoseconds(bytes as f64 / rate + message_s);
        let prompt = of_device.up.sending.is_some_and(|(message, _)| !message.urgent);
        self.trace(Lane::Uplink, took, prompt);
        self.push(self.now + took, Event::FrameSent(device));
    }

    fn arrives(&mut self, device: usize, message: usize) {
        let replica = self.devices[device].replica;
        let message = self.messages.take(message);
        if message.rows == 0 {
            return;
        }
        if message.first && self.run.switches.streaming {
            self.replicas[replica].forget(message.request);
        }
        let cut = match self.run.switches.chunking {
            Chunking::Cloud(rows) => rows,
            _ => u32::MAX,
        };
        self.replicas[replica].enqueue(self.now, device, message, cut);
        self.run_stages(replica);
    }

    fn run_stages(&mut self, replica: usize) {
        self.replicas[replica].plan(self.now, &self.stage);
        for index in 0..self.file.cloud.stages as usize {
            if let Some(took) = self.replicas[replica].start(index) {
                self.trace(Lane::Stage(index), took, false);
                self.push(self.now + took, Event::StageDone(replica, index));
            }
        }
    }

    fn stage_done(&mut self, replica: usize, stage: usize) {
        if let Some(step) = self.replicas[replica].finish(stage) {
            self.step_s.push(seconds(step.stage));
            self.deliver(&step);
        }
        self.run_stages(replica);
    }

    fn deliver(&mut self, step: &Step) {
        for message in &step.messages {
            let Some(reply) = message.reply else { continue };
            let device = self.requests[message.request].device;
            let delivery = Delivery {
                request: message.request,
                reply,
                step_rows: step.rows,
                step_s: seconds(self.now - step.began),
                queue_s: seconds(step.began - message.enqueued),
            };
            self.devices[device].down.queue.push_back(delivery);
            self.start_delivery(device);
        }
    }

    fn start_delivery(&mut self, device: usize) {
        let down = &mut self.devices[device].down;
        let Some(delivery) = down.queue.front().filter(|_| !down.busy) else { return };
        let bytes = bytes(delivery.reply.rows, self.row_bytes);
        self.requests[delivery.request].bytes_down += bytes;
        down.busy = true;
        let rate = rate(self.file.link.down_mb_s, !self.run.seed, device, self.now);
        let took = nanoseconds(bytes as f64 / rate);
        self.trace(Lane::Downlink, took, false);
        self.push(self.now + took, Event::Delivered(device));
    }

    /// Rows are back: the device learns what waiting costs, and its head wants to see them.
    fn returns(&mut self, delivery: usize) {
        let Delivery { request: index, reply, step_rows, step_s, queue_s } =
            self.deliveries.take(delivery);
        let request = &mut self.requests[index];
        let device = request.device;
        let of_device = &mut self.devices[device];
        let timed = request.sent.take();
        if timed.is_some() || reply.last_id == 0 {
            let rows = timed.map_or(reply.rows, |(_, rows)| rows);
            of_device.estimator.note_returned(&Returned {
                rows: rows as usize,
                sent_bytes: u64::from(rows) * self.row_bytes,
                prefix: request.held,
                step_rows,
                step_s,
                queue_s,
                away_s: timed.map(|(sent, _)| seconds(self.now - sent)),
            });
            of_device.queue_s.note(queue_s);
        }
        of_device.processor.push(Task::Head { request: index, reply });
        self.start_task(device);
    }

    fn trace(&mut self, lane: Lane, took: Time, prompt: bool) {
        if self.run.traced {
            let (from_s, to_s) = (seconds(self.now), seconds(self.now + took));
            self.spans.push(Span { lane, from_s, to_s, prompt });
        }
    }
}
