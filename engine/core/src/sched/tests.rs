use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// A session that is a device of its own.
fn item(session: SessionKey, rows: u32, urgent: bool) -> BatchItem {
    BatchItem { session, device: session, rows, context: 0, urgent, divisible: !urgent, class: 30 }
}

fn planned(scheduler: &mut Scheduler) -> Vec<(SessionKey, u32)> {
    let mut step = vec![];
    scheduler.schedule(Bound::NONE, &mut step);
    step.iter().map(|item| (item.session, item.rows)).collect()
}

#[test]
fn verify_rows_go_before_prompt_chunks_within_the_budget() {
    let mut scheduler = Scheduler::new(100);
    for add in [item(1, 60, false), item(2, 60, false), item(3, 8, true), item(4, 30, false)] {
        scheduler.enqueue(add);
    }
    assert_eq!(planned(&mut scheduler), [(3, 8), (1, 60), (4, 30)]);
    assert_eq!(planned(&mut scheduler), [(2, 60)]);
    assert_eq!(planned(&mut scheduler), []);
}

#[test]
fn a_session_never_overtakes_itself() {
    let mut scheduler = Scheduler::new(100);
    scheduler.enqueue(item(1, 80, false));
    scheduler.enqueue(item(2, 1, true));
    assert!(scheduler.holds(1) && !scheduler.holds(3));
    assert_eq!(planned(&mut scheduler), [(2, 1), (1, 80)]);
    assert!(!scheduler.holds(1));
    scheduler.enqueue(item(1, 1, true));
    assert_eq!(planned(&mut scheduler), [(1, 1)]);
    // What is left of a work that was cut is not in the step of its front, nor behind another.
    let whole = BatchItem { context: 9, ..item(1, 90, false) };
    scheduler.enqueue(whole);
    assert_eq!(bounded(&mut scheduler).len(), 1);
    assert!(scheduler.holds(1));
    let twice = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        scheduler.enqueue(item(1, 1, true));
    }));
    assert!(twice.is_err(), "its last rows would run before their chunk");
}

#[test]
fn classes_do_not_mix_and_none_starves() {
    let mut scheduler = Scheduler::new(100);
    scheduler.enqueue(BatchItem { class: 29, ..item(1, 1, true) });
    scheduler.enqueue(item(2, 1, true));
    scheduler.enqueue(BatchItem { class: 29, ..item(3, 1, true) });
    assert_eq!(planned(&mut scheduler), [(1, 1), (3, 1)]);
    assert_eq!(planned(&mut scheduler), [(2, 1)]);
}

#[test]
fn a_session_that_has_ended_is_forgotten() {
    let mut scheduler = Scheduler::new(100);
    scheduler.enqueue(item(1, 1, true));
    scheduler.enqueue(item(2, 1, true));
    scheduler.forget(1);
    scheduler.forget(9);
    assert_eq!(scheduler.queued(), 1);
    assert_eq!(planned(&mut scheduler), [(2, 1)]);
    assert!(scheduler.verifies.shares.len() <= 2 && scheduler.waiting.is_empty());
}

#[test]
fn a_device_that_rested_has_no_credit() {
    let mut scheduler = Scheduler::new(8);
    let of = |device, session| BatchItem { device, ..item(session, 8, true) };
    for session in 0..100 {
        scheduler.enqueue(of(1, session));
        scheduler.enqueue(of(2, 100 + session));
    }
    for _ in 0..100 {
        planned(&mut scheduler);
    }
    // A third comes late: it takes turns with them, and has no hundred turns at once.
    for session in 0..9 {
        scheduler.enqueue(of(3, 200 + session));
    }
    let mut of_third = || (0..9).filter(|_| planned(&mut scheduler)[0].0 >= 200).count();
    assert_eq!([of_third(), of_third(), of_third(), of_third()], [3, 3, 3, 0]);
}

/// Devices that always have work, `sessions` each, of `rows` rows; how many rows each got.
fn served(devices: &[(u64, u32, bool)], steps: u32, rows_max: u32) -> Vec<u64> {
    let mut scheduler = Scheduler::new(rows_max);
    let mut session = 0;
    for (device, &(sessions, rows, urgent)) in devices.iter().enumerate() {
        for _ in 0..sessions {
            let device = device as u64;
            scheduler.enqueue(BatchItem { device, ..item(session, rows, urgent) });
            session += 1;
        }
    }
    let (mut step, mut served) = (vec![], vec![0; devices.len()]);
    for _ in 0..steps {
        scheduler.schedule(Bound::NONE, &mut step);
        for item in &step {
            served[item.device as usize] += u64::from(item.rows);
            scheduler.enqueue(*item);
        }
    }
    served
}

