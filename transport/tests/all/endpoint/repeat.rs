//! Virtual time: two endpoints, a clock that is moved by hand and seeds do the same again.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hat_transport::clock::{Clock, ManualClock};
use hat_transport::conn::{ConnectionId, FrameSink};
use hat_transport::endpoint::{Endpoint, Event};
use hat_transport::frame::{Kind, Priority};
use hat_transport::link::memory::MemoryNet;
use hat_transport::link::{Completion, Link, PeerId, Waker};
use hat_transport::message::{End, Message, Role};
use hat_transport::pool::Buf;
use hat_transport::random::SeededRandom;

use super::pair::{CutLink, config, loopback, take_frame, take_up};

/// Bytes that left, each batch with its time since the start.
type Transcript = Vec<(Duration, Vec<u8>)>;

/// A link that notes what leaves.
struct NotedLink {
    inner: CutLink,
    clock: Arc<ManualClock>,
    start: Instant,
    notes: Arc<Mutex<Transcript>>,
}

impl Link for NotedLink {
    fn connect(&mut self, address: SocketAddr) -> io::Result<PeerId> {
        self.inner.connect(address)
    }

    fn send(&mut self, peer: PeerId, bufs: Vec<Buf>) {
        let bytes = bufs.iter().flat_map(|buf| buf.wire()).copied().collect();
        self.notes.lock().unwrap().push((self.clock.now() - self.start, bytes));
        self.inner.send(peer, bufs);
    }

    fn receive(&mut self, peer: PeerId, buf: Buf) {
        self.inner.receive(peer, buf);
    }

    fn close(&mut self, peer: PeerId) {
        self.inner.close(peer);
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>) -> io::Result<()> {
        self.inner.wait(timeout, done)
    }

    fn local_address(&self) -> Option<SocketAddr> {
        self.inner.local_address()
    }

    fn syscalls(&self) -> u64 {
        self.inner.syscalls()
    }
}

/// A session of numbered frames, two cuts, and half a minute of silence at its end.
fn run(seed: u64) -> Transcript {
    let clock = Arc::new(ManualClock::new());
    let (start, cut) = (clock.now(), Arc::new(AtomicBool::new(false)));
    let notes = Arc::<Mutex<Transcript>>::default();
    let net = MemoryNet::new();
    let endpoint = |role, listen, seed| {
        let cut = if role == Role::Device { Arc::clone(&cut) } else { Arc::default() };
        let inner = Box::new(net.link(listen).unwrap());
        let inner = CutLink { inner, cut, peers: Vec::new() };
        let (clock, notes) = (Arc::clone(&clock), Arc::clone(&notes));
        let link = NotedLink { inner, clock: Arc::clone(&clock), start, notes };
        Endpoint::new(Box::new(link), clock, config(role))
            .with_random(Box::new(SeededRandom::new(seed)))
    };
    let mut cloud = endpoint(Role::Cloud, Some(loopback()), seed);
    let mut device = endpoint(Role::Device, None, seed + 1);
    let dialled = device.dial(cloud.local_address().unwrap());
    let (mut up, mut down) = (Vec::new(), Vec::new());
    let (mut sent, mut got) = (0, 0);
    while clock.now() - start < Duration::from_secs(30) {
        cloud.poll(Some(Duration::ZERO), &mut up).unwrap();
        device.poll(Some(Duration::ZERO), &mut down).unwrap();
        while take_frame(&mut up).is_some() {
            got += 1;
            cut.fetch_or(got == 20 || got == 40, Ordering::Relaxed);
        }
        while take_up(&mut down).is_some() || take_frame(&mut down).is_some() {}
        if device.traffic(dialled).is_some_and(|it| it.rtt.is_some()) && sent < 60 {
            send(&mut device, dialled, sent);
            sent += 1;
            continue; // there is something to do now
        }
        let now = clock.now();
        let next = [device.poll_timeout(now), cloud.poll_timeout(now)].into_iter().flatten().min();
        // What one end sent is at the other at once.
        let pause = next.unwrap().saturating_duration_since(now).min(Duration::from_millis(50));
        clock.advance(pause.max(Duration::from_micros(1)));
    }
    assert_eq!((sent, got), (60, 60));
    assert!(down.iter().filter(|event| matches!(event, Event::Down { .. })).count() == 2);
    std::mem::take(&mut *notes.lock().unwrap())
}

fn send(device: &mut impl FrameSink, to: ConnectionId, number: usize) {
    if number % 7 == 6 {
        return device.send_message(to, 2, &Message::End(End::default())).unwrap();
    }
    let mut body = device.buffer(Priority::Verify, 1 + number * 977 % 9000).unwrap();
    body.fill(number as u8);
    device.send(to, Kind::Rows, 1, Priority::Verify, body).unwrap();
}

#[test]
fn a_seed_sends_the_same_bytes_at_the_same_times() {
    let first = run(5);
    assert!(first.len() > 100, "{} batches", first.len());
    assert!(first.last().unwrap().0 > Duration::from_secs(25), "it is pinged to the end");
    assert_eq!(first, run(5));
    // Another seed names link and epoch otherwise, in its first HELLO and all that follow.
    let other = run(6);
    assert_ne!(first[0].1, other[0].1);
    assert_ne!(first[1].1, other[1].1);
}
