//! The daemon: `hat-engine demo|chat|generate|cloud|device|pull|doctor`.

mod cli;

use std::process::ExitCode;

use hat_program::out;

fn main() -> ExitCode {
    let cli: cli::Cli = match out::parse() {
        Ok(cli) => cli,
        Err(ended) => return ended,
    };
    match out::ended(cli.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(said) => {
            cli::log::tell_error(&said);
            ExitCode::FAILURE
        }
    }
}
