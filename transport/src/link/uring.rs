//! The link over io_uring: one ring, one thread, one system call for a wait and all that goes
//! before it.
//!
//! Operations name memory that the kernel reads or writes later: a buffer, a list of slices, an
//! address. All of it belongs to the link from submission to completion, also when the peer is
//! closed meanwhile: closing cancels, and the peer is dropped only after its last completion. If
//! the link itself is dropped it waits for them; what does not come back is leaked, never reused.

mod setup;

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::event::EventfdFlags;
use rustix::net::{AddressFamily, Shutdown, SocketAddrAny, SocketFlags, SocketType};

use super::socket::Accepting;
use super::{Completion, Link, PeerId, Sending, Waker, give_back};
use crate::pool::Buf;
use setup::build;

pub(super) use setup::limit_unsent;
pub use setup::probe;

/// Parts of one send.
const SLICES: usize = 64;
/// Time that a dropped link waits for the kernel to let go.
const DROP_PATIENCE: Duration = Duration::from_secs(1);

/// Purpose of an operation; the low bits of its user data, the peer's number above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Op {
    Accept = 0,
    Wake = 1,
    Connect = 2,
    Send = 3,
    Receive = 4,
    Cancel = 5,
}

const OP_BITS: u32 = 3;

fn user_data(op: Op, peer: PeerId) -> u64 {
    peer.0 << OP_BITS | op as u64
}

/// TCP over io_uring.
pub struct UringLink {
    ring: IoUring,
    /// The ring starts disabled, so that the thread that first waits becomes its owner.
    enabled: bool,
    listener: Option<TcpListener>,
    accept_armed: bool,
    /// One submission accepts many peers (Linux 5.19).
    accept_multi: bool,
    accepting: Accepting,
    wake_event: Arc<OwnedFd>,
    /// Memory in which the kernel puts the count of `wake_event`.
    wake_count: Box<u64>,
    wake_armed: bool,
    waker: Waker,
    peers: HashMap<PeerId, Peer>,
    next_peer: u64,
    /// Peers whose last operation may be over.
    leaving: Vec<PeerId>,
    /// Buffers that came too late to be submitted; they go back at the next wait.
    late: Vec<Completion>,
    syscalls: u64,
}

struct Peer {
    socket: OwnedFd,
    /// Address of a connect; read by the kernel while `connecting`.
    address: Option<Box<SocketAddrAny>>,
    connecting: bool,
    closing: bool,
    error: Option<io::Error>,
    /// The buffers that the kernel reads.
    sending: Option<Sending>,
    /// The list of slices that the kernel reads while `sending`.
    message: Box<SendMessage>,
    /// The buffer that the kernel writes.
    receiving: Option<Buf>,
}

/// A `msghdr` and the slices that it points to.
struct SendMessage {
    header: libc::msghdr,
    slices: [libc::iovec; SLICES],
}

// SAFETY: the pointers lead to the buffers in `Peer::sending` and to `slices` beside them, which
// move between threads together with the link.
unsafe impl Send for SendMessage {}

impl SendMessage {
    fn new() -> Box<Self> {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: a `msghdr` is integers and pointers, for which zero bytes are valid.
        let header = unsafe { std::mem::zeroed() };
        Box::new(Self { header, slices: [empty; SLICES] })
    }

    /// Points to the bytes of a send that are not through.
    fn fill(&mut self, sending: &Sending) -> *const libc::msghdr {
        let mut count = 0;
        for (slice, rest) in self.slices.iter_mut().zip(sending.rest()) {
            let iov_base = rest.as_ptr().cast_mut().cast();
            *slice = libc::iovec { iov_base, iov_len: rest.len() };
            count += 1;
        }
        self.header.msg_iov = self.slices.as_mut_ptr();
        self.header.msg_iovlen = count as _;
        &raw const self.header
    }
}

