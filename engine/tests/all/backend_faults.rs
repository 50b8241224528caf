//! A backend that fails while it runs: sessions are closed and replayed, the text stays what the
//! whole model says, and nobody goes on with what was not computed. And clouds that compute in
//! another arithmetic: what a device accepts, and what it says of it.
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use crate::support::{Bundles, PATIENCE, collect, eventually, long_prompt};
use hat_compute::backend::cpu::CpuBackend;
use hat_compute::open;
use hat_compute::{DeviceModel, MiddleModel};
use hat_core::page::pages_for;
use hat_engine::options::{ChunkPolicy, CloudAddress, Codec, DraftMode, ErrorKind, Processor};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::testkit::pool_pages;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Error, Metrics, Request};
use hat_loader::{Bundle, Submodel};
use hat_plan::{
    AttendBatch, BackendFault, Computes, DeviceForward, MiddleForward, MiddleStep, RowMove, TokenId,
};

fn backend() -> CpuBackend {
    open::cpu(Processor::Auto, 1).unwrap()
}

fn request() -> Request {
    Request::tokens(long_prompt(75)).max_tokens(40).ignore_eos().hash_logits()
}

fn yardstick(bundles: &Bundles) -> Metrics {
    let mut whole =
        ReferenceRun::open(backend(), &bundles.path, Some(1), Codec::default(), 8192).unwrap();
    *whole.generate(request(), |_| {}).unwrap().1
}

fn assert_same(whole: &Metrics, split: &Metrics) {
    assert_eq!(split.token_ids, whole.token_ids);
    assert_eq!(split.logits_blake3, whole.logits_blake3);
    assert!(whole.logits_blake3.is_some(), "nothing was hashed");
}

fn fault(lasts: bool) -> BackendFault {
    BackendFault { backend: "planted", reason: "the test pulled the plug".into(), lasts }
}

/// Countdown to the step that is not computed; negative for none.
type Fuse = Arc<AtomicI64>;

fn burns(fuse: &Fuse) -> bool {
    fuse.fetch_sub(1, Ordering::Relaxed) == 0
}

/// A middle submodel that does not compute some steps, and says what it computes in.
struct Middle {
    inner: MiddleModel<CpuBackend>,
    fuse: Fuse,
    lasts: bool,
    always: bool,
    arithmetic_id: u32,
    fault: Option<BackendFault>,
}

impl Computes for Middle {
    fn describe(&self) -> String {
        "planted".into()
    }

    fn arithmetic_id(&self) -> u32 {
        self.arithmetic_id
    }

    fn fault(&mut self) -> Option<BackendFault> {
        self.fault.take()
    }
}

impl MiddleForward for Middle {
    fn forward(&mut self, step: &mut MiddleStep) {
        if burns(&self.fuse) || self.always {
            // Neither rows nor moves: whoever goes on with this KV store says something else.
            self.fault = Some(fault(self.lasts));
            step.hidden.fill(0.25);
            return;
        }
        self.inner.forward(step);
    }
}

/// A cloud with planted faults.
#[derive(Clone)]
struct Planted {
    fuse: Fuse,
    lasts: bool,
    always: bool,
    arithmetic_id: u32,
    stages: usize,
}

impl Default for Planted {
    fn default() -> Self {
        let fuse = Arc::new(AtomicI64::new(-1));
        Self { fuse, lasts: false, always: false, arithmetic_id: 1, stages: 1 }
    }
}

fn cloud(config: CloudConfig, planted: &Planted) -> Cloud {
    let half = Bundle::open(&config.bundle).unwrap();
    let (pages, rows) = (pool_pages(&config), config.limits.step_rows_max as usize);
    let layers = half.split().layers(Submodel::Middle);
    let cut = |stage| layers.start + stage * layers.len() / planted.stages;
    let stages = (0..planted.stages).map(|stage| -> Box<dyn MiddleForward> {
        let run = cut(stage)..cut(stage + 1);
        Box::new(Middle {
            inner: MiddleModel::load(backend(), &half, run, rows, pages as usize).unwrap(),
            // The first stage alone burns.
            fuse: if stage == 0 { planted.fuse.clone() } else { Arc::new(AtomicI64::new(-1)) },
            lasts: planted.lasts,
            always: planted.always && stage == 0,
            arithmetic_id: planted.arithmetic_id,
            fault: None,
        })
    });
    let stages = stages.collect();
    Cloud::serve_stages(config, &half, stages, pages).unwrap()
}

