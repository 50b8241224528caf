//! Drafting changes nothing but speed: each mode, each sampler field, each link, split, tail, cut.
//!
//! The generated model repeats itself little, so most requests here leave it few words, and lookup
//! finds what it says again. A test that no draft helped would show nothing, and fails.

use std::sync::Arc;

use hat_compute::open as processor;
use hat_engine::options::{
    ChunkPolicy, CloudAddress, Codec, DraftMode, FinishReason, LinkKind, Processor, SamplerConfig,
    Timings,
};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Event, Metrics, Request};

use super::support::{Bundles, collect, collect_with, long_prompt};
use super::{assert_same, wide_or};

const TOKENS: u32 = 48;

/// A sampler that leaves `words` tokens; they are spread over the vocabulary.
pub(super) fn few(words: u32, sampler: SamplerConfig) -> SamplerConfig {
    let logit_bias = (0..words).map(|word| (30 + word * 17 % 400, 60.0)).collect();
    SamplerConfig { logit_bias, ..sampler }
}

pub(super) fn request(sampler: SamplerConfig) -> Request {
    Request::tokens(long_prompt(75)).sampler(sampler).max_tokens(TOKENS).ignore_eos().hash_logits()
}

/// Greedy and sampled; few words, more words, all words; then each sampler field.
pub(super) fn requests() -> Vec<Request> {
    let off = SamplerConfig::default;
    let sampled = |seed| SamplerConfig { temperature: 0.9, seed, ..off() };
    let greedy = [few(2, off()), few(5, off()), few(12, off()), off()];
    let seeded = [few(2, sampled(1)), few(5, sampled(2)), few(12, sampled(3)), sampled(4)];
    let fields = [
        SamplerConfig { top_k: 3, ..sampled(5) },
        SamplerConfig { top_p: 0.6, ..sampled(6) },
        SamplerConfig { min_p: 0.2, ..sampled(7) },
        SamplerConfig { repetition_penalty: 1.3, ..off() },
        SamplerConfig { presence_penalty: 0.7, penalty_last_n: 9, ..sampled(8) },
        SamplerConfig { frequency_penalty: 0.4, penalty_last_n: u32::MAX, ..sampled(9) },
        SamplerConfig { temperature: 2.5, ..sampled(10) },
    ];
    let fields = fields.map(|sampler| few(6, sampler));
    greedy.into_iter().chain(seeded).chain(fields).map(request).collect()
}

pub(super) fn whole(
    bundles: &Bundles,
    split_layer: u32,
    wire: Codec,
    requests: &[Request],
) -> Vec<Metrics> {
    let backend = processor::cpu(Processor::Auto, 1).unwrap();
    let mut whole =
        ReferenceRun::open(backend, &bundles.path, Some(split_layer), wire, 8192).unwrap();
    let mut answer = |request: &Request| *whole.generate(request.clone(), |_| {}).unwrap().1;
    requests.iter().map(&mut answer).collect()
}

/// Asks all of `requests` in `mode`, compares, and returns what was drafted and accepted in all.
fn assert_all(
    case: &str,
    engine: &Engine,
    mode: DraftMode,
    requests: &[Request],
    whole: &[Metrics],
) -> (u32, u32) {
    let (mut drafted, mut accepted) = (0, 0);
    for (index, (request, whole)) in requests.iter().zip(whole).enumerate() {
        let split = collect(engine, request.clone().draft(mode));
        assert_same(&format!("{case}, {}, request {index}", mode.name()), whole, &split);
        assert_counts(&split.timings);
        drafted += split.timings.draft_n;
        accepted += split.timings.draft_n_accepted;
    }
    (drafted, accepted)
}

/// What the figures say of each other.
fn assert_counts(timings: &Timings) {
    let Timings { predicted_n, rounds, draft_n, draft_n_tested, draft_n_accepted, .. } = *timings;
    assert!(draft_n_accepted <= draft_n_tested && draft_n_tested <= draft_n, "{timings:?}");
    // Every token but the first ends a wait, or was drafted and accepted.
    assert!(predicted_n <= 1 + rounds + draft_n_accepted, "{timings:?}");
    let by_drafter: u32 = timings.drafters.values().map(|counts| counts.accepted).sum();
    assert_eq!(by_drafter, draft_n_accepted);
}

