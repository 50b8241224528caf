//! The contract above all others: the split engine says what the whole model says, to the bit.
//!
//! Every case compares token ids and the hash of each emitted position's logits with
//! `internal::Whole`, which runs the whole model one row at a time over contiguous KV and shares
//! nothing with the split engine but kernels. The model is generated; its text has more than 30
//! distinct tokens, so agreement is no accident.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "lossless/cut.rs"]
mod cut;
#[path = "lossless/drafts.rs"]
mod drafts;
#[path = "lossless/prefix.rs"]
mod prefix;
#[path = "lossless/slow.rs"]
mod slow;
mod support;
#[path = "lossless/trained.rs"]
mod trained;

use std::collections::HashSet;
use std::sync::Arc;

use hat_compute::backend::cpu::Op;
use hat_compute::open as processor;
use hat_compute::{DeviceModel, MiddleModel};
use hat_core::page::pages_for;
use hat_engine::options::{ChunkPolicy, CloudAddress, Codec, LinkKind, Processor, SamplerConfig};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::testkit::pool_pages;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Metrics, Request};
use support::{Bundles, collect, long_prompt};

/// How the yardstick is asked, and so the engine.
fn requests() -> Vec<Request> {
    let sampled = |seed| SamplerConfig { temperature: 0.8, seed, ..SamplerConfig::default() };
    let filtered = SamplerConfig {
        top_k: 40,
        top_p: 0.95,
        min_p: 0.02,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        logit_bias: vec![(7, 1.5)],
        ..sampled(11)
    };
    let with = |sampler| Request::tokens(long_prompt(75)).sampler(sampler);
    [with(SamplerConfig::default()), with(sampled(3)), with(filtered)]
        .map(|request| request.max_tokens(48).ignore_eos().hash_logits())
        .into()
}

/// What the whole model says to each of [`requests`].
fn yardstick(bundles: &Bundles, split_layer: u32, wire: Codec) -> Vec<Metrics> {
    let backend = processor::cpu(Processor::Auto, 1).unwrap();
    let path = &bundles.path;
    let mut whole = ReferenceRun::open(backend, path, Some(split_layer), wire, 8192).unwrap();
    requests().into_iter().map(|request| *whole.generate(request, |_| {}).unwrap().1).collect()
}

fn assert_same(case: &str, whole: &Metrics, split: &Metrics) {
    assert_eq!(split.token_ids, whole.token_ids, "{case}: token ids");
    assert_eq!(split.logits_blake3, whole.logits_blake3, "{case}: logits");
    assert!(whole.logits_blake3.is_some(), "{case}: nothing was hashed");
}

fn assert_answers(case: &str, engine: &Engine, whole: &[Metrics]) {
    for (index, (request, whole)) in requests().into_iter().zip(whole).enumerate() {
        let case = format!("{case}, request {index}");
        assert_same(&case, whole, &collect(engine, request.clone()));
        if index == 0 {
            // Greedy, and nobody asked for logits: the head gives the greatest alone.
            let mut plain = request;
            plain.hash_logits = false;
            assert_eq!(collect(engine, plain).token_ids, whole.token_ids, "{case}: greatest");
        }
    }
}

#[test]
fn the_text_has_many_distinct_tokens() {
    let bundles = Bundles::generated(1, 0);
    for answer in yardstick(&bundles, 1, Codec::default()) {
        let distinct: HashSet<_> = answer.token_ids.iter().collect();
        assert!(distinct.len() >= 30, "{} distinct of {:?}", distinct.len(), answer.token_ids);
    }
}

#[test]
fn every_split_chunk_size_and_link_says_the_same() {
    for tail_layers in [0, 1] {
        let bundles = Bundles::generated(2, tail_layers);
        for split_layer in [1, 2] {
            // The cloud half of the bundle begins at layer 2; split 1 needs the wider one.
            let wide = Bundles::generated(1, tail_layers);
            for wire in [Codec::default(), Codec::F32] {
                let whole = yardstick(wide_or(&bundles, &wide, split_layer), split_layer, wire);
                for (link, chunks) in [
                    (LinkKind::Mio, ChunkPolicy::Fixed(1)),
                    (LinkKind::IoUring, ChunkPolicy::Fixed(7)),
                    (LinkKind::Mio, ChunkPolicy::Fixed(32)),
                    (LinkKind::IoUring, ChunkPolicy::Off),
                ] {
                    let mut config = EngineConfig::new(bundles.path.join("device"))
                        .split_layer(split_layer)
                        .wire(wire)
                        .chunks(chunks)
                        .link(link);
                    config.cloud = CloudAddress::InProcess(Box::new(
                        CloudConfig::new(wide.path.join("cloud")).link(link),
                    ));
                    let engine = Engine::open(config).unwrap();
                    let case = format!(
                        "tail {tail_layers}, split {split_layer}, {wire:?}, {link}, {chunks:?}"
                    );
                    assert_answers(&case, &engine, &whole);
                }
            }
        }
    }
}

