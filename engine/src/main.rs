//! The daemon: `hat-engine demo|chat|generate|cloud|device|pull|doctor`.

mod cli;

use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    // Whoever started the program may have closed stderr: a lost line is no reason to panic.
    let log = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    log.with_writer(std::io::stderr).init();
    #[cfg(target_os = "linux")]
    if let Err(error) = hat_engine::shrunk::install("hat-engine") {
        tracing::warn!(%error, "a mapped file that becomes shorter will not be named");
    }
    match cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hat-engine: {error:#}");
            ExitCode::FAILURE
        }
    }
}
