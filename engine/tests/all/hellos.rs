//! Tests of the two HELLOs: fields that do not go together are named by the end that reads them,
//! and no frame is longer than its reader takes.
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::hand::{HIDDEN, Hand, chain};
use crate::support::script::{self, Script};
use crate::support::{Bundles, collect, long_prompt};
use hat_engine::options::{Codec, ErrorKind};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Error, Request};
use hat_loader::TinyModel;
use hat_transport::clock::SystemClock;
use hat_transport::conn::FrameSink;
use hat_transport::endpoint::{Endpoint, EndpointConfig, Event, GoneError};
use hat_transport::frame::{HEADER_BYTES, Kind};
use hat_transport::link::LinkKind;
use hat_transport::message::{
    CloseCode, Hello, Message, Opened, Role, RowsHead, SessionError, SessionErrorCode, Want,
};

/// The shortest frames that a HELLO may ask for.
const SHORT: u32 = 4096;

type Change = fn(&mut Hello);

/// Fields that both ends compare, and the words that name them.
const COMPARED: [(&str, Change); 9] = [
    ("two different models", |hello| hello.model_id[31] ^= 1),
    ("rows of 65", |hello| hello.hidden_size = 65),
    ("arithmetic 9", |hello| hello.arithmetic_id = 9),
    ("kv_type is 1 here, 9 there", |hello| hello.kv.kv_type = 9),
    ("kv_type is 1 here, 0 there", |hello| hello.kv.kv_type = 0),
    ("page_size is 32 here, 64 there", |hello| hello.kv.page_size = 64),
    ("page_size is 32 here, 0 there", |hello| hello.kv.page_size = 0),
    ("no common codec", |hello| hello.codecs = 1 << 20),
    ("layers", |hello| hello.exit_layer = hello.entry_layer),
];

fn device(bundles: &Bundles, address: impl ToString) -> EngineConfig {
    let mut config = EngineConfig::new(bundles.path.join("device")).cloud(address.to_string());
    // Nothing here is an outage.
    config.reconnect = Duration::from_secs(3600);
    config
}

fn request() -> Request {
    Request::tokens(long_prompt(40)).max_tokens(12).ignore_eos().hash_logits()
}

fn first_error(engine: &Engine, request: Request) -> Error {
    engine.generate(request).unwrap().find_map(Result::err).expect("an error")
}

#[test]
fn a_device_names_what_it_can_not_work_with() {
    let bundles = Bundles::generated(1, 0);
    let of_a_cloud: [(&str, Change); 6] = [
        ("layers 1..4 are wanted, the cloud holds 2..4", |hello| hello.entry_layer = 2),
        ("row_budget", |hello| hello.row_budget = 0),
        ("stages is 4", |hello| hello.stages = 4),
        ("codec f16", |hello| hello.codecs = 1),
        // Rows of int4 come back as int8.
        ("codec f16", |hello| hello.codecs = 1 << Codec::Int4.id()),
        ("codec f16", |hello| hello.codecs = 0b1111),
    ];
    for (words, change) in COMPARED.into_iter().chain(of_a_cloud) {
        let mut hello = script::hello(&bundles);
        change(&mut hello);
        let closes = Arc::new(Mutex::new(Vec::new()));
        let heard = closes.clone();
        let cloud = Script::start(hello, move |_, event| match event {
            Some(Event::Gone { error: GoneError::ClosedByPeer { code, reason, .. }, .. }) => {
                heard.lock().unwrap().push((code, reason));
            }
            Some(Event::Frame { frame, .. }) => panic!("{:?} for an unknown peer", frame.kind),
            _ => {}
        });
        let mut config = device(&bundles, cloud.address);
        config.wire = Some(Codec::F16);
        let engine = Engine::open(config).unwrap();
        let error = first_error(&engine, request());
        let text = error.to_string();
        assert_eq!(error.kind(), ErrorKind::Peer, "{text}");
        assert!(text.contains(words), "{words}: {text}");
        drop(engine);
        drop(cloud);
        let closes = closes.lock().unwrap();
        let (code, reason) = &closes[0];
        assert_eq!(*code, CloseCode::Incompatible);
        assert!(reason.contains(words), "{words}: {reason}");
    }
}

/// Code and text with which a cloud ends the connection of a device with this HELLO.
fn refusal(hello: Hello, cloud: &Cloud) -> (CloseCode, String) {
    let link = hat_transport::link::open(LinkKind::Mio, None).unwrap().link;
    let mut device = Endpoint::new(link, Arc::new(SystemClock), EndpointConfig::new(hello));
    device.dial(cloud.address());
    let (begin, mut events) = (Instant::now(), Vec::new());
    loop {
        device.poll(Some(Duration::from_millis(20)), &mut events).unwrap();
        for event in events.drain(..) {
            if let Event::Gone { error, .. } = event {
                let GoneError::ClosedByPeer { code, reason, .. } = error else {
                    panic!("{error}");
                };
                return (code, reason);
            }
        }
        assert!(begin.elapsed() < Duration::from_secs(120), "the cloud takes it");
    }
}

