//! One seed's world from its first request to the silence after the last, and what must hold in it.

use std::ops::Range;
use std::time::Duration;

use hat_core::answer::Prepared;
use hat_core::cloud::{CloudCore, CloudCoreConfig, CloudFigures};
use hat_core::device::{DeviceConfig, DeviceCore, Done, PageNamer, RequestEvent, RequestId};
use hat_core::page::pages_for;
use hat_core::request::{Event, Request};
use hat_core::sequence::PENDING_ROWS_MAX;
use hat_core::wire::{BundleFacts, hello};
use hat_core::{PeerEvent, RequestError};
use hat_emulator::simulated::Break;
use hat_plan::TokenId;
use hat_transport::endpoint::{Endpoint, EndpointConfig};
use hat_transport::message::{Hello, Role};
use hat_transport::pool::PoolConfig;
use hat_transport::random::SeededRandom;

use super::failure::Failure;
use super::ledger::{self, DeviceLedger, LAYERS, Ledger};
use super::models::{DeviceModel, Models, Seen, StageModel, is_honest};
use super::proposer::Proposer;
use super::real::Real;
use super::setting::{Act, Asked, CloudSetting, DeviceSetting, Manner, Setting};
use crate::bed::{Bed, Happened, Node};

/// Tokens that there are; none of them ends an answer, and none has a text.
const VOCAB: usize = 512;
/// Pause between two looks at a world that is to be quiet.
const LOOK: Duration = Duration::from_millis(500);
/// Time without news after which a request ends, in times of what its device waits for a cloud.
const BUDGET: u32 = 4;
/// Time after the last request in which everything is given back.
const QUIET_WITHIN: Duration = Duration::from_secs(120);

/// An answer on its way, and the one that is right.
struct Answered {
    id: Option<RequestId>,
    right: Vec<TokenId>,
    got: Vec<TokenId>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nobody asks for it.
    Never,
    /// It will be asked for.
    Later,
    Runs,
    Done,
    Failed,
    /// Its device has ended.
    Lost,
    Cancelled,
}

impl Answered {
    fn is_wrong(&self, request: usize) -> Failure {
        Failure::Text { request, right: self.right.clone(), got: self.got.clone() }
    }
}

/// The world of a seed.
pub struct Simulation<'a> {
    setting: &'a Setting,
    bed: Bed<Act>,
    models: Models,
    answers: Vec<Answered>,
    /// True if somebody may stand still for long.
    stalls: bool,
    /// Time at which the last request had ended, as far as it was seen.
    ended_at: Duration,
    /// Each device's backend was lost, or did not compute.
    faulted: Vec<bool>,
}

fn device_pages(device: &DeviceSetting) -> usize {
    pages_for(device.kv_rows_max + PENDING_ROWS_MAX)
}

/// Runs a seed's world through a schedule.
///
/// # Errors
/// The invariant that did not hold.
pub fn simulate(
    setting: &Setting,
    schedule: &[(Duration, Act)],
    real: Option<&Real>,
) -> Result<Seen, Failure> {
    let mut simulation =
        Simulation::new(setting, real).map_err(|error| Failure::Model(error.to_string()))?;
    for (at, act) in schedule {
        simulation.bed.act_in(*at, *act);
        simulation.stalls |=
            matches!(act, Act::Stop(..) | Act::Stall(..) | Act::Jump(_) | Act::StageHangs(_));
        if let Act::Ask(number) = act {
            simulation.answers[*number].state = State::Later;
        }
    }
    simulation.bed.act_in(setting.quiet_at, Act::Quiet);
    simulation.simulate()?;
    Ok(simulation.seen())
}

