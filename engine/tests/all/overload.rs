//! Too much of everything, and devices that stop: what a cloud can't hold waits, comes back or is
//! replayed, and the text is the whole model's all the same. Each case ends within seconds.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::support::hand::{HIDDEN, Hand, chain};
use crate::support::proxy::Proxy;
use crate::support::{Bundles, PATIENCE, collect, collect_with, long_prompt, steps};
use hat_compute::open;
use hat_engine::options::{
    ChunkPolicy, CloudCounters, CloudLimits, Codec, DeviceLimits, ErrorKind, Processor,
};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::testkit::pool_pages;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Event, Metrics, Request};
use hat_plan::{Computes, MiddleForward, MiddleStep};
use hat_transport::endpoint::Event as LinkEvent;
use hat_transport::message::{Dropped, Message, RowsHead, SessionErrorCode, Want};

fn request() -> Request {
    Request::tokens(long_prompt(75)).max_tokens(48).ignore_eos().hash_logits()
}

fn whole(bundles: &Bundles, request: &Request) -> Metrics {
    let backend = open::cpu(Processor::Auto, 1).unwrap();
    let mut whole =
        ReferenceRun::open(backend, &bundles.path, None, Codec::default(), 8192).unwrap();
    *whole.generate(request.clone(), |_| {}).unwrap().1
}

fn assert_same(case: &str, whole: &Metrics, split: &Metrics) {
    assert_eq!(split.token_ids, whole.token_ids, "{case}: token ids");
    assert_eq!(split.logits_blake3, whole.logits_blake3, "{case}: logits");
}

fn config(bundles: &Bundles) -> CloudConfig {
    CloudConfig::new(bundles.path.join("cloud")).threads(1)
}

