//! The world in virtual time: requests come, devices and clouds do what the engine's cores say,
//! tokens appear.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hat_core::answer::Prepared;
use hat_core::device::{DeviceWork, RequestEvent, RequestId};
use hat_core::draft::drafter::Drafter;
use hat_core::metrics::Timings;
use hat_core::request::{Event as Said, Request as Asked};
use hat_core::wire;
use hat_emulator::simulated::{Conditions, Way};
use hat_plan::MiddleStep;
use hat_tools::random::{Purpose, unit};
use hat_transport::conn::ConnectionConfig;
use hat_transport::endpoint::EndpointConfig;
use hat_transport::message::{Hello, Role};
use hat_transport::pool::{Pool, PoolConfig};

use crate::bed::{Bed, Compute, Happened, Port, Ran};
use crate::costs::{CostFile, DeviceKind, Server};
use crate::device::{self, Processor, facts};
use crate::drafter::{Desk, Modelled, Texts};
use crate::load::{Ask, requests};
use crate::policy::{Place, Policy, Proposer};
use crate::text::{Predictability, Text};
use crate::{cloud, policy};

/// Rows of a step where prompts go through in one piece.
pub(crate) const UNCUT_ROWS_MAX: u32 = 16_384;
/// Devices that have dialled before anything is asked.
const EARLY_MAX: usize = 1024;
/// Seconds over which clients come that ask again and again.
const SPREAD_S: f64 = 4.0;
/// Megabytes a second of what does not leave a machine.
const INSIDE_MB_S: [f64; 2] = [1e6; 2];
/// Time that a link keeps its rate.
const RATE_HOLDS: Duration = Duration::from_millis(100);
/// Nobody is pinged: all are there.
const NEVER: Duration = Duration::from_secs(1 << 30);
/// Buffers of prompts of all connections of a run, and small ones of each; resident as far as they
/// are used.
const LARGE: u32 = 1 << 15;
const SMALL_EACH: u32 = 32;
/// Bytes that a peer may have on its way or unread: prompts that are not cut fit.
const WINDOW_BYTES: u32 = 256 << 20;
/// Tokens that are told apart by whoever checks a request: all numbers.
const VOCAB_SIZE: usize = usize::MAX;

/// A time of so many seconds.
pub(crate) fn time(seconds: f64) -> Duration {
    Duration::from_nanos((seconds * 1e9).round() as u64)
}

fn seconds(time: Duration) -> f64 {
    time.as_nanos() as f64 * 1e-9
}

/// A run.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) policy: Policy,
    pub(crate) seed: u64,
    /// Requests a second.
    pub(crate) rate: f64,
    pub(crate) requests: usize,
    pub(crate) replicas: usize,
    /// Each device asks again when it has its answer, whatever the rate.
    pub(crate) closed: bool,
}

impl Run {
    /// One cloud; a rate and a number of requests are to be set.
    pub(crate) fn of(policy: &Policy, seed: u64) -> Self {
        let (rate, requests, replicas) = (1.0, 1, 1);
        Self { policy: policy.clone(), seed, rate, requests, replicas, closed: false }
    }
}

/// A request, and what has come of it.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) ask: Ask,
    pub(crate) emitted: u32,
    pub(crate) first_s: f64,
    pub(crate) last_s: f64,
    /// Rows of the answer that were computed.
    pub(crate) rows_up: u64,
    /// The engine's own figures, once it is done.
    pub(crate) timings: Option<Timings>,
}

/// Texts, and the time of all that is computed.
struct World {
    requests: Vec<Request>,
    texts: Arc<Texts>,
    processors: Vec<Processor>,
    server: Server,
    /// Steps of each cloud, in one stage.
    step_s: Vec<Vec<f64>>,
}

impl Compute for World {
    fn device(&mut self, at: Duration, device: usize, work: DeviceWork<'_>) -> Ran {
        let known = (&mut self.requests[..], &self.texts.tokens[..]);
        let took = self.processors[device].compute(at, work, known);
        Ran { took: Some(took), fault: None }
    }

    fn stage(&mut self, (cloud, stage): (usize, usize), step: &mut MiddleStep) -> Ran {
        let took = time(self.server.seconds(&step.plan.batch()));
        if stage == 0 {
            self.step_s[cloud].push(seconds(took));
        }
        Ran { took: Some(took), fault: None }
    }
}

/// All there is.
pub(crate) struct Simulation<'a> {
    file: &'a CostFile,
    pub(crate) run: Run,
    bed: Bed<usize>,
    world: World,
    pool: Pool,
    /// Kind of each device.
    kinds: Vec<&'a DeviceKind>,
    /// Number in the bed of each device that has dialled.
    dialled: BTreeMap<usize, usize>,
    /// Reasons that requests ended without an answer.
    pub(crate) failed: Vec<String>,
    /// Requests that are over, and that have come or will by themselves.
    pub(crate) over: usize,
    asked: usize,
}

