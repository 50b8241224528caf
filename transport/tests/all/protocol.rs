//! `docs/PROTOCOL.md` against the code: its tables of numbers, and its example byte by byte.
use std::collections::BTreeMap;

use hat_transport::codec::Codec;
use hat_transport::frame::{HEADER_BYTES, Header, Kind, Priority};
use hat_transport::message::{
    Arrivals, Close, CloseCode, End, Hello, KV_F16, KvPages, LinkState, Message, Open, Output,
    OutputHead, PAGE_ID_BYTES, Role, Rows, RowsHead, SessionErrorCode, Want,
};
use hat_transport::pool::{Pool, PoolConfig};

const DOCUMENT: &str = include_str!("../../../docs/PROTOCOL.md");

/// Bytes of each block that begins with three backquotes and `hex NAME`; `;` begins a comment.
fn examples() -> BTreeMap<&'static str, Vec<u8>> {
    let mut blocks = BTreeMap::new();
    for block in DOCUMENT.split("```hex ").skip(1) {
        let (name, rest) = block.split_once('\n').unwrap();
        let (text, _) = rest.split_once("```").unwrap();
        let digits: Vec<u8> = text
            .lines()
            .flat_map(|line| line.split(';').next().unwrap().bytes())
            .filter(|byte| !byte.is_ascii_whitespace())
            .collect();
        let pairs = digits.chunks_exact(2);
        let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        assert!(blocks.insert(name, pairs.map(byte).collect()).is_none(), "{name} twice");
    }
    blocks
}

/// Rows `| number | name | ..` of the table under a heading.
fn table(heading: &str) -> BTreeMap<u16, String> {
    let (_, rest) = DOCUMENT.split_once(&format!("\n### {heading}\n")).unwrap();
    let section = rest.split("\n#").next().unwrap();
    let cells = |line: &'static str| line.split('|').map(str::trim).collect::<Vec<_>>();
    section
        .lines()
        .map(cells)
        .filter_map(|cells| Some((cells.get(1)?.parse().ok()?, cells.get(2)?.to_string())))
        .collect()
}

/// `SessionError` as `SESSION_ERROR`.
fn shout(name: impl std::fmt::Debug) -> String {
    let mut shouted = String::new();
    for letter in format!("{name:?}").chars() {
        if letter.is_uppercase() && !shouted.is_empty() {
            shouted.push('_');
        }
        shouted.extend(letter.to_uppercase());
    }
    shouted
}

fn header(kind: Kind, session: u32, priority: Priority, body: &[u8]) -> Header {
    Header {
        len: body.len() as u32,
        kind: kind as u8,
        flags: 0,
        priority,
        version: 1,
        session,
        body_crc: crc(body),
        seq: 0,
        ack: 0,
        credit: 4 << 20,
    }
}

/// CRC-32C, bit by bit: another way than the crate's.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1)))
    })
}

fn body(message: &Message<'_>) -> Vec<u8> {
    let mut body = vec![0; message.encoded_len()];
    message.encode(&mut body);
    body
}

fn hello() -> Vec<u8> {
    body(&Message::Hello(Hello {
        link: LinkState { id: *b"a link's own id.", ..LinkState::default() },
        model_id: [0xab; 32],
        arithmetic_id: 1,
        hidden_size: 2,
        entry_layer: 2,
        exit_layer: 30,
        codecs: 1 << Codec::F32.id() | 1 << Codec::F16.id(),
        rows_pending_max: 64,
        kv: KvPages { kv_type: KV_F16, page_size: 32 },
        ..Hello::new(Role::Device)
    }))
}

fn open() -> Vec<u8> {
    body(&Message::Open(Open {
        entry_layer: 2,
        exit_layer: 30,
        codec: Codec::F16.id(),
        kv_type: KV_F16,
        arithmetic_id: 1,
        rows_max: 512,
        pages: &[*b"a page's own id."],
    }))
}

/// A row of two f16 numbers: 1 and -2, with exponent 0.
const ROW: [u8; 5] = [0x8e, 0x00, 0x3c, 0x00, 0xc0];

fn rows() -> Vec<u8> {
    let head = RowsHead {
        first_id: 4,
        count: 3,
        tree: true,
        more: false,
        decided: false,
        want: Want::All,
        parent: 3,
        commit: 3,
    };
    let mut body = vec![0; head.payload_start()];
    head.encode(&[3, 4, 4], &mut body);
    body.extend(ROW.repeat(3));
    body
}

