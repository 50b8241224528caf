//! Drafting over a link with a round trip of 10 ms, where rows go up while others are away; also
//! over one that breaks again and again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use hat_emulator::{Emulator, EmulatorConfig};
use hat_engine::options::{Codec, DraftMode};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Metrics, Request};
use hat_loader::DrafterArchitecture;

use super::assert_same;
use super::drafts::{request, requests, whole};
use super::support::drafter::add_noise;
use super::support::proxy::Proxy;
use super::support::{Bundles, collect, eventually, steps};
use super::trained::engine;

const RTT: Duration = Duration::from_millis(10);

/// A cloud, and a link to it.
fn far_cloud(bundles: &Bundles, edit: impl FnOnce(&mut EmulatorConfig)) -> (Cloud, Emulator) {
    let cloud = Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap();
    let mut config = EmulatorConfig::new(cloud.address()).rtt(RTT);
    edit(&mut config);
    let link = Emulator::start(config).unwrap();
    (cloud, link)
}

/// Asks all of `requests` at once and compares.
fn ask_all(case: &str, engine: &Engine, mode: DraftMode, requests: &[Request], whole: &[Metrics]) {
    std::thread::scope(|scope| {
        for (index, (request, whole)) in requests.iter().zip(whole).enumerate() {
            scope.spawn(move || {
                let split = collect(engine, request.clone().draft(mode));
                assert_same(&format!("{case}, {}, request {index}", mode.name()), whole, &split);
            });
        }
    });
}

#[test]
fn every_draft_mode_says_the_same_over_a_slow_link() {
    let bundles = Bundles::generated(1, 0);
    let requests: Vec<Request> =
        requests().into_iter().map(|request| request.max_tokens(24)).collect();
    let whole = whole(&bundles, 1, Codec::default(), &requests);
    add_noise(&bundles, DrafterArchitecture::Deep);
    let (_cloud, link) = far_cloud(&bundles, |_| {});
    let config = || EngineConfig::new(bundles.path.join("device"));
    for mode in DraftMode::ALL {
        let engine = Engine::open(config().cloud(link.address().to_string())).unwrap();
        ask_all("10 ms", &engine, mode, &requests, &whole);
    }
}

/// The cloud tells the device how fast its rows come in.
#[test]
fn the_uplinks_rate_is_known_after_a_prompt() {
    let bundles = Bundles::generated(1, 0);
    let (_cloud, link) = far_cloud(&bundles, |config| {
        *config = config.clone().mbit(16.0, 16.0);
    });
    let config = EngineConfig::new(bundles.path.join("device"));
    let engine = Engine::open(config.cloud(link.address().to_string())).unwrap();
    let prompt = super::support::long_prompt(1500);
    let timings = collect(&engine, Request::tokens(prompt).max_tokens(1)).timings;
    assert!(timings.chunks.len() > 5 && timings.bytes_up > 1500 * 64, "{timings:?}");
    let rate = engine.metrics().estimates.uplink_bytes_s.expect("192 kB took a tenth of a second");
    assert!(rate.is_finite() && rate > 0.0, "{rate} bytes a second");
}

#[test]
fn drafts_over_a_link_that_breaks_say_the_same() {
    let bundles = Bundles::generated(1, 1);
    let requests = requests();
    let whole = whole(&bundles, 1, Codec::default(), &requests);
    add_noise(&bundles, DrafterArchitecture::Deep);
    let (_cloud, link) = far_cloud(&bundles, |config| {
        config.cut.every = Some(Duration::from_millis(120));
        config.cut.away = Duration::from_millis(5);
    });
    let modes = [DraftMode::Auto, DraftMode::Tree, DraftMode::Stream, DraftMode::All];
    let mut rounds = 0;
    // As often as it takes on a fast machine for the link to break.
    while rounds == 0 || link.report().unwrap().cuts < 4 {
        for mode in modes {
            let config = EngineConfig::new(bundles.path.join("device"));
            let engine = Engine::open(config.cloud(link.address().to_string())).unwrap();
            ask_all("cuts", &engine, mode, &requests, &whole);
        }
        rounds += 1;
        assert!(rounds < 100, "it never breaks");
    }
}

