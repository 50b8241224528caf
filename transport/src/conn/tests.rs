//! Rules of the connection, one by one; `tests/all/pair.rs` has them all at once.

mod errors;

use std::time::{Duration, Instant};

use super::*;
use crate::frame::{BODY_BYTES_MAX, FLAG_IGNORABLE, FRAME_BYTES_MAX};
use crate::message::LinkState;
use crate::pool::PoolConfig;

const LINK: [u8; 16] = [7; 16];
const EPOCH: u64 = 99;
const WINDOW: usize = 2 * FRAME_BYTES_MAX;

fn config(role: Role) -> ConnectionConfig {
    let window_bytes = WINDOW as u32;
    ConnectionConfig { window_bytes, ..ConnectionConfig::new(Hello::new(role)) }
}

fn pool() -> Pool {
    Pool::new(PoolConfig { small: 64, large: 16 })
}

/// Two ends and the time between them.
struct Pair {
    device: Connection,
    cloud: Connection,
    now: Instant,
}

impl Pair {
    /// Two ends that have not met.
    fn new() -> Self {
        let device = Connection::device(config(Role::Device), LINK, pool()).unwrap();
        Self { device, cloud: cloud(EPOCH), now: Instant::now() }
    }

    /// Two ends that are up and have nothing to say.
    fn up() -> Self {
        let mut pair = Self::new();
        pair.connect();
        assert_eq!(pair.ups(), [false, false]);
        pair
    }

    fn connect(&mut self) {
        self.device.handle_connected(self.now);
        self.cloud.handle_connected(self.now);
        self.exchange();
    }

    fn disconnect(&mut self) {
        self.device.handle_disconnected();
        self.cloud.handle_disconnected();
    }

    /// Carries bytes both ways until both are silent.
    fn exchange(&mut self) {
        loop {
            let up = transmit(&mut self.device, self.now);
            let down = transmit(&mut self.cloud, self.now);
            if up.is_empty() && down.is_empty() {
                return;
            }
            self.cloud.handle_bytes(self.now, &up).unwrap();
            self.device.handle_bytes(self.now, &down).unwrap();
        }
    }

    /// True for each end whose latest HELLO resumed, device first.
    fn ups(&mut self) -> [bool; 2] {
        [&mut self.device, &mut self.cloud].map(|end| match end.poll_event() {
            Some(ConnectionEvent::Up { resumed, .. }) => resumed,
            other => panic!("{other:?}"),
        })
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
    }
}

fn cloud(epoch: u64) -> Connection {
    Connection::cloud(config(Role::Cloud), LINK, epoch, pool()).unwrap()
}

/// One batch as bytes.
fn transmit(end: &mut Connection, now: Instant) -> Vec<u8> {
    let mut batch = Vec::new();
    end.poll_transmit(now, &mut batch);
    let bytes = batch.iter().flat_map(|buf| buf.wire().to_vec()).collect();
    end.handle_transmitted(&mut batch);
    bytes
}

/// Kinds and sessions of the frames in a batch.
fn kinds(mut bytes: &[u8]) -> Vec<(Kind, u32)> {
    let mut kinds = Vec::new();
    while let Some(header) = bytes.first_chunk() {
        let header = Header::decode(header).unwrap();
        kinds.push((Kind::from_wire(header.kind).unwrap(), header.session));
        bytes = &bytes[HEADER_BYTES + header.len as usize..];
    }
    kinds
}

fn rows(end: &mut Connection, session: u32, priority: Priority, body_bytes: usize) -> Refused {
    let mut body = end.pool.take(body_bytes).unwrap();
    body.fill(session as u8);
    end.send(Kind::Rows, session, priority, body).map_err(|error| error.refusal)
}

type Refused = Result<(), Refusal>;

fn frames(end: &mut Connection) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Some(event) = end.poll_event() {
        if let ConnectionEvent::Frame(frame) = event {
            frames.push(frame);
        }
    }
    frames
}

/// A frame made by hand, as from the device.
fn frame(change: impl FnOnce(&mut Header), body: &[u8]) -> Vec<u8> {
    let mut header = Header {
        len: body.len() as u32,
        kind: Kind::Rows as u8,
        flags: 0,
        priority: Priority::Verify,
        version: WIRE_VERSION,
        session: 1,
        body_crc: crc32c::crc32c(body),
        seq: 0,
        ack: 0,
        credit: 0,
    };
    change(&mut header);
    [&header.encode()[..], body].concat()
}

