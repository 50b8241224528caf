//! Histories of two real endpoints in virtual time, over sockets that a seed breaks.
//!
//! The property: whatever is cut at any byte, stalls, falls silent, restarts or comes back over
//! another socket while the first still carries bytes, each end gets what the other sent in the
//! same epoch, exactly once and in order; an epoch begins with nothing, at both ends; honest peers
//! never break the protocol; and after a quiet time everything is delivered, acknowledged, and back
//! in the pools.
//!
//! `HAT_SEEDS` is how many seeds are tried, `HAT_SEED` the first. A failure names its seed.
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hat_emulator::simulated::{Break, Conditions, SimNet};
use hat_transport::clock::{Clock, ManualClock};
use hat_transport::conn::{ConnectionId, Frame, FrameSink};
use hat_transport::endpoint::{Endpoint, EndpointConfig, Event, GoneError};
use hat_transport::frame::{BODY_BYTES_MAX, FRAME_BYTES_MAX, Kind, Priority};
use hat_transport::message::{CloseCode, Hello, Role};
use hat_transport::pool::PoolConfig;
use hat_transport::random::SeededRandom;

const SESSIONS: u32 = 3;
/// Number of the epoch, and of the frame in its session.
const HEAD_BYTES: usize = 12;

/// State of an application at one end of a connection since the present epoch began.
struct App {
    /// Number written into each frame; never used twice.
    tag: u64,
    peer_tag: Option<u64>,
    sent: BTreeMap<u32, u32>,
    got: BTreeMap<u32, u32>,
    held: Vec<Frame>,
}

impl App {
    fn new(tag: u64) -> Self {
        let (sent, got) = (BTreeMap::new(), BTreeMap::new());
        Self { tag, peer_tag: None, sent, got, held: Vec::new() }
    }

    fn take(&mut self, frame: Frame) {
        let tag = u64::from_le_bytes(frame.body[..8].try_into().unwrap());
        let number = u32::from_le_bytes(frame.body[8..12].try_into().unwrap());
        assert!(frame.body[HEAD_BYTES..].iter().all(|byte| *byte == number as u8));
        assert_eq!(*self.peer_tag.get_or_insert(tag), tag, "a frame of another epoch");
        let next = self.got.entry(frame.session).or_default();
        assert_eq!(number, *next, "session {}", frame.session);
        *next += 1;
        self.held.push(frame);
    }

    fn send(&mut self, from: &mut Endpoint, to: ConnectionId, session: u32, bytes: usize) -> bool {
        let Some(mut body) = FrameSink::buffer(from, Priority::Verify, bytes) else { return false };
        let number = self.sent.entry(session).or_default();
        body.fill(*number as u8);
        body[..8].copy_from_slice(&self.tag.to_le_bytes());
        body[8..12].copy_from_slice(&number.to_le_bytes());
        let is_device = from.local_address().is_none();
        let kind = if is_device { Kind::Rows } else { Kind::Output };
        let priority = Priority::from_wire((*number % 4) as u8).unwrap();
        let is_sent = FrameSink::send(from, to, kind, session, priority, body).is_ok();
        *number += u32::from(is_sent);
        is_sent
    }
}

/// Number of times that each tried event has happened.
#[derive(Debug, Default)]
struct Seen {
    ups: usize,
    resumed: usize,
    fenced: usize,
    forgotten: usize,
    silent: usize,
    turned_away: usize,
    overtaken: usize,
    frames: usize,
    replayed: u64,
    restarts: usize,
}

/// One end: an endpoint, if its process lives, and the applications of its connections.
struct End {
    endpoint: Option<Endpoint>,
    apps: BTreeMap<ConnectionId, App>,
    back_at: Option<Instant>,
    pool: PoolConfig,
}

