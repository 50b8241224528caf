//! One test for each way of being wrong, and round trips.

use super::*;
use crate::codec::Codec;
use proptest::prelude::*;

fn encode(message: &Message<'_>) -> Vec<u8> {
    let mut body = vec![0; message.encoded_len()];
    assert_eq!(message.encode(&mut body), body.len());
    body
}

fn hello() -> Hello {
    Hello {
        features: 3,
        link: LinkState { id: *b"0123456789abcdef", epoch: 9, recv_next: 11 },
        model_id: [5; 32],
        arithmetic_id: 1,
        hidden_size: 576,
        entry_layer: 2,
        exit_layer: 30,
        codecs: 1 << Codec::F16.id(),
        row_budget: 256,
        rows_pending_max: 64,
        kv: KvPages { kv_type: KV_F16, page_size: 32 },
        stages: 4,
        ..Hello::new(Role::Cloud)
    }
}

const PAGES: [PageId; 3] = [[1; 16], [2; 16], [3; 16]];

const ROWS: RowsHead = RowsHead {
    first_id: 10,
    count: 3,
    tree: true,
    more: true,
    decided: false,
    want: Want::All,
    parent: 9,
    commit: 8,
};

fn rows() -> Vec<u8> {
    let mut body = vec![7; ROWS.payload_start() + 6];
    assert_eq!(ROWS.encode(&[9, 10, 10], &mut body), 28);
    body
}

fn output() -> Vec<u8> {
    let arrivals = Arrivals { bytes: 4, us: 5 };
    let head = OutputHead { count: 2, queue_us: 1, step_us: 2, step_rows: 3, arrivals };
    let mut body = vec![7; head.payload_start() + 4];
    assert_eq!(head.encode(&[10, 12], &mut body), 32);
    body
}

fn patched(mut body: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    body[offset..offset + bytes.len()].copy_from_slice(bytes);
    body
}

