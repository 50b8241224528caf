//! The two roles against a world that gets things wrong: each case ends in a clear error that
//! names the field, the file or the peer, and the cloud goes on saying the same to everybody else.
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::support::hand::{HIDDEN, Hand, chain};
use crate::support::script::{self, Script};
use crate::support::{Bundles, PATIENCE, collect, eventually, long_prompt};
use hat_engine::options::{ChunkPolicy, Codec, ErrorKind, SamplerConfig};
use hat_engine::testkit::pool_pages;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Error, Event, Metrics, Request};
use hat_loader::TinyModel;
use hat_plan::{Computes, MiddleForward, MiddleStep};
use hat_transport::conn::FrameSink;
use hat_transport::endpoint::{EndpointConfig, Event as LinkEvent};
use hat_transport::frame::{FRAME_BYTES_MAX, Kind, Priority};
use hat_transport::message::{
    Arrivals, Message, Opened, OutputHead, RowsHead, SessionError, SessionErrorCode,
};

fn cloud(bundles: &Bundles) -> Cloud {
    Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap()
}

fn device(bundles: &Bundles, address: impl ToString) -> EngineConfig {
    let mut config = EngineConfig::new(bundles.path.join("device")).cloud(address.to_string());
    config.reconnect = Duration::from_secs(2);
    config
}

/// Ends every case: another session gets the answer that it always gets.
fn canary(bundles: &Bundles, cloud: &Cloud) -> Metrics {
    let engine = Engine::open(device(bundles, cloud.address())).unwrap();
    collect(&engine, Request::tokens(long_prompt(40)).max_tokens(12).ignore_eos().hash_logits())
}

fn first_error(engine: &Engine, request: Request) -> Error {
    engine.generate(request).unwrap().find_map(Result::err).expect("an error")
}

/// Answers without a limit of their own may fill the context: as many as a default device promises
/// have a place of their own, there and in a default cloud.
#[test]
fn as_many_longest_answers_run_as_a_device_promises() {
    let model = TinyModel { positions: 8192, ..TinyModel::default() };
    let bundles = Bundles::of(&model, 1, 0);
    let cloud = cloud(&bundles);
    let engine = Engine::open(device(&bundles, cloud.address())).unwrap();
    let ask = || Request::tokens(long_prompt(40)).ignore_eos();
    let mut answers: Vec<_> =
        (0..engine.sessions_max()).map(|_| engine.generate(ask()).unwrap()).collect();
    // Each has a token before any has come to its end.
    for answer in &mut answers {
        answer.next().unwrap().unwrap();
    }
    assert_eq!(cloud.counters().sessions.load(Ordering::Relaxed), 4);
    assert_eq!(cloud.counters().busy.load(Ordering::Relaxed), 0, "nobody was told to wait");
    assert_eq!(engine.waiting(), 0);
}

/// A cloud on another machine is refused before anything is loaded, and so is no address.
#[test]
fn a_cloud_that_can_t_be_asked_is_refused_at_once() {
    let bundles = Bundles::generated(1, 0);
    for (address, words) in [
        ("10.0.0.2:7433", "ssh -L"),
        ("0.0.0.0", "ssh -L"),
        ("[2001:db8::1]", "ssh -L"),
        ("", "empty"),
        ("127.0.0.1:http", "port"),
        ("127.0.0.1:0", "port 0"),
    ] {
        let error = Engine::open(device(&bundles, address)).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Input, "{address}: {error}");
        let text = error.to_string();
        assert!(text.starts_with("cloud: ") && text.contains(words), "{text}");
    }
}

/// An unknown name does not become known while a request waits, so it does not wait: this would
/// take an hour.
#[test]
fn an_unknown_cloud_ends_a_request_without_a_wait() {
    let bundles = Bundles::generated(1, 0);
    let mut config = device(&bundles, "box.invalid");
    config.reconnect = Duration::from_secs(3600);
    let engine = Engine::open(config).unwrap();
    for _ in 0..2 {
        let answer = engine.generate(Request::chat("Hello")).unwrap().next_timeout(PATIENCE);
        let error = answer.expect("it is not waited for").err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Peer);
        assert!(error.to_string().contains("box.invalid is unknown"), "{error}");
    }
}

