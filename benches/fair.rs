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

use clap::Parser;
use hat_benches::{answer, prompt, spread};
use hat_core::chunk::ChunkPolicy;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Event, Request};

/// Arguments of the command line.
#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    #[arg(long, default_value_t = 3000)]
    rows: usize,
    #[arg(long, default_value_t = 24)]
    tokens: u32,
    #[arg(long, value_delimiter = ',', default_value = "1,4")]
    shorts: Vec<usize>,
    #[arg(long, default_value_t = 2)]
    answers: usize,
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    chunks: Vec<ChunkPolicy>,
    #[arg(long, default_value_t = 1)]
    devices: usize,
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
    let (mut last, mut longest) = (None, Duration::ZERO);
    let timings = answer(engine, request, |event| {
        if let Event::Token { .. } = event {
            let now = Instant::now();
            longest = longest.max(now.duration_since(last.replace(now).unwrap_or(now)));
        }
    })
    .timings;
    Seen {
        ttft_ms: timings.ttft_ms,
        token_ms: 1e3 / timings.tokens_per_second,
        longest_gap_ms: longest.as_secs_f64() * 1e3,
    }
}

/// TTFT of a prompt that no other is like, in milliseconds.
fn long(engine: &Engine, rows: usize, begun: &AtomicBool) -> f64 {
    let metrics = answer(engine, prompt(rows), |event| {
        begun.fetch_or(matches!(event, Event::Prefill { .. }), Ordering::SeqCst);
    });
    metrics.timings.ttft_ms
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

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    spread(values).median
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
        println!("prompt alone, TTFT ms             {:.2}", spread(self.prompt_ms.clone()));
        print_seen("short alone", &self.alone);
        for (count, result) in args.shorts.iter().zip(&self.besides) {
            print_seen(&format!("{count} short beside the prompt"), &result.seen);
            println!("  time a token / alone (<= 5)     {:.2}", spread(result.token_ratio.clone()));
            println!("  prompt's TTFT / alone (<= 1.5)  {:.2}", spread(result.ttft_ratio.clone()));
        }
    }

    /// Its figures over those of `first`, round by round.
    fn print_over(&self, args: &Args, first: &Self) {
        println!("== {} over {}, pairs of one round", self.chunks, first.chunks);
        let over = |name: &str, ours: &[f64], theirs: &[f64]| {
            let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs);
            println!("{name}{:.2}", spread(ratios));
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

fn main() {
    let (args, bundle): (Args, _) = (hat_benches::arguments(), hat_benches::default_bundle());
    let open = |&chunks: &ChunkPolicy| Policy::new(&bundle, &args, chunks);
    let mut policies: Vec<Policy> = args.chunks.iter().map(open).collect();
    let count = policies.len();
    for round in 0..args.rounds {
        (0..count).for_each(|turn| policies[(round + turn) % count].round(&args));
    }
    policies.iter().for_each(|policy| policy.print(&args));
    if let [first, others @ ..] = &policies[..] {
        others.iter().for_each(|policy| policy.print_over(&args, first));
    }
}

fn print_seen(name: &str, seen: &[Seen]) {
    println!("{name}: {} answers", seen.len());
    println!(
        "  ms a token                      {:.2}",
        spread(seen.iter().map(|one| one.token_ms))
    );
    let gaps = seen.iter().map(|one| one.longest_gap_ms);
    println!("  longest gap, ms                 {:.2}", spread(gaps));
    println!("  TTFT, ms                        {:.2}", spread(seen.iter().map(|one| one.ttft_ms)));
}
