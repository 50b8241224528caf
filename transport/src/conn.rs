//! [`Connection`]: the protocol, without a socket, a clock or a thread.
//!
//! Four kinds of methods. `handle_*` take what happened and the time: bytes came, a batch went
//! out, the link came up or broke. [`Connection::send`] takes what the application wants. `poll_*`
//! say what is to be done: transmit until there is nothing, take the events, then wait for bytes
//! or for [`Connection::poll_timeout`]. The rest looks.
//!
//! A connection outlives its sockets. Sequenced frames are kept until the peer acknowledges them
//! and are replayed from where the peer's HELLO says; what arrives twice is dropped, a gap is an
//! error. The caller must not feed bytes of an old socket after a new one is up.

mod config;
mod error;
mod handshake;
mod receive;
mod resume;
mod send;
mod sink;
mod timer;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::WIRE_VERSION;
use crate::frame::{Deframed, Deframer, HEADER_BYTES, Header, Kind, Priority, RawFrame};
use crate::message::{Close, CloseCode, Hello, Message, MessageError, Role};
use crate::pool::{Buf, Pool};
use receive::ReceiveState;
use send::SendState;
use timer::Timers;

pub use config::ConnectionConfig;
pub use error::{Expired, ProtocolError};
pub use handshake::Handshake;
pub(crate) use resume::agree;
pub use send::{Refusal, SendError};
pub use sink::{ConnectionId, FrameSink};

/// Longest body before HELLOs are exchanged: room for later versions' fields, and for CLOSE.
const HELLO_BYTES_MAX: usize = 1024;

/// A sequenced frame that has arrived, exactly once.
///
/// The body stays in the buffer that it was received into, or was copied once. Its bytes count
/// against the peer's credit until the buffer is dropped: drop it as soon as its rows are used,
/// and poll the endpoint after that.
#[derive(Debug)]
pub struct Frame {
    /// Kind of the frame.
    pub kind: Kind,
    /// The session; not 0.
    pub session: u32,
    /// Urgency, as the peer set it.
    pub priority: Priority,
    /// Its body; [`Message::decode`] reads it.
    pub body: Buf,
}

/// Event of a connection.
#[derive(Debug)]
pub enum ConnectionEvent {
    /// HELLOs are exchanged. If `resumed` is false everything queued or unacknowledged before is
    /// gone, here and there, and so are the peer's sessions.
    Up {
        /// The peer's.
        hello: Hello,
        /// True if the link goes on where it was.
        resumed: bool,
    },
    /// A frame.
    Frame(Frame),
    /// The peer has closed the connection.
    Closed {
        /// Reason, for programs.
        code: CloseCode,
        /// Reason, for people.
        reason: String,
    },
}

/// Traffic of a connection, over all its sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes handed to the link, headers and replays included.
    pub sent_bytes: u64,
    /// Bytes that came from the link.
    pub received_bytes: u64,
    /// Frames handed to the link.
    pub sent_frames: u64,
    /// Frames that came.
    pub received_frames: u64,
    /// Sequenced frames that were sent again.
    pub replayed_frames: u64,
    /// Sequenced frames that came again and were dropped.
    pub duplicate_frames: u64,
    /// Received body bytes that were copied within this process.
    pub copied_bytes: u64,
    /// Bytes of sequenced frames that the peer has acknowledged.
    pub acked_bytes: u64,
    /// Bytes of sequenced frames that are queued, or sent and not acknowledged.
    pub unacked_bytes: u64,
    /// Smoothed round-trip time.
    pub rtt: Option<Duration>,
    /// Bytes that came while a frame was on its way in, so that the link was at work.
    pub arrived_bytes: u64,
    /// Time in which those bytes arrived.
    pub arrived_in: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No socket.
    Down,
    /// A socket, and no HELLO from the peer yet.
    Handshake,
    /// Frames flow.
    Up,
    /// The peer sent CLOSE.
    Closed,
}

/// One end of the protocol; see the [module](self) page.
#[derive(Debug)]
pub struct Connection {
    config: ConnectionConfig,
    pool: Pool,
    phase: Phase,
    /// Wire version agreed on.
    version: u8,
    epoch: Epoch,
    deframer: Deframer,
    /// Time of the last bytes, if a frame is on its way in since then.
    in_frame_since: Option<Instant>,
    send: SendState,
    receive: ReceiveState,
    timers: Timers,
    events: VecDeque<ConnectionEvent>,
    control: Control,
    traffic: Traffic,
}

