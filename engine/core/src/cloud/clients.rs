//! Connections, and what goes back over them: answers, and outputs that could not be sent at once.
//! Each connection has its own queue of outputs, so that a device that does not read holds up
//! nobody else.
//!
//! Answers go in the order in which they were given, before outputs of steps that end later. They
//! do not wait behind outputs that wait here: DROPPED, COMPUTED and the error of a session may come
//! before OUTPUT frames of the same session that found no room. A device takes each of them early:
//! DROPPED names other rows than any OUTPUT, a COMPUTED chunk has no OUTPUT, and after the error of
//! a session nothing of it counts.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use hat_transport::conn::{ConnectionId, FrameSink, Refusal, Traffic};
use hat_transport::frame::{Kind, Priority};
use hat_transport::message::{Arrivals, CloseCode, Message, SessionError, SessionErrorCode};
use hat_transport::pool::Buf;

use crate::sched::DeviceKey;

/// Most bytes that wait for one connection beyond its queue. With that it holds all rows of a long
/// prompt for the tail layers of a large model; a device that reads comes near with these alone.
pub const SEND_QUEUE_BYTES_MAX: usize = 32 << 20;
/// Interval at which buffers are looked for again.
const BUFFER_RETRY: Duration = Duration::from_millis(1);
/// Interval at which a full queue is looked at again.
const FULL_RETRY: Duration = Duration::from_millis(20);
/// The reason in the CLOSE for a device that does not read.
const NOT_READ: &str = "you do not read your answers";

/// A small message to a device.
#[derive(Debug)]
enum Reply {
    Plain(Message<'static>),
    Error { code: SessionErrorCode, text: String },
}

/// An `OUTPUT` frame that found no free buffer, or no room in its connection's queue.
struct Output {
    session: u32,
    body: Vec<u8>,
}

/// One connection.
#[derive(Default)]
struct Client {
    /// Its name in the scheduler.
    device: DeviceKey,
    /// True if it has a socket now.
    is_up: bool,
    /// True if it is to be closed: nothing is taken from it, or sent to it.
    is_closing: bool,
    /// Longest frame that it takes, header included.
    frame_bytes_max: usize,
    send_queue: VecDeque<Output>,
    send_queue_bytes: usize,
    /// Since when its queue has been full.
    full_since: Option<Instant>,
    /// Bytes that came while a frame was on its way in, and how long they took.
    arrived: (u64, Duration),
    /// Of these, what its device has been told of.
    told: (u64, Duration),
}

/// Outcome for a connection's first waiting output.
enum Flushed {
    Sent,
    Empty,
    NoBuffer,
    Full,
    /// It exceeds what the device takes: the session can't go on.
    TooLong {
        session: u32,
    },
}

/// All connections.
#[derive(Default)]
pub(super) struct Clients {
    by_id: BTreeMap<ConnectionId, Client>,
    devices: DeviceKey,
    answers: VecDeque<(ConnectionId, u32, Reply)>,
    /// Connections with outputs that wait, in turn.
    unsent: VecDeque<ConnectionId>,
    /// Time at which [`Self::flush`] is to be called again, since outputs wait.
    pub(super) retry_at: Option<Instant>,
    /// Connections that are to be closed.
    pub(super) closes: VecDeque<(ConnectionId, CloseCode, String)>,
    /// Connections that were closed since their device does not read its outputs.
    pub(super) sent_away: u64,
}

impl Clients {
    /// A connection begins, or begins anew: what was answered in its former life is not sent.
    pub(super) fn admit(&mut self, id: ConnectionId) {
        self.answers.retain(|(to, ..)| *to != id);
        self.devices += 1;
        self.by_id.insert(id, Client { device: self.devices, ..Client::default() });
    }

    /// A connection is over; returns the device.
    pub(super) fn remove(&mut self, id: ConnectionId) -> Option<DeviceKey> {
        self.by_id.remove(&id).map(|client| client.device)
    }