impl UringLink {
    /// A link that listens at `listen`, or only connects. Ask [`probe`] first.
    ///
    /// # Errors
    /// If the address can't be listened at, or the ring can't be set up.
    pub fn new(listen: Option<SocketAddr>) -> io::Result<Self> {
        let (ring, disabled) = build()?;
        let wake_event = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?);
        let waker = Waker::new({
            let wake_event = Arc::clone(&wake_event);
            move || {
                if let Err(error) = rustix::io::write(&*wake_event, &1u64.to_ne_bytes()) {
                    tracing::error!(%error, "the network thread can't be woken");
                }
            }
        });
        Ok(Self {
            ring,
            enabled: !disabled,
            listener: listen.map(TcpListener::bind).transpose()?,
            accept_armed: false,
            accept_multi: true,
            accepting: Accepting::default(),
            wake_event,
            wake_count: Box::new(0),
            wake_armed: false,
            waker,
            peers: HashMap::new(),
            next_peer: 1,
            leaving: Vec::new(),
            late: Vec::new(),
            syscalls: 0,
        })
    }

    fn insert(&mut self, socket: OwnedFd, address: Option<SocketAddr>) -> io::Result<PeerId> {
        // Small frames must not wait for each other, nor behind what can't be sent yet.
        rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
        limit_unsent(&socket)?;
        let id = PeerId(self.next_peer);
        self.next_peer += 1;
        let peer = Peer {
            socket,
            connecting: address.is_some(),
            address: address.map(|address| Box::new(address.into())),
            closing: false,
            error: None,
            sending: None,
            message: SendMessage::new(),
            receiving: None,
        };
        self.peers.insert(id, peer);
        Ok(id)
    }

    /// Queues an operation.
    ///
    /// # Safety
    /// The memory that it names stays where it is, and as it is, until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the caller's promise.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // The queue is full: hand over what is in it.
            self.syscalls += 1;
            if let Err(error) = self.enable().and_then(|()| self.ring.submit()) {
                tracing::warn!(%error, "io_uring takes no submissions");
            }
        }
    }

    fn enable(&mut self) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        Ok(())
    }

    /// Puts the standing operations back after each completion.
    fn arm(&mut self) {
        if !self.wake_armed {
            let to = (&raw mut *self.wake_count).cast();
            let entry = opcode::Read::new(Fd(self.wake_event.as_raw_fd()), to, 8)
                .build()
                .user_data(user_data(Op::Wake, PeerId(0)));
            self.wake_armed = true;
            // SAFETY: `wake_count` lives in a box of the link, and is leaked with it if need be.
            unsafe { self.push(&entry) };
        }
        if let Some(listener) = &self.listener
            && !self.accept_armed
        {
            let socket = Fd(listener.as_raw_fd());
            let entry = if self.accept_multi {
                opcode::AcceptMulti::new(socket).flags(libc::SOCK_CLOEXEC).build()
            } else {
                let none = std::ptr::null_mut();
                let accept = opcode::Accept::new(socket, none, std::ptr::null_mut());
                accept.flags(libc::SOCK_CLOEXEC).build()
            };
            self.accept_armed = true;
            // SAFETY: an accept without an address names no memory.
            unsafe { self.push(&entry.user_data(user_data(Op::Accept, PeerId(0)))) };
        }
    }

    fn submit_send(&mut self, id: PeerId) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let Some(sending) = &peer.sending else {
            return;
        };
        let message = peer.message.fill(sending);
        let entry = opcode::SendMsg::new(Fd(peer.socket.as_raw_fd()), message)
            .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
            .build()
            .user_data(user_data(Op::Send, id));
        // SAFETY: buffers and message stay in `peer` until the completion takes them out, and a
        // peer is dropped only when nothing is under way.
        unsafe { self.push(&entry) };
    }

    fn submit_receive(&mut self, id: PeerId) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let Some(buf) = &mut peer.receiving else {
            return;
        };
        let room = buf.spare_mut();
        let bytes = u32::try_from(room.len()).unwrap_or(u32::MAX);
        let entry = opcode::Recv::new(Fd(peer.socket.as_raw_fd()), room.as_mut_ptr(), bytes)
            .build()
            .user_data(user_data(Op::Receive, id));
        // SAFETY: as in `submit_send`; nothing else looks at the buffer meanwhile.
        unsafe { self.push(&entry) };
    }

    /// Ends a peer: what is under way is cancelled, and `finish` does the rest when it is back.
    fn begin_close(&mut self, id: PeerId, error: Option<io::Error>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if std::mem::replace(&mut peer.closing, true) {
            return;
        }
        peer.error = error;
        // It may not be connected, or not any more.
        let _ = rustix::net::shutdown(&peer.socket, Shutdown::Both);
        let under_way = [
            (peer.connecting, Op::Connect),
            (peer.sending.is_some(), Op::Send),
            (peer.receiving.is_some(), Op::Receive),
        ];
        for (_, op) in under_way.into_iter().filter(|(is, _)| *is) {
            let entry = opcode::AsyncCancel::new(user_data(op, id))
                .build()
                .user_data(user_data(Op::Cancel, id));
            // SAFETY: a cancellation names no memory.
            unsafe { self.push(&entry) };
        }
        self.leaving.push(id);
    }

    /// Lets go of peers that have nothing under way any more.
    fn finish(&mut self, done: &mut Vec<Completion>) {
        let peers = &mut self.peers;
        self.leaving.retain(|id| {
            let is_busy =
                |peer: &Peer| peer.connecting || peer.sending.is_some() || peer.receiving.is_some();
            if peers.get(id).is_some_and(is_busy) {
                return true;
            }
            if let Some(peer) = peers.remove(id) {
                done.push(Completion::Closed { peer: *id, error: peer.error });
            }
            false
        });
    }

    /// Submits what is queued, waits for a completion, and takes up all that are there.
    fn enter(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>) -> io::Result<()> {
        self.enable()?;
        self.syscalls += 1;
        let entered = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&timespec);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        // The time is over, a signal came, or completions have to be taken up first.
        let passing = [libc::ETIME, libc::EINTR, libc::EBUSY, libc::EAGAIN];
        if let Err(error) = entered
            && !error.raw_os_error().is_some_and(|code| passing.contains(&code))
        {
            return Err(error);
        }
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return Ok(());
            };
            self.complete(&entry, done);
        }
    }

    fn complete(&mut self, entry: &cqueue::Entry, done: &mut Vec<Completion>) {
        let peer = PeerId(entry.user_data() >> OP_BITS);
        let result = match entry.result() {
            result if result < 0 => Err(io::Error::from_raw_os_error(-result)),
            result => Ok(result as usize),
        };
        let more = cqueue::more(entry.flags());
        match entry.user_data() & ((1 << OP_BITS) - 1) {
            op if op == Op::Accept as u64 => self.accepted(result, more, done),
            op if op == Op::Wake as u64 => {
                self.wake_armed = false;
                if self.waker.take() {
                    done.push(Completion::Woken);
                }
            }
            op if op == Op::Connect as u64 => self.connected(peer, result, done),
            op if op == Op::Send as u64 => self.sent(peer, result, done),
            op if op == Op::Receive as u64 => self.received(peer, result, done),
            _ => {}
        }
    }

    fn accepted(&mut self, result: io::Result<usize>, more: bool, done: &mut Vec<Completion>) {
        self.accept_armed = more;
        let accepted = result.and_then(|socket| {
            let socket = RawFd::try_from(socket).map_err(io::Error::other)?;
            // SAFETY: the kernel has just opened it for us.
            let socket = unsafe { OwnedFd::from_raw_fd(socket) };
            let address = rustix::net::getpeername(&socket)?;
            let address = address.and_then(|address| SocketAddr::try_from(address).ok());
            let address = address.ok_or(io::ErrorKind::NotConnected)?;
            Ok((self.insert(socket, None)?, address))
        });
        match accepted {
            Ok((peer, address)) => {
                self.accepting.note(None);
                done.push(Completion::Accepted { peer, address });
            }
            Err(error) if self.accept_multi && error.raw_os_error() == Some(libc::EINVAL) => {
                self.accept_multi = false;
                self.arm();
            }
            // Cancelled, since the link is being dropped.
            Err(_) if self.listener.is_none() => {}
            // Out of file descriptors, or a peer that left again: armed again at the next wait.
            Err(error) => self.accepting.note(Some(&error)),
        }
    }

    fn connected(&mut self, id: PeerId, result: io::Result<usize>, done: &mut Vec<Completion>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        peer.connecting = false;
        match result {
            Ok(_) if !peer.closing => done.push(Completion::Connected { peer: id }),
            Ok(_) => {}
            Err(error) => self.begin_close(id, Some(error)),
        }
    }

    fn sent(&mut self, id: PeerId, result: io::Result<usize>, done: &mut Vec<Completion>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let Some(sending) = &mut peer.sending else {
            return;
        };
        let again = match &result {
            Ok(bytes) => !sending.advance(*bytes) && *bytes > 0,
            Err(error) => is_passing(error),
        };
        if again && !peer.closing {
            return self.submit_send(id);
        }
        give_back(id, &mut peer.sending, &mut None, done);
        if let Err(error) = result {
            self.begin_close(id, Some(error));
        }
    }

    fn received(&mut self, id: PeerId, result: io::Result<usize>, done: &mut Vec<Completion>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if let Err(error) = &result
            && is_passing(error)
            && !peer.closing
        {
            return self.submit_receive(id);
        }
        let Some(mut buf) = peer.receiving.take() else {
            return;
        };
        let bytes = *result.as_ref().unwrap_or(&0);
        buf.advance(bytes);
        done.push(Completion::Received { peer: id, buf, bytes });
        match result {
            Ok(0) => self.begin_close(id, None),
            Ok(_) => {}
            Err(error) => self.begin_close(id, Some(error)),
        }
    }
}

