//! A cloud whose rows are slow cuts chunks over several steps, beside answers and alone.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hat_compute::open as processor;
use hat_engine::options::{ChunkPolicy, Codec, Processor};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Metrics, Request};
use hat_transport::endpoint::Event;
use hat_transport::message::{Computed, Message, RowsHead, Want};

use super::support::hand::{HIDDEN, Hand, chain};
use super::support::{Bundles, collect, long_prompt, steps};
use super::{assert_same, requests};

/// A row of a step takes so long: a chunk that ran whole would take seconds.
const ROW: Duration = Duration::from_millis(3);

/// Rows of the steps that ran.
type Ran = Arc<Mutex<Vec<usize>>>;

fn slow_cloud(bundles: &Bundles) -> (Cloud, Ran) {
    let ran = Ran::default();
    let seen = ran.clone();
    let cloud = steps::cloud_of_rows(CloudConfig::new(bundles.path.join("cloud")), move |rows| {
        std::thread::sleep(ROW * u32::try_from(rows).unwrap());
        seen.lock().unwrap().push(rows);
    });
    (cloud, ran)
}

fn whole(bundles: &Bundles, request: &Request) -> Metrics {
    let backend = processor::cpu(Processor::Auto, 1).unwrap();
    let mut whole =
        ReferenceRun::open(backend, &bundles.path, Some(1), Codec::default(), 8192).unwrap();
    *whole.generate(request.clone(), |_| {}).unwrap().1
}

#[test]
fn chunks_cut_over_steps_beside_answers_say_the_same() {
    for tail_layers in [0, 1] {
        let bundles = Bundles::generated(1, tail_layers);
        let (cloud, ran) = slow_cloud(&bundles);
        let device = |rows| {
            let config = EngineConfig::new(bundles.path.join("device")).prefix(false);
            let config = config.cloud(cloud.address().to_string());
            Engine::open(config.chunks(ChunkPolicy::Fixed(rows))).unwrap()
        };
        let (prompts, answers) = (device(512), device(64));
        let long = Request::tokens(long_prompt(600)).max_tokens(12).ignore_eos().hash_logits();
        let short = requests();
        let expected: Vec<Metrics> = short.iter().map(|one| whole(&bundles, one)).collect();
        let expected_long = whole(&bundles, &long);
        // From here on the cloud knows what a row takes.
        collect(&answers, Request::tokens(long_prompt(20)).max_tokens(4).ignore_eos());
        ran.lock().unwrap().clear();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (request, expected) in short.iter().zip(&expected) {
                let (answers, ended) = (&answers, &ended);
                scope.spawn(move || {
                    while !ended.load(Ordering::SeqCst) {
                        let split = collect(answers, request.clone());
                        assert_same("beside a long prompt", expected, &split);
                    }
                });
            }
            assert_same("the long prompt", &expected_long, &collect(&prompts, long));
            ended.store(true, Ordering::SeqCst);
        });
        let longest = *ran.lock().unwrap().iter().max().unwrap();
        assert!(longest < 256, "{tail_layers} tail layers: a step of {longest} rows");
    }
}

/// However many steps a chunk takes, its device hears of it once, when all of it has run, and of
/// all that it took.
#[test]
fn a_chunk_that_was_cut_is_answered_once() {
    let bundles = Bundles::generated(1, 0);
    let (cloud, ran) = slow_cloud(&bundles);
    let mut hand = Hand::connect(&bundles, &cloud);
    hand.open(1, |open| open.rows_max = 400);
    hand.opened(1);
    let rows = |count: u16| vec![0; usize::from(count) * HIDDEN * 4];
    hand.rows(1, &chain(1, 8, 0), &[], &rows(8));
    hand.outputs(1, 1);
    ran.lock().unwrap().clear();
    let silent =
        |first_id, more| RowsHead { more, want: Want::None, ..chain(first_id, 90, first_id - 1) };
    for (first_id, more) in [(9, true), (99, true), (189, false)] {
        hand.rows(1, &silent(first_id, more), &[], &rows(90));
    }
    hand.rows(1, &chain(279, 60, 278), &[], &rows(60));
    let mut computed: Vec<Computed> = vec![];
    let mut outputs = vec![];
    hand.until(|event| {
        let Event::Frame { frame, .. } = event else { return None };
        match Message::decode(frame.kind, &frame.body) {
            Ok(Message::Computed(one)) => computed.push(one),
            Ok(Message::Output(output)) => outputs.extend(output.ids.iter()),
            other => panic!("{other:?}"),
        }
        (!outputs.is_empty()).then_some(())
    });
    let [one] = computed[..] else { panic!("{computed:?}") };
    assert_eq!((one.first_id, one.count, one.step_rows), (9, 270, 270));
    assert_eq!(outputs, [338]);
    let ran = ran.lock().unwrap();
    assert_eq!(ran.iter().sum::<usize>(), 330);
    assert!(ran.len() > 2, "{ran:?}");
    let slept_us = u64::try_from((ROW * 270).as_micros()).unwrap();
    assert!(u64::from(one.step_us) >= slept_us, "{one:?}");
}
