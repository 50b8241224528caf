//! Peers that speak something else, too little, too much, or nothing at all.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use hat_transport::conn::{FrameSink, ProtocolError, Refusal};
use hat_transport::endpoint::{Event, GoneError};
use hat_transport::frame::{HEADER_BYTES, Header, Kind, Priority};
use hat_transport::link::LinkKind;
use hat_transport::message::{CloseCode, End, Hello, LinkState, Message, Role};

use super::pair::{Pair, config, kinds, take, take_down, take_frame, take_gone, take_up};

/// A frame made by hand.
fn frame(kind: Kind, session: u32, seq: u32, body: &[u8]) -> Vec<u8> {
    let header = Header {
        len: body.len() as u32,
        kind: kind as u8,
        flags: 0,
        priority: Priority::Control,
        version: 1,
        session,
        body_crc: crc(body),
        seq,
        ack: 0,
        credit: 0,
    };
    [&header.encode()[..], body].concat()
}

/// CRC-32C, bit by bit: another way than the crate's.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1)))
    })
}

fn hello(hello: &Hello) -> Vec<u8> {
    let mut body = [0; Hello::BYTES];
    Message::Hello(*hello).encode(&mut body);
    frame(Kind::Hello, 0, 0, &body)
}

/// HELLO of a device that has another link.
fn another_link() -> Hello {
    let link = LinkState { id: [3; 16], ..LinkState::default() };
    Hello { link, ..Hello::new(Role::Device) }
}

fn assert_serves(pair: &mut Pair) {
    pair.device.send_message(pair.dialled, 4, &Message::End(End::default())).unwrap();
    assert_eq!(pair.until(|pair| take_frame(&mut pair.cloud_events)).session, 4);
}

#[test]
fn another_protocol_is_refused_and_others_are_served() {
    for kind in kinds().filter(|kind| *kind != LinkKind::Memory) {
        let mut pair = Pair::new(kind);
        pair.up();
        let mut unknown = TcpStream::connect(pair.cloud.local_address().unwrap()).unwrap();
        let address = unknown.local_addr().unwrap();
        unknown.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let gone = pair.until(|pair| take_gone(&mut pair.cloud_events));
        assert!(matches!(gone, GoneError::NotHat { .. }), "{gone:?}");
        let text = gone.to_string();
        assert_eq!(text, format!("{address} is not speaking hat: it asked like HTTP"));
        // The socket is closed without an answer.
        unknown.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        pair.poll();
        assert!(matches!(unknown.read(&mut [0; 8]), Ok(0) | Err(_)));
        assert_serves(&mut pair);
    }
}

#[test]
fn a_device_that_dials_another_protocol_says_so() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let mut pair = Pair::new(LinkKind::Mio);
    let (mut device, mut events) = (pair.device, Vec::new());
    device.close(pair.dialled, CloseCode::Done, "");
    device.poll(Some(Duration::ZERO), &mut events).unwrap();
    assert_eq!(take_gone(&mut events), Some(GoneError::Closed));
    device.dial(address);
    let answer = std::thread::spawn(move || {
        let (mut peer, _) = server.accept().unwrap();
        peer.write_all(b"SSH-2.0-OpenSSH_9.6 a banner of more than thirty-two bytes\r\n").unwrap();
        peer.read_to_end(&mut Vec::new())
    });
    pair.device = device;
    pair.device_events = events;
    let gone = pair.until(|pair| take_gone(&mut pair.device_events));
    let text = gone.to_string();
    assert!(text.starts_with(&format!("{address} is not speaking hat")), "{text}");
    drop(pair);
    let _ = answer.join().unwrap();
}