/// Each codec is another model, so to speak, and each is said the same by both: in chunks of any
/// policy, with and without tail layers (which make all rows cross twice), drafted or not.
#[test]
fn every_codec_and_chunk_policy_says_the_same() {
    let mut hashes = HashSet::new();
    for tail_layers in [0, 1] {
        let bundles = Bundles::generated(1, tail_layers);
        for wire in Codec::ALL {
            let whole = yardstick(&bundles, 1, wire);
            hashes.insert(whole[0].logits_blake3.clone());
            for (link, chunks) in [
                (LinkKind::Memory, ChunkPolicy::Fixed(20)),
                (LinkKind::Mio, ChunkPolicy::Auto),
                (LinkKind::IoUring, ChunkPolicy::Paper),
            ] {
                let config = EngineConfig::new(bundles.path.join("device"));
                let config = config.wire(wire).chunks(chunks).link(link);
                let engine = Engine::open(config).unwrap();
                let case = format!("tail {tail_layers}, {wire:?}, {link}, {chunks:?}");
                // The second time the planner knows link and cloud.
                assert_answers(&case, &engine, &whole);
                assert_answers(&case, &engine, &whole);
            }
        }
    }
    // Rows as f32 cross without a trace, so tail layers change nothing there alone.
    assert_eq!(hashes.len(), 7, "codecs and tails that can't be told apart test nothing");
}

/// A prompt is planned by what earlier prompts taught, and the plan is what is sent.
#[test]
fn prompts_are_planned_once_something_is_known() {
    let bundles = Bundles::generated(1, 0);
    let config = EngineConfig::new(bundles.path.join("device")).chunks(ChunkPolicy::Auto);
    let engine = Engine::open(config.prefix(false)).unwrap();
    let ask = |rows| {
        let request = Request::tokens(long_prompt(rows)).max_tokens(2).ignore_eos();
        collect(&engine, request).timings
    };
    assert!(engine.metrics().estimates.chunk.is_none());
    for _ in 0..4 {
        ask(1500);
    }
    let estimates = engine.metrics().estimates;
    let costs = estimates.chunk.expect("four prompts of 1,500 rows were timed");
    // Over loopback a frame may be there at once, and then the link costs nothing.
    assert!(costs.device.per_row > 0.0 && costs.row_up_s >= 0.0 && costs.cloud.per_row > 0.0);
    assert!(estimates.rtt_s.is_some(), "{estimates:?}");
    let timings = ask(1500);
    assert_eq!(timings.chunks.iter().sum::<u32>(), 1500);
    assert_eq!(timings.chunks_planned.iter().sum::<u32>(), 1500);
    assert_eq!(timings.chunks.first(), timings.chunks_planned.first());
    assert!(timings.ttft_predicted_ms > 0.0);
}

/// The pair of halves that holds all layers for a split at `split_layer`.
fn wide_or<'a>(bundles: &'a Bundles, wide: &'a Bundles, split_layer: u32) -> &'a Bundles {
    if split_layer == 1 { wide } else { bundles }
}

#[test]
fn the_memory_link_says_the_same() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles, 1, Codec::default());
    let config = EngineConfig::new(bundles.path.join("device")).link(LinkKind::Memory);
    assert_answers("memory", &Engine::open(config).unwrap(), &whole);
}

#[test]
fn kernels_and_threads_say_the_same() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles, 1, Codec::default());
    for (processor, threads) in
        [(Processor::Portable, 1), (Processor::Auto, 2), (Processor::Auto, 3)]
    {
        let mut config = EngineConfig::new(bundles.path.join("device"));
        config.processor = processor;
        if let CloudAddress::InProcess(cloud) = &mut config.cloud {
            cloud.processor = processor;
        }
        let engine = Engine::open(config.threads(threads)).unwrap();
        assert_answers(&format!("{processor:?}, {threads} threads"), &engine, &whole);
    }
}

#[test]
fn every_weight_type_says_the_same() {
    for dtype in support::dtypes() {
        let bundles = Bundles::of_dtype(dtype);
        let whole = yardstick(&bundles, 1, Codec::default());
        let engine = Engine::open(EngineConfig::new(bundles.path.join("device"))).unwrap();
        assert_answers(dtype.name(), &engine, &whole);
    }
}

/// One cloud, devices with different splits, all their requests at once; its layers as one run,
/// and as the stages of a pipeline, one of which begins after every device's entry layer.
#[test]
fn batch_mates_and_stages_do_not_matter() {
    for stages in [1, 2, 3] {
        batch_mates_do_not_matter(stages);
    }
}