#[test]
fn a_cloud_names_what_it_can_not_work_with() {
    let bundles = Bundles::generated(1, 0);
    let cloud = Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap();
    let of_a_device: [(&str, Change); 2] = [
        ("layers 0..4 are wanted, the cloud holds 1..4", |hello| hello.entry_layer = 0),
        ("layers 1..5 are wanted, the cloud holds 1..4", |hello| hello.exit_layer = 5),
    ];
    for (words, change) in COMPARED.into_iter().chain(of_a_device) {
        let own = script::hello(&bundles);
        let mut hello = Hello { role: Role::Device, row_budget: 0, ..own };
        change(&mut hello);
        let (code, reason) = refusal(hello, &cloud);
        assert_eq!(code, CloseCode::Incompatible, "{reason}");
        assert!(reason.contains(words), "{words}: {reason}");
    }
    // The next one is served.
    let engine = Engine::open(device(&bundles, cloud.address())).unwrap();
    assert_eq!(collect(&engine, request()).token_ids.len(), 12);
}

#[test]
fn a_cloud_sends_no_frame_that_is_too_long_for_its_device() {
    const ROWS: u16 = 100;
    let bundles = Bundles::generated(1, 0);
    let cloud = Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap();
    let payload: Vec<u8> = (0..u32::from(ROWS) * 64)
        .flat_map(|index| (index as f32 * 0.37).sin().to_le_bytes())
        .collect();
    let outputs = |frame_bytes_max: u32| {
        let mut hand = Hand::connect_to(&bundles, cloud.address(), |config| {
            config.connection.hello.frame_bytes_max = frame_bytes_max;
        });
        hand.open(1, |open| open.rows_max = 200);
        hand.rows(1, &RowsHead { want: Want::All, ..chain(1, ROWS, 0) }, &[], &payload);
        let (mut rows, mut longest) = (Vec::new(), 0);
        hand.until(|event| {
            let Event::Frame { frame, .. } = event else { return None };
            longest = longest.max(HEADER_BYTES + frame.body.len());
            if let Ok(Message::Output(output)) = Message::decode(frame.kind, &frame.body) {
                let payload = output.payload.chunks_exact(HIDDEN * 4).map(<[u8]>::to_vec);
                rows.extend(output.ids.iter().zip(payload));
            }
            (rows.len() == usize::from(ROWS)).then_some(())
        });
        (rows, longest)
    };
    let (rows, longest) = outputs(script::hello(&bundles).frame_bytes_max);
    assert!(longest > SHORT as usize, "{longest}");
    for limit in [SHORT, 5000, 20_000] {
        let (cut, longest) = outputs(limit);
        assert!(longest <= limit as usize, "{longest} bytes for {limit}");
        assert!(cut == rows, "other rows in frames of {limit}");
    }
}

/// The longest frame that a device sends to a cloud of short frames, the rows that it sends, and
/// the pages that it names.
fn sent_to_short(bundles: &Bundles, prompt: u32, opens: bool) -> (usize, usize, usize) {
    let sent = Arc::new(Mutex::new((0, 0, 0)));
    let seen = sent.clone();
    let hello = Hello { frame_bytes_max: SHORT, ..script::hello(bundles) };
    let cloud = Script::start(hello, move |cloud, event| {
        let Some(Event::Frame { connection, frame }) = event else { return };
        let mut sent = seen.lock().unwrap();
        sent.0 = sent.0.max(HEADER_BYTES + frame.body.len());
        let over = Message::SessionError(SessionError {
            code: SessionErrorCode::Internal,
            text: "enough",
        });
        let answer = match Message::decode(frame.kind, &frame.body).unwrap() {
            Message::Open(open) => {
                sent.2 = open.pages.len();
                if opens { Message::Opened(Opened { pages: 0 }) } else { over }
            }
            Message::Rows(rows) => {
                sent.1 += usize::from(rows.head.count);
                if rows.head.want == Want::None {
                    return;
                }
                over
            }
            other => {
                assert_eq!(other.kind(), Kind::End);
                return;
            }
        };
        cloud.send_message(connection, frame.session, &answer).unwrap();
    });
    let mut config = device(bundles, cloud.address);
    config.wire = Some(Codec::F32);
    let engine = Engine::open(config).unwrap();
    let text = first_error(&engine, Request::tokens(long_prompt(prompt)).max_tokens(1)).to_string();
    assert!(text.contains("enough"), "{text}");
    drop((engine, cloud));
    *sent.lock().unwrap()
}

#[test]
fn a_device_sends_no_frame_that_is_too_long_for_its_cloud() {
    let bundles = Bundles::generated(1, 0);
    let (longest, rows, pages) = sent_to_short(&bundles, 300, true);
    assert_eq!((rows, pages), (300, 9));
    assert!((2000..=SHORT as usize).contains(&longest), "{longest}");
    // 254 names of 16 bytes would be 4,112 bytes with their heads.
    let long = TinyModel { positions: 8192, ..TinyModel::default() };
    let bundles = Bundles::of(&long, 1, 0);
    let (longest, _, pages) = sent_to_short(&bundles, 254 * 32 + 1, false);
    assert!(longest <= SHORT as usize, "{longest}");
    assert_eq!(pages, (SHORT as usize - 32 - 16) / 16);
}
