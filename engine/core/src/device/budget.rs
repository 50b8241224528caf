//! A request's budget: the time and the attempts that it has for whatever keeps it from its next
//! token.
//!
//! Time is charged while nothing comes nearer, for a link, a session or an answer. News end the
//! wait at hand, and only what no session of the request had brought before fills the budget up: a
//! token, or a row further than all rows so far. So the budget ends whatever a cloud does, and the
//! request with it.

use std::time::{Duration, Instant};

use hat_transport::random::Random;

/// Shortest pause before an attempt, whatever the cloud says.
pub(super) const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest one.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Sessions that may be lost without news: the cloud restarts, or needs their pages.
pub(super) const LOSSES_MAX: u32 = 8;
/// Sessions that may be lost so since the cloud lacks a resource.
pub(super) const LACKS_MAX: u32 = 3;
/// Waits for answers may take so many times as long as waits for a cloud.
pub(super) const ANSWER_FACTOR: u32 = 4;
/// A look charges one part in so many at most: a process that was stopped finds out first what has
/// come meanwhile.
const LOOKS: u32 = 16;

/// The pause before an attempt that follows `tries` others, of which it is twice as long as the
/// last: at random from the upper half of twice [`PAUSE_MIN`], doubled each time, up to `longest`.
pub(super) fn pause(tries: u32, longest: Duration, random: &mut dyn Random) -> Duration {
    let doubled = PAUSE_MIN.saturating_mul(2 << tries.saturating_sub(1).min(20));
    let half = doubled.min(longest) / 2;
    let mut bits = [0; 4];
    random.fill(&mut bits);
    half + half.mul_f64(f64::from(u32::from_le_bytes(bits)) / f64::from(u32::MAX))
}

/// Cause of a request's wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waits {
    /// Its turn on this device.
    Turn,
    /// An answer of a connected cloud, or its own pause.
    Answer,
    /// A cloud that is away, or has no room.
    Cloud,
}

/// The time that a request may spend without news.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Waiting for a cloud.
    pub(super) cloud: Duration,
    /// Waiting for anything but this device.
    pub(super) all: Duration,
}

impl Limits {
    /// Limits of a configuration that waits `reconnect` for a cloud.
    pub(super) fn new(reconnect: Duration) -> Self {
        let answer = if reconnect.is_zero() { Duration::from_secs(1) } else { reconnect };
        Self { cloud: reconnect, all: answer * ANSWER_FACTOR }
    }
}

/// Time and attempts spent since the last news.
#[derive(Debug)]
pub(super) struct Budget {
    /// The time up to here is charged.
    looked: Instant,
    waited: Duration,
    /// Of it, the time without a cloud.
    away: Duration,
    /// Sessions that were lost.
    pub(super) losses: u32,
    /// Reason of the last setback.
    pub(super) setback: Option<String>,
    /// The cloud has no room, and asked for this pause; `None` once a session is open.
    pub(super) refused: Option<Duration>,
    /// The furthest row that any session has brought.
    reached: u32,
    /// Frames of the session at hand that were sent, and those that the cloud has acknowledged.
    sent: usize,
    acked: usize,
}

