//! Report on a link: bytes, rates, and how well releases kept to their plan.

use std::cmp::Ordering;

use serde::Serialize;

use super::{Calibration, Piece};

/// Counts of nanosecond values, of fixed size: known to less than 1 %.
#[derive(Clone, Debug)]
pub(super) struct Histogram(hdrhistogram::Histogram<u64>);

impl Default for Histogram {
    fn default() -> Self {
        let all = hdrhistogram::Histogram::new_with_bounds(1, u64::MAX, 2);
        Self(all.expect("constant bounds"))
    }
}

impl Histogram {
    pub(super) fn add(&mut self, value: u64) {
        self.0.saturating_record(value);
    }

    /// The middle of the bucket that holds the quantile `q`, in microseconds.
    pub(super) fn quantile_us(&self, q: f64) -> Option<f64> {
        let middle = self.0.median_equivalent(self.0.value_at_quantile(q));
        (!self.0.is_empty()).then_some(middle as f64 / 1e3)
    }

    fn quantiles(&self) -> Option<Quantiles> {
        Some(Quantiles { p50_us: self.quantile_us(0.5)?, p99_us: self.quantile_us(0.99)? })
    }
}

/// Median and 99th percentile, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quantiles {
    /// The median.
    pub p50_us: f64,
    /// The 99th percentile.
    pub p99_us: f64,
}

/// Traffic in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct DirectionReport {
    /// Bytes taken from senders.
    pub bytes_in: u64,
    /// Bytes given to receivers.
    pub bytes_out: u64,
    /// Mbit/s while the bottleneck was busy, stalls left out, by the actual releases; `None`
    /// without a rate or without bytes.
    pub busy_mbit_s: Option<f64>,
    /// From entry to the planned release, queue and calibration included; `None` without bytes.
    pub planned: Option<Quantiles>,
    /// From entry to the actual release.
    pub actual: Option<Quantiles>,
    /// Actual less planned release.
    pub late: Option<Quantiles>,
    /// Stalls that began.
    pub stalls: u64,
}

/// Traffic and precision of a link.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// From those who connect.
    pub up: DirectionReport,
    /// Back to them.
    pub down: DirectionReport,
    /// Connections that were accepted.
    pub connections: u64,
    /// Open connections, of those.
    pub open: usize,
    /// Connections, of those, whose other end could not be reached.
    pub unreachable: u64,
    /// Cuts of the whole link.
    pub cuts: u64,
    /// Calibration that was subtracted from the delays.
    pub calibration: Option<Calibration>,
}

/// Counts of one direction.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
    pub(super) unreachable: u64,
    /// Bytes that came out of the bottleneck, and how long it was busy in periods before this one.
    bytes_sent: u64,
    busy_ns: u64,
    period: Period,
    planned: Histogram,
    actual: Histogram,
    late: Histogram,
}

/// A time in which the bottleneck had no rest, by actual releases.
#[derive(Clone, Copy, Debug, Default)]
struct Period {
    number: u64,
    begun: u64,
    stalled: u64,
    sent: u64,
}

impl Period {
    fn busy_ns(self) -> u64 {
        self.sent - self.begun - self.stalled
    }
}

impl Tally {
    /// Takes in a piece that comes out at `now`.
    pub(super) fn count(&mut self, piece: Piece, entered: u64, now: u64) {
        self.planned.add(piece.release - entered);
        self.actual.add(now - entered);
        let late = now - piece.release;
        self.late.add(late);
        self.bytes_sent += piece.bytes as u64;
        let (number, begun, stalled) = (piece.period, piece.begun, piece.stalled);
        let sent = piece.sent + late;
        let period = &mut self.period;
        match number.cmp(&period.number) {
            // Connections are turned one after another: pieces of one turn come in any order.
            Ordering::Less => self.busy_ns += piece.sent - begun - stalled,
            Ordering::Equal => {
                period.begun = period.begun.min(begun);
                period.stalled += stalled;
                period.sent = period.sent.max(sent);
            }
            Ordering::Greater => {
                self.busy_ns += period.busy_ns();
                *period = Period { number, begun, stalled, sent };
            }
        }
    }

    pub(super) fn report(&self, rated: bool, stalls: u64) -> DirectionReport {
        let busy_ns = self.busy_ns + self.period.busy_ns();
        let busy = rated && busy_ns > 0;
        DirectionReport {
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            busy_mbit_s: busy.then(|| self.bytes_sent as f64 * 8e3 / busy_ns as f64),
            planned: self.planned.quantiles(),
            actual: self.actual.quantiles(),
            late: self.late.quantiles(),
            stalls,
        }
    }
}