#[test]
fn an_absent_cloud_is_named() {
    let bundles = Bundles::generated(1, 0);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let engine = Engine::open(device(&bundles, port)).unwrap();
    let start = Instant::now();
    let error = first_error(&engine, Request::chat("Hello"));
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    assert_eq!(error.kind(), ErrorKind::Peer);
    let text = error.to_string();
    assert!(text.contains(&port.to_string()) && text.contains("hat-engine cloud"), "{text}");
}

#[test]
fn halves_of_two_models_are_refused() {
    let bundles = Bundles::generated(1, 0);
    let other = Bundles::of(&TinyModel { seed: 2, ..TinyModel::default() }, 1, 0);
    let cloud = cloud(&bundles);
    let before = canary(&bundles, &cloud);
    let engine = Engine::open(device(&other, cloud.address())).unwrap();
    let text = first_error(&engine, Request::chat("Hello")).to_string();
    assert!(text.contains("two different models"), "{text}");
    assert_eq!(canary(&bundles, &cloud).logits_blake3, before.logits_blake3);
}

#[test]
fn a_cloud_without_the_wanted_layers_says_which_it_has() {
    let narrow = Bundles::generated(2, 0);
    let cloud = cloud(&narrow);
    let engine = Engine::open(device(&narrow, cloud.address()).split_layer(1)).unwrap();
    let text = first_error(&engine, Request::chat("Hello")).to_string();
    assert!(text.contains("layers 1..4") && text.contains("2..4"), "{text}");
}

#[test]
fn a_split_beyond_the_bundle_is_refused() {
    let bundles = Bundles::generated(1, 0);
    let error = Engine::open(EngineConfig::new(bundles.path.join("device")).split_layer(3));
    let text = error.err().expect("refused").to_string();
    assert!(text.contains("split_layer") && text.contains("--split-layer 3"), "{text}");
}

#[test]
fn the_wrong_half_is_refused() {
    let bundles = Bundles::generated(1, 0);
    let text = Engine::open(EngineConfig::new(bundles.path.join("cloud"))).err().unwrap();
    assert!(text.to_string().contains("device half"), "{text}");
    let text = Cloud::start(CloudConfig::new(bundles.path.join("device"))).err().unwrap();
    assert!(text.to_string().contains("cloud half"), "{text}");
}

#[test]
fn addresses_that_others_can_reach_are_refused() {
    let bundles = Bundles::generated(1, 0);
    let config = CloudConfig::new(bundles.path.join("cloud")).listen("0.0.0.0:0".parse().unwrap());
    let error = Cloud::start(config).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Input);
    assert!(error.to_string().contains("TLS"), "{error}");
}

#[test]
fn requests_are_checked_before_anything_is_sent() {
    let bundles = Bundles::generated(1, 0);
    let engine = Engine::open(EngineConfig::new(bundles.path.join("device"))).unwrap();
    let refused = |request: Request| {
        let error = engine.generate(request).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Input, "{error}");
        error.to_string()
    };
    let text = refused(Request::tokens(vec![5; 2048]));
    assert!(text.contains("2048 tokens"), "{text}");
    let sampler = SamplerConfig { temperature: f32::NAN, ..SamplerConfig::default() };
    let text = refused(Request::chat("Hello").sampler(sampler));
    assert!(text.contains("temperature"), "{text}");
    assert!(refused(Request::tokens(vec![])).contains("prompt"));
    assert!(refused(Request::tokens(vec![512])).contains("512"));
    assert!(refused(Request::chat("Hello").max_tokens(0)).contains("max_tokens"));
    assert!(refused(Request::chat("Hello").stop("")).contains("stop"));
    assert_eq!(collect(&engine, Request::chat("Hello").max_tokens(3)).token_ids.len(), 3);
}

#[test]
fn the_context_ends_an_answer() {
    let bundles = Bundles::generated(1, 0);
    let mut config = EngineConfig::new(bundles.path.join("device"));
    config.limits.context_max = 50;
    let engine = Engine::open(config).unwrap();
    let metrics = collect(&engine, Request::tokens(long_prompt(40)).ignore_eos());
    assert_eq!(metrics.token_ids.len(), 10);
}