/// True if an operation has only to be tried again.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

impl Link for UringLink {
    fn connect(&mut self, address: SocketAddr) -> io::Result<PeerId> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        let id = self.insert(socket, Some(address))?;
        let peer = &self.peers[&id];
        let to = peer.address.as_ref().expect("it was given a line above");
        let entry =
            opcode::Connect::new(Fd(peer.socket.as_raw_fd()), to.as_ptr().cast(), to.addr_len());
        let entry = entry.build().user_data(user_data(Op::Connect, id));
        // SAFETY: the address is boxed in the peer, which stays until the completion.
        unsafe { self.push(&entry) };
        Ok(id)
    }

    fn send(&mut self, peer: PeerId, bufs: Vec<Buf>) {
        let Some(state) = self.peers.get_mut(&peer) else {
            return;
        };
        assert!(state.sending.is_none(), "one send at a time");
        if state.closing {
            return self.late.push(Completion::Sent { peer, bufs });
        }
        state.sending = Some(Sending::new(bufs));
        self.submit_send(peer);
    }

    fn receive(&mut self, peer: PeerId, mut buf: Buf) {
        let Some(state) = self.peers.get_mut(&peer) else {
            return;
        };
        assert!(state.receiving.is_none(), "one receive at a time");
        assert!(!buf.spare_mut().is_empty(), "room to receive into");
        if state.closing {
            return self.late.push(Completion::Received { peer, buf, bytes: 0 });
        }
        state.receiving = Some(buf);
        self.submit_receive(peer);
    }

    fn close(&mut self, peer: PeerId) {
        self.begin_close(peer, None);
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>) -> io::Result<()> {
        let before = done.len();
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        done.append(&mut self.late);
        self.arm();
        self.finish(done);
        loop {
            let left = match deadline {
                _ if done.len() > before => Some(Duration::ZERO),
                Some(deadline) => Some(deadline.saturating_duration_since(Instant::now())),
                None => None,
            };
            self.enter(left, done)?;
            self.finish(done);
            if done.len() > before || left == Some(Duration::ZERO) {
                return Ok(());
            }
        }
    }

    fn local_address(&self) -> Option<SocketAddr> {
        self.listener.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    fn syscalls(&self) -> u64 {
        self.syscalls
    }
}

