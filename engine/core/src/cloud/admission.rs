//! Admission: order of the devices when there is no room, and time for each to come back.
//!
//! A session ends on its own, and its pages are free then; so the time until the next one ends is
//! the mean life of a session over how many there are. Each refused device is given the next such
//! moment, so they come back one after the other. Whoever finds no room again and again, or has no
//! session at all while others open their next, is first in line: what it needs is kept for it.

use std::time::{Duration, Instant};

use hat_transport::conn::ConnectionId;

use super::sessions::Sessions;
use crate::estimate::Average;
use crate::sched::{DeviceKey, SessionKey};

/// Soonest that a refused device is asked back.
const RETRY_MIN: Duration = Duration::from_millis(50);
/// Latest that a refused device is asked back.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// The device first in line comes back soon: what is kept for it is of no use meanwhile.
const FIRST_RETRY_MAX: Duration = Duration::from_millis(250);
/// Assumed life of a session before one has ended.
const LIFE_UNKNOWN: Duration = Duration::from_secs(1);
/// A device that was refused so often goes before others that come by.
const REFUSALS_MAX: u32 = 3;
/// A device that comes back later than this after its time has given up its place.
const GRACE: Duration = Duration::from_secs(1);

/// A device that found no room.
#[derive(Clone, Copy, Debug)]
struct Refused {
    device: DeviceKey,
    /// Of the session that found no room.
    pages: usize,
    times: u32,
    /// Sessions that the device has.
    sessions: u32,
    /// Time at which it was to come back; all that it asks before counts once.
    due: Instant,
}

impl Refused {
    /// True if it goes before a device that has `sessions` sessions.
    fn is_before(&self, sessions: u32) -> bool {
        match (self.sessions, sessions) {
            (0, 1..) => true,
            (1.., 0) => false,
            _ => self.times >= REFUSALS_MAX,
        }
    }
}

/// Devices that found no room, the first first, and what is known of how soon there is some.
#[derive(Debug, Default)]
pub(super) struct Admission {
    refused: Vec<Refused>,
    /// Mean life of a session, seconds.
    life_s: Average,
    /// Time at which the next session is expected to end that nobody waits for yet.
    next_end: Option<Instant>,
    /// Number of devices sent away for the longest time.
    far: u32,
}

impl Admission {
    /// A session has ended that lived so long.
    pub(super) fn note_life(&mut self, life: Duration) {
        self.life_s.note(life.as_secs_f64());
    }

    /// Pages that are kept from `device`, which has `sessions` sessions: what the device
    /// first in line needs for its next one. `None` if nobody is before it.
    pub(super) fn kept_from(
        &mut self,
        now: Instant,
        device: DeviceKey,
        sessions: u32,
    ) -> Option<usize> {
        self.refused.retain(|refused| refused.due + GRACE > now);
        let own = self.refused.iter().position(|refused| refused.device == device);
        let own_times = own.map_or(0, |own| self.refused[own].times);
        let before = &self.refused[..own.unwrap_or(self.refused.len())];
        let is_before = |refused: &&Refused| {
            // Of two that were refused often, the one that came first.
            refused.is_before(sessions) && (own_times < REFUSALS_MAX || refused.times >= own_times)
        };
        before.iter().find(is_before).map(|refused| refused.pages)
    }

    /// Time until the next device that finds no room is to come back, with `open` sessions open.
    pub(super) fn next_retry(&mut self, now: Instant, open: usize) -> Duration {
        let life = self.life_s.value().map_or(LIFE_UNKNOWN, Duration::from_secs_f64);
        let share = life.div_f64(open.max(1) as f64);
        let next = self.next_end.unwrap_or(now).max(now) + share.min(RETRY_MAX);
        self.next_end = Some(next.min(now + RETRY_MAX));
        let retry = next.duration_since(now).max(RETRY_MIN);
        if retry < RETRY_MAX {
            return retry;
        }
        // Too many to give each a time of its own: spread over the second half.
        self.far = self.far.wrapping_add(1);
        RETRY_MAX / 2 + (RETRY_MAX / 32) * (self.far.wrapping_mul(7) % 16)
    }

    /// A device that has `sessions` sessions found no room for one more of this many pages, and
    /// would come back after `retry`; returns the time at which it shall.
    pub(super) fn refuse(
        &mut self,
        now: Instant,
        device: DeviceKey,
        pages: usize,
        sessions: u32,
        retry: Duration,
    ) -> Duration {
        let own = self.refused.iter_mut().find(|refused| refused.device == device);
        let Some(own) = own else {
            let due = now + retry;
            self.refused.push(Refused { device, pages, times: 1, sessions, due });
            return retry;
        };
        own.sessions = sessions;
        if now < own.due {
            // One of several that it wants to open at once.
            return retry;
        }
        own.times += 1;
        let retry = if own.times >= REFUSALS_MAX { retry.min(FIRST_RETRY_MAX) } else { retry };
        (own.pages, own.due) = (pages, now + retry);
        retry
    }

