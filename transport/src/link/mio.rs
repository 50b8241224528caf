//! The link over readiness: mio tells when a socket may be read or written, this makes
//! completions of it. Edge-triggered: a socket is read until it has no more, and then waited for.

use std::collections::HashMap;
use std::io::{self, ErrorKind, IoSlice, Read};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

use super::socket::{Accepting, limit_unsent};
use super::{Completion, Link, PeerId, Sending, Waker, give_back};
use crate::pool::Buf;

const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);
/// Peers are numbered from here.
const FIRST_PEER: u64 = 2;
/// Events taken by one call.
const EVENTS: usize = 256;
/// Waits in a row that may end without asking the operating system for news.
const WAITS_UNPOLLED_MAX: u32 = 8;
/// Parts of one write.
const SLICES: usize = 64;

/// TCP over mio.
pub struct MioLink {
    poll: Poll,
    events: Events,
    listener: Option<TcpListener>,
    listener_ready: bool,
    accepting: Accepting,
    waker: Waker,
    peers: HashMap<PeerId, Peer>,
    /// Peers with something to try, each once.
    active: Vec<PeerId>,
    next_peer: u64,
    waits_unpolled: u32,
    syscalls: u64,
}

struct Peer {
    stream: TcpStream,
    connecting: bool,
    closing: bool,
    readable: bool,
    /// The end of the stream is in the kernel already: no further event comes.
    read_closed: bool,
    writable: bool,
    sending: Option<Sending>,
    receiving: Option<Buf>,
    /// Index in `active`.
    active: bool,
}

impl MioLink {
    /// A link that listens at `listen`, or only connects.
    ///
    /// # Errors
    /// If the address can't be listened at.
    pub fn new(listen: Option<SocketAddr>) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Arc::new(mio::Waker::new(poll.registry(), WAKER)?);
        let mut listener = listen.map(TcpListener::bind).transpose()?;
        if let Some(listener) = &mut listener {
            poll.registry().register(listener, LISTENER, Interest::READABLE)?;
        }
        let rouse = move || {
            if let Err(error) = waker.wake() {
                tracing::error!(%error, "the network thread can't be woken");
            }
        };
        Ok(Self {
            poll,
            events: Events::with_capacity(EVENTS),
            listener,
            listener_ready: false,
            accepting: Accepting::default(),
            waker: Waker::new(rouse),
            peers: HashMap::new(),
            active: Vec::new(),
            next_peer: FIRST_PEER,
            waits_unpolled: 0,
            syscalls: 0,
        })
    }

    fn insert(&mut self, mut stream: TcpStream, connecting: bool) -> io::Result<PeerId> {
        // Small frames must not wait for each other, nor behind what can't be sent yet.
        stream.set_nodelay(true)?;
        limit_unsent(&stream)?;
        let id = PeerId(self.next_peer);
        let token = Token(usize::try_from(id.0).map_err(io::Error::other)?);
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut stream, token, interest)?;
        self.next_peer += 1;
        let peer = Peer {
            stream,
            connecting,
            closing: false,
            readable: false,
            read_closed: false,
            // An accepted socket takes bytes at once; one that connects says when it can.
            writable: !connecting,
            sending: None,
            receiving: None,
            active: false,
        };
        self.peers.insert(id, peer);
        Ok(id)
    }

    /// Notes that `peer` may have something to do.
    fn activate(&mut self, id: PeerId) -> Option<&mut Peer> {
        let peer = self.peers.get_mut(&id)?;
        if !std::mem::replace(&mut peer.active, true) {
            self.active.push(id);
        }
        Some(peer)
    }

    fn accept(&mut self, done: &mut Vec<Completion>) {
        while self.listener_ready {
            let Some(listener) = &self.listener else {
                return;
            };
            self.syscalls += 1;
            match listener.accept() {
                Ok((stream, address)) => match self.insert(stream, false) {
                    Ok(peer) => {
                        self.accepting.note(None);
                        done.push(Completion::Accepted { peer, address });
                    }
                    Err(error) => self.accepting.note(Some(&error)),
                },
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.listener_ready = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    // Out of file descriptors, or a peer that left again: the next event retries.
                    self.accepting.note(Some(&error));
                    self.listener_ready = false;
                }
            }
        }
    }

    /// Does all that can be done without waiting.
    fn progress(&mut self, done: &mut Vec<Completion>) {
        if self.waker.take() {
            done.push(Completion::Woken);
        }
        self.accept(done);
        let mut active = std::mem::take(&mut self.active);
        for id in active.drain(..) {
            let Some(peer) = self.peers.get_mut(&id) else {
                continue;
            };
            peer.active = false;
            if let Some(error) = peer.progress(id, &mut self.syscalls, done) {
                let mut peer = self.peers.remove(&id).expect("it was there a line above");
                // A socket that is closed leaves the poll by itself, if this fails.
                let _ = self.poll.registry().deregister(&mut peer.stream);
                give_back(id, &mut peer.sending, &mut peer.receiving, done);
                done.push(Completion::Closed { peer: id, error });
            }
        }
        // `active` is empty, and keeps its memory; nothing was activated meanwhile.
        self.active = active;
    }

    fn poll_events(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.syscalls += 1;
        self.waits_unpolled = 0;
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        let events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        for event in &events {
            match event.token() {
                LISTENER => self.listener_ready = true,
                WAKER => {}
                Token(token) => {
                    let Some(peer) = self.activate(PeerId(token as u64)) else {
                        continue;
                    };
                    peer.readable |= event.is_readable() || event.is_error();
                    peer.writable |= event.is_writable() || event.is_error();
                    peer.read_closed |= event.is_read_closed() || event.is_error();
                }
            }
        }
        self.events = events;
        Ok(())
    }
}

