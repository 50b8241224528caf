//! One device: the engine's core, a processor that does one thing at a time, and its end of a
//! connection.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hat_core::answer::{Answer, EndTokens, Prepared};
use hat_core::device::{
    DeviceConfig, DeviceCore, DeviceWork, Inbound, PageNamer, RequestEvent, RequestId, Verdict,
};
use hat_core::draft::drafter::Drafter;
use hat_core::request::{Event as Said, Request as Asked};
use hat_core::wire::{self, BundleFacts};
use hat_engine::options::DeviceLimits;
use hat_plan::{ARITHMETIC_CPU, TokenId};
use hat_transport::conn::{ConnectionEvent, ConnectionId};
use hat_transport::pool::Pool;

use crate::costs::{CostFile, DeviceCosts};
use crate::drafter::{Desk, Modelled, Texts, open};
use crate::end::{End, SendQueue, Way};
use crate::policy::{Policy, Proposer};
use crate::queue::{Event, Queue, Role, Time, nanoseconds, seconds};
use crate::simulation::{Request, UNCUT_ROWS_MAX};

/// Tokens that are told apart by whoever checks a request: all numbers.
const VOCAB_SIZE: usize = usize::MAX;

/// A round as the device's time goes.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    /// Rows that were computed together, one after the other, and rows in them.
    levels: usize,
    rows: usize,
    /// Of these levels, those that were drafted ahead.
    ahead: usize,
    /// Rows that came back and went through the head.
    heads: usize,
    /// The device's idle time when its rows went away.
    idle_at: Time,
    /// The part of its idle time since then in which it drafted ahead.
    spare_s: f64,
}

/// The next computation.
enum Next {
    Rows { count: usize, first: TokenId },
    Head,
    Draft,
}

/// One device.
pub(crate) struct Device {
    pub(crate) core: DeviceCore,
    pub(crate) end: End,
    pub(crate) replica: usize,
    index: usize,
    costs: DeviceCosts,
    policy: Policy,
    texts: Arc<Texts>,
    desk: Desk,
    /// The running computation: its duration, and its request.
    working: Option<(Duration, RequestId)>,
    busy: Time,
    /// Requests that it has, by number in the core.
    requests: BTreeMap<RequestId, usize>,
    rounds: BTreeMap<RequestId, Round>,
    timer_at: Option<Time>,
}

/// Parts of the simulation that a device's poll changes beside it.
pub(crate) struct Around<'a> {
    pub(crate) queue: &'a mut Queue,
    pub(crate) requests: &'a mut [Request],
    pub(crate) failed: &'a mut Vec<String>,
    /// Requests that are over.
    pub(crate) over: &'a mut usize,
}

/// Facts of a model that the protocol speaks about.
pub(crate) fn facts(file: &CostFile) -> BundleFacts {
    let device = file.model.device_layers;
    BundleFacts {
        hidden_size: file.model.hidden_size,
        context: file.workload.context_max,
        layers: device..device + file.model.cloud_layers,
        model_id: [0; 32],
        has_tail: false,
    }
}

/// A device as it is made.
pub(crate) struct Making<'a> {
    pub(crate) file: &'a CostFile,
    pub(crate) policy: &'a Policy,
    pub(crate) costs: DeviceCosts,
    pub(crate) texts: &'a Arc<Texts>,
    pub(crate) pool: &'a Pool,
    pub(crate) way: Way,
    pub(crate) replica: usize,
}

impl Device {
    /// Number `index`, which has just dialled its cloud.
    pub(crate) fn new(queue: &Queue, index: usize, making: Making<'_>) -> Self {
        let Making { file, policy, costs, texts, pool, way, replica } = making;
        let (facts, limits, desk) = (facts(file), DeviceLimits::default(), Desk::default());
        let config = DeviceConfig {
            sessions_max: limits.sessions_max as usize,
            kv_rows_max: limits.kv_rows_max as usize,
            step_rows_max: if policy.is_uncut() { UNCUT_ROWS_MAX } else { limits.step_rows_max },
            chunks: policy.chunks,
            codec: policy.codec,
            reconnect: Duration::from_secs(3600),
            cloud: "a simulated one".to_owned(),
        };
        let namer = policy.prefix.then(|| {
            let mut secret = [0; 32];
            secret[..8].copy_from_slice(&index.to_le_bytes());
            PageNamer::new(policy.codec, &facts, ARITHMETIC_CPU, secret.into())
        });
        let drafter = (policy.proposer != Proposer::Nobody).then(|| {
            let (texts, policy, desk) = (texts.clone(), policy.clone(), desk.clone());
            let sessions = BTreeMap::new();
            Box::new(Modelled { texts, policy, costs, desk, sessions, next: 0 }) as Box<dyn Drafter>
        });
        let now = queue.instant();
        let hello =
            wire::hello(Role::Device, facts.model_id, facts.hidden_size, facts.layers.clone());
        let namer = namer.flatten();
        let mut core = DeviceCore::new(now, config, &facts, 1, namer, drafter);
        core.work_by(policy.drafts, policy.whole_chunks);
        Self {
            core,
            end: End::new(now, hello, pool, way),
            replica,
            index,
            costs,
            policy: policy.clone(),
            texts: texts.clone(),
            desk,
            working: None,
            busy: 0,
            requests: BTreeMap::new(),
            rounds: BTreeMap::new(),
            timer_at: Some(queue.now),
        }
    }

