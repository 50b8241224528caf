//! The world in virtual time: requests come, devices and clouds do what the engine's cores say,
//! tokens appear.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use hat_core::metrics::Timings;
use hat_tools::random::{Purpose, unit};
use hat_transport::pool::Pool;

use crate::cloud::Cloud;
use crate::costs::{CostFile, DeviceKind};
use crate::device::{Around, Device, Making};
use crate::drafter::Texts;
use crate::end::{Way, buffers};
use crate::load::{Ask, requests};
use crate::policy::{Place, Policy};
use crate::queue::{Event, Queue, Role, nanoseconds, seconds};
use crate::text::{Predictability, Text};

/// Rows of a step where prompts go through in one piece.
pub(crate) const UNCUT_ROWS_MAX: u32 = 16_384;
/// Devices that have dialled before anything is asked.
const EARLY_MAX: usize = 1024;
/// Seconds over which clients come that ask again and again.
const SPREAD_S: f64 = 4.0;
/// Megabytes a second of what does not leave a machine.
const INSIDE_MB_S: f64 = 1e6;

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

/// All there is.
pub(crate) struct Simulation<'a> {
    file: &'a CostFile,
    pub(crate) run: Run,
    queue: Queue,
    pool: Pool,
    texts: Arc<Texts>,
    /// Kind of each device.
    kinds: Vec<&'a DeviceKind>,
    /// Devices that have dialled.
    pub(crate) devices: BTreeMap<usize, Device>,
    pub(crate) clouds: Vec<Cloud>,
    pub(crate) requests: Vec<Request>,
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
        let mut queue = Queue::new();
        // Few devices are there from the start; of very many each comes when it is asked for.
        let early = if kinds.len() <= EARLY_MAX { kinds.len() } else { 0 };
        (0..early).for_each(|device| queue.push(0, Event::Timer(device, Role::Device)));
        let first = if run.closed { kinds.len().min(asks.len()) } else { asks.len() };
        for (index, ask) in asks[..first].iter_mut().enumerate() {
            if run.closed {
                ask.at_s = SPREAD_S * (index as f64 + 0.5) / first as f64;
            }
            queue.push(nanoseconds(ask.at_s), Event::Ask(index));
        }
        let request =
            |ask| Request { ask, emitted: 0, first_s: 0.0, last_s: 0.0, rows_up: 0, timings: None };
        Self {
            file,
            pool: buffers(early.max(kinds.len().min(run.requests))),
            queue,
            texts: Arc::new(texts),
            kinds,
            devices: BTreeMap::new(),
            clouds: (0..run.replicas).map(|index| Cloud::new(file, &run.policy, index)).collect(),
            requests: asks.into_iter().map(request).collect(),
            failed: vec![],
            over: 0,
            asked: first,
            run,
        }
    }

    /// Lets all happen; `progress` hears of each request that is over.
    pub(crate) fn simulate(&mut self, progress: &mut dyn FnMut(usize)) {
        while let Some(event) = self.queue.pop() {
            let before = self.over;
            self.dispatch(event);
            if self.over != before {
                progress(self.over);
            }
            for _ in before..if self.run.closed { self.over } else { before } {
                if let Some(request) = self.requests.get_mut(self.asked) {
                    request.ask.at_s = seconds(self.queue.now);
                    self.queue.push(self.queue.now, Event::Ask(self.asked));
                    self.asked += 1;
                }
            }
        }
    }

    /// Seconds between whoever asks and who answers, beside those of the link.
    pub(crate) fn one_way_s(&self) -> f64 {
        match self.run.policy.place {
            Place::Device => 0.0,
            Place::Cloud => self.file.link.one_way_ms * 1e-3,
        }
    }

    fn dispatch(&mut self, event: Event) {
        let device = match &event {
            Event::Ask(request) => Some(self.device_for(*request)),
            Event::Worked(device)
            | Event::Freed(device, _)
            | Event::Arrived(device, ..)
            | Event::Timer(device, _) => Some(*device),
            Event::Staged(..) | Event::CloudTimer(_) => None,
        };
        device.into_iter().for_each(|device| self.dial(device));
        let Self { queue, requests, failed, over, devices, clouds, .. } = self;
        let around = &mut Around { queue, requests, failed, over };
        let Some(index) = device else {
            return match event {
                Event::Staged(cloud, stage) => clouds[cloud].staged(around, stage),
                Event::CloudTimer(cloud) => clouds[cloud].timer(around),
                _ => {}
            };
        };
        let Some(device) = devices.get_mut(&index) else { return };
        let cloud = &mut clouds[device.replica];
        match event {
            Event::Ask(request) => device.ask(around, request),
            Event::Worked(_) => device.worked(around),
            Event::Freed(_, Role::Device) => device.freed(around),
            Event::Freed(_, Role::Cloud) => cloud.freed(around, index),
            Event::Arrived(_, Role::Device, bytes) => device.take(around, &bytes),
            Event::Arrived(_, Role::Cloud, bytes) => cloud.take(around, index, &bytes),
            Event::Timer(_, Role::Device) => device.timer(around),
            Event::Timer(_, Role::Cloud) => cloud.end_timer(around, index),
            Event::Staged(..) | Event::CloudTimer(_) => {}
        }
    }

    /// A request goes to the device with the fewest open ones.
    fn device_for(&self, request: usize) -> usize {
        let start = unit(self.run.seed, Purpose::Device, request as u64, 0);
        let count = self.kinds.len();
        let start = (start * count as f64) as usize;
        let open = |device: &usize| self.devices.get(device).map_or(0, Device::open);
        let near = if self.run.closed { count } else { count.min(64) };
        let near = (0..near).map(|step| (start + step) % count);
        near.min_by_key(open).expect("there is a device")
    }

    /// A device that was not there dials its cloud.
    fn dial(&mut self, index: usize) {
        if self.devices.contains_key(&index) {
            return;
        }
        let (file, policy) = (self.file, &self.run.policy);
        let share = unit(self.run.seed, Purpose::Replica, index as u64, 0);
        let replica = (share * self.run.replicas as f64) as usize;
        let (seed, device) = (self.run.seed, index as u64);
        let (one_way_s, message_s) =
            (file.link.one_way_ms * 1e-3, file.calibrated.message_ms.value * 1e-3);
        let [up, down] = match policy.place {
            Place::Device => [
                Way { mb_s: file.link.up_mb_s, one_way_s, message_s, seed, device },
                Way { mb_s: file.link.down_mb_s, one_way_s, message_s: 0.0, seed: !seed, device },
            ],
            Place::Cloud => {
                let inside = [INSIDE_MB_S; 2];
                [Way { mb_s: inside, one_way_s: 0.0, message_s: 0.0, seed, device }; 2]
            }
        };
        let making = Making {
            file,
            policy,
            costs: file.device(self.kinds[index], policy.place),
            texts: &self.texts,
            pool: &self.pool,
            way: up,
            replica,
        };
        let device = Device::new(&self.queue, index, making);
        self.devices.insert(index, device);
        self.clouds[replica].accept(self.queue.instant(), index, &self.pool, down);
    }
}
