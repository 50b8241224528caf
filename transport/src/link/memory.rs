//! The in-process link: bounded byte pipes between the links of one [`MemoryNet`].
//!
//! It behaves as TCP does where that matters: bytes are cut and joined anywhere, a full pipe holds
//! the sender, connecting to an address where nobody listens is refused, a closed end lets the
//! bytes under way arrive first.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Completion, Link, PeerId, Sending, Waker, give_back};
use crate::pool::Buf;

/// Bytes that one direction of a pipe holds.
const PIPE_BYTES: usize = 256 << 10;
/// Port 0 stands for the first free one from here.
const FREE_PORTS: u16 = 49152;
/// Peers that wait to be accepted, at most.
const BACKLOG: usize = 128;

/// A network inside one process. Links of different networks don't see each other.
#[derive(Clone, Default)]
pub struct MemoryNet {
    listeners: Arc<Mutex<BTreeMap<SocketAddr, Arc<Listener>>>>,
}

impl std::fmt::Debug for MemoryNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MemoryNet")
    }
}

impl MemoryNet {
    /// An empty network.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A link that listens at `listen`, or only connects. Port 0 means any free one.
    ///
    /// # Errors
    /// If the address is taken.
    pub fn link(&self, listen: Option<SocketAddr>) -> io::Result<MemoryLink> {
        let bell = Arc::new(Bell::default());
        let mut listener = None;
        if let Some(mut address) = listen {
            let mut listeners = lock(&self.listeners);
            if address.port() == 0 {
                let free = (FREE_PORTS..=u16::MAX).find(|port| {
                    address.set_port(*port);
                    !listeners.contains_key(&address)
                });
                address.set_port(free.ok_or(io::ErrorKind::AddrNotAvailable)?);
            }
            if listeners.contains_key(&address) {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            let new = Arc::new(Listener { waiting: Mutex::default(), bell: Arc::clone(&bell) });
            listeners.insert(address, Arc::clone(&new));
            listener = Some((address, new));
        }
        let waker = Waker::new({
            let bell = Arc::clone(&bell);
            move || bell.ring()
        });
        let net = self.clone();
        Ok(MemoryLink { net, bell, waker, listener, peers: BTreeMap::new(), next_peer: 1 })
    }
}

/// One link of a [`MemoryNet`].
pub struct MemoryLink {
    net: MemoryNet,
    bell: Arc<Bell>,
    waker: Waker,
    listener: Option<(SocketAddr, Arc<Listener>)>,
    peers: BTreeMap<PeerId, Peer>,
    next_peer: u64,
}

/// Signal to the other side of a link that there may be something to do.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *lock(&self.rung) = true;
        self.changed.notify_all();
    }

    /// Waits until rung, or until `deadline`; says which.
    fn wait(&self, deadline: Option<Instant>) -> bool {
        let mut rung = lock(&self.rung);
        while !*rung {
            let Some(deadline) = deadline else {
                rung = self.changed.wait(rung).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(rung, left);
            rung = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *rung = false;
        true
    }
}

struct Listener {
    waiting: Mutex<VecDeque<(SocketAddr, End)>>,
    bell: Arc<Bell>,
}

/// One direction of a pipe.
#[derive(Default)]
struct Flow {
    bytes: VecDeque<u8>,
    /// Either end is closed.
    closed: bool,
}

/// One end of a pipe: what it reads, what it writes, and whom to tell.
struct End {
    reads: Arc<Mutex<Flow>>,
    writes: Arc<Mutex<Flow>>,
    other: Arc<Bell>,
}

struct Peer {
    /// `None`: nobody listened there.
    end: Option<End>,
    connecting: bool,
    closing: bool,
    sending: Option<Sending>,
    receiving: Option<Buf>,
}

impl Peer {
    fn new(end: Option<End>, connecting: bool) -> Self {
        Self { end, connecting, closing: false, sending: None, receiving: None }
    }
}

impl Link for MemoryLink {
    fn connect(&mut self, address: SocketAddr) -> io::Result<PeerId> {
        let listener = lock(&self.net.listeners).get(&address).cloned();
        let end = listener.and_then(|listener| {
            let (up, down) = (Arc::<Mutex<Flow>>::default(), Arc::<Mutex<Flow>>::default());
            let theirs = End {
                reads: Arc::clone(&up),
                writes: Arc::clone(&down),
                other: Arc::clone(&self.bell),
            };
            let ours = End { reads: down, writes: up, other: Arc::clone(&listener.bell) };
            let mut waiting = lock(&listener.waiting);
            if waiting.len() >= BACKLOG {
                return None;
            }
            let from = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
            waiting.push_back((from, theirs));
            listener.bell.ring();
            Some(ours)
        });
        Ok(self.insert(Peer::new(end, true)))
    }

    fn send(&mut self, peer: PeerId, bufs: Vec<Buf>) {
        let Some(peer) = self.peers.get_mut(&peer) else {
            return;
        };
        assert!(peer.sending.is_none(), "one send at a time");
        peer.sending = Some(Sending::new(bufs));
    }

    fn receive(&mut self, peer: PeerId, mut buf: Buf) {
        let Some(peer) = self.peers.get_mut(&peer) else {
            return;
        };
        assert!(peer.receiving.is_none(), "one receive at a time");
        assert!(!buf.spare_mut().is_empty(), "room to receive into");
        peer.receiving = Some(buf);
    }

    fn close(&mut self, peer: PeerId) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.closing = true;
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>) -> io::Result<()> {
        let before = done.len();
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            self.progress(done);
            if done.len() > before || !self.bell.wait(deadline) {
                return Ok(());
            }
        }
    }

    fn local_address(&self) -> Option<SocketAddr> {
        self.listener.as_ref().map(|(address, _)| *address)
    }

    /// No system calls are counted: waiting is the only one, and it is a condition variable's.
    fn syscalls(&self) -> u64 {
        0
    }
}