    /// A device got in, or is gone: it waits no longer.
    pub(super) fn forget(&mut self, device: DeviceKey) {
        self.refused.retain(|refused| refused.device != device);
    }
}

/// Pages and places for sessions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) pages: usize,
    pub(super) places: usize,
}

impl Room {
    /// True if there is as much as `wanted`.
    pub(super) fn holds(self, wanted: Self) -> bool {
        self.pages >= wanted.pages && self.places >= wanted.places
    }
}

/// A session that may give way to others.
#[derive(Debug)]
pub(super) struct Idle {
    pub(super) key: SessionKey,
    pub(super) active_at: Instant,
    pub(super) pages: usize,
}

/// Sessions that have nothing to do and of which nothing was heard for `idle_after`, the longest
/// idle first. Those of a device whose link is broken go before all others, and are not waited
/// for: it may never come back, and replays if it does.
pub(super) fn idle_sessions(
    sessions: &Sessions,
    now: Instant,
    idle_after: Duration,
    is_up: impl Fn(ConnectionId) -> bool,
) -> Vec<Idle> {
    let mut idle = Vec::new();
    for (key, session) in sessions.iter() {
        let is_up = is_up(session.connection);
        if session.is_idle(now, if is_up { idle_after } else { Duration::ZERO }) {
            let (active_at, pages) = (session.active_at, session.sequence.pages().len());
            idle.push((is_up, Idle { key, active_at, pages }));
        }
    }
    idle.sort_unstable_by_key(|(is_up, idle)| (*is_up, idle.active_at, idle.key));
    idle.into_iter().map(|(_, idle)| idle).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn devices_are_asked_back_one_after_the_other() {
        let (mut admission, now) = (Admission::default(), Instant::now());
        admission.note_life(1000 * MS);
        // Ten sessions of a second each: one ends each 100 ms.
        let retries: Vec<_> = (0..5).map(|_| admission.next_retry(now, 10)).collect();
        assert_eq!(retries, [100 * MS, 200 * MS, 300 * MS, 400 * MS, 500 * MS]);
        let later = now + 2000 * MS;
        assert_eq!(admission.next_retry(later, 10), 100 * MS);
        for _ in 0..200 {
            admission.note_life(MS);
        }
        assert_eq!(admission.next_retry(later + 1000 * MS, 10), RETRY_MIN);
    }

    #[test]
    fn no_time_is_beyond_the_longest_and_they_differ() {
        let (mut admission, now) = (Admission::default(), Instant::now());
        admission.note_life(Duration::from_secs(1 << 40));
        let retries: Vec<_> = (0..64).map(|_| admission.next_retry(now, 3)).collect();
        assert!(
            retries.iter().all(|retry| (RETRY_MAX / 2..=RETRY_MAX).contains(retry)),
            "{retries:?}"
        );
        let apart: std::collections::HashSet<_> = retries.iter().collect();
        assert_eq!(apart.len(), 16);
    }

    #[test]
    fn whoever_was_refused_again_and_again_goes_first() {
        let (mut admission, mut now) = (Admission::default(), Instant::now());
        for times in 1..=REFUSALS_MAX {
            let retry = admission.refuse(now, 7, 100, 1, 5000 * MS);
            assert_eq!(retry, if times < 3 { 5000 * MS } else { FIRST_RETRY_MAX });
            now += retry;
            let kept = (times == REFUSALS_MAX).then_some(100);
            assert_eq!(admission.kept_from(now, 8, 1), kept, "after {times} refusals");
        }
        assert_eq!(admission.kept_from(now, 7, 1), None, "not from itself");
        // Two that were refused often do not block each other.
        for _ in 0..REFUSALS_MAX {
            admission.refuse(now, 8, 50, 1, 50 * MS);
            admission.refuse(now, 8, 50, 1, 70 * MS);
            now += 50 * MS;
        }
        assert_eq!(admission.kept_from(now, 8, 1), Some(100));
        assert_eq!(admission.kept_from(now, 7, 1), None);
        admission.forget(7);
        assert_eq!(admission.kept_from(now, 8, 1), None);
        assert_eq!(admission.kept_from(now, 9, 1), Some(50));
        assert_eq!(admission.kept_from(now, 9, 0), None, "it has no session at all");
        now += 50 * MS + GRACE;
        assert_eq!(admission.kept_from(now, 9, 1), None, "8 has not come back");
    }

    #[test]
    fn asking_a_thousand_times_at_once_is_asking_once() {
        let (mut admission, now) = (Admission::default(), Instant::now());
        for _ in 0..1000 {
            assert_eq!(admission.refuse(now, 7, 100, 1, 500 * MS), 500 * MS);
        }
        assert_eq!(admission.kept_from(now, 8, 1), None);
    }

    #[test]
    fn a_device_without_sessions_goes_before_another_ones_next() {
        let (mut admission, now) = (Admission::default(), Instant::now());
        admission.refuse(now, 7, 100, 0, 500 * MS);
        assert_eq!(admission.kept_from(now, 8, 1), Some(100));
        assert_eq!(admission.kept_from(now, 8, 0), None);
    }
}
