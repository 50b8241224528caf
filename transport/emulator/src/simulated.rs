//! [`SimNet`]: sockets in virtual time, on one thread, that break as a seed and a test want it.
//!
//! A link of such a net never waits: [`Link::wait`] gives what is due by the net's clock and
//! returns. Whoever drives it moves the clock to [`SimNet::next_at`], or to a moment of its own.
//! Each socket has a latency and a rate; what arrives is cut and joined anywhere.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hat_transport::clock::{Clock, ManualClock};
use hat_transport::link::{Completion, Link, PeerId, Waker};
use hat_transport::pool::Buf;
use hat_transport::random::SeededRandom;

/// Ranges from which a socket's properties are drawn.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// Microseconds that a byte travels.
    pub latency_us: RangeInclusive<u64>,
    /// Nanoseconds that a byte takes of a socket's directions: from the end that connects, and to
    /// it.
    pub ns_per_byte: [RangeInclusive<u64>; 2],
    /// True if what arrives is cut anywhere.
    pub cuts: bool,
}

/// One direction of a socket whose times change as a function says. Frames arrive one by one, and
/// the first `SEGMENT_BYTES` of each before the rest, by which a receiver knows the rate.
pub struct Way {
    /// Time that so many bytes take if they are sent at this moment.
    pub bytes: Box<dyn Fn(Instant, usize) -> Duration + Send + Sync>,
    /// Time that the sender spends on handing a message over, beside its bytes.
    pub message: Duration,
    /// Time that a byte travels.
    pub latency: Duration,
}

/// Bytes of a frame that arrive first over a [`Way`].
const SEGMENT_BYTES: usize = 1460;

/// Kind of a socket's break. Index 0 is the end that connected, 1 the one that accepted.
#[derive(Clone, Copy, Debug)]
pub struct Break {
    /// Bytes on their way from each end that arrive still; what follows them is lost.
    pub arrive: [usize; 2],
    /// Time until each end is told that the socket is gone; `None`: it hears nothing any more.
    pub told: [Option<Duration>; 2],
}

/// A network of links in virtual time.
#[derive(Clone)]
pub struct SimNet {
    state: Arc<Mutex<State>>,
}

