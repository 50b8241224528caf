//! Short answers beside a long prompt, and what the long prompt pays for them.
//!
//!     cargo bench -p hat-benches --bench fair -- [--rounds N] [--rows N] [--tokens N]
//!         [--shorts N,N] [--answers N] [--chunks 128,auto] [--devices 1|2]
//!
//! The default model, device and cloud on this machine over loopback, runs in turn: one short
//! answer alone; a long prompt alone; then, for each number of `--shorts`, the long prompt with so
//! many users beside it, who have `--answers` short answers each, one after another (0: until the
//! prompt's first token). With `--devices 2` the
//! long prompt is another device's. Ratios are those of one round: time between tokens beside the
//! prompt over that alone (bound: 5), the prompt's TTFT beside them over that alone (bound: 1.5).
//! Policies of `--chunks` take turns in each round, and each one's figures are also put over the
//! first one's of the same round.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hat_core::chunk::ChunkPolicy;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Event, Request};
use hat_program::pull;

struct Args {
    rounds: usize,
    rows: usize,
    tokens: u32,
    shorts: Vec<usize>,
    answers: usize,
    chunks: Vec<ChunkPolicy>,
    devices: usize,
}

impl Args {
    fn parse(mut args: impl Iterator<Item = String>) -> Option<Self> {
        let mut parsed = Self {
            rounds: 3,
            rows: 3000,
            tokens: 24,
            shorts: vec![1, 4],
            answers: 2,
            chunks: vec![ChunkPolicy::default()],
            devices: 1,
        };
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--bench" => {}
                "--rounds" => parsed.rounds = args.next()?.parse().ok()?,
                "--rows" => parsed.rows = args.next()?.parse().ok()?,
                "--tokens" => parsed.tokens = args.next()?.parse().ok()?,
                "--answers" => parsed.answers = args.next()?.parse().ok()?,
                "--devices" => parsed.devices = args.next()?.parse().ok()?,
                "--shorts" => parsed.shorts = list(&args.next()?)?,
                "--chunks" => parsed.chunks = list(&args.next()?)?,
                _ => return None,
            }
        }
        Some(parsed)
    }
}

fn list<T: std::str::FromStr>(text: &str) -> Option<Vec<T>> {
    text.split(',').map(|one| one.parse().ok()).collect()
}

/// One answer as a user sees it.
#[derive(Clone, Copy, Default)]
struct Seen {
    ttft_ms: f64,
    /// Milliseconds a token after the first.
    token_ms: f64,
    /// Between two events with text.
    longest_gap_ms: f64,
}

fn short(engine: &Engine, tokens: u32) -> Seen {
    let request = Request::chat("Tell me about the sea.").max_tokens(tokens).ignore_eos();
    let (began, mut last, mut longest) = (Instant::now(), None, Duration::ZERO);
    for event in engine.generate(request).expect("a good request") {
        match event.expect("an answer") {
            Event::Token { .. } => {
                let now = Instant::now();
                longest = longest.max(now.duration_since(last.unwrap_or(now)));
                last = Some(now);
            }
            Event::Done { metrics, .. } => {
                let ttft_ms = metrics.timings.ttft_ms;
                let whole_ms = began.elapsed().as_secs_f64() * 1e3;
                return Seen {
                    ttft_ms,
                    token_ms: (whole_ms - ttft_ms) / f64::from(tokens - 1),
                    longest_gap_ms: longest.as_secs_f64() * 1e3,
                };
            }
            _ => {}
        }
    }
    unreachable!("an answer ends with Done")
}

/// TTFT of a prompt that no other is like, in milliseconds.
fn long(engine: &Engine, rows: usize, begun: &AtomicBool) -> f64 {
    let tokens = (0..rows).map(|index| (index * 7919 % 200 + 10) as u32).collect();
    let request = Request::tokens(tokens).max_tokens(1).ignore_eos();
    for event in engine.generate(request).expect("a good request") {
        match event.expect("an answer") {
            Event::Prefill { .. } => begun.store(true, Ordering::SeqCst),
            Event::Done { metrics, .. } => return metrics.timings.ttft_ms,
            _ => {}
        }
    }
    unreachable!("an answer ends with Done")
}

/// The long prompt with `count` short answers at a time beside it.
fn beside(engines: &Engines, args: &Args, count: usize) -> (f64, Vec<Seen>) {
    let (begun, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let long = scope.spawn(|| {
            let ttft_ms = long(engines.long(), args.rows, &begun);
            ended.store(true, Ordering::SeqCst);
            ttft_ms
        });
        while !begun.load(Ordering::SeqCst) && !long.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let shorts: Vec<_> = (0..count)
            .map(|_| {
                scope.spawn(|| {
                    let mut seen = vec![];
                    let more = |had: usize| args.answers == 0 || had < args.answers;
                    while more(seen.len()) && !ended.load(Ordering::SeqCst) {
                        seen.push(short(&engines.device, args.tokens));
                    }
                    seen
                })
            })
            .collect();
        let seen = shorts.into_iter().flat_map(|short| short.join().expect("answers")).collect();
        (long.join().expect("an answer"), seen)
    })
}

struct Engines {
    device: Engine,
    other: Option<Engine>,
    _cloud: Cloud,
}

impl Engines {
    fn open(bundle: &Path, args: &Args, chunks: ChunkPolicy) -> Self {
        let cloud = Cloud::start(CloudConfig::new(bundle.join("cloud"))).expect("the cloud starts");
        let device = || {
            let mut config = EngineConfig::new(bundle.join("device"));
            config = config.cloud(cloud.address().to_string()).chunks(chunks).prefix(false);
            config.limits.sessions_max = 8;
            Engine::open(config).expect("the engine opens")
        };
        let other = (args.devices > 1).then(device);
        Self { device: device(), other, _cloud: cloud }
    }

