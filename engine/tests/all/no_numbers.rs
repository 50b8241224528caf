//! Rows that are no numbers, in the device's layers and in the cloud's: the request that they are
//! of ends, and nobody else's, whoever shares its steps or comes after it.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use crate::support::{Bundles, collect, long_prompt};
use hat_compute::backend::cpu::CpuBackend;
use hat_compute::open;
use hat_compute::{DeviceModel, MiddleModel};
use hat_core::page::pages_for;
use hat_engine::options::{Codec, ErrorKind, Processor};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::testkit::pool_pages;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Error, Metrics, Request};
use hat_loader::{Bundle, DType, Submodel};
use hat_plan::{AttendBatch, Computes, DeviceForward, MiddleForward, MiddleStep, RowMove, TokenId};

/// The token whose rows go wrong.
const BAD: TokenId = 251;
/// The first number of its rows on the way to the cloud.
const MARK: f32 = 12_345.5;
/// Requests whose rows are right, beside each that goes wrong.
const GOOD: usize = 3;

fn backend() -> CpuBackend {
    open::cpu(Processor::Auto, 1).unwrap()
}

/// Place at which the rows of [`BAD`] go wrong.
#[derive(Clone, Copy, PartialEq)]
enum Where {
    Input,
    Head,
    Cloud,
}

/// A device whose rows of [`BAD`] go wrong, or are marked for the cloud.
struct Device {
    inner: DeviceModel<CpuBackend>,
    at: Where,
}

impl Computes for Device {
    fn describe(&self) -> String {
        "planted".into()
    }
}

impl DeviceForward for Device {
    fn input(&mut self, plan: &AttendBatch<'_>, tokens: &[TokenId], hidden: &mut [f32]) {
        self.inner.input(plan, tokens, hidden);
        let width = hidden.len() / tokens.len();
        for (row, _) in tokens.iter().enumerate().filter(|(_, token)| **token == BAD) {
            match self.at {
                Where::Input => hidden[row * width + 3] = f32::NAN,
                _ => hidden[row * width] = MARK,
            }
        }
    }

    fn tail(&mut self, plan: &AttendBatch<'_>, hidden: &mut [f32]) {
        self.inner.tail(plan, hidden);
    }

    fn head(&mut self, hidden: &[f32], logits: &mut [f32]) {
        self.inner.head(hidden, logits);
        if hidden[0] == MARK {
            logits[7] = f32::NAN;
        }
    }

    fn argmax(&mut self, hidden: &[f32]) -> Option<(TokenId, f32)> {
        if hidden[0] == MARK { None } else { self.inner.argmax(hidden) }
    }

    fn compact(&mut self, moves: &[RowMove]) {
        self.inner.compact(moves);
    }
}

/// A cloud's layers that make a marked row no number, or hand it on as it came.
struct Middle {
    inner: MiddleModel<CpuBackend>,
    at: Where,
    /// Rows go wrong as long as this is set.
    is_broken: Arc<AtomicBool>,
}

impl Computes for Middle {
    fn describe(&self) -> String {
        "planted".into()
    }
}

impl MiddleForward for Middle {
    fn forward(&mut self, step: &mut MiddleStep) {
        let rows = step.plan.rows();
        let width = step.hidden.len() / rows.max(1);
        let marked: Vec<usize> = (0..rows).filter(|row| step.hidden[row * width] == MARK).collect();
        if self.at == Where::Cloud && self.is_broken.load(Ordering::SeqCst) {
            // In front of the layers, so that keys and values are no numbers either.
            marked.iter().for_each(|row| step.hidden[row * width + 1] = f32::NAN);
        }
        self.inner.forward(step);
        if self.at == Where::Head {
            marked.iter().for_each(|row| step.hidden[row * width] = MARK);
        }
    }
}

struct Planted {
    engine: Arc<Engine>,
    cloud: Cloud,
    is_broken: Arc<AtomicBool>,
}

