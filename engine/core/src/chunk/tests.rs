use proptest::prelude::*;

use super::*;

/// Milliseconds a chunk, microseconds a row: a phone's uplink, a GPU behind it.
fn link_bound() -> CostModel {
    CostModel {
        device: StepCost { fixed: 2e-3, per_row: 60e-6, ..StepCost::default() },
        frame_s: 0.5e-3,
        row_up_s: 1.1e-3,
        up_latency_s: 5e-3,
        cloud: StepCost { fixed: 6e-3, per_row: 90e-6, per_row_context: 20e-9 },
        stages: 1,
        cloud_wait_s: 2e-3,
        return_s: 8e-3,
    }
}

/// Two cores on one desk: everything but the link is slow.
fn compute_bound() -> CostModel {
    CostModel {
        device: StepCost { fixed: 0.3e-3, per_row: 100e-6, ..StepCost::default() },
        row_up_s: 10e-6,
        up_latency_s: 0.1e-3,
        cloud: StepCost { fixed: 5e-3, per_row: 1.2e-3, per_row_context: 0.3e-6 },
        cloud_wait_s: 0.0,
        ..link_bound()
    }
}

fn regimes() -> Vec<CostModel> {
    let mut all =
        vec![CostModel { stages: 1, ..CostModel::default() }, link_bound(), compute_bound()];
    for stages in [2, 4, 8] {
        all.push(CostModel { stages, ..link_bound() });
        all.push(CostModel { stages, ..compute_bound() });
    }
    // Balanced: each place takes about as long.
    let balanced = CostModel {
        device: StepCost { fixed: 1e-3, per_row: 1e-3, ..StepCost::default() },
        row_up_s: 1e-3,
        cloud: StepCost { fixed: 4e-3, per_row: 0.9e-3, per_row_context: 50e-9 },
        ..link_bound()
    };
    all.push(balanced);
    all.push(CostModel {
        stages: 4,
        cloud: StepCost { per_row: 4e-3, ..balanced.cloud },
        ..balanced
    });
    all
}

fn no_limits(rows_max: u32) -> Limits {
    Limits { rows_max, step_s_max: f64::INFINITY, ..Limits::default() }
}

fn any_costs() -> impl Strategy<Value = CostModel> {
    // Exponents: from microseconds to tens of milliseconds, or nothing at all.
    let seconds = |low: f64, high: f64| {
        let exponents = (low..high).prop_map(f64::exp2);
        prop_oneof![1 => Just(0.0), 6 => exponents]
    };
    let places = (seconds(-14.0, -6.0), seconds(-16.0, -8.0), seconds(-14.0, -6.0));
    let ways = (seconds(-16.0, -8.0), seconds(-12.0, -4.0), seconds(-12.0, -5.0));
    let cloud = (seconds(-16.0, -8.0), seconds(-26.0, -18.0), seconds(-12.0, -5.0));
    (places, ways, cloud, 1u32..6).prop_map(|(places, ways, cloud, stages)| CostModel {
        device: StepCost { fixed: places.0, per_row: places.1, ..StepCost::default() },
        frame_s: places.2,
        row_up_s: ways.0,
        up_latency_s: ways.1,
        cloud: StepCost { fixed: ways.2, per_row: cloud.0, per_row_context: cloud.1 },
        stages,
        cloud_wait_s: cloud.2,
        return_s: 1e-3,
    })
}

/// The flow shop with each stage written out.
fn finish_by_stages(costs: &CostModel, cached: u32, sizes: &[u32]) -> f64 {
    let (mut device, mut uplink, mut prefix) = (0.0, 0.0f64, cached);
    let mut free = vec![0.0f64; costs.stages as usize];
    for &rows in sizes {
        device += costs.device.fixed + costs.device.per_row * f64::from(rows);
        uplink = uplink.max(device) + costs.frame_s + costs.row_up_s * f64::from(rows);
        let took = costs.cloud.seconds(rows, prefix) / f64::from(costs.stages);
        let mut ready = uplink + costs.up_latency_s + costs.cloud_wait_s;
        for free in &mut free {
            ready = ready.max(*free) + took;
            *free = ready;
        }
        prefix += rows;
    }
    free.last().unwrap() + costs.return_s
}