    /// Requests that are not finished.
    pub(crate) fn open(&self) -> usize {
        self.requests.len()
    }

    /// True if it has nothing to do, and nothing on its way.
    #[cfg(test)]
    pub(crate) fn is_quiet(&self) -> bool {
        self.working.is_none() && self.open() == 0 && self.end.connection.is_drained()
    }

    /// A request is asked for.
    pub(crate) fn ask(&mut self, around: &mut Around<'_>, request: usize) {
        let text = &self.texts.tokens[request];
        let prompt = text.tokens[..text.prompt_rows].to_vec();
        let count =
            u32::try_from(text.tokens.len() - text.prompt_rows).expect("within the context");
        let asked = Asked::tokens(vec![]).max_tokens(count).draft(self.policy.draft);
        let prepared = Prepared::new(asked, prompt, VOCAB_SIZE, u32::MAX);
        let prepared = prepared.expect("a workload's requests can be had");
        let answer = Answer::new(&prepared, &EndTokens::default(), 1);
        let id = self.core.submit(around.queue.instant(), prepared, answer);
        self.requests.insert(id, request);
        self.drive(around);
    }

    /// The running computation is done.
    pub(crate) fn worked(&mut self, around: &mut Around<'_>) {
        let Some((took, id)) = self.working.take() else { return };
        self.busy += nanoseconds(took.as_secs_f64());
        let now = around.queue.instant();
        self.core.handle_work(now, took, None, &EndTokens::default());
        let idle = around.queue.now - self.busy;
        if let Some(round) = self.rounds.get_mut(&id).filter(|round| round.heads == 0) {
            round.idle_at = idle;
        }
        self.drive(around);
    }

    /// The uplink is free.
    pub(crate) fn freed(&mut self, around: &mut Around<'_>) {
        self.end.freed();
        self.drive(around);
    }

    /// Bytes have come.
    pub(crate) fn take(&mut self, around: &mut Around<'_>, bytes: &[u8]) {
        for event in self.end.take(around.queue.instant(), bytes) {
            self.core.handle_inbound(match event {
                ConnectionEvent::Up { hello, resumed } => Inbound::Up { hello, resumed },
                ConnectionEvent::Frame(frame) => Inbound::Frame(frame),
                ConnectionEvent::Closed { reason, .. } => Inbound::Down { reason },
            });
        }
        self.drive(around);
    }

    /// Does all that is to be done now, as the engine's thread does.
    pub(crate) fn drive(&mut self, around: &mut Around<'_>) {
        let now = around.queue.instant();
        self.core.handle_traffic(Some(self.end.traffic()));
        let connection = &self.end.connection;
        self.core.handle_timeout(now, &|session| connection.held(session));
        self.tell(around);
        self.transmit(around);
        if self.working.is_none() {
            self.begin_work(around);
        }
        self.tell(around);
        self.transmit(around);
        let index = self.index;
        let began = around.queue.now;
        if let Some(frames) = self.end.pump(began, now) {
            for (arrives, bytes) in frames.each {
                around.queue.push(arrives, Event::Arrived(index, Role::Cloud, bytes));
            }
            around.queue.push(frames.left, Event::Freed(index, Role::Device));
        }
        let of_core = self.core.poll_timeout(now).filter(|_| self.working.is_none());
        let of_core = of_core.map(|after| around.queue.now + after.as_nanos() as Time);
        let of_link = self.end.connection.poll_timeout().map(|at| around.queue.time(at));
        if let Some(at) = of_core.into_iter().chain(of_link).min() {
            let event = Event::Timer(index, Role::Device);
            around.queue.set_timer(&mut self.timer_at, at, event);
        }
    }

    fn transmit(&mut self, around: &Around<'_>) {
        let ends = std::slice::from_mut(&mut self.end);
        let mut send_queue = SendQueue { ends, written: &mut vec![] };
        self.core.poll_transmit(around.queue.instant(), ConnectionId(0), &mut send_queue, true);
    }

