//! One relayed connection: two sockets, and between them a flow in each direction. What is read
//! from one socket enters the link; what comes out is written to the other.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use mio::net::TcpStream;

use super::relay::{LinkClock, SOCKET_BUFFER_BYTES};
use super::report::Tally;
use super::schedule::Cuts;
use super::shape::{Piece, Shape};

/// Index of the direction from those who connect; also of their socket.
pub(super) const UP: usize = 0;
/// Index of the direction back; also of the socket that the relay opened.
pub(super) const DOWN: usize = 1;

/// Bytes of one direction of one connection between two sockets. A rate fills the queue of the
/// link long before; this bounds memory where there is no rate, or where the receiver doesn't read.
const HELD_BYTES_MAX: usize = 64 << 20;
/// An attempt to connect is given up after this long.
const CONNECT_NS_MAX: u64 = 10_000_000_000;

/// One direction of the link, and what passed it.
pub(super) struct Direction {
    pub(super) shape: Shape,
    pub(super) tally: Tally,
}

/// Context that a connection's relaying needs from the link.
pub(super) struct Context<'a> {
    pub(super) clock: LinkClock,
    pub(super) directions: &'a mut [Direction; 2],
    pub(super) cuts: &'a mut Cuts,
    pub(super) to: SocketAddr,
    pub(super) scratch: &'a mut [u8],
}

/// Outcome of a connection's relaying.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Alive,
    /// Both directions have ended.
    Done,
    /// One side reset it, or the other can't be reached: reset both.
    Reset,
    /// The bytes after which the link is cut have passed.
    Cut,
}

/// Progress of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// The wish to connect travels up.
    Asking,
    /// The far socket connects, since this time.
    Connecting(u64),
    /// The answer travels down.
    Answering,
    Open,
}

/// Content of a piece.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data {
        /// The end of what was read at once: the receiver may wait for just this.
        last: bool,
    },
    Ask,
    Answer,
    End,
    Reset,
}

struct Mark {
    piece: Piece,
    entered: u64,
    kind: Kind,
}

/// One direction: from `ends[i]` to `ends[1 - i]`.
#[derive(Default)]
struct Flow {
    bytes: VecDeque<u8>,
    marks: VecDeque<Mark>,
    /// Bytes at the front that have come out of the link.
    due: usize,
    /// There may be something to read.
    readable: bool,
    /// Nothing more is read.
    ended: bool,
    /// The receiver's socket is full.
    blocked: bool,
    /// The end has come out of the link.
    end_due: bool,
    /// The receiver has the end.
    finished: bool,
}

impl Flow {
    fn mark(&mut self, shape: &mut Shape, now: u64, kind: Kind) {
        let marks = &mut self.marks;
        shape.enter(now, 0, |piece| marks.push_back(Mark { piece, entered: now, kind }));
    }
}

pub(super) struct Pair {
    ends: [Option<TcpStream>; 2],
    flows: [Flow; 2],
    progress: Progress,
}

impl Pair {
    /// A connection that was just accepted.
    pub(super) fn new(client: TcpStream, now: u64, directions: &mut [Direction; 2]) -> Self {
        let mut flows = [Flow::default(), Flow::default()];
        flows[UP].mark(&mut directions[UP].shape, now, Kind::Ask);
        Self { ends: [Some(client), None], flows, progress: Progress::Asking }
    }

    /// The socket at `end`, and whether it is waited for to be readable and writable.
    pub(super) fn interest(&self, end: usize) -> Option<(&TcpStream, bool, bool)> {
        let stream = self.ends[end].as_ref()?;
        let connecting = end == DOWN && matches!(self.progress, Progress::Connecting(_));
        let read = self.may_read(end) && !self.flows[end].readable;
        let write = connecting || self.flows[1 - end].blocked;
        (read || write).then_some((stream, read, write))
    }

    /// A socket is ready.
    pub(super) fn ready(&mut self, end: usize, read: bool, write: bool) {
        self.flows[end].readable |= read;
        if write {
            self.flows[1 - end].blocked = false;
        }
    }

