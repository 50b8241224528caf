//! `hat-sim`: many devices and a cloud in virtual time, under the engine's own scheduler, chunk
//! sizer and draft policy.

mod calibrate;
mod costs;
mod figures;
mod load;
mod machine;
mod policy;
mod random;
mod round;
mod text;
mod world;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use indicatif::ProgressBar;
use serde_json::json;

use crate::costs::{Calibrated, CostFile, Ranged};
use crate::figures::Figures;
use crate::policy::{ABLATION, COMPARED, Policy};
use crate::text::Guessing;
use crate::world::{Run, World};

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
    /// Find what the paper does not state from its U-shape rows alone.
    Calibrate(CalibrateArgs),
}

#[derive(Args)]
struct CalibrateArgs {
    /// specbench-7b, cnndm-13b, or the path of a cost file with published rows.
    #[arg(long, value_name = "NAME|PATH")]
    workload: String,
}

#[derive(Args)]
struct PaperArgs {
    /// specbench-7b, cnndm-13b, this-machine, or the path of a cost file.
    #[arg(long, value_name = "NAME|PATH")]
    workload: String,
    /// Requests a second over all devices.
    #[arg(long, value_name = "N")]
    rate: Option<f64>,
    /// Of requests, texts and rates.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Requests of a run.
    #[arg(long, value_name = "N", default_value_t = 600)]
    requests: usize,
    /// Policies, by name.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    policies: Vec<String>,
    /// Print all figures as one line of JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Paper(args) => paper(&args),
        Command::Calibrate(args) => calibrate(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hat-sim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn paper(args: &PaperArgs) -> anyhow::Result<()> {
    let file = CostFile::open(&args.workload)?;
    let guessing = Guessing::fit(&file.drafters);
    let names: Vec<String> = if args.policies.is_empty() {
        COMPARED.map(str::to_owned).to_vec()
    } else {
        args.policies.clone()
    };
    let names = if names == ["ablation"] { ABLATION.map(str::to_owned).to_vec() } else { names };
    let mut all = vec![];
    println!("{}", Figures::HEAD);
    println!("|---|---|---|---|---|---|---|---|---|");
    for name in names {
        let policy = Policy::named(&name)?;
        let rate = args.rate.unwrap_or(file.workload.rate);
        let run = Run { rate, requests: args.requests, ..Run::of(&policy, args.seed) };
        let bar = ProgressBar::new(args.requests as u64).with_message(name.clone());
        let mut world = World::new(&file, &guessing, run);
        world.live(&mut |finished| bar.set_position(finished as u64));
        bar.finish_and_clear();
        let figures = Figures::of(&name, &world);
        println!("{}", figures.row());
        all.push(figures.json());
    }
    if args.json {
        println!("{}", json!({ "policies": all }));
    }
    Ok(())
}

fn calibrate(args: &CalibrateArgs) -> anyhow::Result<()> {
    let file = CostFile::open(&args.workload)?;
    let bar = ProgressBar::new_spinner();
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    let outcome = calibrate::calibrate(&file, &bar);
    bar.finish_and_clear();
    println!("{}: {:.1} % off the rows that calibrate", file.name, 100.0 * outcome.deviation);
    println!("| number | value | as good from .. to | allowed |");
    println!("|---|---|---|---|");
    let numbers = outcome.file.calibrated.each();
    for ((name, number), good) in Calibrated::NAMES.iter().zip(numbers).zip(outcome.good) {
        let Ranged { value, low, high } = number;
        println!("| {name} | {value:.4} | {:.3} .. {:.3} | {low} .. {high} |", good[0], good[1]);
    }
    Ok(())
}
