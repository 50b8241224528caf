//! A device and clouds that say the wrong thing, too little, or nothing: every request ends, the
//! device dials on, and it does not spin meanwhile. Verdicts rest on counts and on what is said.
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{Bundles, collect, long_prompt, script};
use hat_engine::options::ErrorKind;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Error, Request};
use hat_transport::clock::SystemClock;
use hat_transport::conn::{ConnectionId, FrameSink};
use hat_transport::endpoint::{Endpoint, EndpointConfig, Event};
use hat_transport::link::LinkKind;
use hat_transport::message::{Busy, CloseCode, Message, Opened, SessionError, SessionErrorCode};

/// The lie that a scripted cloud tells.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lie {
    /// The cloud never answers OPEN.
    NeverOpened,
    /// The cloud opens sessions and never sends a row.
    NeverOutput,
    /// The cloud answers each OPEN with this message.
    Error(SessionErrorCode),
    /// The cloud opens sessions and answers their first rows with this message.
    ErrorAtRows(SessionErrorCode),
    /// The cloud has no room, and asks back after this many milliseconds.
    Busy(u32),
    /// The cloud closes the connection at each OPEN.
    Close(CloseCode),
    /// The cloud opens sessions and closes the connection at their first rows.
    CloseAtRows(CloseCode),
}

/// A scripted cloud on a thread of its own.
struct Liar {
    address: SocketAddr,
    opens: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Liar {
    fn start(bundles: &Bundles, lie: Lie) -> Self {
        let hello = script::hello(bundles);
        let any_port = Some(([127, 0, 0, 1], 0).into());
        let link = hat_transport::link::open(LinkKind::Mio, any_port).unwrap().link;
        let mut cloud = Endpoint::new(link, Arc::new(SystemClock), EndpointConfig::new(hello));
        let address = cloud.local_address().unwrap();
        let (opens, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stopped) = (opens.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut events = Vec::new();
            while !stopped.load(Ordering::Acquire) {
                cloud.poll(Some(Duration::from_millis(5)), &mut events).unwrap();
                for event in events.drain(..) {
                    if let Event::Frame { connection, frame } = event {
                        let message = Message::decode(frame.kind, &frame.body);
                        let is_open = matches!(message, Ok(Message::Open(_)));
                        counted.fetch_add(usize::from(is_open), Ordering::Relaxed);
                        if is_open || matches!(message, Ok(Message::Rows(_))) {
                            tell(&mut cloud, connection, frame.session, lie, is_open);
                        }
                    }
                }
            }
        });
        Self { address, opens, stop, thread: Some(thread) }
    }

    fn opens(&self) -> usize {
        self.opens.load(Ordering::Relaxed)
    }
}

fn tell(cloud: &mut Endpoint, to: ConnectionId, session: u32, lie: Lie, is_open: bool) {
    let error = |code| Message::SessionError(SessionError { code, text: "a lie" });
    let opened = Message::Opened(Opened { pages: 0 });
    let answer = match (lie, is_open) {
        (Lie::Error(code), true) | (Lie::ErrorAtRows(code), false) => error(code),
        (Lie::Busy(retry_after_ms), true) => Message::Busy(Busy { retry_after_ms }),
        (Lie::Close(code), true) | (Lie::CloseAtRows(code), false) => {
            return cloud.close(to, code, "a lie");
        }
        (Lie::NeverOutput | Lie::ErrorAtRows(_) | Lie::CloseAtRows(_), true) => opened,
        _ => return,
    };
    let _ = cloud.send_message(to, session, &answer);
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.thread.take().unwrap().join();
    }
}

fn config(bundles: &Bundles, address: impl ToString) -> EngineConfig {
    let mut config = EngineConfig::new(bundles.path.join("device")).cloud(address.to_string());
    config.reconnect = Duration::from_millis(500);
    config
}

fn request() -> Request {
    Request::tokens(long_prompt(40)).max_tokens(12).ignore_eos().hash_logits()
}

fn first_error(engine: &Engine) -> Error {
    engine.generate(request()).unwrap().find_map(Result::err).expect("an error")
}