impl Link for MioLink {
    fn connect(&mut self, address: SocketAddr) -> io::Result<PeerId> {
        self.syscalls += 1;
        self.insert(TcpStream::connect(address)?, true)
    }

    fn send(&mut self, peer: PeerId, bufs: Vec<Buf>) {
        let Some(peer) = self.activate(peer) else {
            return;
        };
        assert!(peer.sending.is_none(), "one send at a time");
        peer.sending = Some(Sending::new(bufs));
    }

    fn receive(&mut self, peer: PeerId, mut buf: Buf) {
        let Some(peer) = self.activate(peer) else {
            return;
        };
        assert!(peer.receiving.is_none(), "one receive at a time");
        assert!(!buf.spare_mut().is_empty(), "room to receive into");
        peer.receiving = Some(buf);
    }

    fn close(&mut self, peer: PeerId) {
        if let Some(peer) = self.activate(peer) {
            peer.closing = true;
        }
    }

    fn waker(&self) -> Waker {
        self.waker.clone()
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>) -> io::Result<()> {
        let before = done.len();
        self.progress(done);
        if done.len() > before {
            self.waits_unpolled += 1;
            if self.waits_unpolled < WAITS_UNPOLLED_MAX {
                return Ok(());
            }
        }
        let timeout = if done.len() > before { Some(Duration::ZERO) } else { timeout };
        self.poll_events(timeout)?;
        self.progress(done);
        Ok(())
    }

    fn local_address(&self) -> Option<SocketAddr> {
        self.listener.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    fn syscalls(&self) -> u64 {
        self.syscalls
    }
}

impl Peer {
    /// Does what can be done. `Some` when the peer is gone, with what broke.
    fn progress(
        &mut self,
        id: PeerId,
        syscalls: &mut u64,
        done: &mut Vec<Completion>,
    ) -> Option<Option<io::Error>> {
        if self.closing {
            return Some(None);
        }
        if self.connecting {
            if !self.writable {
                return None;
            }
            match self.stream.take_error().and_then(|error| error.map_or(Ok(()), Err)) {
                Ok(()) => {}
                Err(error) => return Some(Some(error)),
            }
            if self.stream.peer_addr().is_err() {
                // Not yet: writability was about something else.
                self.writable = false;
                return None;
            }
            self.connecting = false;
            done.push(Completion::Connected { peer: id });
        }
        if let Err(error) = self.write(id, syscalls, done) {
            return Some(Some(error));
        }
        match self.read(id, syscalls, done) {
            Ok(false) => None,
            Ok(true) => Some(None),
            Err(error) => Some(Some(error)),
        }
    }

    fn write(
        &mut self,
        id: PeerId,
        syscalls: &mut u64,
        done: &mut Vec<Completion>,
    ) -> io::Result<()> {
        while self.writable
            && let Some(sending) = &mut self.sending
        {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let (mut count, mut bytes) = (0, 0);
            for (slice, rest) in slices.iter_mut().zip(sending.rest()) {
                *slice = IoSlice::new(rest);
                (count, bytes) = (count + 1, bytes + rest.len());
            }
            *syscalls += 1;
            match write(&self.stream, &slices[..count]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    if sending.advance(written) {
                        give_back(id, &mut self.sending, &mut None, done);
                    } else if written < bytes {
                        self.writable = false;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads once; `true` at the end of the stream.
    fn read(
        &mut self,
        id: PeerId,
        syscalls: &mut u64,
        done: &mut Vec<Completion>,
    ) -> io::Result<bool> {
        while self.readable
            && let Some(mut buf) = self.receiving.take()
        {
            let room = buf.spare_mut();
            let room_bytes = room.len();
            *syscalls += 1;
            match self.stream.read(room) {
                Ok(0) => {
                    self.receiving = Some(buf);
                    return Ok(true);
                }
                Ok(bytes) => {
                    // A short read has emptied the socket; what comes later is a new edge.
                    self.readable = bytes == room_bytes || self.read_closed;
                    buf.advance(bytes);
                    done.push(Completion::Received { peer: id, buf, bytes });
                }
                Err(error) => {
                    self.receiving = Some(buf);
                    match error.kind() {
                        ErrorKind::WouldBlock => self.readable = false,
                        ErrorKind::Interrupted => {}
                        _ => return Err(error),
                    }
                }
            }
        }
        Ok(false)
    }
}

/// Writes without raising a signal when the peer is gone: this may run inside of a program that
/// did not ask for that signal to be ignored.
#[cfg(unix)]
fn write(stream: &TcpStream, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
    let mut none = SendAncillaryBuffer::default();
    Ok(sendmsg(stream, slices, &mut none, SendFlags::NOSIGNAL)?)
}

#[cfg(not(unix))]
fn write(mut stream: &TcpStream, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    io::Write::write_vectored(&mut stream, slices)
}