/// A model whose first step ends its thread, or that does nothing.
struct Stage {
    breaks: bool,
}

impl Computes for Stage {
    fn describe(&self) -> String {
        "planted".into()
    }
}

impl MiddleForward for Stage {
    fn forward(&mut self, _: &mut MiddleStep) {
        assert!(!self.breaks, "planted");
    }
}

#[test]
fn a_cloud_whose_step_fails_stops_instead_of_hanging() {
    let bundles = Bundles::generated(1, 0);
    for (stages, broken) in [(1, 0), (3, 0), (3, 1), (3, 2)] {
        let config = CloudConfig::new(bundles.path.join("cloud"));
        let half = hat_loader::Bundle::open(&config.bundle).unwrap();
        let pages = pool_pages(&config);
        let stage =
            |number| -> Box<dyn MiddleForward> { Box::new(Stage { breaks: number == broken }) };
        let models = (0..stages).map(stage).collect();
        let cloud = Cloud::serve_stages(config, &half, models, pages).unwrap();
        let engine = Engine::open(device(&bundles, cloud.address())).unwrap();
        let error = first_error(&engine, Request::chat("Hello"));
        assert_eq!(error.kind(), ErrorKind::Peer, "stage {broken} of {stages}: {error}");
        cloud.join();
    }
}

/// Of two words about the codec the caller's counts, then the bundle's; nobody's is int8.
#[test]
fn the_bundle_may_ask_for_a_codec() {
    let bundles = Bundles::generated(1, 0);
    let manifest = bundles.path.join("device/bundle.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    assert!(text.contains("\"wire\": \"int8\""));
    for asked in [Codec::Int8, Codec::F32, Codec::Int4] {
        let edited = text.replace("\"int8\"", &format!("{:?}", asked.name()));
        std::fs::write(&manifest, edited).unwrap();
        let config = EngineConfig::new(bundles.path.join("device"));
        assert_eq!(Engine::open(config.clone()).unwrap().wire(), asked);
        assert_eq!(Engine::open(config.wire(Codec::F16)).unwrap().wire(), Codec::F16);
    }
}

/// All chunks of a prompt but the last are answered by 26 bytes that say what their steps took.
#[test]
fn chunks_that_return_no_row_say_what_they_took() {
    let bundles = Bundles::generated(1, 0);
    let cloud = cloud(&bundles);
    let config = device(&bundles, cloud.address()).chunks(ChunkPolicy::Fixed(100)).prefix(false);
    let engine = Engine::open(config).unwrap();
    let output = 32 + 24 + 4 + Codec::default().row_bytes(HIDDEN) as u64;
    for chunks in [1, 2, 4] {
        let prompt = long_prompt(100 * chunks - 30);
        let metrics = collect(&engine, Request::tokens(prompt).max_tokens(1));
        let computed = (chunks as u64 - 1) * (32 + 26);
        assert_eq!(metrics.timings.bytes_down, output + computed, "{chunks} chunks");
    }
    let cost = engine.metrics().estimates.chunk.unwrap().cloud;
    assert!(cost.per_row > 0.0, "{cost:?}");
}

#[test]
fn a_dropped_generation_frees_its_session() {
    let bundles = Bundles::generated(1, 0);
    let cloud = cloud(&bundles);
    let engine = Engine::open(device(&bundles, cloud.address())).unwrap();
    let free = |cloud: &Cloud| cloud.counters().pages_free.load(Ordering::Relaxed);
    let all = free(&cloud);
    let mut generation = engine.generate(Request::tokens(long_prompt(200)).ignore_eos()).unwrap();
    for _ in 0..5 {
        generation.next().unwrap().unwrap();
    }
    assert!(free(&cloud) < all);
    drop(generation);
    let sessions = || cloud.counters().sessions.load(Ordering::Relaxed);
    eventually("its session is gone", || sessions() == 0 && free(&cloud) == all);
}

#[test]
fn too_many_requests_are_told_to_wait() {
    let bundles = Bundles::generated(1, 0);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut config = device(&bundles, port);
    config.limits.sessions_max = 1;
    config.limits.queue_max = 2;
    let engine = Engine::open(config).unwrap();
    let mut kept = Vec::new();
    let error = (0..100_000)
        .find_map(|_| match engine.generate(Request::chat("Hello")) {
            Ok(generation) => {
                kept.push(generation);
                None
            }
            Err(error) => Some(error),
        })
        .expect("some are refused");
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.retry_after_ms().is_some());
}