/// The cloud's memory of a link, as both ends know it.
#[derive(Debug, Default)]
struct Epoch {
    /// The cloud's name for it; 0 before the first HELLO.
    number: u64,
    /// True if a peer was told of it.
    used: bool,
    /// True if the peer has shown that it knows it.
    known: bool,
}

/// Unsequenced frames of the present socket.
#[derive(Debug, Default)]
struct Control {
    /// The buffer for them; `None` while the link has it.
    buf: Option<Buf>,
    hello_sent: bool,
    /// Eight bytes to send back.
    pong: Option<[u8; 8]>,
    /// The link has a batch: nothing can be sent, so no timer asks for it.
    transmitting: bool,
}

impl Connection {
    /// A device's end: `link_id` is random and stays for the connection's life. `None` if the
    /// pool is empty.
    #[must_use]
    pub fn device(config: ConnectionConfig, link_id: [u8; 16], pool: Pool) -> Option<Self> {
        Self::new(config, Role::Device, link_id, 0, pool)
    }

    /// A cloud's end for the link that a device named. `epoch` is random and not 0. `None` if the
    /// pool is empty.
    #[must_use]
    pub fn cloud(
        config: ConnectionConfig,
        link_id: [u8; 16],
        epoch: u64,
        pool: Pool,
    ) -> Option<Self> {
        assert!(epoch != 0, "epoch 0 means none");
        Self::new(config, Role::Cloud, link_id, epoch, pool)
    }

    fn new(
        mut config: ConnectionConfig,
        role: Role,
        link_id: [u8; 16],
        epoch: u64,
        pool: Pool,
    ) -> Option<Self> {
        let window_min = 2 * crate::frame::FRAME_BYTES_MAX;
        assert!(config.window_bytes as usize >= window_min, "the window holds two frames");
        config.hello.role = role;
        config.hello.link.id = link_id;
        Some(Self {
            control: Control { buf: Some(pool.take(0)?), ..Control::default() },
            phase: Phase::Down,
            version: WIRE_VERSION,
            epoch: Epoch { number: epoch, ..Epoch::default() },
            deframer: Deframer::new(pool.clone()),
            in_frame_since: None,
            send: SendState::default(),
            receive: ReceiveState::new(config.window_bytes),
            timers: Timers::default(),
            events: VecDeque::new(),
            traffic: Traffic::default(),
            pool,
            config,
        })
    }

    /// A socket is there; HELLO goes out first.
    pub fn handle_connected(&mut self, now: Instant) {
        self.handle_disconnected();
        self.phase = Phase::Handshake;
        self.timers.start(now);
    }

    /// As [`Connection::handle_connected`], on a socket whose HELLO has been read already.
    ///
    /// # Errors
    /// If the peer breaks the protocol.
    pub fn handle_greeting(
        &mut self,
        now: Instant,
        handshake: Handshake,
    ) -> Result<(), ProtocolError> {
        self.handle_connected(now);
        let (hello, deframer) = handshake.into_parts();
        self.deframer = deframer;
        if let Some(frame) = hello {
            self.handle_frame(now, frame)?;
        }
        self.handle_room(now)
    }

    /// The socket is gone. Frames wait for the next one.
    pub fn handle_disconnected(&mut self) {
        self.traffic.copied_bytes += self.deframer.copied_bytes();
        self.deframer = Deframer::new(self.pool.clone());
        self.deframer.limit(HELLO_BYTES_MAX);
        self.in_frame_since = None;
        self.phase = Phase::Down;
        self.control = Control { buf: self.control.buf.take(), ..Control::default() };
    }

    /// Bytes came from the socket. Returns how many were taken: fewer than all only while the pool
    /// is empty.
    ///
    /// # Errors
    /// If the peer breaks the protocol; the connection is of no use then.
    pub fn handle_bytes(&mut self, now: Instant, bytes: &[u8]) -> Result<usize, ProtocolError> {
        let mut taken = 0;
        while taken < bytes.len() {
            let pushed = self.deframer.push(&bytes[taken..]);
            taken += pushed;
            self.note_received(now, pushed);
            self.handle_room(now)?;
            if pushed == 0 {
                break;
            }
        }
        Ok(taken)
    }

