//! `doctor`: what this machine, this link and this bundle will do, and why.

use std::path::Path;
use std::time::Instant;

use clap::Args;
use hat_compute::open;
use hat_core::chunk::{self, Planner};
use hat_core::wire::short;
use hat_engine::options::{ChunkPolicy, CloudLimits, ErrorKind, Processor, TokenId};
use hat_engine::{Engine, Error, Event, Request};
use hat_loader::{Bundle, Role};
use hat_plan::Computes as _;
use hat_program::out::OutError;
use hat_program::pull;
use hat_program::{out, outln};

use super::{DeviceRunArgs, ModelArg, words};

/// Rows of the prompt that is planned for.
const PLANNED_ROWS: u32 = 1024;

/// A check of this machine, link and bundle, with one answer.
#[derive(Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    model: ModelArg,
    #[command(flatten)]
    device: DeviceRunArgs,
    /// Print ids, times, bounds of memory and the portable kernels, too.
    #[arg(long)]
    verbose: bool,
}

impl DoctorArgs {
    pub(crate) fn run(mut self, cache: &Path) -> anyhow::Result<()> {
        self.device = self.device.named(self.model.clone())?;
        self.device.check(cache)?;
        let mut healthy = true;
        self.machine()?;
        links()?;
        healthy &= self.bundle(cache)?;
        healthy &= self.answer(cache)?;
        anyhow::ensure!(healthy, "something above needs attention");
        outln!("everything works")?;
        Ok(())
    }

    fn machine(&self) -> anyhow::Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        outln!("machine: {} {}, {cores} cores", std::env::consts::OS, std::env::consts::ARCH)?;
        let threads = self.device.run.threads();
        outln!("  computes with {}", open::cpu(Processor::Auto, threads)?.describe())?;
        if self.verbose {
            let portable = open::cpu(Processor::Portable, threads)?;
            outln!("  with --processor portable, for comparison: {}", portable.describe())?;
        }
        outln!("gpus: taken only with --processor cuda; what has run on which: cuda/HARDWARE.md")?;
        for line in open::gpus() {
            outln!("  {line}")?;
        }
        Ok(())
    }

    fn bundle(&self, cache: &Path) -> anyhow::Result<bool> {
        let directory = self.device.bundle.directory(cache)?;
        splits(cache, &directory)?;
        outln!("model: {}", directory.display())?;
        let mut healthy = true;
        for role in ["device", "cloud"] {
            let start = Instant::now();
            match Bundle::open(&directory.join(role)) {
                Ok(bundle) => {
                    let opened = start.elapsed();
                    let start = Instant::now();
                    let verdict = match bundle.verify() {
                        Ok(()) => "its files are as they were written".to_owned(),
                        Err(error) => {
                            healthy = false;
                            error.to_string()
                        }
                    };
                    let took = start.elapsed();
                    outln!(
                        "  {role} half: {}, {}, {:.1} MB; {verdict}",
                        bundle.manifest().model_name,
                        words::layers(&bundle),
                        files_mb(&bundle),
                    )?;
                    if self.verbose {
                        outln!(
                            "    model id {}, opened in {:.1} ms, hashed in {:.0} ms",
                            short(bundle.model_id().as_bytes()),
                            opened.as_secs_f64() * 1e3,
                            took.as_secs_f64() * 1e3,
                        )?;
                        memory(&bundle)?;
                    }
                }
                Err(error) => {
                    healthy &= role == "cloud";
                    outln!("  {role} half: {error}")?;
                }
            }
        }
        Ok(healthy)
    }

    /// One short answer through the configured link and cloud.
    fn answer(&self, cache: &Path) -> anyhow::Result<bool> {
        let start = Instant::now();
        // What a link and a cloud take is seen where rows go up.
        let config = self.device.config(cache)?.prefix(false);
        let engine = match Engine::open(config) {
            Ok(engine) => engine,
            Err(error) => {
                outln!("answer: {error}")?;
                return Ok(false);
            }
        };
        let took_ms = start.elapsed().as_secs_f64() * 1e3;
        outln!("start-up: {took_ms:.0} ms; {}", engine.describe())?;
        outln!("  {}", words::drafter(&engine))?;
        outln!("  {}", self.device.cloud_words(&engine))?;
        if let Some(drafter) = engine.describe_drafter().filter(|_| self.verbose) {
            outln!("  the drafter computes with {drafter}")?;
        }
        let request = Request::text("1, 2, 3, 4,").max_tokens(16).ignore_eos();
        let mut tokens = Vec::new();
        for event in engine.generate(request)? {
            match event {
                Ok(Event::Done { metrics, .. }) => {
                    let timings = metrics.timings;
                    tokens = metrics.token_ids;
                    outln!(
                        "answer: {}; {} bytes up, {} down",
                        words::pace(&timings),
                        timings.bytes_up,
                        timings.bytes_down
                    )?;
                }
                Ok(_) => {}
                Err(error) => {
                    outln!("answer: {error}{}", advice(&error))?;
                    return Ok(false);
                }
            }
        }
        self.chunks(&engine, &tokens)
    }

    /// Times one longer prompt, which repeats `tokens`, and says how prompts would be cut.
    fn chunks(&self, engine: &Engine, tokens: &[TokenId]) -> anyhow::Result<bool> {
        let rows = PLANNED_ROWS.min(engine.context() / 2);
        let prompt: Vec<_> = tokens.iter().copied().cycle().take(rows as usize).collect();
        let request = Request::tokens(prompt).max_tokens(2).ignore_eos();
        for event in engine.generate(request)? {
            if let Event::Done { metrics, .. } = event? {
                let timings = metrics.timings;
                outln!(
                    "prompt of {rows}: TTFT {:.1} ms in chunks of {:?}{}",
                    timings.ttft_ms,
                    timings.chunks,
                    match timings.ttft_predicted_ms > 0.0 {
                        true => format!(", {:.1} ms were expected", timings.ttft_predicted_ms),
                        false => String::new(),
                    },
                )?;
            }
        }
        let estimates = engine.metrics().estimates;
        let Some(costs) = estimates.chunk else {
            outln!("chunks: too little was measured to plan; they have the default size")?;
            return Ok(true);
        };
        outln!(
            "link: {}; device {:.3} ms a row; cloud {:.1} ms a step and {:.3} ms a row",
            words::link(estimates.uplink_bytes_s, estimates.rtt_s),
            costs.device.per_row * 1e3,
            costs.cloud.fixed * 1e3,
            costs.cloud.per_row * 1e3,
        )?;
        let (mut planner, limits) = (Planner::default(), chunk::Limits::default());
        let mut policies = vec![self.device.chunks, ChunkPolicy::Auto, ChunkPolicy::Fixed(128)];
        policies.dedup();
        for policy in policies {
            let plan = planner.plan(policy, &costs, &limits, chunk::Ahead::default(), 0, rows);
            outln!(
                "  --chunks {policy}: {:?}, first token expected after {:.0} ms",
                plan.sizes,
                plan.finish_s * 1e3
            )?;
        }
        Ok(true)
    }
}

