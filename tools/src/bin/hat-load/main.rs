//! `hat-load`: many devices at once against a real cloud, and what they see.

mod child;
mod cloud;
mod compare;
mod figures;
mod fleet;
mod plan;
mod prompts;
mod protocol;
mod role;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use hat_engine::options::{Address, ChunkPolicy, Codec, DraftMode, LinkKind};
use hat_engine::{CloudConfig, EngineConfig};
use hat_program::pull;
use hat_program::pull::models::{Cut, Model};
use hat_program::{note, out, outln};
use hat_tools::within;
use signal_hook::consts::{SIGINT, SIGTERM};
use tempfile::TempDir;
use tracing_subscriber::EnvFilter;

use crate::cloud::CloudProcess;
use crate::figures::Summary;
use crate::fleet::{Ended, Fleet};
use crate::plan::Plan;
use crate::prompts::{Lengths, Prompts};

/// Measures many devices against one cloud: latencies, fairness between devices, and the cloud's
/// memory.
///
/// Each device is the engine's own device role, in a process of its own.
/// Without --rate each device asks again as soon as it has its answer. Without --requests and
/// --seconds each device is asked ten times on average.
#[derive(Parser)]
#[command(name = "hat-load", version, allow_negative_numbers = true)]
struct Args {
    /// A cloud that runs already: HOST, HOST:PORT or PORT, on port 7433 unless it says another;
    /// without, one is started in a process of its own.
    #[arg(long, value_name = "ADDR", value_parser = cloud_address,
        conflicts_with_all = ["cloud_threads", "sessions_max", "kv_rows_max"])]
    cloud: Option<String>,
    /// A bundle made by hat-split, or a GGUF file or a Hugging Face directory, which is split into
    /// the cache on first use.
    #[arg(short = 'm', long, value_name = "MODEL", conflicts_with = "model")]
    bundle: Option<PathBuf>,
    /// Generated model to use without --bundle.
    #[arg(long, value_enum, default_value_t = Made::Tiny)]
    model: Made,
    /// Number of devices, 1 to 10000.
    #[arg(long, value_name = "N", default_value_t = 30)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    devices: u32,
    /// Requests a second over all devices, 0.001 to 100000, arriving as a Poisson process.
    #[arg(long, value_name = "R", value_parser = within(0.001, 1e5, "requests/s"))]
    rate: Option<f64>,
    /// Number of requests after which to stop, 1 and more.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// Seconds after which to stop, 0.1 to 1000000.
    #[arg(long, value_name = "S", value_parser = within(0.1, 1e6, "s"))]
    seconds: Option<f64>,
    /// File of prompts, used in rotation: a line of JSON each, with `prompt` or `turns`.
    #[arg(long, value_name = "FILE.jsonl")]
    prompts: Option<PathBuf>,
    /// Tokens of generated prompts: N, or FROM..TO, both included.
    #[arg(long, value_name = "LENGTHS", default_value = "16..256", conflicts_with = "prompts")]
    prompt_tokens: Lengths,
    /// Number of different generated prompts, used in turn; by default each request has its own.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    #[arg(conflicts_with = "prompts")]
    distinct: Option<u64>,
    /// Tokens of an answer, 1 to 1000000.
    #[arg(long, value_name = "N", default_value_t = 64)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_tokens: u32,
    /// End answers at an end-of-sequence token [default: at --max-tokens alone].
    #[arg(long)]
    eos: bool,
    /// Drafter: auto, off, chain, tree, lookup, stream or all.
    #[arg(long, value_name = "MODE", default_value = "auto")]
    draft: DraftMode,
    /// Sizes of prompt chunks: off, rows of a chunk, paper or auto.
    #[arg(long, value_name = "HOW", default_value = "auto")]
    chunks: ChunkPolicy,
    /// Codec of rows on the wire: f32, f16, int8 or int4.
    #[arg(long, value_name = "CODEC", default_value = "int8", value_parser = codec)]
    wire: Codec,
    /// Kind of the link: mio, or uring where there is one.
    #[arg(long, value_name = "LINK", default_value = "mio", value_parser = link)]
    link: LinkKind,
    /// Compute threads of a device.
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Compute threads of the cloud that is started [default: one for each core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    cloud_threads: Option<u16>,
    /// Sessions of the cloud that is started.
    #[arg(long, value_name = "N")]
    sessions_max: Option<u32>,
    /// Positions of all sessions together in the cloud that is started.
    #[arg(long, value_name = "N")]
    kv_rows_max: Option<u32>,
    /// Share of the answers that are cancelled before their end, 0 to 1.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    #[arg(value_parser = within(0.0, 1.0, "of the answers"))]
    cancel: f64,
    /// Devices come and go: mean life of one, seconds, 0.1 to 1000000. One half ends with a
    /// close frame, the other half is killed.
    #[arg(long, value_name = "S", value_parser = within(0.1, 1e6, "s"))]
    life_s: Option<f64>,
    /// Longest time to connect at first, in seconds, 0.1 to 1000000.
    #[arg(long, value_name = "S", default_value_t = 20.0, value_parser = within(0.1, 1e6, "s"))]
    connect_s: f64,
    /// Seed of arrivals, prompts, lifetimes and cancelled answers.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Compare the tokens of all answers with those of the whole model in one process.
    #[arg(long)]
    check_whole: bool,
    /// Print all figures as one line of JSON, the last.
    #[arg(long)]
    json: bool,
    /// Write plots (SVG) into this folder.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// Role of a child process of this tool.
    #[arg(long, hide = true, value_enum)]
    role: Option<Role>,
    /// The bundle, with both halves.
    #[arg(long, hide = true, default_value = ".")]
    role_bundle: PathBuf,
    /// The cloud's address.
    #[arg(long, hide = true, default_value = "")]
    role_cloud: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Made {
    /// Four layers of random numbers, made on the spot.
    Tiny,
    /// The engine's default model, fetched if it is not there.
    Default,
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    Cloud,
    Device,
}

/// The address of a cloud on this machine.
fn cloud_address(text: &str) -> Result<String, String> {
    let address = Address::parse(text, Address::CLOUD_PORT).map_err(|error| error.to_string())?;
    let checked = address.check_port("cloud").and_then(|()| address.check_local("cloud"));
    checked.map(|()| address.to_string()).map_err(|error| error.to_string())
}

fn link(text: &str) -> Result<LinkKind, &'static str> {
    match text {
        "mio" => Ok(LinkKind::Mio),
        "uring" => Ok(LinkKind::IoUring),
        _ => Err("allowed are mio and uring"),
    }
}