impl Drop for UringLink {
    fn drop(&mut self) {
        let ids: Vec<PeerId> = self.peers.keys().copied().collect();
        for id in ids {
            self.begin_close(id, None);
        }
        // The armed accept holds the listening socket open: without its end the address would stay
        // taken after this link is gone.
        self.listener = None;
        for op in [Op::Wake, Op::Accept] {
            let cancel = opcode::AsyncCancel::new(user_data(op, PeerId(0)));
            let cancel = cancel.build().user_data(user_data(Op::Cancel, PeerId(0)));
            // SAFETY: a cancellation names no memory.
            unsafe { self.push(&cancel) };
        }
        let deadline = Instant::now() + DROP_PATIENCE;
        let mut done = Vec::new();
        while (self.wake_armed || self.accept_armed || !self.peers.is_empty())
            && Instant::now() < deadline
        {
            self.finish(&mut done);
            // Dropped on another thread than its own the ring takes no calls.
            if self.enter(Some(Duration::from_millis(10)), &mut done).is_err() {
                break;
            }
        }
        // Where the kernel may still write, the memory is given up for good.
        for (_, peer) in self.peers.drain() {
            std::mem::forget(peer);
        }
        if self.wake_armed {
            std::mem::forget(std::mem::take(&mut self.wake_count));
        }
    }
}