/// HELLO of a device that names this epoch.
fn of_link(epoch: u64) -> Hello {
    Hello { link: LinkState { id: LINK, epoch, recv_next: 0 }, ..Hello::new(Role::Device) }
}

/// A HELLO made by hand.
fn hello(change: impl FnOnce(&mut Hello)) -> Vec<u8> {
    let mut hello = of_link(0);
    change(&mut hello);
    let mut body = [0; Hello::BYTES];
    Message::Hello(hello).encode(&mut body);
    frame(|header| (header.kind, header.session) = (Kind::Hello as u8, 0), &body)
}

#[test]
fn frames_arrive_in_order_and_are_acknowledged() {
    let mut pair = Pair::up();
    for _ in 0..3 {
        rows(&mut pair.device, 5, Priority::Prompt, 100).unwrap();
    }
    pair.exchange();
    assert_eq!(frames(&mut pair.cloud).len(), 3);
    assert!(!pair.device.is_drained(), "the acknowledgement waits for a frame to ride in");
    pair.wait(Duration::from_millis(10));
    assert_eq!(kinds(&transmit(&mut pair.device, pair.now)), []);
    let ack = transmit(&mut pair.cloud, pair.now);
    assert_eq!(kinds(&ack), [(Kind::Ack, 0)]);
    pair.device.handle_bytes(pair.now, &ack).unwrap();
    assert!(pair.device.is_drained());
}

#[test]
fn many_frames_are_acknowledged_at_once() {
    let mut pair = Pair::up();
    for _ in 0..16 {
        rows(&mut pair.device, 5, Priority::Prompt, 100).unwrap();
    }
    pair.exchange();
    assert!(pair.device.is_drained());
}

#[test]
fn a_verify_overtakes_other_sessions_but_not_its_own() {
    let mut pair = Pair::up();
    for _ in 0..3 {
        rows(&mut pair.device, 1, Priority::Prompt, 15_000).unwrap();
    }
    rows(&mut pair.device, 2, Priority::Verify, 1000).unwrap();
    rows(&mut pair.device, 1, Priority::Verify, 1000).unwrap();
    rows(&mut pair.device, 3, Priority::Bulk, 1000).unwrap();
    rows(&mut pair.device, 4, Priority::Prompt, 1000).unwrap();
    let mut order = Vec::new();
    for _ in 0..20 {
        let bytes = transmit(&mut pair.device, pair.now);
        order.extend(kinds(&bytes).into_iter().map(|(_, session)| session));
        pair.cloud.handle_bytes(pair.now, &bytes).unwrap();
        pair.wait(Duration::from_millis(10));
        let ack = transmit(&mut pair.cloud, pair.now);
        pair.device.handle_bytes(pair.now, &ack).unwrap();
    }
    assert!(pair.device.is_drained());
    // Sessions 1 and 4 take turns; session 1's verify waits for its own prompt only.
    assert_eq!(order, [2, 1, 4, 1, 1, 1, 3]);
    let of_one: Vec<Priority> = frames(&mut pair.cloud)
        .iter()
        .filter(|frame| frame.session == 1)
        .map(|frame| frame.priority)
        .collect();
    assert_eq!(of_one, [Priority::Prompt, Priority::Prompt, Priority::Prompt, Priority::Verify]);
}

#[test]
fn a_late_verify_goes_before_a_queued_prompt() {
    let mut pair = Pair::up();
    for _ in 0..2 {
        rows(&mut pair.device, 1, Priority::Prompt, 15_000).unwrap();
    }
    assert_eq!(kinds(&transmit(&mut pair.device, pair.now)), [(Kind::Rows, 1)]);
    rows(&mut pair.device, 2, Priority::Verify, 100).unwrap();
    let next = kinds(&transmit(&mut pair.device, pair.now));
    assert_eq!(next, [(Kind::Rows, 2), (Kind::Rows, 1)]);
}

#[test]
fn small_frames_share_a_batch() {
    let mut pair = Pair::up();
    for session in 1..=10 {
        rows(&mut pair.device, session, Priority::Verify, 1000).unwrap();
    }
    assert_eq!(kinds(&transmit(&mut pair.device, pair.now)).len(), 10);
}