impl SimNet {
    /// An empty network that draws its sockets from `seed`.
    #[must_use]
    pub fn new(clock: Arc<ManualClock>, conditions: Conditions, seed: u64) -> Self {
        let state = State {
            clock,
            conditions,
            random: SeededRandom::new(seed),
            listeners: BTreeMap::new(),
            sockets: BTreeMap::new(),
            of_link: BTreeMap::new(),
            of_peer: BTreeMap::new(),
            touched: BTreeSet::new(),
            next: 1,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// A link that listens at `listen`, or only connects.
    ///
    /// # Errors
    /// If the address is taken.
    pub fn link(&self, listen: Option<SocketAddr>) -> io::Result<SimLink> {
        let mut state = self.state();
        let id = state.number();
        if let Some(address) = listen
            && state.listeners.insert(address, id).is_some()
        {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let conditions = state.conditions.clone();
        let (net, waker) = (self.clone(), Waker::new(|| ()));
        Ok(SimLink { net, id, listen, conditions, ways: None, waker })
    }

    /// Time of the next completion of the link of this number; now or earlier if it has one
    /// already.
    #[must_use]
    pub fn next_of(&self, link: u64) -> Option<Instant> {
        let state = self.state();
        let now = state.clock.now();
        let sockets = state.of_link.get(&link).into_iter().flatten();
        let ends = sockets.flat_map(|id| [0, 1].map(|end| (&state.sockets[id], end)));
        let own = ends.filter(|(socket, end)| socket.ends[*end].link == link);
        own.filter_map(|(socket, end)| socket.next_at(end, now)).min()
    }

    /// The same for any link.
    #[must_use]
    pub fn next_at(&self) -> Option<Instant> {
        let links: Vec<u64> = self.state().of_link.keys().copied().collect();
        links.into_iter().filter_map(|link| self.next_of(link)).min()
    }

    /// Numbers of the links for which something has changed since this was last asked.
    #[must_use]
    pub fn take_touched(&self) -> BTreeSet<u64> {
        std::mem::take(&mut self.state().touched)
    }

    /// Sockets that both ends have, the oldest first.
    #[must_use]
    pub fn sockets(&self) -> Vec<u64> {
        let is_open = |socket: &Socket| socket.ends.iter().all(|end| end.phase == Phase::Open);
        let state = self.state();
        state.sockets.iter().filter(|(_, socket)| is_open(socket)).map(|(id, _)| *id).collect()
    }

    /// Bytes on their way from each end of a socket.
    #[must_use]
    pub fn under_way(&self, socket: u64) -> [usize; 2] {
        let state = self.state();
        state.sockets.get(&socket).map_or([0; 2], |socket| {
            [0, 1].map(|end| socket.flows[end].pieces.iter().map(|piece| piece.1.len()).sum())
        })
    }

    /// Breaks a socket.
    pub fn break_socket(&self, socket: u64, how: Break) {
        let mut state = self.state();
        let now = state.clock.now();
        state.touch(socket);
        let Some(socket) = state.sockets.get_mut(&socket) else { return };
        for (end, flow) in socket.flows.iter_mut().enumerate() {
            let mut left = how.arrive[end];
            for (_, bytes) in &mut flow.pieces {
                bytes.truncate(left);
                left -= bytes.len();
            }
            flow.pieces.retain(|(_, bytes)| !bytes.is_empty());
            flow.lost = true;
            flow.end_at = how.told[1 - end].map(|told| now + told);
        }
    }

    /// Nothing arrives over a socket for a while; what is sent meanwhile comes later.
    pub fn stall(&self, socket: u64, lasts: Duration) {
        let mut state = self.state();
        let until = state.clock.now() + lasts;
        state.touch(socket);
        let Some(socket) = state.sockets.get_mut(&socket) else { return };
        for flow in &mut socket.flows {
            flow.pieces.iter_mut().for_each(|piece| piece.0 = piece.0.max(until));
            flow.last_at = flow.last_at.max(until);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct State {
    clock: Arc<ManualClock>,
    conditions: Conditions,
    random: SeededRandom,
    /// Listening link of each address.
    listeners: BTreeMap<SocketAddr, u64>,
    sockets: BTreeMap<u64, Socket>,
    /// Sockets of each link.
    of_link: BTreeMap<u64, BTreeSet<u64>>,
    /// Socket and end of each peer.
    of_peer: BTreeMap<PeerId, (u64, usize)>,
    /// Links for which something has changed.
    touched: BTreeSet<u64>,
    /// The next link, socket or peer.
    next: u64,
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// The socket and the end of a peer; whoever has the other end may have something to tell.
    fn end_of(&mut self, peer: PeerId) -> Option<(&mut Socket, usize)> {
        let (id, end) = *self.of_peer.get(&peer)?;
        let socket = self.sockets.get_mut(&id)?;
        self.touched.insert(socket.ends[1 - end].link);
        Some((socket, end))
    }

    fn touch(&mut self, socket: u64) {
        let ends = self.sockets.get(&socket).into_iter().flat_map(|socket| &socket.ends);
        self.touched.extend(ends.map(|end| end.link));
    }

    /// Forgets a socket that neither end has.
    fn forget(&mut self, id: u64) {
        let is_gone = |socket: &Socket| socket.ends.iter().all(|end| end.phase == Phase::Gone);
        if self.sockets.get(&id).is_some_and(is_gone)
            && let Some(socket) = self.sockets.remove(&id)
        {
            for end in &socket.ends {
                self.of_peer.remove(&end.peer);
                if let Some(sockets) = self.of_link.get_mut(&end.link) {
                    sockets.remove(&id);
                }
            }
        }
    }
}

struct Socket {
    ends: [End; 2],
    /// Bytes from each end.
    flows: [Flow; 2],
    latency: Duration,
    /// Of bytes from each end.
    ns_per_byte: [u64; 2],
    /// Times of bytes from each end, instead.
    ways: Option<Arc<[Way; 2]>>,
    /// True if arriving bytes are cut at any place.
    cuts: bool,
    /// Nobody listened there.
    refused: bool,
}

struct End {
    link: u64,
    peer: PeerId,
    phase: Phase,
    /// Buffers that the link has, and when it gives them back.
    sending: Option<(Instant, Vec<Buf>)>,
    receiving: Option<Buf>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Opening(Instant),
    Open,
    Closing,
    Gone,
}

/// One direction of a socket.
struct Flow {
    /// Bytes on their way, with the time at which they are there.
    pieces: VecDeque<(Instant, Vec<u8>)>,
    last_at: Instant,
    /// Time at which the reader sees the end, if it has read all that came before.
    end_at: Option<Instant>,
    /// True if bytes sent from now on arrive nowhere.
    lost: bool,
}

impl Flow {
    /// Bytes arrive at this time, and after those that were sent before.
    fn push(&mut self, at: Instant, bytes: Vec<u8>) {
        if !self.lost {
            self.last_at = self.last_at.max(at);
            self.pieces.push_back((self.last_at, bytes));
        }
    }

    /// Frames go over a way from `now` on; returns when the last of them has left.
    fn send_over(&mut self, way: &Way, now: Instant, bufs: &[Buf]) -> Instant {
        // Frames that follow the last without a gap are of the same message.
        let is_idle = now + way.latency > self.last_at;
        let mut left = if is_idle { now + way.message } else { now };
        for buf in bufs {
            let (first, rest) = buf.wire().split_at(buf.wire().len().min(SEGMENT_BYTES));
            for part in [first, rest].into_iter().filter(|part| !part.is_empty()) {
                left += (way.bytes)(now, part.len());
                self.push(left + way.latency, part.to_vec());
            }
        }
        left
    }
}

impl Socket {
    /// Time of this end's next completion.
    fn next_at(&self, end: usize, now: Instant) -> Option<Instant> {
        let (own, flow) = (&self.ends[end], &self.flows[1 - end]);
        match own.phase {
            Phase::Gone => None,
            Phase::Opening(at) => Some(at),
            Phase::Closing => Some(now),
            Phase::Open => {
                let sent = own.sending.as_ref().map(|(at, _)| *at);
                let arrives = match flow.pieces.front() {
                    Some((at, _)) => own.receiving.is_some().then_some(*at),
                    None => flow.end_at,
                };
                sent.into_iter().chain(arrives).min()
            }
        }
    }

    fn send(&mut self, end: usize, now: Instant, bufs: Vec<Buf>) {
        let own = &mut self.ends[end];
        assert!(own.sending.is_none(), "one send at a time");
        if own.phase != Phase::Open {
            return;
        }
        let flow = &mut self.flows[end];
        let sent_at = match &self.ways {
            Some(ways) => flow.send_over(&ways[end], now, &bufs),
            None => {
                let mut bytes = Vec::with_capacity(bufs.iter().map(|buf| buf.wire().len()).sum());
                bufs.iter().for_each(|buf| bytes.extend_from_slice(buf.wire()));
                let takes = Duration::from_nanos(self.ns_per_byte[end] * bytes.len() as u64);
                flow.push(now + takes + self.latency, bytes);
                now + takes
            }
        };
        own.sending = Some((sent_at, bufs));
    }

    /// Does what is due at this end.
    fn progress(
        &mut self,
        end: usize,
        now: Instant,
        random: &mut SeededRandom,
        done: &mut Vec<Completion>,
    ) {
        if self.next_at(end, now).is_none_or(|at| at > now) {
            return;
        }
        let peer = self.ends[end].peer;
        match self.ends[end].phase {
            Phase::Gone => return,
            Phase::Closing => return self.finish(end, now, None, done),
            Phase::Opening(_) if self.refused => {
                let error = io::ErrorKind::ConnectionRefused.into();
                return self.finish(end, now, Some(error), done);
            }
            Phase::Opening(_) => {
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                let accepted = Completion::Accepted { peer, address };
                done.push(if end == 0 { Completion::Connected { peer } } else { accepted });
                self.ends[end].phase = Phase::Open;
            }
            Phase::Open => {}
        }
        let (own, flow) = (&mut self.ends[end], &mut self.flows[1 - end]);
        if let Some((_, bufs)) = own.sending.take_if(|(at, _)| *at <= now) {
            done.push(Completion::Sent { peer, bufs });
        }
        if let Some((_, piece)) = flow.pieces.front_mut().filter(|(at, _)| *at <= now)
            && let Some(mut buf) = own.receiving.take()
        {
            let most = piece.len().min(buf.spare_mut().len());
            let is_cut = self.cuts && random.below(4) == 0;
            let bytes = if is_cut { most.min(1 + random.below(64) as usize) } else { most };
            buf.spare_mut()[..bytes].copy_from_slice(&piece[..bytes]);
            buf.advance(bytes);
            piece.drain(..bytes);
            if piece.is_empty() {
                flow.pieces.pop_front();
            }
            done.push(Completion::Received { peer, buf, bytes });
        } else if flow.pieces.is_empty() && flow.end_at.is_some_and(|at| at <= now) {
            self.finish(end, now, None, done);
        }
    }

    /// The end is gone here; the other reads what was sent before, and then hears of it.
    fn finish(
        &mut self,
        end: usize,
        now: Instant,
        error: Option<io::Error>,
        done: &mut Vec<Completion>,
    ) {
        let own = &mut self.ends[end];
        let peer = own.peer;
        if let Some((_, bufs)) = own.sending.take() {
            done.push(Completion::Sent { peer, bufs });
        }
        if let Some(buf) = own.receiving.take() {
            done.push(Completion::Received { peer, buf, bytes: 0 });
        }
        own.phase = Phase::Gone;
        done.push(Completion::Closed { peer, error });
        let flow = &mut self.flows[end];
        if !flow.lost {
            flow.end_at = Some(flow.last_at.max(now + self.latency));
            flow.lost = true;
        }
    }
}

/// One link of a [`SimNet`]. Dropping it is the end of its process: its sockets close.
pub struct SimLink {
    net: SimNet,
    id: u64,
    listen: Option<SocketAddr>,
    /// Of the sockets that it makes.
    conditions: Conditions,
    /// Directions of the sockets that it makes, instead.
    ways: Option<Arc<[Way; 2]>>,
    waker: Waker,
}

impl SimLink {
    /// Its number in [`SimNet::next_of`].
    #[must_use]
    pub fn number(&self) -> u64 {
        self.id
    }

    /// Gives the sockets that it makes these ways, from it and to it.
    #[must_use]
    pub fn with_ways(mut self, ways: [Way; 2]) -> Self {
        self.ways = Some(Arc::new(ways));
        self
    }
}

impl Link for SimLink {
    fn connect(&mut self, address: SocketAddr) -> io::Result<PeerId> {
        let mut state = self.net.state();
        let now = state.clock.now();
        let Conditions { latency_us, ns_per_byte, cuts } = self.conditions.clone();
        let drawn = Duration::from_micros(state.random.within(latency_us));
        let latency = self.ways.as_ref().map_or(drawn, |ways| ways[0].latency);
        let drawn = state.random.next_u64();
        let ns_per_byte =
            ns_per_byte.map(|range| range.start() + drawn % (range.end() - range.start() + 1));
        let listener = state.listeners.get(&address).copied();
        let id = state.number();
        let peers = [0, 1].map(|_| PeerId(state.number()));
        let end = |link: u64, peer, after| End {
            link,
            peer,
            phase: Phase::Opening(now + after),
            sending: None,
            receiving: None,
        };
        let mut ends = [
            end(self.id, peers[0], 2 * latency),
            end(listener.unwrap_or_default(), peers[1], latency),
        ];
        if listener.is_none() {
            ends[1].phase = Phase::Gone;
        }
        let flows = [0, 1].map(|_| Flow {
            pieces: VecDeque::new(),
            last_at: now,
            end_at: None,
            lost: false,
        });
        let refused = listener.is_none();
        for (number, end) in ends.iter().enumerate() {
            state.of_peer.insert(end.peer, (id, number));
            state.of_link.entry(end.link).or_default().insert(id);
        }
        let ways = self.ways.clone();
        let socket = Socket { ends, flows, latency, ns_per_byte, ways, cuts, refused };
        state.sockets.insert(id, socket);
        state.touch(id);
        Ok(peers[0])
    }

    fn send(&mut self, peer: PeerId, bufs: Vec<Buf>) {
        let mut state = self.net.state();
        let now = state.clock.now();
        if let Some((socket, end)) = state.end_of(peer) {
            socket.send(end, now, bufs);
        }
    }

    fn receive(&mut self, peer: PeerId, mut buf: Buf) {
        assert!(!buf.spare_mut().is_empty(), "room to receive into");
        let mut state = self.net.state();
        if let Some((socket, end)) = state.end_of(peer)
            && socket.ends[end].phase == Phase::Open
        {
            let own = &mut socket.ends[end];
            assert!(own.receiving.replace(buf).is_none(), "one receive at a time");
        }
    }

    fn close(&mut self, peer: PeerId) {
        let mut state = self.net.state();
        if let Some((socket, end)) = state.end_of(peer)
            && socket.ends[end].phase != Phase::Gone
        {
            socket.ends[end].phase = Phase::Closing;
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn wait(&mut self, _timeout: Option<Duration>, done: &mut Vec<Completion>) -> io::Result<()> {
        if self.waker.take() {
            done.push(Completion::Woken);
        }
        let mut state = self.net.state();
        let now = state.clock.now();
        let own: Vec<u64> = state.of_link.get(&self.id).into_iter().flatten().copied().collect();
        for id in own {
            let State { random, sockets, touched, .. } = &mut *state;
            let Some(socket) = sockets.get_mut(&id) else { continue };
            for end in 0..2 {
                if socket.ends[end].link == self.id {
                    let was_gone = socket.ends[end].phase == Phase::Gone;
                    socket.progress(end, now, random, done);
                    if !was_gone && socket.ends[end].phase == Phase::Gone {
                        touched.insert(socket.ends[1 - end].link);
                    }
                }
            }
            state.forget(id);
        }
        Ok(())
    }

    fn local_address(&self) -> Option<SocketAddr> {
        self.listen
    }

    /// No system calls are made.
    fn syscalls(&self) -> u64 {
        0
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        let mut state = self.net.state();
        let now = state.clock.now();
        if let Some(address) = self.listen {
            state.listeners.remove(&address);
        }
        for id in state.of_link.remove(&self.id).unwrap_or_default() {
            state.touch(id);
            let Some(socket) = state.sockets.get_mut(&id) else { continue };
            for end in 0..2 {
                if socket.ends[end].link == self.id && socket.ends[end].phase != Phase::Gone {
                    socket.finish(end, now, None, &mut Vec::new());
                }
            }
            state.forget(id);
        }
    }
}
