//! Lateness of the emulator itself: ping-pongs through it beside ping-pongs without it.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

use super::{Emulator, EmulatorConfig, EmulatorError, Quantiles};

/// Bytes of a ping and of its answer.
const PING_BYTES: usize = 1024;
/// Before the first ping that counts.
const WARM_UP: usize = 50;
const PINGS_MAX: usize = 1000;
const PINGS_MIN: usize = 15;
/// Pings over a delay take about this long.
const PINGS_TIME: Duration = Duration::from_millis(1500);
/// The median is the least of this many batches: what other processes do to some of them is not
/// the emulator's.
const BATCHES: usize = 4;
/// No more than this comes off a round trip. Where more was measured the machine is busy, and the
/// surplus belongs to others.
const ADDED_MAX: Duration = Duration::from_micros(500);
/// A connection that is silent this much longer than the link's round trip is lost.
const SILENCE: Duration = Duration::from_secs(5);

/// Delay that the emulator adds to a round trip, by its own measurement on this machine: 1 KiB
/// pings over loopback, the median of the quietest of four batches and the 99th percentile of all.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Calibration {
    /// Without the emulator.
    pub direct: Quantiles,
    /// Through it, without a delay.
    pub relayed: Quantiles,
    /// Through it, with the link's delays and nothing else; `None` if it has none.
    pub delayed: Option<Quantiles>,
    /// The median added to a round trip: `delayed` less the delays less `direct`, or `relayed`
    /// less `direct`; at most 0.5 ms.
    #[serde(rename = "added_us", serialize_with = "micros")]
    pub added: Duration,
}

fn micros<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(duration.as_nanos() as f64 / 1e3)
}

impl Calibration {
    /// Measures for the delays of this link; takes 2 s and up to 15 round trips.
    ///
    /// # Errors
    /// A value out of its range; loopback sockets that fail.
    pub fn measure(config: &EmulatorConfig) -> Result<Self, EmulatorError> {
        config.check()?;
        let echo = Echo::start()?;
        let direct = pings(echo.address, Duration::ZERO)?;
        let link = EmulatorConfig::new(echo.address);
        let relayed = through(link.clone(), Duration::ZERO)?;
        let nominal = config.up.delay + config.down.delay;
        let mut slow = link;
        (slow.up.delay, slow.down.delay) = (config.up.delay, config.down.delay);
        let delayed = if nominal.is_zero() { None } else { Some(through(slow, nominal)?) };
        let measured = delayed.unwrap_or(relayed).p50_us * 1e3;
        let added = measured - direct.p50_us * 1e3 - nominal.as_nanos() as f64;
        let added = Duration::from_nanos(added.max(0.0) as u64);
        if added > ADDED_MAX {
            tracing::warn!(?added, max = ?ADDED_MAX, "too busy to calibrate; the maximum counts");
        }
        let added = added.min(ADDED_MAX);
        Ok(Self { direct, relayed, delayed, added })
    }

    /// Correction of each of two delays: half, or more where the other is too short.
    pub(super) fn corrections(&self, up: Duration, down: Duration) -> [Duration; 2] {
        let first = (self.added / 2).min(up);
        let second = (self.added - first).min(down);
        [(self.added - second).min(up), second]
    }
}

fn through(link: EmulatorConfig, nominal: Duration) -> Result<Quantiles, EmulatorError> {
    let emulator = Emulator::start(link)?;
    let latency = pings(emulator.address(), nominal)?;
    emulator.stop()?;
    Ok(latency)
}

/// A thread that gives all bytes back, one connection after another.
struct Echo {
    address: SocketAddr,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        let ended = Arc::new(AtomicBool::new(false));
        let told = ended.clone();
        let serve = move || {
            for stream in listener.incoming() {
                if told.load(Ordering::Relaxed) {
                    return;
                }
                // A pinger whose connection fails says so itself; a stopped link resets its own.
                let _ = stream.and_then(echo_all);
            }
        };
        let thread = std::thread::Builder::new().name("hat-echo".into()).spawn(serve)?;
        Ok(Self { address, ended, thread: Some(thread) })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // The thread waits for a connection; where there can be none, it ends with the process.
        if TcpStream::connect(self.address).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

fn echo_all(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut ping = [0; PING_BYTES];
    loop {
        let bytes = stream.read(&mut ping)?;
        if bytes == 0 {
            return Ok(());
        }
        stream.write_all(&ping[..bytes])?;
    }
}

fn pings(to: SocketAddr, nominal: Duration) -> io::Result<Quantiles> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(nominal + SILENCE))?;
    let fitting = PINGS_TIME.as_nanos() / nominal.as_nanos().max(1);
    let count = usize::try_from(fitting).unwrap_or(PINGS_MAX).clamp(PINGS_MIN, PINGS_MAX);
    let warm_up = if nominal.is_zero() { WARM_UP } else { 1 };
    let mut ping = [0x5a; PING_BYTES];
    let mut times = Vec::with_capacity(count);
    for index in 0..warm_up + count {
        let begun = Instant::now();
        stream.write_all(&ping)?;
        stream.read_exact(&mut ping)?;
        if index >= warm_up {
            times.push(begun.elapsed());
        }
    }
    let median = times.chunks(count.div_ceil(BATCHES)).map(median_us).min_by(f64::total_cmp);
    times.sort_unstable();
    let p99 = times[(count * 99 / 100).min(count - 1)];
    let p50_us = median.expect("there is at least one batch");
    Ok(Quantiles { p50_us, p99_us: p99.as_nanos() as f64 / 1e3 })
}

fn median_us(times: &[Duration]) -> f64 {
    let mut times = times.to_vec();
    times.sort_unstable();
    times[times.len() / 2].as_nanos() as f64 / 1e3
}