#[test]
fn a_slow_application_stops_the_peer() {
    let mut pair = Pair::up();
    for _ in 0..4 {
        rows(&mut pair.device, 1, Priority::Prompt, BODY_BYTES_MAX).unwrap();
    }
    pair.exchange();
    let held = frames(&mut pair.cloud);
    assert_eq!(held.len(), 2, "the window holds two");
    pair.wait(Duration::from_millis(500));
    pair.exchange();
    assert_eq!(frames(&mut pair.cloud).len(), 0);
    drop(held);
    pair.exchange();
    assert_eq!(frames(&mut pair.cloud).len(), 2);
}

#[test]
fn a_full_queue_gives_the_body_back() {
    let mut pair = Pair::up();
    pair.device.config.queue_frames_max = 4;
    for _ in 0..4 {
        rows(&mut pair.device, 1, Priority::Prompt, 10).unwrap();
    }
    let mut body = pair.device.pool.take(3).unwrap();
    body.copy_from_slice(b"abc");
    let error = pair.device.send(Kind::Rows, 1, Priority::Prompt, body).unwrap_err();
    assert_eq!(error.refusal, Refusal::Full);
    assert_eq!(&error.body.unwrap()[..], b"abc");
    // A cancel still gets through.
    rows(&mut pair.device, 1, Priority::Control, 0).unwrap();
    pair.device.config.queue_frames_max = 100;
    pair.device.config.queue_bytes_max = 200;
    assert_eq!(rows(&mut pair.device, 1, Priority::Prompt, 10), Err(Refusal::Full));
}

#[test]
fn other_refusals() {
    let mut pair = Pair::new();
    assert_eq!(rows(&mut pair.device, 1, Priority::Prompt, 10), Err(Refusal::NotUp));
    pair.cloud.config.hello.frame_bytes_max = 4096;
    pair.connect();
    assert_eq!(rows(&mut pair.device, 1, Priority::Prompt, 5000), Err(Refusal::TooLong));
    rows(&mut pair.device, 1, Priority::Prompt, 4000).unwrap();
}

#[test]
#[should_panic(expected = "does not send")]
fn a_device_sends_no_output() {
    let mut pair = Pair::up();
    let body = pair.device.pool.take(0).unwrap();
    let _ = pair.device.send(Kind::Output, 1, Priority::Verify, body);
}

#[test]
fn a_discarded_session_sends_nothing_more() {
    let mut pair = Pair::up();
    for session in [1, 2, 1, 1] {
        rows(&mut pair.device, session, Priority::Prompt, 10).unwrap();
    }
    assert_eq!(pair.device.discard(1), 3);
    assert_eq!(pair.device.discard(1), 0);
    assert_eq!(pair.device.discard(0), 0);
    assert_eq!(kinds(&transmit(&mut pair.device, pair.now)), [(Kind::Rows, 2)]);
    rows(&mut pair.device, 1, Priority::Prompt, 10).unwrap();
    assert_eq!(kinds(&transmit(&mut pair.device, pair.now)), [(Kind::Rows, 1)]);
}

/// A ping that can't be written asks for no time: whoever waits for the link would wait for
/// nothing, over and over.
#[test]
fn a_busy_link_is_not_asked_for_a_ping() {
    let mut pair = Pair::up();
    rows(&mut pair.device, 1, Priority::Verify, 100).unwrap();
    let mut batch = Vec::new();
    assert!(pair.device.poll_transmit(pair.now, &mut batch));
    let heard = pair.now;
    pair.wait(Duration::from_millis(1500));
    pair.device.handle_timeout(pair.now).unwrap();
    assert_eq!(pair.device.poll_timeout(), Some(heard + Duration::from_secs(3)));
    pair.device.handle_transmitted(&mut batch);
    assert_eq!(kinds(&transmit(&mut pair.device, pair.now)), [(Kind::Ping, 0)]);
}