fn planted(bundles: &Bundles, at: Where) -> Planted {
    let is_broken = Arc::new(AtomicBool::new(true));
    let config = CloudConfig::new(bundles.path.join("cloud"));
    let half = Bundle::open(&config.bundle).unwrap();
    let (pages, rows) = (pool_pages(&config), config.limits.step_rows_max as usize);
    let layers = half.split().layers(Submodel::Middle);
    let inner = MiddleModel::load(backend(), &half, layers, rows, pages as usize).unwrap();
    let middle = Middle { inner, at, is_broken: is_broken.clone() };
    let cloud = Cloud::serve(config, &half, Box::new(middle), pages).unwrap();

    let mut config = EngineConfig::new(bundles.path.join("device"));
    config = config.cloud(cloud.address().to_string());
    config.wire = Some(Codec::F32);
    let half = Bundle::open(&config.bundle).unwrap();
    let pages = pages_for(config.limits.kv_rows_max as usize + 64);
    let rows = config.limits.step_rows_max as usize;
    let inner = DeviceModel::load(backend(), &half, 1, rows, pages).unwrap();
    let engine = Engine::serve(config, &half, Box::new(Device { inner, at })).unwrap();
    Planted { engine: Arc::new(engine), cloud, is_broken }
}

/// An answer to a prompt without [`BAD`].
fn good(number: usize) -> Request {
    let length = 40 + u32::try_from(number).unwrap();
    let request = Request::tokens(long_prompt(length)).max_tokens(24).ignore_eos();
    if number.is_multiple_of(2) { request.hash_logits() } else { request }
}

/// A prompt whose rows go wrong in its second page.
fn bad(number: usize) -> Request {
    let mut prompt = long_prompt(70);
    prompt.push(BAD);
    let request = Request::tokens(prompt).max_tokens(24).ignore_eos();
    if number.is_multiple_of(2) { request.hash_logits() } else { request }
}

fn whole(bundles: &Bundles, number: usize) -> Metrics {
    let mut whole = ReferenceRun::open(backend(), &bundles.path, None, Codec::F32, 8192).unwrap();
    *whole.generate(good(number), |_| {}).unwrap().1
}

fn assert_same(found: &Metrics, whole: &Metrics) {
    assert_eq!(found.token_ids, whole.token_ids);
    assert_eq!(found.logits_blake3, whole.logits_blake3);
}

fn error_of(engine: &Engine, request: Request) -> Error {
    engine.generate(request).unwrap().find_map(Result::err).expect("an error")
}

#[test]
fn rows_that_are_no_numbers_end_their_own_request_alone() {
    let bundles = Bundles::generated(1, 0);
    let wholes: Vec<Metrics> = (0..GOOD).map(|number| whole(&bundles, number)).collect();
    for at in [Where::Input, Where::Head, Where::Cloud] {
        let planted = planted(&bundles, at);
        for round in 0..3 {
            let begin = Barrier::new(GOOD + 1);
            std::thread::scope(|scope| {
                for (number, whole) in wholes.iter().enumerate() {
                    let (engine, begin) = (&planted.engine, &begin);
                    scope.spawn(move || {
                        begin.wait();
                        assert_same(&collect(engine, good(number)), whole);
                    });
                }
                begin.wait();
                let error = error_of(&planted.engine, bad(round));
                let (kind, text) = (error.kind(), error.to_string());
                assert!(text.contains("not finite"), "{text}");
                let expected = if at == Where::Cloud { ErrorKind::Peer } else { ErrorKind::Broken };
                assert_eq!(kind, expected, "{text}");
            });
        }
        let metrics = planted.engine.metrics();
        assert_eq!((metrics.requests_failed, metrics.requests_done), (3, 3 * GOOD as u64));
        assert!(!planted.engine.has_stopped() && !planted.cloud.has_stopped());
    }
}

/// Once the cloud computes right again, the same prompt is answered: what it computed wrong is not
/// found by its pages' names.
#[test]
fn pages_of_rows_that_are_no_numbers_are_not_found_again() {
    // Quantised layers take a row that is no number for zeros; these hand it on to all rows behind.
    let bundles = Bundles::of_dtype(DType::F32);
    let planted = planted(&bundles, Where::Cloud);
    // The bad row in the first page, so that it is named and full.
    let mut prompt = long_prompt(100);
    prompt[5] = BAD;
    let request = || Request::tokens(prompt.clone()).max_tokens(4).ignore_eos();
    for _ in 0..2 {
        assert_eq!(error_of(&planted.engine, request()).kind(), ErrorKind::Peer);
    }
    planted.is_broken.store(false, Ordering::SeqCst);
    assert_eq!(collect(&planted.engine, request()).token_ids.len(), 4);
}
