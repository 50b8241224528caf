//! A backend that does not come back from a step: the cloud says so and ends, its devices are told,
//! and nobody waits for the thread that hangs.
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{Bundles, collect, long_prompt, steps};
use hat_engine::options::ErrorKind;
use hat_engine::testkit::pool_pages;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Request};
use hat_loader::Bundle;
use hat_plan::{Computes, MiddleForward, MiddleStep};

/// A stage that begins a step and does not end it before the test does.
struct Hangs(Arc<Mutex<Receiver<()>>>);

impl Computes for Hangs {
    fn describe(&self) -> String {
        "planted".into()
    }
}

impl MiddleForward for Hangs {
    fn forward(&mut self, _: &mut MiddleStep) {
        let _ = self.0.lock().unwrap().recv();
    }
}

fn device(bundles: &Bundles, cloud: &Cloud) -> EngineConfig {
    EngineConfig::new(bundles.path.join("device")).cloud(cloud.address().to_string())
}

fn request() -> Request {
    Request::tokens(long_prompt(40)).max_tokens(8).ignore_eos()
}

#[test]
fn a_step_that_hangs_ends_the_cloud() {
    let bundles = Bundles::generated(1, 0);
    for stages in 1..3 {
        // Held to the end of the test, and with it the thread that hangs.
        let (_end, hung) = channel();
        let hung = Arc::new(Mutex::new(hung));
        let mut config = CloudConfig::new(bundles.path.join("cloud"));
        config.step_within = Duration::from_millis(200);
        let half = Bundle::open(&config.bundle).unwrap();
        let pages = pool_pages(&config);
        let stage = |_| -> Box<dyn MiddleForward> { Box::new(Hangs(hung.clone())) };
        let models = (0..stages).map(stage).collect();
        let cloud = Cloud::serve_stages(config, &half, models, pages).unwrap();
        let mut config = device(&bundles, &cloud);
        config.reconnect = Duration::from_secs(1);
        let engine = Engine::open(config).unwrap();
        let error = engine.generate(request()).unwrap().find_map(Result::err).unwrap();
        assert_eq!(error.kind(), ErrorKind::Peer, "{error}");
        let fault = cloud.join().expect("it says why");
        assert!(fault.lasts && fault.reason.contains("has not ended"), "{fault}");
    }
}

/// No step is due while none is on its way, however long nobody asks for anything.
#[test]
fn a_cloud_without_work_is_not_stuck() {
    let bundles = Bundles::generated(1, 0);
    let mut config = CloudConfig::new(bundles.path.join("cloud"));
    config.step_within = Duration::from_secs(2);
    let cloud = steps::cloud(config, || {});
    let engine = Engine::open(device(&bundles, &cloud)).unwrap();
    for _ in 0..2 {
        assert_eq!(collect(&engine, request()).token_ids.len(), 8);
        std::thread::sleep(Duration::from_millis(2500));
    }
    assert!(!cloud.has_stopped());
}
