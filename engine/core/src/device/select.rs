//! The next piece to compute: of which request, how large, and when the uplink has enough.
//!
//! Pure: numbers in, numbers out.

use std::time::Duration;

use crate::chunk::StepCost;

/// Pieces of others that go before one whose turn it is not.
const PATIENCE: u32 = 8;
/// A piece of a prompt takes no longer: so long a decode row waits for it at most.
const PIECE_S: f64 = 0.05;
/// Fewest rows of a piece, however slow the device is.
const PIECE_ROWS_MIN: u32 = 8;
/// Seconds of uplink that prompts have waiting at most, and one piece: the link does not run dry
/// while a piece is computed, and a verify has no more than that ahead of it.
const AHEAD_S: f64 = 0.2;
/// Bytes instead, while the link's rate is not known.
const AHEAD_BYTES: u64 = 1 << 20;
/// Shortest and longest pause before the uplink is looked at again.
const PAUSE_S: (f64, f64) = (1e-3, 0.05);

/// A request that has something to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ask {
    /// Rows that are not computed.
    pub(super) rows: u32,
    /// Pieces of others that went before it since its last one.
    pub(super) passed: u32,
}

/// Index in `asks` of the next computation: the one with the fewest rows left, so that a token does
/// not wait for a prompt, nor a short prompt for a long one. But one that has been passed over
/// [`PATIENCE`] times goes first, so that short ones in a row do not delay a long one for ever. Of
/// equal ones the first.
pub(super) fn choose<K>(asks: impl Iterator<Item = (K, Ask)>) -> Option<K> {
    let key = |ask: &Ask| match ask.passed >= PATIENCE {
        true => (0, u32::MAX - ask.passed),
        false => (1, ask.rows),
    };
    asks.min_by_key(|(_, ask)| key(ask)).map(|(request, _)| request)
}

/// Rows of a piece that has `rows` at most and comes behind `prefix` others.
pub(super) fn piece_rows(cost: Option<StepCost>, prefix: u32, rows: u32) -> u32 {
    let Some(cost) = cost else { return rows };
    let is_short = |count: &u32| cost.seconds(*count, prefix) <= PIECE_S;
    let halves = std::iter::successors(Some(rows), |rows| Some(rows / 2));
    let fits = halves.take_while(|count| *count > PIECE_ROWS_MIN).find(is_short);
    fits.unwrap_or(PIECE_ROWS_MIN.min(rows))
}

/// Time to wait before more of a prompt is computed, with `unacked` bytes sent or queued and not
/// acknowledged; `None` if more may be computed now. `busy_s` is the time that bytes keep the
/// uplink busy, `None` while that is not known.
pub(super) fn upload_pause(unacked: u64, busy_s: impl Fn(u64) -> Option<f64>) -> Option<Duration> {
    let beyond_s = match busy_s(unacked) {
        Some(busy_s) => busy_s - AHEAD_S,
        None if unacked > AHEAD_BYTES => PAUSE_S.0,
        None => return None,
    };
    (beyond_s > 0.0).then(|| Duration::from_secs_f64(beyond_s.clamp(PAUSE_S.0, PAUSE_S.1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(rows: u32, passed: u32) -> Ask {
        Ask { rows, passed }
    }

    #[test]
    fn the_fewest_rows_go_first() {
        let asks = [(7, ask(900, 0)), (8, ask(1, 0)), (9, ask(1, 0)), (10, ask(30, 7))];
        assert_eq!(choose(asks.into_iter()), Some(8), "of equal ones the oldest");
        assert_eq!(choose(std::iter::empty::<(u64, Ask)>()), None);
    }

    /// Three that decode without a pause, short prompts one after another, and a long one.
    #[test]
    fn short_ones_in_a_row_do_not_starve_a_long_one() {
        let mut asks = [ask(1, 0), ask(1, 0), ask(1, 0), ask(20, 0), ask(4000, 0)];
        let mut served = [0; 5];
        for _ in 0..900 {
            let chosen = choose(asks.into_iter().enumerate()).unwrap();
            served[chosen] += 1;
            for (index, ask) in asks.iter_mut().enumerate() {
                ask.passed = if index == chosen { 0 } else { ask.passed + 1 };
            }
        }
        assert!(served[4] >= 80, "{served:?}");
        assert!(served[0] + served[1] + served[2] >= 600, "{served:?}");
    }

    #[test]
    fn a_piece_is_bounded_in_time() {
        let cost = StepCost { fixed: 1e-3, per_row: 2e-3, per_row_context: 0.0 };
        assert_eq!(piece_rows(None, 0, 64), 64);
        assert_eq!(piece_rows(Some(cost), 0, 64), 16);
        assert_eq!(piece_rows(Some(cost), 0, 20), 20);
        assert_eq!(piece_rows(Some(cost), 0, 3), 3);
        let far = StepCost { per_row_context: 1e-6, ..cost };
        assert_eq!(piece_rows(Some(far), 6000, 64), PIECE_ROWS_MIN);
        let slow = StepCost { per_row: 1.0, ..cost };
        assert_eq!(piece_rows(Some(slow), 0, 64), PIECE_ROWS_MIN);
    }

    #[test]
    fn prompts_are_computed_no_further_than_the_link_takes_soon() {
        let at = |rate: f64| move |bytes: u64| Some(bytes as f64 / rate);
        assert_eq!(upload_pause(20_000, at(1e5)), None);
        assert_eq!(upload_pause(20_600, at(1e5)), Some(Duration::from_millis(6)));
        assert_eq!(upload_pause(1 << 20, at(1e5)), Some(Duration::from_millis(50)));
        assert_eq!(upload_pause(20_001, at(1e5)), Some(Duration::from_millis(1)));
        assert_eq!(upload_pause(u64::MAX, |_| Some(0.0)), None, "a link that is never busy");
        assert_eq!(upload_pause(AHEAD_BYTES, |_| None), None);
        assert!(upload_pause(AHEAD_BYTES + 1, |_| None).is_some());
    }
}
