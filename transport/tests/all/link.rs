//! `link_conforms`: one suite of rules, and three links that keep them.
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hat_transport::link::memory::MemoryNet;
use hat_transport::link::{self, Completion, Link, LinkKind, PeerId};
use hat_transport::pool::{Buf, Pool, PoolConfig};

const POOL: PoolConfig = PoolConfig { small: 64, large: 64 };
const PATIENCE: Duration = Duration::from_secs(120);

/// A listening link, one that connects to it, and the buffers of both.
struct World {
    cloud: Box<dyn Link>,
    device: Box<dyn Link>,
    pool: Pool,
    address: SocketAddr,
    /// Completions that nobody has asked for yet; cloud first.
    done: [Vec<Completion>; 2],
}

const CLOUD: usize = 0;
const DEVICE: usize = 1;

impl World {
    fn new(kind: LinkKind) -> Self {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let (cloud, device): (Box<dyn Link>, Box<dyn Link>) = match kind {
            LinkKind::Memory => {
                let net = MemoryNet::new();
                let cloud = net.link(Some(loopback)).unwrap();
                (Box::new(cloud), Box::new(net.link(None).unwrap()))
            }
            kind => {
                let cloud = link::open(kind, Some(loopback)).unwrap();
                assert_eq!(cloud.kind, kind, "{:?}", cloud.fallback);
                (cloud.link, link::open(kind, None).unwrap().link)
            }
        };
        let address = cloud.local_address().unwrap();
        Self { cloud, device, pool: Pool::new(POOL), address, done: Default::default() }
    }

    fn end(&mut self, end: usize) -> &mut dyn Link {
        if end == CLOUD { &mut *self.cloud } else { &mut *self.device }
    }

    fn poll(&mut self) {
        let pause = Some(Duration::from_micros(300));
        let [cloud, device] = &mut self.done;
        self.cloud.wait(pause, cloud).unwrap();
        self.device.wait(pause, device).unwrap();
    }

    /// Waits for the first completion at `end` that `is` accepts, and takes it out.
    fn expect(&mut self, end: usize, is: impl Fn(&Completion) -> bool) -> Completion {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(index) = self.done[end].iter().position(&is) {
                return self.done[end].remove(index);
            }
            assert!(Instant::now() < deadline, "left: {:?}", self.done);
            self.poll();
        }
    }

    /// A peer at both ends.
    fn connect(&mut self) -> [PeerId; 2] {
        let peer = self.device.connect(self.address).unwrap();
        self.expect(DEVICE, |done| {
            matches!(done, Completion::Connected { .. }) && peer_of(done) == Some(peer)
        });
        let accepted = self.expect(CLOUD, |done| matches!(done, Completion::Accepted { .. }));
        let Completion::Accepted { peer: accepted, .. } = accepted else { unreachable!() };
        [accepted, peer]
    }

    fn buf(&self, bytes: &[u8]) -> Buf {
        let mut buf = self.pool.take(bytes.len()).unwrap();
        buf.copy_from_slice(bytes);
        buf
    }

    /// An empty buffer to receive into; what comes stands from its body on.
    fn room(&self) -> Buf {
        self.pool.take(0).unwrap()
    }

    fn sent(&mut self, end: usize, peer: PeerId) -> Vec<Buf> {
        let is =
            |done: &Completion| matches!(done, Completion::Sent { peer: of, .. } if *of == peer);
        let Completion::Sent { bufs, .. } = self.expect(end, is) else { unreachable!() };
        bufs
    }

    fn received(&mut self, end: usize, peer: PeerId) -> (Buf, usize) {
        let is = |done: &Completion| {
            matches!(done, Completion::Received { .. }) && peer_of(done) == Some(peer)
        };
        let Completion::Received { buf, bytes, .. } = self.expect(end, is) else { unreachable!() };
        (buf, bytes)
    }

    fn closed(&mut self, end: usize, peer: PeerId) -> Option<std::io::Error> {
        let is =
            |done: &Completion| matches!(done, Completion::Closed { peer: of, .. } if *of == peer);
        let Completion::Closed { error, .. } = self.expect(end, is) else { unreachable!() };
        let late = self.done[end].iter().find(|done| peer_of(done) == Some(peer));
        assert!(late.is_none(), "Closed comes last: {late:?}");
        error
    }

    /// Receives exactly `count` bytes.
    fn read(&mut self, end: usize, peer: PeerId, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            let room = self.room();
            self.end(end).receive(peer, room);
            let (buf, bytes) = self.received(end, peer);
            assert!(bytes > 0, "closed after {} bytes", all.len());
            assert_eq!(buf.len(), bytes);
            all.extend_from_slice(&buf);
        }
        assert_eq!(all.len(), count);
        all
    }

    fn assert_all_buffers_are_back(&self) {
        assert_eq!(self.pool.free(), (POOL.small as usize, POOL.large as usize));
    }
}