/// The earliest finish over all ways to cut `cells` cells of `grain` rows, chunks of at most
/// `most` cells.
fn exhaustive(costs: &CostModel, cached: u32, rows: u32, grain: u32, most: u32) -> f64 {
    let cells = rows.div_ceil(grain);
    let mut best = f64::INFINITY;
    for cuts in 0u32..1 << (cells - 1) {
        let (mut sizes, mut from) = (vec![], 0);
        for to in 1..=cells {
            if to == cells || cuts & 1 << (to - 1) != 0 {
                sizes.push((to * grain).min(rows) - from * grain);
                from = to;
            }
        }
        if sizes.iter().all(|&size| size <= most * grain) {
            best = best.min(finish_s(costs, Ahead::default(), cached, &sizes));
        }
    }
    best
}

/// The exact optimum over cuts at the grain: all ways that none beats, no bound on their number.
fn exact(costs: &CostModel, rows: u32, grain: u32) -> f64 {
    let cells = rows.div_ceil(grain) as usize;
    let row = |cell: usize| (cell as u32 * grain).min(rows);
    let mut fronts: Vec<Vec<Ahead>> = vec![vec![]; cells + 1];
    fronts[0].push(Ahead::default());
    for from in 0..cells {
        for at in fronts[from].clone() {
            for (to, front) in fronts.iter_mut().enumerate().skip(from + 1) {
                let mut at = at;
                at.push(costs, row(to) - row(from), row(from));
                let no_later = |one: &Ahead, other: &Ahead| {
                    one.device_s <= other.device_s
                        && one.uplink_s <= other.uplink_s
                        && one.stage_s <= other.stage_s
                        && one.last_s <= other.last_s
                };
                if !front.iter().any(|other| no_later(other, &at)) {
                    front.retain(|other| !no_later(&at, other));
                    front.push(at);
                }
            }
        }
    }
    let ends = fronts[cells].iter().map(|at| at.last_s);
    ends.fold(f64::INFINITY, f64::min) + costs.return_s
}

fn best_equal(costs: &CostModel, limits: &Limits, cached: u32, rows: u32) -> f64 {
    let mut planner = Planner::default();
    (GRAIN_DEFAULT..=rows.max(GRAIN_DEFAULT))
        .map(|size| {
            planner
                .plan(ChunkPolicy::Fixed(size), costs, limits, Ahead::default(), cached, rows)
                .finish_s
        })
        .fold(f64::INFINITY, f64::min)
}

#[test]
fn the_recurrence_by_hand() {
    let costs = CostModel {
        device: StepCost { fixed: 1.0, per_row: 0.5, ..StepCost::default() },
        frame_s: 2.0,
        row_up_s: 1.0,
        up_latency_s: 3.0,
        cloud: StepCost { fixed: 4.0, per_row: 2.0, per_row_context: 0.0 },
        stages: 2,
        cloud_wait_s: 5.0,
        return_s: 10.0,
    };
    // One chunk of 4: device to 3, uplink to 9, there at 12, begins at 17, two stages of 6.
    assert_eq!(finish_s(&costs, Ahead::default(), 0, &[4]), 17.0 + 12.0 + 10.0);
    // 2 and 2: device 2 and 4, uplink 6 and 10, stages of 4 from 14 and from 18 (the first is
    // busy until then): 18, 22; 22, 26.
    assert_eq!(finish_s(&costs, Ahead::default(), 0, &[2, 2]), 26.0 + 10.0);
    assert_eq!(finish_s(&costs, Ahead::default(), 0, &[]), 10.0);
    let behind = Ahead { device_s: 0.0, uplink_s: 20.0, stage_s: 0.0, last_s: 0.0 };
    assert_eq!(finish_s(&costs, behind, 0, &[4]), 26.0 + 3.0 + 5.0 + 12.0 + 10.0);
    // Context: 3 rows behind 10 see 11.5 on average.
    let cloud = StepCost { per_row_context: 2.0, ..StepCost::default() };
    assert_eq!(cloud.seconds(3, 10), 69.0);
}

