use super::*;
use crate::chunk::{ChunkPolicy, Limits, Planner};

fn close(got: f64, wanted: f64, share: f64) -> bool {
    (got - wanted).abs() <= share * wanted
}

#[test]
fn averages_forget_by_a_fifth_and_take_numbers_alone() {
    let mut average = Moving::default();
    assert_eq!(average.value(), None);
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        average.note(0.8, bad);
    }
    assert_eq!(average.value(), None);
    average.note(0.8, 1.0);
    average.note(0.8, 2.0);
    assert!(close(average.value().unwrap(), 1.2, 1e-12));
    average.note(0.8, f64::NAN);
    assert!(close(average.value().unwrap(), 1.2, 1e-12));
}

#[test]
fn a_cost_model_comes_back_from_its_own_steps() {
    let model = CloudCost { fixed: 5e-3, per_row: 0.8e-3, per_row_context: 0.2e-6 };
    let mut fit = Fit::default();
    assert_eq!(fit.cost(), None);
    for prefix in [0, 300, 1500] {
        for rows in [1, 1, 1, 5, 17, 64, 128, 400] {
            fit.note(0.8, rows, prefix, model.seconds(rows, prefix));
        }
    }
    let got = fit.cost().unwrap();
    assert!(close(got.fixed, model.fixed, 0.02), "{got:?}");
    assert!(close(got.per_row, model.per_row, 0.02), "{got:?}");
    assert!(close(got.per_row_context, model.per_row_context, 0.1), "{got:?}");
}

#[test]
fn few_measurements_give_a_smaller_model() {
    let mut fit = Fit::default();
    fit.note(0.8, 100, 0, 0.05);
    let got = fit.cost().unwrap();
    assert!(got.fixed == 0.0 && close(got.per_row, 0.5e-3, 1e-9), "{got:?}");
    // Two sizes: a line. That the larger step took less is noise, no negative slope.
    fit.note(0.8, 10, 0, 0.014);
    let got = fit.cost().unwrap();
    assert!(close(got.fixed, 0.01, 1e-6) && close(got.per_row, 0.4e-3, 1e-6), "{got:?}");
    let mut odd = Fit::default();
    odd.note(0.8, 10, 0, 0.02);
    odd.note(0.8, 100, 0, 0.01);
    let got = odd.cost().unwrap();
    assert!(got.fixed >= 0.0 && got.per_row >= 0.0 && got.per_row_context >= 0.0, "{got:?}");
}

#[test]
fn measurements_that_are_none_change_nothing() {
    let mut fit = Fit::default();
    for (rows, seconds) in [(0, 1.0), (5, f64::NAN), (5, f64::INFINITY), (5, -1.0)] {
        fit.note(0.8, rows, 0, seconds);
    }
    assert_eq!(fit.cost(), None);
    fit.note(0.8, u32::MAX, u32::MAX, 0.0);
    fit.note(0.8, 7, 3, 0.0);
    assert!(fit.cost().is_none_or(|cost| cost.seconds(9, 9).is_finite()));
}

/// A second of frames that come in at `bytes_s`, as the cloud reports them.
fn upload(monitor: &mut Monitor, bytes_s: f64) {
    for _ in 0..100 {
        monitor.note_uplink((bytes_s * 0.01) as u64, 0.01);
    }
}

#[test]
fn the_links_rates_follow_what_came_in() {
    let mut monitor = Monitor::default();
    let rates = |monitor: &Monitor| {
        let Estimates { uplink_bytes_s, downlink_bytes_s, .. } = monitor.estimates(1, (1, 1), 1);
        (uplink_bytes_s, downlink_bytes_s)
    };
    assert_eq!(rates(&monitor), (None, None));
    upload(&mut monitor, 7.5e6);
    assert!(close(rates(&monitor).0.unwrap(), 7.5e6, 0.01), "{:?}", rates(&monitor));
    upload(&mut monitor, 2e6);
    assert!(close(rates(&monitor).0.unwrap(), 2e6, 0.01), "{:?}", rates(&monitor));
    assert_eq!(rates(&monitor).1, None);
    monitor.note_downlink(125_000, 0.01);
    assert!(close(rates(&monitor).1.unwrap(), 12.5e6, 1e-9), "{:?}", rates(&monitor));
    // A few bytes say nothing, and many in no time little: together they do.
    let mut small = Monitor::default();
    small.note_uplink(4000, 4e-3);
    small.note_uplink(200_000, 1e-6);
    small.note_uplink(0, 0.0);
    let byte_s = 1.0 / rates(&small).0.unwrap();
    assert!(close(byte_s, 4.001e-3 / 204_000.0, 1e-6), "{byte_s}");
    let mut fast = Monitor::default();
    (0..3).for_each(|_| fast.note_uplink(200_000, 1e-5));
    assert!(close(rates(&fast).0.unwrap(), 2e10, 1e-6));
}