#[test]
fn silence_is_pinged_and_then_death() {
    let mut pair = Pair::up();
    pair.wait(Duration::from_millis(20));
    pair.exchange();
    let deadline = pair.device.poll_timeout().unwrap();
    assert_eq!(deadline, pair.now - Duration::from_millis(20) + Duration::from_secs(1));
    pair.now = deadline;
    pair.device.handle_timeout(pair.now).unwrap();
    let ping = transmit(&mut pair.device, pair.now);
    assert_eq!(kinds(&ping), [(Kind::Ping, 0)]);
    // The peer lives: its pong starts the silence anew.
    pair.cloud.handle_bytes(pair.now, &ping).unwrap();
    pair.wait(Duration::from_millis(30));
    let pong = transmit(&mut pair.cloud, pair.now);
    assert_eq!(kinds(&pong), [(Kind::Pong, 0)]);
    pair.device.handle_bytes(pair.now, &pong).unwrap();
    assert!(pair.device.traffic().rtt.unwrap() > Duration::ZERO);
    // The peer is dead: pings at 1 s and 2 s, the end at 3 s.
    let from = pair.now;
    for second in 1..3 {
        pair.now = pair.device.poll_timeout().unwrap();
        assert_eq!(pair.now, from + Duration::from_secs(second));
        pair.device.handle_timeout(pair.now).unwrap();
        assert_eq!(kinds(&transmit(&mut pair.device, pair.now)), [(Kind::Ping, 0)]);
    }
    pair.now = pair.device.poll_timeout().unwrap();
    assert_eq!(pair.now, from + Duration::from_secs(3));
    let expired = pair.device.handle_timeout(pair.now).unwrap_err();
    assert_eq!(expired, Expired::Silent(Duration::from_secs(3)));
}

#[test]
fn hello_has_five_seconds() {
    let mut pair = Pair::new();
    pair.cloud.handle_connected(pair.now);
    assert_eq!(pair.cloud.poll_timeout(), Some(pair.now + Duration::from_secs(5)));
    pair.wait(Duration::from_millis(4999));
    pair.cloud.handle_timeout(pair.now).unwrap();
    pair.wait(Duration::from_millis(1));
    let expired = pair.cloud.handle_timeout(pair.now).unwrap_err();
    assert_eq!(expired, Expired::Hello(Duration::from_secs(5)));
}

#[test]
fn a_cut_frame_is_sent_again() {
    let mut pair = Pair::up();
    rows(&mut pair.device, 1, Priority::Verify, 100).unwrap();
    rows(&mut pair.device, 2, Priority::Verify, 100).unwrap();
    let bytes = transmit(&mut pair.device, pair.now);
    // The first frame and half of the second arrive, and no acknowledgement comes back.
    pair.cloud.handle_bytes(pair.now, &bytes[..200]).unwrap();
    pair.disconnect();
    assert_eq!(frames(&mut pair.cloud).len(), 1);
    rows(&mut pair.device, 3, Priority::Verify, 100).unwrap();
    pair.connect();
    assert_eq!(pair.ups(), [true, true]);
    let sessions: Vec<u32> = frames(&mut pair.cloud).iter().map(|frame| frame.session).collect();
    assert_eq!(sessions, [2, 3]);
    assert_eq!(pair.device.traffic().replayed_frames, 1);
}

#[test]
fn frames_that_the_link_still_has_wait_for_it() {
    let mut pair = Pair::up();
    rows(&mut pair.device, 1, Priority::Verify, 100).unwrap();
    let mut lent = Vec::new();
    assert!(pair.device.poll_transmit(pair.now, &mut lent));
    pair.disconnect();
    pair.connect();
    assert_eq!(frames(&mut pair.cloud).len(), 0);
    pair.device.handle_transmitted(&mut lent);
    pair.exchange();
    assert_eq!(frames(&mut pair.cloud).len(), 1);
}

#[test]
fn a_cloud_that_restarted_starts_a_new_epoch() {
    let mut pair = Pair::up();
    rows(&mut pair.device, 1, Priority::Verify, 100).unwrap();
    rows(&mut pair.device, 1, Priority::Verify, BODY_BYTES_MAX).unwrap();
    let mut lent = Vec::new();
    assert!(pair.device.poll_transmit(pair.now, &mut lent));
    pair.disconnect();
    pair.cloud = cloud(EPOCH + 5);
    pair.connect();
    assert_eq!(pair.ups(), [false, false]);
    assert!(pair.device.is_drained(), "what belonged to the old epoch is forgotten");
    // A frame of the new epoch has the number of the one that the link still has.
    rows(&mut pair.device, 9, Priority::Verify, 50).unwrap();
    let mut fresh = Vec::new();
    assert!(pair.device.poll_transmit(pair.now, &mut fresh));
    pair.device.handle_transmitted(&mut fresh);
    pair.device.handle_transmitted(&mut lent);
    pair.disconnect();
    pair.connect();
    assert_eq!(pair.ups(), [true, true]);
    let frames = frames(&mut pair.cloud);
    assert_eq!((frames.len(), frames[0].session, frames[0].body.len()), (1, 9, 50));
}

