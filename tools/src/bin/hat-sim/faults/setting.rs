//! Settings that a seed draws at the start: sizes, speeds, bounds, requests, and the schedule of
//! faults.

use std::time::Duration;

use hat_core::chunk::ChunkPolicy;
use hat_core::draft::DraftMode;
use hat_core::page::pages_for;
use hat_core::sequence::PENDING_ROWS_MAX;
use hat_emulator::simulated::Conditions;
use hat_loader::TinyModel;
use hat_plan::{PAGE_SIZE, TokenId};
use hat_transport::codec::Codec;
use hat_transport::frame::FRAME_BYTES_MAX;
use hat_transport::planted::Planted;
use hat_transport::pool::PoolConfig;
use hat_transport::random::SeededRandom;

use super::ledger::{LAYERS, WIDTH_MIN};
use super::real::SPLIT;
use crate::bed::Node;

/// Behaviour of a cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Honest,
    /// It answers PING, and nothing else.
    Mute,
    /// It takes sessions, and evicts them at their first row.
    Evicts,
    /// It has no room, ever.
    Refuses,
    /// It does one of these at each frame.
    Fickle,
}

/// Something that is done to the bed.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// Somebody asks for answer number so.
    Ask(usize),
    /// Nobody wants it any more.
    Cancel(usize),
    /// Some socket breaks; chance says how.
    Break(u64),
    /// Nothing arrives over some socket for a while.
    Stall(u64, Duration),
    /// A process stands still.
    Stop(Node, Duration),
    /// All of them do: the clock jumps.
    Jump(Duration),
    /// A process ends, and begins again after a while.
    End(Node, Duration),
    /// It begins again.
    Begin(Node),
    /// The device's backend does not compute what it is asked next; `true`: ever after.
    DeviceFault(usize, bool),
    /// The same for a stage of the cloud.
    StageFault(usize, bool),
    /// A stage of the cloud does not end its next step.
    StageHangs(usize),
    /// From here on nothing goes wrong.
    Quiet,
    /// The world is looked at.
    Look,
}

/// Settings of a device.
#[derive(Clone, Debug)]
pub struct DeviceSetting {
    /// Its cloud.
    pub cloud: usize,
    pub split: usize,
    pub has_tail: bool,
    pub codec: Codec,
    pub sessions_max: usize,
    pub kv_rows_max: usize,
    pub step_rows_max: u32,
    pub chunks: ChunkPolicy,
    pub prefix: bool,
    pub drafter: bool,
    pub reconnect: Duration,
    /// Time of a row, and of a computation beside it.
    pub row: Duration,
    pub call: Duration,
    pub pool: [u32; 2],
}

/// A request.
#[derive(Clone, Debug)]
pub struct Asked {
    pub device: usize,
    pub prompt: Vec<TokenId>,
    pub tokens: u32,
    pub draft: DraftMode,
    /// True if all logits are looked at.
    pub hashes: bool,
}

/// Settings of all clouds.
#[derive(Clone, Debug)]
pub struct CloudSetting {
    /// Of the first one; the others are honest.
    pub manner: Manner,
    pub stages: usize,
    pub pages: u32,
    pub row_budget: u32,
    pub sessions_max: u32,
    pub idle_after: Duration,
    pub step_within: Duration,
    pub grace: Duration,
    pub pool: [u32; 2],
    /// Time of a row, and of a step beside it.
    pub row: Duration,
    pub step: Duration,
}

/// A world before anything has happened.
#[derive(Clone, Debug)]
pub struct Setting {
    pub seed: u64,
    /// True if its models are real.
    pub is_real: bool,
    pub width: usize,
    pub alphabet: u32,
    pub clouds: usize,
    pub cloud: CloudSetting,
    /// Nothing goes wrong: every request has its answer.
    pub calm: bool,
    pub conditions: Conditions,
    pub devices: Vec<DeviceSetting>,
    pub asked: Vec<Asked>,
    /// A fault in both roles, to see that it is found.
    pub planted: Planted,
    pub schedule: Vec<(Duration, Act)>,
    /// Time at which quiet begins.
    pub quiet_at: Duration,
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Fewest rows of a chunk.
const PIECE_ROWS: u32 = 8;
/// Longest pause that a cloud without room is believed.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Most rows of a request.
const ROWS_MAX: usize = 190;

/// Pages that are enough for any request.
fn pages_of_one() -> usize {
    pages_for(ROWS_MAX + PENDING_ROWS_MAX)
}

/// Draws.
struct Draw(SeededRandom);

impl Draw {
    fn below(&mut self, bound: u64) -> u64 {
        self.0.below(bound)
    }

    fn once_in(&mut self, times: u64) -> bool {
        self.0.below(times) == 0
    }