impl Budget {
    /// The budget of a request that begins to run.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            looked: now,
            waited: Duration::ZERO,
            away: Duration::ZERO,
            losses: 0,
            setback: None,
            refused: None,
            reached: 0,
            sent: 0,
            acked: 0,
        }
    }

    /// The time since the last look went by so.
    pub(super) fn charge(&mut self, now: Instant, waits: Waits, limits: Limits) {
        let passed = now.saturating_duration_since(self.looked).min(limits.all / LOOKS);
        self.looked = self.looked.max(now);
        if waits != Waits::Turn {
            self.waited += passed;
        }
        if waits == Waits::Cloud {
            self.away += passed;
        }
    }

    /// The wait at hand was not in vain: its time is not charged.
    pub(super) fn forgive(&mut self, now: Instant) {
        self.looked = self.looked.max(now);
    }

    /// The cloud has brought rows, up to this one, that its session waited for.
    pub(super) fn rows(&mut self, now: Instant, row: u32) {
        self.forgive(now);
        if row > self.reached {
            self.reached = row;
            self.fill();
        }
    }

    /// Something new has come, a token for one: all time and attempts are there again.
    pub(super) fn fill(&mut self) {
        (self.waited, self.away) = (Duration::ZERO, Duration::ZERO);
        (self.losses, self.setback) = (0, None);
    }

    /// A session is asked for.
    pub(super) fn opens(&mut self) {
        (self.sent, self.acked) = (1, 0);
    }

    /// A frame of the session has been queued.
    pub(super) fn sends(&mut self) {
        self.sent += 1;
    }

    /// Of the session's frames so many are queued, or sent and not acknowledged: a slow link is no
    /// silence.
    pub(super) fn cached(&mut self, now: Instant, frames: usize) {
        let acked = self.sent.saturating_sub(frames);
        if acked > self.acked {
            self.acked = acked;
            self.forgive(now);
        }
    }

    /// The cloud has no room; returns when to ask again. One that asks for less than the shortest
    /// pause gets those of a cloud that loses sessions.
    pub(super) fn busy(&mut self, now: Instant, asked_ms: u32, random: &mut dyn Random) -> Instant {
        let asked = Duration::from_millis(u64::from(asked_ms));
        let wait = match asked < PAUSE_MIN {
            true => {
                self.losses = self.losses.saturating_add(1);
                pause(self.losses, PAUSE_MAX, random)
            }
            false => asked.min(PAUSE_MAX),
        };
        self.refused = Some(wait);
        now + wait
    }

    /// The session was lost at `then`, for this reason; returns when to open the next, or `None` if
    /// it was lost more than `most` times.
    pub(super) fn lost(
        &mut self,
        then: Instant,
        why: String,
        most: u32,
        random: &mut dyn Random,
    ) -> Option<Instant> {
        self.losses = self.losses.saturating_add(1);
        self.setback = Some(why);
        (self.losses <= most).then(|| then + pause(self.losses, PAUSE_MAX, random))
    }

    /// The wait that has taken all the time there was, if one has.
    pub(super) fn over(&self, waits: Waits, limits: Limits) -> Option<Waits> {
        let is_away = waits == Waits::Cloud && self.away >= limits.cloud;
        let is_silent = waits != Waits::Turn && self.waited >= limits.all;
        match is_away {
            true => Some(Waits::Cloud),
            false => is_silent.then_some(Waits::Answer),
        }
    }

    /// Time of the next look.
    pub(super) fn next_look(&self, waits: Waits, limits: Limits) -> Option<Instant> {
        let all = limits.all.saturating_sub(self.waited);
        let left = match waits {
            Waits::Turn => return None,
            Waits::Answer => all,
            Waits::Cloud => all.min(limits.cloud.saturating_sub(self.away)),
        };
        Some(self.looked + left.min(limits.all / LOOKS))
    }
}

#[cfg(test)]
mod tests {
    use hat_transport::random::SeededRandom;

    use super::*;

    const LIMITS: Limits = Limits { cloud: Duration::from_secs(30), all: Duration::from_secs(120) };
    const S: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_double_from_the_shortest_to_the_longest_at_random() {
        let mut random = SeededRandom::new(7);
        for tries in 1..40 {
            let least = PAUSE_MIN.saturating_mul(1 << (tries - 1).min(20)).min(PAUSE_MAX / 2);
            let drawn: Vec<_> = (0..50).map(|_| pause(tries, PAUSE_MAX, &mut random)).collect();
            assert!(drawn.iter().all(|it| (least..=2 * least).contains(it)), "{tries}: {drawn:?}");
            assert!(drawn.iter().any(|it| *it != drawn[0]), "{tries}");
        }
        assert!(pause(9, 5 * S, &mut random) <= 5 * S);
    }