    /// A connection has a socket, whose device takes frames of this many bytes, or has none.
    pub(super) fn set_up(&mut self, id: ConnectionId, frame_bytes_max: Option<usize>) {
        if let Some(client) = self.by_id.get_mut(&id) {
            client.is_up = frame_bytes_max.is_some();
            client.frame_bytes_max = frame_bytes_max.unwrap_or(client.frame_bytes_max);
        }
    }

    /// True if frames of a connection are to be taken.
    pub(super) fn listens_to(&self, id: ConnectionId) -> bool {
        self.by_id.get(&id).is_some_and(|client| !client.is_closing)
    }

    pub(super) fn is_up(&self, id: ConnectionId) -> bool {
        self.by_id.get(&id).is_some_and(|client| client.is_up)
    }

    pub(super) fn device(&self, id: ConnectionId) -> Option<DeviceKey> {
        self.by_id.get(&id).map(|client| client.device)
    }

    pub(super) fn frame_bytes_max(&self, id: ConnectionId) -> usize {
        self.by_id.get(&id).map_or(0, |client| client.frame_bytes_max)
    }

    pub(super) fn connections(&self) -> impl Iterator<Item = ConnectionId> {
        self.by_id.keys().copied()
    }

    /// Notes the traffic of a connection so far.
    pub(super) fn note_traffic(&mut self, id: ConnectionId, traffic: &Traffic) {
        if let Some(client) = self.by_id.get_mut(&id) {
            client.arrived = (traffic.arrived_bytes, traffic.arrived_in);
        }
    }

    /// Bytes that a connection brought, and their rate, since the last report to it.
    pub(super) fn arrivals(&mut self, id: ConnectionId) -> Arrivals {
        let Some(client) = self.by_id.get_mut(&id) else { return Arrivals::default() };
        let (bytes, time) = std::mem::replace(&mut client.told, client.arrived);
        let us = client.arrived.1.saturating_sub(time).as_micros();
        Arrivals {
            bytes: u32::try_from(client.arrived.0.saturating_sub(bytes)).unwrap_or(u32::MAX),
            us: u32::try_from(us).unwrap_or(u32::MAX),
        }
    }

    /// Asks for a connection to be closed.
    pub(super) fn close(&mut self, id: ConnectionId, code: CloseCode, reason: String) {
        let Some(client) = self.by_id.get_mut(&id).filter(|client| !client.is_closing) else {
            return;
        };
        client.is_closing = true;
        client.send_queue.clear();
        client.send_queue_bytes = 0;
        client.full_since = None;
        self.closes.push_back((id, code, reason));
    }

    /// Keeps a message until [`Self::send_answers`].
    pub(super) fn answer(&mut self, to: ConnectionId, session: u32, message: Message<'static>) {
        self.answers.push_back((to, session, Reply::Plain(message)));
    }

    /// As [`Self::answer`], for the error of a session.
    pub(super) fn answer_error(
        &mut self,
        to: ConnectionId,
        session: u32,
        code: SessionErrorCode,
        text: String,
    ) {
        self.answers.push_back((to, session, Reply::Error { code, text }));
    }

    /// Sends the queued answers. A device whose queue is full of answers does not read them, and is
    /// not waited for.
    pub(super) fn send_answers(&mut self, sink: &mut dyn FrameSink) {
        while let Some((to, session, reply)) = self.answers.pop_front() {
            if !self.listens_to(to) {
                continue;
            }
            let message = match &reply {
                Reply::Plain(message) => *message,
                Reply::Error { code, text } => {
                    Message::SessionError(SessionError { code: *code, text })
                }
            };
            if let Err(error) = sink.send_message(to, session, &message) {
                tracing::warn!(%error, "an answer could not be queued; the connection is closed");
                self.close(to, CloseCode::Overload, NOT_READ.to_owned());
            }
        }
    }

    /// A buffer for an output of a connection; `None` if there is none, or outputs wait already:
    /// frames of one session keep their order, so once one waits, all of its device wait.
    pub(super) fn output_buffer(
        &self,
        to: ConnectionId,
        bytes: usize,
        sink: &mut dyn FrameSink,
    ) -> Option<Buf> {
        let waits = self.by_id.get(&to).is_some_and(|client| !client.send_queue.is_empty());
        if waits { None } else { sink.buffer(Priority::Verify, bytes) }
    }

