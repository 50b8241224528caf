//! Waits for a cloud that is there and brings nothing nearer, and for one that is away: each ends.
//! No verdict depends on how long that takes.
use std::time::{Duration, Instant};

use crate::support::script::{self, Script};
use crate::support::{Bundles, long_prompt};
use hat_engine::options::{Codec, ErrorKind};
use hat_engine::{Engine, EngineConfig, Error, Generation, Request};
use hat_transport::conn::FrameSink;
use hat_transport::endpoint::{Endpoint, EndpointConfig, Event};
use hat_transport::frame::FRAME_BYTES_MAX;
use hat_transport::message::{Busy, Computed, Dropped, Message, Opened};

/// Limit that is longer than any machine keeps a thread from a core, and shorter than the times
/// that must not pass.
const PATIENCE: Duration = Duration::from_secs(120);

fn engine(bundles: &Bundles, address: impl ToString, reconnect: Duration) -> Engine {
    let mut config = EngineConfig::new(bundles.path.join("device")).cloud(address.to_string());
    config.reconnect = reconnect;
    config.wire = Some(Codec::F32);
    Engine::open(config).unwrap()
}

fn request(prompt: u32) -> Request {
    Request::tokens(long_prompt(prompt)).max_tokens(12).ignore_eos()
}

/// The error that a request ends with.
fn error_of(what: &str, mut answer: Generation) -> Error {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        if let Some(Err(error)) = answer.next_timeout(Duration::from_secs(1)) {
            return error;
        }
    }
    panic!("{what}: the request does not end");
}

/// A cloud that opens each session, and from the first row on says `message` at each tick.
fn chatters(bundles: &Bundles, message: Message<'static>) -> Script {
    let mut to = None;
    Script::start(script::hello(bundles), move |cloud: &mut Endpoint, event| match event {
        Some(Event::Frame { connection, frame }) => {
            match Message::decode(frame.kind, &frame.body).unwrap() {
                Message::Open(_) => {
                    let opened = Message::Opened(Opened { pages: 0 });
                    cloud.send_message(connection, frame.session, &opened).unwrap();
                }
                Message::Rows(_) => to = Some((connection, frame.session)),
                Message::End(_) => to = None,
                _ => {}
            }
        }
        Some(_) => {}
        None => {
            if let Some((connection, session)) = to {
                let _ = cloud.send_message(connection, session, &message);
            }
        }
    })
}

#[test]
fn talk_that_brings_nothing_is_silence() {
    let bundles = Bundles::generated(1, 0);
    let computed = Computed {
        first_id: 1,
        count: 1,
        queue_us: 0,
        step_us: 1,
        step_rows: 1,
        arrivals: Default::default(),
    };
    for message in [Message::Ended, Message::Cancelled, Message::Computed(computed)] {
        let cloud = chatters(&bundles, message);
        let engine = engine(&bundles, cloud.address, Duration::from_millis(200));
        let what = format!("{message:?}");
        let error = error_of(&what, engine.generate(request(40)).unwrap());
        assert_eq!(error.kind(), ErrorKind::Peer, "{what}: {error}");
        assert!(error.to_string().contains("nothing new"), "{what}: {error}");
    }
}

#[test]
fn answers_that_were_not_asked_for_end_the_request() {
    let bundles = Bundles::generated(1, 0);
    let opened = Message::Opened(Opened { pages: 0 });
    let busy = Message::Busy(Busy { retry_after_ms: 50 });
    let dropped = Message::Dropped(Dropped { first_id: 1000, count: 1 });
    for (message, words) in [(opened, "open"), (busy, "open"), (dropped, "1000")] {
        let cloud = chatters(&bundles, message);
        let engine = engine(&bundles, cloud.address, Duration::from_secs(3600));
        let what = format!("{message:?}");
        let error = error_of(&what, engine.generate(request(40)).unwrap());
        assert_eq!(error.kind(), ErrorKind::Peer, "{what}: {error}");
        assert!(error.to_string().contains(words), "{what}: {error}");
    }
    // Before the session is open nothing can come but what opens it, or ends it.
    let cloud = Script::start(script::hello(&bundles), move |cloud, event| {
        if let Some(Event::Frame { connection, frame }) = event {
            let _ = cloud.send_message(connection, frame.session, &Message::Cancelled);
        }
    });
    let engine = engine(&bundles, cloud.address, Duration::from_secs(3600));
    let text = error_of("CANCELLED", engine.generate(request(40)).unwrap()).to_string();
    assert!(text.contains("before it opened"), "{text}");
}

/// Its window is full, and it takes nothing out of it.
#[test]
fn a_cloud_that_takes_nothing_more_is_silent() {
    let bundles = Bundles::generated(1, 0);
    let mut config = EndpointConfig::new(script::hello(&bundles));
    config.connection.window_bytes = 2 * u32::try_from(FRAME_BYTES_MAX).unwrap();
    let mut kept = Vec::new();
    let cloud = Script::start_with(config, move |cloud, event| {
        let Some(Event::Frame { connection, frame }) = event else { return };
        if matches!(Message::decode(frame.kind, &frame.body), Ok(Message::Open(_))) {
            let opened = Message::Opened(Opened { pages: 0 });
            cloud.send_message(connection, frame.session, &opened).unwrap();
        }
        kept.push(frame);
    });
    let engine = engine(&bundles, cloud.address, Duration::from_millis(200));
    let error = error_of("a full window", engine.generate(request(2000)).unwrap());
    assert!(error.to_string().contains("nothing new"), "{error}");
}

/// Once an outage is known, whoever asks is told so at once; who asked before waits on.
#[test]
fn a_request_in_a_known_outage_is_not_kept_waiting() {
    let bundles = Bundles::generated(1, 0);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let begin = Instant::now();
    let engine = engine(&bundles, nobody, Duration::from_secs(3600));
    let mut early = engine.generate(request(40)).unwrap();
    let was_early = begin.elapsed() < Duration::from_secs(1);
    // An outage is known after 2 s.
    while !matches!(
        engine.generate(request(40)).unwrap().next_timeout(Duration::from_secs(5)),
        Some(Err(_))
    ) {
        assert!(begin.elapsed() < PATIENCE, "no request fails");
    }
    for _ in 0..3 {
        let error = error_of("a known outage", engine.generate(request(40)).unwrap());
        assert_eq!(error.kind(), ErrorKind::Peer);
        let text = error.to_string();
        assert!(text.contains("waited 1 s") && text.contains("hat-engine cloud"), "{text}");
    }
    assert!(!was_early || early.try_next().is_none(), "the early one has not waited");
}