/// The field that a wrong value is found in.
fn wrong_field(kind: Kind, body: &[u8]) -> &'static str {
    match Message::decode(kind, body) {
        Err(MessageError::Value { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_message_round_trips_and_refuses_other_lengths() {
    let (rows, output) = (rows(), output());
    let open = Open {
        entry_layer: 2,
        exit_layer: 30,
        codec: Codec::F16.id(),
        kv_type: KV_F16,
        arithmetic_id: 1,
        rows_max: 2048,
        pages: &PAGES,
    };
    let arrivals = Arrivals { bytes: 65_568, us: 8700 };
    let computed =
        Computed { first_id: 65, count: 64, queue_us: 120, step_us: 7000, step_rows: 90, arrivals };
    let error = SessionError { code: SessionErrorCode::BadParent, text: "row 7 is unknown" };
    let messages = [
        Message::Hello(hello()),
        Message::Close(Close { code: CloseCode::Version, reason: "2..=3, not 1..=1" }),
        Message::Open(open),
        Message::Opened(Opened { pages: 2 }),
        Message::Open(Open { pages: &[], ..open }),
        Message::decode(Kind::Rows, &rows).unwrap(),
        Message::decode(Kind::Output, &output).unwrap(),
        Message::Commit(Commit { row: 5 }),
        Message::Cancel,
        Message::Cancelled,
        Message::End(End { commit: 9, pages: &PAGES[1..] }),
        Message::End(End::default()),
        Message::Ended,
        Message::Dropped(Dropped { first_id: 4, count: 2 }),
        Message::SessionError(error),
        Message::Busy(Busy { retry_after_ms: 250 }),
        Message::Computed(computed),
    ];
    messages.iter().for_each(check_lengths);
    for kind in [Kind::Ack, Kind::Ping, Kind::Pong] {
        assert_eq!(Message::decode(kind, &[]), Err(MessageError::Kind { kind }));
    }
}

/// `message` comes back from its bytes, and from no fewer and no more of them.
fn check_lengths(message: &Message<'_>) {
    let body = encode(message);
    assert_eq!(Message::decode(message.kind(), &body).unwrap(), *message);
    let text = matches!(message.kind(), Kind::Close | Kind::SessionError);
    let fixed = match message {
        Message::Rows(rows) => rows.head.payload_start() + 1,
        Message::Output(output) => output.head.payload_start() + 1,
        _ if text => 2,
        _ => body.len(),
    };
    for short in 0..fixed {
        let error = Message::decode(message.kind(), &body[..short]).unwrap_err();
        let named = matches!(error, MessageError::Short { .. } | MessageError::Payload { .. });
        assert!(named, "{message:?} at {short}: {error}");
    }
    let long = [&body[..], &[0]].concat();
    match Message::decode(message.kind(), &long) {
        Ok(longer) => assert!(text || longer == *message && longer.kind() == Kind::Hello),
        Err(error) => assert!(
            matches!(error, MessageError::Trailing { bytes: 1 } | MessageError::Payload { .. }),
            "{error}"
        ),
    }
}

#[test]
fn wrong_hellos() {
    let body = encode(&Message::Hello(hello()));
    for (offset, bytes, field) in [
        (0, &b"http"[..], "magic"),
        (4, &[2, 0], "min_version"),
        (44, &[0; 4], "frame_bytes_max"),
        (88, &[31, 0], "entry_layer"),
        (105, &[2], "role"),
    ] {
        assert_eq!(wrong_field(Kind::Hello, &patched(body.clone(), offset, bytes)), field);
    }
}

#[test]
fn wrong_rows() {
    let max = u32::MAX.to_le_bytes();
    for (offset, bytes, field) in [
        (0, &[0; 4][..], "first_id"),
        (0, &max, "first_id"),
        (4, &[0; 2], "count"),
        (6, &[8], "flags"),
        (6, &[5], "flags"),
        (7, &[3], "output"),
        (8, &[10], "parent"),
        (12, &[10], "commit"),
        (16, &[8], "parents[0]"),
        (20, &[11], "parents"),
    ] {
        assert_eq!(wrong_field(Kind::Rows, &patched(rows(), offset, bytes)), field);
    }
    let error = Message::decode(Kind::Rows, &rows()[..33]).unwrap_err();
    assert_eq!(error, MessageError::Payload { bytes: 5, rows: 3 });
    let error = Message::decode(Kind::Rows, &rows()[..28]).unwrap_err();
    assert_eq!(error, MessageError::Payload { bytes: 0, rows: 3 });
}

#[test]
fn wrong_outputs_and_small_messages() {
    assert_eq!(wrong_field(Kind::Output, &patched(output(), 0, &[0; 2])), "count");
    assert_eq!(wrong_field(Kind::Output, &patched(output(), 2, &[1])), "reserved");
    assert_eq!(wrong_field(Kind::Output, &patched(output(), 24, &[0; 4])), "ids");
    assert_eq!(wrong_field(Kind::Commit, &[0; 4]), "row");
    for kind in [Kind::Dropped, Kind::Computed] {
        assert_eq!(wrong_field(kind, &[0, 0, 0, 0, 1, 0]), "first_id");
        assert_eq!(wrong_field(kind, &[1, 0, 0, 0, 0, 0]), "count");
        assert_eq!(wrong_field(kind, &[255, 255, 255, 255, 2, 0]), "first_id");
    }
    assert_eq!(wrong_field(Kind::SessionError, &[99, 0]), "code");
    let turned = [3, 0, 2, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(wrong_field(Kind::Open, &turned), "entry_layer");
    assert_eq!(wrong_field(Kind::End, &[0, 0, 0, 0, 0, 16]), "pages");
    let error = Message::decode(Kind::End, &[0, 0, 0, 0, 255, 15]).unwrap_err();
    assert_eq!(error, MessageError::Short { field: "pages", needed: 65_520, left: 0 });
    let long = [&[1, 0][..], &[b'a'; TEXT_BYTES_MAX + 1]].concat();
    assert_eq!(wrong_field(Kind::SessionError, &long), "text");
    assert_eq!(wrong_field(Kind::Close, &long), "reason");
    let error = Message::decode(Kind::Close, &[0, 0, 0xff]).unwrap_err();
    assert_eq!(error, MessageError::Text { field: "reason" });
}

#[test]
fn long_texts_are_cut_between_characters() {
    let text = "\u{e4}".repeat(400);
    let error = SessionError { code: SessionErrorCode::Internal, text: &text };
    let body = encode(&Message::SessionError(error));
    assert_eq!(body.len(), 2 + TEXT_BYTES_MAX);
    assert!(Message::decode(Kind::SessionError, &body).is_ok());
}

#[test]
fn versions_meet_at_the_newest_common_one() {
    let range = |oldest, newest| Hello { versions: (oldest, newest), ..hello() };
    assert_eq!(range(1, 3).common_version(&range(2, 5)), Some(3));
    assert_eq!(range(1, 1).common_version(&range(1, 1)), Some(1));
    assert_eq!(range(1, 2).common_version(&range(3, 4)), None);
    assert_eq!(range(3, 4).common_version(&range(1, 2)), None);
}

#[test]
fn parents_of_chains_and_trees() {
    let body = rows();
    let Ok(Message::Rows(tree)) = Message::decode(Kind::Rows, &body) else { panic!() };
    assert_eq!(tree.parents_of_rows().collect::<Vec<_>>(), [9, 10, 10]);
    let chain = Rows { head: RowsHead { tree: false, ..ROWS }, parents: Ids::default(), ..tree };
    assert_eq!(chain.parents_of_rows().collect::<Vec<_>>(), [9, 10, 11]);
}

/// The first byte chooses the kind, the rest is the body. What decodes encodes to the same bytes.
fn decode_and_encode(data: &[u8]) {
    let (number, body) = data.split_first().unwrap();
    let kind = Kind::ALL[usize::from(*number) % Kind::ALL.len()];
    let Ok(message) = Message::decode(kind, body) else { return };
    assert_eq!(message.kind(), kind);
    let same = if kind == Kind::Hello { &body[..Hello::BYTES] } else { body };
    assert_eq!(encode(&message), same);
}

proptest! {
    #[test]
    fn no_bytes_break_a_message(
        kind in any::<u8>(),
        noise in prop::collection::vec(any::<u8>(), 0..200),
        small in prop::collection::vec(0u8..4, 0..200),
        flip in any::<prop::sample::Index>(),
        bits in 0u8..4,
    ) {
        let end = encode(&Message::End(End { commit: 9, pages: &PAGES }));
        for body in [noise, small, rows(), output(), encode(&Message::Hello(hello())), end] {
            let mut data = [&[kind][..], &body].concat();
            let at = flip.index(data.len());
            data[at] ^= bits;
            decode_and_encode(&data);
        }
    }
}

#[test]
fn close_codes_are_of_two_kinds() {
    use CloseCode::{
        Done, Incompatible, Internal, Other, Overload, Protocol, ShuttingDown, Version,
    };
    for code in [Done, Overload, ShuttingDown, Internal, Other(77)] {
        assert!(!code.is_final(), "{code:?}");
    }
    for code in [Protocol, Version, Incompatible] {
        assert!(code.is_final(), "{code:?}");
    }
}
