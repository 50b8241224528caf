//! Tokens per round trip on a file of prompts, for each way of drafting.
//!
//! `cargo bench -p hat-benches --bench draft -- PROMPTS.jsonl [--every N] [--tokens N]
//! [--modes off,lookup,tree] [--split-layer N] [--threads N] [--rtt-ms N [--mbit UP,DOWN]]
//! [--cloud-step-ms X] [--temperature X] [--wire CODEC] [--bundle DIR]`
//!
//! A line of the file is an object with `turns` (the first is asked, through the chat template) and
//! `category`. Answers are greedy, or sampled with seeds 0, 1 and so on, and end by themselves or
//! after `--tokens`. Without `--bundle` the default model says them. Modes take turns
//! prompt by prompt, so times compare; both roles run on this machine, over loopback or, with
//! `--rtt-ms`, over an emulated link; with `--cloud-step-ms` the cloud answers from memory, each
//! step in that time, as a GPU would. Tokens per round are (tokens - 1) / rounds, summed over
//! prompts. The bound beside a time is what the round trips, the bytes up, the cloud's steps, the
//! drafting and the LM head of that very run add up to, had nothing else taken any time and only
//! what hangs on one another been waited for: (rounds * (RTT + step) + bytes up / rate + drafting
//! + head) / tokens.

mod memory;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::{CommandFactory as _, Parser};
use hat_benches::{millis, pair};
use hat_compute::MiddleModel;
use hat_compute::open;
use hat_emulator::{Calibration, Emulator, EmulatorConfig};
use hat_engine::options::{CloudAddress, Codec, DraftMode, Processor, SamplerConfig, Timings};
use hat_engine::testkit::{open_cloud_bundle, pool_pages};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Event, Request};
use hat_loader::{Bundle, Submodel};
use hat_program::pull;

use crate::memory::{FromMemory, Learning};

/// Arguments of the command line.
#[derive(Parser)]
struct Args {
    #[arg(value_name = "PROMPTS.jsonl")]
    path: Option<PathBuf>,
    #[arg(long, default_value_t = NonZero::<usize>::MIN)]
    every: NonZero<usize>,
    #[arg(long, default_value_t = 128)]
    tokens: u32,
    #[arg(long, value_delimiter = ',', default_value = "off,lookup,tree")]
    modes: Vec<DraftMode>,
    #[arg(long, default_value_t = pull::SPLIT_LAYER_DEFAULT)]
    split_layer: usize,
    #[arg(long, default_value_t = 1)]
    threads: usize,
    #[arg(long, value_parser = millis)]
    rtt_ms: Option<Duration>,
    #[arg(long, value_parser = pair, default_value = "60,100")]
    mbit: (f64, f64),
    #[arg(long, value_parser = millis)]
    cloud_step_ms: Option<Duration>,
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    #[arg(long, value_parser = |name: &str| Codec::from_name(name).ok_or("no codec"))]
    wire: Option<Codec>,
    #[arg(long)]
    bundle: Option<PathBuf>,
    /// Bytes of a row on the wire.
    #[arg(skip)]
    row_bytes: u64,
}

impl Args {
    /// Request for a prompt, without drafts.
    fn request(&self, prompt: &str, seed: usize) -> Request {
        let (temperature, seed) = (self.temperature, seed as u64);
        let sampler = SamplerConfig { temperature, seed, ..SamplerConfig::default() };
        let request = Request::chat(prompt).max_tokens(self.tokens).sampler(sampler);
        request.draft(DraftMode::Off)
    }
}

/// Category and first turn of each line.
fn prompts(text: &str) -> Vec<(String, String)> {
    let prompt = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line is JSON");
        let category = line["category"].as_str().expect("category").to_owned();
        (category, line["turns"][0].as_str().expect("turns").to_owned())
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(prompt).collect()
}

/// Sums of one mode over the prompts of one category.
#[derive(Clone, Copy, Default)]
struct Sums {
    prompts: u32,
    tokens: u32,
    rounds: u32,
    drafted: u32,
    tested: u32,
    accepted: u32,
    bytes_up: u64,
    bytes_down: u64,
    prompt: u64,
    seconds: f64,
    steps: f64,
    drafting: f64,
    head: f64,
}