#[test]
fn every_lie_ends_the_request_after_few_attempts() {
    use SessionErrorCode::{Evicted, NoSuchSession, Resource};
    let bundles = Bundles::generated(1, 0);
    // Attempts: each is put off for at least 50 ms, and most for twice as long as the one before.
    for (lie, opens_max, words) in [
        (Lie::NeverOpened, 1, "said nothing"),
        (Lie::NeverOutput, 1, "said nothing"),
        (Lie::Error(Resource), 4, "Resource"),
        (Lie::ErrorAtRows(Resource), 4, "Resource"),
        (Lie::Busy(0), 64, "no room"),
        (Lie::Busy(u32::MAX), 1, "no room"),
        (Lie::Close(CloseCode::Incompatible), 1, "a lie"),
        (Lie::CloseAtRows(CloseCode::Protocol), 1, "a lie"),
        (Lie::Close(CloseCode::Overload), 64, "a lie"),
        (Lie::CloseAtRows(CloseCode::ShuttingDown), 64, "times"),
        (Lie::CloseAtRows(CloseCode::Internal), 64, "times"),
    ] {
        let liar = Liar::start(&bundles, lie);
        let mut config = config(&bundles, liar.address);
        if words == "times" {
            // The count of losses ends the request, and no time does.
            config.reconnect = Duration::from_secs(3600);
        }
        let engine = Engine::open(config).unwrap();
        let error = first_error(&engine);
        let text = error.to_string();
        assert!(matches!(error.kind(), ErrorKind::Peer | ErrorKind::Busy), "{lie:?}: {text}");
        assert!(text.contains(words), "{lie:?}: {text}");
        let opens = liar.opens();
        assert!((1..=opens_max).contains(&opens), "{lie:?}: {opens} attempts");
    }
    // Pauses double up to 30 s here, so 16 losses take minutes: the count of a while must do.
    for lie in [Lie::Error(Evicted), Lie::Error(NoSuchSession), Lie::ErrorAtRows(Evicted)] {
        let liar = Liar::start(&bundles, lie);
        let engine = Engine::open(config(&bundles, liar.address)).unwrap();
        let mut answer = engine.generate(request()).unwrap();
        assert!(answer.next_timeout(Duration::from_secs(1)).is_none_or(|event| event.is_ok()));
        let opens = liar.opens();
        assert!(opens <= 20, "{lie:?}: {opens} attempts");
    }
}

#[test]
fn a_cloud_that_ends_in_order_is_an_outage() {
    let bundles = Bundles::generated(1, 0);
    let start = |listen: SocketAddr| {
        Cloud::start(CloudConfig::new(bundles.path.join("cloud")).listen(listen)).unwrap()
    };
    let first = start(([127, 0, 0, 1], 0).into());
    let address = first.address();
    let mut config = config(&bundles, address);
    config.reconnect = Duration::from_secs(600);
    let engine = Engine::open(config).unwrap();
    let long = Request::tokens(long_prompt(40)).max_tokens(400).ignore_eos().hash_logits();
    let expected = collect(&engine, long.clone());
    let mut cloud = Some(first);
    let mut tokens = 0;
    let found = crate::support::collect_with(&engine, long, |_| {
        tokens += 1;
        if tokens == 20 {
            drop(cloud.take()); // tells its devices, and waits for its threads
            cloud = Some(start(address));
        }
    });
    assert_eq!(found.token_ids, expected.token_ids);
    assert_eq!(found.logits_blake3, expected.logits_blake3);
}

#[test]
fn a_device_finds_the_right_cloud_by_itself() {
    let bundles = Bundles::generated(1, 0);
    let liar = Liar::start(&bundles, Lie::Close(CloseCode::Incompatible));
    let address = liar.address;
    let engine = Engine::open(config(&bundles, address)).unwrap();
    assert_eq!(first_error(&engine).kind(), ErrorKind::Peer);
    drop(liar);
    let listen = CloudConfig::new(bundles.path.join("cloud")).listen(address);
    let _right = Cloud::start(listen).unwrap();
    // Nobody asks for anything meanwhile.
    assert!(engine.wait_connected(Duration::from_secs(120)), "it does not dial on");
}