#[test]
fn a_lost_hello_means_another_epoch() {
    let mut pair = Pair::new();
    pair.device.handle_connected(pair.now);
    pair.cloud.handle_connected(pair.now);
    let hello = transmit(&mut pair.device, pair.now);
    pair.cloud.handle_bytes(pair.now, &hello).unwrap();
    transmit(&mut pair.cloud, pair.now);
    assert_eq!(pair.cloud.epoch.number, EPOCH);
    pair.disconnect();
    pair.connect();
    assert_eq!(pair.cloud.epoch.number, EPOCH + 1);
    assert_eq!(pair.device.epoch.number, EPOCH + 1);
}

/// A device that knows an epoch names no older one: such a HELLO was long on its way.
#[test]
fn a_hello_of_another_epoch_is_late_once_the_device_knows_this_one() {
    let mut pair = Pair::new();
    pair.device.handle_connected(pair.now);
    pair.cloud.handle_connected(pair.now);
    let first = transmit(&mut pair.device, pair.now);
    pair.cloud.handle_bytes(pair.now, &first).unwrap();
    let old = of_link(0);
    assert!(!pair.cloud.has_overtaken(&old), "the device may not have heard of the epoch");
    pair.exchange();
    rows(&mut pair.device, 1, Priority::Verify, 100).unwrap();
    pair.exchange();
    assert!(pair.cloud.has_overtaken(&old));
    assert!(pair.cloud.has_overtaken(&of_link(EPOCH + 9)));
    assert!(!pair.cloud.has_overtaken(&of_link(EPOCH)));
    pair.disconnect();
    assert!(pair.cloud.has_overtaken(&old), "nor does it name one over the next socket");
    pair.connect();
    assert_eq!(pair.cloud.epoch.number, EPOCH);
}

#[test]
fn closing_tells_why() {
    let mut pair = Pair::up();
    let close = pair.cloud.close_frame(CloseCode::ShuttingDown, "for lunch").unwrap();
    pair.device.handle_bytes(pair.now, close.wire()).unwrap();
    let Some(ConnectionEvent::Closed { code, reason }) = pair.device.poll_event() else { panic!() };
    assert_eq!((code, reason.as_str()), (CloseCode::ShuttingDown, "for lunch"));
    assert_eq!(pair.device.poll_timeout(), None);
}

#[test]
fn an_ignorable_frame_is_counted_and_skipped() {
    let mut pair = Pair::up();
    let unknown = frame(|header| (header.kind, header.flags) = (200, FLAG_IGNORABLE), b"new");
    let unsequenced = |header: &mut Header| {
        (header.kind, header.flags, header.session) = (9, FLAG_IGNORABLE, 0);
    };
    pair.cloud.handle_bytes(pair.now, &frame(unsequenced, b"new")).unwrap();
    pair.cloud.handle_bytes(pair.now, &unknown).unwrap();
    let known = frame(|header| header.seq = 1, b"rows");
    pair.cloud.handle_bytes(pair.now, &known).unwrap();
    assert_eq!(frames(&mut pair.cloud).len(), 1);
}

#[test]
fn an_empty_pool_stalls_and_goes_on() {
    let mut pair = Pair::up();
    rows(&mut pair.device, 1, Priority::Verify, 100).unwrap();
    rows(&mut pair.device, 2, Priority::Verify, 100).unwrap();
    let bytes = transmit(&mut pair.device, pair.now);
    let held: Vec<Buf> = std::iter::from_fn(|| pair.cloud.pool.take(0)).collect();
    assert_eq!(pair.cloud.handle_bytes(pair.now, &bytes), Ok(0));
    drop(held);
    assert_eq!(pair.cloud.handle_bytes(pair.now, &bytes), Ok(bytes.len()));
    assert_eq!(frames(&mut pair.cloud).len(), 2);
}

#[test]
fn a_duplicate_is_dropped_and_acknowledged() {
    let mut pair = Pair::up();
    let bytes = frame(|_| {}, b"rows");
    pair.cloud.handle_bytes(pair.now, &bytes).unwrap();
    pair.cloud.handle_bytes(pair.now, &bytes).unwrap();
    assert_eq!(frames(&mut pair.cloud).len(), 1);
    assert_eq!(pair.cloud.traffic().duplicate_frames, 1);
    assert_eq!(kinds(&transmit(&mut pair.cloud, pair.now)), [(Kind::Ack, 0)]);
}

