//! `hat-sim`: many devices and clouds in virtual time: the engine's own cores over its own
//! connections, with costs for models, links and machines.

mod bed;
mod calibrate;
mod capacity;
mod cloud;
mod costs;
mod device;
mod drafter;
mod faults;
mod figures;
mod fleet;
mod load;
mod policy;
mod show;
mod simulation;
mod text;
mod trial;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use hat_core::draft::DraftPolicy;
use hat_program::{out, outln};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::costs::{Calibrated, CostFile, Ranged};
use crate::figures::Figures;
use crate::policy::{ABLATION, COMPARED};
use crate::text::Predictability;
use crate::trial::{Compared, Trials};

/// Simulates devices and a cloud in virtual time, and compares ways of splitting a model.
#[derive(Parser)]
#[command(name = "hat-sim", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compare policies on the paper's testbed.
    Paper(PaperArgs),
    /// The published ablation, then our causes one by one and together; all published figures
    /// beside simulated ones.
    Ablation(Load),
    /// Find what the paper does not state from its U-shape rows alone.
    Calibrate(CalibrateArgs),
    /// Devices and clouds whose links, processes and backends fail: what must hold, from a seed.
    Faults(faults::FaultsArgs),
    /// Clients that a cloud serves within a time between tokens, beside a server that holds the
    /// whole model.
    Capacity(capacity::CapacityArgs),
    /// Very many devices on a few clouds, and what the scheduler itself takes.
    Fleet(fleet::FleetArgs),
}

#[derive(Args)]
struct CalibrateArgs {
    /// specbench-7b, cnndm-13b, or the path of a cost file with published rows.
    #[arg(long, value_name = "NAME|PATH")]
    workload: String,
}

#[derive(Args)]
struct PaperArgs {
    #[command(flatten)]
    load: Load,
    /// Policies, by name.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    policies: Vec<String>,
}

/// Requests and devices.
#[derive(Args)]
struct Load {
    /// specbench-7b, cnndm-13b, this-machine, or the path of a cost file.
    #[arg(long, value_name = "NAME|PATH")]
    workload: String,
    /// Requests a second over all devices, 0.001 to 1000; the workload's own without.
    #[arg(long, value_name = "N", value_parser = |text: &str| within(text, [0.001, 1000.0]))]
    rate: Option<f64>,
    /// Of requests, texts and rates.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Runs with seeds from there on, whose figures are pooled, 1 to 100.
    #[arg(long, value_name = "N", default_value_t = 3)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=100))]
    runs: u64,
    /// Requests of a run, 1 to 1000000.
    #[arg(long, value_name = "N", default_value_t = 600)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: u32,
    /// Hypothetical mean of tokens a round of the adapter's tree of 32 nodes, 1 to 8 (EAGLE-2: 4.34
    /// in its own benchmark).
    #[arg(long, value_name = "N", value_parser = |text: &str| within(text, [1.0, 8.0]))]
    what_if_tree: Option<f64>,
    /// Write plots (SVG) into this folder: figures against the rate, distributions, timelines.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print all figures as one line of JSON, the last.
    #[arg(long)]
    json: bool,
}

fn within(text: &str, [low, high]: [f64; 2]) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| (low..=high).contains(number));
    number.ok_or_else(|| format!("allowed are {low} to {high}"))
}

fn main() -> ExitCode {
    let args = match out::parse::<Arguments>() {
        Ok(args) => args,
        Err(ended) => return ended,
    };
    let done = match args.command {
        Command::Paper(args) => paper(&args),
        Command::Ablation(args) => ablation(&args),
        Command::Faults(args) => faults::faults(&args),
        Command::Capacity(args) => capacity::capacity(&args),
        Command::Fleet(args) => fleet::fleet(&args),
        Command::Calibrate(args) => calibrate(&args),
    };
    out::finish("hat-sim", done)
}

fn paper(args: &PaperArgs) -> anyhow::Result<()> {
    let names: Vec<&str> = match args.policies.is_empty() {
        true => COMPARED.to_vec(),
        false => args.policies.iter().map(String::as_str).collect(),
    };
    run(&args.load, &names, Some("rates"))
}

fn ablation(args: &Load) -> anyhow::Result<()> {
    run(args, &ABLATION, None)
}

/// Runs policies; prints their figures, and the published ones of `table` or of all beside them.
fn run(load: &Load, names: &[&str], table: Option<&str>) -> anyhow::Result<()> {
    let file = CostFile::open(&load.workload)?;
    let rate = load.rate.unwrap_or(file.workload.rate);
    let mut predictability = Predictability::fit(&file.drafters);
    outln!("{}", file.describe())?;
    outln!("{rate} requests a second, {} x {} of them", load.runs, load.requests)?;
    if let Some(tokens) = load.what_if_tree {
        predictability = predictability.with_tree(DraftPolicy::DEFAULT.nodes_max, tokens);
        outln!("WHAT IF a tree of 32 drafts gave {tokens} tokens a round?")?;
    }
    outln!()?;
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} requests, {msg}")
            .expect("the template is well-formed"),
    );
    let runs = (load.seed, load.runs, load.requests as usize);
    let mut trials = Trials::new(&file, predictability, runs, bar);
    outln!("{}", Figures::HEAD)?;
    outln!("|---|---|---|---|---|---|---|---|---|")?;
    let mut all = vec![];
    for name in names {
        let figures = trials.figures(name, rate)?;
        outln!("{}", figures.row())?;
        all.push(figures);
    }
    let of = |name: &str| all.iter().find(|figures| figures.policy == name);
    if let (Some(hat), Some(ours)) = (of("hat"), of("ours")) {
        let [ttft, tbt] = [ours.ttft() / hat.ttft(), ours.tbt() / hat.tbt()];
        outln!("\nours / hat, both simulated: TTFT {ttft:.2}, TBT {tbt:.2}")?;
    }
    let compared = trials.compare(table)?;
    if !compared.is_empty() {
        outln!("\n{}\n|---|---|---|---|---|---|---|", Compared::HEAD)?;
        compared.iter().try_for_each(|compared| outln!("{}", compared.row()))?;
    }
    if let Some(out) = &load.out {
        let count = show::plots(out, &file, &mut trials, names, rate)?;
        outln!("\n{count} plots in {}", out.display())?;
    }
    if load.json {
        let policies: Vec<_> = all.iter().map(Figures::json).collect();
        outln!("{}", json!({ "policies": policies }))?;
    }
    Ok(())
}

fn calibrate(args: &CalibrateArgs) -> anyhow::Result<()> {
    let file = CostFile::open(&args.workload)?;
    let bar = ProgressBar::new_spinner();
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    let outcome = calibrate::calibrate(&file, &bar);
    bar.finish_and_clear();
    outln!("{}", file.describe())?;
    outln!("Facts: {}", file.source)?;
    outln!("{}: {:.1} % off the rows that calibrate", file.name, 100.0 * outcome.deviation)?;
    outln!("| number | value | as good from .. to | allowed |")?;
    outln!("|---|---|---|---|")?;
    let numbers = outcome.file.calibrated.each();
    for ((name, number), good) in Calibrated::NAMES.iter().zip(numbers).zip(outcome.good) {
        let Ranged { value, low, high } = number;
        outln!("| {name} | {value:.4} | {:.3} .. {:.3} | {low} .. {high} |", good[0], good[1])?;
    }
    Ok(())
}