impl<'a> Simulation<'a> {
    /// A world in which nothing has happened.
    pub(crate) fn new(file: &'a CostFile, predictability: &Predictability, run: Run) -> Self {
        let mut asks = requests(&file.workload, run.rate, run.requests, run.seed);
        let tokens = asks.iter().enumerate().map(|(index, ask)| {
            let text = Text { predictability, seed: run.seed, request: index as u64 };
            let known = file.workload.known_rows.min(ask.prompt_rows - 1);
            text.tokens(ask.prompt_rows, known, file.workload.new_tokens)
        });
        let texts = Texts {
            tokens: tokens.collect(),
            predictability: predictability.clone(),
            seed: run.seed,
        };
        let kinds: Vec<_> =
            file.devices.iter().flat_map(|kind| std::iter::repeat_n(kind, kind.count)).collect();
        // No socket has anything from here: each device brings its ways.
        let nowhere = Conditions { latency_us: 0..=0, ns_per_byte: [0..=0, 0..=0], cuts: false };
        let mut bed = Bed::new(nowhere, run.seed);
        bed.serves_links = true;
        let stages = file.cloud.stages as usize;
        (0..run.replicas)
            .for_each(|index| bed.begin_cloud(index, cloud::core(file, &run.policy), stages));
        let first = if run.closed { kinds.len().min(asks.len()) } else { asks.len() };
        for (index, ask) in asks[..first].iter_mut().enumerate() {
            if run.closed {
                ask.at_s = SPREAD_S * (index as f64 + 0.5) / first as f64;
            }
            bed.act_in(time(ask.at_s), index);
        }
        let request =
            |ask| Request { ask, emitted: 0, first_s: 0.0, last_s: 0.0, rows_up: 0, timings: None };
        // Few devices are there from the start; of very many each comes when it is asked for.
        let early = if kinds.len() <= EARLY_MAX { kinds.len() } else { 0 };
        let connections = u32::try_from(early.max(kinds.len().min(run.requests)));
        let small = (1 << 12) + SMALL_EACH * connections.expect("requests are few");
        let mut simulation = Self {
            world: World {
                requests: asks.into_iter().map(request).collect(),
                texts: Arc::new(texts),
                processors: vec![],
                server: file.server(&run.policy),
                step_s: vec![vec![]; run.replicas],
            },
            file,
            bed,
            pool: Pool::new(PoolConfig { small, large: LARGE }),
            kinds,
            dialled: BTreeMap::new(),
            failed: vec![],
            over: 0,
            asked: first,
            run,
        };
        for device in 0..early {
            simulation.dial(device);
        }
        simulation
    }

    /// Lets all happen; `progress` hears of each request that is over.
    pub(crate) fn simulate(&mut self, progress: &mut dyn FnMut(usize)) {
        while let Some(happened) = self.bed.next(&mut self.world) {
            match happened {
                Happened::Act(request) => self.ask(request),
                Happened::News { device, id, event } => {
                    if self.hear(device, id, event) {
                        self.over += 1;
                        progress(self.over);
                        self.ask_again();
                    }
                }
                Happened::Ended { cloud } => self.failed.push(format!("cloud {cloud} has ended")),
                Happened::Spins { node } => return self.failed.push(format!("{node:?} spins")),
            }
        }
    }

    pub(crate) fn requests(&self) -> &[Request] {
        &self.world.requests
    }

    /// Times of the steps of all clouds, in one stage.
    pub(crate) fn step_s(&self) -> impl Iterator<Item = f64> {
        self.world.step_s.iter().flatten().copied()
    }

    /// Seconds between whoever asks and who answers, beside those of the link.
    pub(crate) fn one_way_s(&self) -> f64 {
        match self.run.policy.place {
            Place::Device => 0.0,
            Place::Cloud => self.file.link.one_way_ms * 1e-3,
        }
    }

    /// A request is asked for.
    fn ask(&mut self, index: usize) {
        let device = self.device_for(index);
        let device = self.dial(device);
        let text = &self.world.texts.tokens[index];
        let prompt = text.tokens[..text.prompt_rows].to_vec();
        let count =
            u32::try_from(text.tokens.len() - text.prompt_rows).expect("within the context");
        let asked = Asked::tokens(vec![]).max_tokens(count).draft(self.run.policy.draft);
        let prepared = Prepared::new(asked, prompt, VOCAB_SIZE, u32::MAX);
        let prepared = prepared.expect("a workload's requests can be had");
        let id = self.bed.submit(device, prepared, 1);
        self.world.processors[device].requests.insert(id, index);
    }

    /// One is over; where devices ask again, the next comes.
    fn ask_again(&mut self) {
        let now_s = seconds(self.bed.elapsed());
        if let Some(request) = self.world.requests.get_mut(self.asked).filter(|_| self.run.closed) {
            request.ask.at_s = now_s;
            self.bed.act_in(Duration::ZERO, self.asked);
            self.asked += 1;
        }
    }