    /// Keeps an output until it can be sent.
    pub(super) fn keep_output(&mut self, to: ConnectionId, session: u32, body: Vec<u8>) {
        let Some(client) = self.by_id.get_mut(&to).filter(|client| !client.is_closing) else {
            return;
        };
        if client.send_queue.is_empty() {
            self.unsent.push_back(to);
        }
        client.send_queue_bytes += body.len();
        client.send_queue.push_back(Output { session, body });
        if client.send_queue_bytes > SEND_QUEUE_BYTES_MAX {
            self.send_away(to);
        }
    }

    /// Sends what waits, a frame of each connection in turn. Stops at an output that its device
    /// never takes, and says whose it is: its session is to end, and this is to be called again.
    ///
    /// Frames are cut to what HELLO said, so such an output is a fault of the cloud's own; the rows
    /// that were asked for are answered by the end of the session.
    pub(super) fn flush(
        &mut self,
        now: Instant,
        idle_after: Duration,
        is_open: &dyn Fn(ConnectionId, u32) -> bool,
        sink: &mut dyn FrameSink,
    ) -> Option<(ConnectionId, u32)> {
        let mut full = Vec::new();
        let mut too_long = None;
        while let Some(to) = self.unsent.pop_front() {
            match self.flush_one(to, is_open, sink) {
                Flushed::Sent => self.unsent.push_back(to),
                Flushed::Empty => {}
                Flushed::Full => full.push(to),
                Flushed::TooLong { session } => {
                    self.unsent.push_back(to);
                    too_long = Some((to, session));
                    break;
                }
                Flushed::NoBuffer => {
                    self.unsent.push_front(to);
                    break;
                }
            }
        }
        let all_full = self.unsent.is_empty();
        let retry = if all_full { FULL_RETRY } else { BUFFER_RETRY };
        self.unsent.extend(&full);
        for to in full {
            let Some(client) = self.by_id.get_mut(&to) else { continue };
            let since = *client.full_since.get_or_insert(now);
            if now.saturating_duration_since(since) >= idle_after {
                self.send_away(to);
            }
        }
        let waits = |to: &ConnectionId| {
            self.by_id.get(to).is_some_and(|client| !client.send_queue.is_empty())
        };
        self.unsent.retain(waits);
        self.retry_at = (!self.unsent.is_empty()).then(|| now + retry);
        too_long
    }

    fn flush_one(
        &mut self,
        to: ConnectionId,
        is_open: &dyn Fn(ConnectionId, u32) -> bool,
        sink: &mut dyn FrameSink,
    ) -> Flushed {
        let Some(client) = self.by_id.get_mut(&to) else { return Flushed::Empty };
        while let Some(output) = client.send_queue.front() {
            let session = output.session;
            let is_open = is_open(to, session);
            if is_open {
                let Some(mut body) = sink.buffer(Priority::Verify, output.body.len()) else {
                    return Flushed::NoBuffer;
                };
                body.body_mut().copy_from_slice(&output.body);
                let sent = sink.send(to, Kind::Output, session, Priority::Verify, body);
                match sent.map_err(|error| error.refusal) {
                    Ok(()) => client.full_since = None,
                    Err(Refusal::Gone) => {}
                    Err(Refusal::TooLong) => return Flushed::TooLong { session },
                    Err(_) => return Flushed::Full,
                }
            }
            client.send_queue_bytes -= output.body.len();
            client.send_queue.pop_front();
            if is_open && !client.send_queue.is_empty() {
                return Flushed::Sent;
            }
        }
        Flushed::Empty
    }

    /// Has the connection of a device closed that does not read.
    fn send_away(&mut self, id: ConnectionId) {
        tracing::warn!("a device does not read its outputs; the connection is closed");
        self.sent_away += 1;
        self.close(id, CloseCode::Overload, NOT_READ.to_owned());
    }
}