fn device(bundles: &Bundles, address: impl ToString) -> Engine {
    let config = EngineConfig::new(bundles.path.join("device")).cloud(address.to_string());
    Engine::open(config.threads(1).chunks(ChunkPolicy::Fixed(16))).unwrap()
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn wait_until(what: &str, cloud: &Cloud, is_so: impl Fn(&CloudCounters) -> bool) {
    let start = Instant::now();
    while !is_so(cloud.counters()) {
        assert!(start.elapsed() < PATIENCE, "{what}: {:?}", cloud.counters());
        std::thread::sleep(Duration::from_millis(2));
    }
}

type FieldOf<L> = fn(&mut L) -> &mut u32;

#[test]
fn bounds_of_zero_are_refused_by_name() {
    let bundles = Bundles::generated(1, 0);
    let refuses = |error: Option<hat_engine::Error>, field: &str| {
        let error = error.unwrap_or_else(|| panic!("{field} may be 0"));
        assert_eq!(error.kind(), ErrorKind::Input);
        assert!(error.to_string().starts_with(field), "{error}");
    };
    let of_cloud: [(&str, FieldOf<CloudLimits>); 6] = [
        ("sessions_max", |limits| &mut limits.sessions_max),
        ("step_rows_max", |limits| &mut limits.step_rows_max),
        ("context_max", |limits| &mut limits.context_max),
        ("kv_rows_max", |limits| &mut limits.kv_rows_max),
        ("connections_max", |limits| &mut limits.connections_max),
        ("sessions_per_device_max", |limits| &mut limits.sessions_per_device_max),
    ];
    for (field, of) in of_cloud {
        let mut cloud = config(&bundles);
        *of(&mut cloud.limits) = 0;
        refuses(Cloud::start(cloud).err(), field);
    }
    let of_device: [(&str, FieldOf<DeviceLimits>); 5] = [
        ("sessions_max", |limits| &mut limits.sessions_max),
        ("step_rows_max", |limits| &mut limits.step_rows_max),
        ("queue_max", |limits| &mut limits.queue_max),
        ("context_max", |limits| &mut limits.context_max),
        ("kv_rows_max", |limits| &mut limits.kv_rows_max),
    ];
    for (field, of) in of_device {
        let mut device = EngineConfig::new(bundles.path.join("device"));
        *of(&mut device.limits) = 0;
        refuses(Engine::open(device).err(), field);
    }
}

/// Pages for one session, and six devices that want one each.
#[test]
fn out_of_pages_everybody_is_served_in_the_end() {
    let bundles = Bundles::generated(1, 0);
    let whole = whole(&bundles, &request());
    let mut config = config(&bundles);
    config.limits.kv_rows_max = 128;
    let cloud = Cloud::start(config).unwrap();
    std::thread::scope(|scope| {
        for index in 0..6 {
            let (bundles, cloud, whole) = (&bundles, &cloud, &whole);
            scope.spawn(move || {
                let split = collect(&device(bundles, cloud.address()), request());
                assert_same(&format!("device {index}"), whole, &split);
            });
        }
    });
    let counters = cloud.counters();
    assert!(count(&counters.busy) > 0 && count(&counters.refused) == 0, "{counters:?}");
}

/// All places and pages are taken by one device, which then does nothing with them.
#[test]
fn a_device_that_opens_a_thousand_sessions_shuts_nobody_out() {
    let bundles = Bundles::generated(1, 0);
    let whole = whole(&bundles, &request());
    for (per_device, rows_max) in [(64, 100), (1024, 2000)] {
        let mut config = config(&bundles);
        config.limits.sessions_per_device_max = per_device;
        config.idle_after = Duration::from_millis(300);
        let cloud = Cloud::start(config).unwrap();
        let mut hog = Hand::connect(&bundles, &cloud);
        let (mut opened, mut busy) = (0, Vec::new());
        let mut note = |event: &LinkEvent| {
            let LinkEvent::Frame { frame, .. } = event else { return };
            match Message::decode(frame.kind, &frame.body).unwrap() {
                Message::Opened(_) => opened += 1,
                Message::Busy(told) => busy.push(told.retry_after_ms),
                _ => {}
            }
        };
        for some in 0..10 {
            for session in some * 100..(some + 1) * 100 {
                hog.open(session + 1, |open| open.rows_max = rows_max);
            }
            hog.turn_for(Duration::from_millis(20), &mut note);
        }
        let split = std::thread::scope(|scope| {
            let honest = scope.spawn(|| collect(&device(&bundles, cloud.address()), request()));
            while !honest.is_finished() {
                hog.turn_for(Duration::from_millis(20), &mut note);
            }
            honest.join().unwrap()
        });
        assert_same("beside a hog", &whole, &split);
        assert_eq!(opened + busy.len(), 1000);
        assert!(opened <= per_device as usize, "{opened} sessions");
        assert!(busy.iter().all(|told| (50..=10_000).contains(told)), "{busy:?}");
        let different: std::collections::HashSet<_> = busy.iter().collect();
        assert!(different.len() > 10, "they all come back at once: {different:?}");
    }
}

/// A cloud that stays full is busy, not broken.
#[test]
fn a_device_that_never_gets_in_is_told_that_the_cloud_is_busy() {
    let bundles = Bundles::generated(1, 0);
    let mut config = config(&bundles);
    config.limits.sessions_max = 1;
    let cloud = Cloud::start(config).unwrap();
    let mut first = Hand::connect(&bundles, &cloud);
    first.open(1, |_| {});
    first.turn_for(Duration::from_millis(50), |_| {});
    let mut config = EngineConfig::new(bundles.path.join("device"));
    config.reconnect = Duration::from_secs(1);
    let engine = Engine::open(config.cloud(cloud.address().to_string())).unwrap();
    let error = engine.generate(request()).unwrap().find_map(Result::err).unwrap();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(error.retry_after_ms().is_some_and(|ms| ms >= 50), "{error}");
}

/// Chunks that are begun and never end hold buffers that are everybody's: a device has few of them.
#[test]
fn chunks_that_never_end_are_bounded() {
    let bundles = Bundles::generated(1, 0);
    let whole = whole(&bundles, &request());
    let cloud = Cloud::start(config(&bundles)).unwrap();
    let mut hog = Hand::connect(&bundles, &cloud);
    let row = vec![0u8; HIDDEN * 4];
    let refused = std::cell::Cell::new(0);
    let note = |event: &LinkEvent| {
        let LinkEvent::Frame { frame, .. } = event else { return };
        if let Message::SessionError(error) = Message::decode(frame.kind, &frame.body).unwrap()
            && error.code == SessionErrorCode::BadShape
        {
            assert!(error.text.contains("do not end"), "{}", error.text);
            refused.set(refused.get() + 1);
        }
    };
    for session in 1..=20 {
        hog.open(session, |_| {});
        for id in 1..=60 {
            hog.rows(session, &RowsHead { more: true, ..chain(id, 1, id - 1) }, &[], &row);
        }
        hog.turn_for(Duration::from_millis(30), note);
    }
    let start = Instant::now();
    while refused.get() < 12 && start.elapsed() < PATIENCE {
        hog.turn_for(Duration::from_millis(30), note);
    }
    // The first eight have 480 frames; each further one ends with its 33rd.
    assert_eq!(refused.get(), 12);
    assert_same(
        "beside begun chunks",
        &whole,
        &collect(&device(&bundles, cloud.address()), request()),
    );
}

/// Outputs for a device that reads none wait for it alone, and then it is sent away.
#[test]
fn a_device_that_never_reads_holds_nobody_up() {
    let bundles = Bundles::generated(1, 0);
    let whole = whole(&bundles, &request());
    let mut config = config(&bundles);
    config.idle_after = Duration::from_millis(1500);
    let cloud = Cloud::start(config).unwrap();
    let link = Proxy::to(cloud.address());
    let mut deaf = Hand::connect_to(&bundles, link.address(), |config| {
        config.pool.small = 4096;
        config.connection.queue_frames_max = 4096;
        config.connection.dead_after = Duration::from_secs(60);
    });
    for session in 1..=30 {
        deaf.open(session, |_| {});
    }
    while count(&cloud.counters().sessions) < 30 {
        deaf.turn_for(Duration::from_millis(5), |_| {});
    }
    link.down_stopped.store(true, Ordering::Release);
    let row = vec![0u8; HIDDEN * 4];
    for id in 1..=90 {
        for session in 1..=30 {
            deaf.rows(session, &chain(id, 1, id - 1), &[], &row);
        }
        deaf.turn_for(Duration::from_millis(1), |_| {});
    }
    wait_until("its rows are run", &cloud, |counters| count(&counters.rows) >= 2700);
    let split = collect(&device(&bundles, cloud.address()), request());
    assert_same("beside a deaf device", &whole, &split);
    // It is alive, as far as the cloud can tell, and its sessions end all the same.
    std::thread::scope(|scope| {
        let gone = scope.spawn(|| {
            wait_until("sent away", &cloud, |counters| count(&counters.sessions) == 0);
        });
        while !gone.is_finished() {
            deaf.turn_for(Duration::from_millis(20), |_| {});
        }
    });
    assert_eq!(count(&cloud.counters().refused), 1);
}

/// The link stops in the middle of a prompt for longer than a peer may be silent.
#[test]
fn a_link_that_stops_mid_prompt_goes_on_there() {
    let bundles = Bundles::generated(1, 0);
    let request = Request::tokens(long_prompt(600)).max_tokens(24).ignore_eos().hash_logits();
    let whole = whole(&bundles, &request);
    let cloud = Cloud::start(config(&bundles)).unwrap();
    let link = Proxy::to(cloud.address());
    let engine = device(&bundles, link.address());
    let mut stopped = false;
    for event in engine.generate(request).unwrap() {
        match event.unwrap() {
            Event::Prefill { sent, total } if sent < total && !stopped => {
                stopped = true;
                link.stop(true);
                std::thread::sleep(Duration::from_millis(3500));
                link.stop(false);
            }
            Event::Done { metrics, .. } => assert_same("stopped", &whole, &metrics),
            _ => {}
        }
    }
    assert!(stopped);
}

/// The cloud's scheduler holds one work of each session, no more. Sixteen sessions,
/// as many as may be, send their prompts a row at a time while no step runs.
#[test]
fn more_works_than_any_queue_holds_wait_their_turn() {
    const SESSIONS: usize = 16;
    let bundles = Bundles::generated(1, 0);
    let whole = whole(&bundles, &request());
    let mut config = config(&bundles);
    config.limits.sessions_max = u32::try_from(SESSIONS).unwrap();
    let gate = Arc::new(Gate::default());
    let passed = Arc::clone(&gate);
    let cloud = steps::cloud(config, move || passed.pass());
    let sent_whole = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..SESSIONS / 4 {
            let mut config = EngineConfig::new(bundles.path.join("device")).threads(1);
            config = config.cloud(cloud.address().to_string()).chunks(ChunkPolicy::Fixed(1));
            let engine = Arc::new(Engine::open(config).unwrap());
            for _ in 0..4 {
                let (engine, whole, sent_whole) = (engine.clone(), &whole, &sent_whole);
                scope.spawn(move || {
                    for event in engine.generate(request()).unwrap() {
                        match event.unwrap() {
                            Event::Prefill { sent, total } if sent == total => {
                                sent_whole.fetch_add(1, Ordering::SeqCst);
                            }
                            Event::Done { metrics, .. } => {
                                assert_same("row by row", whole, &metrics)
                            }
                            _ => {}
                        }
                    }
                });
            }
        }
        wait_until("all rows are sent", &cloud, |_| count(&sent_whole) == SESSIONS as u64);
        gate.open();
    });
    assert_eq!(count(&cloud.counters().refused), 0);
}