impl<'a> Simulation<'a> {
    fn new(setting: &'a Setting, real: Option<&Real>) -> anyhow::Result<Self> {
        let (width, alphabet) = (setting.width, setting.alphabet);
        let device_model = |device: &DeviceSetting| -> anyhow::Result<_> {
            if let Some(real) = real {
                return Ok(DeviceModel::Real(real.device(device.has_tail)?));
            }
            let pages = device_pages(device);
            let input = Ledger::new(0..device.split, pages, width);
            let tail = device.has_tail.then(|| Ledger::new(device.exit()..LAYERS, pages, width));
            Ok(DeviceModel::Ledger(DeviceLedger { input, tail, alphabet }))
        };
        let cuts: Vec<Range<usize>> = match setting.cloud.stages {
            1 => std::iter::once(1..LAYERS).collect(),
            _ => vec![1..2, 2..LAYERS],
        };
        let cloud_model = || -> anyhow::Result<Vec<_>> {
            Ok(match real {
                Some(real) => real.cloud(&cuts)?.into_iter().map(StageModel::Real).collect(),
                None => {
                    let ledger = |cut: &Range<usize>| {
                        Ledger::new(cut.clone(), setting.cloud.pages as usize, width)
                    };
                    cuts.iter().map(ledger).map(StageModel::Ledger).collect()
                }
            })
        };
        let right = |asked: &Asked| match real {
            Some(real) => real.answer(asked, &setting.devices[asked.device]),
            None => Ok(ledger::answer(&asked.prompt, asked.tokens, alphabet)),
        };
        let devices = setting.devices.iter();
        let devices = devices.map(|device| Ok((device_model(device)?, device.clone())));
        let models = Models {
            devices: devices.collect::<anyhow::Result<_>>()?,
            clouds: (0..setting.clouds).map(|_| cloud_model()).collect::<anyhow::Result<_>>()?,
            manner: setting.cloud.manner,
            random: SeededRandom::new(setting.seed ^ 7),
            costs: [setting.cloud.row, setting.cloud.step],
            device_faults: vec![None; setting.devices.len()],
            stage_faults: vec![None; setting.clouds],
            hangs: vec![false; setting.clouds],
            seen: Seen::default(),
            wrong: None,
        };
        let answers = setting.asked.iter().map(|asked| {
            let (id, got, state) = (None, Vec::new(), State::Never);
            Ok(Answered { id, right: right(asked)?, got, state })
        });
        let mut simulation = Self {
            setting,
            bed: Bed::new(setting.conditions.clone(), setting.seed),
            models,
            answers: answers.collect::<anyhow::Result<_>>()?,
            stalls: false,
            ended_at: Duration::ZERO,
            faulted: vec![false; setting.devices.len()],
        };
        (0..setting.clouds).for_each(|cloud| simulation.begin_cloud(cloud));
        (0..setting.devices.len()).for_each(|device| simulation.begin_device(device));
        Ok(simulation)
    }

    fn begin_cloud(&mut self, cloud: usize) {
        let Setting { width, planted, cloud: ref setting, .. } = *self.setting;
        let CloudSetting { row_budget, sessions_max, idle_after, step_within, .. } = *setting;
        let own = Hello {
            row_budget,
            stages: u16::try_from(self.setting.cloud.stages).expect("few"),
            ..hello(Role::Cloud, [7; 32], width, 1..LAYERS as u32)
        };
        let config = CloudCoreConfig {
            sessions_max,
            sessions_per_device_max: sessions_max,
            context_max: 2000,
            idle_after,
            step_within,
        };
        let mut core = CloudCore::new(config, own, setting.pages, CloudFigures::default());
        let mut config = EndpointConfig::new(own);
        config.connection.window_bytes =
            u32::try_from(self.setting.window_bytes()).expect("rows are narrow");
        config.connection.planted = planted;
        config.grace = setting.grace;
        config.pool = self.setting.cloud_pool();
        core.plant(planted);
        self.bed.begin_cloud(cloud, core, self.setting.cloud.stages);
        self.bed.listen(cloud, config.into());
    }