#[test]
fn an_unknown_peer_at_the_port_is_sent_away() {
    let bundles = Bundles::generated(1, 0);
    let cloud = cloud(&bundles);
    let before = canary(&bundles, &cloud);
    for greeting in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 64], &[0; 64]] {
        let mut stream = TcpStream::connect(cloud.address()).unwrap();
        // Longer than a HELLO may take: one greeting is no whole header.
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(greeting).unwrap();
        let mut said = Vec::new();
        // Closed or reset: a time-out would be an error of another kind.
        if let Err(error) = stream.read_to_end(&mut said) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
    // One that says nothing, and one that stops in the middle of a header, hold nobody up.
    let _silent = TcpStream::connect(cloud.address()).unwrap();
    TcpStream::connect(cloud.address()).unwrap().write_all(&[1, 2, 3]).unwrap();
    assert_eq!(canary(&bundles, &cloud).logits_blake3, before.logits_blake3);
}

#[test]
fn lies_end_the_liars_session_and_nobody_elses() {
    let bundles = Bundles::generated(1, 0);
    let cloud = cloud(&bundles);
    let before = canary(&bundles, &cloud);
    let mut liar = Hand::connect(&bundles, &cloud);
    let row = vec![0u8; HIDDEN * 4];
    use SessionErrorCode as Code;

    liar.open(1, |open| open.entry_layer = 0);
    assert_eq!(liar.error(1).0, Code::Layers);
    liar.open(2, |open| open.codec = 9);
    assert_eq!(liar.error(2).0, Code::Codec);
    liar.open(3, |open| open.arithmetic_id = 7);
    assert_eq!(liar.error(3).0, Code::Arithmetic);
    liar.open(4, |open| open.rows_max = 1 << 30);
    assert_eq!(liar.error(4).0, Code::BadShape);
    liar.rows(5, &chain(1, 1, 0), &[], &row);
    assert_eq!(liar.error(5).0, Code::NoSuchSession);

    let cases: [(RowsHead, Vec<u8>, Code); 6] = [
        (chain(1, 2, 0), row.clone(), Code::BadShape),
        (chain(5, 1, 4), row.clone(), Code::BadParent),
        (RowsHead { commit: 3, ..chain(5, 1, 0) }, row.clone(), Code::BadCommit),
        (chain(1, 1, 0), f32::NAN.to_le_bytes().repeat(HIDDEN), Code::BadValue),
        (chain(1, 1, 0), f32::INFINITY.to_le_bytes().repeat(HIDDEN), Code::BadValue),
        (chain(1, 101, 0), row.repeat(101), Code::BadShape),
    ];
    for (session, (head, payload, code)) in (10..).zip(cases) {
        liar.open(session, |_| {});
        liar.rows(session, &head, &[], &payload);
        let (got, text) = liar.error(session);
        assert_eq!(got, code, "{text}");
    }
    // A chunk beyond the row budget, in pieces that each look innocent.
    liar.open(30, |_| {});
    let more = |first_id| RowsHead { more: true, ..chain(first_id, 90, first_id - 1) };
    for piece in 0..6 {
        liar.rows(30, &more(1 + 90 * piece), &[], &row.repeat(90));
    }
    assert_eq!(liar.error(30).0, Code::BadShape);

    assert_eq!(canary(&bundles, &cloud).logits_blake3, before.logits_blake3);
    // The honest device says END when its answer is there already.
    let sessions = || cloud.counters().sessions.load(Ordering::Relaxed);
    eventually("no session is left", || sessions() == 0);
}

