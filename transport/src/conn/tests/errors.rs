//! Each way of breaking the protocol.

use super::*;
use crate::frame::HeaderError;

/// Error of a cloud that is up on bytes of its device.
fn error(bytes: &[u8]) -> ProtocolError {
    let mut pair = Pair::up();
    pair.cloud.handle_bytes(pair.now, bytes).unwrap_err()
}

/// Error of a cloud on the first bytes of a socket.
fn hello_error(bytes: &[u8]) -> ProtocolError {
    let mut cloud = cloud(EPOCH);
    let now = Instant::now();
    cloud.handle_connected(now);
    cloud.handle_bytes(now, bytes).unwrap_err()
}

#[test]
fn each_protocol_error() {
    let gap = ProtocolError::Gap { expected: 0, got: 1 };
    assert_eq!(error(&frame(|header| header.seq = 1, b"x")), gap);
    let ahead = ProtocolError::AckAhead { ack: 1, next: 0 };
    assert_eq!(error(&frame(|header| header.ack = 1, b"x")), ahead);
    let direction = ProtocolError::Direction { kind: Kind::Output };
    assert_eq!(error(&frame(|header| header.kind = Kind::Output as u8, b"x")), direction);
    let version = ProtocolError::FrameVersion { expected: 1, got: 2 };
    assert_eq!(error(&frame(|header| header.version = 2, b"x")), version);
    assert_eq!(error(&hello(|_| {})), ProtocolError::SecondHello);
    let ping = frame(|header| (header.kind, header.session) = (Kind::Ping as u8, 0), b"short");
    assert!(matches!(error(&ping), ProtocolError::Message { kind: Kind::Ping, .. }));
    assert!(matches!(error(&[0; 64]), ProtocolError::Frame(_)));
    let mut greedy = Vec::new();
    for seq in 0..3 {
        greedy.extend(frame(|header| header.seq = seq, &[0; BODY_BYTES_MAX]));
    }
    let offset = 3 * FRAME_BYTES_MAX as u32;
    assert_eq!(error(&greedy), ProtocolError::Credit { offset, credit: WINDOW as u32 });
}

#[test]
fn each_hello_error() {
    let none = ProtocolError::NoHello { kind: Kind::Rows as u8 };
    assert_eq!(hello_error(&frame(|_| {}, b"x")), none);
    let version = ProtocolError::Version { ours: (1, 1), theirs: (2, 3) };
    let newer = hello(|hello| hello.versions = (2, 3));
    assert_eq!(hello_error(&newer), version);
    assert_eq!(version.close_code(), CloseCode::Version);
    let text = version.to_string();
    assert!(text.contains("(1, 1)") && text.contains("(2, 3)"), "{text}");
    let role = ProtocolError::Role { role: Role::Cloud };
    assert_eq!(hello_error(&hello(|hello| hello.role = Role::Cloud)), role);
    assert_eq!(hello_error(&hello(|hello| hello.link.id[0] = 0)), ProtocolError::Link);
    // An unknown peer does not get a large buffer by announcing a large frame.
    let long = frame(|header| (header.kind, header.session) = (1, 0), &[0; 2000]);
    let length = HeaderError::Length { len: 2000, max: 1024 };
    assert_eq!(hello_error(&long), ProtocolError::Frame(length.into()));
    let bad = hello(|hello| hello.frame_bytes_max = 1);
    assert!(matches!(hello_error(&bad), ProtocolError::Message { kind: Kind::Hello, .. }));
    let replay = ProtocolError::Replay { recv_next: 3, oldest: 0, next: 0 };
    let resumes = hello(|hello| (hello.link.epoch, hello.link.recv_next) = (EPOCH, 3));
    assert_eq!(hello_error(&resumes), replay);
}
