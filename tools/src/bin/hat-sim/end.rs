//! One end of a device's connection, and the direction of its link that leaves it: the engine's
//! own protocol over a link that is a rate and a delay.

use std::time::{Duration, Instant};

use hat_tools::random::{Purpose, unit};
use hat_transport::conn::{
    Connection, ConnectionConfig, ConnectionEvent, ConnectionId, FrameSink, SendError, Traffic,
};
use hat_transport::frame::{Kind, Priority};
use hat_transport::message::{Hello, Role};
use hat_transport::pool::{Buf, Pool, PoolConfig};

use crate::queue::{Time, nanoseconds};

/// Time that a link keeps its rate.
const RATE_HOLDS: Time = 100_000_000;
/// Bytes of a frame that come first.
const SEGMENT_BYTES: usize = 1460;
/// Nobody is pinged: all are there.
const NEVER: Duration = Duration::from_secs(1 << 30);
/// Buffers of prompts of all connections of a run, and small ones of each; resident as far as they
/// are used.
const LARGE: u32 = 1 << 15;
const SMALL_EACH: u32 = 16;
/// Bytes that a peer may have on its way or unread: prompts that are not cut fit.
const WINDOW_BYTES: u32 = 256 << 20;

/// One direction of a link.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    /// Megabytes a second, between these.
    pub(crate) mb_s: [f64; 2],
    pub(crate) one_way_s: f64,
    /// Seconds that the sender spends on handing over, beside the bytes.
    pub(crate) message_s: f64,
    pub(crate) seed: u64,
    pub(crate) device: u64,
}

impl Way {
    /// Bytes a second at a time: drawn anew between the ends of its range as time goes on.
    fn rate(&self, now: Time) -> f64 {
        let [low, high] = self.mb_s;
        let share = unit(self.seed, Purpose::Rate, self.device, now / RATE_HOLDS);
        1e6 * (low + (high - low) * share)
    }
}

/// Frames that go on a link together.
pub(crate) struct Frames {
    /// Time at which the last has left.
    pub(crate) left: Time,
    /// Arrival of each, and its bytes.
    pub(crate) each: Vec<(Time, Vec<u8>)>,
}

/// One end.
pub(crate) struct End {
    pub(crate) connection: Connection,
    pool: Pool,
    way: Way,
    /// Buffers that the link has.
    batch: Vec<Buf>,
    /// Time at which it is free again.
    free_at: Time,
    /// Time at which this end is polled next, if nothing happens.
    pub(crate) timer_at: Option<Time>,
}

/// All buffers of a run of so many connections.
pub(crate) fn buffers(connections: usize) -> Pool {
    let connections = u32::try_from(connections).expect("requests are few");
    Pool::new(PoolConfig { small: (1 << 12) + SMALL_EACH * connections, large: LARGE })
}

impl End {
    /// An end that has just connected.
    pub(crate) fn new(now: Instant, hello: Hello, pool: &Pool, way: Way) -> Self {
        let mut link_id = [0; 16];
        link_id[..8].copy_from_slice(&way.device.to_le_bytes());
        let config = ConnectionConfig {
            window_bytes: WINDOW_BYTES,
            queue_frames_max: 1 << 14,
            queue_bytes_max: WINDOW_BYTES as usize,
            ping_after: NEVER,
            dead_after: 2 * NEVER,
            ..ConnectionConfig::new(hello)
        };
        let connection = match hello.role {
            Role::Device => Connection::device(config, link_id, pool.clone()),
            Role::Cloud => Connection::cloud(config, link_id, 1, pool.clone()),
        };
        let mut connection = connection.expect("there are more buffers than are ever in use");
        connection.handle_connected(now);
        let (batch, pool) = (vec![], pool.clone());
        Self { connection, pool, way, batch, free_at: 0, timer_at: None }
    }

    /// Frames that go on the link now, one by one; `None` if it is busy, or nothing is to be sent.
    pub(crate) fn pump(&mut self, now: Time, at: Instant) -> Option<Frames> {
        let is_free = self.batch.is_empty();
        if !is_free || !self.connection.poll_transmit(at, &mut self.batch) {
            return None;
        }
        // What goes on where the last frame ended is of the same message.
        let mut left = now + if now > self.free_at { nanoseconds(self.way.message_s) } else { 0 };
        let rate = self.way.rate(now);
        let mut each = vec![];
        for buf in &self.batch {
            // A frame comes in parts, by which its receiver knows the link's rate.
            let (first, rest) = buf.wire().split_at(buf.wire().len().min(SEGMENT_BYTES));
            for part in [first, rest].into_iter().filter(|part| !part.is_empty()) {
                left += nanoseconds(part.len() as f64 / rate);
                each.push((left + nanoseconds(self.way.one_way_s), part.to_vec()));
            }
        }
        self.free_at = left;
        Some(Frames { left, each })
    }

    /// The link has sent what it had.
    pub(crate) fn freed(&mut self) {
        self.connection.handle_transmitted(&mut self.batch);
    }

    /// Bytes have come.
    pub(crate) fn take(&mut self, at: Instant, bytes: &[u8]) -> Vec<ConnectionEvent> {
        let taken = self.connection.handle_bytes(at, bytes).expect("both ends are honest");
        assert_eq!(taken, bytes.len(), "there are more buffers than are ever in use");
        std::iter::from_fn(|| self.connection.poll_event()).collect()
    }

    pub(crate) fn traffic(&self) -> Traffic {
        self.connection.traffic()
    }
}

/// Ends that frames are written to, by number, and those that were.
pub(crate) struct SendQueue<'a> {
    pub(crate) ends: &'a mut [End],
    pub(crate) written: &'a mut Vec<usize>,
}

impl FrameSink for SendQueue<'_> {
    fn buffer(&mut self, _: Priority, body_bytes: usize) -> Option<Buf> {
        self.ends.first()?.pool.take(body_bytes)
    }

    fn send(
        &mut self,
        to: ConnectionId,
        kind: Kind,
        session: u32,
        priority: Priority,
        body: Buf,
    ) -> Result<(), SendError> {
        self.written.push(to.0 as usize);
        self.ends[to.0 as usize].connection.send(kind, session, priority, body)
    }

    fn discard(&mut self, to: ConnectionId, session: u32) -> usize {
        self.ends[to.0 as usize].connection.discard(session)
    }
}
