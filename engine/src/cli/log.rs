//! The log of the daemon: its level, its form, and the lines that people read first.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, ValueEnum};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Time, level, place and text.
    Text,
    /// One JSON object a line.
    Json,
}

/// Level and form of the log.
#[derive(Args, Clone)]
pub(crate) struct LogArgs {
    /// Least level that is logged to stderr: off, error, warn, info, debug or trace; or a filter as
    /// RUST_LOG takes it (info,hat_transport=debug). Without it and HAT_LOG, RUST_LOG counts;
    /// without that too, the level is info for cloud and device, and warn for all else.
    #[arg(long, global = true, env = "HAT_LOG", value_name = "LEVEL", value_parser = check_filter)]
    log: Option<String>,
    /// Form of a log line.
    #[arg(
        long,
        global = true,
        env = "HAT_LOG_FORMAT",
        default_value = "text",
        value_name = "text|json",
        value_enum
    )]
    log_format: LogFormat,
}

/// A level, or directives with one each: a bare word would be taken for the name of a module.
fn check_filter(text: &str) -> Result<String, String> {
    let bad = || format!("{text:?} is none of off, error, warn, info, debug, trace, and no filter");
    let is_level = |word: &str| word.parse::<LevelFilter>().is_ok();
    for directive in text.split(',').map(str::trim).filter(|directive| !directive.is_empty()) {
        let level = directive.rsplit_once('=').map_or(directive, |(_, level)| level);
        if !is_level(level) {
            return Err(bad());
        }
    }
    EnvFilter::builder().parse(text).map_err(|_| bad())?;
    Ok(text.to_owned())
}

/// True if log lines, and with them the first lines of a role, are JSON.
static IS_JSON: AtomicBool = AtomicBool::new(false);

impl LogArgs {
    /// Installs the log of this process. `is_role` says that it is a cloud or a device.
    pub(crate) fn install(&self, is_role: bool) {
        let filter = match self.log.as_deref().filter(|text| !text.trim().is_empty()) {
            Some(text) => EnvFilter::builder().parse_lossy(text),
            None => std::env::var("RUST_LOG")
                .ok()
                .filter(|text| !text.trim().is_empty())
                .and_then(|text| EnvFilter::try_new(text).ok())
                .unwrap_or_else(|| EnvFilter::new(if is_role { "info" } else { "warn" })),
        };
        // Whoever reads stderr may go away; that is no reason to end, or to write there once more.
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .log_internal_errors(false);
        match self.log_format {
            LogFormat::Text => subscriber.init(),
            LogFormat::Json => {
                IS_JSON.store(true, Ordering::Relaxed);
                subscriber.json().flatten_event(true).init();
            }
        }
    }
}

/// A line that is told to people whatever the level is: what starts, and where it listens. It is a
/// log line where the log is JSON, so that each line of stderr is an object.
pub(crate) fn tell(text: &str) {
    if IS_JSON.load(Ordering::Relaxed) {
        for line in text.lines() {
            tracing::info!("{}", line.trim());
        }
        return;
    }
    let _ = std::io::stderr().write_all(text.as_bytes()); // its reader may have gone
    let _ = std::io::stderr().write_all(if text.ends_with('\n') { b"" } else { b"\n" });
}

/// The error that ends the program.
pub(crate) fn tell_error(error: &str) {
    if IS_JSON.load(Ordering::Relaxed) {
        tracing::error!("{error}");
    } else {
        tell(&format!("hat-engine: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_a_level_and_no_module_name() {
        for good in ["off", "ERROR", "warn", "info", "debug", "trace", "", "info,hat_engine=debug"]
        {
            assert_eq!(check_filter(good).as_deref(), Ok(good));
        }
        for bad in ["verbose", "info,verbose", "hat_engine=loud", "=,", "info debug", "2x"] {
            let text = check_filter(bad).unwrap_err();
            assert!(text.contains(bad) && text.contains("debug"), "{text}");
        }
    }
}
