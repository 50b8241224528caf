//! Emulates a slower, longer, worse link on this machine: a relay between those who connect and
//! the address that they want.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use hat_emulator::{
    Calibration, CutConfig, DirectionConfig, Emulator, EmulatorConfig, Quantiles, Report,
    StallConfig,
};
use hat_engine::options::Address;
use hat_program::out::{self, OutError};
use hat_program::{note, outln};
use hat_tools::{number, within};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Interval at which it looks for the end.
const LOOK: Duration = Duration::from_millis(50);
const DAY_MS: f64 = 86_400_000.0;

/// Relays TCP connections over an emulated slower link. All connections share one link: a rate with
/// a bounded queue, then a delay, for each direction. Up is the direction of those who connect.
///
/// Before it listens it measures its own delay over a round trip, and subtracts the median from the
/// delays. It ends on SIGINT or SIGTERM, and prints the traffic.
#[derive(Parser)]
#[command(name = "hat-link", version, allow_negative_numbers = true)]
struct Args {
    /// Address to listen at on this machine: HOST, HOST:PORT or PORT; port 0 for any free one.
    #[arg(long, value_name = "ADDR", value_parser = address, required_unless_present = "calibrate")]
    listen: Option<SocketAddr>,
    /// Address on this machine to relay connections to: as --listen, on port 7433 unless it names
    /// another.
    #[arg(long, value_name = "ADDR", value_parser = address, required_unless_present = "calibrate")]
    to: Option<SocketAddr>,
    /// Rate up, Mbit/s, 0.01 to 100000 [default: no limit].
    #[arg(long, value_name = "N", value_parser = within(0.01, 1e5, "Mbit/s"))]
    up_mbit: Option<f64>,
    /// Rate down, Mbit/s, 0.01 to 100000 [default: no limit].
    #[arg(long, value_name = "N", value_parser = within(0.01, 1e5, "Mbit/s"))]
    down_mbit: Option<f64>,
    /// Round trip, ms, 0 to 20000: half of it each way.
    #[arg(long, value_name = "N", value_parser = within(0.0, 2e4, "ms"))]
    #[arg(conflicts_with_all = ["delay_up_ms", "delay_down_ms"])]
    rtt_ms: Option<f64>,
    /// Delay up, ms, 0 to 10000.
    #[arg(long, value_name = "N", value_parser = within(0.0, 1e4, "ms"), default_value_t = 0.0)]
    delay_up_ms: f64,
    /// Delay down, ms, 0 to 10000.
    #[arg(long, value_name = "N", value_parser = within(0.0, 1e4, "ms"), default_value_t = 0.0)]
    delay_down_ms: f64,
    /// Largest additional delay each way, ms, 0 to 10000; drawn anew each 10 ms, no reordering.
    #[arg(long, value_name = "N", value_parser = within(0.0, 1e4, "ms"), default_value_t = 0.0)]
    jitter_ms: f64,
    /// Nothing leaves the bottleneck for LASTS_MS, once in each period of EVERY_MS (10 to 86400000;
    /// LASTS_MS from 1 to nine tenths of it); may be given for each direction.
    #[arg(long, value_name = "EVERY_MS:LASTS_MS[:up|down]", value_parser = stall)]
    stall: Vec<Stall>,
    /// Reset all connections once, after bytes (`500000b`) or link time (`1500ms`); may be given
    /// once for each.
    #[arg(long, value_name = "BYTESb|MSms", value_parser = cut_after)]
    cut_after: Vec<CutAfter>,
    /// Reset all connections once in the second half of each period, 10 to 86400000 ms.
    #[arg(long, value_name = "MS", value_parser = within(10.0, DAY_MS, "ms"))]
    cut_every: Option<f64>,
    /// Time after a cut without listening, ms, 0 to 3600000.
    #[arg(long, value_name = "MS", value_parser = within(0.0, 3.6e6, "ms"), default_value_t = 0.0)]
    away_ms: f64,
    /// Seed of jitter, stalls and cuts.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Bytes that wait for the bottleneck before senders are held back, 4096 to 1073741824.
    #[arg(long, value_name = "N", default_value_t = 256 << 10)]
    #[arg(value_parser = clap::value_parser!(u32).range(4096..=1 << 30))]
    queue_bytes: u32,
    /// Measure and print the delay of the relay itself; without --listen, end.
    #[arg(long, conflicts_with = "no_calibrate")]
    calibrate: bool,
    /// Skip that measurement; delays are longer by the relay's own.
    #[arg(long)]
    no_calibrate: bool,
    /// End when the last connection has closed.
    #[arg(long)]
    once: bool,
    /// Print the traffic as one line of JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy)]
struct Stall {
    config: StallConfig,
    up: bool,
    down: bool,
}

#[derive(Clone, Copy)]
enum CutAfter {
    Bytes(u64),
    Time(Duration),
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let address = Address::parse(text, Address::CLOUD_PORT).map_err(|error| error.to_string())?;
    address.resolve().map_err(|error| error.to_string())
}

fn stall(text: &str) -> Result<Stall, String> {
    let mut parts = text.split(':');
    let (Some(period), Some(lasts)) = (parts.next(), parts.next()) else {
        return Err("not EVERY_MS:LASTS_MS[:up|down]".into());
    };
    let (up, down) = match (parts.next(), parts.next()) {
        (None, _) => (true, true),
        (Some("up"), None) => (true, false),
        (Some("down"), None) => (false, true),
        _ => return Err("after EVERY_MS:LASTS_MS comes nothing, :up or :down".into()),
    };
    let period = number(period, 10.0, DAY_MS, "ms").map_err(|why| format!("EVERY_MS: {why}"))?;
    let lasts = number(lasts, 1.0, period * 0.9, "ms").map_err(|why| format!("LASTS_MS: {why}"))?;
    Ok(Stall { config: StallConfig { every: millis(period), lasts: millis(lasts) }, up, down })
}

fn cut_after(text: &str) -> Result<CutAfter, String> {
    if let Some(ms) = text.strip_suffix("ms") {
        return Ok(CutAfter::Time(millis(number(ms, 0.0, DAY_MS, "ms")?)));
    }
    let Some(bytes) = text.strip_suffix('b') else {
        return Err("say bytes as 500000b, or time as 1500ms".into());
    };
    match bytes.parse() {
        Ok(0) | Err(_) => Err("allowed are 1b and more".into()),
        Ok(bytes) => Ok(CutAfter::Bytes(bytes)),
    }
}

fn millis(ms: f64) -> Duration {
    Duration::from_nanos((ms * 1e6).round() as u64)
}

impl Args {
    fn config(&self, to: SocketAddr) -> anyhow::Result<EmulatorConfig> {
        let mut config = EmulatorConfig::new(to);
        if let Some(listen) = self.listen {
            config.listen = listen;
        }
        config.seed = self.seed;
        let half = self.rtt_ms.map(|rtt| rtt / 2.0);
        let directions = [
            (&mut config.up, self.up_mbit, self.delay_up_ms),
            (&mut config.down, self.down_mbit, self.delay_down_ms),
        ];
        for (direction, rate, delay_ms) in directions {
            *direction = DirectionConfig::default();
            direction.rate_bits_s = rate.map(|mbit| (mbit * 1e6) as u64);
            direction.delay = millis(half.unwrap_or(delay_ms));
            direction.jitter = millis(self.jitter_ms);
            direction.queue_bytes = self.queue_bytes as usize;
        }
        for stall in &self.stall {
            for (direction, meant) in [(&mut config.up, stall.up), (&mut config.down, stall.down)] {
                if meant && direction.stall.replace(stall.config).is_some() {
                    anyhow::bail!("--stall: given more than once for one direction");
                }
            }
        }
        config.cut = self.cuts()?;
        Ok(config)
    }