    /// The buffer that the link is to receive into; it comes back through
    /// [`Connection::handle_received`]. `None` while it is out, or the pool is empty.
    pub fn receive_room(&mut self) -> Option<Buf> {
        self.deframer.take_room()
    }

    /// The buffer of [`Connection::receive_room`] comes back with `bytes` more in it.
    ///
    /// # Errors
    /// If the peer breaks the protocol; the connection is of no use then.
    pub fn handle_received(
        &mut self,
        now: Instant,
        buf: Buf,
        bytes: usize,
    ) -> Result<(), ProtocolError> {
        self.deframer.put_room(buf);
        self.note_received(now, bytes);
        self.handle_room(now)
    }

    /// Takes up frames that waited for a free buffer.
    ///
    /// # Errors
    /// If the peer breaks the protocol; the connection is of no use then.
    pub fn handle_room(&mut self, now: Instant) -> Result<(), ProtocolError> {
        while matches!(self.phase, Phase::Handshake | Phase::Up) {
            match self.deframer.next_frame()? {
                Deframed::Frame(frame) => self.handle_frame(now, frame)?,
                Deframed::NeedBytes => {
                    if let Some(mid_frame) = self.deframer.is_mid_frame() {
                        let since = self.in_frame_since.unwrap_or(now);
                        self.in_frame_since = mid_frame.then_some(since);
                    }
                    break;
                }
                Deframed::NeedBuffer => break,
            }
        }
        Ok(())
    }

    /// Time has passed.
    ///
    /// # Errors
    /// If the link counts as broken; the caller closes the socket.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), Expired> {
        match self.phase {
            Phase::Down | Phase::Closed => Ok(()),
            Phase::Handshake => self.timers.check_hello(now, self.config.hello_within),
            Phase::Up => {
                self.timers.check_silence(now, self.config.ping_after, self.config.dead_after)
            }
        }
    }

    /// Time at which [`Connection::handle_timeout`] and then [`Connection::poll_transmit`] are to
    /// be called again, if nothing else happens.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.phase {
            Phase::Down | Phase::Closed => None,
            Phase::Handshake => self.timers.hello_deadline(self.config.hello_within),
            Phase::Up => {
                // What can't be written now asks for no time: the link's completion comes first.
                let writes = !self.control.transmitting && self.control.buf.is_some();
                let ping_at = self.timers.ping_at(self.config.ping_after).filter(|_| writes);
                let ack_at = self.receive.ack_at().filter(|_| writes);
                let dead_at = self.timers.dead_at(self.config.dead_after);
                ack_at.into_iter().chain(ping_at).chain(dead_at).min()
            }
        }
    }

    /// The next thing to tell the application.
    pub fn poll_event(&mut self) -> Option<ConnectionEvent> {
        self.events.pop_front()
    }

    /// A CLOSE frame, for the caller to send as the socket's last. `None` if there is no buffer.
    #[must_use]
    pub fn close_frame(&mut self, code: CloseCode, reason: &str) -> Option<Buf> {
        let mut buf = self.control.buf.take().or_else(|| self.pool.take(0))?;
        buf.clear();
        write_close(&mut buf, code, reason);
        Some(buf)
    }

    /// A CLOSE frame for a socket that never became a connection. `None` if there is no buffer.
    #[must_use]
    pub fn refusal(pool: &Pool, code: CloseCode, reason: &str) -> Option<Buf> {
        let mut buf = pool.take(0)?;
        buf.clear();
        write_close(&mut buf, code, reason);
        Some(buf)
    }

    /// True if frames flow.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.phase == Phase::Up
    }

    /// True if nothing is queued and everything sent is acknowledged.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.send.is_drained()
    }

    /// Frames of `session` that are queued, or sent and not acknowledged.
    #[must_use]
    pub fn held(&self, session: u32) -> usize {
        self.send.held(session)
    }

    /// The device's name for the link.
    #[must_use]
    pub fn link_id(&self) -> [u8; 16] {
        self.config.hello.link.id
    }

    /// Traffic of the connection so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let copied_bytes = self.traffic.copied_bytes + self.deframer.copied_bytes();
        let (acked_bytes, unacked_bytes) = self.send.bytes();
        let rtt = self.timers.rtt();
        Traffic { copied_bytes, acked_bytes, unacked_bytes, rtt, ..self.traffic }
    }

    fn note_received(&mut self, now: Instant, bytes: usize) {
        self.traffic.received_bytes += bytes as u64;
        if bytes > 0 {
            self.timers.heard(now);
            if let Some(since) = self.in_frame_since.take() {
                self.traffic.arrived_bytes += bytes as u64;
                self.traffic.arrived_in += now.duration_since(since);
            }
        }
    }

    fn handle_frame(&mut self, now: Instant, frame: RawFrame) -> Result<(), ProtocolError> {
        self.traffic.received_frames += 1;
        let RawFrame { header, body } = frame;
        let kind = Kind::from_wire(header.kind);
        // HELLO and CLOSE keep their layout in all versions.
        if kind == Some(Kind::Close) {
            return self.handle_close(&body);
        }
        if kind == Some(Kind::Hello) {
            return self.handle_hello(now, &header, &body);
        }
        if self.phase != Phase::Up {
            return Err(ProtocolError::NoHello { kind: header.kind });
        }
        if header.version != self.version {
            let (expected, got) = (self.version, header.version);
            return Err(ProtocolError::FrameVersion { expected, got });
        }
        self.epoch.known = true;
        if let Some(sent_at) = self.send.acknowledge(header.ack)? {
            self.timers.acknowledged(now, sent_at);
        }
        self.send.grant(header.credit);
        if header.kind >= crate::frame::SEQUENCED_FROM {
            return self.handle_sequenced(now, &header, kind, body);
        }
        match kind {
            Some(Kind::Ping) => self.control.pong = Some(eight(Kind::Ping, &body)?),
            Some(Kind::Pong) => self.timers.ponged(now, eight(Kind::Pong, &body)?),
            // ACK has said everything in its header; an ignorable frame is ignored.
            _ => {}
        }
        Ok(())
    }

    fn handle_close(&mut self, body: &[u8]) -> Result<(), ProtocolError> {
        let message = |error| ProtocolError::Message { kind: Kind::Close, error };
        let decoded = Message::decode(Kind::Close, body).map_err(message)?;
        if let Message::Close(Close { code, reason }) = decoded {
            let reason = reason.to_owned();
            self.events.push_back(ConnectionEvent::Closed { code, reason });
            self.phase = Phase::Closed;
        }
        Ok(())
    }
}