#[test]
fn every_draft_mode_says_the_same() {
    let bundles = Bundles::generated(1, 0);
    let requests = requests();
    let whole = whole(&bundles, 1, Codec::default(), &requests);
    let config = EngineConfig::new(bundles.path.join("device")).link(LinkKind::Memory);
    let engine = Engine::open(config).unwrap();
    for mode in DraftMode::ALL {
        let (drafted, accepted) = assert_all("memory", &engine, mode, &requests, &whole);
        match mode {
            DraftMode::Off => assert_eq!(drafted, 0),
            DraftMode::Auto => {}
            _ => assert!(accepted > 40 && accepted < drafted, "{accepted} of {drafted}"),
        }
    }
}

#[test]
fn every_draft_mode_says_the_same_in_every_codec() {
    let bundles = Bundles::generated(1, 0);
    let requests = [&requests()[..3], &requests()[4..6]].concat();
    for wire in [Codec::F32, Codec::Int8, Codec::Int4] {
        let whole = whole(&bundles, 1, wire, &requests);
        let config = EngineConfig::new(bundles.path.join("device")).link(LinkKind::Memory);
        let config = config.wire(wire).chunks(ChunkPolicy::Auto);
        let engine = Engine::open(config).unwrap();
        for mode in DraftMode::ALL {
            assert_all(&format!("{wire:?}"), &engine, mode, &requests, &whole);
        }
    }
}

#[test]
fn drafts_over_every_link_split_and_tail_say_the_same() {
    let requests = [&requests()[..3], &requests()[4..7]].concat();
    for tail_layers in [0, 1] {
        let bundles = Bundles::generated(2, tail_layers);
        let wide = Bundles::generated(1, tail_layers);
        for (split_layer, wire) in [(1, Codec::default()), (2, Codec::F32)] {
            let holder = wide_or(&bundles, &wide, split_layer);
            let whole = whole(holder, split_layer, wire, &requests);
            for link in [LinkKind::Mio, LinkKind::IoUring] {
                let mut config = EngineConfig::new(bundles.path.join("device"))
                    .split_layer(split_layer)
                    .wire(wire)
                    .chunks(ChunkPolicy::Fixed(16))
                    .link(link);
                config.cloud = CloudAddress::InProcess(Box::new(
                    CloudConfig::new(wide.path.join("cloud")).link(link),
                ));
                let engine = Engine::open(config).unwrap();
                let case = format!("tail {tail_layers}, split {split_layer}, {wire:?}, {link}");
                for mode in [DraftMode::Lookup, DraftMode::All] {
                    let counts = assert_all(&case, &engine, mode, &requests, &whole);
                    assert!(counts.1 > 20, "{case}: {counts:?}");
                }
            }
        }
    }
}

/// Trees are cut to what the smaller side takes, down to no drafts at all.
#[test]
fn small_row_budgets_say_the_same() {
    let bundles = Bundles::generated(1, 0);
    let requests = &requests()[..2];
    let whole = whole(&bundles, 1, Codec::default(), requests);
    for (device_rows, cloud_rows, drafts) in [(3, 512, true), (512, 2, true), (512, 1, false)] {
        let mut config = EngineConfig::new(bundles.path.join("device"));
        config.limits.step_rows_max = device_rows;
        if let CloudAddress::InProcess(cloud) = &mut config.cloud {
            cloud.limits.step_rows_max = cloud_rows;
        }
        let engine = Engine::open(config).unwrap();
        let case = format!("{device_rows} and {cloud_rows} rows");
        let counts = assert_all(&case, &engine, DraftMode::Tree, requests, &whole);
        assert_eq!(counts.0 > 0, drafts, "{case}");
    }
}

