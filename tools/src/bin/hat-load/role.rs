//! The two roles as they run in a child process. Each ends with its stdin.

use std::io::{BufRead as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hat_engine::options::ErrorKind;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Error, Event};
use hat_program::note;
use signal_hook::consts::SIGINT;

use crate::protocol::{Ask, Counters, End, Outcome, Report};

/// Interval at which an answer's reader looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// The cloud role: each line of stdin asks for its counters.
pub(crate) fn cloud(config: CloudConfig) -> anyhow::Result<()> {
    outlive_interrupts()?;
    let cloud = match Cloud::start(config) {
        Ok(cloud) => cloud,
        Err(error) => return print(&Report::Failed(error.to_string())),
    };
    print(&Report::Listening(cloud.address().to_string(), cloud.describe().to_owned()))?;
    for line in std::io::stdin().lock().lines() {
        line.context("reading from the tool")?;
        print(&Report::Counters(counters(&cloud)))?;
    }
    Ok(())
}

fn counters(cloud: &Cloud) -> Counters {
    let of = cloud.counters();
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
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

/// The device role, which waits at most `connect` for the cloud at `address`: each line of stdin
/// is an [`Ask`], any number of them at a time. Those under way at the end are given up.
pub(crate) fn device(config: EngineConfig, address: &str, connect: Duration) -> anyhow::Result<()> {
    outlive_interrupts()?;
    let engine = match Engine::open(config) {
        Ok(engine) => engine,
        Err(error) => return print(&Report::Failed(error.to_string())),
    };
    if !engine.wait_connected(connect) {
        let seconds = connect.as_secs_f64();
        let text = format!("no cloud for this model answers at {address} within {seconds} s");
        return print(&Report::Failed(text));
    }
    print(&Report::Ready)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let Ok(ask) = serde_json::from_str::<Ask>(&line) else {
                note!("hat-load: a device was told what is no request, and ends");
                break;
            };
            let (engine, stop) = (&engine, &stop);
            // When nobody listens any more, stdin ends, too.
            scope.spawn(move || _ = print(&Report::Ended(answer(engine, &ask, stop))));
        }
        stop.store(true, Ordering::Release);
    });
    Ok(())
}

/// A terminal sends its interrupt to all processes; the tool alone decides when its children end.
fn outlive_interrupts() -> anyhow::Result<()> {
    let ignored = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGINT, ignored).context("can't wait for signals")?;
    Ok(())
}

fn print(report: &Report) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(report)?;
    line.push('\n');
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes()).and_then(|()| out.flush()).context("writing to the tool")
}

fn answer(engine: &Engine, ask: &Ask, stop: &AtomicBool) -> Outcome {
    let mut outcome = Outcome { ask: ask.id, ..Outcome::default() };
    let is_busy = |error: &Error| error.kind() == ErrorKind::Busy;
    outcome.end = match run(engine, ask, stop, &mut outcome) {
        Ok(end) => end,
        Err(error) if error.downcast_ref().is_some_and(is_busy) => End::Refused(error.to_string()),
        Err(error) => End::Failed(format!("{error:#}")),
    };
    outcome
}

fn run(
    engine: &Engine,
    ask: &Ask,
    stop: &AtomicBool,
    outcome: &mut Outcome,
) -> anyhow::Result<End> {
    let begun = Instant::now();
    let mut generation = engine.generate(ask.request()?)?;
    let mut last: Option<Instant> = None;
    let mut tokens = 0;
    while !generation.is_finished() {
        if stop.load(Ordering::Acquire) || ask.cancel_after == Some(tokens) {
            return Ok(End::Cancelled);
        }
        match generation.next_timeout(LOOK).transpose()? {
            Some(Event::Token { token, .. }) => {
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
            Some(Event::Done { metrics, .. }) => {
                let timings = metrics.timings;
                outcome.predicted_n = timings.predicted_n;
                outcome.rounds = timings.rounds;
                outcome.pages_reused = timings.pages_reused;
                outcome.bytes_up = timings.bytes_up;
                outcome.bytes_down = timings.bytes_down;
            }
            None | Some(_) => {}
        }
    }
    Ok(End::Done)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