fn batch_mates_do_not_matter(stages: usize) {
    let wide = Bundles::generated(1, 0);
    let narrow = Bundles::generated(2, 0);
    let config = CloudConfig::new(wide.path.join("cloud")).stages(stages);
    let cloud = Cloud::start(config).unwrap();
    let device = |split_layer, chunks| {
        let config = EngineConfig::new(narrow.path.join("device"))
            .cloud(cloud.address().to_string())
            .split_layer(split_layer)
            .chunks(ChunkPolicy::Fixed(chunks));
        Arc::new(Engine::open(config).unwrap())
    };
    let engines = [(1, device(1, 16)), (2, device(2, 5)), (1, device(1, 64))];
    let whole =
        [(1, yardstick(&wide, 1, Codec::default())), (2, yardstick(&narrow, 2, Codec::default()))];
    std::thread::scope(|scope| {
        for (split_layer, engine) in &engines {
            let (_, whole) = whole.iter().find(|(split, _)| split == split_layer).unwrap();
            for (index, request) in requests().into_iter().enumerate() {
                let expected = &whole[index];
                scope.spawn(move || {
                    let case = format!("{stages} stages, split {split_layer}, request {index}");
                    assert_same(&case, expected, &collect(engine, request));
                });
            }
        }
    });
    let steps = cloud.counters().steps.load(std::sync::atomic::Ordering::Relaxed);
    let rows = cloud.counters().rows.load(std::sync::atomic::Ordering::Relaxed);
    assert!(rows > steps, "{rows} rows in {steps} steps: nothing was ever batched");
}

/// The cloud dies in the middle of an answer and comes back empty: the device replays.
#[test]
fn a_cloud_that_restarts_does_not_matter() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles, 1, Codec::default());
    for link in [LinkKind::Mio, LinkKind::IoUring] {
        let config = || CloudConfig::new(bundles.path.join("cloud")).link(link);
        let mut cloud = Some(Cloud::start(config()).unwrap());
        let address = cloud.as_ref().unwrap().address();
        let engine = Engine::open(
            EngineConfig::new(bundles.path.join("device"))
                .cloud(address.to_string())
                .link(link)
                .chunks(ChunkPolicy::Fixed(16)),
        )
        .unwrap();
        for (request, whole) in requests().into_iter().zip(&whole) {
            let mut tokens = 0;
            let metrics = support::collect_with(&engine, request, |_| {
                tokens += 1;
                if tokens == 9 {
                    drop(cloud.take());
                    cloud = Some(Cloud::start(config().listen(address)).unwrap());
                }
            });
            assert_same(&format!("restart over {link}"), whole, &metrics);
        }
    }
}

/// One ulp in one output of one kernel, on either side, must be seen.
#[test]
fn one_planted_ulp_is_seen() {
    let bundles = Bundles::generated(1, 0);
    let whole = yardstick(&bundles, 1, Codec::F32);
    for op in [Op::Linear, Op::RmsNorm, Op::Attend, Op::SiluMul, Op::RopeAppend] {
        for on_device in [true, false] {
            let (engine, _cloud) = engine_with_fault(&bundles, op, on_device);
            let differs = requests().into_iter().zip(&whole).any(|(request, whole)| {
                collect(&engine, request).logits_blake3 != whole.logits_blake3
            });
            assert!(differs, "an ulp in {op:?} (on the device: {on_device}) went unseen");
        }
    }
}

fn engine_with_fault(bundles: &Bundles, op: Op, on_device: bool) -> (Engine, Cloud) {
    let mut backends = [(); 2].map(|()| processor::cpu(Processor::Auto, 1).unwrap());
    backends[usize::from(!on_device)].plant_ulp(op, 3, true);
    let [device_backend, cloud_backend] = backends;

    let cloud_config = CloudConfig::new(bundles.path.join("cloud"));
    let cloud_half = hat_loader::Bundle::open(&cloud_config.bundle).unwrap();
    let pages = pool_pages(&cloud_config);
    let rows = cloud_config.limits.step_rows_max as usize;
    let layers = cloud_half.split().layers(hat_loader::Submodel::Middle);
    let middle =
        MiddleModel::load(cloud_backend, &cloud_half, layers, rows, pages as usize).unwrap();
    let cloud = Cloud::serve(cloud_config, &cloud_half, Box::new(middle), pages).unwrap();

    let config = EngineConfig::new(bundles.path.join("device"))
        .wire(Codec::F32)
        .cloud(cloud.address().to_string());
    let device_half = hat_loader::Bundle::open(&config.bundle).unwrap();
    let pages = pages_for(config.limits.kv_rows_max as usize + 64);
    let model = DeviceModel::load(device_backend, &device_half, 1, rows, pages).unwrap();
    (Engine::serve(config, &device_half, Box::new(model)).unwrap(), cloud)
}
