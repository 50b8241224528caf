use std::time::Duration;

use super::*;
use crate::chunk::{Ahead, ChunkPolicy, Limits, Planner};

fn close(got: f64, wanted: f64, share: f64) -> bool {
    (got - wanted).abs() <= share * wanted
}

/// Sizes that [`shown`] shows where nothing else is said.
pub(crate) const SIZES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// An estimator that has seen rounds of these sizes: a device of 0.3 ms and 0.1 ms a row, steps of
/// its rows alone, a link of `wait_ms`, a head of `head_ms`.
pub(crate) fn shown(
    sizes: &[usize],
    step_ms: impl Fn(usize) -> f64,
    wait_ms: f64,
    head_ms: f64,
) -> Estimator {
    let mut estimator = Estimator::default();
    for rows in sizes.iter().copied() {
        estimator.device.note(rows as u32, 0, (0.3 + 0.1 * rows as f64) / 1e3);
        estimator.note_returned(&step(rows, rows, step_ms(rows) / 1e3, 0.0, wait_ms / 1e3));
    }
    estimator.head.note(head_ms / 1e3);
    estimator
}

/// The output of `rows` rows from a step of `step_rows`, `link_s` beside step and queue.
pub(crate) fn step(
    rows: usize,
    step_rows: usize,
    step_s: f64,
    queue_s: f64,
    link_s: f64,
) -> Returned {
    let (sent_bytes, prefix, step_rows) = (0, 0, step_rows as u32);
    let away_s = Some(step_s + queue_s + link_s);
    Returned { rows, sent_bytes, prefix, step_rows, step_s, queue_s, away_s }
}

fn by_rows(points: &[(usize, f64)]) -> RowTimes {
    let mut by_rows = RowTimes::default();
    points.iter().for_each(|&(rows, seconds)| by_rows.note(rows, seconds));
    by_rows
}

#[test]
fn averages_forget_by_a_fifth_and_take_numbers_alone() {
    let mut average = Average::default();
    assert_eq!((average.value(), average.mean()), (None, 0.0));
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        average.note(bad);
    }
    assert_eq!(average.value(), None);
    average.note(1.0);
    assert_eq!(average.mean(), 1.0);
    average.note(2.0);
    assert!(close(average.value().unwrap(), 1.2, 1e-12));
    average.note(f64::NAN);
    assert!(close(average.mean(), 1.2, 1e-12));
}

#[test]
fn times_between_and_beyond_what_was_seen() {
    assert_eq!(RowTimes::default().seconds(3), None);
    assert_eq!(by_rows(&[(4, 2.0)]).seconds(8), Some(4.0));
    assert_eq!(by_rows(&[(4, 2.0)]).seconds(1), Some(0.5));
    let two = by_rows(&[(1, 2.0), (101, 12.0)]);
    for (rows, seconds) in [(1, 2.0), (11, 3.0), (101, 12.0), (201, 22.0)] {
        assert_eq!(two.seconds(rows), Some(seconds), "{rows} rows");
    }
    // A larger step that took less is noise, not a slope.
    assert_eq!(by_rows(&[(1, 2.0), (100, 1.0)]).seconds(50), Some(2.0));
    assert_eq!(by_rows(&[(5000, 1.0)]).seconds(5000), Some(1.0));
    let mut moving = by_rows(&[(1, 1.0)]);
    moving.note(1, 2.0);
    assert!(moving.seconds(1).is_some_and(|seconds| (seconds - 1.2).abs() < 1e-12));
}

#[test]
fn a_cost_model_comes_back_from_its_own_steps() {
    let model = StepCost { fixed: 5e-3, per_row: 0.8e-3, per_row_context: 0.2e-6 };
    let mut times = StepTimes::default();
    assert_eq!(times.cost(0.0), None);
    for prefix in [0, 300, 1500] {
        for rows in [1, 1, 1, 5, 17, 64, 128, 400] {
            times.note(rows, prefix, model.seconds(rows, prefix));
        }
    }
    let got = times.cost(0.0).unwrap();
    assert!(close(got.fixed, model.fixed, 0.02), "{got:?}");
    assert!(close(got.per_row, model.per_row, 0.02), "{got:?}");
    assert!(close(got.per_row_context, model.per_row_context, 0.1), "{got:?}");
}