    /// Passes on what the core says of its requests.
    fn tell(&mut self, around: &mut Around<'_>) {
        let now_s = seconds(around.queue.now);
        while let Some((id, event)) = self.core.poll_event() {
            let Some(index) = self.requests.get(&id).copied() else { continue };
            let request = &mut around.requests[index];
            match event {
                RequestEvent::Said(Said::Token { .. }) => {
                    request.emitted += 1;
                    request.last_s = now_s;
                    if request.emitted == 1 {
                        request.first_s = now_s;
                    }
                    continue;
                }
                RequestEvent::Runs | RequestEvent::Said(_) => continue,
                RequestEvent::Done(done) => request.timings = Some(done.metrics.timings),
                RequestEvent::Failed(error) => around.failed.push(format!("{error:?}")),
            }
            *around.over += 1;
            self.requests.remove(&id);
            self.rounds.remove(&id);
        }
    }

    /// Begins what the core wants computed next, if there is anything.
    fn begin_work(&mut self, around: &mut Around<'_>) {
        let (now, idle) = (around.queue.now, around.queue.now - self.busy);
        let Some(work) = self.core.poll_work(around.queue.instant(), true) else { return };
        let (id, next) = match work {
            DeviceWork::Input { request, moves, tokens, .. } => {
                moves.clear();
                (request, Next::Rows { count: tokens.len(), first: tokens[0] })
            }
            DeviceWork::Head { request, position, moves, verdict, .. } => {
                moves.clear();
                let tokens = &self.texts.tokens[self.requests[&request]].tokens;
                if let Verdict::Argmax(argmax) = verdict {
                    *argmax = Some((tokens[position as usize + 1], 0.0));
                }
                (request, Next::Head)
            }
            DeviceWork::Draft(work) => {
                let request = work.request();
                work.run();
                (request, Next::Draft)
            }
            DeviceWork::Tail { .. } => unreachable!("the cloud has the last layers"),
        };
        let index = self.requests[&id];
        let prompt = around.requests[index].emitted == 0;
        let took_s = match next {
            Next::Rows { count, .. } if prompt => self.costs.layers.seconds(count),
            Next::Rows { count, first } => {
                let request = &mut around.requests[index];
                request.rows_up += count as u64;
                let decided = self.texts.tokens[index].prompt_rows as u32 + request.emitted;
                self.level_seconds(id, (decided - 1, first), count)
            }
            Next::Head => self.head_seconds(id, idle),
            Next::Draft => {
                let took_s = std::mem::take(&mut open(&self.desk).seconds);
                let is_ahead = |round: &Round| {
                    round.heads == 0 && round.levels > 0 && round.levels <= round.ahead
                };
                if self.rounds.get(&id).is_some_and(is_ahead) { 0.0 } else { took_s }
            }
        };
        let took = Duration::from_nanos(nanoseconds(took_s));
        self.working = Some((took, id));
        let until = now + nanoseconds(took_s);
        around.queue.push(until, Event::Worked(self.index));
    }

    /// Seconds to compute this many rows of a tree; `root` is the place and the token of the first
    /// if these are the first of a round.
    fn level_seconds(&mut self, request: RequestId, root: (u32, u32), rows: usize) -> f64 {
        let ahead_s = self.policy.ahead_seconds(&self.costs);
        let round = self.rounds.entry(request).or_default();
        if round.levels == 0 || round.heads > 0 {
            let spare_s = round.spare_s;
            *round = Round::default();
            let tails = &open(&self.desk).tails;
            let tails = tails.get(&self.requests[&request]);
            if self.policy.ahead && tails.is_some_and(|tails| tails.contains(&root)) {
                round.ahead = (spare_s / ahead_s) as usize;
            }
        }
        let before = round.rows;
        round.levels += 1;
        round.rows += rows;
        if round.levels <= round.ahead {
            return 0.0;
        }
        // Rows below heads' drafts are all known at once, and computed in one pass.
        match self.policy.proposer {
            Proposer::Heads if before > 0 => {
                self.costs.layers.seconds(before + rows) - self.costs.layers.seconds(before)
            }
            _ => self.costs.layers.seconds(rows),
        }
    }

    /// Seconds to see a row that is back, at this idle time of the device.
    fn head_seconds(&mut self, request: RequestId, idle: Time) -> f64 {
        let away = self.rounds.values().filter(|round| round.heads == 0).count().max(1);
        let round = self.rounds.entry(request).or_default();
        if round.heads == 0 {
            round.spare_s = seconds(idle.saturating_sub(round.idle_at)) / away as f64;
        }
        round.heads += 1;
        match round.heads - 1 {
            before if self.policy.heads_together && before > 0 => {
                self.costs.head.seconds(before + 1) - self.costs.head.seconds(before)
            }
            _ => self.costs.head.seconds(1),
        }
    }

    /// A timer has come.
    pub(crate) fn timer(&mut self, around: &mut Around<'_>) {
        if self.timer_at.is_some_and(|at| at <= around.queue.now) {
            self.timer_at = None;
            let now = around.queue.instant();
            self.end.connection.handle_timeout(now).expect("nobody is silent for that long");
            self.drive(around);
        }
    }
}
