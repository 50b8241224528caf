//! Tokens per round trip on a file of prompts, for each way of drafting.
//!
//! `cargo bench -p hat-benches --bench draft -- PROMPTS.jsonl [--every N] [--tokens N]
//! [--modes off,lookup,tree] [--split-layer N] [--threads N] [--rtt-ms N [--mbit UP,DOWN]]`
//!
//! A line of the file is an object with `turns` (the first is asked, through the chat template) and
//! `category`. Answers are greedy and end by themselves or after `--tokens`. Modes take turns
//! prompt by prompt, so times compare; both roles run on this machine, over loopback or, with
//! `--rtt-ms`, over an emulated link. The bound of a time is that of a round with one row, `off`:
//! what a mode saves is round trips, what it costs is the rows of its drafts. Tokens per round are
//! (tokens - 1) / rounds, summed over prompts.

use std::collections::BTreeMap;
use std::time::Duration;

use hat_engine::options::{CloudAddress, DraftMode, Timings};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Event, Request, pull};
use hat_transport::emulator::{Calibration, Emulator, EmulatorConfig};

/// What the command line says.
struct Args {
    path: String,
    every: usize,
    tokens: u32,
    modes: Vec<DraftMode>,
    split_layer: usize,
    threads: usize,
    rtt: Option<Duration>,
    mbit: (f64, f64),
}

const USAGE: &str = "PROMPTS.jsonl [--every N] [--tokens N] [--modes off,lookup,..] \
                     [--split-layer N] [--threads N] [--rtt-ms N] [--mbit UP,DOWN]";

impl Args {
    fn parse(mut args: impl Iterator<Item = String>) -> Option<Self> {
        let mut parsed = Self {
            path: String::new(),
            every: 1,
            tokens: 128,
            modes: vec![DraftMode::Off, DraftMode::Lookup, DraftMode::Tree],
            split_layer: pull::SPLIT_LAYER_DEFAULT,
            threads: 1,
            rtt: None,
            mbit: (60.0, 100.0),
        };
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--bench" => {}
                "--every" => parsed.every = args.next()?.parse().ok().filter(|every| *every > 0)?,
                "--tokens" => parsed.tokens = args.next()?.parse().ok()?,
                "--split-layer" => parsed.split_layer = args.next()?.parse().ok()?,
                "--threads" => parsed.threads = args.next()?.parse().ok()?,
                "--rtt-ms" => parsed.rtt = Some(Duration::from_millis(args.next()?.parse().ok()?)),
                "--mbit" => {
                    let rates = args.next()?;
                    let (up, down) = rates.split_once(',')?;
                    parsed.mbit = (up.parse().ok()?, down.parse().ok()?);
                }
                "--modes" => {
                    let modes = args.next()?;
                    parsed.modes =
                        modes.split(',').map(str::parse).collect::<Result<_, _>>().ok()?;
                }
                _ if arg.starts_with('-') => return None,
                _ => parsed.path = arg,
            }
        }
        (!parsed.path.is_empty()).then_some(parsed)
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
    seconds: f64,
}

impl Sums {
    fn add(&mut self, timings: &Timings) {
        let after_first = timings.predicted_n.saturating_sub(1);
        self.prompts += 1;
        self.tokens += after_first;
        self.rounds += timings.rounds;
        self.drafted += timings.draft_n;
        self.tested += timings.draft_n_tested;
        self.accepted += timings.draft_n_accepted;
        self.bytes_up += timings.bytes_up;
        if timings.tokens_per_second > 0.0 {
            self.seconds += f64::from(after_first) / timings.tokens_per_second;
        }
    }

    fn line(&self, mode: DraftMode, category: &str) {
        let per_round = |count: u32| f64::from(count) / f64::from(self.rounds.max(1));
        println!(
            "{:<7} {category:<16} {:>4} {:>7} {:>7} {:>7.2} {:>7.2} {:>7.2} {:>7.2} {:>8.2} {:>9}",
            mode.name(),
            self.prompts,
            self.tokens,
            self.rounds,
            per_round(self.tokens),
            per_round(self.drafted),
            per_round(self.tested),
            per_round(self.accepted),
            self.seconds * 1e3 / f64::from(self.tokens.max(1)),
            self.bytes_up,
        );
    }
}

fn answer(engine: &Engine, request: Request) -> (Vec<u32>, Timings) {
    for event in engine.generate(request).expect("a good request") {
        if let Event::Done { metrics, .. } = event.expect("an answer") {
            return (metrics.token_ids, metrics.timings);
        }
    }
    unreachable!("an answer ends with Done")
}

fn main() {
    let Some(args) = Args::parse(std::env::args().skip(1)) else {
        println!("draft: nothing measured without prompts; arguments: {USAGE}");
        return;
    };
    let text = std::fs::read_to_string(&args.path).expect("the file of prompts");
    let cache = pull::cache_dir().expect("a cache directory");
    let bundle = pull::default_bundle(&cache, args.split_layer, 0).expect("the default model");
    let cloud = CloudConfig::new(bundle.join("cloud")).threads(args.threads);
    let cloud = Cloud::start(cloud).expect("the cloud starts");
    // An engine a mode, on a link of its own: what one learns is nothing to the others.
    let mut links = Vec::new();
    let mut engines = Vec::new();
    for mode in &args.modes {
        let mut address = cloud.address();
        if let Some(rtt) = args.rtt {
            let mut config = EmulatorConfig::new(address).rtt(rtt).mbit(args.mbit.0, args.mbit.1);
            config.calibration = Some(Calibration::measure(&config).expect("a link"));
            let link = Emulator::start(config).expect("a link");
            address = link.address();
            links.push(link);
        }
        let mut config = EngineConfig::new(bundle.join("device")).threads(args.threads);
        config.cloud = CloudAddress::Remote(address.to_string());
        engines.push((*mode, Engine::open(config).expect("the engine opens")));
    }
    let mut sums: BTreeMap<(usize, String), Sums> = BTreeMap::new();
    let prompts: Vec<_> = prompts(&text).into_iter().step_by(args.every).collect();
    for (done, (category, prompt)) in prompts.iter().enumerate() {
        let mut said = None;
        for (index, (mode, engine)) in engines.iter().enumerate() {
            let request = Request::chat(prompt).max_tokens(args.tokens).draft(*mode);
            let (tokens, timings) = answer(engine, request);
            sums.entry((index, category.clone())).or_default().add(&timings);
            sums.entry((index, "~ all".into())).or_default().add(&timings);
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
    println!(
        "{:<7} {:<16} {:>4} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>8} {:>9}",
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
        "bytes up"
    );
    for ((index, category), sums) in &sums {
        sums.line(engines[*index].0, category);
    }
}