impl MemoryLink {
    fn insert(&mut self, peer: Peer) -> PeerId {
        let id = PeerId(self.next_peer);
        self.next_peer += 1;
        self.peers.insert(id, peer);
        id
    }

    /// Does all that can be done without waiting.
    fn progress(&mut self, done: &mut Vec<Completion>) {
        if self.waker.take() {
            done.push(Completion::Woken);
        }
        while let Some((_, listener)) = &self.listener {
            let Some((address, end)) = lock(&listener.waiting).pop_front() else {
                break;
            };
            let peer = self.insert(Peer::new(Some(end), false));
            done.push(Completion::Accepted { peer, address });
        }
        self.peers.retain(|id, peer| peer.progress(*id, done));
    }
}

impl Peer {
    /// Does what can be done; `false` when the peer is gone.
    fn progress(&mut self, id: PeerId, done: &mut Vec<Completion>) -> bool {
        let Some(end) = &self.end else {
            return self.finish(id, Some(io::ErrorKind::ConnectionRefused.into()), done);
        };
        if self.closing {
            return self.finish(id, None, done);
        }
        if std::mem::take(&mut self.connecting) {
            done.push(Completion::Connected { peer: id });
        }
        let mut moved = 0;
        if let Some(sending) = &mut self.sending {
            let count = push(&mut lock(&end.writes), sending);
            moved += count;
            if sending.advance(count) {
                give_back(id, &mut self.sending, &mut None, done);
            }
        }
        let mut over = false;
        if let Some(mut buf) = self.receiving.take() {
            let bytes = pull(&mut lock(&end.reads), &mut buf);
            moved += bytes;
            if bytes > 0 {
                done.push(Completion::Received { peer: id, buf, bytes });
            } else {
                self.receiving = Some(buf);
                over = lock(&end.reads).closed;
            }
        }
        if moved > 0 {
            end.other.ring();
        }
        // An end notices that the other is gone when it has read all, or writes in vain.
        let in_vain = self.sending.is_some() && lock(&end.writes).closed;
        over |= in_vain && lock(&end.reads).bytes.is_empty();
        !over || self.finish(id, None, done)
    }

    fn finish(&mut self, id: PeerId, error: Option<io::Error>, done: &mut Vec<Completion>) -> bool {
        give_back(id, &mut self.sending, &mut self.receiving, done);
        if let Some(end) = self.end.take() {
            lock(&end.reads).closed = true;
            lock(&end.writes).closed = true;
            end.other.ring();
        }
        done.push(Completion::Closed { peer: id, error });
        false
    }
}

/// Appends bytes of a send, as many as fit, and returns how many.
fn push(flow: &mut Flow, sending: &Sending) -> usize {
    let mut count = 0;
    for rest in sending.rest() {
        let room = PIPE_BYTES - flow.bytes.len();
        let fits = &rest[..rest.len().min(room)];
        flow.bytes.extend(fits);
        count += fits.len();
    }
    count
}

/// Moves bytes to the room of `buf`, as many as there are, and returns how many.
fn pull(flow: &mut Flow, buf: &mut Buf) -> usize {
    let room = buf.spare_mut();
    let count = room.len().min(flow.bytes.len());
    let (front, back) = flow.bytes.as_slices();
    let first = count.min(front.len());
    room[..first].copy_from_slice(&front[..first]);
    room[first..count].copy_from_slice(&back[..count - first]);
    flow.bytes.drain(..count);
    buf.advance(count);
    count
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        let mut done = Vec::new();
        for (id, peer) in &mut self.peers {
            peer.finish(*id, None, &mut done);
        }
        if let Some((address, listener)) = &self.listener {
            lock(&self.net.listeners).remove(address);
            for (_, end) in lock(&listener.waiting).drain(..) {
                lock(&end.reads).closed = true;
                lock(&end.writes).closed = true;
                end.other.ring();
            }
        }
    }
}

/// A poisoned lock means that another thread panicked between two plain assignments; the data is
/// whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