#[test]
fn a_hundred_sessions_get_no_more_than_their_devices_share() {
    let served = served(&[(100, 8, true), (4, 8, true), (4, 8, true)], 1000, 64);
    assert_eq!(served.iter().sum::<u64>(), 64_000);
    // The two can have 32 rows in a step each: more than a third.
    assert!(served.iter().all(|rows| rows.abs_diff(64_000 / 3) <= 64), "{served:?}");
}

/// Sessions of as many devices, each with a verify, and prompts beside them.
fn crowd(sessions: u64) -> Scheduler {
    let mut scheduler = Scheduler::new(512);
    for session in 0..sessions {
        scheduler.enqueue(item(session, 8, true));
        scheduler.enqueue(item(sessions + session, 500, false));
    }
    scheduler
}

/// Looks, as the machine's time says nothing here.
#[test]
fn a_step_costs_as_much_with_ten_thousand_sessions_as_with_a_hundred() {
    for sessions in [100, 10_000] {
        let mut scheduler = crowd(sessions);
        let mut step = vec![];
        for _ in 0..1000 {
            let before = scheduler.looks;
            scheduler.schedule(Bound::NONE, &mut step);
            let (looks, items) = (scheduler.looks - before, step.len() as u64);
            assert!(looks <= items + 2 * MISSES_MAX as u64, "{looks} looks for {items} works");
            for item in &step {
                scheduler.enqueue(*item);
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Add { session: u64, rows: u32, urgent: bool },
    Plan,
    Forget { session: u64 },
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let add = (0..24u64, 1..=64u32, any::<bool>()).prop_map(|(session, rows, urgent)| Act::Add {
        session,
        rows,
        urgent,
    });
    let forget = (0..24u64).prop_map(|session| Act::Forget { session });
    prop::collection::vec(prop_oneof![6 => add, 2 => Just(Act::Plan), 1 => forget], 1..200)
}

/// 24 sessions of six devices, in three classes.
fn of_session(session: u64, rows: u32, urgent: bool) -> BatchItem {
    let class = 28 + u32::try_from(session % 3).unwrap();
    BatchItem { device: session % 6, class, ..item(session, rows, urgent) }
}

/// Works by session, in order. The scheduler is told of the first of each.
type Queues = BTreeMap<SessionKey, VecDeque<BatchItem>>;

/// Tells the scheduler of the next work of each session of which it holds none.
fn feed(scheduler: &mut Scheduler, queues: &Queues) {
    for (session, queue) in queues {
        if let Some(next) = queue.front().filter(|_| !scheduler.holds(*session)) {
            scheduler.enqueue(*next);
        }
    }
}

/// Plans a step, and checks it against what waits.
fn check_step(scheduler: &mut Scheduler, waiting: &mut Queues) -> usize {
    feed(scheduler, waiting);
    let mut step = vec![];
    scheduler.schedule(Bound::NONE, &mut step);
    assert!(step.iter().map(|item| item.rows).sum::<u32>() <= scheduler.rows_max);
    for (index, item) in step.iter().enumerate() {
        assert_eq!(item.class, step[0].class);
        let is_first = step[..index].iter().all(|other| other.session != item.session);
        assert!(is_first, "session {} twice in a step", item.session);
        let next = waiting.get_mut(&item.session).and_then(VecDeque::pop_front);
        assert_eq!(next, Some(*item), "out of order");
    }
    feed(scheduler, waiting);
    assert_eq!(scheduler.queued(), waiting.values().filter(|queue| !queue.is_empty()).count());
    assert_eq!(step.is_empty(), waiting.values().all(VecDeque::is_empty) && step.is_empty());
    step.len()
}

/// A step of 40 units: 10 whatever is in it, 1 a row, and 1 more for each 100 rows behind which it
/// comes.
const BOUND: Bound = Bound { step: 4000, fixed: 1000, row: 100, row_context: 1, ..Bound::NONE };

fn bounded(scheduler: &mut Scheduler) -> Vec<(SessionKey, u32, u32)> {
    let mut step = vec![];
    scheduler.schedule(BOUND, &mut step);
    step.iter().map(|item| (item.session, item.context, item.rows)).collect()
}

#[test]
fn a_step_beside_a_verify_holds_as_much_of_a_prompt_as_the_time_allows() {
    let mut scheduler = Scheduler::new(512);
    scheduler.enqueue(item(1, 300, false));
    // 30 units are left: 26 rows, each of which sees 13 others in the mean.
    assert_eq!(bounded(&mut scheduler), [(1, 0, 26)]);
    scheduler.enqueue(BatchItem { context: 100, ..item(2, 4, true) });
    assert_eq!(bounded(&mut scheduler), [(2, 100, 4)]);
    // A row of the prompt is dearer further on.
    assert_eq!(bounded(&mut scheduler), [(1, 26, 21)]);
    assert_eq!(scheduler.queued(), 1);
    // The rest runs in order, each row once.
    let mut context = 47;
    while let [(1, from, rows)] = bounded(&mut scheduler)[..] {
        assert_eq!(from, context);
        context += rows;
    }
    assert_eq!((context, scheduler.queued()), (300, 0));
}

#[test]
fn a_verify_is_in_the_next_step_whatever_is_in_line() {
    let mut scheduler = Scheduler::new(512);
    for session in 1..=4 {
        scheduler.enqueue(item(session, 500, false));
    }
    bounded(&mut scheduler);
    scheduler.enqueue(item(9, 8, true));
    assert_eq!(bounded(&mut scheduler), [(9, 0, 8)]);
}

#[test]
fn a_cut_chunk_goes_behind_the_other_prompts_of_its_device() {
    let mut scheduler = Scheduler::new(512);
    for (session, rows) in [(1, 500), (2, 20), (3, 20)] {
        scheduler.enqueue(BatchItem { device: 7, ..item(session, rows, false) });
    }
    // Beside the 20 rows of the second there is time for some of the third's.
    let sessions = |step: Vec<(SessionKey, u32, u32)>| step.iter().map(|it| it.0).collect();
    let steps: [Vec<u64>; 4] = std::array::from_fn(|_| sessions(bounded(&mut scheduler)));
    assert_eq!(steps, [vec![1], vec![2, 3], vec![1], vec![3, 1]]);
}

#[test]
fn prompts_have_every_second_step_beside_verifies_that_never_pause() {
    let mut scheduler = Scheduler::new(512);
    scheduler.enqueue(BatchItem { context: 400, ..item(2, 300, false) });
    for turn in 0..20 {
        for session in [1, 3] {
            if !scheduler.holds(session) {
                scheduler.enqueue(item(session, 60, true));
            }
        }
        let step = bounded(&mut scheduler);
        let prompts = step.iter().filter(|(session, ..)| *session == 2).count();
        assert_eq!((prompts, step.len()), if turn % 2 == 0 { (0, 2) } else { (1, 1) });
    }
}

#[test]
fn a_piece_has_some_rows_however_long_they_take() {
    let mut scheduler = Scheduler::new(512);
    scheduler.enqueue(BatchItem { context: 100_000, ..item(2, 300, false) });
    scheduler.enqueue(item(3, 300, false));
    assert_eq!(bounded(&mut scheduler), [(2, 100_000, PIECE_ROWS_MIN)]);
}

#[test]
fn what_may_not_be_cut_runs_whole() {
    let mut scheduler = Scheduler::new(512);
    scheduler.enqueue(BatchItem { divisible: false, ..item(1, 60, false) });
    scheduler.enqueue(BatchItem { divisible: false, ..item(2, 60, false) });
    scheduler.enqueue(item(3, 500, true));
    assert_eq!(bounded(&mut scheduler), [(3, 0, 500)]);
    assert_eq!(bounded(&mut scheduler), [(1, 0, 60)]);
    assert_eq!(bounded(&mut scheduler), [(2, 0, 60)]);
}

#[test]
fn the_first_piece_of_a_chunk_is_forgotten_with_its_rest() {
    let mut scheduler = Scheduler::new(512);
    scheduler.enqueue(item(1, 300, false));
    bounded(&mut scheduler);
    assert_eq!(scheduler.queued(), 1);
    scheduler.forget(1);
    assert_eq!((scheduler.queued(), bounded(&mut scheduler)), (0, vec![]));
}

proptest! {
    /// Rows of each session run once, in order, however they are cut.
    #[test]
    fn cut_works_run_once_in_order(
        items in prop::collection::vec((0..6u64, 1..=64u32, any::<bool>()), 1..60),
        (step, fixed, row, row_context) in (0..9000u64, 0..2000u64, 1..200u64, 0..4u64),
    ) {
        let bound = Bound { step, fixed, row, row_context, ..Bound::NONE };
        let mut scheduler = Scheduler::new(64);
        let mut next = [0; 6];
        let mut ends = [0; 6];
        let mut queues = Queues::new();
        for (session, rows, urgent) in items {
            let end = &mut ends[session as usize];
            let of_device = BatchItem { device: session % 2, ..item(session, rows, urgent) };
            let add = BatchItem { context: *end, ..of_device };
            queues.entry(session).or_default().push_back(add);
            *end += rows;
        }
        let mut step = vec![];
        feed(&mut scheduler, &queues);
        while scheduler.queued() > 0 {
            scheduler.schedule(bound, &mut step);
            prop_assert!(!step.is_empty());
            prop_assert!(step.iter().all(|item| item.urgent == step[0].urgent));
            let cost = |item: &BatchItem| bound.cost(item.rows, item.context);
            let took = bound.fixed + step.iter().map(cost).sum::<u64>();
            // Only the first piece may be beyond the bound, and is the smallest then.
            let is_within = step[0].urgent
                || took <= bound.step
                || step.len() == 1 && step[0].rows <= PIECE_ROWS_MIN;
            prop_assert!(is_within, "{:?}", &step);
            prop_assert!(step.iter().map(|item| item.rows).sum::<u32>() <= 64);
            for item in &step {
                let next = &mut next[item.session as usize];
                prop_assert_eq!(*next, item.context);
                *next += item.rows;
                if !scheduler.holds(item.session) {
                    queues.get_mut(&item.session).expect("it is known").pop_front();
                }
            }
            feed(&mut scheduler, &queues);
        }
        prop_assert_eq!(next, ends);
    }

    #[test]
    fn works_run_once_in_order_within_the_budget(acts in acts()) {
        let mut scheduler = Scheduler::new(64);
        let mut waiting = Queues::new();
        for act in acts {
            match act {
                Act::Add { session, rows, urgent } => {
                    let item = of_session(session, rows, urgent);
                    waiting.entry(session).or_default().push_back(item);
                    feed(&mut scheduler, &waiting);
                }
                Act::Plan => {
                    check_step(&mut scheduler, &mut waiting);
                }
                Act::Forget { session } => {
                    scheduler.forget(session);
                    waiting.remove(&session);
                }
            }
        }
        // All of it runs at last, and something in each step.
        while scheduler.queued() > 0 {
            prop_assert!(check_step(&mut scheduler, &mut waiting) > 0);
        }
        prop_assert!(waiting.values().all(VecDeque::is_empty));
        for tier in [&scheduler.verifies, &scheduler.prompts] {
            prop_assert!(tier.ready.values().all(BTreeSet::is_empty));
            prop_assert_eq!(tier.shares.len(), tier.ahead.len());
        }
    }

    /// Between devices that always have enough to do, with any number of sessions, the difference
    /// is one work.
    #[test]
    fn devices_have_equal_shares(
        more_sessions in prop::collection::vec(0..50u64, 2..6),
        rows in 1..=64u32,
        urgent in any::<bool>(),
        steps in 1..400u32,
    ) {
        // As many sessions as fill a step, or a device could not have its share.
        let sessions = |more| u64::from(64u32.div_ceil(rows)) + more;
        let device = |more| (sessions(more), rows, urgent);
        let devices: Vec<_> = more_sessions.iter().map(device).collect();
        let served = served(&devices, steps, 64);
        let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
        prop_assert!(most - least <= u64::from(rows), "{:?} of {:?}", served, devices);
    }

    /// Each step begins with the device that had the least, however large works are. Small works of
    /// others may fill what large ones leave.
    #[test]
    fn each_step_begins_with_the_device_that_had_the_least(
        devices in prop::collection::vec((1..=64u32, 1..9u64), 2..6),
        urgent in any::<bool>(),
    ) {
        let mut scheduler = Scheduler::new(64);
        for (device, &(rows, sessions)) in (0..).zip(&devices) {
            for session in device * 10..device * 10 + sessions {
                scheduler.enqueue(BatchItem { device, ..item(session, rows, urgent) });
            }
        }
        let (mut step, mut served) = (vec![], vec![0; devices.len()]);
        for _ in 0..200 {
            scheduler.schedule(Bound::NONE, &mut step);
            let first = step[0].device as usize;
            // What a device could not use for want of sessions is not kept for it.
            let level = scheduler.tier(urgent).level;
            let least = served.iter().min().copied().unwrap().max(served[first].min(level));
            prop_assert_eq!(served[first], least, "{:?}", &served);
            for item in &step {
                served[item.device as usize] += u64::from(item.rows);
                scheduler.enqueue(*item);
            }
        }
    }

    /// Verifies of devices that never pause fill each step. Each prompt runs all the same: the one
    /// whose turn it is after so many steps, and before it, of each other device, as many as that
    /// device was served less.
    #[test]
    fn prompts_do_not_starve(
        prompts in prop::collection::vec(1..=64u32, 1..12),
        verify_rows in 1..=64u32,
    ) {
        let mut scheduler = Scheduler::new(64);
        for session in 0..u64::from(64u32.div_ceil(verify_rows)) * 3 {
            scheduler.enqueue(item(1000 + session, verify_rows, true));
        }
        for (session, &rows) in (0..).zip(&prompts) {
            scheduler.enqueue(item(session, rows, false));
        }
        let mut step = vec![];
        let mut left = prompts.len();
        for _ in 0..prompts.len() as u32 * (PROMPT_PATIENCE + 1) {
            scheduler.schedule(Bound::NONE, &mut step);
            for item in &step {
                if item.urgent {
                    scheduler.enqueue(*item);
                } else {
                    left -= 1;
                }
            }
        }
        prop_assert_eq!(left, 0);
    }
}