#[test]
fn a_device_that_dials_a_web_server_says_so() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let answer = std::thread::spawn(move || {
        let (mut peer, _) = server.accept().unwrap();
        peer.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").unwrap();
        let _ = peer.read_to_end(&mut Vec::new()); // closed or reset
    });
    let mut pair = Pair::new(LinkKind::Mio);
    pair.device.close(pair.dialled, CloseCode::Done, "");
    let closed = pair.until(|pair| take_gone(&mut pair.device_events));
    assert_eq!((closed.is_final(), closed), (false, GoneError::Closed));
    pair.device.dial(address);
    let gone = pair.until(|pair| take_gone(&mut pair.device_events));
    let expected = format!("{address} is not speaking hat: it answered like HTTP");
    assert_eq!((gone.is_final(), gone.to_string()), (true, expected));
    drop(pair);
    answer.join().unwrap();
}

#[test]
fn a_peers_words_are_shown_without_their_controls() {
    let mut pair = Pair::new(LinkKind::Memory);
    let (cloud_id, _) = pair.up();
    let words = "\u{1b}[2Jbye\r\nERROR forged \u{202e}txet";
    pair.cloud.close(cloud_id, CloseCode::ShuttingDown, words);
    let gone = pair.until(|pair| take_gone(&mut pair.device_events));
    let shown = gone.to_string();
    assert!(shown.ends_with("\\u{1b}[2Jbye\\u{d}\\u{a}ERROR forged \\u{202e}txet"), "{shown}");
    assert!(!gone.is_final());
    // Its CLOSE has gone out: the link could be dropped now.
    assert!(pair.cloud.has_sent_close());
}

#[test]
fn silence_is_not_waited_for() {
    let mut cloud = config(Role::Cloud);
    cloud.connection.hello_within = Duration::from_millis(40);
    let mut pair = Pair::with(LinkKind::Mio, cloud, config(Role::Device));
    pair.up();
    let silent = TcpStream::connect(pair.cloud.local_address().unwrap()).unwrap();
    let address = silent.local_addr().unwrap();
    let gone = pair.until(|pair| take_gone(&mut pair.cloud_events));
    assert_eq!(gone, GoneError::HelloLate { address });
    assert_serves(&mut pair);
}

#[test]
fn versions_that_do_not_meet_are_named_at_both_ends() {
    let mut device = config(Role::Device);
    device.connection.hello.versions = (2, 3);
    let mut pair = Pair::with(LinkKind::Mio, config(Role::Cloud), device);
    let gone = pair.until(|pair| take_gone(&mut pair.device_events));
    let GoneError::ClosedByPeer { code, reason, .. } = gone else { panic!("{gone}") };
    assert_eq!(code, CloseCode::Version);
    assert!(reason.contains("(1, 1)") && reason.contains("(2, 3)"), "{reason}");
    let gone = pair.until(|pair| take_gone(&mut pair.cloud_events));
    let error = ProtocolError::Version { ours: (1, 1), theirs: (2, 3) };
    assert!(matches!(&gone, GoneError::Protocol { error: found, .. } if *found == error));
}

#[test]
fn one_device_too_many_is_told_so() {
    let mut cloud = config(Role::Cloud);
    cloud.connections_max = 1;
    let mut pair = Pair::with(LinkKind::Mio, cloud, config(Role::Device));
    pair.up();
    let other = another_link();
    let mut peer = TcpStream::connect(pair.cloud.local_address().unwrap()).unwrap();
    peer.write_all(&hello(&other)).unwrap();
    let gone = pair.until(|pair| take_gone(&mut pair.cloud_events));
    assert!(matches!(gone, GoneError::Overload { limit: 1, .. }), "{gone}");
    let mut header = [0; HEADER_BYTES];
    peer.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    (0..5).for_each(|_| pair.poll());
    peer.read_exact(&mut header).unwrap();
    assert_eq!(Header::decode(&header).unwrap().kind, Kind::Close as u8);
    assert_serves(&mut pair);
    // Once the first device is away, its place can be had.
    pair.device.close(pair.dialled, CloseCode::Done, "");
    drop(std::mem::replace(&mut pair.device, Pair::new(LinkKind::Memory).device));
    let mut peer = TcpStream::connect(pair.cloud.local_address().unwrap()).unwrap();
    pair.until(|pair| take_down(&mut pair.cloud_events));
    peer.write_all(&hello(&other)).unwrap();
    pair.until(|pair| take_up(&mut pair.cloud_events));
    assert_eq!(take_gone(&mut pair.cloud_events), Some(GoneError::GraceOver));
}

