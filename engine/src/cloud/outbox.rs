//! Outputs that could not be sent at once: each connection has its own queue of them, so that a
//! device that does not read holds up nobody else.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hat_transport::conn::Refusal;
use hat_transport::frame::{Kind, Priority};
use hat_transport::message::CloseCode;
use hat_transport::turn::ConnectionId;

use super::io::Io;
use super::violation::SessionEnd;
use crate::sched::DeviceKey;

/// Most bytes that wait for one connection beyond its queue. With that it holds all rows of a long
/// prompt for the tail layers of a large model; a device that reads comes near with these alone.
pub(super) const OUTBOX_BYTES_MAX: usize = 32 << 20;
/// How soon buffers are looked for again.
const BUFFER_RETRY: Duration = Duration::from_millis(1);
/// How soon a full queue is looked at again.
const FULL_RETRY: Duration = Duration::from_millis(20);

/// An `OUTPUT` frame that found no free buffer, or no room in its connection's queue.
pub(super) struct Output {
    pub(super) session: u32,
    pub(super) body: Vec<u8>,
}

/// What the cloud keeps of one connection.
pub(super) struct Guest {
    /// Its name in the scheduler.
    pub(super) device: DeviceKey,
    /// Sessions that it has.
    pub(super) sessions: u32,
    /// Whether it has a socket now.
    pub(super) is_up: bool,
    /// Longest frame that it takes, header included.
    pub(super) frame_bytes_max: usize,
    /// Frames of its chunks whose end has not come: nothing but the device frees their buffers.
    pub(super) begun_frames: usize,
    outbox: VecDeque<Output>,
    outbox_bytes: usize,
    /// Since when its queue has been full.
    full_since: Option<Instant>,
    /// Bytes that came while a frame was on its way in, and how long they took, of which it has
    /// been told.
    pub(super) told: (u64, Duration),
}

impl Guest {
    pub(super) fn new(device: DeviceKey) -> Self {
        Self {
            device,
            sessions: 0,
            is_up: true,
            frame_bytes_max: 0,
            begun_frames: 0,
            outbox: VecDeque::new(),
            outbox_bytes: 0,
            full_since: None,
            told: (0, Duration::ZERO),
        }
    }

    pub(super) fn clear_outbox(&mut self) {
        self.outbox.clear();
        self.outbox_bytes = 0;
        self.full_since = None;
    }

    /// Whether outputs wait: later ones then wait behind them.
    pub(super) fn has_outputs(&self) -> bool {
        !self.outbox.is_empty()
    }
}

/// What became of a connection's first waiting output.
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

impl Io {
    /// Keeps an output until it can be sent.
    pub(super) fn keep_output(&mut self, connection: ConnectionId, output: Output) {
        let Some(guest) = self.guests.get_mut(&connection) else { return };
        if !guest.has_outputs() {
            self.unsent.push_back(connection);
        }
        guest.outbox_bytes += output.body.len();
        guest.outbox.push_back(output);
        if guest.outbox_bytes > OUTBOX_BYTES_MAX {
            self.send_away(connection);
        }
    }

    /// Sends what waits, a frame of each connection in turn.
    pub(super) fn flush_outboxes(&mut self) {
        let mut full = Vec::new();
        while let Some(connection) = self.unsent.pop_front() {
            match self.flush_one(connection) {
                Flushed::Sent => self.unsent.push_back(connection),
                Flushed::Empty => {}
                Flushed::Full => full.push(connection),
                Flushed::TooLong { session } => {
                    self.unsent.push_back(connection);
                    self.end_too_long(connection, session);
                }
                Flushed::NoBuffer => {
                    self.unsent.push_front(connection);
                    break;
                }
            }
        }
        self.unsent.extend(&full);
        for connection in full {
            let Some(guest) = self.guests.get_mut(&connection) else { continue };
            let since = *guest.full_since.get_or_insert(self.now);
            let waited = self.now.saturating_duration_since(since);
            if waited >= self.start.config.idle_after {
                self.send_away(connection);
            }
        }
    }

    fn flush_one(&mut self, connection: ConnectionId) -> Flushed {
        let Some(guest) = self.guests.get_mut(&connection) else { return Flushed::Empty };
        while let Some(output) = guest.outbox.front() {
            let session = output.session;
            let is_open = self.keys.contains_key(&(connection, session));
            if is_open {
                let Some(mut body) = self.endpoint.buffer(output.body.len()) else {
                    return Flushed::NoBuffer;
                };
                body.body_mut().copy_from_slice(&output.body);
                let sent =
                    self.endpoint.send(connection, Kind::Output, session, Priority::Verify, body);
                match sent.map_err(|error| error.refusal) {
                    Ok(()) => guest.full_since = None,
                    Err(Refusal::Gone) => {}
                    Err(Refusal::TooLong) => return Flushed::TooLong { session },
                    Err(_) => return Flushed::Full,
                }
            }
            guest.outbox_bytes -= output.body.len();
            guest.outbox.pop_front();
            if is_open && guest.has_outputs() {
                return Flushed::Sent;
            }
        }
        Flushed::Empty
    }

    /// An output is longer than any frame that the device takes. Its frames are cut to what HELLO
    /// said, so this is a fault of the cloud's own; the rows that were asked for are answered by
    /// the end of the session.
    fn end_too_long(&mut self, connection: ConnectionId, session: u32) {
        let Some(&key) = self.keys.get(&(connection, session)) else { return };
        self.end_for(key, SessionEnd::TooLong);
    }

    /// How long a turn may wait, as far as outputs go.
    pub(super) fn outbox_retry(&self) -> Option<Duration> {
        let is_full = |connection: &ConnectionId| {
            self.guests.get(connection).is_some_and(|guest| guest.full_since.is_some())
        };
        match self.unsent.is_empty() {
            true => None,
            false if self.unsent.iter().all(is_full) => Some(FULL_RETRY),
            false => Some(BUFFER_RETRY),
        }
    }

    /// Closes the connection of a device that does not read.
    pub(super) fn send_away(&mut self, connection: ConnectionId) {
        tracing::warn!("a device does not read its outputs; the connection is closed");
        self.start.counters.refused.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if let Some(guest) = self.guests.get_mut(&connection) {
            guest.clear_outbox();
        }
        self.endpoint.close(connection, CloseCode::Overload, "you do not read your answers");
    }
}