/// Measurements of one answer.
struct Answered {
    tokens: Vec<u32>,
    timings: Timings,
    /// Seconds of the cloud's steps after the prompt's.
    steps: f64,
}

impl Sums {
    fn add(&mut self, Answered { timings, steps, .. }: &Answered) {
        self.prompt += u64::from(timings.prompt_n);
        self.steps += steps;
        self.drafting += timings.drafting_ms / 1e3;
        self.head += timings.head_ms / 1e3;
        let after_first = timings.predicted_n.saturating_sub(1);
        self.prompts += 1;
        self.tokens += after_first;
        self.rounds += timings.rounds;
        self.drafted += timings.draft_n;
        self.tested += timings.draft_n_tested;
        self.accepted += timings.draft_n_accepted;
        self.bytes_up += timings.bytes_up;
        self.bytes_down += timings.bytes_down;
        if timings.tokens_per_second > 0.0 {
            self.seconds += f64::from(after_first) / timings.tokens_per_second;
        }
    }

    /// Seconds that can't be avoided with so many rounds and drafts.
    fn bound(&self, args: &Args) -> f64 {
        let rounds = f64::from(self.rounds);
        let link = args.rtt_ms.map_or(0.0, |rtt| {
            let bytes = self.bytes_up.saturating_sub(self.prompt * args.row_bytes);
            rounds * rtt.as_secs_f64() + bytes as f64 * 8e-6 / args.mbit.0
        });
        // Steps that run while others are waited for do not count twice.
        let steps = match args.cloud_step_ms {
            Some(step) => rounds * step.as_secs_f64(),
            None => self.steps,
        };
        link + steps + self.drafting + self.head
    }

    fn line(&self, args: &Args, mode: DraftMode, category: &str) {
        let per_round = |count: u32| f64::from(count) / f64::from(self.rounds.max(1));
        println!(
            "{:<7} {category:<16} {:>4} {:>7} {:>7} {:>7.2} {:>8.2} {:>7.2} {:>7.2} {:>8.2} \
             {:>8.2} {:>5.1}% {:>9} {:>10}",
            mode.name(),
            self.prompts,
            self.tokens,
            self.rounds,
            per_round(self.tokens),
            per_round(self.drafted),
            per_round(self.tested),
            per_round(self.accepted),
            self.seconds * 1e3 / f64::from(self.tokens.max(1)),
            self.bound(args) * 1e3 / f64::from(self.tokens.max(1)),
            100.0 * self.drafting / self.seconds,
            self.bytes_up,
            self.bytes_down,
        );
    }
}

fn answer(engine: &Engine, cloud: &Cloud, request: Request) -> Answered {
    let steps = || cloud.counters().step_us.load(Ordering::Relaxed) as f64 / 1e6;
    let mut before = None;
    for event in engine.generate(request).expect("a good request") {
        match event.expect("an answer") {
            Event::Token { .. } => _ = before.get_or_insert_with(steps),
            Event::Done { metrics, .. } => {
                let steps = before.map_or(0.0, |before| steps() - before);
                let (tokens, timings) = (metrics.token_ids, metrics.timings);
                return Answered { tokens, timings, steps };
            }
            _ => {}
        }
    }
    unreachable!("an answer ends with Done")
}

/// The cloud that the arguments ask for, and what makes it learn.
fn start_cloud(args: &Args, bundle: &Path) -> (Cloud, Option<Learning>) {
    let config = CloudConfig::new(bundle.join("cloud")).threads(args.threads);
    let Some(step_time) = args.cloud_step_ms else {
        return (Cloud::start(config).expect("the cloud starts"), None);
    };
    let half = open_cloud_bundle(&config).expect("the cloud's half");
    let (pages, rows) = (pool_pages(&config), config.limits.step_rows_max as usize);
    let backend = open::cpu(Processor::Auto, args.threads).expect("a CPU");
    let layers = half.split().layers(Submodel::Middle);
    let middle = MiddleModel::load(backend, &half, layers, rows, pages as usize).expect("layers");
    let learning = Learning::new();
    let hidden_size = half.config().hidden_size;
    let model = FromMemory::new(Box::new(middle), hidden_size, step_time, learning.clone());
    let cloud = Cloud::serve(config, &half, Box::new(model), pages).expect("the cloud starts");
    (cloud, Some(learning))
}