#[test]
fn numbers_wrap() {
    // The offset wraps in one case, the credit in the other.
    for offset in [u32::MAX - 9000, u32::MAX - WINDOW as u32 - 9000] {
        let mut pair = Pair::up();
        pair.device.send.start_at(u32::MAX - 2, offset);
        pair.cloud.receive.start_at(u32::MAX - 2, offset);
        for round in 0..40 {
            rows(&mut pair.device, 1, Priority::Verify, 5000).unwrap();
            pair.exchange();
            assert_eq!(frames(&mut pair.cloud).len(), 1, "round {round}");
            if round == 3 {
                pair.disconnect();
                pair.connect();
                assert_eq!(pair.ups(), [true, true]);
            }
        }
        pair.wait(Duration::from_millis(10));
        pair.exchange();
        assert!(pair.device.is_drained());
    }
}

/// The link's rate is told by bytes that came while a frame was on its way, and by no others.
#[test]
fn arrivals_are_timed_within_frames_alone() {
    let mut pair = Pair::up();
    rows(&mut pair.device, 7, Priority::Prompt, 40_000).unwrap();
    rows(&mut pair.device, 7, Priority::Prompt, 20_000).unwrap();
    let first = transmit(&mut pair.device, pair.now);
    let bytes = [first, transmit(&mut pair.device, pair.now)].concat();
    assert_eq!(bytes.len(), 60_064);
    // A second of nothing, the first bytes, then pieces a millisecond apart, over both frames.
    pair.wait(Duration::from_secs(1));
    for piece in bytes.chunks(10_000) {
        pair.wait(Duration::from_millis(1));
        let mut room = pair.cloud.receive_room().unwrap();
        // Others may ask for frames while the link has the buffer.
        pair.cloud.handle_room(pair.now).unwrap();
        room.spare_mut()[..piece.len()].copy_from_slice(piece);
        room.advance(piece.len());
        pair.cloud.handle_received(pair.now, room, piece.len()).unwrap();
    }
    assert_eq!(frames(&mut pair.cloud).len(), 2);
    let expected = (50_064, Duration::from_millis(6));
    let seen = |pair: &Pair| (pair.cloud.traffic().arrived_bytes, pair.cloud.traffic().arrived_in);
    assert_eq!(seen(&pair), expected);
    // A whole frame at once, whenever it comes, says nothing.
    pair.wait(Duration::from_secs(1));
    rows(&mut pair.device, 7, Priority::Prompt, 1000).unwrap();
    pair.exchange();
    assert_eq!(frames(&mut pair.cloud).len(), 1);
    assert_eq!(seen(&pair), expected);
    // Nor does half a frame whose socket broke, and the time until the next.
    rows(&mut pair.device, 7, Priority::Prompt, 1000).unwrap();
    let bytes = transmit(&mut pair.device, pair.now);
    pair.cloud.handle_bytes(pair.now, &bytes[..500]).unwrap();
    pair.disconnect();
    pair.wait(Duration::from_secs(1));
    pair.connect();
    assert_eq!(seen(&pair), expected);
}

/// A prompt fills all that it may; a verify is still taken, and is the next frame to leave.
#[test]
fn a_verify_finds_room_beside_a_full_backlog_of_a_prompt() {
    for bytes_max in [1 << 20, 20_000] {
        let limited = ConnectionConfig {
            queue_frames_max: 16,
            queue_bytes_max: bytes_max,
            ..config(Role::Device)
        };
        let device = Connection::device(limited, LINK, pool()).unwrap();
        let mut pair = Pair { device, cloud: cloud(EPOCH), now: Instant::now() };
        pair.connect();
        pair.ups();
        let mut taken = 0;
        while rows(&mut pair.device, 1, Priority::Prompt, 1000).is_ok() {
            taken += 1;
        }
        assert!((10..16).contains(&taken), "{taken}");
        assert_eq!(rows(&mut pair.device, 1, Priority::Prompt, 1000), Err(Refusal::Full));
        assert_eq!(rows(&mut pair.device, 2, Priority::Verify, 1000), Ok(()));
        let batch = transmit(&mut pair.device, pair.now);
        assert_eq!(kinds(&batch)[0], (Kind::Rows, 2), "the verify goes first");
    }
}
