//! Chunks of a prompt: what a plan costs, and what it is worth.
//!
//!     cargo bench -p hat-benches --bench chunk -- [--measure] [--tiny] [--rows N] [--rounds N]
//!         [--wire f16,int8] [--chunks off,32,128,512,paper,auto] [--mbit UP,DOWN] [--rtt-ms N]
//!         [--stages N] [--cloud-us FIXED,PER_ROW]
//!
//! Planning: the bound is a millisecond for 4,096 rows at a grain of 32. With `--measure`, the
//! default model's TTFT over an emulated link, policies in turn, all against the first policy of
//! the list in pairs of one round. Its bound is the largest of upload, device and cloud, each
//! alone, and one round trip: bytes up over the rate, and the device's and the cloud's own
//! estimates of their time. Both roles run on this machine. `--tiny` takes a generated model with
//! rows of 64 numbers instead: over a slow link it shows the overlap where computing is next to
//! nothing, also on a machine that is busy with other things. `--cloud-us` takes a cloud whose
//! steps wait and compute nothing, as a GPU's look from here: the cores are the device's own.

use std::hint::black_box;
use std::time::Duration;

use clap::Parser;
use hat_benches::{
    answer, codec, cores, default_bundle, millis, pair, prompt, seconds, spread, start_link,
};
use hat_core::chunk::{Ahead, ChunkPolicy, CostModel, GRAIN_DEFAULT, Limits, Planner, StepCost};
use hat_engine::options::{CloudAddress, Codec, DraftMode, Timings};
use hat_engine::testkit::{open_cloud_bundle, pool_pages};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig};
use hat_loader::tiny_bundle;
use hat_plan::{Computes, MiddleForward, MiddleStep};

/// Arguments of the command line.
#[derive(Parser)]
struct Args {
    #[arg(long)]
    measure: bool,
    #[arg(long)]
    tiny: bool,
    #[arg(long, default_value_t = 1000)]
    rows: usize,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    #[arg(long, value_delimiter = ',', value_parser = codec, default_value = "f16,int8")]
    wire: Vec<Codec>,
    #[arg(long, value_delimiter = ',', default_value = "auto,32,64,128,256,off,paper")]
    chunks: Vec<ChunkPolicy>,
    #[arg(long, value_parser = pair, default_value = "60,100")]
    mbit: (f64, f64),
    #[arg(long, value_parser = millis, default_value = "10")]
    rtt_ms: Duration,
    #[arg(long, default_value_t = 1)]
    stages: usize,
    #[arg(long, value_parser = pair)]
    cloud_us: Option<(f64, f64)>,
}

/// A run of layers that takes its time and computes nothing.
struct Waits {
    fixed_us: f64,
    row_us: f64,
}

impl Computes for Waits {
    fn describe(&self) -> String {
        format!("{} us and {} us a row", self.fixed_us, self.row_us)
    }
}

impl MiddleForward for Waits {
    fn forward(&mut self, step: &mut MiddleStep) {
        let micros = self.fixed_us + self.row_us * step.plan.rows() as f64;
        std::thread::sleep(Duration::from_secs_f64(micros * 1e-6));
    }
}

/// The cloud that is asked for: the bundle's layers, or what waits as long as it is told to.
fn cloud(args: &Args, config: CloudConfig) -> Result<Cloud, hat_engine::Error> {
    let Some((fixed_us, row_us)) = args.cloud_us else { return Cloud::start(config) };
    let bundle = open_cloud_bundle(&config)?;
    let part = args.stages as f64;
    let stage = || -> Box<dyn MiddleForward> {
        Box::new(Waits { fixed_us: fixed_us / part, row_us: row_us / part })
    };
    let stages = std::iter::repeat_with(stage).take(args.stages).collect();
    let pages = pool_pages(&config);
    Cloud::serve_stages(config, &bundle, stages, pages)
}

fn main() {
    let args: Args = hat_benches::arguments();
    planning();
    if args.measure {
        args.wire.iter().for_each(|wire| measure(&args, *wire));
    }
}

