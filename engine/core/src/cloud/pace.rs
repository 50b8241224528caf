//! Limit on the time of a step with prompts: short while somebody decodes, longer while nobody
//! does.
//!
//! A verify that comes while such a step runs waits for its end. So while any session decodes, a
//! step of prompts and the verifies behind it take a few times as long as one verify alone. What
//! rows take is fitted from the steps that ran.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::chunk::StepCost;
use crate::estimate::{Average, StepTimes};
use crate::sched::{Bound, SessionKey};

/// A session decodes for so long after its last verify: longer than a round trip and what a device
/// does in between.
const DECODES_FOR: Duration = Duration::from_millis(1000);
/// A step of prompts and the verifies behind it take as long as so many steps of one verify,
const ROUND_TIMES: f64 = 2.5;
/// but the step of prompts is never shorter than so many of them,
const PROMPT_TIMES_MIN: f64 = 1.25;
/// nor than this, which nobody notices.
const PROMPT_S_MIN: f64 = 2e-3;
/// A step while nobody decodes: what newcomers wait for.
const QUIET_S: f64 = 0.15;
/// Nor is such a step cut below so many times its fixed cost, which is lost once a step.
const QUIET_TIMES: f64 = 20.0;
/// A step of this length is long beside the time in which the next one is planned.
const LONG_S: f64 = 0.02;

/// Costs of steps, and the sessions that decode.
#[derive(Debug, Default)]
pub(super) struct Pace {
    steps: StepTimes,
    /// Rows in a step of verifies, and rows that one of them attends to.
    verify_rows: Average,
    context: Average,
    /// Time of each decoding session's last verify.
    decoders: BTreeMap<SessionKey, Instant>,
    latest: Option<Instant>,
}

impl Pace {
    /// A step of `rows` rows, which attended to `attended` rows in all, took so long; so many of
    /// its rows were verifies.
    pub(super) fn note_step(
        &mut self,
        rows: usize,
        attended: u64,
        verify_rows: u32,
        took: Duration,
    ) {
        let Some((rows, context)) = mean(rows, attended) else { return };
        self.steps.note_mean(rows, context, took.as_secs_f64());
        if verify_rows > 0 {
            self.verify_rows.note(f64::from(verify_rows));
            self.context.note(context);
        }
    }

    /// A verify of a session has come, or rows of it go back: verifies follow. The end of a prompt
    /// counts once it is computed, or a prompt would be cut for the sake of its own answer.
    pub(super) fn note_decoder(&mut self, session: SessionKey, now: Instant) {
        self.decoders.insert(session, now);
        self.latest = Some(now);
    }

    /// A session has ended.
    pub(super) fn forget(&mut self, session: SessionKey) {
        self.decoders.remove(&session);
    }

    /// True if any session decodes.
    pub(super) fn is_decoding(&mut self, now: Instant) -> bool {
        let is_recent = |at: &Instant| now.saturating_duration_since(*at) < DECODES_FOR;
        // The map is emptied at once, when the last of them has been silent for long.
        if !self.latest.as_ref().is_some_and(is_recent) {
            self.decoders.clear();
            self.latest = None;
        }
        !self.decoders.is_empty()
    }

    /// True if such a step takes long.
    pub(super) fn is_long(&self, rows: usize, attended: u64) -> bool {
        let (Some(cost), Some((rows, context))) = (self.steps.cost(0.0), mean(rows, attended))
        else {
            return false;
        };
        seconds(&cost, f64::from(rows), context) > LONG_S
    }