/// One size at several contexts says what a row's context costs.
#[test]
fn contexts_are_told_apart() {
    let model = StepCost { fixed: 0.0, per_row: 0.8e-3, per_row_context: 0.2e-6 };
    for prefixes in [[0, 300], [300, 1500], [1500, 5000]] {
        let mut times = StepTimes::default();
        for prefix in prefixes {
            times.note(64, prefix, model.seconds(64, prefix));
        }
        let got = times.cost(0.0).unwrap();
        assert!(close(got.per_row_context, model.per_row_context, 1e-6), "{prefixes:?}: {got:?}");
        assert!(close(got.per_row, model.per_row, 1e-6), "{prefixes:?}: {got:?}");
    }
}

#[test]
fn few_measurements_give_a_smaller_model() {
    let mut times = StepTimes::default();
    times.note(100, 0, 0.05);
    let got = times.cost(0.0).unwrap();
    assert!(got.fixed == 0.0 && close(got.per_row, 0.5e-3, 1e-9), "{got:?}");
    // Two sizes: a line. That the larger step took less is noise, no negative slope.
    times.note(10, 0, 0.014);
    let got = times.cost(0.0).unwrap();
    assert!(close(got.fixed, 0.01, 1e-6) && close(got.per_row, 0.4e-3, 1e-6), "{got:?}");
    let line = times.by_rows.line(0.0).unwrap();
    assert!(close(line.fixed, 0.01, 1e-6) && close(line.per_row, 0.4e-3, 1e-6), "{line:?}");
    let mut odd = StepTimes::default();
    odd.note(10, 0, 0.02);
    odd.note(100, 0, 0.01);
    let got = odd.cost(0.0).unwrap();
    assert!(got.fixed >= 0.0 && got.per_row >= 0.0 && got.per_row_context >= 0.0, "{got:?}");
    let line = odd.by_rows.line(0.0).unwrap();
    assert!(line.fixed >= 0.0 && line.per_row >= 0.0, "{line:?}");
}

#[test]
fn measurements_that_are_none_change_nothing() {
    let mut times = StepTimes::default();
    for (rows, seconds) in [(0, 1.0), (5, f64::NAN), (5, f64::INFINITY), (5, -1.0)] {
        times.note(rows, 0, seconds);
    }
    assert_eq!(
        (times.cost(0.0), times.by_rows.line(0.0), times.by_rows.seconds(5)),
        (None, None, None)
    );
    times.note(u32::MAX, u32::MAX, 0.0);
    times.note(7, 3, 0.0);
    assert!(times.cost(0.0).is_none_or(|cost| cost.seconds(9, 9).is_finite()));
}

/// A second of frames that come in at `bytes_s`, as the cloud reports them.
fn upload(estimator: &mut Estimator, bytes_s: f64) {
    for _ in 0..100 {
        estimator.up.note((bytes_s * 0.01) as u64, 0.01);
    }
}

#[test]
fn the_links_rates_follow_what_came_in() {
    let mut estimator = Estimator::default();
    let rates = |estimator: &Estimator| {
        let Estimates { uplink_bytes_s, downlink_bytes_s, .. } = estimator.estimates(1, (1, 1), 1);
        (uplink_bytes_s, downlink_bytes_s)
    };
    assert_eq!(rates(&estimator), (None, None));
    upload(&mut estimator, 7.5e6);
    assert!(close(rates(&estimator).0.unwrap(), 7.5e6, 0.01), "{:?}", rates(&estimator));
    upload(&mut estimator, 2e6);
    assert!(close(rates(&estimator).0.unwrap(), 2e6, 0.01), "{:?}", rates(&estimator));
    assert_eq!(rates(&estimator).1, None);
    estimator.down.note(125_000, 0.01);
    assert!(close(rates(&estimator).1.unwrap(), 12.5e6, 1e-9), "{:?}", rates(&estimator));
    // A few bytes say nothing, and many in no time little: together they do.
    let mut small = Estimator::default();
    small.up.note(4000, 4e-3);
    small.up.note(200_000, 1e-6);
    small.up.note(0, 0.0);
    let byte_s = 1.0 / rates(&small).0.unwrap();
    assert!(close(byte_s, 4.001e-3 / 204_000.0, 1e-6), "{byte_s}");
    let mut fast = Estimator::default();
    (0..3).for_each(|_| fast.up.note(200_000, 1e-5));
    assert!(close(rates(&fast).0.unwrap(), 2e10, 1e-6));
}

