//! Very many devices on a few clouds, and what the engine's scheduler itself takes.

use std::time::Instant;

use anyhow::ensure;
use clap::Args;
use hat_core::sched::{BatchItem, Bound, Scheduler};
use hat_program::outln;
use indicatif::ProgressBar;
use serde_json::json;

use crate::costs::CostFile;
use crate::figures::Figures;
use crate::policy::Policy;
use crate::simulation::{Run, Simulation};
use crate::text::{Predictability, REQUESTS_MAX};

/// A step that the scheduler's time is held against.
const STEP_MS: f64 = 7.0;
/// Plans that are timed.
const PLANS: usize = 2000;
/// Sessions, and rows of each, in the timed plans.
const TIMED: [(u64, u32); 5] = [(16, 8), (64, 8), (256, 8), (256, 1), (1024, 1)];

#[derive(Args)]
pub(crate) struct FleetArgs {
    /// Devices, 1 to 1000000, of the kinds of the workload.
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    devices: usize,
    /// Identical clouds; a device stays with one, 1 to 10000.
    #[arg(long, value_name = "N", default_value_t = 64)]
    replicas: usize,
    /// Requests of each device in an hour.
    #[arg(long, value_name = "N", default_value_t = 12.0)]
    hourly: f64,
    /// Virtual seconds in which requests come.
    #[arg(long, value_name = "N", default_value_t = 60.0)]
    seconds: f64,
    /// Workload: machines and prompts.
    #[arg(long, value_name = "NAME|PATH", default_value = "specbench-7b")]
    workload: String,
    /// By which policy.
    #[arg(long, value_name = "NAME", default_value = "ours")]
    policy: String,
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print the figures as one line of JSON, the last.
    #[arg(long)]
    json: bool,
}

pub(crate) fn fleet(args: &FleetArgs) -> anyhow::Result<()> {
    ensure!((1..=1_000_000).contains(&args.devices), "--devices: allowed are 1 to 1000000");
    ensure!((1..=10_000).contains(&args.replicas), "--replicas: allowed are 1 to 10000");
    let rate = args.devices as f64 * args.hourly / 3600.0;
    let requests = rate * args.seconds;
    ensure!(
        (1.0..=REQUESTS_MAX as f64).contains(&requests),
        "--hourly, --seconds: {requests} requests; allowed are 1 to {REQUESTS_MAX}"
    );
    let file = CostFile::open(&args.workload)?.with_devices(args.devices);
    let policy = Policy::named(&args.policy)?;
    let predictability = Predictability::fit(&file.drafters);
    let (replicas, requests) = (args.replicas, requests as usize);
    let run = Run { rate, requests, replicas, ..Run::of(&policy, args.seed) };
    let mut simulation = Simulation::new(&file, &predictability, run);
    let bar = ProgressBar::new(requests as u64);
    let began = Instant::now();
    simulation.simulate(&mut |finished| bar.set_position(finished as u64));
    bar.finish_and_clear();
    let took_s = began.elapsed().as_secs_f64();
    ensure!(simulation.failed.is_empty(), "{}", simulation.failed.join(", "));
    let figures = Figures::of(&simulation);
    outln!("{} devices, {replicas} clouds, {rate:.0} requests / s\n", args.devices)?;
    outln!("{}\n|---|---|---|---|---|---|---|---|---|\n{}", Figures::HEAD, figures.row())?;
    outln!("\n{} requests simulated in {took_s:.1} s of real time", simulation.over)?;
    outln!("{} steps", simulation.step_s().count())?;
    let mut costs = vec![];
    for (sessions, rows) in TIMED {
        let us = scheduler_us(sessions, rows);
        let share = us * 1e-3 / STEP_MS;
        outln!(
            "{sessions} sessions with {rows} rows each: {us:.1} us a step, {:.2} % of {STEP_MS} ms",
            100.0 * share
        )?;
        costs.push(json!({ "sessions": sessions, "rows": rows, "us": us, "of_7_ms": share }));
    }
    if args.json {
        let fleet = json!({
            "devices": args.devices, "replicas": replicas, "rate": rate,
            "steps": simulation.step_s().count(), "scheduler": costs,
        });
        outln!("{}", json!({ "policies": [figures.json()], "fleet": fleet }))?;
    }
    Ok(())
}

/// Microseconds in which the scheduler plans a step and takes the next rows of those who ran,
/// with so many sessions waiting: the scheduler's share of an io thread's turn.
fn scheduler_us(sessions: u64, rows: u32) -> f64 {
    let mut scheduler = Scheduler::new(512);
    let work = |session| BatchItem {
        session,
        device: session,
        rows,
        context: 0,
        urgent: true,
        divisible: false,
        class: 0,
    };
    for session in 0..sessions {
        scheduler.enqueue(work(session));
    }
    let mut step = vec![];
    let mut times = Vec::with_capacity(PLANS);
    for _ in 0..PLANS {
        let began = Instant::now();
        scheduler.schedule(Bound::NONE, &mut step);
        for done in &step {
            scheduler.enqueue(work(done.session));
        }
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    times[PLANS / 2]
}