#[test]
fn policies_cut_as_they_say() {
    let costs = link_bound();
    let mut planner = Planner::default();
    let limits = no_limits(512);
    let mut sizes = |policy, rows| {
        planner.plan(policy, &costs, &limits, Ahead::default(), 0, rows).sizes.to_vec()
    };
    assert_eq!(sizes(ChunkPolicy::Off, 1200), [512, 512, 176]);
    assert_eq!(sizes(ChunkPolicy::Off, 300), [300]);
    assert_eq!(sizes(ChunkPolicy::Fixed(400), 1200), [400, 400, 400]);
    assert_eq!(sizes(ChunkPolicy::Fixed(5000), 513), [512, 1]);
    assert_eq!(sizes(ChunkPolicy::Fixed(0), 2), [1, 1]);
    for policy in [ChunkPolicy::Off, ChunkPolicy::Fixed(7), ChunkPolicy::Paper, ChunkPolicy::Auto] {
        assert_eq!(sizes(policy, 0), [0; 0]);
        assert_eq!(sizes(policy, 1), [1]);
    }
}

#[test]
fn policies_have_names() {
    for (name, policy) in [
        ("off", ChunkPolicy::Off),
        ("paper", ChunkPolicy::Paper),
        ("auto", ChunkPolicy::Auto),
        ("96", ChunkPolicy::Fixed(96)),
    ] {
        assert_eq!(name.parse::<ChunkPolicy>().unwrap(), policy);
        assert_eq!(policy.to_string(), name);
    }
    for bad in ["", "0", "-1", "many", "4294967296", "Auto"] {
        let error = bad.parse::<ChunkPolicy>().unwrap_err().to_string();
        assert!(error.contains("chunks") && error.contains(&format!("{bad:?}")), "{error}");
    }
}

#[test]
fn the_published_balance() {
    let size = |costs: &CostModel, rows_max| {
        let mut planner = Planner::default();
        planner
            .plan(ChunkPolicy::Paper, costs, &no_limits(rows_max), Ahead::default(), 0, 5000)
            .sizes[0]
    };
    let costs = CostModel {
        row_up_s: 1e-3,
        cloud: StepCost { fixed: 40e-3, per_row: 0.4e-3, per_row_context: 1.0 },
        cloud_wait_s: 10e-3,
        stages: 1,
        ..CostModel::default()
    };
    // X ms = 10 ms + 40 ms + 0.4 X ms
    assert_eq!(size(&costs, 512), 83);
    // X ms = 10 ms + 10 ms + 0.1 X ms, below the grain.
    assert_eq!(size(&CostModel { stages: 4, ..costs }, 512), 32);
    assert_eq!(size(&costs, 64), 64);
    // Compute is slower than the link: no balance.
    assert_eq!(size(&CostModel { row_up_s: 0.4e-3, ..costs }, 512), 512);
    assert_eq!(size(&CostModel { row_up_s: f64::NAN, ..costs }, 512), 512);
    assert_eq!(size(&CostModel { cloud_wait_s: f64::INFINITY, ..costs }, 512), 512);
}

#[test]
fn auto_meets_exhaustive_search_and_the_exact_program() {
    for (index, costs) in regimes().iter().enumerate() {
        let mut planner = Planner::default();
        for (cached, rows) in [(0, 384), (0, 401), (700, 352)] {
            let auto = planner.plan(
                ChunkPolicy::Auto,
                costs,
                &no_limits(rows),
                Ahead::default(),
                cached,
                rows,
            );
            let best = exhaustive(costs, cached, rows, 32, 16);
            assert!(
                auto.finish_s <= best * 1.002,
                "regime {index}, {rows} rows: {} {best}",
                auto.finish_s
            );
            assert_eq!(
                auto.finish_s,
                finish_s(costs, Ahead::default(), cached, auto.sizes),
                "regime {index}"
            );
        }
        let auto =
            planner.plan(ChunkPolicy::Auto, costs, &no_limits(4096), Ahead::default(), 0, 2048);
        let best = exact(costs, 2048, 32);
        assert!(auto.finish_s <= best * 1.01, "regime {index}: {} {best}", auto.finish_s);
    }
}