/// A cloud behind a link, and a switch: a step waits then until more rows have come up, or half a
/// second where the device has none. Rows are away for long, whatever the machine is busy with.
fn waiting_cloud(bundles: &Bundles) -> (Cloud, Proxy, Arc<AtomicBool>) {
    let waits = Arc::new(AtomicBool::new(false));
    let up_bytes = Arc::new(AtomicI64::new(0));
    let (switch, count) = (Arc::clone(&waits), Arc::clone(&up_bytes));
    let cloud = steps::cloud(CloudConfig::new(bundles.path.join("cloud")), move || {
        let (begun, before) = (Instant::now(), count.load(Ordering::Relaxed));
        while switch.load(Ordering::Relaxed)
            && count.load(Ordering::Relaxed) == before
            && begun.elapsed() < Duration::from_millis(500)
        {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let link = Proxy::counting(cloud.address(), up_bytes);
    (cloud, link, waits)
}

/// A drafter that is right three times of four: what goes up while rows are away is met.
#[test]
fn rows_meet_rows_that_are_away() {
    for tail_layers in [0, 1] {
        let bundles = Bundles::generated(1, tail_layers);
        let request = request(Default::default());
        let whole = whole(&bundles, 1, Codec::default(), std::slice::from_ref(&request));
        let (_cloud, link, waits) = waiting_cloud(&bundles);
        let address = link.address().to_string();
        let timings = [DraftMode::Tree, DraftMode::Stream, DraftMode::All].map(|mode| {
            waits.store(mode.streams(), Ordering::Relaxed);
            let (engine, seen) = engine(&bundles, &address, &whole[0]);
            let split = collect(&engine, request.clone().draft(mode));
            let case = format!("tail {tail_layers}, {}", mode.name());
            assert_same(&case, &whole[0], &split);
            drop(engine);
            assert!(seen.lock().unwrap().kept > 10, "{case}");
            split.timings
        });
        let [tree, stream, all] = &timings;
        assert_eq!(tree.predraft_hits, 0);
        assert!(tree.rows_in_flight_max <= 75, "the prompt's, or a tree: {tree:?}");
        assert!(all.predraft_hits > 0 && all.rounds < tree.rounds, "{all:?}\n{tree:?}");
        assert!(stream.rounds <= tree.rounds, "{stream:?}\n{tree:?}");
    }
}

/// Requests are given up while their rows are away: what still comes back for them is let go, and
/// the one beside them says what it would have said alone.
#[test]
fn verdicts_for_cancelled_requests_harm_nobody() {
    let bundles = Bundles::generated(1, 0);
    let requests = [request(Default::default())];
    let whole = whole(&bundles, 1, Codec::default(), &requests);
    add_noise(&bundles, DrafterArchitecture::Deep);
    let (cloud, link) = far_cloud(&bundles, |_| {});
    let config = EngineConfig::new(bundles.path.join("device"));
    let engine = Engine::open(config.cloud(link.address().to_string())).unwrap();
    let all_given_up = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !all_given_up.load(Ordering::Relaxed) {
                let beside = collect(&engine, requests[0].clone().draft(DraftMode::All));
                assert_same("beside cancelled ones", &whole[0], &beside);
            }
        });
        for index in 0..10 {
            let request = requests[0].clone().draft(DraftMode::All);
            let mut generation = engine.generate(request).unwrap();
            for _ in 0..3 + index % 5 {
                generation.next().unwrap().unwrap();
            }
        }
        all_given_up.store(true, Ordering::Relaxed);
    });
    let sessions = || cloud.counters().sessions.load(Ordering::Relaxed);
    eventually("no session is left", || sessions() == 0);
}

/// More waves than a slow cloud has room for in its steps: some are void before their turn, and
/// are not computed.
#[test]
fn waves_that_are_void_before_their_step_are_dropped() {
    let bundles = Bundles::generated(1, 0);
    let requests: Vec<Request> =
        requests().into_iter().map(|request| request.max_tokens(24)).take(8).collect();
    let whole = whole(&bundles, 1, Codec::default(), &requests);
    add_noise(&bundles, DrafterArchitecture::Deep);
    let mut config = CloudConfig::new(bundles.path.join("cloud"));
    config.limits.step_rows_max = 40;
    let cloud = steps::cloud(config, || std::thread::sleep(Duration::from_millis(3)));
    let dropped = || cloud.counters().dropped.load(Ordering::Relaxed);
    let mut rounds = 0;
    while rounds == 0 || dropped() == 0 {
        rounds += 1;
        assert!(rounds < 100, "{:?}", cloud.counters());
        for mode in [DraftMode::Stream, DraftMode::All] {
            let engines = [(); 2].map(|()| {
                let config = EngineConfig::new(bundles.path.join("device"));
                Engine::open(config.cloud(cloud.address().to_string())).unwrap()
            });
            std::thread::scope(|scope| {
                for engine in &engines {
                    scope.spawn(|| ask_all("slow cloud", engine, mode, &requests, &whole));
                }
            });
        }
    }
}
