//! Drafting over a link with a round trip of 10 ms, where rows go up while others are away; also
//! over one that breaks again and again.

use std::time::Duration;

use hat_engine::options::{Codec, DraftMode};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Metrics, Request};
use hat_loader::AdapterKind;
use hat_transport::emulator::{Emulator, EmulatorConfig};

use super::assert_same;
use super::drafts::{request, requests, whole};
use super::support::drafter::add_noise;
use super::support::{Bundles, collect, steps};
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
    let whole = whole(&bundles, 1, Codec::F16, &requests);
    add_noise(&bundles, AdapterKind::Deep);
    let (_cloud, link) = far_cloud(&bundles, |_| {});
    let config = || EngineConfig::new(bundles.path.join("device"));
    for mode in DraftMode::ALL {
        let engine = Engine::open(config().cloud(link.address().to_string())).unwrap();
        ask_all("10 ms", &engine, mode, &requests, &whole);
    }
}

/// The cloud tells the device how fast its rows come in, however long the device computes between
/// two chunks. The bounds are wide: others compute on this machine too.
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
    assert!(timings.chunks.len() > 5 && timings.bytes_up > 1500 * 128, "{timings:?}");
    let rate = engine.metrics().estimates.uplink_bytes_s.expect("192 kB took a tenth of a second");
    assert!((1e6..4e6).contains(&rate), "{rate} bytes a second, not 2e6");
}

#[test]
fn drafts_over_a_link_that_breaks_say_the_same() {
    let bundles = Bundles::generated(1, 1);
    let requests = requests();
    let whole = whole(&bundles, 1, Codec::F16, &requests);
    add_noise(&bundles, AdapterKind::Deep);
    let (_cloud, link) = far_cloud(&bundles, |config| {
        config.cut.every = Some(Duration::from_millis(120));
        config.cut.away = Duration::from_millis(5);
    });
    for mode in [DraftMode::Auto, DraftMode::Tree, DraftMode::Stream, DraftMode::All] {
        let config = EngineConfig::new(bundles.path.join("device"));
        let engine = Engine::open(config.cloud(link.address().to_string())).unwrap();
        ask_all("cuts", &engine, mode, &requests, &whole);
    }
    let report = link.report().unwrap();
    assert!(report.cuts > 3, "{} cuts", report.cuts);
}

/// A drafter that is right three times of four: what goes up while rows are away is met.
#[test]
fn rows_meet_rows_that_are_away() {
    for tail_layers in [0, 1] {
        let bundles = Bundles::generated(1, tail_layers);
        let request = request(Default::default());
        let whole = whole(&bundles, 1, Codec::F16, std::slice::from_ref(&request));
        let (_cloud, link) = far_cloud(&bundles, |_| {});
        let address = link.address().to_string();
        let timings = [DraftMode::Tree, DraftMode::Stream, DraftMode::All].map(|mode| {
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
    let whole = whole(&bundles, 1, Codec::F16, &requests);
    add_noise(&bundles, AdapterKind::Deep);
    let (cloud, link) = far_cloud(&bundles, |_| {});
    let config = EngineConfig::new(bundles.path.join("device"));
    let engine = Engine::open(config.cloud(link.address().to_string())).unwrap();
    std::thread::scope(|scope| {
        let beside = scope.spawn(|| collect(&engine, requests[0].clone().draft(DraftMode::All)));
        let mut given_up = 0;
        while !beside.is_finished() {
            let request = requests[0].clone().draft(DraftMode::All);
            let mut generation = engine.generate(request).unwrap();
            for _ in 0..3 + given_up % 5 {
                generation.next().unwrap().unwrap();
            }
            given_up += 1;
        }
        assert!(given_up > 2, "{given_up} were given up");
        assert_same("beside cancelled ones", &whole[0], &beside.join().unwrap());
    });
    let start = std::time::Instant::now();
    while cloud.counters().sessions.load(std::sync::atomic::Ordering::Relaxed) > 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "a session is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// More waves than a slow cloud has room for in its steps: some are void before their turn, and
/// are not computed.
#[test]
fn waves_that_are_void_before_their_step_are_dropped() {
    let bundles = Bundles::generated(1, 0);
    let requests: Vec<Request> =
        requests().into_iter().map(|request| request.max_tokens(24)).take(8).collect();
    let whole = whole(&bundles, 1, Codec::F16, &requests);
    add_noise(&bundles, AdapterKind::Deep);
    let mut config = CloudConfig::new(bundles.path.join("cloud"));
    config.limits.step_rows_max = 40;
    let cloud = steps::cloud(config, || std::thread::sleep(Duration::from_millis(3)));
    let dropped = || cloud.counters().dropped.load(std::sync::atomic::Ordering::Relaxed);
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
    assert!(dropped() > 0, "{:?}", cloud.counters());
}