    /// The bound of the next step, while so many works of prompts wait. Each of them brings the
    /// time for its own rows, so that they share the fixed cost of a step: with less, a full cloud
    /// would compute fixed costs and hardly a row.
    pub(super) fn bound(&self, is_decoding: bool, prompts: usize) -> Bound {
        let Some(cost) = self.steps.cost(0.0) else { return Bound::NONE };
        let quiet_s = QUIET_S.max(QUIET_TIMES * cost.fixed);
        if !is_decoding {
            return bound_of(&cost, quiet_s);
        }
        let context = self.context.value().unwrap_or(0.0);
        let one_s = seconds(&cost, 1.0, context);
        let verifies_s = seconds(&cost, self.verify_rows.value().unwrap_or(1.0), context);
        let left_s = (ROUND_TIMES * one_s - verifies_s).max(PROMPT_TIMES_MIN * one_s);
        let rows_s = left_s.max(PROMPT_S_MIN) - cost.fixed;
        bound_of(&cost, (cost.fixed + rows_s * prompts.max(1) as f64).min(quiet_s))
    }
}

/// Rows of a step, and what one attends to in the mean; `None` if it has none.
fn mean(rows: usize, attended: u64) -> Option<(u32, f64)> {
    let rows = u32::try_from(rows).ok().filter(|rows| *rows > 0)?;
    Some((rows, attended as f64 / f64::from(rows)))
}

fn seconds(cost: &StepCost, rows: f64, context: f64) -> f64 {
    cost.fixed + rows * (cost.per_row + cost.per_row_context * context)
}

fn bound_of(cost: &StepCost, step_s: f64) -> Bound {
    let picoseconds = |seconds: f64| (seconds * 1e12) as u64;
    Bound {
        step: picoseconds(step_s),
        fixed: picoseconds(cost.fixed),
        row: picoseconds(cost.per_row),
        row_context: picoseconds(cost.per_row_context),
        piece: u32::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cloud that has seen steps of 2 ms and 1 ms a row.
    fn taught() -> Pace {
        let mut pace = Pace::default();
        for rows in [1, 2, 4, 16, 64, 128] {
            let verifies = if rows == 1 { 1 } else { 0 };
            let took = Duration::from_millis(2 + rows);
            pace.note_step(rows as usize, rows * rows / 2, verifies, took);
        }
        pace
    }

    fn rows_in(bound: &Bound) -> u64 {
        (bound.step - bound.fixed) / bound.row
    }

    #[test]
    fn steps_are_short_while_somebody_decodes() {
        let mut pace = taught();
        let start = Instant::now();
        assert!(!pace.is_decoding(start));
        assert!(
            (146..=150).contains(&rows_in(&pace.bound(false, 1))),
            "{:?}",
            pace.bound(false, 1)
        );
        pace.note_decoder(7, start);
        assert!(pace.is_decoding(start + DECODES_FOR / 2));
        // Two and a half verifies of 3 ms, less the one that follows, less the fixed cost.
        assert!((2..=3).contains(&rows_in(&pace.bound(true, 1))), "{:?}", pace.bound(true, 1));
        assert!(!pace.is_decoding(start + DECODES_FOR));
        pace.note_decoder(7, start);
        pace.note_decoder(8, start);
        pace.forget(7);
        assert!(pace.is_decoding(start));
        pace.forget(8);
        assert!(!pace.is_decoding(start));
    }

    #[test]
    fn prompts_keep_a_share_beside_many_verifies() {
        let mut pace = taught();
        for _ in 0..50 {
            pace.note_step(200, 0, 200, Duration::from_millis(202));
        }
        assert!((1..=2).contains(&rows_in(&pace.bound(true, 1))), "{:?}", pace.bound(true, 1));
    }

    #[test]
    fn prompts_share_the_fixed_cost_of_a_step() {
        let mut pace = taught();
        pace.note_decoder(7, Instant::now());
        let rows = |prompts| rows_in(&pace.bound(true, prompts));
        let one = rows(1);
        assert!((4 * one..=4 * one + 4).contains(&rows(4)), "{one} {}", rows(4));
        assert_eq!(rows(10_000), rows_in(&pace.bound(false, 1)));
    }

    #[test]
    fn nothing_is_bounded_before_anything_is_known() {
        let pace = Pace::default();
        assert_eq!((pace.bound(true, 1), pace.is_long(512, 0)), (Bound::NONE, false));
        assert!(taught().is_long(19, 0) && !taught().is_long(17, 0));
    }
}
