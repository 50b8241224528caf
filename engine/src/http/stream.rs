//! The two kinds of streams that the API is served over, and the guard around one: its writes fail
//! when the reader takes nothing for too long, its reads when a head is bad or late.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::{Instant, Sleep};

use super::heads::{Fault, Heads};

/// Bytes that the system may hold for a reader who does not read.
const SEND_BUFFER_BYTES: usize = 128 << 10;

/// A listening socket.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| Stream::Tcp(stream)),
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

/// A connection.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Sends what is small at once, and lets the system hold little for a slow reader.
    pub(super) fn set_options(&self) {
        // Without either it is slower, or holds more, but right.
        if let Self::Tcp(stream) = self {
            let _ = stream.set_nodelay(true);
        }
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(self, SEND_BUFFER_BYTES);
    }

    pub(super) async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.readable().await,
            Self::Unix(stream) => stream.readable().await,
        }
    }

    pub(super) fn try_read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_read(bytes),
            Self::Unix(stream) => stream.try_read(bytes),
        }
    }

    fn writer(&mut self) -> Pin<&mut (dyn AsyncWrite + Unpin)> {
        match self {
            Self::Tcp(stream) => Pin::new(stream),
            Self::Unix(stream) => Pin::new(stream),
        }
    }

    fn reader(&mut self) -> Pin<&mut (dyn AsyncRead + Unpin)> {
        match self {
            Self::Tcp(stream) => Pin::new(stream),
            Self::Unix(stream) => Pin::new(stream),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

/// The reason for which a guard ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// A head that is refused.
    Head(Fault),
    /// A head that did not arrive in time.
    LateHead,
}

/// A stream under guard.
pub(super) struct Guarded {
    pub(super) stream: Stream,
    /// Set once a read has failed by the guard.
    pub(super) broken: Option<Broken>,
    heads: Heads,
    head_timeout: Duration,
    write_timeout: Duration,
    /// Runs while a head is incomplete.
    late: Option<Pin<Box<Sleep>>>,
    /// Runs while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Guarded {
    pub(super) fn new(stream: Stream, head_timeout: Duration, write_timeout: Duration) -> Self {
        Self {
            stream,
            broken: None,
            heads: Heads::default(),
            head_timeout,
            write_timeout,
            late: None,
            stalled: None,
        }
    }

    fn break_off(&mut self, broken: Broken) -> Poll<io::Result<()>> {
        self.broken = Some(broken);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "the request's head")))
    }

    fn watch<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let deadline = Instant::now() + self.write_timeout;
        let stalled =
            self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the reader takes nothing")))
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = this.stream.reader().poll_read(cx, buffer);
        if let Err(fault) = this.heads.take(&buffer.filled()[before..]) {
            buffer.set_filled(before);
            return this.break_off(Broken::Head(fault));
        }
        if !this.heads.in_head() {
            this.late = None;
            return read;
        }
        let deadline = Instant::now() + this.head_timeout;
        let late = this.late.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if read.is_pending() && late.as_mut().poll(cx).is_ready() {
            return this.break_off(Broken::LateHead);
        }
        read
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.stream.writer().poll_write(cx, bytes);
        self.watch(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.stream.writer().poll_write_vectored(cx, bytes);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true // of both kinds
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.writer().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.writer().poll_shutdown(cx)
    }
}