struct World {
    random: SeededRandom,
    clock: Arc<ManualClock>,
    net: SimNet,
    window_bytes: u32,
    body_max: usize,
    grace: Duration,
    /// The device's, the cloud's.
    ends: [End; 2],
    next_tag: u64,
    seen: Seen,
    /// Of what arrived, and when.
    digest: u64,
    start: Instant,
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7433))
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = SeededRandom::new(seed);
        let clock = Arc::new(ManualClock::new());
        let slowest = 1 << random.below(18);
        let rate = 0..=1 << random.below(14);
        let conditions = Conditions {
            latency_us: 10..=10 + slowest,
            ns_per_byte: [rate.clone(), rate],
            cuts: true,
        };
        let net = SimNet::new(Arc::clone(&clock), conditions, random.next_u64());
        let body_max = [64, 1000, 8 << 10, BODY_BYTES_MAX][random.below(4) as usize];
        let window_bytes = 2 * FRAME_BYTES_MAX as u32 + random.below(300_000) as u32;
        let grace = ms(random.within(1_000..=20_000));
        let ends = [0, 1].map(|_| End {
            endpoint: None,
            apps: BTreeMap::new(),
            back_at: None,
            pool: PoolConfig {
                small: random.within(40..=400) as u32,
                large: random.within(16..=60) as u32,
            },
        });
        let (next_tag, seen, start) = (1, Seen::default(), clock.now());
        let mut world = Self {
            random,
            clock,
            net,
            window_bytes,
            body_max,
            grace,
            ends,
            next_tag,
            seen,
            digest: 0,
            start,
        };
        world.begin(1);
        world.begin(0);
        world
    }

    /// A process starts.
    fn begin(&mut self, end: usize) {
        let role = [Role::Device, Role::Cloud][end];
        let mut config = EndpointConfig::new(Hello::new(role));
        config.connection.window_bytes = self.window_bytes;
        config.connection.queue_frames_max = 60;
        config.grace = self.grace;
        config.pool = self.ends[end].pool;
        let link = self.net.link((end == 1).then(address)).unwrap();
        let random = Box::new(SeededRandom::new(self.random.next_u64()));
        let mut endpoint =
            Endpoint::new(Box::new(link), Arc::clone(&self.clock) as _, config).with_random(random);
        if end == 0 {
            endpoint.dial(address());
        }
        self.ends[end] = End {
            endpoint: Some(endpoint),
            apps: BTreeMap::new(),
            back_at: None,
            pool: self.ends[end].pool,
        };
    }

    /// A process ends, and another begins after a while.
    fn restart(&mut self, end: usize) {
        // A machine without power tells nobody.
        if self.random.below(2) == 0 {
            for socket in self.net.sockets() {
                let arrive = self.some_of(self.net.under_way(socket));
                self.net.break_socket(socket, Break { arrive, told: [None; 2] });
            }
        }
        self.ends[end].endpoint = None;
        self.ends[end].apps.clear();
        let away = self.random.below(3) * self.random.below(2_000);
        self.ends[end].back_at = Some(self.clock.now() + ms(away));
        self.seen.restarts += 1;
    }

    fn some_of(&mut self, bytes: [usize; 2]) -> [usize; 2] {
        bytes.map(|bytes| self.random.below(bytes as u64 + 1) as usize)
    }

    fn break_one(&mut self) {
        let sockets = self.net.sockets();
        let Some(&socket) = sockets.get(self.random.below(4) as usize).or(sockets.last()) else {
            return;
        };
        let arrive = self.some_of(self.net.under_way(socket));
        let [early, soon, late] = [500, 500, 20_000].map(|most| Some(ms(self.random.below(most))));
        let how = match self.random.below(5) {
            0 => Break { arrive, told: [early, soon] },
            // One end is reset, and what it sent still arrives; the other hears late, or never.
            1 => Break { arrive: [usize::MAX, 0], told: [Some(ms(0)), late] },
            2 => Break { arrive: [usize::MAX, 0], told: [Some(ms(0)), None] },
            3 => Break { arrive: [0, usize::MAX], told: [late, Some(ms(0))] },
            _ => Break { arrive, told: [None; 2] },
        };
        self.net.break_socket(socket, how);
    }

    fn act(&mut self) {
        match self.random.below(24) {
            0..12 => {
                let end = self.random.below(2) as usize;
                let frames = self.random.within(1..=8);
                (0..frames).for_each(|_| self.send(end));
            }
            12..16 => self.release(),
            16..20 => self.break_one(),
            20 => {
                let lasts = ms(self.random.below(6_000));
                let sockets = self.net.sockets();
                sockets.last().into_iter().for_each(|socket| self.net.stall(*socket, lasts));
            }
            21 => {
                let end = self.random.below(2) as usize;
                self.restart(end);
            }
            _ => {
                let pause = ms(self.random.below(4_000));
                self.run(pause);
            }
        }
        let span = 1 << self.random.below(18);
        let pause = Duration::from_micros(self.random.below(span));
        self.run(pause);
    }

    fn send(&mut self, end: usize) {
        let bytes = self.random.within(HEAD_BYTES as u64..=self.body_max as u64) as usize;
        let session = 1 + self.random.below(u64::from(SESSIONS)) as u32;
        let End { endpoint: Some(endpoint), apps, .. } = &mut self.ends[end] else { return };
        let which = self.random.below(apps.len().max(1) as u64) as usize;
        if let Some((to, app)) = apps.iter_mut().nth(which) {
            app.send(endpoint, *to, session, bytes);
        }
    }

    /// The applications drop some of the frames that they hold.
    fn release(&mut self) {
        for app in self.ends.iter_mut().flat_map(|end| end.apps.values_mut()) {
            let keep = self.random.below(app.held.len() as u64 + 1) as usize;
            app.held.truncate(keep);
        }
    }

    /// Lets time pass, and everything happen that is due meanwhile.
    fn run(&mut self, lasts: Duration) {
        let until = self.clock.now() + lasts;
        let mut polls = 0;
        loop {
            let now = self.clock.now();
            for end in 0..2 {
                if self.ends[end].back_at.is_some_and(|at| at <= now) {
                    self.begin(end);
                }
                self.poll(end);
            }
            let own = self.ends.iter().flat_map(|end| {
                let timeout = end.endpoint.as_ref().and_then(|it| it.poll_timeout(now));
                [timeout, end.back_at]
            });
            let next = own.chain([self.net.next_at()]).flatten().min();
            let next = next.map_or(until, |next| next.min(until));
            polls = if next > now { 0 } else { polls + 1 };
            assert!(polls < 1_000, "time stands still");
            if next > now {
                self.clock.advance(next - now);
            } else if now >= until {
                return;
            }
        }
    }

    fn poll(&mut self, end: usize) {
        let mut events = Vec::new();
        let Some(endpoint) = &mut self.ends[end].endpoint else { return };
        endpoint.poll(Some(Duration::ZERO), &mut events).unwrap();
        for event in events {
            self.handle(end, event);
        }
    }

    fn handle(&mut self, end: usize, event: Event) {
        let apps = &mut self.ends[end].apps;
        match event {
            Event::Up { connection, resumed: false, .. } => {
                self.seen.ups += 1;
                // A device that knows an epoch goes on in it, or as another link.
                let before = apps.get(&connection).filter(|_| end == 1);
                assert!(before.is_none_or(|app| app.peer_tag.is_none()), "a live epoch is over");
                apps.insert(connection, App::new(self.next_tag));
                self.next_tag += 1;
            }
            Event::Up { connection, .. } => {
                self.seen.resumed += 1;
                assert!(apps.contains_key(&connection), "resumed out of nothing");
            }
            Event::Frame { connection, frame } => {
                self.seen.frames += 1;
                let at = (self.clock.now() - self.start).as_nanos() as u64;
                let bytes = frame.body.len() as u64;
                self.digest = (self.digest ^ at ^ (bytes << 40)).wrapping_mul(0x0100_0000_01B3);
                apps.get_mut(&connection).unwrap().take(frame);
            }
            Event::Down { reason, .. } => {
                self.seen.fenced += usize::from(reason.contains("another socket"));
                self.seen.silent += usize::from(reason.contains("silent"));
            }
            Event::Gone { connection, error: GoneError::GraceOver } if end == 1 => {
                self.seen.forgotten += 1;
                apps.remove(&connection);
            }
            Event::Refused { error: GoneError::HelloLate { .. }, .. } if end == 1 => {}
            Event::Refused { error: GoneError::NoBuffer { .. }, .. } if end == 1 => {}
            Event::Refused { error: GoneError::Overtaken { .. }, .. } if end == 1 => {
                self.seen.overtaken += 1;
            }
            Event::Gone { connection, error: GoneError::ClosedByPeer { code, .. } }
                if end == 0 && code == CloseCode::Overload =>
            {
                self.seen.turned_away += 1;
                apps.remove(&connection);
                self.ends[end].endpoint.as_mut().unwrap().dial(address());
            }
            other => panic!("honest peers: {other:?}"),
        }
    }

    /// No accidents any more: everything that is sent arrives, more than a window of it.
    fn settle(&mut self) {
        let until_quiet = ms(30_000) + self.grace;
        self.run(until_quiet);
        let mut left = [2 * self.window_bytes as usize / FRAME_BYTES_MAX + 8; 2];
        for _ in 0..2_000 {
            for (left, End { endpoint, apps, .. }) in left.iter_mut().zip(&mut self.ends) {
                assert_eq!(apps.len(), 1, "one device and one cloud are left");
                let (to, app) = apps.iter_mut().next().unwrap();
                app.held.clear();
                while *left > 0 && app.send(endpoint.as_mut().unwrap(), *to, 1, BODY_BYTES_MAX) {
                    *left -= 1;
                }
            }
            self.run(ms(10));
            if left == [0; 2] && self.is_drained() {
                return;
            }
        }
        panic!("20 s of quiet did not drain the connections: {left:?} are unsent");
    }

    fn is_drained(&self) -> bool {
        self.ends.iter().all(|end| {
            let (Some(endpoint), Some(id)) = (&end.endpoint, end.apps.keys().next()) else {
                return false;
            };
            (1..=SESSIONS).all(|session| endpoint.held(*id, session) == 0)
        })
    }

    fn check(&mut self) {
        for end in &mut self.ends {
            end.apps.values_mut().for_each(|app| app.held.clear());
        }
        self.run(ms(100));
        let [device, cloud] = &self.ends;
        let (ours, theirs) =
            (device.apps.values().next().unwrap(), cloud.apps.values().next().unwrap());
        assert_eq!((&ours.sent, &ours.got), (&theirs.got, &theirs.sent));
        assert_eq!((Some(ours.tag), Some(theirs.tag)), (theirs.peer_tag, ours.peer_tag));
        for end in &self.ends {
            let endpoint = end.endpoint.as_ref().unwrap();
            let (small, large) = endpoint.pool().free();
            // A connection has one for PING and its like, and its socket one to receive into.
            let used = (end.pool.small as usize - small, end.pool.large as usize - large);
            assert!(used.0 + used.1 <= 2, "{used:?} buffers are not back");
            let traffic = end.apps.keys().map(|id| endpoint.traffic(*id).unwrap());
            self.seen.replayed += traffic.map(|it| it.replayed_frames).sum::<u64>();
        }
    }
}