fn cloud_config(bundles: &Bundles) -> CloudConfig {
    CloudConfig::new(bundles.path.join("cloud"))
}

fn device_config(bundles: &Bundles, cloud: &Cloud) -> EngineConfig {
    EngineConfig::new(bundles.path.join("device"))
        .cloud(cloud.address().to_string())
        .chunks(ChunkPolicy::Fixed(16))
}

fn first_error(engine: &Engine, request: Request) -> Error {
    engine.generate(request).unwrap().find_map(Result::err).expect("an error")
}

#[test]
fn a_step_that_is_not_computed_costs_time_not_text() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles);
    // In the prompt's chunks, at the first token, among trees; in a pipeline too.
    for (burns_at, stages) in [(0, 1), (3, 1), (5, 1), (9, 1), (13, 1), (2, 3), (11, 3)] {
        let planted = Planted { stages, ..Planted::default() };
        planted.fuse.store(burns_at, Ordering::Relaxed);
        let cloud = cloud(cloud_config(&bundles), &planted);
        let engine = Engine::open(device_config(&bundles, &cloud)).unwrap();
        let split = collect(&engine, request());
        assert_same(&whole, &split);
        let faults = cloud.counters().faults.load(Ordering::Relaxed);
        assert_eq!(faults, 1, "step {burns_at} of {stages} stages");
        assert_eq!(split.timings.arithmetic_ids, [1]);
        assert_same(&whole, &collect(&engine, request()));
    }
}

#[test]
fn sessions_without_a_row_in_the_step_are_replayed_too() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles);
    let planted = Planted::default();
    let cloud = cloud(cloud_config(&bundles), &planted);
    let engine = Engine::open(device_config(&bundles, &cloud)).unwrap();
    let (mut first, mut tokens) = (engine.generate(request()).unwrap(), 0);
    // The first one pauses here; its KV stays in the cloud.
    while tokens < 4 {
        tokens +=
            usize::from(matches!(first.next().unwrap().unwrap(), hat_engine::Event::Token { .. }));
    }
    planted.fuse.store(2, Ordering::Relaxed);
    assert_same(&whole, &collect(&engine, request()));
    let rest = first.map(|event| event.unwrap()).find_map(|event| match event {
        hat_engine::Event::Done { metrics, .. } => Some(metrics),
        _ => None,
    });
    assert_same(&whole, &rest.unwrap());
    assert_eq!(cloud.counters().faults.load(Ordering::Relaxed), 1);
}

#[test]
fn a_cloud_that_lost_its_backend_stops_and_another_one_goes_on() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles);
    let planted = Planted { lasts: true, ..Planted::default() };
    planted.fuse.store(9, Ordering::Relaxed);
    let first = cloud(cloud_config(&bundles), &planted);
    let address = first.address();
    let engine = Engine::open(device_config(&bundles, &first)).unwrap();
    let again = cloud_config(&bundles).listen(address);
    let watch = std::thread::spawn(move || {
        let fault = first.join();
        (fault, Cloud::start(again).unwrap())
    });
    assert_same(&whole, &collect(&engine, request()));
    let (said, _second) = watch.join().unwrap();
    assert_eq!(said, Some(fault(true)));
}

#[test]
fn a_cloud_that_computes_nothing_is_given_up() {
    let bundles = Bundles::generated(1, 0);
    let planted = Planted { always: true, ..Planted::default() };
    let cloud = cloud(cloud_config(&bundles), &planted);
    let engine = Engine::open(device_config(&bundles, &cloud)).unwrap();
    let error = first_error(&engine, request());
    assert_eq!(error.kind(), ErrorKind::Peer);
    assert!(error.to_string().contains("planted: the test pulled the plug"), "{error}");
    // Four tries; the next chunk's step may be on its way already when a fault is seen.
    let faults = cloud.counters().faults.load(Ordering::Relaxed);
    assert!((4..=8).contains(&faults), "{faults} steps");
}