    /// True if the link takes bytes from this end.
    fn may_read(&self, end: usize) -> bool {
        let open = match end {
            UP => self.progress == Progress::Open,
            _ => matches!(self.progress, Progress::Answering | Progress::Open),
        };
        open && !self.flows[end].ended
    }

    /// Time of this connection's next event, and `true` if it has to be exact.
    pub(super) fn next(&self, now: u64, directions: &mut [Direction; 2]) -> Option<(u64, bool)> {
        let mut next: Option<(u64, bool)> = None;
        let mut consider = |at: u64, exact: bool| {
            if next.is_none_or(|(known, _)| at < known) {
                next = Some((at, exact));
            }
        };
        for (end, flow) in self.flows.iter().enumerate() {
            if let Some(mark) = flow.marks.front() {
                consider(mark.piece.release, mark.kind != Kind::Data { last: false });
            }
            if self.may_read(end) && flow.readable && flow.bytes.len() < HELD_BYTES_MAX {
                let shape = &mut directions[end].shape;
                let at = if shape.room(now) > 0 { now } else { shape.room_at() };
                consider(at, false);
            }
        }
        if let Progress::Connecting(since) = self.progress {
            consider(since + CONNECT_NS_MAX, false);
        }
        next
    }

    /// Does all that can be done now.
    pub(super) fn relay(&mut self, cx: &mut Context<'_>) -> Outcome {
        if let Progress::Connecting(since) = self.progress {
            self.connected(since, cx);
        }
        for end in [UP, DOWN] {
            self.read(end, cx);
            let outcome = self.release(end, cx);
            if outcome != Outcome::Alive {
                return outcome;
            }
        }
        let done = self.flows.iter().all(|flow| flow.finished);
        if done { Outcome::Done } else { Outcome::Alive }
    }

