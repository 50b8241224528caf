//! One device: the engine's core, as a policy and a cost file have it, and the time of what its
//! processor computes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hat_core::device::{DeviceConfig, DeviceCore, DeviceWork, PageNamer, RequestId, Verdict};
use hat_core::draft::drafter::Drafter;
use hat_core::wire::BundleFacts;
use hat_engine::options::DeviceLimits;
use hat_plan::{ARITHMETIC_CPU, TokenId};

use crate::costs::{CostFile, DeviceCosts};
use crate::drafter::{Desk, open};
use crate::policy::{Policy, Proposer};
use crate::simulation::{Request, UNCUT_ROWS_MAX, time};
use crate::text::Tokens;

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
    idle_at: Duration,
    /// The part of its idle time since then in which it drafted ahead.
    spare_s: f64,
}

/// The processor of one device.
pub(crate) struct Processor {
    costs: DeviceCosts,
    policy: Policy,
    desk: Desk,
    /// Time that it has computed.
    busy: Duration,
    /// Requests that the device has, by number in its core.
    pub(crate) requests: BTreeMap<RequestId, usize>,
    rounds: BTreeMap<RequestId, Round>,
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

/// Device number `index`, which has dialled nobody.
pub(crate) fn core(
    now: Instant,
    index: usize,
    (file, policy): (&CostFile, &Policy),
    drafter: Option<Box<dyn Drafter>>,
) -> DeviceCore {
    let (facts, limits) = (facts(file), DeviceLimits::default());
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
    let mut core = DeviceCore::new(now, config, &facts, 1, namer.flatten(), drafter);
    core.work_by(policy.drafts, policy.whole_chunks);
    core
}

impl Processor {
    pub(crate) fn new(costs: DeviceCosts, policy: &Policy, desk: Desk) -> Self {
        let (requests, rounds) = (BTreeMap::new(), BTreeMap::new());
        Self { costs, policy: policy.clone(), desk, busy: Duration::ZERO, requests, rounds }
    }

    /// A request is over; returns its number.
    pub(crate) fn end(&mut self, id: RequestId) -> Option<usize> {
        self.rounds.remove(&id);
        self.requests.remove(&id)
    }

    /// Computes, and says how long it takes.
    pub(crate) fn compute(
        &mut self,
        at: Duration,
        work: DeviceWork<'_>,
        (requests, texts): (&mut [Request], &[Tokens]),
    ) -> Duration {
        let idle = at - self.busy;
        let (id, took_s) = match work {
            DeviceWork::Input { request: id, moves, tokens, .. } => {
                moves.clear();
                let index = self.requests[&id];
                let request = &mut requests[index];
                let took_s = if request.emitted == 0 {
                    self.costs.layers.seconds(tokens.len())
                } else {
                    request.rows_up += tokens.len() as u64;
                    let decided = texts[index].prompt_rows as u32 + request.emitted;
                    self.level_seconds(id, (decided - 1, tokens[0]), tokens.len())
                };
                (id, took_s)
            }
            DeviceWork::Head { request: id, position, moves, verdict, .. } => {
                moves.clear();
                if let Verdict::Argmax(argmax) = verdict {
                    let tokens = &texts[self.requests[&id]].tokens;
                    *argmax = Some((tokens[position as usize + 1], 0.0));
                }
                (id, self.head_seconds(id, idle))
            }
            DeviceWork::Draft(work) => {
                let id = work.request();
                work.run();
                let took_s = std::mem::take(&mut open(&self.desk).seconds);
                let is_ahead = |round: &Round| {
                    round.heads == 0 && round.levels > 0 && round.levels <= round.ahead
                };
                (id, if self.rounds.get(&id).is_some_and(is_ahead) { 0.0 } else { took_s })
            }
            DeviceWork::Tail { .. } => unreachable!("the cloud has the last layers"),
        };
        let took = time(took_s);
        self.busy += took;
        if let Some(round) = self.rounds.get_mut(&id).filter(|round| round.heads == 0) {
            round.idle_at = idle;
        }
        took
    }

    /// Seconds to compute this many rows of a tree; `root` is the place and the token of the first
    /// if these are the first of a round.
    fn level_seconds(&mut self, request: RequestId, root: (u32, TokenId), rows: usize) -> f64 {
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
    fn head_seconds(&mut self, request: RequestId, idle: Duration) -> f64 {
        let away = self.rounds.values().filter(|round| round.heads == 0).count().max(1);
        let round = self.rounds.entry(request).or_default();
        if round.heads == 0 {
            let spare = idle.saturating_sub(round.idle_at);
            round.spare_s = spare.as_nanos() as f64 * 1e-9 / away as f64;
        }
        round.heads += 1;
        match round.heads - 1 {
            before if self.policy.heads_together && before > 0 => {
                self.costs.head.seconds(before + 1) - self.costs.head.seconds(before)
            }
            _ => self.costs.head.seconds(1),
        }
    }
}