/// A device stalls in the middle of its answer, another gets its pages, and the first goes on.
#[test]
fn an_idle_session_is_evicted_and_replayed() {
    let bundles = Bundles::generated(1, 0);
    let whole = whole(&bundles, &request());
    let mut config = config(&bundles);
    config.limits.kv_rows_max = 128;
    config.idle_after = Duration::from_millis(200);
    let cloud = Cloud::start(config).unwrap();
    let link = Proxy::to(cloud.address());
    let (stalled, other) = (device(&bundles, link.address()), device(&bundles, cloud.address()));
    link.stop_after(1500);
    let mut is_first = true;
    let split = collect_with(&stalled, request(), |_| {
        if std::mem::take(&mut is_first) {
            link.wait_until_stopped();
            assert_same("the other", &whole, &collect(&other, request()));
            link.stop(false);
        }
    });
    assert_same("evicted", &whole, &split);
    assert_eq!(count(&cloud.counters().evicted), 1);
}

/// A device is killed with all pages in its hands: who comes next does not wait for the minute in
/// which it could come back, nor until its sessions count as idle.
#[test]
fn a_killed_device_is_not_waited_for() {
    let bundles = Bundles::generated(1, 0);
    let whole = whole(&bundles, &request());
    let mut config = config(&bundles);
    config.limits.kv_rows_max = 512;
    config.idle_after = Duration::from_secs(600);
    let cloud = Cloud::start(config).unwrap();
    let mut killed = Hand::connect(&bundles, &cloud);
    for session in 1..=3 {
        killed.open(session, |_| {});
        killed.opened(session);
    }
    assert!(count(&cloud.counters().pages_free) < 6);
    drop(killed);
    assert_same("after", &whole, &collect(&device(&bundles, cloud.address()), request()));
    // After the minute its sessions would end without being evicted.
    assert!(count(&cloud.counters().evicted) > 0);
}