#[test]
fn auto_overlaps_where_that_pays_and_cuts_little_where_not() {
    let mut planner = Planner::default();
    let off = planner
        .plan(ChunkPolicy::Off, &link_bound(), &no_limits(4096), Ahead::default(), 0, 1024)
        .finish_s;
    let auto =
        planner.plan(ChunkPolicy::Auto, &link_bound(), &no_limits(4096), Ahead::default(), 0, 1024);
    // The uplink alone takes 1,126 ms of it.
    assert!(auto.finish_s < 1.19 && off > 1.28, "{} {off}", auto.finish_s);
    // Nothing hides what is before the first row on the link and behind the last: the chunks at
    // both ends are small.
    let largest = auto.sizes.iter().max();
    assert!(auto.sizes.first().max(auto.sizes.last()) < largest, "{:?}", auto.sizes);
    let free = planner.plan(
        ChunkPolicy::Auto,
        &CostModel::default(),
        &no_limits(512),
        Ahead::default(),
        0,
        1024,
    );
    assert_eq!((free.sizes, free.finish_s), (&[512, 512][..], 0.0));
}

#[test]
fn a_plan_of_4096_rows_costs_little() {
    let mut most = 0;
    for costs in regimes() {
        for rows_max in [128, 512, 4096] {
            let mut planner = Planner::default();
            planner.plan(
                ChunkPolicy::Auto,
                &costs,
                &no_limits(rows_max),
                Ahead::default(),
                0,
                4096,
            );
            most = most.max(planner.evaluated());
        }
    }
    assert!(most <= 50_000, "{most} chunks evaluated");
}

#[test]
fn a_second_plan_allocates_nothing() {
    let mut planner = Planner::default();
    let room = |planner: &mut Planner| {
        planner.plan(ChunkPolicy::Auto, &link_bound(), &no_limits(512), Ahead::default(), 0, 4096);
        (planner.sizes.capacity(), planner.search.rooms())
    };
    let first = room(&mut planner);
    assert_eq!(room(&mut planner), first);
}

#[test]
fn what_is_ahead_moves_the_plan() {
    let (costs, limits) = (link_bound(), no_limits(512));
    let mut planner = Planner::default();
    let now = planner.plan(ChunkPolicy::Auto, &costs, &limits, Ahead::default(), 0, 512).finish_s;
    let ahead = Ahead { uplink_s: 1.0, ..Ahead::default() };
    let later = planner.plan(ChunkPolicy::Auto, &costs, &limits, ahead, 0, 512);
    assert!(later.finish_s > now + 0.9, "{} {now}", later.finish_s);
    assert_eq!(later.finish_s, finish_s(&costs, ahead, 0, later.sizes));
}

/// Rests of a prompt are planned as the whole was: re-planning with right estimates changes
/// nothing for the worse.
#[test]
fn planning_again_at_each_chunk_keeps_what_was_promised() {
    for costs in regimes() {
        let limits = no_limits(512);
        let mut planner = Planner::default();
        let promised =
            planner.plan(ChunkPolicy::Auto, &costs, &limits, Ahead::default(), 0, 2000).finish_s;
        let (mut ahead, mut done, mut sizes) = (Ahead::default(), 0, vec![]);
        while done < 2000 {
            let plan = planner.plan(ChunkPolicy::Auto, &costs, &limits, ahead, done, 2000 - done);
            let next = plan.sizes[0];
            sizes.push(next);
            ahead.push(&costs, next, done);
            done += next;
        }
        let got = finish_s(&costs, Ahead::default(), 0, &sizes);
        assert!(got <= promised * 1.005, "{got} {promised} {sizes:?}");
    }
}

fn wild() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(0.0),
        Just(-1.0),
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(f64::NEG_INFINITY),
        Just(f64::MAX),
        Just(f64::MIN_POSITIVE),
        1e-7..1.0f64,
    ]
}