/// The estimator is shown a device, a link and a cloud; it says what they cost.
#[test]
fn what_is_shown_is_what_comes_out() {
    let mut estimator = Estimator::default();
    assert_eq!(estimator.cost_model(1152, (2, 28), 1), None);
    assert_eq!(estimator.uplink_busy_s(750_000), None);
    let device = StepCost { fixed: 0.5e-3, per_row: 0.1e-3, ..StepCost::default() };
    for rows in [1, 32, 128, 256] {
        estimator.device.note(rows, 0, device.seconds(rows, 0));
    }
    assert_eq!(estimator.cost_model(1152, (2, 28), 1), None);
    // A link so fast that nobody saw bytes on their way costs nothing.
    estimator.up.note(0, 0.0);
    assert_eq!(estimator.cost_model(1152, (2, 28), 1).unwrap().row_up_s, 0.0);
    assert_eq!(estimator.uplink_busy_s(u64::MAX), Some(0.0));
    upload(&mut estimator, 7.5e6);
    estimator.note_rtt(10e-3);
    // No output yet: the cloud's 28 layers are as fast as the two here.
    let assumed = estimator.cost_model(1152, (2, 28), 1).unwrap();
    assert!(close(assumed.cloud.per_row, 14.0 * device.per_row, 0.01), "{assumed:?}");
    let cloud = StepCost { fixed: 3e-3, per_row: 0.4e-3, per_row_context: 0.0 };
    for step_rows in [1, 1, 9, 33, 200] {
        let step_s = cloud.seconds(step_rows, 100);
        let sent_bytes = 1152 * u64::from(step_rows);
        let away_s = Some(10e-3 + sent_bytes as f64 / 7.5e6 + 2e-3 + step_s);
        let (rows, prefix, queue_s) = (step_rows as usize, 100, 1e-3);
        let seen = Returned { rows, sent_bytes, prefix, step_rows, step_s, queue_s, away_s };
        estimator.note_returned(&seen);
    }
    estimator.head.note(1e-3);
    let costs = estimator.cost_model(1152, (2, 28), 1).unwrap();
    assert!(close(costs.device.per_row, device.per_row, 0.01), "{costs:?}");
    assert!(close(costs.row_up_s, 1152.0 / 7.5e6, 0.01), "{costs:?}");
    assert!(close(costs.up_latency_s, 5e-3, 1e-9) && close(costs.return_s, 6e-3, 1e-9));
    assert!(close(costs.cloud.seconds(100, 100), cloud.seconds(100, 100), 0.02), "{costs:?}");
    assert!(close(costs.cloud_wait_s, 2e-3, 0.05), "{costs:?}");
    assert!(close(estimator.uplink_busy_s(750_000).unwrap(), 0.09, 0.02));
    assert_eq!(estimator.uplink_busy_s(10), Some(0.0));
}