fn output() -> Vec<u8> {
    let arrivals = Arrivals { bytes: 65_568, us: 8742 };
    let head = OutputHead { count: 1, queue_us: 150, step_us: 2100, step_rows: 12, arrivals };
    let mut body = vec![0; head.payload_start()];
    head.encode(&[6], &mut body);
    body.extend(ROW);
    body
}

fn close() -> Vec<u8> {
    let (code, reason) = (CloseCode::Done, "done");
    body(&Message::Close(Close { code, reason }))
}

/// The frames of the example.
fn frames() -> Vec<(&'static str, Header, Vec<u8>)> {
    let control = |name, kind, session, body: Vec<u8>| {
        (name, header(kind, session, Priority::Control, &body), body)
    };
    let verify = |name, kind, seq, ack, body: Vec<u8>| {
        let header = header(kind, 7, Priority::Verify, &body);
        (name, Header { seq, ack, ..header }, body)
    };
    let mut frames = vec![
        control("hello", Kind::Hello, 0, hello()),
        control("open", Kind::Open, 7, open()),
        verify("rows", Kind::Rows, 2, 1, rows()),
        verify("output", Kind::Output, 1, 3, output()),
        control("close", Kind::Close, 0, close()),
    ];
    frames[4].1.credit = 0;
    frames
}

#[test]
fn the_example_is_what_the_code_says() {
    let examples = examples();
    let frames = frames();
    assert_eq!(examples.len(), frames.len());
    for (name, header, body) in frames {
        let wire = [&header.encode()[..], &body].concat();
        let found = examples.get(name).cloned().unwrap_or_default();
        let hex: Vec<String> = wire.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, wire, "{name} should be\n{}", hex.join(" "));
        let decoded = Header::decode(found.first_chunk::<HEADER_BYTES>().unwrap()).unwrap();
        assert_eq!(decoded, header);
        let message = Message::decode(Kind::from_wire(header.kind).unwrap(), &found[32..]).unwrap();
        match message {
            Message::Rows(Rows { parents, .. }) => {
                assert_eq!(parents.iter().collect::<Vec<_>>(), [3, 4, 4]);
            }
            Message::Output(Output { ids, .. }) => assert_eq!(ids.iter().collect::<Vec<_>>(), [6]),
            _ => {}
        }
    }
}

#[test]
fn the_tables_are_what_the_code_says() {
    let kinds: BTreeMap<u16, String> =
        Kind::ALL.iter().map(|kind| (*kind as u16, shout(kind))).collect();
    assert_eq!(table("Kinds"), kinds);

    let codes = (0..7).map(|code| (code, shout(CloseCode::from_wire(code)))).collect();
    assert_eq!(table("Close codes"), codes);
    assert_eq!(CloseCode::from_wire(7), CloseCode::Other(7));

    let errors: BTreeMap<u16, String> =
        SessionErrorCode::ALL.iter().map(|code| (*code as u16, shout(code))).collect();
    assert_eq!(table("Session errors"), errors);

    let codecs = Codec::ALL.map(|codec| (u16::from(codec.id()), codec.name().to_owned()));
    assert_eq!(table("Codecs"), BTreeMap::from(codecs));
}

/// The document's sizes of bodies: `OPEN ... (14 bytes)` and so on.
#[test]
fn the_sizes_are_what_the_code_says() {
    assert!(DOCUMENT.contains(&format!("HELLO ({} bytes", Hello::BYTES)));
    assert!(DOCUMENT.contains(&format!("OPEN ({} bytes", open().len() - PAGE_ID_BYTES)));
    assert!(
        DOCUMENT.contains(&format!("END ({} bytes", Message::End(End::default()).encoded_len()))
    );
    assert!(DOCUMENT.contains(&format!("ROWS ({} bytes", RowsHead::BYTES)));
    assert!(DOCUMENT.contains(&format!("OUTPUT ({} bytes", OutputHead::BYTES)));
    // A pool buffer holds what the document says that a frame is at most.
    let pool = Pool::new(PoolConfig { small: 0, large: 1 });
    assert!(DOCUMENT.contains("0..=65536"));
    assert_eq!(pool.take(65_536).unwrap().wire().len(), 65_568);
}
