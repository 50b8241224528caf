//! Links, which move bytes: one completion-style trait, and three implementations.
//!
//! A buffer that is given in is given back by [`Link::wait`], exactly once, also when the peer is
//! closed or breaks; [`Completion::Closed`] is a peer's last. At most one send and one receive are
//! under way for each peer. A [`PeerId`] is never used twice.
//!
//! TLS has its place between link and connection: the endpoint passes what a link received to the
//! connection, and what the connection transmits to the link, in two functions that the head of
//! [`crate::endpoint`] names.
//!
//! The links over sockets are the feature `links`; the one in memory is always there.

pub mod memory;
#[cfg(feature = "links")]
pub mod mio;
#[cfg(feature = "links")]
mod socket;
#[cfg(all(target_os = "linux", feature = "links"))]
#[expect(unsafe_code, reason = "the kernel holds pointers into buffers that the ring owns")]
pub mod uring;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::pool::Buf;
#[cfg(feature = "links")]
pub use socket::{Opened, open, open_probed, probe_uring};

/// Kind of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LinkKind {
    /// In-process pipes.
    Memory,
    /// Readiness of the operating system (epoll and its like).
    Mio,
    /// Completions of the Linux kernel.
    IoUring,
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Mio => "mio",
            Self::IoUring => "io_uring",
        })
    }
}

/// One socket of a link, from its birth to its [`Completion::Closed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub u64);

/// A completion of a link.
#[derive(Debug)]
pub enum Completion {
    /// A peer has dialled in.
    Accepted {
        /// The new peer.
        peer: PeerId,
        /// Address of the peer.
        address: SocketAddr,
    },
    /// [`Link::connect`] has succeeded.
    Connected {
        /// The peer.
        peer: PeerId,
    },
    /// The buffers of a send come back: all bytes were taken, or the peer is about to be closed.
    Sent {
        /// The peer.
        peer: PeerId,
        /// The buffers of [`Link::send`], in order.
        bufs: Vec<Buf>,
    },
    /// The buffer of a receive comes back.
    Received {
        /// The peer.
        peer: PeerId,
        /// The buffer of [`Link::receive`]; what came is counted in already.
        buf: Buf,
        /// Number of bytes that came; 0 only if the peer is about to be closed.
        bytes: usize,
    },
    /// The peer is gone; nothing more comes from it.
    Closed {
        /// The peer.
        peer: PeerId,
        /// Error that broke it; `None` if either side closed in peace.
        error: Option<io::Error>,
    },
    /// [`Waker::wake`] was called.
    Woken,
}

/// Moves bytes; see the [module](self) page for the rules.
pub trait Link: Send {
    /// Starts to connect; [`Completion::Connected`] or [`Completion::Closed`] follows.
    ///
    /// # Errors
    /// If no socket can be had at all.
    fn connect(&mut self, address: SocketAddr) -> io::Result<PeerId>;

    /// Sends [`Buf::wire`] of each buffer, in order, as one stream of bytes. With a peer that is
    /// gone already the buffers are dropped.
    ///
    /// # Panics
    /// If the peer has a send under way.
    fn send(&mut self, peer: PeerId, bufs: Vec<Buf>);

    /// Receives into [`Buf::spare_mut`], at least one byte. With a peer that is gone already the
    /// buffer is dropped.
    ///
    /// # Panics
    /// If the peer has a receive under way, or the buffer has no room.
    fn receive(&mut self, peer: PeerId, buf: Buf);

    /// Closes; the buffers of what is under way come back, and then [`Completion::Closed`].
    fn close(&mut self, peer: PeerId);

    /// Ends [`Link::wait`] early, from any thread.
    fn waker(&self) -> Waker;

    /// Appends what has been done to `done`. Returns at once if there is something, otherwise
    /// when there is, or after `timeout` (`None`: whenever). It may return early with nothing.
    ///
    /// # Errors
    /// If the operating system fails; the link is of no use then.
    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>) -> io::Result<()>;

    /// Address that the link listens at.
    fn local_address(&self) -> Option<SocketAddr>;

    /// System calls made so far for waiting, accepting, sending and receiving.
    fn syscalls(&self) -> u64;
}

/// A send that is under way.
struct Sending {
    bufs: Vec<Buf>,
    /// Bytes of the buffers that are through.
    through: usize,
}

impl Sending {
    fn new(bufs: Vec<Buf>) -> Self {
        Self { bufs, through: 0 }
    }

    /// The bytes that are not through, buffer by buffer.
    fn rest(&self) -> impl Iterator<Item = &[u8]> {
        let mut skip = self.through;
        self.bufs.iter().map(Buf::wire).filter_map(move |bytes| {
            let rest = &bytes[skip.min(bytes.len())..];
            skip = skip.saturating_sub(bytes.len());
            (!rest.is_empty()).then_some(rest)
        })
    }

    /// Counts bytes as through; true if there are no more.
    fn advance(&mut self, bytes: usize) -> bool {
        self.through += bytes;
        self.rest().next().is_none()
    }
}

/// Gives back what a peer that is gone had under way.
fn give_back(
    peer: PeerId,
    sending: &mut Option<Sending>,
    receiving: &mut Option<Buf>,
    done: &mut Vec<Completion>,
) {
    if let Some(Sending { bufs, .. }) = sending.take() {
        done.push(Completion::Sent { peer, bufs });
    }
    if let Some(buf) = receiving.take() {
        done.push(Completion::Received { peer, buf, bytes: 0 });
    }
}

/// Ends a [`Link::wait`] from another thread. Many wakes before one wait are one
/// [`Completion::Woken`], and one system call at most.
#[derive(Clone)]
pub struct Waker {
    inner: Arc<WakerInner>,
}

struct WakerInner {
    pending: AtomicBool,
    rouse: Box<dyn Fn() + Send + Sync>,
}

impl Waker {
    /// A waker whose first wake after each [`Waker::take`] calls `rouse`.
    #[must_use]
    pub fn new(rouse: impl Fn() + Send + Sync + 'static) -> Self {
        let inner = WakerInner { pending: AtomicBool::new(false), rouse: Box::new(rouse) };
        Self { inner: Arc::new(inner) }
    }

    /// Makes the present or the next [`Link::wait`] return with [`Completion::Woken`].
    pub fn wake(&self) {
        if !self.inner.pending.swap(true, Ordering::AcqRel) {
            (self.inner.rouse)();
        }
    }

    /// True if there were wakes since the last call.
    pub fn take(&self) -> bool {
        self.inner.pending.swap(false, Ordering::AcqRel)
    }
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waker")
    }
}