/// A plan comes out of any estimates.
#[test]
fn hostile_estimates_give_a_plan() {
    let hostile = [0.0, f64::NAN, f64::INFINITY, 1e-9, 1e9];
    for first in hostile {
        let mut estimator = Estimator::default();
        for seconds in [first].into_iter().chain(hostile) {
            estimator.device.note(100, u32::MAX, seconds);
            estimator.note_rtt(seconds);
            estimator.head.note(seconds);
            estimator.draft_batch.note(seconds);
            estimator.up.note(0, seconds);
            estimator.up.note(u64::MAX, seconds);
            estimator.down.note(1 << 40, seconds);
            let returned = Returned {
                rows: usize::MAX,
                sent_bytes: 1 << 40,
                prefix: u32::MAX,
                step_rows: u32::MAX,
                step_s: seconds,
                queue_s: seconds,
                away_s: Some(seconds),
            };
            estimator.note_returned(&returned);
            if let Some(costs) = estimator.cost_model(usize::MAX, (0, u32::MAX), u32::MAX) {
                let mut planner = Planner::default();
                let plan = planner.plan(
                    ChunkPolicy::Auto,
                    &costs,
                    &Limits::default(),
                    Ahead::default(),
                    0,
                    1000,
                );
                assert_eq!(plan.sizes.iter().sum::<u32>(), 1000);
            }
            assert!(estimator.round(1).is_none_or(|round| round >= 0.0));
            assert!(estimator.draft_batch(16).0 <= 16);
        }
        // One measurement moves it, always.
        estimator.head.note(5.0);
        assert!(estimator.estimates(1, (1, 1), 1).rtt_s.is_some());
    }
}

/// If the link's rate is estimated too low, nothing seems to be left for the cloud's queue.
#[test]
fn the_cloud_is_believed_that_rows_waited() {
    let mut estimator = Estimator::default();
    estimator.device.note(10, 0, 1e-3);
    estimator.up.note(1 << 20, 1.0);
    estimator.note_rtt(0.5);
    let (rows, sent_bytes, prefix, step_rows) = (10, 1 << 20, 0, 10);
    let (step_s, queue_s, away_s) = (1e-3, 4e-3, Some(0.2));
    let seen = Returned { rows, sent_bytes, prefix, step_rows, step_s, queue_s, away_s };
    estimator.note_returned(&seen);
    let costs = estimator.cost_model(1152, (2, 28), 1).unwrap();
    assert!(close(costs.cloud_wait_s, 4e-3, 1e-9), "{costs:?}");
}

/// A tree's levels cost the device what they cost, and a chunk costs what its pieces do.
#[test]
fn levels_of_a_tree_do_not_bend_the_line_of_chunks() {
    let line = StepCost { fixed: 2e-3, per_row: 0.2e-3, ..StepCost::default() };
    for level_ms in [0.01, 30.0] {
        let mut estimator = Estimator::default();
        estimator.up.note(0, 0.0);
        for _ in 0..10 {
            for rows in [1, 4, 8] {
                estimator.device.note(rows, 500, level_ms / 1e3);
            }
        }
        // Before any piece of a prompt they are all there is.
        assert!(estimator.device_cost().is_some());
        assert!(estimator.cost_model(1, (2, 28), 1).is_some());
        for rows in [20, 64] {
            estimator.device.note(rows, 0, line.seconds(rows, 0));
        }
        let device = estimator.cost_model(1, (2, 28), 1).unwrap().device;
        assert!(
            close(device.seconds(256, 0), line.seconds(256, 0), 1e-6),
            "{level_ms}: {device:?}"
        );
        let piece = estimator.device_cost().unwrap();
        assert!(close(piece.seconds(64, 0), line.seconds(64, 0), 1e-6), "{level_ms}: {piece:?}");
        let device_s = estimator.device.by_rows.seconds(8).unwrap();
        assert!(close(device_s, level_ms / 1e3, 1e-9), "{level_ms}: {device_s}");
    }
}

/// A round waits for all that is neither step nor queue, whatever is known of the link: nothing is
/// taken off for a rate that nobody has seen, nor counted twice once one has.
#[test]
fn rounds_wait_for_the_whole_way_whether_the_rate_is_known_or_not() {
    let seen = |estimator: &mut Estimator| {
        estimator.device.note(4, 0, 1e-3);
        estimator.note_returned(&Returned { sent_bytes: 4600, ..step(4, 4, 3e-3, 0.0, 8e-3) });
    };
    let mut estimator = Estimator::default();
    estimator.up.note(0, 0.0);
    estimator.note_rtt(5e-3);
    seen(&mut estimator);
    let round = |estimator: &Estimator| estimator.round(4).unwrap();
    assert!(close(round(&estimator), 12e-3, 1e-9), "{}", round(&estimator));
    assert!(close(estimator.cost_model(1, (1, 1), 1).unwrap().cloud_wait_s, 3e-3, 1e-9));
    estimator.up.note(1 << 20, 1.0);
    assert!(close(round(&estimator), 12e-3, 1e-9), "{}", round(&estimator));
    seen(&mut estimator);
    assert!(close(round(&estimator), 12e-3, 1e-9), "{}", round(&estimator));
}