    fn within(&mut self, low: u32, high: u32) -> u32 {
        low + u32::try_from(self.0.below(u64::from(high - low) + 1)).expect("below a u32")
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.0.below(all.len() as u64) as usize]
    }

    /// A time below `most`; short ones are as likely as long ones.
    fn time(&mut self, most: Duration) -> Duration {
        let bits = self.0.below(u64::from(most.as_micros().max(1).ilog2() + 1));
        Duration::from_micros(self.0.below(2 << bits)).min(most)
    }

    fn device(&mut self, calm: bool, clouds: usize) -> DeviceSetting {
        let has_tail = self.once_in(5);
        let sessions_max = self.within(1, 3);
        let pages = self.within(1, sessions_max) as usize * pages_of_one();
        let chunks = match self.below(4) {
            0 => ChunkPolicy::Off,
            1 => ChunkPolicy::Fixed(self.of(&[8, 16, 64])),
            2 => ChunkPolicy::Paper,
            _ => ChunkPolicy::Auto,
        };
        DeviceSetting {
            cloud: self.below(clouds as u64) as usize,
            split: self.of(&[1, 1, 2]),
            has_tail,
            codec: self.of(&Codec::ALL),
            sessions_max: sessions_max as usize,
            kv_rows_max: pages * PAGE_SIZE - PENDING_ROWS_MAX,
            step_rows_max: self.of(&[16, 40, 64, 512]),
            chunks,
            prefix: !self.once_in(4),
            drafter: !self.once_in(3),
            reconnect: if calm { ms(600_000) } else { ms(1000 * self.of(&[2, 8, 30])) },
            row: Duration::from_micros(1 << self.below(10)),
            call: Duration::from_micros(10 << self.below(9)),
            pool: [self.of(&[64, 200, 512]), self.of(&[24, 64, 256])],
        }
    }

    fn asked(&mut self, device: usize, alphabet: u32, common: &[TokenId]) -> Asked {
        let own = self.within(1, 60);
        let tokens = if self.once_in(3) { 30 } else { 8 };
        let shared = self.of(&[0, 0, 33, 64, 100]);
        let mut prompt = common[..shared].to_vec();
        prompt.extend((0..own).map(|_| 300 + self.within(0, alphabet - 1)));
        Asked {
            device,
            prompt,
            tokens: self.within(1, tokens),
            draft: self.of(&DraftMode::ALL),
            hashes: self.once_in(8),
        }
    }

    fn trouble(&mut self, devices: usize, clouds: usize) -> Act {
        let device = self.below(devices as u64) as usize;
        let cloud = self.below(clouds as u64) as usize;
        let node = if self.once_in(2) { Node::Device(device) } else { Node::Cloud(cloud) };
        let lasts = self.once_in(3);
        match self.below(32) {
            0..14 => Act::Break(self.0.next_u64()),
            14..18 => Act::Stall(self.0.next_u64(), self.time(ms(8000))),
            18..21 => Act::Stop(node, self.time(ms(8000))),
            21 => Act::Jump(self.time(ms(8000))),
            22..26 => Act::End(node, self.time(ms(3000))),
            26..28 => Act::DeviceFault(device, lasts),
            28..30 => Act::StageFault(cloud, lasts),
            30 => Act::StageHangs(cloud),
            _ => Act::Cancel(usize::MAX),
        }
    }
}

impl Asked {
    /// Times that something new may come of it: a piece of its prompt, or a token.
    pub fn news(&self) -> u32 {
        self.tokens + u32::try_from(self.prompt.len()).expect("few").div_ceil(PIECE_ROWS)
    }
}

impl DeviceSetting {
    /// The layer before which its rows come back.
    pub fn exit(&self) -> usize {
        LAYERS - usize::from(self.has_tail)
    }

    pub fn pool(&self) -> PoolConfig {
        PoolConfig { small: self.pool[0], large: self.pool[1] }
    }
}

impl Setting {
    /// Bytes that a cloud lets a device send: two chunks, since less would never see the end of
    /// one.
    pub fn window_bytes(&self) -> usize {
        let chunk = self.cloud.row_budget as usize * (4 * self.width + 4);
        (2 * chunk).max(2 * FRAME_BYTES_MAX)
    }

    /// Buffers of a cloud: the windows of its devices have room in them.
    pub fn cloud_pool(&self) -> PoolConfig {
        let windows = self.devices.len() * self.window_bytes() / FRAME_BYTES_MAX;
        let needed = u32::try_from(2 * windows).expect("few") + 16;
        PoolConfig { small: self.cloud.pool[0], large: self.cloud.pool[1].max(needed) }
    }