#[test]
fn a_device_names_the_arithmetic_of_its_cloud() {
    let bundles = Bundles::generated(1, 0);
    let planted = Planted { arithmetic_id: 2, lasts: true, ..Planted::default() };
    let other = cloud(cloud_config(&bundles), &planted);
    let again = cloud_config(&bundles).listen(other.address());
    let [any, mut strict] = [(); 2].map(|()| device_config(&bundles, &other));
    strict.cloud_arithmetic = Some(1);
    let error = first_error(&Engine::open(strict).unwrap(), request());
    assert_eq!(error.kind(), ErrorKind::Peer);
    assert!(error.to_string().contains("arithmetic 2 there, 1 is wanted here"), "{error}");

    let engine = Engine::open(any).unwrap();
    assert_eq!(collect(&engine, request()).timings.arithmetic_ids, [2]);
    // A cloud of another kind takes over in the middle of an answer, which says so.
    planted.fuse.store(9, Ordering::Relaxed);
    let watch = std::thread::spawn(move || {
        let _ = other.join();
        Cloud::start(again).unwrap()
    });
    let mixed = collect(&engine, request());
    let _second = watch.join().unwrap();
    assert_eq!(mixed.timings.arithmetic_ids, [2, 1]);
    assert_eq!(mixed.token_ids.len(), 40);
}

#[test]
fn an_arithmetic_that_nobody_knows_is_refused() {
    let bundles = Bundles::generated(1, 0);
    let planted = Planted { arithmetic_id: 9, ..Planted::default() };
    let cloud = cloud(cloud_config(&bundles), &planted);
    let engine = Engine::open(device_config(&bundles, &cloud)).unwrap();
    let error = first_error(&engine, request());
    assert!(error.to_string().contains("run the same version on both sides"), "{error}");
}

/// A device submodel that does not compute one of its forward passes.
struct Device {
    inner: DeviceModel<CpuBackend>,
    fuse: Fuse,
    lasts: bool,
    arithmetic_id: u32,
    fault: Option<BackendFault>,
}

impl Device {
    /// Runs work unless work before has failed; returns true if it ran.
    fn run(&mut self, work: impl FnOnce(&mut DeviceModel<CpuBackend>)) -> bool {
        if burns(&self.fuse) {
            self.fault = Some(fault(self.lasts));
        }
        if self.fault.is_none() {
            work(&mut self.inner);
        }
        self.fault.is_none()
    }
}

impl Computes for Device {
    fn describe(&self) -> String {
        "planted".into()
    }

    fn arithmetic_id(&self) -> u32 {
        self.arithmetic_id
    }

    fn fault(&mut self) -> Option<BackendFault> {
        match self.lasts {
            true => self.fault.clone(),
            false => self.fault.take(),
        }
    }
}

impl DeviceForward for Device {
    fn input(&mut self, plan: &AttendBatch<'_>, tokens: &[TokenId], hidden: &mut [f32]) {
        if !self.run(|inner| inner.input(plan, tokens, hidden)) {
            hidden.fill(f32::NAN);
        }
    }

    fn tail(&mut self, plan: &AttendBatch<'_>, hidden: &mut [f32]) {
        if !self.run(|inner| inner.tail(plan, hidden)) {
            hidden.fill(f32::NAN);
        }
    }

    fn head(&mut self, hidden: &[f32], logits: &mut [f32]) {
        if !self.run(|inner| inner.head(hidden, logits)) {
            logits.fill(f32::NAN);
        }
    }

    fn argmax(&mut self, hidden: &[f32]) -> Option<(TokenId, f32)> {
        let mut argmax = None;
        self.run(|inner| argmax = inner.argmax(hidden));
        argmax
    }

    fn compact(&mut self, moves: &[RowMove]) {
        self.run(|inner| inner.compact(moves));
    }
}