proptest! {
    #[test]
    fn the_recurrence_is_the_flow_shop(
        costs in any_costs(), cached in 0u32..2000,
        sizes in prop::collection::vec(1u32..400, 0..24),
    ) {
        let short = finish_s(&costs, Ahead::default(), cached, &sizes);
        let long = finish_by_stages(&costs, cached, &sizes);
        prop_assert!((short - long).abs() <= 1e-9 * long, "{} {}", short, long);
    }

    #[test]
    fn auto_is_within_2_percent_of_exhaustive_search(
        costs in any_costs(), cached in 0u32..2000, cells in 1u32..11, short in 0u32..32,
    ) {
        let rows = cells * 32 - short;
        let best = exhaustive(&costs, cached, rows, 32, 8);
        let mut planner = Planner::default();
        let (policy, limits) = (ChunkPolicy::Auto, no_limits(256));
        let auto = planner.plan(policy, &costs, &limits, Ahead::default(), cached, rows);
        prop_assert!(auto.finish_s <= best * 1.02, "{} {} {:?}", auto.finish_s, best, auto.sizes);
    }

    #[test]
    fn auto_is_never_later_than_one_size(
        costs in any_costs(), rows in 1u32..1500, rows_max in 1u32..600,
    ) {
        let limits = no_limits(rows_max);
        let best = best_equal(&costs, &limits, 0, rows);
        let mut planner = Planner::default();
        let auto = planner.plan(ChunkPolicy::Auto, &costs, &limits, Ahead::default(), 0, rows);
        let most = best * (1.0 + 1e-12);
        prop_assert!(auto.finish_s <= most, "{} {} {:?}", auto.finish_s, best, auto.sizes);
    }

    /// A plan covers all rows within the limits and has a finite time, for any estimates.
    #[test]
    fn any_estimates_give_a_plan(
        numbers in prop::array::uniform9(wild()), stages in 0u32..5, rows in 0u32..5000,
        cached in prop_oneof![Just(0), Just(u32::MAX), 0u32..5000],
        rows_max in prop_oneof![Just(0), Just(1), Just(u32::MAX), 1u32..5000],
        grain in prop_oneof![Just(0), Just(u32::MAX), 1u32..300],
        step_s_max in wild(),
    ) {
        let [fixed, per_row, frame_s, row_up_s, up_latency_s, step, each, context, wait] = numbers;
        let costs = CostModel {
            device: StepCost { fixed, per_row, ..StepCost::default() },
            frame_s,
            row_up_s,
            up_latency_s,
            cloud: StepCost { fixed: step, per_row: each, per_row_context: context },
            stages,
            cloud_wait_s: wait,
            return_s: wait,
        };
        let limits = Limits { rows_max, step_s_max, grain };
        let mut planner = Planner::default();
        for policy in
            [ChunkPolicy::Off, ChunkPolicy::Fixed(rows_max), ChunkPolicy::Paper, ChunkPolicy::Auto]
        {
            let plan = planner.plan(policy, &costs, &limits, Ahead::default(), cached, rows);
            prop_assert_eq!(plan.sizes.iter().sum::<u32>(), rows);
            prop_assert!(plan.sizes.iter().all(|&size| size > 0 && size <= rows_max.max(1)));
            prop_assert!(plan.finish_s.is_finite() && plan.finish_s >= 0.0);
        }
    }

    #[test]
    fn steps_keep_to_their_bound(
        costs in any_costs(), rows in 1u32..1500, step_ms in 1.0f64..60.0,
    ) {
        let limits = Limits { step_s_max: step_ms * 1e-3, ..no_limits(1500) };
        let mut planner = Planner::default();
        let mut prefix = 0;
        let plan = planner.plan(ChunkPolicy::Auto, &costs, &limits, Ahead::default(), 0, rows);
        for &size in plan.sizes {
            let step_s = costs.stage(size, prefix);
            let is_short = step_s <= limits.step_s_max || size <= GRAIN_DEFAULT;
            prop_assert!(is_short, "{} {}", size, step_s);
            prefix += size;
        }
    }
}