    #[test]
    fn hints_of_a_busy_cloud_are_believed_between_the_bounds() {
        let (now, mut random) = (Instant::now(), SeededRandom::new(7));
        let mut budget = Budget::new(now);
        assert_eq!(budget.busy(now, 500, &mut random) - now, S / 2);
        assert_eq!(budget.busy(now, u32::MAX, &mut random) - now, PAUSE_MAX);
        assert_eq!(budget.refused, Some(PAUSE_MAX));
        for least in [1, 2, 4, 8] {
            assert!(budget.busy(now, 0, &mut random) - now >= least * PAUSE_MIN);
        }
        budget.refused = None;
        assert_eq!(budget.refused, None);
    }

    #[test]
    fn only_what_is_new_fills_the_budget_up() {
        let (mut now, mut random) = (Instant::now(), SeededRandom::new(7));
        let mut budget = Budget::new(now);
        let mut wait = |budget: &mut Budget, seconds: u32, waits| {
            (0..seconds).for_each(|_| {
                now += S;
                budget.charge(now, waits, LIMITS);
            });
            now
        };
        let at = wait(&mut budget, 20, Waits::Answer);
        budget.rows(at, 40);
        assert_eq!(budget.waited, Duration::ZERO);
        let at = wait(&mut budget, 20, Waits::Answer);
        // The rows of a replay cost nothing, and bring nothing.
        budget.rows(at + 5 * S, 40);
        budget.charge(at + 5 * S, Waits::Answer, LIMITS);
        assert_eq!(budget.waited, 20 * S);
        for losses in 0..LOSSES_MAX {
            assert_eq!(budget.losses, losses);
            assert!(budget.lost(at, "lost".into(), LOSSES_MAX, &mut random).is_some());
        }
        assert!(budget.lost(at, "lost".into(), LOSSES_MAX, &mut random).is_none());
        budget.fill();
        assert_eq!((budget.losses, budget.setback, budget.waited), (0, None, Duration::ZERO));
    }

    #[test]
    fn each_kind_of_wait_has_its_limit() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let mut now = start;
        let mut spend = |budget: &mut Budget, waits| {
            let begin = now;
            while budget.over(waits, LIMITS).is_none() {
                now = budget.next_look(waits, LIMITS).expect("it is charged");
                budget.charge(now, waits, LIMITS);
            }
            assert_eq!(budget.over(waits, LIMITS), Some(waits));
            assert_eq!(budget.over(Waits::Turn, LIMITS), None);
            now - begin
        };
        assert_eq!(spend(&mut budget, Waits::Answer), LIMITS.all);
        budget.fill();
        assert_eq!(spend(&mut budget, Waits::Cloud), LIMITS.cloud);
        // The cloud is back, and brings nothing.
        assert_eq!(spend(&mut budget, Waits::Answer), LIMITS.all - LIMITS.cloud);
        budget.fill();
        assert_eq!(budget.next_look(Waits::Turn, LIMITS), None);
        // An hour without a look, since the process stood still.
        budget.charge(now + 3600 * S, Waits::Cloud, LIMITS);
        assert_eq!(budget.over(Waits::Cloud, LIMITS), None);
    }

    #[test]
    fn who_waits_for_no_cloud_still_waits_for_answers() {
        let mut budget = Budget::new(Instant::now());
        let limits = Limits::new(Duration::ZERO);
        assert_eq!(budget.over(Waits::Cloud, limits), Some(Waits::Cloud));
        let waits = Waits::Answer;
        assert_eq!(budget.over(waits, limits), None);
        while budget.over(waits, limits).is_none() {
            budget.charge(budget.next_look(waits, limits).expect("later"), waits, limits);
        }
        assert_eq!(budget.waited, 4 * S);
    }
}
