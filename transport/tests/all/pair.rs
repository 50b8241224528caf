//! Two connections on one thread, in virtual time, over a byte pipe that does what networks do.
//!
//! The property: whatever is cut, delayed, split, joined or repeated, each frame that was taken
//! arrives exactly once, a session's frames in order, and in the end all are acknowledged.
//!
//! A run of the real protocol makes no duplicates, since HELLO says exactly where to go on. So the
//! pipe makes them: it repeats whole frames that were delivered before. These mutants of the code
//! were made by hand, and each makes the test fail:
//! - `ReceiveState::accept` takes frames before `next` as new;
//! - `SendState::acknowledge` leaves the replay cursor where it is;
//! - `SendState::resume` sets the replay cursor to 1, or does not set it;
//! - `SendState::choose` takes a session's last frame, names a session twice, or does not look at
//!   the credit;
//! - `Connection::next_sequenced` steps over a frame whose buffer the link still has;
//! - `Connection::handle_transmitted` puts a buffer in the place of the next;
//! - a dropped buffer releases no credit.
//!
//! Two kinds of mutants it can't see, since both ends are honest and pings carry acknowledgements
//! in the end: gaps that pass, and acknowledgements that are not sent in time. The unit tests of
//! `conn` see those.
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use hat_transport::clock::{Clock, ManualClock};
use hat_transport::conn::{Connection, ConnectionConfig, ConnectionEvent, Frame};
use hat_transport::frame::{BODY_BYTES_MAX, HEADER_BYTES, Header, Kind, Priority, SEQUENCED_FROM};
use hat_transport::message::{Hello, Role};
use hat_transport::pool::{Buf, Pool, PoolConfig};
use proptest::prelude::*;

/// Event at one of the two ends; `0` is the device.
#[derive(Clone, Debug)]
enum Op {
    /// An application sends.
    Send { end: usize, session: u32, priority: u8, body_bytes: usize },
    /// Bytes of this end's flow reach the other.
    Move { end: usize, bytes: usize },
    /// A frame that this end sent on this socket, and that was delivered, is delivered again.
    Repeat { end: usize, which: prop::sample::Index },
    /// The link gives back what it sent for this end.
    Return { end: usize },
    /// The application of this end drops frames that it holds.
    Release { end: usize },
    /// Time passes.
    Wait { ms: u64 },
    /// The socket breaks; what is under way is lost.
    Cut,
    /// A new socket.
    Connect,
}

fn op() -> impl Strategy<Value = Op> {
    let end = 0..2usize;
    let body_bytes = prop_oneof![2 => 4..2000usize, 1 => 4..=BODY_BYTES_MAX];
    prop_oneof![
        6 => (end.clone(), 1..4u32, 0..4u8, body_bytes).prop_map(
            |(end, session, priority, body_bytes)| Op::Send { end, session, priority, body_bytes }
        ),
        10 => (end.clone(), prop_oneof![1..200usize, 1..200_000usize])
            .prop_map(|(end, bytes)| Op::Move { end, bytes }),
        3 => (end.clone(), any::<prop::sample::Index>())
            .prop_map(|(end, which)| Op::Repeat { end, which }),
        8 => end.clone().prop_map(|end| Op::Return { end }),
        1 => end.prop_map(|end| Op::Release { end }),
        2 => (0..30u64).prop_map(|ms| Op::Wait { ms }),
        1 => Just(Op::Cut),
        2 => Just(Op::Connect),
    ]
}

/// One end: the connection, its application, and the flow of bytes that leaves it.
struct End {
    connection: Connection,
    pool: Pool,
    /// Batches that the link has, oldest first; the last may belong to the present socket.
    lent: VecDeque<Vec<Buf>>,
    /// The link sends for the present socket.
    sending: bool,
    flow: VecDeque<u8>,
    /// Bytes of `flow` up to the next frame's start.
    frame_left: usize,
    /// Bytes of the frame that is being delivered.
    partial: Vec<u8>,
    /// Sequenced frames that were delivered over this socket.
    delivered: Vec<Vec<u8>>,
    /// Received frames that the application holds.
    held: Vec<Frame>,
    /// Ids of the frames that this end's application sent, by session.
    sent: BTreeMap<u32, Vec<u32>>,
    /// Ids of the frames that this end's application got, by session.
    got: BTreeMap<u32, Vec<u32>>,
}

impl End {
    fn new(role: Role) -> Self {
        let pool = Pool::new(PoolConfig { small: 600, large: 100 });
        let config =
            ConnectionConfig { window_bytes: 150_000, ..ConnectionConfig::new(Hello::new(role)) };
        let connection = match role {
            Role::Device => Connection::device(config, [1; 16], pool.clone()),
            Role::Cloud => Connection::cloud(config, [1; 16], 5, pool.clone()),
        };
        Self {
            connection: connection.unwrap(),
            pool,
            lent: VecDeque::new(),
            sending: false,
            flow: VecDeque::new(),
            frame_left: 0,
            partial: Vec::new(),
            delivered: Vec::new(),
            held: Vec::new(),
            sent: BTreeMap::new(),
            got: BTreeMap::new(),
        }
    }

    /// Lets a batch leave, if the link can take one.
    fn transmit(&mut self, now: std::time::Instant) {
        let mut batch = Vec::new();
        if !self.sending && self.connection.poll_transmit(now, &mut batch) {
            self.flow.extend(batch.iter().flat_map(|buf| buf.wire()));
            self.lent.push_back(batch);
            self.sending = true;
        }
    }

    fn take_back(&mut self) {
        if let Some(mut batch) = self.lent.pop_front() {
            self.connection.handle_transmitted(&mut batch);
            if self.lent.is_empty() {
                self.sending = false;
            }
        }
    }