fn peer_of(done: &Completion) -> Option<PeerId> {
    match done {
        Completion::Accepted { peer, .. }
        | Completion::Connected { peer }
        | Completion::Sent { peer, .. }
        | Completion::Received { peer, .. }
        | Completion::Closed { peer, .. } => Some(*peer),
        Completion::Woken => None,
    }
}

/// Header room and body, as a link sends a buffer.
fn wire(bufs: &[Buf]) -> Vec<u8> {
    bufs.iter().flat_map(|buf| buf.wire().to_vec()).collect()
}

fn bytes_pass_in_order(kind: LinkKind) {
    let mut world = World::new(kind);
    let [cloud, device] = world.connect();
    for (from, from_peer, to, to_peer) in
        [(DEVICE, device, CLOUD, cloud), (CLOUD, cloud, DEVICE, device)]
    {
        let bufs = vec![world.buf(b"one"), world.buf(&[7; 3000]), world.buf(b""), world.buf(b"x")];
        let expected = wire(&bufs);
        world.end(from).send(from_peer, bufs);
        assert_eq!(world.read(to, to_peer, expected.len()), expected);
        let bufs = world.sent(from, from_peer);
        assert_eq!(wire(&bufs), expected, "the same buffers come back");
    }
    world.assert_all_buffers_are_back();
}

fn a_full_pipe_holds_the_sender(kind: LinkKind) {
    let mut world = World::new(kind);
    let [cloud, device] = world.connect();
    // More than any socket buffer: the send can't be done before the other end reads.
    let mut expected = Vec::new();
    let mut sent = 0;
    for round in 0..8u8 {
        let bufs: Vec<Buf> = (0..24).map(|_| world.buf(&[round; 65_000])).collect();
        expected.extend(wire(&bufs));
        world.device.send(device, bufs);
        if round < 7 {
            // Reads while it sends.
            let mut got = Vec::new();
            while got.len() < 24 * 65_032 {
                let room = world.room();
                world.cloud.receive(cloud, room);
                let (buf, bytes) = world.received(CLOUD, cloud);
                assert!(bytes > 0);
                got.extend_from_slice(&buf);
            }
            assert_eq!(got, expected[sent..]);
            sent = expected.len();
            world.sent(DEVICE, device);
        }
    }
    // The last send is under way when its own end closes: the buffers come back all the same.
    for _ in 0..20 {
        world.poll();
    }
    world.device.close(device);
    assert_eq!(world.sent(DEVICE, device).len(), 24);
    assert!(world.closed(DEVICE, device).is_none());
    world.assert_all_buffers_are_back();
}

fn closing_gives_everything_back(kind: LinkKind) {
    let mut world = World::new(kind);
    let [cloud, device] = world.connect();
    let room = world.room();
    world.device.receive(device, room);
    world.poll();
    world.device.close(device);
    world.device.close(device);
    assert_eq!(world.received(DEVICE, device).1, 0);
    assert!(world.closed(DEVICE, device).is_none());
    // The other end notices when it reads.
    let room = world.room();
    world.cloud.receive(cloud, room);
    assert_eq!(world.received(CLOUD, cloud).1, 0);
    world.closed(CLOUD, cloud);
    // Whoever comes too late gets nothing, and loses nothing.
    let bufs = vec![world.buf(b"late")];
    world.device.send(device, bufs);
    let room = world.room();
    world.device.receive(device, room);
    world.device.close(device);
    for _ in 0..3 {
        world.poll();
    }
    assert!(world.done.iter().all(Vec::is_empty), "{:?}", world.done);
    world.assert_all_buffers_are_back();
}

fn last_words_arrive(kind: LinkKind) {
    let mut world = World::new(kind);
    let [cloud, device] = world.connect();
    let bufs = vec![world.buf(b"goodbye")];
    world.device.send(device, bufs);
    let expected = wire(&world.sent(DEVICE, device));
    world.device.close(device);
    world.closed(DEVICE, device);
    assert_eq!(world.read(CLOUD, cloud, expected.len()), expected);
    let room = world.room();
    world.cloud.receive(cloud, room);
    assert_eq!(world.received(CLOUD, cloud).1, 0);
    assert!(world.closed(CLOUD, cloud).is_none());
}

fn nobody_listens(kind: LinkKind) {
    let mut world = World::new(kind);
    let mut unused = world.address;
    unused.set_port(1);
    let peer = world.device.connect(unused).unwrap();
    let error = world.closed(DEVICE, peer).unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(world.done[DEVICE].is_empty(), "{:?}", world.done);
}