/// The link that the arguments ask for, if any.
fn start_link(args: &Args, cloud: SocketAddr) -> Option<Emulator> {
    let mut config = EmulatorConfig::new(cloud).rtt(args.rtt_ms?).mbit(args.mbit.0, args.mbit.1);
    config.calibration = Some(Calibration::measure(&config).expect("a link"));
    Some(Emulator::start(config).expect("a link"))
}

fn open_engine(args: &Args, bundle: &Path, cloud: SocketAddr) -> Engine {
    let mut config = EngineConfig::new(bundle.join("device")).threads(args.threads).prefix(false);
    config.cloud = CloudAddress::Remote(cloud.to_string());
    config.wire = args.wire;
    Engine::open(config).expect("the engine opens")
}

fn print_head() {
    println!(
        "{:<7} {:<16} {:>4} {:>7} {:>7} {:>7} {:>8} {:>7} {:>7} {:>8} {:>8} {:>6} {:>9} {:>10}",
        "mode",
        "category",
        "n",
        "tokens",
        "rounds",
        "tok/rd",
        "draft/rd",
        "test/rd",
        "acc/rd",
        "ms/tok",
        "bound",
        "draft",
        "bytes up",
        "bytes down"
    );
}

fn main() {
    let mut args: Args = hat_benches::arguments();
    let Some(path) = &args.path else {
        println!("draft: nothing measured without prompts; {}", Args::command().render_usage());
        return;
    };
    let text = std::fs::read_to_string(path).expect("the file of prompts");
    let bundle = args.bundle.clone().unwrap_or_else(|| {
        let cache = pull::cache_dir().expect("a cache directory");
        pull::default_bundle(&cache, args.split_layer, 0).expect("the default model")
    });
    let (cloud, learning) = start_cloud(&args, &bundle);
    let teacher = learning.as_ref().map(|_| open_engine(&args, &bundle, cloud.address()));
    // An engine a mode, on a link of its own: what one learns is nothing to the others.
    let links: Vec<_> = args.modes.iter().map(|_| start_link(&args, cloud.address())).collect();
    let engines: Vec<_> = (args.modes.iter().zip(&links))
        .map(|(mode, link)| {
            let address = link.as_ref().map_or(cloud.address(), Emulator::address);
            (*mode, open_engine(&args, &bundle, address))
        })
        .collect();
    let device = Bundle::open(&bundle.join("device")).expect("the device's half");
    let codec = engines.first().map_or(Codec::default(), |(_, engine)| engine.wire());
    args.row_bytes = codec.row_bytes(device.config().hidden_size) as u64;
    let mut sums: BTreeMap<(usize, String), Sums> = BTreeMap::new();
    let prompts: Vec<_> = prompts(&text).into_iter().step_by(args.every.get()).collect();
    for (done, (category, prompt)) in prompts.iter().enumerate() {
        let mut said = None;
        if let Some((learning, teacher)) = learning.as_ref().zip(teacher.as_ref()) {
            learning.set(true);
            said = Some(answer(teacher, &cloud, args.request(prompt, done)).tokens);
            learning.set(false);
        }
        for (index, (mode, engine)) in engines.iter().enumerate() {
            let request = args.request(prompt, done).draft(*mode);
            let answered = answer(engine, &cloud, request);
            sums.entry((index, category.clone())).or_default().add(&answered);
            sums.entry((index, "~ all".into())).or_default().add(&answered);
            let Answered { tokens, timings, .. } = answered;
            let said = said.get_or_insert_with(|| tokens.clone());
            assert_eq!(&tokens, said, "{} says something else", mode.name());
            eprintln!(
                "{}/{} {category}, {}: {} tokens, {:.2} a round",
                done + 1,
                prompts.len(),
                mode.name(),
                tokens.len(),
                timings.accept_len
            );
        }
    }
    print_head();
    for ((index, category), sums) in &sums {
        sums.line(&args, engines[*index].0, category);
    }
}