fn history(seed: u64) -> (Seen, u64) {
    let mut world = World::new(seed);
    for _ in 0..world.random.within(20..=120) {
        world.act();
    }
    world.settle();
    world.check();
    (world.seen, world.digest)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[test]
fn an_epoch_loses_and_repeats_nothing() {
    let (first, count) = (number("HAT_SEED").unwrap_or(0), number("HAT_SEEDS").unwrap_or(150));
    let mut seen = Seen::default();
    for seed in first..first + count {
        let run = std::panic::catch_unwind(|| history(seed));
        let (one, _) = run.unwrap_or_else(|_| {
            panic!("seed {seed}: HAT_SEED={seed} HAT_SEEDS=1 repeats it");
        });
        seen.ups += one.ups;
        seen.resumed += one.resumed;
        seen.fenced += one.fenced;
        seen.forgotten += one.forgotten;
        seen.silent += one.silent;
        seen.turned_away += one.turned_away;
        seen.overtaken += one.overtaken;
        seen.frames += one.frames;
        seen.replayed += one.replayed;
        seen.restarts += one.restarts;
    }
    eprintln!("{count} seeds: {seen:?}");
    // The bed can fail only if it does what it is for.
    if count >= 100 {
        let Seen { resumed, fenced, forgotten, silent, replayed, restarts, .. } = seen;
        let least = [resumed, fenced, forgotten, silent, replayed as usize, restarts];
        assert!(least.iter().all(|times| *times >= 20), "{seen:?}");
    }
}

#[test]
fn a_seed_repeats_its_history() {
    for seed in 0..5 {
        assert_eq!(history(seed).1, history(seed).1, "seed {seed}");
    }
    assert_ne!(history(0).1, history(1).1);
}

/// A HELLO on a socket that its device had left came after the device was back over another one,
/// and took the good connection down with it.
#[test]
fn a_hello_that_was_overtaken_costs_its_own_socket_alone() {
    assert!(history(1107).0.overtaken > 0, "this seed no longer has such a HELLO: find one");
}