    fn begin_device(&mut self, device: usize) {
        let setting = &self.setting.devices[device];
        let width = self.setting.width;
        let config = DeviceConfig {
            sessions_max: setting.sessions_max,
            kv_rows_max: setting.kv_rows_max,
            step_rows_max: setting.step_rows_max,
            chunks: setting.chunks,
            codec: setting.codec,
            reconnect: setting.reconnect,
            cloud: "the cloud".to_owned(),
        };
        let facts = BundleFacts {
            hidden_size: width,
            context: 2000,
            layers: setting.split as u32..setting.exit() as u32,
            model_id: [7; 32],
            has_tail: setting.has_tail,
        };
        let now = self.bed.now();
        let arithmetic = hat_plan::ARITHMETIC_CPU;
        let namer = PageNamer::new(setting.codec, &facts, arithmetic, [9; 32].into());
        let namer = namer.filter(|_| setting.prefix);
        let drafter = setting.drafter.then(|| {
            let random = SeededRandom::new(self.models.random.next_u64());
            let fails = !self.setting.calm;
            let facts = (width, setting.split, self.setting.alphabet);
            Box::new(Proposer::new(random, facts, fails)) as _
        });
        let mut core = DeviceCore::new(now, config, &facts, VOCAB, namer, drafter);
        core.plant(self.setting.planted);
        let own = hello(Role::Device, [7; 32], width, facts.layers);
        let mut config = EndpointConfig::new(own);
        config.connection.planted = self.setting.planted;
        config.pool = setting.pool();
        self.bed.begin_device(device, core, config.into(), (setting.cloud, 0));
    }

    /// Events so far.
    fn seen(&self) -> Seen {
        let mut seen = self.models.seen.clone();
        for cloud in &self.bed.clouds {
            let figures = cloud.core.figures();
            let CloudFigures { evicted, busy, dropped, pages_reused, .. } = figures;
            let times = [evicted, busy, dropped, pages_reused];
            let names = ["evicted", "busy", "dropped", "pages reused"];
            names.into_iter().zip(times).for_each(|(name, times)| seen.note(name, times));
        }
        seen
    }