    fn long(&self) -> &Engine {
        self.other.as_ref().unwrap_or(&self.device)
    }
}

/// Median, least and largest.
fn spread(values: impl IntoIterator<Item = f64>) -> String {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match values[..] {
        [] => "none".to_owned(),
        [least, .., largest] => {
            format!("{:.2} ({least:.2} - {largest:.2})", values[values.len() / 2])
        }
        [only] => format!("{only:.2}"),
    }
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Figures of `shorts` short answers beside the prompt, over the rounds.
#[derive(Default)]
struct Beside {
    /// Medians of a round's answers.
    token_ms: Vec<f64>,
    gap_ms: Vec<f64>,
    ttft_ms: Vec<f64>,
    token_ratio: Vec<f64>,
    ttft_ratio: Vec<f64>,
    seen: Vec<Seen>,
}

fn main() {
    let Some(args) = Args::parse(std::env::args().skip(1)) else {
        println!("fair: an argument is not understood; see the top of benches/fair.rs");
        return;
    };
    let cache = pull::cache_dir().expect("a cache directory");
    let bundle = pull::default_bundle(&cache, pull::SPLIT_LAYER_DEFAULT, 0).expect("the model");
    measure(&bundle, &args);
}

/// Figures of one policy, round by round.
struct Policy {
    chunks: ChunkPolicy,
    engines: Engines,
    alone: Vec<Seen>,
    /// TTFT of the prompt alone.
    prompt_ms: Vec<f64>,
    besides: Vec<Beside>,
}

impl Policy {
    fn new(bundle: &Path, args: &Args, chunks: ChunkPolicy) -> Self {
        let engines = Engines::open(bundle, args, chunks);
        // Warms the maps, and teaches both sides what steps cost.
        short(&engines.device, args.tokens);
        long(engines.long(), args.rows / 4, &AtomicBool::new(false));
        let besides = args.shorts.iter().map(|_| Beside::default()).collect();
        Self { chunks, engines, alone: vec![], prompt_ms: vec![], besides }
    }

    fn round(&mut self, args: &Args) {
        let engines = &self.engines;
        let alone: Vec<Seen> = (0..5).map(|_| short(&engines.device, args.tokens)).collect();
        let token_ms = median(alone.iter().map(|seen| seen.token_ms));
        self.alone.extend(alone);
        let prompt_ms = long(engines.long(), args.rows, &AtomicBool::new(false));
        self.prompt_ms.push(prompt_ms);
        for (&count, result) in args.shorts.iter().zip(&mut self.besides) {
            let (ttft_ms, seen) = beside(engines, args, count);
            let beside_ms = median(seen.iter().map(|seen| seen.token_ms));
            result.token_ms.push(beside_ms);
            result.gap_ms.push(median(seen.iter().map(|seen| seen.longest_gap_ms)));
            result.ttft_ms.push(ttft_ms);
            result.token_ratio.push(beside_ms / token_ms);
            result.ttft_ratio.push(ttft_ms / prompt_ms);
            result.seen.extend(seen);
        }
    }

    fn print(&self, args: &Args) {
        println!(
            "== {} rows beside {} answers of {} tokens a user, chunks {}, {} device(s), \
             {} rounds; median (least - largest)",
            args.rows, args.answers, args.tokens, self.chunks, args.devices, args.rounds
        );
        println!("prompt alone, TTFT ms             {}", spread(self.prompt_ms.clone()));
        print_seen("short alone", &self.alone);
        for (count, result) in args.shorts.iter().zip(&self.besides) {
            print_seen(&format!("{count} short beside the prompt"), &result.seen);
            println!("  time a token / alone (<= 5)     {}", spread(result.token_ratio.clone()));
            println!("  prompt's TTFT / alone (<= 1.5)  {}", spread(result.ttft_ratio.clone()));
        }
    }

    /// Its figures over those of `first`, round by round.
    fn print_over(&self, args: &Args, first: &Self) {
        println!("== {} over {}, pairs of one round", self.chunks, first.chunks);
        let over = |name: &str, ours: &[f64], theirs: &[f64]| {
            println!(
                "{name}{}",
                spread(ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs))
            );
        };
        over("prompt alone, TTFT                ", &self.prompt_ms, &first.prompt_ms);
        for ((count, ours), theirs) in args.shorts.iter().zip(&self.besides).zip(&first.besides) {
            println!("{count} short beside the prompt");
            over("  time a token                    ", &ours.token_ms, &theirs.token_ms);
            over("  longest gap                     ", &ours.gap_ms, &theirs.gap_ms);
            over("  prompt's TTFT                   ", &ours.ttft_ms, &theirs.ttft_ms);
        }
    }
}

fn measure(bundle: &Path, args: &Args) {
    let open = |&chunks: &ChunkPolicy| Policy::new(bundle, args, chunks);
    let mut policies: Vec<Policy> = args.chunks.iter().map(open).collect();
    let count = policies.len();
    for round in 0..args.rounds {
        (0..count).for_each(|turn| policies[(round + turn) % count].round(args));
    }
    policies.iter().for_each(|policy| policy.print(args));
    if let [first, others @ ..] = &policies[..] {
        others.iter().for_each(|policy| policy.print_over(args, first));
    }
}

fn print_seen(name: &str, seen: &[Seen]) {
    println!("{name}: {} answers", seen.len());
    println!("  ms a token                      {}", spread(seen.iter().map(|one| one.token_ms)));
    let gaps = seen.iter().map(|one| one.longest_gap_ms);
    println!("  longest gap, ms                 {}", spread(gaps));
    println!("  TTFT, ms                        {}", spread(seen.iter().map(|one| one.ttft_ms)));
}