fn engine_with(bundles: &Bundles, fuse: &Fuse, lasts: bool) -> Engine {
    let mut config = EngineConfig::new(bundles.path.join("device")).chunks(ChunkPolicy::Fixed(16));
    config.cloud = CloudAddress::InProcess(Box::new(cloud_config(bundles)));
    let half = Bundle::open(&config.bundle).unwrap();
    let pages = pages_for(config.limits.kv_rows_max as usize + 64);
    let rows = config.limits.step_rows_max as usize;
    let inner = DeviceModel::load(backend(), &half, 1, rows, pages).unwrap();
    let model = Device { inner, fuse: fuse.clone(), lasts, arithmetic_id: 1, fault: None };
    Engine::serve(config, &half, Box::new(model)).unwrap()
}

/// A device whose backend had a fault forgets its own pages: the next prompt begins anew.
#[test]
fn a_device_forgets_its_pages_with_its_backend() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles);
    let plain = || request().draft(DraftMode::Off);
    let fuse = Arc::new(AtomicI64::new(-1));
    let engine = engine_with(&bundles, &fuse, false);
    assert_same(&whole, &collect(&engine, plain()));
    let computed = -1 - fuse.load(Ordering::Relaxed);
    // Chunks of 16 rows: five for the prompt, of which four are behind its two pages.
    assert_same(&whole, &collect(&engine, plain()));
    let again = -1 - fuse.load(Ordering::Relaxed) - computed;
    assert_eq!(again, computed - 4, "forward passes of the device");
    fuse.store(3, Ordering::Relaxed);
    first_error(&engine, plain());
    fuse.store(-1, Ordering::Relaxed);
    assert_same(&whole, &collect(&engine, plain()));
    let after = -1 - fuse.load(Ordering::Relaxed);
    // The cloud still has its pages; here one pass of up to 128 rows computes them again.
    assert_eq!(after, again + 1, "forward passes after the fault");
}

#[test]
fn a_device_without_its_backend_says_so() {
    let tail = Bundles::generated(1, 1);
    let plain = Bundles::generated(1, 0);
    for (bundles, tail) in [(&plain, 0), (&tail, 1)] {
        let whole = yardstick(bundles);
        for burns_at in [0, 2, 5, 9, 20] {
            let engine = engine_with(bundles, &Arc::new(AtomicI64::new(burns_at)), false);
            let error = first_error(&engine, request());
            let case = format!("call {burns_at}, {tail} tail layers: {error}");
            assert_eq!(error.kind(), ErrorKind::Resource, "{case}");
            assert!(error.to_string().contains("the test pulled the plug"), "{case}");
            assert_same(&whole, &collect(&engine, request()));
        }
    }
}

/// A fault that passes is no wrong draft: whichever computation it befalls, be it drafts alone, the
/// request ends with it.
#[test]
fn a_fault_that_passes_is_noticed_wherever_it_happens() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles);
    let fuse = Arc::new(AtomicI64::new(-1));
    let engine = engine_with(&bundles, &fuse, false);
    // What stood there before is drafted, and more of it while the drafts are away.
    let again = || Request::tokens(long_prompt(12).repeat(6)).max_tokens(40).ignore_eos();
    let mut burned = 0;
    for burns_at in 0..80 {
        fuse.store(burns_at, Ordering::Relaxed);
        let mut answer = engine.generate(again().draft(DraftMode::All)).unwrap();
        let error = answer.find_map(Result::err).map(|error| error.to_string());
        let has_burned = fuse.load(Ordering::Relaxed) < 0;
        let is_told = error.as_ref().is_some_and(|error| error.contains("pulled the plug"));
        assert_eq!(is_told, has_burned, "call {burns_at}: {error:?}");
        burned += u32::from(has_burned);
        fuse.store(-1, Ordering::Relaxed);
    }
    assert!(burned > 30, "{burned} calls failed");
    assert_same(&whole, &collect(&engine, request()));
}

/// A request that comes at the very moment at which the engine thread ends is not waited for.
#[test]
fn nobody_waits_for_an_engine_that_has_ended() {
    let bundles = Bundles::generated(1, 0);
    for _ in 0..12 {
        let engine = engine_with(&bundles, &Arc::new(AtomicI64::new(5)), true);
        assert_eq!(first_error(&engine, request()).kind(), ErrorKind::Resource);
        let begin = Instant::now();
        while engine.generate(request()).is_ok_and(|mut answer| answer.any(|event| event.is_ok())) {
            assert!(begin.elapsed() < PATIENCE, "it goes on without a backend");
        }
        while !engine.has_stopped() {
            assert!(begin.elapsed() < PATIENCE, "its thread goes on");
            if let Ok(mut answer) = engine.generate(request()) {
                assert!(answer.all(|event| event.is_err()), "it answers without a backend");
            }
        }
        assert_eq!(engine.generate(request()).err().unwrap().kind(), ErrorKind::Broken);
    }
}