fn a_wait_ends(kind: LinkKind) {
    let mut world = World::new(kind);
    let mut done = Vec::new();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(20) {
        world.cloud.wait(Some(Duration::from_millis(20)), &mut done).unwrap();
    }
    assert!(done.is_empty());
    // From another thread, and many wakes are one.
    for _ in 0..3 {
        let waker = world.cloud.waker();
        let waking = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            (0..100).for_each(|_| waker.wake());
        });
        while done.is_empty() {
            world.cloud.wait(None, &mut done).unwrap();
        }
        waking.join().unwrap();
        world.cloud.wait(Some(Duration::ZERO), &mut done).unwrap();
        assert!(done.iter().all(|done| matches!(done, Completion::Woken)));
        assert!(done.len() <= 2, "{done:?}");
        done.clear();
    }
    // A wake before the wait counts too.
    world.cloud.waker().wake();
    while done.is_empty() {
        world.cloud.wait(None, &mut done).unwrap();
    }
}

fn many_peers_at_once(kind: LinkKind) {
    let mut world = World::new(kind);
    let peers: Vec<[PeerId; 2]> = (0..20).map(|_| world.connect()).collect();
    for (index, [cloud, device]) in peers.iter().enumerate() {
        let buf = world.buf(&[index as u8; 100]);
        world.device.send(*device, vec![buf]);
        let room = world.room();
        world.cloud.receive(*cloud, room);
    }
    for (index, [cloud, _]) in peers.iter().enumerate() {
        let (buf, bytes) = world.received(CLOUD, *cloud);
        assert_eq!(bytes, 132);
        assert_eq!(buf[32..], [index as u8; 100]);
    }
    let mut ids: Vec<PeerId> = peers.iter().map(|[cloud, _]| *cloud).collect();
    ids.dedup();
    assert_eq!(ids.len(), 20);
}

fn a_dropped_link_lets_go(kind: LinkKind) {
    let mut world = World::new(kind);
    let [cloud, device] = world.connect();
    let bufs: Vec<Buf> = (0..24).map(|_| world.buf(&[1; 65_000])).collect();
    world.device.send(device, bufs);
    let room = world.room();
    world.device.receive(device, room);
    world.poll();
    let World { cloud: cloud_link, device: device_link, pool, mut done, .. } = world;
    drop(device_link);
    done[DEVICE].clear();
    assert_eq!(pool.free(), (POOL.small as usize, POOL.large as usize));
    let mut cloud_link = cloud_link;
    let room = pool.take(0).unwrap();
    cloud_link.receive(cloud, room);
    drop(cloud_link);
    assert_eq!(pool.free(), (POOL.small as usize, POOL.large as usize));
}

fn link_conforms(kind: LinkKind) {
    bytes_pass_in_order(kind);
    a_full_pipe_holds_the_sender(kind);
    closing_gives_everything_back(kind);
    last_words_arrive(kind);
    nobody_listens(kind);
    a_wait_ends(kind);
    many_peers_at_once(kind);
    a_dropped_link_lets_go(kind);
}

#[test]
fn memory_conforms() {
    link_conforms(LinkKind::Memory);
}

#[test]
fn mio_conforms() {
    link_conforms(LinkKind::Mio);
}

#[test]
fn io_uring_conforms() {
    match link::probe_uring() {
        Ok(()) => link_conforms(LinkKind::IoUring),
        Err(reason) => eprintln!("not tested here: {reason}"),
    }
}

#[test]
fn io_uring_falls_back_to_mio() {
    let listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    let refuse = || Err("switched off for a test".to_owned());
    let opened = link::open_probed(LinkKind::IoUring, listen, refuse).unwrap();
    assert_eq!(opened.kind, LinkKind::Mio);
    assert_eq!(opened.fallback.as_deref(), Some("switched off for a test"));
    assert!(opened.link.local_address().is_some());
    // The real probe decides when nobody else does.
    let opened = link::open(LinkKind::IoUring, listen).unwrap();
    let expected = match link::probe_uring() {
        Ok(()) => (LinkKind::IoUring, None),
        Err(reason) => (LinkKind::Mio, Some(reason)),
    };
    assert_eq!((opened.kind, opened.fallback), expected);
}

#[test]
fn addresses_in_use_are_errors() {
    let net = MemoryNet::new();
    let first = net.link(Some(SocketAddr::from(([127, 0, 0, 1], 0)))).unwrap();
    let taken = first.local_address();
    assert_eq!(net.link(taken).err().unwrap().kind(), std::io::ErrorKind::AddrInUse);
    drop(first);
    assert!(net.link(taken).is_ok());
    let listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    let first = link::open(LinkKind::Mio, listen).unwrap();
    let taken = first.link.local_address();
    for kind in [LinkKind::Mio, LinkKind::IoUring] {
        let error = link::open(kind, taken).err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    }
    assert!(link::open(LinkKind::Memory, listen).is_err());
}
