//! Pages that a cloud keeps: turns of a conversation send their own rows and little else, and
//! names that lie harm nobody.
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::support::hand::{HIDDEN, Hand, chain};
use crate::support::{Bundles, collect, script};
use hat_compute::backend::Backend;
use hat_compute::open;
use hat_engine::options::{Codec, DraftMode, ErrorKind, Message as Says, Processor, Role};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Metrics, Request};
use hat_loader::TinyModel;
use hat_transport::clock::SystemClock;
use hat_transport::conn::FrameSink;
use hat_transport::endpoint::{Endpoint, EndpointConfig, Event};
use hat_transport::link::LinkKind;
use hat_transport::message::{End, Message, Opened, PageId, RowsHead, SessionErrorCode};

/// A long text; how many tokens it has is up to the tokenizer.
fn text_of(letters: usize) -> String {
    (0..letters).map(|index| char::from(b"aeiou, xyz\n"[index * index % 11])).collect()
}

/// One turn of a conversation, compared with what the whole model says to the ids that it has.
fn turn(engine: &Engine, whole: &mut ReferenceRun<impl Backend>, says: &[Says]) -> Metrics {
    let request = |request: Request| request.max_tokens(6).hash_logits().draft(DraftMode::Off);
    let asked = request(Request::conversation(says.to_vec()));
    let ids = engine.prompt_ids(asked.clone()).unwrap();
    let split = collect(engine, asked);
    let (_, expected) = whole.generate(request(Request::tokens(ids)), |_| {}).unwrap();
    assert_eq!(split.token_ids, expected.token_ids);
    assert_eq!(split.logits_blake3, expected.logits_blake3);
    split
}

#[test]
fn later_turns_send_their_own_rows() {
    let bundles = Bundles::of(&TinyModel::default(), 1, 0);
    let engine = Engine::open(EngineConfig::new(bundles.path.join("device"))).unwrap();
    let backend = open::cpu(Processor::Auto, 1).unwrap();
    let mut whole =
        ReferenceRun::open(backend, &bundles.path, None, Codec::default(), 8192).unwrap();
    let mut says = vec![Says::new(Role::User, text_of(1350))];
    let first = turn(&engine, &mut whole, &says);
    assert!(first.timings.prompt_n > 900, "{} tokens", first.timings.prompt_n);
    assert_eq!(first.timings.pages_reused, 0);
    let mut before = first.clone();
    for text in ["a", "so", "be"] {
        says.push(Says::new(Role::Assistant, before.text));
        says.push(Says::new(Role::User, text));
        let next = turn(&engine, &mut whole, &says);
        // All full pages of the turn before; the last token of its answer has no row.
        let rows = before.timings.prompt_n + before.timings.predicted_n - 1;
        assert_eq!(next.timings.pages_reused, rows / 32, "{text}");
        let sent: u32 = next.timings.chunks.iter().sum();
        assert_eq!(sent, next.timings.prompt_n - rows / 32 * 32, "{text}");
        if text == "a" {
            let share = next.timings.bytes_up as f64 / first.timings.bytes_up as f64;
            assert!(share < 0.05, "{share:.3} of {} bytes", first.timings.bytes_up);
        }
        before = next;
    }
}

const NAMES: [PageId; 3] = [[1; 16], [2; 16], [3; 16]];

fn start() -> (Bundles, Cloud) {
    let bundles = Bundles::generated(1, 0);
    let cloud = Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap();
    (bundles, cloud)
}

/// `count` rows of f32 numbers, from row `first` of a path on.
fn numbers(first: u16, count: u16) -> Vec<u8> {
    let number = |row: u16, at: usize| (f32::from(row) + at as f32 * 0.5).sin();
    (first..first + count)
        .flat_map(|row| (0..HIDDEN).flat_map(move |at| number(row, at).to_le_bytes()))
        .collect()
}

fn decided(hand: &mut Hand, session: u32, first: u16, count: u16) -> Vec<u8> {
    let head: RowsHead = chain(u32::from(first) + 1, count, u32::from(first));
    hand.rows(session, &head, &[], &numbers(first, count));
    hand.outputs(session, 1).remove(0).1
}