/// As [`engine_with`], with a processor that falls back, asking a given cloud.
#[cfg(feature = "cuda")]
fn engine_else_cpu(bundles: &Bundles, cloud: &Cloud, fuse: &Fuse, lasts: bool) -> Engine {
    engine_of(device_config(bundles, cloud), fuse, lasts)
}

#[cfg(feature = "cuda")]
fn engine_of(mut config: EngineConfig, fuse: &Fuse, lasts: bool) -> Engine {
    config.processor = Processor::CudaElseCpu(0);
    config.threads = 1;
    config.limits.sessions_max = 1;
    let half = Bundle::open(&config.bundle).unwrap();
    let pages = pages_for(config.limits.kv_rows_max as usize + 64);
    let rows = config.limits.step_rows_max as usize;
    let inner = DeviceModel::load(backend(), &half, 1, rows, pages).unwrap();
    let model = Device { inner, fuse: fuse.clone(), lasts, arithmetic_id: 2, fault: None };
    Engine::serve(config, &half, Box::new(model)).unwrap()
}

/// A device that loses its GPU goes on with the CPU: what runs ends with the fault, what waits is
/// answered, no session is left in the cloud, and no page of the old rows is used.
#[cfg(feature = "cuda")]
#[test]
fn a_device_that_falls_back_serves_what_waits() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles);
    for burns_at in [0, 3, 5, 9, 20] {
        let cloud = Cloud::start(cloud_config(&bundles)).unwrap();
        let fuse = Arc::new(AtomicI64::new(-1));
        let engine = engine_else_cpu(&bundles, &cloud, &fuse, true);
        let plain = || request().draft(DraftMode::Off);
        assert_same(&whole, &collect(&engine, plain()));
        assert!(collect(&engine, plain()).timings.pages_reused > 0);
        assert_eq!(engine.describe(), "planted");
        fuse.store(burns_at, Ordering::Relaxed);
        let mut first = engine.generate(plain()).unwrap();
        let waiting: Vec<_> = (0..3).map(|_| engine.generate(plain()).unwrap()).collect();
        let error = first.find_map(Result::err).expect("it was computed by what is lost");
        assert_eq!(error.kind(), ErrorKind::Resource, "{error}");
        assert!(error.to_string().contains("the test pulled the plug"), "{error}");
        for (index, answer) in waiting.into_iter().enumerate() {
            let metrics = answer.map(|event| event.unwrap()).find_map(|event| match event {
                hat_engine::Event::Done { metrics, .. } => Some(metrics),
                _ => None,
            });
            let metrics = metrics.unwrap();
            assert_same(&whole, &metrics);
            let reused = metrics.timings.pages_reused;
            assert_eq!(reused > 0, index > 0, "answer {index} after the fault: {reused} pages");
        }
        assert!(engine.describe().starts_with("cpu"), "{}", engine.describe());
        assert!(!engine.has_stopped());
        // The last END is still on its way.
        let sessions = || cloud.counters().sessions.load(Ordering::Relaxed);
        eventually("no session is left in the cloud", || sessions() == 0);
        assert_eq!(engine.metrics().requests_failed, 1);
    }
}