#[test]
fn a_cut_frame_and_a_closed_socket_are_no_end() {
    let mut pair = Pair::new(LinkKind::Mio);
    pair.up();
    let other = another_link();
    let mut peer = TcpStream::connect(pair.cloud.local_address().unwrap()).unwrap();
    peer.write_all(&hello(&other)).unwrap();
    peer.write_all(&frame(Kind::Rows, 1, 0, &[0; 500])[..200]).unwrap();
    pair.until(|pair| take_up(&mut pair.cloud_events));
    drop(peer);
    pair.until(|pair| take_down(&mut pair.cloud_events));
    assert!(take_gone(&mut pair.cloud_events).is_none(), "it may come back");
    assert_serves(&mut pair);
}

#[test]
fn a_second_socket_of_one_link_fences_the_first() {
    // Nobody is taken for dead within this test: nothing but the fence closes a socket.
    let patient = |role| {
        let never = Duration::from_secs(3600);
        let mut config = config(role);
        (config.connection.ping_after, config.connection.dead_after) = (never, never);
        config
    };
    let mut pair = Pair::with(LinkKind::Mio, patient(Role::Cloud), patient(Role::Device));
    let said_by = |events: &mut Vec<Event>| {
        let up = |event: &Event| matches!(event, Event::Up { .. });
        take(events, up, |event| match event {
            Event::Up { hello, .. } => hello,
            _ => unreachable!(),
        })
    };
    let mine = pair.until(|pair| said_by(&mut pair.cloud_events));
    let epoch = pair.until(|pair| said_by(&mut pair.device_events)).link.epoch;
    let again = Hello { link: LinkState { epoch, ..mine.link }, ..mine };
    let mut peer = TcpStream::connect(pair.cloud.local_address().unwrap()).unwrap();
    peer.write_all(&hello(&again)).unwrap();
    let reason = pair.until(|pair| take_down(&mut pair.cloud_events));
    assert!(reason.contains("another socket"), "{reason}");
    let (_, resumed) = pair.until(|pair| take_up(&mut pair.cloud_events));
    assert!(resumed);
    // The first socket is closed; its device comes back and fences the other in turn.
    pair.device_is_down();
    pair.until(|pair| take_up(&mut pair.device_events));
}

#[test]
fn a_peer_that_breaks_the_protocol_is_told_why() {
    let mut pair = Pair::new(LinkKind::Mio);
    pair.up();
    let other = another_link();
    let mut peer = TcpStream::connect(pair.cloud.local_address().unwrap()).unwrap();
    peer.write_all(&hello(&other)).unwrap();
    peer.write_all(&frame(Kind::Rows, 1, 7, b"rows")).unwrap();
    let gone = pair.until(|pair| take_gone(&mut pair.cloud_events));
    let gap = ProtocolError::Gap { expected: 0, got: 7 };
    assert!(matches!(&gone, GoneError::Protocol { error, .. } if *error == gap), "{gone}");
    peer.set_nonblocking(true).unwrap();
    let (mut answer, mut piece) = (String::new(), [0; 4000]);
    pair.until(|_| {
        let count = peer.read(&mut piece).unwrap_or(0);
        answer.push_str(&String::from_utf8_lossy(&piece[..count]));
        answer.contains("frame 7 came, expected 0").then_some(())
    });
    assert_serves(&mut pair);
}

#[test]
fn a_closed_connection_takes_nothing() {
    let mut pair = Pair::new(LinkKind::Memory);
    pair.up();
    pair.device.close(pair.dialled, CloseCode::Done, "enough");
    let error =
        pair.device.send_message(pair.dialled, 1, &Message::End(End::default())).unwrap_err();
    assert_eq!(error.refusal, Refusal::Gone);
    assert!(pair.device.traffic(pair.dialled).is_none());
}