/// The splits in the cache, which stay until somebody removes them.
fn splits(cache: &Path, used: &Path) -> Result<(), OutError> {
    let splits = pull::splits(cache);
    let bytes: u64 = splits.iter().map(|split| split.bytes).sum();
    outln!(
        "cache: {:.1} MB of split models in {}; any of them may be removed (rm -r) while nothing \
         runs on it, and is made again when it is asked for",
        bytes as f64 / 1e6,
        cache.join("bundles").display()
    )?;
    for split in splits {
        let is_used = if split.path == used { "  used here" } else { "" };
        let name = split.path.file_name().unwrap_or_default().to_string_lossy();
        outln!("  {:>8.1} MB  {name}{is_used}", split.bytes as f64 / 1e6)?;
    }
    Ok(())
}

/// Megabytes of a half's files.
fn files_mb(bundle: &Bundle) -> f64 {
    bundle.manifest().files.values().map(|file| file.bytes).sum::<u64>() as f64 / 1e6
}

/// The most that a role may come to hold: its weights, which stay in the bundle's file unless a GPU
/// has memory of its own, and a cloud's bounds with the default limits.
fn memory(bundle: &Bundle) -> Result<(), OutError> {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    out!("    memory: {:.1} MB of files, mapped", files_mb(bundle))?;
    if bundle.role() == Role::Cloud {
        let needed = CloudLimits::default().bytes_needed(bundle);
        let all: u64 = needed.iter().map(|(_, bytes)| bytes).sum();
        out!("; beside them at most {:.1} MB", megabytes(all))?;
        for (index, (owner, bytes)) in needed.iter().enumerate() {
            out!("{}{:.1} for {owner}", [": ", ", "][index.min(1)], megabytes(*bytes))?;
        }
    }
    outln!()
}

fn links() -> Result<(), OutError> {
    outln!("links: mio works everywhere")?;
    match hat_transport::link::probe_uring() {
        Ok(()) => outln!("  io_uring: works here (--link uring)"),
        Err(reason) => outln!("  io_uring: {reason}; --link uring falls back to mio"),
    }
}

fn advice(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::Peer => " (start it with: hat-engine cloud --bundle DIR/cloud)",
        _ => "",
    }
}
