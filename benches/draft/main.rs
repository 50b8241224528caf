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
use hat_benches::{codec, millis, pair, start_link};
use hat_compute::MiddleModel;
use hat_compute::open;
use hat_emulator::Emulator;
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
    #[arg(long, value_parser = codec)]
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

/// Measurements of one answer.
#[derive(Clone)]
struct Answered {
    tokens: Vec<u32>,
    timings: Timings,
    /// Seconds of the cloud's steps after the prompt's.
    steps: f64,
}

impl Answered {
    /// Tokens after the first.
    fn after_first(&self) -> f64 {
        f64::from(self.timings.predicted_n.saturating_sub(1))
    }

    /// Seconds that they took.
    fn seconds(&self) -> f64 {
        let rate = self.timings.tokens_per_second;
        if rate > 0.0 { self.after_first() / rate } else { 0.0 }
    }

    /// Seconds that can't be avoided with so many rounds and drafts.
    fn bound(&self, args: &Args) -> f64 {
        let Self { timings, steps, .. } = self;
        let rounds = f64::from(timings.rounds);
        let link = args.rtt_ms.map_or(0.0, |rtt| {
            let prompt_bytes = u64::from(timings.prompt_n) * args.row_bytes;
            let bytes = timings.bytes_up.saturating_sub(prompt_bytes);
            rounds * rtt.as_secs_f64() + bytes as f64 * 8e-6 / args.mbit.0
        });
        // Steps that run while others are waited for do not count twice.
        let steps = args.cloud_step_ms.map_or(*steps, |step| rounds * step.as_secs_f64());
        link + steps + (timings.drafting_ms + timings.head_ms) / 1e3
    }
}

/// The line of one mode over the prompts of one category.
fn print(answers: &[Answered], args: &Args, mode: DraftMode, category: &str) {
    let sum = |of: &dyn Fn(&Answered) -> f64| answers.iter().map(of).sum::<f64>();
    let (tokens, seconds) = (sum(&Answered::after_first), sum(&Answered::seconds));
    let rounds = sum(&|answer| f64::from(answer.timings.rounds));
    let per_round = |count: f64| count / rounds.max(1.0);
    println!(
        "{:<7} {category:<16} {:>4} {tokens:>7} {rounds:>7} {:>7.2} {:>8.2} {:>7.2} {:>7.2} \
         {:>8.2} {:>8.2} {:>5.1}% {:>9} {:>10}",
        mode.name(),
        answers.len(),
        per_round(tokens),
        per_round(sum(&|answer| f64::from(answer.timings.draft_n))),
        per_round(sum(&|answer| f64::from(answer.timings.draft_n_tested))),
        per_round(sum(&|answer| f64::from(answer.timings.draft_n_accepted))),
        seconds * 1e3 / tokens.max(1.0),
        sum(&|answer| answer.bound(args)) * 1e3 / tokens.max(1.0),
        100.0 * sum(&|answer| answer.timings.drafting_ms / 1e3) / seconds,
        sum(&|answer| answer.timings.bytes_up as f64),
        sum(&|answer| answer.timings.bytes_down as f64),
    );
}

fn answer(engine: &Engine, cloud: &Cloud, request: Request) -> Answered {
    let steps = || cloud.counters().step_us.load(Ordering::Relaxed) as f64 / 1e6;
    let mut before = None;
    let metrics = hat_benches::answer(engine, request, |event| {
        if let Event::Token { .. } = event {
            before.get_or_insert_with(steps);
        }
    });
    let steps = before.map_or(0.0, |before| steps() - before);
    Answered { tokens: metrics.token_ids, timings: metrics.timings, steps }
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

fn open_engine(args: &Args, bundle: &Path, cloud: SocketAddr) -> Engine {
    let mut config = EngineConfig::new(bundle.join("device")).threads(args.threads).prefix(false);
    config.cloud = CloudAddress::Remote(cloud.to_string());
    config.wire = args.wire;
    Engine::open(config).expect("the engine opens")
}

const HEAD: &str = "mode    category            n  tokens  rounds  tok/rd \
    draft/rd test/rd  acc/rd   ms/tok    bound  draft  bytes up bytes down";

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
    let link = |_| Some(start_link(cloud.address(), args.rtt_ms?, args.mbit));
    let links: Vec<_> = args.modes.iter().map(link).collect();
    let engines: Vec<_> = (args.modes.iter().zip(&links))
        .map(|(mode, link)| {
            let address = link.as_ref().map_or(cloud.address(), Emulator::address);
            (*mode, open_engine(&args, &bundle, address))
        })
        .collect();
    let device = Bundle::open(&bundle.join("device")).expect("the device's half");
    let codec = engines.first().map_or(Codec::default(), |(_, engine)| engine.wire());
    args.row_bytes = codec.row_bytes(device.config().hidden_size) as u64;
    let mut all: BTreeMap<(usize, String), Vec<Answered>> = BTreeMap::new();
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
            for of in [category.as_str(), "~ all"] {
                all.entry((index, of.to_owned())).or_default().push(answered.clone());
            }
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
    println!("{HEAD}");
    for ((index, category), answers) in &all {
        print(answers, &args, engines[*index].0, category);
    }
}