/// Row ids that end where numbers do end their session, and no thread.
#[test]
fn the_last_row_id_is_refused() {
    let bundles = Bundles::generated(1, 0);
    let cloud = Cloud::start(config(&bundles)).unwrap();
    let mut liar = Hand::connect(&bundles, &cloud);
    for (session, decided) in [(1, true), (2, false)] {
        liar.open(session, |_| {});
        let head = RowsHead { decided, ..chain(u32::MAX, 1, 0) };
        liar.rows(session, &head, &[], &vec![0; HIDDEN * 4]);
        let (code, text) = liar.error(session);
        assert_eq!(code, SessionErrorCode::BadShape, "{text}");
    }
}

/// Steps stand still while it is closed.
#[derive(Default)]
struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        let closed = |is_open: &mut bool| !*is_open;
        drop(self.opened.wait_while(self.is_open.lock().unwrap(), closed).unwrap());
    }

    fn open(&self) {
        *self.is_open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

/// A stage that computes nothing: it counts the steps that begin, and waits at a gate.
struct Held {
    gate: Arc<Gate>,
    begun: Arc<AtomicU64>,
}

impl Computes for Held {
    fn describe(&self) -> String {
        "held".into()
    }
}

impl MiddleForward for Held {
    fn forward(&mut self, _: &mut MiddleStep) {
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.gate.pass();
    }
}

/// Opens gates when a test ends, also one that fails: its cloud waits for its steps.
struct OpenAtEnd([Arc<Gate>; 2]);

impl Drop for OpenAtEnd {
    fn drop(&mut self) {
        self.0.iter().for_each(|gate| gate.open());
    }
}

/// The first stage has its next step as soon as it has handed one on, though nothing arrives and
/// no step ends: the io thread is woken for that.
#[test]
fn a_first_stage_that_has_handed_a_step_on_is_given_another() {
    let bundles = Bundles::generated(1, 0);
    let mut config = config(&bundles);
    config.limits.step_rows_max = 4;
    let half = hat_loader::Bundle::open(&config.bundle).unwrap();
    let pages = pool_pages(&config);
    let gates = [Arc::new(Gate::default()), Arc::new(Gate::default())];
    let begun = Arc::new(AtomicU64::new(0));
    let stage = |gate: &Arc<Gate>, begun: &Arc<AtomicU64>| -> Box<dyn MiddleForward> {
        Box::new(Held { gate: Arc::clone(gate), begun: Arc::clone(begun) })
    };
    let stages = vec![stage(&gates[0], &begun), stage(&gates[1], &Arc::default())];
    let cloud = Cloud::serve_stages(config, &half, stages, pages).unwrap();
    let gates = OpenAtEnd(gates);
    let mut hand = Hand::connect(&bundles, &cloud);
    for session in 1..=3 {
        hand.open(session, |_| {});
        let head = RowsHead { want: Want::None, ..chain(1, 4, 0) };
        hand.rows(session, &head, &[], &[0; 4 * HIDDEN * 4]);
    }
    // All of these frames have been taken when the one behind them is answered.
    hand.open(4, |_| {});
    hand.opened(4);
    gates.0[0].open();
    // The device stays, or its silence would wake the io thread.
    let start = Instant::now();
    while count(&begun) < 3 {
        assert!(start.elapsed() < PATIENCE, "the first stage has had {} steps", count(&begun));
        hand.turn_for(Duration::from_millis(5), |_| {});
    }
    assert_eq!(count(&cloud.counters().steps), 0);
    gates.0[1].open();
    wait_until("they end", &cloud, |counters| count(&counters.steps) == 3);
}

fn pending_rows(first_id: u32, parent: u32, commit: u32) -> RowsHead {
    RowsHead { decided: false, want: Want::All, commit, ..chain(first_id, 2, parent) }
}

/// Batches of drafts that wait while the device goes another way are not computed. What the new way
/// passes through is, and so is what that hangs from.
#[test]
fn stale_batches_are_dropped_and_nothing_else() {
    let bundles = Bundles::generated(1, 0);
    let row = |of: u32| [of as f32 / 7.0; HIDDEN].map(f32::to_le_bytes).concat();
    let rows = |first: u32, count: u32| (first..first + count).flat_map(row).collect::<Vec<u8>>();
    let mut said = Vec::new();
    for is_slow in [true, false] {
        let gate = Arc::new(Gate::default());
        let passed = Arc::clone(&gate);
        let cloud = steps::cloud(config(&bundles), move || passed.pass());
        if !is_slow {
            gate.open();
        }
        let mut hand = Hand::connect(&bundles, &cloud);
        // Two other sessions fill the step at hand and the one behind it.
        for session in [1, 2] {
            hand.open(session, |_| {});
            hand.rows(session, &chain(1, 1, 0), &[], &row(1));
            hand.turn_for(Duration::from_millis(30), |_| {});
        }
        hand.open(3, |_| {});
        hand.rows(3, &chain(1, 1, 0), &[], &rows(1, 1));
        hand.rows(3, &pending_rows(2, 1, 0), &[], &rows(2, 2));
        hand.rows(3, &pending_rows(4, 3, 0), &[], &rows(4, 2));
        // This one keeps the path to row 2, and is stale but for that.
        hand.rows(3, &pending_rows(6, 2, 2), &[], &rows(6, 2));
        // Now the device goes on behind row 2.
        let head = RowsHead { commit: 0, ..chain(8, 1, 2) };
        hand.rows(3, &head, &[], &rows(8, 1));
        let mut dropped: Vec<Dropped> = Vec::new();
        let mut outputs: Vec<(u32, Vec<u8>)> = Vec::new();
        let start = Instant::now();
        while !outputs.iter().any(|(id, _)| *id == 8) {
            assert!(start.elapsed() < PATIENCE, "no answer");
            hand.turn_for(Duration::from_millis(5), |event| {
                let LinkEvent::Frame { frame, .. } = event else { return };
                match Message::decode(frame.kind, &frame.body).unwrap() {
                    Message::Dropped(rows) => dropped.push(rows),
                    Message::Output(output) if frame.session == 3 => {
                        let payload = output.payload.chunks_exact(HIDDEN * 4);
                        outputs.extend(output.ids.iter().zip(payload.map(<[u8]>::to_vec)));
                    }
                    Message::SessionError(error) => panic!("{error:?}"),
                    _ => {}
                }
            });
            if is_slow && dropped.len() == 2 {
                gate.open();
            }
        }
        let ids: Vec<_> = outputs.iter().map(|(id, _)| *id).collect();
        let counters = cloud.counters();
        if is_slow {
            let [first, second] = [4, 6].map(|first_id| Dropped { first_id, count: 2 });
            assert_eq!(dropped.len(), 2);
            assert!(dropped.contains(&first) && dropped.contains(&second), "{dropped:?}");
            assert_eq!(ids, [1, 2, 3, 8]);
            assert_eq!((count(&counters.dropped), count(&counters.rows)), (4, 2 + 4));
        } else {
            assert_eq!(ids.len() as u64 + count(&counters.dropped), 8);
        }
        said.push(outputs.last().unwrap().1.clone());
    }
    assert_eq!(said[0], said[1], "row 8 sees the same path");
}