/// A cloud with a full window takes rows again when their request is gone: those that had not left
/// do not come, and END names no row among them.
#[test]
fn rows_of_a_cancelled_prompt_that_have_not_left_do_not_go_up() {
    const PROMPT: u32 = 2000;
    let bundles = Bundles::generated(1, 0);
    let takes = Arc::new(AtomicBool::new(false));
    let (rows, commit) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(u32::MAX)));
    let (may_take, counted, ended) = (takes.clone(), rows.clone(), commit.clone());
    let mut config = EndpointConfig::new(script::hello(&bundles));
    config.connection.window_bytes = 2 * u32::try_from(FRAME_BYTES_MAX).unwrap();
    let mut kept = Vec::new();
    let cloud = Script::start_with(config, move |cloud, event| {
        if may_take.load(Ordering::Acquire) {
            kept.clear();
        }
        let Some(LinkEvent::Frame { connection, frame }) = event else { return };
        match Message::decode(frame.kind, &frame.body).unwrap() {
            Message::Open(_) => {
                let opened = Message::Opened(Opened { pages: 0 });
                cloud.send_message(connection, frame.session, &opened).unwrap();
            }
            Message::Rows(rows) => {
                counted.fetch_add(u32::from(rows.head.count), Ordering::AcqRel);
            }
            Message::End(end) => ended.store(end.commit, Ordering::Release),
            _ => {}
        }
        kept.push(frame);
    });
    let mut config = device(&bundles, cloud.address);
    config.wire = Some(Codec::F32);
    config.reconnect = PATIENCE;
    let engine = Engine::open(config).unwrap();
    let mut answer = engine.generate(Request::tokens(long_prompt(PROMPT))).unwrap();
    let is_computed = answer.any(|event| match event.unwrap() {
        Event::Prefill { sent, total } => sent == total,
        _ => false,
    });
    assert!(is_computed);
    drop(answer);
    eventually("it is cancelled", || engine.metrics().requests_cancelled == 1);
    let before = rows.load(Ordering::Acquire);
    assert!(before < PROMPT / 2, "{before} rows fit a window of 128 KiB");
    takes.store(true, Ordering::Release);
    eventually("the session ends", || commit.load(Ordering::Acquire) != u32::MAX);
    let after = rows.load(Ordering::Acquire);
    assert!(after < PROMPT, "all {after} rows went up for nobody");
    assert_eq!(commit.load(Ordering::Acquire), 0, "END names a row");
}

/// Frames are taken one at a time: a session that is lost right behind its last output has given
/// its answer, and is not opened again.
#[test]
fn an_answer_that_is_back_is_not_replayed() {
    let bundles = Bundles::generated(1, 0);
    let opens = Arc::new(AtomicU32::new(0));
    let counted = opens.clone();
    let cloud = Script::start(script::hello(&bundles), move |cloud, event| {
        let Some(LinkEvent::Frame { connection, frame }) = event else { return };
        match Message::decode(frame.kind, &frame.body).unwrap() {
            Message::Open(_) => {
                counted.fetch_add(1, Ordering::Relaxed);
                let opened = Message::Opened(Opened { pages: 0 });
                cloud.send_message(connection, frame.session, &opened).unwrap();
            }
            Message::Rows(rows) if !rows.head.more && rows.head.first_id < 40 => {
                let (arrivals, count) = (Arrivals { bytes: 0, us: 0 }, 1);
                let head = OutputHead { count, queue_us: 0, step_us: 1, step_rows: 1, arrivals };
                let mut body =
                    cloud.buffer(Priority::Verify, head.payload_start() + 4 * HIDDEN).unwrap();
                let last = rows.head.first_id + u32::from(rows.head.count) - 1;
                let start = head.encode(&[last], body.body_mut());
                for number in body.body_mut()[start..].as_chunks_mut().0 {
                    *number = 0.5_f32.to_le_bytes();
                }
                let session = frame.session;
                cloud.send(connection, Kind::Output, session, Priority::Verify, body).unwrap();
                let code = SessionErrorCode::Evicted;
                let evicted = Message::SessionError(SessionError { code, text: "made room" });
                cloud.send_message(connection, session, &evicted).unwrap();
            }
            _ => {}
        }
    });
    let mut config = device(&bundles, cloud.address);
    config.wire = Some(Codec::F32);
    let engine = Engine::open(config).unwrap();
    for asked in 1..6 {
        let request = Request::tokens(long_prompt(20)).max_tokens(1).ignore_eos();
        assert_eq!(collect(&engine, request).token_ids.len(), 1);
        assert_eq!(opens.load(Ordering::Relaxed), asked, "a session for each answer");
    }
}