fn codec(text: &str) -> Result<Codec, String> {
    Codec::from_name(text).ok_or_else(|| "allowed are f32, f16, int8 and int4".to_owned())
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let args = match out::parse::<Args>() {
        Ok(args) => args,
        Err(ended) => return ended,
    };
    let ended = match args.role {
        Some(Role::Cloud) => role::cloud(args.cloud_config()),
        Some(Role::Device) => role::device(args.device_config(), &args.role_cloud, args.connect()),
        None => run(args),
    };
    out::finish("hat-load", ended)
}

fn run(mut args: Args) -> anyhow::Result<()> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, interrupted.clone())
            .context("can't wait for signals")?;
    }
    let (bundle, _held) = args.bundle()?;
    let prompts = args.prompts(&bundle.join("device"))?;
    args.role_bundle = bundle;
    let mut cloud = None;
    args.role_cloud = match &args.cloud {
        Some(address) => address.clone(),
        None => cloud.insert(CloudProcess::start(&args.role_bundle)?).address().to_owned(),
    };
    let plan = Plan::new(&args, prompts);
    let fleet = Fleet::start(&plan, cloud, &interrupted)?;
    let Ended { mut figures, outcomes, first_failure } = fleet.run(&interrupted)?;
    if args.check_whole {
        let (ask, bundle) = (|id| plan.ask(id), &args.role_bundle);
        let compared = compare::compare(bundle, args.wire, &plan.prompts, &ask, &outcomes)?;
        figures.compared = Some(compared);
    }
    figures.print()?;
    if let Some(folder) = &args.plot {
        outln!("{} plots in {}", figures.plot(folder)?, folder.display())?;
    }
    if args.json {
        outln!("{}", figures.json())?;
    }
    anyhow::ensure!(!interrupted.load(Ordering::Relaxed), "interrupted: the figures are of a part");
    if let Some(first) = figures.compared.and_then(|compared| compared.first_different) {
        anyhow::bail!("request {first} has another answer than the whole model gives");
    }
    let Summary { failed, refused, .. } = figures.all;
    match first_failure {
        Some(first) if failed > 0 => anyhow::bail!("{failed} requests failed: {first}"),
        Some(first) => {
            note!("hat-load: {refused} requests were refused: {first}");
            Ok(())
        }
        None => Ok(()),
    }
}

impl Args {
    /// The directory with both halves, and what keeps it.
    fn bundle(&self) -> anyhow::Result<(PathBuf, Option<TempDir>)> {
        if let Some(bundle) = &self.bundle {
            let bundle = Model::at(bundle).context("--bundle")?;
            let bundle = bundle.bundle(&pull::cache_dir()?, Cut::default())?;
            for half in ["device", "cloud"] {
                let path = bundle.join(half).join("bundle.json");
                // A cloud that runs already has its own half.
                let needed = half == "device" || self.cloud.is_none() || self.check_whole;
                anyhow::ensure!(!needed || path.is_file(), "--bundle: no {}", path.display());
            }
            return Ok((bundle, None));
        }
        match self.model {
            Made::Default => {
                let cache = pull::cache_dir()?;
                Ok((pull::default_bundle(&cache, pull::SPLIT_LAYER_DEFAULT, 0)?, None))
            }
            Made::Tiny => {
                let folder = tempfile::tempdir().context("a folder for the tiny model")?;
                let bundle = hat_loader::tiny_bundle(folder.path());
                let bundle = bundle.map_err(|error| anyhow::anyhow!("the tiny model: {error}"))?;
                Ok((bundle, Some(folder)))
            }
        }
    }

    fn prompts(&self, device: &Path) -> anyhow::Result<Prompts> {
        match &self.prompts {
            Some(path) => Prompts::read(path),
            None => Prompts::make(device, self.prompt_tokens, self.distinct, self.seed),
        }
    }

    /// Longest time to connect.
    fn connect(&self) -> Duration {
        Duration::from_millis((1e3 * self.connect_s) as u64)
    }

    fn cloud_config(&self) -> CloudConfig {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let config = CloudConfig::new(self.role_bundle.join("cloud")).link(self.link);
        let mut config = config.threads(self.cloud_threads.map_or(cores, usize::from));
        let limits = &mut config.limits;
        limits.sessions_max = self.sessions_max.unwrap_or(limits.sessions_max);
        limits.kv_rows_max = self.kv_rows_max.unwrap_or(limits.kv_rows_max);
        // A device that comes back stands beside its own lost connection for a while.
        limits.connections_max = limits.connections_max.max(4 * self.devices);
        config
    }

    fn device_config(&self) -> EngineConfig {
        let config = EngineConfig::new(self.role_bundle.join("device")).cloud(&self.role_cloud);
        let config = config.wire(self.wire).chunks(self.chunks).link(self.link);
        config.threads(usize::from(self.threads))
    }
}
