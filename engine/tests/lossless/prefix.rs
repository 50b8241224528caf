//! Rows that a cloud holds from earlier sessions are not sent again, and nothing changes: each
//! codec, cut and way of drafting, with all pages there, some, or none; between devices; when
//! pages are wanted elsewhere; when a session is lost.

use std::sync::atomic::Ordering;

use hat_engine::options::{ChunkPolicy, CloudAddress, Codec, DraftMode, LinkKind, SamplerConfig};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Metrics, Request};
use hat_loader::DrafterArchitecture;

use super::drafts::{few, whole};
use super::support::drafter::add_noise;
use super::support::proxy::Proxy;
use super::support::{Bundles, collect, collect_with, eventually, long_prompt};
use super::{assert_same, support};

/// Rows of a page.
const PAGE: usize = 32;

fn ask(prompt: &[u32], sampler: SamplerConfig) -> Request {
    let request = Request::tokens(prompt.to_vec()).sampler(few(5, sampler));
    request.max_tokens(40).ignore_eos().hash_logits()
}

/// A prompt, the same again, one that leaves it in the middle of a page, one that leaves it right
/// behind a page, one that has one row more than pages, one that goes on behind the answer, and one
/// that differs at once, twice; each with the pages that should be there when they are asked in
/// this order.
fn conversation(bundles: &Bundles, wire: Codec) -> (Vec<Request>, Vec<Metrics>, Vec<u32>) {
    let base = long_prompt(210);
    let off = SamplerConfig::default;
    let first = ask(&base, off());
    let answer = whole(bundles, 1, wire, std::slice::from_ref(&first)).remove(0);
    let leaves = |at: usize| {
        let mut prompt = base.clone();
        prompt[at] += 1;
        prompt
    };
    let turn = [&base[..], &answer.token_ids, &[3, 1, 4, 1, 5]].concat();
    let sampled = SamplerConfig { temperature: 0.9, seed: 5, ..off() };
    let requests = vec![
        first,
        ask(&base, sampled),
        ask(&leaves(100), off()),
        ask(&leaves(96), off()),
        ask(&base[..193], off()),
        ask(&base[..192], off()),
        ask(&turn, off()),
        ask(&leaves(10), off()),
        ask(&leaves(10), off()),
    ];
    let mut answers = vec![answer];
    answers.extend(whole(bundles, 1, wire, &requests[1..]));
    // 210 + 40 tokens, of which the last has no row: seven pages, of which six are the prompt's.
    (requests, answers, vec![0, 6, 3, 3, 6, 5, 7, 0, 6])
}

/// Asks in order and compares; the pages that were found, too.
fn assert_conversation(
    case: &str,
    engine: &Engine,
    mode: DraftMode,
    (requests, answers, held): &(Vec<Request>, Vec<Metrics>, Vec<u32>),
) {
    for (index, (request, answer)) in requests.iter().zip(answers).enumerate() {
        let case = format!("{case}, {}, request {index}", mode.name());
        let split = collect(engine, request.clone().draft(mode));
        assert_same(&case, answer, &split);
        let timings = &split.timings;
        assert_eq!(timings.pages_reused, held[index], "{case}: pages");
        let sent: u32 = timings.chunks.iter().sum();
        assert_eq!(sent, timings.prompt_n - 32 * held[index], "{case}: rows that were sent");
    }
}

#[test]
fn held_pages_change_nothing_in_any_codec_cut_or_draft() {
    let bundles = Bundles::generated(1, 0);
    let cuts = [
        ChunkPolicy::Fixed(1),
        ChunkPolicy::Fixed(20),
        ChunkPolicy::Off,
        ChunkPolicy::Auto,
        ChunkPolicy::Paper,
    ];
    let mut modes = DraftMode::ALL.into_iter().cycle();
    for wire in Codec::ALL {
        let conversation = conversation(&bundles, wire);
        for chunks in cuts {
            let config = EngineConfig::new(bundles.path.join("device")).link(LinkKind::Memory);
            let mode = modes.next().unwrap();
            let engine = Engine::open(config.wire(wire).chunks(chunks)).unwrap();
            let case = format!("{wire:?}, {chunks:?}");
            assert_conversation(&case, &engine, mode, &conversation);
        }
    }
}

#[test]
fn held_pages_change_nothing_for_a_trained_drafter() {
    let bundles = Bundles::generated(1, 0);
    let conversation = conversation(&bundles, Codec::default());
    add_noise(&bundles, DrafterArchitecture::Deep);
    for mode in DraftMode::ALL {
        let config = EngineConfig::new(bundles.path.join("device"));
        let engine = Engine::open(config).unwrap();
        assert_conversation("trained", &engine, mode, &conversation);
    }
}

#[test]
fn nothing_is_held_where_it_must_not_be() {
    let mut asked = 0;
    for (tail_layers, prefix) in [(1, true), (0, false)] {
        let bundles = Bundles::generated(1, tail_layers);
        let request = ask(&long_prompt(210), SamplerConfig::default());
        let whole = whole(&bundles, 1, Codec::default(), std::slice::from_ref(&request)).remove(0);
        let config = EngineConfig::new(bundles.path.join("device")).prefix(prefix);
        let engine = Engine::open(config).unwrap();
        for _ in 0..2 {
            let split = collect(&engine, request.clone());
            assert_same(&format!("tail {tail_layers}, prefix {prefix}"), &whole, &split);
            assert_eq!(split.timings.pages_reused, 0);
            asked += split.timings.chunks.iter().sum::<u32>();
        }
    }
    assert_eq!(asked, 4 * 210);
}