    /// Takes up to `bytes` bytes off the flow and keeps whole sequenced frames for repetition.
    fn deliver(&mut self, bytes: usize) -> Vec<u8> {
        let moved: Vec<u8> = self.flow.drain(..bytes.min(self.flow.len())).collect();
        for byte in &moved {
            self.partial.push(*byte);
            if let Some(header) = self.partial.first_chunk::<HEADER_BYTES>() {
                let header = Header::decode(header).unwrap();
                self.frame_left = HEADER_BYTES + header.len as usize - self.partial.len();
                if self.frame_left == 0 {
                    let frame = std::mem::take(&mut self.partial);
                    if header.kind >= SEQUENCED_FROM {
                        self.delivered.push(frame);
                    }
                }
            }
        }
        moved
    }

    fn lose(&mut self) {
        self.connection.handle_disconnected();
        self.flow.clear();
        self.partial.clear();
        self.delivered.clear();
        self.sending = false;
    }

    fn take_events(&mut self) {
        while let Some(event) = self.connection.poll_event() {
            if let ConnectionEvent::Frame(frame) = event {
                let id = u32::from_le_bytes(frame.body[..4].try_into().unwrap());
                assert!(frame.body[4..].iter().all(|byte| *byte == id as u8));
                self.got.entry(frame.session).or_default().push(id);
                self.held.push(frame);
            }
        }
    }
}

struct World {
    ends: [End; 2],
    clock: ManualClock,
    connected: bool,
    next_id: u32,
}

impl World {
    fn new() -> Self {
        let ends = [End::new(Role::Device), End::new(Role::Cloud)];
        let mut world = Self { ends, clock: ManualClock::new(), connected: false, next_id: 1 };
        world.connect();
        world.settle(0);
        world
    }

    fn connect(&mut self) {
        if !self.connected {
            self.connected = true;
            let now = self.clock.now();
            self.ends.iter_mut().for_each(|end| end.connection.handle_connected(now));
        }
    }

    fn cut(&mut self) {
        self.connected = false;
        self.ends.iter_mut().for_each(End::lose);
    }

    fn send(&mut self, end: usize, session: u32, priority: u8, body_bytes: usize) {
        let state = &mut self.ends[end];
        let Some(mut body) = state.pool.take(body_bytes) else {
            return;
        };
        let (kind, id) = ([Kind::Rows, Kind::Output][end], self.next_id);
        body.fill(id as u8);
        body[..4].copy_from_slice(&id.to_le_bytes());
        let priority = Priority::from_wire(priority).unwrap();
        if state.connection.send(kind, session, priority, body).is_ok() {
            self.next_id += 1;
            state.sent.entry(session).or_default().push(id);
        }
    }

    fn carry(&mut self, end: usize, bytes: &[u8]) {
        let now = self.clock.now();
        let other = &mut self.ends[1 - end];
        let taken = other.connection.handle_bytes(now, bytes).unwrap();
        assert_eq!(taken, bytes.len(), "the pool is large enough");
        other.take_events();
    }

    fn move_bytes(&mut self, end: usize, bytes: usize) {
        if self.connected {
            let now = self.clock.now();
            self.ends[end].transmit(now);
            let moved = self.ends[end].deliver(bytes);
            self.carry(end, &moved);
        }
    }

    fn repeat(&mut self, end: usize, which: &prop::sample::Index) {
        let state = &self.ends[end];
        if self.connected && state.partial.is_empty() && !state.delivered.is_empty() {
            let frame = which.get(&state.delivered).clone();
            self.carry(end, &frame);
        }
    }

    fn wait(&mut self, ms: u64) {
        self.clock.advance(Duration::from_millis(ms));
        let now = self.clock.now();
        for end in &mut self.ends {
            if end.connection.handle_timeout(now).is_err() {
                return self.cut();
            }
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Send { end, session, priority, body_bytes } => {
                self.send(*end, *session, *priority, *body_bytes);
            }
            Op::Move { end, bytes } => self.move_bytes(*end, *bytes),
            Op::Repeat { end, which } => self.repeat(*end, which),
            Op::Return { end } => self.ends[*end].take_back(),
            Op::Release { end } => self.ends[*end].held.clear(),
            Op::Wait { ms } => self.wait(*ms),
            Op::Cut => self.cut(),
            Op::Connect => self.connect(),
        }
    }

    /// Runs on without accidents, except that each frame is delivered `repeats` times more, until
    /// nothing is queued or unacknowledged.
    fn settle(&mut self, repeats: usize) {
        self.connect();
        for _ in 0..10_000 {
            for end in 0..2 {
                self.ends[end].held.clear();
                while !self.ends[end].lent.is_empty() {
                    self.ends[end].take_back();
                }
                let known = self.ends[end].delivered.len();
                self.move_bytes(end, usize::MAX);
                let fresh = self.ends[end].delivered[known..].to_vec();
                for frame in fresh.iter().cycle().take(repeats * fresh.len()) {
                    self.carry(end, frame);
                }
            }
            let is_drained = |end: &End| end.connection.is_drained() && end.lent.is_empty();
            if self.ends.iter().all(is_drained)
                && self.ends.iter().all(|end| end.connection.is_up())
            {
                return;
            }
            self.wait(5);
            self.connect();
        }
        panic!("10,000 exchanges did not drain the connections");
    }

    fn check(&self) {
        for end in 0..2 {
            assert_eq!(self.ends[1 - end].got, self.ends[end].sent, "what end {end} sent");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn each_frame_arrives_exactly_once(ops in prop::collection::vec(op(), 1..250)) {
        let mut world = World::new();
        ops.iter().for_each(|op| world.apply(op));
        world.settle(1);
        world.check();
    }
}