/// The cloud dies with a tree in its hands, again and again: the text goes on.
#[test]
fn a_cloud_that_restarts_in_a_round_does_not_matter() {
    let bundles = Bundles::generated(1, 0);
    let requests = &requests()[..3];
    let whole = whole(&bundles, 1, Codec::default(), requests);
    for mode in [DraftMode::Lookup, DraftMode::All] {
        let config = || CloudConfig::new(bundles.path.join("cloud"));
        let mut cloud = Some(Cloud::start(config()).unwrap());
        let address = cloud.as_ref().unwrap().address();
        let device = EngineConfig::new(bundles.path.join("device")).cloud(address.to_string());
        let engine = Engine::open(device).unwrap();
        for (request, whole) in requests.iter().zip(&whole) {
            let mut tokens = 0;
            let metrics = collect_with(&engine, request.clone().draft(mode), |_| {
                tokens += 1;
                if [2, 9, 30].contains(&tokens) {
                    drop(cloud.take());
                    cloud = Some(Cloud::start(config().listen(address)).unwrap());
                }
            });
            assert_same(&format!("restarts, {}", mode.name()), whole, &metrics);
        }
    }
}

/// Several devices on one cloud, each in its own mode, all requests at once.
#[test]
fn drafting_batch_mates_do_not_matter() {
    let bundles = Bundles::generated(1, 0);
    let requests = requests();
    let whole = whole(&bundles, 1, Codec::default(), &requests);
    let cloud = Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap();
    let modes = [DraftMode::Off, DraftMode::Lookup, DraftMode::Tree, DraftMode::All];
    let engines = modes.map(|mode| {
        let config = EngineConfig::new(bundles.path.join("device"));
        (mode, Arc::new(Engine::open(config.cloud(cloud.address().to_string())).unwrap()))
    });
    std::thread::scope(|scope| {
        for (mode, engine) in &engines {
            for (index, (request, whole)) in requests.iter().zip(&whole).take(4).enumerate() {
                scope.spawn(move || {
                    let split = collect(engine, request.clone().draft(*mode));
                    assert_same(&format!("{}, request {index}", mode.name()), whole, &split);
                });
            }
        }
    });
}

/// The end of an answer, as an engine or the yardstick reports it.
fn end_of(events: impl Iterator<Item = Event>) -> (String, FinishReason, Vec<u32>) {
    let mut text = String::new();
    for event in events {
        match event {
            Event::Token { text: part, .. } => text.push_str(&part),
            Event::Done { text: part, finish_reason, metrics } => {
                return (text + &part, finish_reason, metrics.token_ids);
            }
            _ => {}
        }
    }
    panic!("the answer ended without a last event")
}

/// Stop strings, the end of sequence and `max_tokens` cut inside an accepted path as elsewhere.
#[test]
fn answers_are_cut_inside_accepted_paths() {
    let bundles = Bundles::generated(1, 0);
    let backend = processor::cpu(Processor::Auto, 1).unwrap();
    let mut whole =
        ReferenceRun::open(backend, &bundles.path, None, Codec::default(), 8192).unwrap();
    let engine = Engine::open(EngineConfig::new(bundles.path.join("device"))).unwrap();
    let base = request(few(3, SamplerConfig::default()));
    let text = whole.generate(base.clone(), |_| {}).unwrap().1.text;
    let words: Vec<char> = text.chars().collect();
    let mut cases: Vec<Request> = (1..=20).map(|tokens| base.clone().max_tokens(tokens)).collect();
    for start in (0..words.len().saturating_sub(4)).step_by(3) {
        cases.push(base.clone().stop(words[start..start + 4].iter().collect::<String>()));
    }
    // The end of sequence, now and then, among few words.
    for seed in 0..8 {
        let mut sampler = few(3, SamplerConfig { temperature: 1.0, seed, ..Default::default() });
        sampler.logit_bias.push((2, 58.0));
        let mut request = request(sampler);
        request.ignore_eos = false;
        cases.push(request);
    }
    let (mut stopped, mut accepted) = (0, 0);
    for (index, case) in cases.into_iter().enumerate() {
        let mut events = Vec::new();
        whole.generate(case.clone(), |event| events.push(event.clone())).unwrap();
        let expected = end_of(events.into_iter());
        let generation = engine.generate(case.draft(DraftMode::Tree)).unwrap();
        let events = generation.map(Result::unwrap).inspect(|event| {
            if let Event::Done { metrics, .. } = event {
                accepted += metrics.timings.draft_n_accepted;
            }
        });
        let got = end_of(events);
        assert_eq!(got, expected, "case {index}");
        stopped += u32::from(got.1 == FinishReason::Stop);
    }
    assert!(stopped > 5 && accepted > 50, "{stopped} stopped, {accepted} accepted");
}