/// HELLO names what a device's own layers compute in, also after another backend has taken over:
/// the link is made anew.
#[cfg(feature = "cuda")]
#[test]
fn a_device_that_falls_back_says_what_it_computes_in() {
    use hat_transport::conn::FrameSink;
    use hat_transport::endpoint::{Endpoint, EndpointConfig, Event};
    use hat_transport::message::{Message, Opened};

    let bundles = Bundles::generated(1, 0);
    let hello = crate::support::script::hello(&bundles);
    let listen = Some(([127, 0, 0, 1], 0).into());
    let link = hat_transport::link::open(hat_transport::link::LinkKind::Mio, listen).unwrap().link;
    let clock = Arc::new(hat_transport::clock::SystemClock);
    let mut cloud = Endpoint::new(link, clock, EndpointConfig::new(hello));
    let address = cloud.local_address().unwrap();
    let config = EngineConfig::new(bundles.path.join("device")).cloud(address.to_string());
    let engine = engine_of(config, &Arc::new(AtomicI64::new(0)), true);
    let answer = engine.generate(request()).unwrap();
    let (mut said, mut events, begin) = (Vec::new(), Vec::new(), Instant::now());
    while said.len() < 2 {
        assert!(begin.elapsed() < PATIENCE, "{said:?}");
        cloud.poll(Some(Duration::from_millis(20)), &mut events).unwrap();
        for event in events.drain(..) {
            match event {
                Event::Up { hello, .. } => said.push(hello.arithmetic_id),
                Event::Frame { connection, frame } => {
                    let opened = Message::Opened(Opened { pages: 0 });
                    let _ = cloud.send_message(connection, frame.session, &opened);
                }
                _ => {}
            }
        }
    }
    assert_eq!(said, [2, 1]);
    drop(answer);
}

/// A fault that passes leaves every processor in its place.
#[cfg(feature = "cuda")]
#[test]
fn a_fault_that_passes_changes_no_processor() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles);
    let cloud = Cloud::start(cloud_config(&bundles)).unwrap();
    let engine = engine_else_cpu(&bundles, &cloud, &Arc::new(AtomicI64::new(4)), false);
    assert_eq!(first_error(&engine, request()).kind(), ErrorKind::Resource);
    assert_same(&whole, &collect(&engine, request()));
    assert_eq!(engine.describe(), "planted");
}

/// A cloud that loses its GPU goes on with the CPU at its address, and its devices replay; not
/// those that want the other arithmetic.
#[cfg(feature = "cuda")]
#[test]
fn a_cloud_that_falls_back_is_replayed_to() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles);
    for arithmetic_id in [1, 2] {
        let planted = Planted { lasts: true, arithmetic_id, ..Planted::default() };
        let mut config = cloud_config(&bundles);
        config.processor = Processor::CudaElseCpu(0);
        let cloud = cloud(config, &planted);
        let engine = Engine::open(device_config(&bundles, &cloud)).unwrap();
        let mut strict = device_config(&bundles, &cloud);
        strict.cloud_arithmetic = Some(2);
        let strict = Engine::open(strict).unwrap();
        planted.fuse.store(14, Ordering::Relaxed);
        let split = collect(&engine, request());
        match arithmetic_id {
            1 => assert_same(&whole, &split),
            _ => assert_eq!(split.timings.arithmetic_ids, [2, 1]),
        }
        assert!(cloud.describe().starts_with("cpu"), "{}", cloud.describe());
        // Its counters go on.
        assert_eq!(cloud.counters().faults.load(Ordering::Relaxed), 1);
        assert!(cloud.counters().opened.load(Ordering::Relaxed) >= 2);
        assert_same(&whole, &collect(&engine, request()));
        let error = first_error(&strict, request());
        assert_eq!(error.kind(), ErrorKind::Peer);
        assert!(error.to_string().contains("arithmetic 1 there, 2 is wanted here"), "{error}");
    }
}

/// Stopping a cloud at the moment at which it begins anew leaves nobody behind.
#[cfg(feature = "cuda")]
#[test]
fn a_cloud_can_be_stopped_while_it_falls_back() {
    let bundles = Bundles::generated(1, 0);
    for pause_ms in [0, 40, 50, 55, 60, 65, 80] {
        let planted = Planted { lasts: true, ..Planted::default() };
        planted.fuse.store(0, Ordering::Relaxed);
        let mut config = cloud_config(&bundles);
        config.processor = Processor::CudaElseCpu(0);
        let cloud = cloud(config, &planted);
        let engine = Engine::open(device_config(&bundles, &cloud)).unwrap();
        let answer = engine.generate(request()).unwrap();
        while planted.fuse.load(Ordering::Relaxed) >= 0 {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(pause_ms));
        let begin = Instant::now();
        drop(cloud);
        assert!(begin.elapsed() < PATIENCE, "after {pause_ms} ms");
        drop(answer);
    }
}