    /// A device says something of a request; returns true if it is over.
    fn hear(&mut self, device: usize, id: RequestId, event: RequestEvent) -> bool {
        let now_s = seconds(self.bed.elapsed());
        let processor = &mut self.world.processors[device];
        let Some(index) = processor.requests.get(&id).copied() else { return false };
        let request = &mut self.world.requests[index];
        match event {
            RequestEvent::Said(Said::Token { .. }) => {
                request.emitted += 1;
                request.last_s = now_s;
                if request.emitted == 1 {
                    request.first_s = now_s;
                }
                return false;
            }
            RequestEvent::Runs | RequestEvent::Said(_) => return false,
            RequestEvent::Done(done) => request.timings = Some(done.metrics.timings),
            RequestEvent::Failed(error) => self.failed.push(format!("{error:?}")),
        }
        processor.end(id).is_some()
    }

    /// A request goes to the device with the fewest open ones.
    fn device_for(&self, request: usize) -> usize {
        let start = unit(self.run.seed, Purpose::Device, request as u64, 0);
        let count = self.kinds.len();
        let start = (start * count as f64) as usize;
        let open = |device: &usize| {
            let dialled = self.dialled.get(device);
            dialled.map_or(0, |number| self.world.processors[*number].requests.len())
        };
        let near = if self.run.closed { count } else { count.min(64) };
        let near = (0..near).map(|step| (start + step) % count);
        near.min_by_key(open).expect("there is a device")
    }

    /// The number in the bed of a device, which dials its cloud if it has not.
    fn dial(&mut self, index: usize) -> usize {
        let number = self.dialled.len();
        if let Some(number) = self.dialled.get(&index) {
            return *number;
        }
        let (file, policy) = (self.file, &self.run.policy);
        let share = unit(self.run.seed, Purpose::Replica, index as u64, 0);
        let replica = (share * self.run.replicas as f64) as usize;
        let (costs, desk) = (file.device(self.kinds[index], policy.place), Desk::default());
        let drafter = (policy.proposer != Proposer::Nobody).then(|| {
            let (texts, policy, desk) = (self.world.texts.clone(), policy.clone(), desk.clone());
            let sessions = BTreeMap::new();
            Box::new(Modelled { texts, policy, costs, desk, sessions, next: 0 }) as Box<dyn Drafter>
        });
        let facts = facts(file);
        let own = wire::hello(Role::Device, facts.model_id, facts.hidden_size, facts.layers);
        let start = self.bed.now() - self.bed.elapsed();
        let ways = ways(file, policy, (self.run.seed, index as u64), start);
        let core = device::core(self.bed.now(), index, (file, policy), drafter);
        let port = self.bed.listen(replica, self.port(cloud::hello(file, policy), None));
        self.bed.begin_device(number, core, self.port(own, Some(ways)), (replica, port));
        self.world.processors.push(Processor::new(costs, &self.run.policy, desk));
        self.dialled.insert(index, number);
        number
    }

    fn port(&self, hello: Hello, ways: Option<[Way; 2]>) -> Port {
        let connection = ConnectionConfig {
            window_bytes: WINDOW_BYTES,
            queue_frames_max: 1 << 14,
            queue_bytes_max: WINDOW_BYTES as usize,
            ping_after: NEVER,
            dead_after: 2 * NEVER,
            ..ConnectionConfig::new(hello)
        };
        let pool = PoolConfig { small: 0, large: 0 };
        let config = EndpointConfig { connection, pool, ..EndpointConfig::new(hello) };
        Port { config, ways, pool: Some(self.pool.clone()) }
    }
}

/// The link of a device to its cloud and back.
fn ways(
    file: &CostFile,
    policy: &policy::Policy,
    (seed, device): (u64, u64),
    start: Instant,
) -> [Way; 2] {
    let (link, is_inside) = (&file.link, policy.place == Place::Cloud);
    let message = time(file.calibrated.message_ms.value * 1e-3);
    let ways = [(link.up_mb_s, seed, message), (link.down_mb_s, !seed, Duration::ZERO)];
    ways.map(|(mb_s, seed, message)| {
        let latency = time(link.one_way_ms * 1e-3);
        let ([low, high], message, latency) = match is_inside {
            true => (INSIDE_MB_S, Duration::ZERO, Duration::ZERO),
            false => (mb_s, message, latency),
        };
        // Drawn anew between the ends of its range as time goes on.
        let bytes = Box::new(move |now: Instant, bytes: usize| {
            let period = (now - start).as_nanos() / RATE_HOLDS.as_nanos();
            let share = unit(seed, Purpose::Rate, device, period as u64);
            time(bytes as f64 / (1e6 * (low + (high - low) * share)))
        });
        Way { bytes, message, latency }
    })
}