    /// The world of a seed.
    pub fn draw(seed: u64) -> Self {
        let mut draw = Draw(SeededRandom::new(seed.wrapping_mul(0xD134_2543_DE82_EF95) ^ 0x5EED));
        let manner = match draw.below(48) {
            0 => Manner::Mute,
            1 => Manner::Evicts,
            2 => Manner::Refuses,
            3 => Manner::Fickle,
            _ => Manner::Honest,
        };
        let calm = manner == Manner::Honest && draw.once_in(6);
        let alphabet = draw.of(&[2, 3, 8, 100]);
        let clouds = draw.of(&[1, 1, 1, 2]);
        let count = draw.within(1, 3);
        let devices: Vec<_> = (0..count).map(|_| draw.device(calm, clouds)).collect();
        let common: Vec<TokenId> = (0..100).map(|_| 300 + draw.within(0, alphabet - 1)).collect();
        let asked: Vec<_> = (0..devices.len())
            .flat_map(|device| {
                let count = draw.within(1, 3);
                (0..count).map(move |_| device)
            })
            .collect();
        let asked: Vec<_> =
            asked.into_iter().map(|device| draw.asked(device, alphabet, &common)).collect();
        let slowest = 1 << draw.below(17);
        let rate = 0..=1 << draw.below(13);
        let one = u32::try_from(pages_of_one()).expect("few");
        let mut setting = Self {
            seed,
            is_real: false,
            width: draw.of(&[WIDTH_MIN, WIDTH_MIN, 32, 64, 64, 256, 1024, 4096]),
            alphabet,
            clouds,
            cloud: CloudSetting {
                manner,
                stages: draw.of(&[1, 1, 2]),
                pages: draw.within(one, one * 4),
                row_budget: draw.of(&[16, 40, 128, 512]),
                sessions_max: draw.of(&[1, 2, 64]),
                idle_after: ms(u64::from(draw.within(if calm { 5000 } else { 200 }, 5000))),
                step_within: ms(1000 * u64::from(draw.within(5, 20))),
                grace: ms(1000 * u64::from(draw.within(1, 20))),
                pool: [draw.of(&[200, 1000, 4096]), draw.of(&[64, 200, 1000])],
                row: Duration::from_micros(1 << draw.below(9)),
                step: Duration::from_micros(100 << draw.below(8)),
            },
            calm,
            conditions: Conditions {
                latency_us: 10..=10 + slowest,
                ns_per_byte: [rate.clone(), rate],
                cuts: true,
            },
            planted: Planted::default(),
            schedule: Vec::new(),
            quiet_at: Duration::ZERO,
            devices,
            asked,
        };
        setting.plan(&mut draw, slowest);
        setting
    }

    /// Time that all requests take one after the other, each with all rows that may pend and once
    /// more for a session that is lost, and with a pause.
    pub fn explained(&self) -> Duration {
        let cloud = &self.cloud;
        let latency = Duration::from_micros(*self.conditions.latency_us.end());
        let byte = Duration::from_nanos(*self.conditions.ns_per_byte[0].end());
        let of = |asked: &Asked| {
            let device = &self.devices[asked.device];
            let rows = asked.prompt.len() + asked.tokens as usize * (1 + PENDING_ROWS_MAX);
            let rows = u32::try_from(rows).expect("few");
            let bytes = u32::try_from(4 * self.width).expect("rows are narrow");
            // Layers, drafter and head.
            let of_row = 3 * (device.row + device.call) + cloud.row + 2 * bytes * byte;
            let steps = u32::try_from(cloud.stages).expect("few") * cloud.step;
            2 * (rows * of_row + asked.news() * (4 * latency + steps)) + PAUSE_MAX
        };
        self.asked.iter().map(of).sum()
    }

    /// The same over real models, of one width and split, for which nobody drafts.
    pub fn on_real_models(mut self) -> Self {
        (self.is_real, self.width) = (true, TinyModel::default().hidden);
        for device in &mut self.devices {
            (device.split, device.drafter) = (SPLIT, false);
        }
        self
    }

    /// Draws who asks when, and what goes wrong.
    fn plan(&mut self, draw: &mut Draw, slowest_us: u64) {
        let round = 4 * Duration::from_micros(slowest_us) + 4 * self.cloud.step;
        let tokens: u32 = self.asked.iter().map(|asked| asked.tokens).sum();
        let span = ms(20) + round * (tokens / 2 + 4 * self.asked.len() as u32);
        for number in 0..self.asked.len() {
            self.schedule.push((draw.time(span), Act::Ask(number)));
        }
        let troubles = if self.calm { 0 } else { draw.below(10) };
        for _ in 0..troubles {
            let act = match draw.trouble(self.devices.len(), self.clouds) {
                Act::Cancel(_) => Act::Cancel(draw.below(self.asked.len() as u64) as usize),
                other => other,
            };
            let at = Duration::from_nanos(draw.below(span.as_nanos() as u64));
            self.schedule.push((at, act));
        }
        self.schedule.sort_by_key(|(at, _)| *at);
        self.quiet_at = span + ms(10_000);
    }
}