/// The monitor is shown a device, a link and a cloud; it says what they cost.
#[test]
fn what_is_shown_is_what_comes_out() {
    let mut monitor = Monitor::default();
    assert_eq!(monitor.costs(1152, (2, 28), 1), None);
    let device = Line { fixed: 0.5e-3, per_row: 0.1e-3 };
    for rows in [1, 32, 128, 256] {
        monitor.note_device(rows, device.seconds(rows));
    }
    assert_eq!(monitor.costs(1152, (2, 28), 1), None);
    // A link so fast that nobody saw bytes on their way costs nothing.
    monitor.note_uplink(0, 0.0);
    assert_eq!(monitor.costs(1152, (2, 28), 1).unwrap().row_up_s, 0.0);
    upload(&mut monitor, 7.5e6);
    monitor.note_rtt(10e-3);
    // No output yet: the cloud's 28 layers are as fast as the two here.
    let guess = monitor.costs(1152, (2, 28), 1).unwrap();
    assert!(close(guess.cloud.per_row, 14.0 * device.per_row, 0.01), "{guess:?}");
    let cloud = CloudCost { fixed: 3e-3, per_row: 0.4e-3, per_row_context: 0.0 };
    for step_rows in [1, 1, 9, 33, 200] {
        let step_s = cloud.seconds(step_rows, 100);
        let sent_bytes = 1152 * u64::from(step_rows);
        let away_s = 10e-3 + sent_bytes as f64 / 7.5e6 + 2e-3 + step_s;
        let away_s = Some(away_s);
        let prefix = 100;
        let queue_s = 1e-3;
        monitor.note_returned(&Returned { sent_bytes, prefix, step_rows, step_s, queue_s, away_s });
    }
    monitor.note_head(1e-3);
    let costs = monitor.costs(1152, (2, 28), 1).unwrap();
    assert!(close(costs.device.per_row, device.per_row, 0.01), "{costs:?}");
    assert!(close(costs.row_up_s, 1152.0 / 7.5e6, 0.01), "{costs:?}");
    assert!(close(costs.up_latency_s, 5e-3, 1e-9) && close(costs.return_s, 6e-3, 1e-9));
    assert!(close(costs.cloud.seconds(100, 100), cloud.seconds(100, 100), 0.02), "{costs:?}");
    assert!(close(costs.cloud_wait_s, 2e-3, 0.05), "{costs:?}");
    assert!(close(monitor.uplink_busy_s(750_000), 0.09, 0.02));
    assert_eq!(monitor.uplink_busy_s(10), 0.0);
}

/// However the estimates begin, a plan comes out.
#[test]
fn hostile_estimates_give_a_plan() {
    let hostile = [0.0, f64::NAN, f64::INFINITY, 1e-9, 1e9];
    for first in hostile {
        let mut monitor = Monitor::default();
        for seconds in [first].into_iter().chain(hostile) {
            monitor.note_device(100, seconds);
            monitor.note_rtt(seconds);
            monitor.note_head(seconds);
            monitor.note_uplink(0, seconds);
            monitor.note_uplink(u64::MAX, seconds);
            monitor.note_downlink(1 << 40, seconds);
            let returned = Returned {
                sent_bytes: 1 << 40,
                prefix: u32::MAX,
                step_rows: u32::MAX,
                step_s: seconds,
                queue_s: seconds,
                away_s: Some(seconds),
            };
            monitor.note_returned(&returned);
            if let Some(costs) = monitor.costs(usize::MAX, (0, u32::MAX), u32::MAX) {
                let mut planner = Planner::default();
                let plan = planner.plan(ChunkPolicy::Auto, &costs, &Limits::default(), 0, 1000);
                assert_eq!(plan.sizes.iter().sum::<u32>(), 1000);
            }
        }
        // One measurement moves it, always.
        monitor.note_head(5.0);
        assert!(monitor.estimates(1, (1, 1), 1).rtt_s.is_some());
    }
}

/// Where the link is taken for slower than it is, nothing seems to be left for the cloud's queue.
#[test]
fn the_cloud_is_believed_that_rows_waited() {
    let mut monitor = Monitor::default();
    monitor.note_device(10, 1e-3);
    monitor.note_uplink(1 << 20, 1.0);
    monitor.note_rtt(0.5);
    let (sent_bytes, prefix, step_rows) = (1 << 20, 0, 10);
    let (step_s, queue_s, away_s) = (1e-3, 4e-3, Some(0.2));
    monitor.note_returned(&Returned { sent_bytes, prefix, step_rows, step_s, queue_s, away_s });
    assert!(close(monitor.costs(1152, (2, 28), 1).unwrap().cloud_wait_s, 4e-3, 1e-9));
}
