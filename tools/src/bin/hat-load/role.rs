//! The two roles as they run in a child process, and a device as it runs in a thread.

use std::io::{BufRead as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hat_engine::options::ErrorKind;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Error, Event, Request};
use hat_program::note;
use serde::Serialize;
use signal_hook::consts::SIGINT;

use crate::protocol::{Ask, CloudReport, Counters, DeviceReport, End, Outcome};

/// Interval at which an answer's reader looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);
/// Limit on the tries of a request after `Busy`.
const RETRIES_MAX: u32 = 20;

/// Settings of a device.
#[derive(Clone)]
pub(crate) struct DeviceSetup {
    pub(crate) config: EngineConfig,
    /// Address of the cloud.
    pub(crate) cloud: String,
    /// Longest time to connect before it gives up.
    pub(crate) connect: Duration,
    /// The command line of a process that runs so.
    pub(crate) line: Vec<String>,
}

/// The cloud role of a child process: each line of stdin asks for its counters, and it ends with
/// stdin.
pub(crate) fn cloud(config: CloudConfig) -> anyhow::Result<()> {
    outlive_interrupts()?;
    let cloud = match Cloud::start(config) {
        Ok(cloud) => cloud,
        Err(error) => return print(&CloudReport::Failed(error.to_string())),
    };
    print(&CloudReport::Listening(cloud.address().to_string(), cloud.describe().to_owned()))?;
    for line in std::io::stdin().lock().lines() {
        line.context("reading from the tool")?;
        print(&CloudReport::Counters(counters(&cloud)))?;
    }
    Ok(())
}

fn counters(cloud: &Cloud) -> Counters {
    let of = cloud.counters();
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    Counters {
        steps: load(&of.steps),
        rows: load(&of.rows),
        step_us: load(&of.step_us),
        opened: load(&of.opened),
        // Whoever is told to come back is refused, too.
        refused: load(&of.refused) + load(&of.busy),
        sessions: load(&of.sessions),
        pages_free: load(&of.pages_free),
    }
}

/// The device role of a child process: each line of stdin is an [`Ask`], and it ends with stdin.
pub(crate) fn device(setup: &DeviceSetup) -> anyhow::Result<()> {
    outlive_interrupts()?;
    let asks = std::io::stdin().lock().lines().map_while(|line| {
        let ask = line.ok().and_then(|line| serde_json::from_str::<Ask>(&line).ok());
        if ask.is_none() {
            note!("hat-load: a device was told what is no request, and ends");
        }
        ask
    });
    serve(setup, asks, &|report| {
        // Nobody listens any more: stdin ends, too.
        let _ = print(&report);
    });
    Ok(())
}

/// A terminal sends its interrupt to all processes; the tool alone decides when its children end.
fn outlive_interrupts() -> anyhow::Result<()> {
    let ignored = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGINT, ignored).context("can't wait for signals")?;
    Ok(())
}

fn print(report: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(report)?;
    line.push('\n');
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes()).and_then(|()| out.flush()).context("writing to the tool")
}

/// Answers requests, any number at a time, until there are no more; then those that are still
/// under way are given up.
pub(crate) fn serve(
    setup: &DeviceSetup,
    asks: impl Iterator<Item = Ask>,
    say: &(impl Fn(DeviceReport) + Sync),
) {
    let engine = match open(setup) {
        Ok(engine) => engine,
        Err(error) => return say(DeviceReport::Failed(format!("{error:#}"))),
    };
    say(DeviceReport::Ready);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for ask in asks {
            let (engine, stop) = (&engine, &stop);
            scope.spawn(move || say(DeviceReport::Ended(answer(engine, &ask, stop))));
        }
        stop.store(true, Ordering::Release);
    });
}

fn open(setup: &DeviceSetup) -> anyhow::Result<Engine> {
    let engine = Engine::open(setup.config.clone())?;
    let (cloud, patience) = (&setup.cloud, setup.connect);
    anyhow::ensure!(
        engine.wait_connected(patience),
        "no cloud for this model answers at {cloud} within {} s",
        patience.as_secs_f64()
    );
    Ok(engine)
}

fn answer(engine: &Engine, ask: &Ask, stop: &AtomicBool) -> Outcome {
    let begun = Instant::now();
    let mut outcome = Outcome { ask: ask.id, ..Outcome::default() };
    let request = match ask.request() {
        Ok(request) => request,
        Err(error) => return Outcome { end: End::Failed(format!("{error:#}")), ..outcome },
    };
    loop {
        match attempt(engine, &request, ask, stop, begun, &mut outcome) {
            Ok(end) => return Outcome { end, ..outcome },
            Err(error) if error.kind() != ErrorKind::Busy => {
                return Outcome { end: End::Failed(error.to_string()), ..outcome };
            }
            Err(error) if outcome.retries == RETRIES_MAX => {
                return Outcome { end: End::Refused(error.to_string()), ..outcome };
            }
            Err(error) => {
                outcome.retries += 1;
                if !rest(Duration::from_millis(error.retry_after_ms().unwrap_or(500)), stop) {
                    return outcome;
                }
            }
        }
    }
}

/// Waits; whether it was not told to stop meanwhile.
fn rest(how_long: Duration, stop: &AtomicBool) -> bool {
    let until = Instant::now() + how_long;
    while !stop.load(Ordering::Acquire) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(LOOK));
    }
    false
}

fn attempt(
    engine: &Engine,
    request: &Request,
    ask: &Ask,
    stop: &AtomicBool,
    begun: Instant,
    outcome: &mut Outcome,
) -> Result<End, Error> {
    let mut generation = engine.generate(request.clone())?;
    (outcome.ttft_us, outcome.gaps_us, outcome.token_ids) = (None, vec![], vec![]);
    let mut last: Option<Instant> = None;
    let mut tokens = 0;
    while !generation.is_finished() {
        if stop.load(Ordering::Acquire) || ask.cancel_after == Some(tokens) {
            return Ok(End::Cancelled);
        }
        match generation.next_timeout(LOOK) {
            None => {}
            Some(Err(error)) => return Err(error),
            Some(Ok(Event::Token { token, .. })) => {
                let now = Instant::now();
                match last.replace(now) {
                    None => outcome.ttft_us = Some(micros(now - begun)),
                    Some(last) => {
                        let gap = u32::try_from(micros(now - last)).unwrap_or(u32::MAX);
                        outcome.gaps_us.push(gap);
                    }
                }
                if ask.keep {
                    outcome.token_ids.push(token);
                }
                tokens += 1;
            }
            Some(Ok(Event::Done { metrics, .. })) => {
                let timings = metrics.timings;
                outcome.prompt_n = timings.prompt_n;
                outcome.predicted_n = timings.predicted_n;
                outcome.rounds = timings.rounds;
                outcome.pages_reused = timings.pages_reused;
                outcome.bytes_up = timings.bytes_up;
                outcome.bytes_down = timings.bytes_down;
            }
            Some(Ok(_)) => {}
        }
    }
    Ok(End::Done)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
