//! Virtual time, and what happens next in it.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

/// Virtual time, nanoseconds.
pub(crate) type Time = u64;

/// No timer is set that far ahead.
const FAR: Time = 1_800_000_000_000;

pub(crate) fn nanoseconds(seconds: f64) -> Time {
    (seconds * 1e9).round() as Time
}

pub(crate) fn seconds(time: Time) -> f64 {
    time as f64 * 1e-9
}

/// An event.
pub(crate) enum Event {
    /// A request comes.
    Ask(usize),
    /// A device has computed what it was asked to.
    Worked(usize),
    /// A device's uplink has sent what it had, or its cloud's downlink to it.
    Freed(usize, Role),
    /// Bytes have come to a device, or to its cloud.
    Arrived(usize, Role, Vec<u8>),
    /// A stage of a cloud is done.
    Staged(usize, usize),
    /// A device, or a cloud, or its end of a device's connection, wants to be looked after.
    Timer(usize, Role),
    CloudTimer(usize),
}

pub(crate) use hat_transport::message::Role;

struct Entry {
    at: Time,
    number: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The earliest is the largest; of equal ones the first that was pushed.
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// Events to come, and the present time.
pub(crate) struct Queue {
    entries: BinaryHeap<Entry>,
    count: u64,
    pub(crate) now: Time,
    epoch: Instant,
}

impl Queue {
    pub(crate) fn new() -> Self {
        Self { entries: BinaryHeap::new(), count: 0, now: 0, epoch: Instant::now() }
    }

    /// The time, as the cores take it.
    pub(crate) fn instant(&self) -> Instant {
        self.epoch + Duration::from_nanos(self.now)
    }

    /// A time of a core's.
    pub(crate) fn time(&self, at: Instant) -> Time {
        at.saturating_duration_since(self.epoch).as_nanos() as Time
    }

    pub(crate) fn push(&mut self, at: Time, event: Event) {
        self.count += 1;
        self.entries.push(Entry { at: at.max(self.now), number: self.count, event });
    }

    /// Asks for a timer, unless an earlier one is set.
    pub(crate) fn set_timer(&mut self, set: &mut Option<Time>, at: Time, event: Event) {
        let at = at.max(self.now + 1000);
        // Patience with those who are silent: all are there.
        if at > self.now + FAR {
            return;
        }
        if set.is_none_or(|earlier| at < earlier || earlier <= self.now) {
            *set = Some(at);
            self.push(at, event);
        }
    }

    /// The next event, at its time.
    pub(crate) fn pop(&mut self) -> Option<Event> {
        let Entry { at, event, .. } = self.entries.pop()?;
        self.now = at;
        Some(event)
    }
}