    fn cuts(&self) -> anyhow::Result<CutConfig> {
        let mut cut = CutConfig::default();
        cut.every = self.cut_every.map(millis);
        cut.away = millis(self.away_ms);
        for after in &self.cut_after {
            let again = match *after {
                CutAfter::Bytes(bytes) => cut.after_bytes.replace(bytes).is_some(),
                CutAfter::Time(time) => cut.after.replace(time).is_some(),
            };
            anyhow::ensure!(!again, "--cut-after: given more than once for bytes, or for time");
        }
        Ok(cut)
    }
}

fn main() -> ExitCode {
    let args = match out::parse::<Args>() {
        Ok(args) => args,
        Err(ended) => return ended,
    };
    out::finish("hat-link", run(&args))
}

fn run(args: &Args) -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, ended.clone()).context("can't wait for signals")?;
    }
    let to = args.to.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
    let mut config = args.config(to)?;
    if !args.no_calibrate {
        let calibration = Calibration::measure(&config).context("calibration")?;
        print_calibration(&calibration);
        config.calibration = Some(calibration);
        if args.listen.is_none() || args.to.is_none() {
            if args.json {
                outln!("{}", json!(calibration))?;
            }
            return Ok(());
        }
    }
    let emulator = Emulator::start(config)?;
    note!("hat-link: {} is relayed to {to}", emulator.address());
    loop {
        std::thread::sleep(LOOK);
        if ended.load(Ordering::Relaxed) || (args.once && emulator.finished()) {
            break;
        }
    }
    let report = emulator.stop()?;
    if args.json {
        outln!("{}", json!(report))?;
    } else {
        print_report(&report)?;
    }
    Ok(())
}

fn print_calibration(calibration: &Calibration) {
    let line = |name: &str, q: Quantiles| {
        note!("  {name:<34} p50 {:9.1} us   p99 {:9.1} us", q.p50_us, q.p99_us);
    };
    note!("calibration: round trips of 1 KiB");
    line("direct", calibration.direct);
    line("relayed, no delay", calibration.relayed);
    if let Some(delayed) = calibration.delayed {
        line("relayed, the link's delays", delayed);
    }
    let added = calibration.added.as_nanos() as f64 / 1e3;
    note!("  off the delays of a round trip     {added:13.1} us");
}

fn print_report(report: &Report) -> Result<(), OutError> {
    for (name, direction) in [("up", &report.up), ("down", &report.down)] {
        outln!("{name:<5} {} bytes in, {} out", direction.bytes_in, direction.bytes_out)?;
        if let Some(rate) = direction.busy_mbit_s {
            outln!("      {rate:.3} Mbit/s while busy")?;
        }
        let rows = [
            ("planned", direction.planned),
            ("actual", direction.actual),
            ("late", direction.late),
        ];
        for (name, quantiles) in rows {
            let Some(q) = quantiles else { continue };
            outln!("      {name:<8} p50 {:11.1} us   p99 {:11.1} us", q.p50_us, q.p99_us)?;
        }
        outln!("      {} stalls", direction.stalls)?;
    }
    outln!(
        "{} connections, {} of them unreachable; {} cuts",
        report.connections,
        report.unreachable,
        report.cuts
    )?;
    Ok(())
}