    fn simulate(&mut self) -> Result<(), Failure> {
        while let Some(happened) = self.bed.next(&mut self.models) {
            if let Some(wrong) = self.models.wrong.take() {
                return Err(wrong);
            }
            match happened {
                Happened::Act(Act::Look) => {
                    if self.look()? {
                        return Ok(());
                    }
                }
                Happened::Act(act) => self.act(act),
                Happened::News { device, id, event } => self.hear(device, id, event)?,
                Happened::Spins { node } => return Err(Failure::Spins(node)),
                Happened::Ended { cloud } => {
                    let after = Duration::from_millis(200);
                    self.bed.act_in(after, Act::Begin(Node::Cloud(cloud)));
                }
            }
        }
        Err(Failure::Still)
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Ask(number) => self.ask(number),
            Act::Cancel(number) => {
                let answer = &mut self.answers[number];
                if let (State::Runs, Some(id)) = (answer.state, answer.id) {
                    answer.state = State::Cancelled;
                    self.models.seen.note("cancelled", 1);
                    self.bed.cancel(self.setting.asked[number].device, id);
                }
            }
            Act::Break(chance) => self.break_one(&mut SeededRandom::new(chance)),
            Act::Stall(chance, time) => {
                let sockets = self.bed.net.sockets();
                if let Some(socket) = sockets.get(chance as usize % sockets.len().max(1)) {
                    self.bed.net.stall(*socket, time);
                }
            }
            Act::Stop(node, time) => self.bed.stop_for(node, time),
            Act::Jump(time) => self.bed.jump(time),
            Act::End(node, time) => {
                match node {
                    Node::Device(device) => self.end_device(device),
                    Node::Cloud(cloud) => self.bed.end_cloud(cloud),
                }
                self.bed.act_in(time, Act::Begin(node));
            }
            Act::Begin(Node::Device(device)) => {
                if self.bed.devices[device].endpoint.is_none() {
                    self.begin_device(device);
                }
            }
            Act::Begin(Node::Cloud(cloud)) => {
                if self.bed.clouds[cloud].endpoint().is_none() {
                    self.begin_cloud(cloud);
                }
            }
            Act::DeviceFault(device, lasts) => {
                self.models.device_faults[device] = Some(lasts);
                self.faulted[device] = true;
            }
            Act::StageFault(cloud, lasts) => self.models.stage_faults[cloud] = Some(lasts),
            Act::StageHangs(cloud) => self.models.hangs[cloud] = true,
            Act::Quiet => {
                self.models.device_faults.fill(None);
                self.models.stage_faults.fill(None);
                self.models.hangs.fill(false);
                self.bed.act_in(LOOK, Act::Look);
            }
            Act::Look => {}
        }
    }

    fn ask(&mut self, number: usize) {
        let asked = &self.setting.asked[number];
        let request = Request::tokens(asked.prompt.clone()).max_tokens(asked.tokens);
        let mut request = request.draft(asked.draft);
        request.hash_logits = asked.hashes;
        let prepared = Prepared::new(request, asked.prompt.clone(), VOCAB, 2000);
        let prepared = prepared.expect("a request as it should be");
        if self.bed.devices[asked.device].endpoint.is_none() {
            // It is asked again when there is a device.
            return self.bed.act_in(LOOK, Act::Ask(number));
        }
        let answer = &mut self.answers[number];
        answer.state = State::Runs;
        answer.id = Some(self.bed.submit(asked.device, prepared, VOCAB));
    }

    fn end_device(&mut self, device: usize) {
        self.bed.end_device(device);
        for (answer, asked) in self.answers.iter_mut().zip(&self.setting.asked) {
            // The next core counts from the first number again.
            answer.id = answer.id.filter(|_| asked.device != device);
            if asked.device == device && answer.state == State::Runs {
                answer.state = State::Lost;
                self.models.seen.note("lost", 1);
            }
        }
    }

    fn break_one(&mut self, random: &mut SeededRandom) {
        let net = &self.bed.net;
        let sockets = net.sockets();
        let Some(&socket) = sockets.get(random.below(sockets.len().max(1) as u64) as usize) else {
            return;
        };
        let arrive = net.under_way(socket).map(|all| random.below(all as u64 + 1) as usize);
        let mut told = |most| Some(Duration::from_millis(random.below(most)));
        let (early, soon, late) = (told(500), told(500), told(20_000));
        let now = Some(Duration::ZERO);
        let how = match random.below(5) {
            0 => Break { arrive, told: [early, soon] },
            1 => Break { arrive: [usize::MAX, 0], told: [now, late] },
            2 => Break { arrive: [usize::MAX, 0], told: [now, None] },
            3 => Break { arrive: [0, usize::MAX], told: [late, now] },
            _ => Break { arrive, told: [None; 2] },
        };
        net.break_socket(socket, how);
    }

    fn hear(&mut self, device: usize, id: RequestId, event: RequestEvent) -> Result<(), Failure> {
        let is_it = |number: &usize| {
            self.setting.asked[*number].device == device && self.answers[*number].id == Some(id)
        };
        let Some(number) = (0..self.answers.len()).find(is_it) else { return Ok(()) };
        let answer = &mut self.answers[number];
        if answer.state != State::Runs {
            return Ok(());
        }
        let seen = &mut self.models.seen;
        match event {
            RequestEvent::Said(Event::Token { token, .. }) => {
                seen.note("tokens", 1);
                answer.got.push(token);
                if !answer.right.starts_with(&answer.got) {
                    return Err(answer.is_wrong(number));
                }
            }
            RequestEvent::Done(done) => {
                answer.state = State::Done;
                seen.note("done", 1);
                let Done { metrics, .. } = &*done;
                if metrics.token_ids != answer.right || answer.got != answer.right {
                    return Err(answer.is_wrong(number));
                }
            }
            RequestEvent::Failed(error) => {
                answer.state = State::Failed;
                seen.note("failed", 1);
                if !self.may_fail(device, &error) {
                    return Err(Failure::Error { request: number, error });
                }
            }
            RequestEvent::Runs | RequestEvent::Said(_) => {}
        }
        Ok(())
    }

    /// True if an error may come of the faults of this simulation.
    fn may_fail(&self, device: usize, error: &RequestError) -> bool {
        if self.setting.calm {
            return false;
        }
        match error {
            RequestError::Backend(_) => self.faulted[device],
            RequestError::Busy { .. } => true,
            RequestError::NotFinite { .. } | RequestError::Stopped(_) => false,
            RequestError::Peer { event, .. } => {
                !is_honest(self.setting.cloud.manner, &self.setting.devices[device])
                    || match event {
                        PeerEvent::Away | PeerEvent::Loses => true,
                        PeerEvent::Silent => self.stalls,
                        PeerEvent::Refuses | PeerEvent::Violates => false,
                    }
            }
        }
    }

    /// Looks at a world in which nothing goes wrong any more; true if everything is given back.
    fn look(&mut self) -> Result<bool, Failure> {
        self.bed.act_in(LOOK, Act::Look);
        let now = self.bed.elapsed();
        let is_open = |it: &Answered| matches!(it.state, State::Runs | State::Later);
        if let Some(number) = self.answers.iter().position(is_open) {
            self.ended_at = now;
            let waited = now - self.setting.quiet_at;
            return match waited > self.ends_within(self.setting.asked[number].device) {
                true => Err(Failure::Endless { request: number, waited }),
                false => Ok(false),
            };
        }
        let kept = self.kept();
        match now - self.ended_at > QUIET_WITHIN {
            true if !kept.is_empty() => Err(Failure::Kept(kept)),
            _ => Ok(kept.is_empty()),
        }
    }

    /// Time in which the requests of a device end once nothing goes wrong any more: what the plan
    /// explains, and, where not everything succeeds, the budget of each request, which a token or a
    /// row fills up if the cloud is one that brings some and then nothing.
    fn ends_within(&self, device: usize) -> Duration {
        let explained = self.setting.explained();
        if self.setting.calm {
            return explained;
        }
        let setting = &self.setting.devices[device];
        let is_honest = is_honest(self.setting.cloud.manner, setting);
        let of_device = self.setting.asked.iter().filter(|asked| asked.device == device);
        let news = |asked: &Asked| if is_honest { 0 } else { asked.news() };
        let budgets: u32 = of_device.map(|asked| 1 + news(asked)).sum();
        explained + BUDGET * setting.reconnect * budgets
    }

    /// Resources that are held and that nobody needs.
    fn kept(&self) -> Vec<String> {
        let mut kept = Vec::new();
        let buffers = |endpoint: &Endpoint, config: PoolConfig, connections: usize| {
            let (small, large) = endpoint.pool().free();
            let held = (config.small as usize - small) + (config.large as usize - large);
            // A connection has one for PING and its like, and its socket one to receive into.
            held.saturating_sub(2 * connections)
        };
        for (number, device) in self.bed.devices.iter().enumerate() {
            let Some(endpoint) = &device.endpoint else { continue };
            let setting = &self.setting.devices[number];
            let (core, pages) = (&device.core, device_pages(setting));
            let held = buffers(endpoint, setting.pool(), 1);
            if (core.running(), core.waiting(), core.pages_free(), held) != (0, 0, pages, 0) {
                let (runs, free) = (core.running(), core.pages_free());
                kept.push(format!(
                    "device {number}: {runs} requests, {free} of {pages} pages, {held} buffers"
                ));
            }
        }
        for (number, cloud) in self.bed.clouds.iter().enumerate() {
            let Some(endpoint) = cloud.endpoint() else { continue };
            if number == 0 && self.setting.cloud.manner != Manner::Honest {
                continue;
            }
            let CloudFigures { sessions, pages_free, .. } = cloud.core.figures();
            let connections = cloud.core.connections().count();
            let held = buffers(endpoint, self.setting.cloud_pool(), connections);
            let pages = u64::from(self.setting.cloud.pages);
            if (sessions, pages_free, held) != (0, pages, 0) || !cloud.is_idle() {
                kept.push(format!(
                    "cloud {number}: {sessions} sessions, {pages_free} of {pages} pages, {held} \
                     buffers, idle {}",
                    cloud.is_idle()
                ));
            }
        }
        kept
    }
}