#[test]
fn a_page_is_found_by_its_name_and_by_rows_of_its_kind_alone() {
    let (bundles, cloud) = start();
    let mut hand = Hand::connect(&bundles, &cloud);
    // 40 rows; names beyond the first page mean nothing.
    hand.open(1, |open| open.rows_max = 200);
    assert_eq!(hand.opened(1), 0);
    let expected = decided(&mut hand, 1, 0, 40);
    hand.end(1, End { commit: 0, pages: &NAMES });
    for (session, entry_layer, codec, pages) in [(2, 2, 0, 0), (3, 1, 4, 0), (4, 1, 0, 1)] {
        hand.open(session, |open| {
            (open.rows_max, open.pages) = (200, &NAMES);
            (open.entry_layer, open.codec) = (entry_layer, codec);
        });
        assert_eq!(hand.opened(session), pages, "layer {entry_layer}, codec {codec}");
    }
    assert_eq!(decided(&mut hand, 4, 32, 8), expected);
    assert_eq!(cloud.counters().pages_reused.load(Ordering::Relaxed), 1);
    // Ids of held rows are taken.
    hand.open(5, |open| (open.rows_max, open.pages) = (200, &NAMES[..1]));
    assert_eq!(hand.opened(5), 1);
    hand.rows(5, &chain(32, 1, 0), &[], &numbers(31, 1));
    assert_eq!(hand.error(5).0, SessionErrorCode::BadShape);
}

#[test]
fn names_of_an_open_prompt_are_found_as_its_rows_run() {
    let (bundles, cloud) = start();
    let mut hand = Hand::connect(&bundles, &cloud);
    hand.open(1, |open| (open.rows_max, open.pages) = (200, &NAMES));
    assert_eq!(hand.opened(1), 0);
    decided(&mut hand, 1, 0, 70);
    // The third page is not full.
    hand.open(2, |open| (open.rows_max, open.pages) = (200, &NAMES));
    assert_eq!(hand.opened(2), 2);
    let expected = decided(&mut hand, 1, 70, 3);
    hand.end(1, End::default());
    decided(&mut hand, 2, 64, 6);
    assert_eq!(decided(&mut hand, 2, 70, 3), expected);
}

#[test]
fn lies_about_pages_end_the_session_that_lies() {
    let (bundles, cloud) = start();
    let mut hand = Hand::connect(&bundles, &cloud);
    // 96 positions have two full pages without the last row.
    hand.open(1, |open| (open.rows_max, open.pages) = (96, &NAMES));
    let (code, text) = hand.error(1);
    assert_eq!(code, SessionErrorCode::BadShape);
    assert!(text.contains("at most 2"), "{text}");
    hand.open(2, |open| open.rows_max = 200);
    decided(&mut hand, 2, 0, 40);
    hand.end(2, End { commit: 41, pages: &NAMES });
    assert_eq!(hand.error(2).0, SessionErrorCode::BadCommit);
    // One name for all pages, then others for the same pages.
    hand.open(3, |open| (open.rows_max, open.pages) = (200, &[[9; 16]; 3]));
    decided(&mut hand, 3, 0, 100);
    hand.end(3, End { commit: 0, pages: &NAMES });
    hand.open(4, |open| (open.rows_max, open.pages) = (200, &[[9; 16], [2; 16], [9; 16]]));
    assert_eq!(hand.opened(4), 3);
    // The honest are not harmed: their names are others.
    hand.open(5, |open| open.rows_max = 200);
    hand.open(6, |open| (open.rows_max, open.pages) = (200, &[[7; 16]]));
    assert_eq!(decided(&mut hand, 5, 0, 40), decided(&mut hand, 6, 0, 40));
}

/// A cloud that says that it has what nobody named: the request ends, and says why.
#[test]
fn a_cloud_that_claims_pages_is_found_out() {
    let bundles = Bundles::generated(1, 0);
    let hello = script::hello(&bundles);
    let any_port = Some("127.0.0.1:0".parse().unwrap());
    let link = hat_transport::link::open(LinkKind::Mio, any_port).unwrap().link;
    let mut cloud = Endpoint::new(link, Arc::new(SystemClock), EndpointConfig::new(hello));
    let address = cloud.local_address().unwrap().to_string();
    let config = EngineConfig::new(bundles.path.join("device")).cloud(address);
    let engine = Engine::open(config).unwrap();
    let prompt = crate::support::long_prompt(100);
    let mut generation = engine.generate(Request::tokens(prompt)).unwrap();
    let (start, mut events) = (Instant::now(), Vec::new());
    let error = loop {
        match generation.try_next() {
            Some(Err(error)) => break error,
            event => assert!(event.is_none(), "{event:?}"),
        }
        assert!(start.elapsed() < crate::support::PATIENCE, "nobody minds");
        cloud.poll(Some(Duration::from_millis(5)), &mut events).unwrap();
        for event in events.drain(..) {
            if let Event::Frame { connection, frame } = event
                && let Ok(Message::Open(open)) = Message::decode(frame.kind, &frame.body)
            {
                assert_eq!(open.pages.len(), 3);
                let opened = Message::Opened(Opened { pages: 4 });
                cloud.send_message(connection, frame.session, &opened).unwrap();
            }
        }
    };
    assert_eq!(error.kind(), ErrorKind::Peer);
    assert!(error.to_string().contains("4 pages of the 3"), "{error}");
}