/// One secret finds what another device has sent a moment ago and still works on; another secret
/// finds nothing, another codec neither.
#[test]
fn devices_with_one_secret_share_while_they_run() {
    let bundles = Bundles::generated(1, 0);
    let cloud = Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap();
    let device = |secret: u8, wire| {
        let config = EngineConfig::new(bundles.path.join("device"))
            .cloud(cloud.address().to_string())
            .prefix_secret([secret; 32])
            .wire(wire);
        Engine::open(config).unwrap()
    };
    let request = ask(&long_prompt(210), SamplerConfig::default());
    let [f16, f32] = [Codec::default(), Codec::F32]
        .map(|wire| whole(&bundles, 1, wire, std::slice::from_ref(&request)).remove(0));
    let [one, other, stranger] = [1, 1, 2].map(|secret| device(secret, Codec::default()));
    let exact = device(1, Codec::F32);
    let mut tokens = 0;
    let split = collect_with(&one, request.clone().draft(DraftMode::Off), |_| {
        tokens += 1;
        if tokens == 2 {
            std::thread::scope(|scope| {
                for (engine, whole, pages) in
                    [(&other, &f16, 6), (&stranger, &f16, 0), (&exact, &f32, 0)]
                {
                    let request = request.clone();
                    scope.spawn(move || {
                        let split = collect(engine, request);
                        assert_same("beside the first", whole, &split);
                        assert_eq!(split.timings.pages_reused, pages);
                    });
                }
            });
        }
    });
    assert_same("the first", &f16, &split);
    assert_eq!(cloud.counters().pages_reused.load(Ordering::Relaxed), 6);
}

/// A store of 18 pages, and sessions of 10: what is kept gives way, and nobody is refused.
#[test]
fn pages_give_way_to_sessions() {
    let bundles = Bundles::generated(1, 0);
    let prompt = |first: u32| -> Vec<u32> {
        long_prompt(210).into_iter().map(|token| (token + first) % 250).collect()
    };
    let requests: Vec<Request> =
        (0..3).map(|first| ask(&prompt(first), SamplerConfig::default())).collect();
    let answers = whole(&bundles, 1, Codec::default(), &requests);
    let mut cloud_config = CloudConfig::new(bundles.path.join("cloud"));
    cloud_config.limits.kv_rows_max = 16 * 32;
    let mut config = EngineConfig::new(bundles.path.join("device")).link(LinkKind::Memory);
    config.cloud = CloudAddress::InProcess(Box::new(cloud_config.link(LinkKind::Memory)));
    let engine = Engine::open(config).unwrap();
    let counters = engine.cloud().unwrap().counters();
    let free = || counters.pages_free.load(Ordering::Relaxed);
    let all = free();
    let mut reused = Vec::new();
    for index in [0, 0, 1, 0, 2, 1, 2, 2, 0] {
        let split = collect(&engine, requests[index].clone());
        assert_same(&format!("request {index}"), &answers[index], &split);
        reused.push(split.timings.pages_reused);
    }
    assert_eq!((reused[0], reused[1]), (0, 6));
    assert!(reused[2..].iter().any(|pages| *pages < 6), "nothing gave way: {reused:?}");
    assert!(reused[2..].iter().any(|pages| *pages > 0), "nothing was kept: {reused:?}");
    // Two at once don't fit in the store, but for what they share.
    std::thread::scope(|scope| {
        for index in [0, 1, 0, 2, 0, 1] {
            let (engine, request, answer) = (&engine, &requests[index], &answers[index]);
            scope.spawn(move || {
                assert_same("at once", answer, &collect(engine, request.clone()));
            });
        }
    });
    eventually("all pages came back", || free() == all);
}

/// The cloud forgets a device in the middle of its answer, since another took its place. When it
/// comes back it finds the pages of its prompt, and what the other has left of its own.
#[test]
fn a_session_that_was_lost_finds_its_pages() {
    let bundles = Bundles::generated(1, 0);
    let request = ask(&long_prompt(210), SamplerConfig::default());
    let answer = whole(&bundles, 1, Codec::default(), std::slice::from_ref(&request)).remove(0);
    let mut config = CloudConfig::new(bundles.path.join("cloud"));
    config.limits.connections_max = 1;
    let cloud = Cloud::start(config).unwrap();
    for mode in [DraftMode::Off, DraftMode::Tree, DraftMode::All] {
        let link = Proxy::to(cloud.address());
        let device = |secret: u8, address: std::net::SocketAddr| {
            let config = EngineConfig::new(bundles.path.join("device"))
                .cloud(address.to_string())
                .prefix_secret([secret; 32]);
            Engine::open(config).unwrap()
        };
        let secret = 10 + mode as u8;
        let engine = device(secret, link.address());
        link.stop_after(800);
        let mut is_first = true;
        let split = collect_with(&engine, request.clone().draft(mode), |_| {
            if std::mem::take(&mut is_first) {
                link.wait_until_stopped();
                link.cut();
                let other = device(99, cloud.address());
                collect(&other, Request::tokens(support::long_prompt(20)).max_tokens(2));
                drop(other);
                link.stop(false);
            }
        });
        assert_same(&format!("lost, {}", mode.name()), &answer, &split);
        // None at first, and then the prompt's six; fewer than 224 rows have no seventh.
        assert_eq!(split.timings.pages_reused as usize, 210 / PAGE, "{}", mode.name());
    }
}