    fn read(&mut self, end: usize, cx: &mut Context<'_>) {
        if !self.may_read(end) || !self.flows[end].readable {
            return;
        }
        let (flow, direction) = (&mut self.flows[end], &mut cx.directions[end]);
        let Some(stream) = &mut self.ends[end] else { return };
        let room = direction.shape.room(cx.clock.now()).min(HELD_BYTES_MAX - flow.bytes.len());
        let room = room.min(cx.scratch.len());
        if room == 0 {
            return;
        }
        match stream.read(&mut cx.scratch[..room]) {
            Ok(0) => {
                flow.ended = true;
                flow.mark(&mut direction.shape, cx.clock.now(), Kind::End);
            }
            Ok(bytes) => {
                let now = cx.clock.now();
                flow.bytes.extend(&cx.scratch[..bytes]);
                flow.readable = bytes == room;
                direction.tally.bytes_in += bytes as u64;
                let marks = &mut flow.marks;
                let kind = Kind::Data { last: false };
                direction.shape.enter(now, bytes, |piece| {
                    marks.push_back(Mark { piece, entered: now, kind });
                });
                if let Some(mark) = marks.back_mut() {
                    mark.kind = Kind::Data { last: true };
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => flow.readable = false,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => {
                flow.ended = true;
                flow.mark(&mut direction.shape, cx.clock.now(), Kind::Reset);
            }
        }
    }

    /// Lets out what is due in one direction.
    fn release(&mut self, end: usize, cx: &mut Context<'_>) -> Outcome {
        let now = cx.clock.now();
        while let Some(mark) = self.flows[end].marks.front()
            && mark.piece.release <= now
        {
            let Mark { piece, entered, kind } = self.flows[end].marks.pop_front().expect("front");
            match kind {
                Kind::Data { .. } => {
                    self.flows[end].due += piece.bytes;
                    cx.directions[end].tally.count(piece, entered, now);
                }
                Kind::Ask => self.connect(cx),
                Kind::Answer => self.progress = Progress::Open,
                Kind::End => self.flows[end].end_due = true,
                Kind::Reset => return Outcome::Reset,
            }
        }
        self.write(end, cx)
    }

    fn write(&mut self, end: usize, cx: &mut Context<'_>) -> Outcome {
        let flow = &mut self.flows[end];
        let Some(stream) = &mut self.ends[1 - end] else { return Outcome::Alive };
        while flow.due > 0 && !flow.blocked {
            let left = cx.cuts.bytes_left().map(|left| usize::try_from(left).unwrap_or(flow.due));
            let most = left.map_or(flow.due, |left| left.min(flow.due));
            let (front, back) = flow.bytes.as_slices();
            let front = &front[..front.len().min(most)];
            let back = &back[..most - front.len()];
            match stream.write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(bytes) => {
                    flow.bytes.drain(..bytes);
                    flow.due -= bytes;
                    cx.directions[end].tally.bytes_out += bytes as u64;
                    if cx.cuts.pass(bytes as u64) {
                        return Outcome::Cut;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => flow.blocked = true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    // The receiver is gone: the sender hears of it over the link.
                    *flow = Flow { ended: true, ..Flow::default() };
                    let now = cx.clock.now();
                    self.flows[1 - end].mark(&mut cx.directions[1 - end].shape, now, Kind::Reset);
                    return Outcome::Alive;
                }
            }
        }
        if flow.end_due && flow.due == 0 && !flow.finished {
            flow.finished = true;
            // It fails where the receiver reset the connection; reading there tells.
            let _ = stream.shutdown(Shutdown::Write);
        }
        Outcome::Alive
    }

    /// The wish to connect has come up.
    fn connect(&mut self, cx: &mut Context<'_>) {
        match TcpStream::connect(cx.to) {
            Ok(stream) => {
                let since = cx.clock.now();
                self.ends[DOWN] = Some(stream);
                self.progress = Progress::Connecting(since);
                self.connected(since, cx);
            }
            Err(error) => self.refuse(&error, cx),
        }
    }

    /// Looks whether the far socket is connected by now.
    fn connected(&mut self, since: u64, cx: &mut Context<'_>) {
        let Some(stream) = &self.ends[DOWN] else { return };
        let answer = match stream.take_error() {
            Ok(None) => stream.peer_addr().map(|_| ()),
            Ok(Some(error)) | Err(error) => Err(error),
        };
        match answer.and_then(|()| tune(stream)) {
            Ok(()) => {
                self.progress = Progress::Answering;
                let (flow, direction) = (&mut self.flows[DOWN], &mut cx.directions[DOWN]);
                flow.mark(&mut direction.shape, cx.clock.now(), Kind::Answer);
            }
            Err(error) if error.kind() == ErrorKind::NotConnected => {
                if cx.clock.now() >= since + CONNECT_NS_MAX {
                    self.refuse(&ErrorKind::TimedOut.into(), cx);
                }
            }
            Err(error) => self.refuse(&error, cx),
        }
    }

    fn refuse(&mut self, error: &io::Error, cx: &mut Context<'_>) {
        let from = self.ends[UP].as_ref().and_then(|client| client.peer_addr().ok());
        tracing::warn!(to = %cx.to, ?from, %error, "a connection can't be relayed");
        self.ends[DOWN] = None;
        self.progress = Progress::Asking;
        let (flow, direction) = (&mut self.flows[DOWN], &mut cx.directions[DOWN]);
        direction.tally.unreachable += 1;
        flow.mark(&mut direction.shape, cx.clock.now(), Kind::Reset);
    }

    /// Ends both connections with a reset.
    pub(super) fn reset(self) {
        for stream in self.ends.into_iter().flatten() {
            // Closing then sends a reset; without it the end would look like a good one.
            if let Err(error) =
                rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))
            {
                tracing::warn!(%error, "a connection is closed rather than reset");
            }
        }
    }
}

/// Sets the options that both sockets of a connection need.
pub(super) fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_recv_buffer_size(stream, SOCKET_BUFFER_BYTES)?;
    Ok(rustix::net::sockopt::set_socket_send_buffer_size(stream, SOCKET_BUFFER_BYTES)?)
}
