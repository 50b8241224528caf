//! The daemon: `hat-engine demo|chat|generate|cloud|device|pull|doctor`.

mod cli;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    match cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            cli::log::tell_error(&error);
            ExitCode::FAILURE
        }
    }
}
