//! `hat-train`: makes the drafter that a device drafts tokens with.
//!
//! `collect` lets the target model answer prompts and keeps the rows that a device would see;
//! `fit` trains a drafter on them; `eval` says how many tokens a round trip it is worth.

mod collect;
mod eval;
#[cfg(feature = "train")]
mod fit;
mod shard;
mod target;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hat_program::out;

/// Trains the drafter of a model: collect, fit, eval.
#[derive(Parser)]
#[command(name = "hat-train", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Record the rows of the model's answers to prompts.
    Collect(collect::CollectArgs),
    /// Train a drafter on recorded rows.
    #[cfg(feature = "train")]
    Fit(fit::FitArgs),
    /// Train a drafter: a build with the feature `train` does that.
    #[cfg(not(feature = "train"))]
    Fit {
        /// Its flags.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
        _flags: Vec<std::ffi::OsString>,
    },
    /// Measure a drafter.
    Eval(eval::EvalArgs),
}

fn main() -> ExitCode {
    let args = match out::parse::<Args>() {
        Ok(args) => args,
        Err(ended) => return ended,
    };
    let done = match args.command {
        Command::Collect(args) => collect::run(&args),
        #[cfg(feature = "train")]
        Command::Fit(args) => fit::run(&args),
        #[cfg(not(feature = "train"))]
        Command::Fit { .. } => Err(anyhow::anyhow!(
            "fit is not in this build; `cargo build --release -p hat-tools --features train` has it"
        )),
        Command::Eval(args) => eval::run(&args),
    };
    out::finish("hat-train", done)
}