/// Costs of a phone's link before a GPU, of two slow ends, and of three equal places.
fn regimes() -> [(&'static str, CostModel); 4] {
    let link = CostModel {
        device: StepCost { fixed: 2e-3, per_row: 60e-6, ..StepCost::default() },
        frame_s: 0.5e-3,
        row_up_s: 1.1e-3,
        up_latency_s: 5e-3,
        cloud: StepCost { fixed: 6e-3, per_row: 90e-6, per_row_context: 20e-9 },
        stages: 1,
        cloud_wait_s: 2e-3,
        return_s: 8e-3,
    };
    let compute = CostModel {
        row_up_s: 10e-6,
        cloud: StepCost { fixed: 5e-3, per_row: 1.2e-3, per_row_context: 0.3e-6 },
        ..link
    };
    let balanced = CostModel {
        device: StepCost { fixed: 1e-3, per_row: 1e-3, ..StepCost::default() },
        row_up_s: 1e-3,
        cloud: StepCost { fixed: 4e-3, per_row: 0.9e-3, per_row_context: 50e-9 },
        ..link
    };
    let stages =
        CostModel { stages: 4, cloud: StepCost { per_row: 4e-3, ..balanced.cloud }, ..balanced };
    [("link", link), ("compute", compute), ("balanced", balanced), ("4 stages", stages)]
}

fn planning() {
    println!("== a plan of 4,096 rows at a grain of 32; bound 1 ms");
    println!(
        "regime     step rows   ms (least - most)   evaluated   finish: auto, best size, paper"
    );
    let mut planner = Planner::default();
    for (name, costs) in regimes() {
        for rows_max in [512, 4096] {
            let limits = Limits { rows_max, ..Limits::default() };
            let mut plan = || {
                let (policy, ahead) = (ChunkPolicy::Auto, Ahead::default());
                black_box(planner.plan(policy, &costs, &limits, ahead, 0, 4096));
            };
            let ms = spread((0..50).map(|_| 1e3 * seconds(&mut plan)));
            let evaluated = planner.evaluated();
            let mut finish = |policy| {
                planner.plan(policy, &costs, &limits, Ahead::default(), 0, 4096).finish_s * 1e3
            };
            let sizes = (GRAIN_DEFAULT..=rows_max).map(ChunkPolicy::Fixed);
            let best = sizes.map(&mut finish).fold(f64::INFINITY, f64::min);
            println!(
                "{name:<10} {rows_max:9}   {ms}   {evaluated:9}   {:.1}, {best:.1}, {:.1} ms",
                finish(ChunkPolicy::Auto),
                finish(ChunkPolicy::Paper),
            );
        }
    }
}

fn measure(args: &Args, wire: Codec) {
    let threads = cores();
    let scratch = std::env::temp_dir().join(format!("hat-bench-chunk-{}", std::process::id()));
    let bundle = if args.tiny {
        tiny_bundle(&scratch).expect("a place for a small model")
    } else {
        default_bundle()
    };
    let cloud = CloudConfig::new(bundle.join("cloud")).threads(threads).stages(args.stages);
    let cloud = self::cloud(args, cloud).expect("the cloud starts");
    let mut links = Vec::new();
    let mut engines = Vec::new();
    for policy in &args.chunks {
        let link = start_link(cloud.address(), args.rtt_ms, args.mbit);
        let mut config = EngineConfig::new(bundle.join("device")).threads(threads).prefix(false);
        config = config.wire(wire).chunks(*policy);
        config.cloud = CloudAddress::Remote(link.address().to_string());
        links.push(link);
        engines.push(Engine::open(config).expect("the engine opens"));
    }
    let mut timings: Vec<Vec<Timings>> = vec![Vec::new(); engines.len()];
    // The first round warms the maps and teaches the planner.
    for round in 0..=args.rounds {
        for turn in 0..engines.len() {
            let index = (round + turn) % engines.len();
            let request = prompt(args.rows).draft(DraftMode::Off);
            let timed = answer(&engines[index], request, |_| {}).timings;
            if round > 0 {
                timings[index].push(timed);
            }
        }
    }
    println!(
        "== {} rows as {}, {} threads, cloud {}, {:.0} Mbit/s up, round trip {:.0} ms, {} rounds",
        args.rows,
        wire.name(),
        threads,
        cloud.describe(),
        args.mbit.0,
        args.rtt_ms.as_secs_f64() * 1e3,
        args.rounds
    );
    println!("chunks  TTFT ms (least - most)       / first  expected  bound  chunks of the last");
    for ((policy, engine), timed) in args.chunks.iter().zip(&engines).zip(&timings) {
        let ttft = spread(timed.iter().map(|timing| timing.ttft_ms));
        let pairs = timed.iter().zip(&timings[0]).map(|(this, first)| this.ttft_ms / first.ttft_ms);
        let last = timed.last().expect("at least one round");
        println!(
            "{:<6} {ttft:<28.1} {:6.3}   {:7.1}  {:6.1}  {:?}",
            policy.to_string(),
            spread(pairs).median,
            last.ttft_predicted_ms,
            bound_ms(args, engine, last),
            last.chunks,
        );
        if let Some(costs) = engine.metrics().estimates.chunk {
            println!("       estimates: {}", estimates(&costs));
        }
    }
    if args.tiny {
        let _ = std::fs::remove_dir_all(&scratch);
    }
}

/// Costs that a plan assumes, as text.
fn estimates(costs: &CostModel) -> String {
    let us = |seconds: f64| seconds * 1e6;
    let CostModel { device, cloud, .. } = costs;
    format!(
        "device {:.0} + {:.1} us a row, up {:.0} + {:.1} and {:.0} away, cloud {:.0} + {:.1} and \
         {:.4} a row before, waits {:.0}, back {:.0}",
        us(device.fixed),
        us(device.per_row),
        us(costs.frame_s),
        us(costs.row_up_s),
        us(costs.up_latency_s),
        us(cloud.fixed),
        us(cloud.per_row),
        us(cloud.per_row_context),
        us(costs.cloud_wait_s),
        us(costs.return_s),
    )
}

/// The slowest place alone, and a round trip.
fn bound_ms(args: &Args, engine: &Engine, timings: &Timings) -> f64 {
    let upload_ms = timings.bytes_up as f64 * 8.0 / args.mbit.0 / 1e3;
    let rows = timings.prompt_n;
    let compute_ms =
        engine.metrics().estimates.chunk.map_or(0.0, |costs| {
            costs.device.seconds(rows, 0).max(costs.cloud.seconds(rows, 0)) * 1e3
        });
    upload_ms.max(compute_ms) + args.rtt_ms.as_secs_f64() * 1e3
}