/// The parts of a round, each of which alone moves it.
#[test]
fn a_round_is_the_device_the_way_the_queue_and_the_step_of_all() {
    let mut estimator = shown(&SIZES, |rows| 5.0 + 0.5 * rows as f64, 20.0, 1.0);
    let round_ms = |estimator: &Estimator, rows| 1e3 * estimator.round(rows).unwrap();
    assert!(close(round_ms(&estimator, 4), 0.7 + 20.0 + 7.0, 1e-9));
    assert!(close(estimator.plain_rate().unwrap(), 1e3 / (0.4 + 20.0 + 5.5 + 1.0), 1e-9));
    // Rows wait in the queue for as long as their step takes: a fifth of it, in the mean.
    estimator.note_returned(&step(4, 4, 7e-3, 7e-3, 20e-3));
    assert!(close(round_ms(&estimator, 4), 0.7 + 20.0 + 1.2 * 7.0, 1e-9));
    // Others have three rows for each of one's own: the steps of late had 1.4.
    estimator.note_returned(&step(4, 12, 11e-3, 0.0, 20e-3));
    let queue = 0.8 * 0.2;
    let step_ms = 5.0 + 0.5 * (4.0_f64 * 1.4).round();
    let wanted = 0.7 + 20.0 + (1.0 + queue) * step_ms;
    assert!(close(round_ms(&estimator, 4), wanted, 1e-6), "{}", round_ms(&estimator, 4));
}

#[test]
fn rows_in_the_shadow_of_others_pay_by_the_link() {
    // Steps of 5 ms and half a millisecond a row; device 0.3 ms and 0.1 ms a row.
    let of = |wait_ms| {
        let mut estimator = shown(&SIZES, |rows| 5.0 + 0.5 * rows as f64, wait_ms, 1.0);
        estimator.tokens.note(3.0);
        estimator.draft_batch(16)
    };
    assert_eq!(Estimator::default().draft_batch(16), (0, 0.0));
    assert_eq!(of(3.0).0, 0, "any step is longer than the link's way");
    assert_eq!(of(8.1).0, 6);
    let (rows, floor) = of(100.0);
    assert_eq!(rows, 16);
    // 0.6 ms a row against (100 + 5.5 + 0.4 + 1) / 3 ms a token.
    assert!((floor - 0.6 / 35.63).abs() < 1e-3, "{floor}");
    assert!(of(40.0).1 > floor, "a nearer cloud asks for surer drafts");
}

#[test]
fn what_is_nearly_back_is_waited_for() {
    let mut estimator = shown(&SIZES, |_| 5.0, 20.0, 1.0);
    estimator.draft_batch.note(4e-3);
    let sent = Instant::now();
    let after = |ms: u64| sent + Duration::from_millis(ms);
    assert!(!estimator.is_due(after(20), sent, 8));
    assert!(estimator.is_due(after(22), sent, 8));
}

/// The rows of others are in the step of a batch of drafts, and rows wait in the queue before it.
#[test]
fn others_lengthen_steps_and_the_wait_for_them() {
    let mut estimator = shown(&SIZES, |rows| 5.0 + 0.5 * rows as f64, 8.1, 1.0);
    for _ in 0..50 {
        estimator.note_returned(&step(4, 8, 9e-3, 9e-3, 8.1e-3));
    }
    assert_eq!(estimator.draft_batch(16).0, 2, "a step of 2 and 4 rows takes 8 ms");
    // 8.1 ms of link, and twice the 9 ms of a step of 4 and 4 rows.
    let sent = Instant::now();
    let after = |ms: u64| sent + Duration::from_millis(ms);
    assert!(!estimator.is_due(after(25), sent, 4));
    assert!(estimator.is_due(after(27), sent, 4));
}
