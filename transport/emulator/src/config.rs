//! Settings of a link, with their limits.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use super::Calibration;

/// One direction of a link.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct DirectionConfig {
    /// Bits a second; `None` for no limit. 10 kbit/s to 100 Gbit/s.
    pub rate_bits_s: Option<u64>,
    /// Travel time of a byte; at most 10 s.
    pub delay: Duration,
    /// A byte travels up to this much longer, in steps of 10 ms; at most 10 s.
    pub jitter: Duration,
    /// Times in which the bottleneck sends nothing.
    pub stall: Option<StallConfig>,
    /// Bytes that may wait for the bottleneck, 4 KiB to 1 GiB; more stay in the sender's socket.
    pub queue_bytes: usize,
}

impl Default for DirectionConfig {
    /// No limit and no delay; a queue of 256 KiB.
    fn default() -> Self {
        Self {
            rate_bits_s: None,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            stall: None,
            queue_bytes: 256 << 10,
        }
    }
}

/// A stall in each period, at a place in it that the seed chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StallConfig {
    /// The period; 10 ms to 24 h.
    pub every: Duration,
    /// Duration of a stall; at least 1 ms, at most nine tenths of the period.
    pub lasts: Duration,
}

/// Times at which all connections are reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CutConfig {
    /// Once, when this many bytes came out, both directions together.
    pub after_bytes: Option<u64>,
    /// Once, at this time; at most 24 h.
    pub after: Option<Duration>,
    /// Again and again: once in the second half of each period, where the seed chooses. 10 ms to
    /// 24 h.
    pub every: Option<Duration>,
    /// Nobody listens for this long after a cut; at most 1 h.
    pub away: Duration,
}

/// A whole link.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EmulatorConfig {
    /// Address to listen at; port 0 for any free one.
    pub listen: SocketAddr,
    /// Address that connections are relayed to.
    pub to: SocketAddr,
    /// From those who connect.
    pub up: DirectionConfig,
    /// Back to them.
    pub down: DirectionConfig,
    /// Cuts of the link.
    pub cut: CutConfig,
    /// Seed of jitter, stalls and cuts.
    pub seed: u64,
    /// Measured delay of the emulator itself, which is subtracted from the link's delays.
    pub calibration: Option<Calibration>,
}

impl EmulatorConfig {
    /// A link without limits or delay, from a free port of 127.0.0.1.
    #[must_use]
    pub fn new(to: SocketAddr) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            to,
            up: DirectionConfig::default(),
            down: DirectionConfig::default(),
            cut: CutConfig::default(),
            seed: 0,
            calibration: None,
        }
    }

    /// Half of a round trip's time in each direction.
    #[must_use]
    pub fn rtt(mut self, rtt: Duration) -> Self {
        self.up.delay = rtt / 2;
        self.down.delay = rtt - rtt / 2;
        self
    }

    /// Rates in Mbit/s, up and down.
    #[must_use]
    pub fn mbit(mut self, up: f64, down: f64) -> Self {
        self.up.rate_bits_s = Some((up * 1e6) as u64);
        self.down.rate_bits_s = Some((down * 1e6) as u64);
        self
    }

    /// Checks that all values are in their ranges.
    ///
    /// # Errors
    /// [`EmulatorError::Setting`] names the first that is not.
    pub fn check(&self) -> Result<(), EmulatorError> {
        self.up.check()?;
        self.down.check()?;
        let day = Duration::from_secs(86_400);
        let cut = &self.cut;
        within("cut.after_bytes", cut.after_bytes.is_none_or(|n| n > 0), "at least 1")?;
        within("cut.after", cut.after.is_none_or(|at| at <= day), "0 to 24 h")?;
        let every = |every| (Duration::from_millis(10)..=day).contains(&every);
        within("cut.every", cut.every.is_none_or(every), "10 ms to 24 h")?;
        within("cut.away", cut.away <= Duration::from_secs(3600), "0 to 1 h")
    }
}

impl DirectionConfig {
    fn check(&self) -> Result<(), EmulatorError> {
        let rate = |rate| (10_000..=100_000_000_000).contains(&rate);
        within("rate_bits_s", self.rate_bits_s.is_none_or(rate), "10 kbit/s to 100 Gbit/s")?;
        let ten = Duration::from_secs(10);
        within("delay", self.delay <= ten, "0 to 10 s")?;
        within("jitter", self.jitter <= ten, "0 to 10 s")?;
        within("queue_bytes", (4 << 10..=1 << 30).contains(&self.queue_bytes), "4 KiB to 1 GiB")?;
        let Some(StallConfig { every, lasts }) = self.stall else { return Ok(()) };
        let day = Duration::from_secs(86_400);
        within("stall.every", (Duration::from_millis(10)..=day).contains(&every), "10 ms to 24 h")?;
        let fits = lasts >= Duration::from_millis(1) && lasts * 10 <= every * 9;
        within("stall.lasts", fits, "1 ms to nine tenths of stall.every")
    }
}

fn within(name: &'static str, fits: bool, allowed: &'static str) -> Result<(), EmulatorError> {
    if fits { Ok(()) } else { Err(EmulatorError::Setting { name, allowed }) }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).expect("checked settings are far below 584 years")
}

/// An error in emulating a link.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmulatorError {
    /// A value of the configuration is out of its range.
    #[error("{name} is out of range: {allowed}")]
    Setting {
        /// Name of the field.
        name: &'static str,
        /// Its range.
        allowed: &'static str,
    },
    /// The address can't be listened at.
    #[error("can't listen at {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The relay stopped, or a calibration's own connections failed.
    #[error("the relay failed: {0}")]
    Relay(#[from] io::Error),
}