/// Appends an unsequenced frame to `buf`.
fn write_control(buf: &mut Buf, kind: Kind, ack: u32, credit: u32, body: &[u8]) {
    let header = Header {
        len: u32::try_from(body.len()).expect("control bodies are small"),
        kind: kind as u8,
        flags: 0,
        priority: Priority::Control,
        version: WIRE_VERSION,
        session: 0,
        body_crc: crc32c::crc32c(body),
        seq: 0,
        ack,
        credit,
    };
    let room = buf.spare_mut();
    room[..HEADER_BYTES].copy_from_slice(&header.encode());
    room[HEADER_BYTES..][..body.len()].copy_from_slice(body);
    buf.advance(HEADER_BYTES + body.len());
}

/// Appends a CLOSE frame to `buf`.
fn write_close(buf: &mut Buf, code: CloseCode, reason: &str) {
    let message = Message::Close(Close { code, reason });
    let mut body = [0; 2 + crate::message::TEXT_BYTES_MAX];
    let bytes = message.encode(&mut body);
    write_control(buf, Kind::Close, 0, 0, &body[..bytes]);
}

/// The body of a PING or PONG.
fn eight(kind: Kind, body: &[u8]) -> Result<[u8; 8], ProtocolError> {
    body.try_into().map_err(|_| {
        let (expected, got) = ("8", body.len() as u64);
        let error = MessageError::Value { field: "body length", expected, got };
        ProtocolError::Message { kind, error }
    })
}

/// True if `role` may send frames of `kind`.
fn may_send(role: Role, kind: Kind) -> bool {
    let device = matches!(kind, Kind::Open | Kind::Rows | Kind::Commit | Kind::Cancel | Kind::End);
    kind.is_sequenced() && device == (role == Role::Device)
}

#[cfg(test)]
mod tests;
