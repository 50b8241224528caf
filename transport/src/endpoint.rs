//! [`Endpoint`]: the one place where link, clock and protocol meet.
//!
//! One thread owns an endpoint and calls [`Endpoint::poll`] again and again: one wait, and all the
//! work that follows from it. A device dials, and redials until it closes; a cloud accepts, knows
//! a device again by its link id, and keeps the state of a broken link for a grace time.
//!
//! TLS will stand in `Peer::transmit` and `Endpoint::handle_received`, through which all bytes
//! pass, the last frame of a socket too.

mod event;
mod peer;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::mem::Discriminant;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::conn::{
    Connection, ConnectionConfig, ConnectionEvent, ConnectionId, FrameSink, ProtocolError, Refusal,
    SendError, Traffic,
};
use crate::frame::{FrameError, HeaderError, Kind, Priority};
use crate::link::{Completion, Link, PeerId, Waker};
use crate::log::RateLimit;
use crate::message::{CloseCode, Hello, Role};
use crate::pool::{Buf, Pool, PoolConfig};
use crate::random::{Random, SystemRandom};
use peer::{Peer, State};

pub use event::{Event, GoneError};

/// Shortest pause before a device dials again.
const REDIAL_MIN: Duration = Duration::from_millis(50);
/// Longest pause before a device dials again.
const REDIAL_MAX: Duration = Duration::from_secs(2);
/// Time that a socket stays after CLOSE, for the peer to read it.
const LINGER: Duration = Duration::from_secs(1);
/// Interval at which an empty pool is looked at again.
const POOL_RETRY: Duration = Duration::from_millis(1);
/// One buffer in so many of each size is kept for receiving.
const POOL_RESERVE: usize = 8;

/// Settings of an endpoint.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Settings of each connection; the role in its HELLO is the endpoint's.
    pub connection: ConnectionConfig,
    /// Time that a cloud keeps a connection whose link broke.
    pub grace: Duration,
    /// Connections, those without a link included.
    pub connections_max: usize,
    /// Accepted sockets that have not said HELLO yet; each may hold two small buffers.
    pub handshakes_max: usize,
    /// All buffers: frames queued, unacknowledged, received and held by the application.
    pub pool: PoolConfig,
}

impl EndpointConfig {
    /// Usual values around a HELLO: small for a device, more for a cloud.
    #[must_use]
    pub fn new(hello: Hello) -> Self {
        let (connections_max, pool) = match hello.role {
            Role::Device => (1, PoolConfig { small: 512, large: 256 }),
            Role::Cloud => (256, PoolConfig { small: 4096, large: 2048 }),
        };
        Self {
            connection: ConnectionConfig::new(hello),
            grace: Duration::from_secs(60),
            connections_max,
            handshakes_max: 64,
            pool,
        }
    }
}

/// A connection and how it is reached.
struct Slot {
    connection: Connection,
    /// The socket that is attached.
    peer: Option<PeerId>,
    address: SocketAddr,
    was_up: bool,
    /// Device: the pause before the next dial, and when that is due.
    redial: Duration,
    dial_at: Option<Instant>,
    /// Cloud: when the connection is forgotten.
    forget_at: Option<Instant>,
}

/// Owner of a link, a clock, a pool and all connections; see the [module](self) page.
///
/// It may be built on one thread and moved to another, but stays on the thread of its first poll:
/// an io_uring link belongs to that thread.
pub struct Endpoint {
    link: Box<dyn Link>,
    clock: Arc<dyn Clock>,
    random: Box<dyn Random>,
    config: EndpointConfig,
    pool: Pool,
    connections: BTreeMap<ConnectionId, Slot>,
    peers: BTreeMap<PeerId, Peer>,
    next_connection: u64,
    completions: Vec<Completion>,
    /// Events that arose outside of a poll, or in it.
    events: Vec<Event>,
    /// Rate limit of the log lines on each kind of refusal.
    refusals: HashMap<Discriminant<GoneError>, RateLimit>,
    /// A receive waits for a buffer.
    starved: bool,
    /// End of the last poll.
    left_at: Instant,
    /// The owner stayed away for long: what the peers said meanwhile was not read yet, so their
    /// silence counts only after a wait that brings nothing.
    was_away: bool,
}

impl Endpoint {
    /// An endpoint over `link`. What it does is decided by the role in its HELLO.
    #[must_use]
    pub fn new(link: Box<dyn Link>, clock: Arc<dyn Clock>, config: EndpointConfig) -> Self {
        Self {
            left_at: clock.now(),
            was_away: false,
            link,
            clock,
            random: Box::new(SystemRandom),
            pool: Pool::new(config.pool),
            config,
            connections: BTreeMap::new(),
            peers: BTreeMap::new(),
            next_connection: 1,
            completions: Vec::new(),
            events: Vec::new(),
            refusals: HashMap::new(),
            starved: false,
        }
    }

    /// Draws ids of links and epochs from `random`, where not from the operating system: with a
    /// seed, a clock that is moved by hand and links in memory, an endpoint does the same again.
    #[must_use]
    pub fn with_random(self, random: Box<dyn Random>) -> Self {
        Self { random, ..self }
    }

    /// Ends [`Endpoint::poll`] early, from any thread.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.link.waker()
    }

    /// Address that the link listens at.
    #[must_use]
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.link.local_address()
    }

    /// The pool that [`FrameSink::buffer`] takes from.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Device: a connection to `address`, dialled at the next poll and again after each failure,
    /// until it is closed. Each failure is an [`Event::Down`].
    ///
    /// # Panics
    /// If the pool is empty, there are `connections_max` connections, or this is a cloud.
    pub fn dial(&mut self, address: SocketAddr) -> ConnectionId {
        assert_eq!(self.config.connection.hello.role, Role::Device, "a cloud does not dial");
        assert!(self.connections.len() < self.config.connections_max, "too many connections");
        let mut link_id = [0; 16];
        self.random.fill(&mut link_id);
        let config = self.config.connection.clone();
        let connection = Connection::device(config, link_id, self.pool.clone());
        let connection = connection.expect("the pool has a buffer for each connection");
        // No later than now, whatever the time is.
        self.insert(Slot { dial_at: Some(self.left_at), ..Slot::new(connection, address) })
    }

    /// Sets the HELLO of connections from the next [`Endpoint::dial`] on; others keep theirs.
    ///
    /// # Panics
    /// If the role is another one.
    pub fn set_hello(&mut self, hello: Hello) {
        assert_eq!(self.config.connection.hello.role, hello.role, "an endpoint keeps its role");
        self.config.connection.hello = hello;
    }

    /// One wait, at most `timeout` long (`None`: until something happens), and all the work that
    /// follows from it. Appends to `events` and returns when there is at least one, or when the
    /// time is over.
    ///
    /// The clock is read before and after each wait. A caller that stays away for longer than the
    /// peer's `dead_after` is taken for dead by the peer. With a clock that is moved by hand the
    /// timeout has to be zero, or time never ends.
    ///
    /// # Errors
    /// If the link fails as a whole. What befalls one peer is an event.
    pub fn poll(&mut self, timeout: Option<Duration>, events: &mut Vec<Event>) -> io::Result<()> {
        let mut now = self.clock.now();
        let end = timeout.map(|timeout| now + timeout);
        self.was_away |=
            now.saturating_duration_since(self.left_at) >= self.config.connection.ping_after;
        loop {
            self.service(now);
            let until = end.into_iter().chain(self.poll_timeout(now)).min();
            let wait = until.map(|until| until.saturating_duration_since(now));
            let mut completions = std::mem::take(&mut self.completions);
            self.link.wait(wait, &mut completions)?;
            now = self.clock.now();
            self.was_away &= !completions.is_empty();
            let went_on = !completions.is_empty();
            for completion in completions.drain(..) {
                self.handle_completion(now, completion);
            }
            self.completions = completions;
            self.service(now);
            // Whoever has no time to wait still gets out what the link takes at once.
            let is_over = end.is_some_and(|end| now >= end) && !went_on;
            if is_over || !self.events.is_empty() {
                break;
            }
        }
        self.left_at = now;
        events.append(&mut self.events);
        Ok(())
    }

    /// Time at which [`Endpoint::poll`] has to be called again, if the link has no completion
    /// before: for a caller that moves the clock by hand. A frame that was queued since the last
    /// call waits for the next one; its owner knows.
    #[must_use]
    pub fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        if !self.events.is_empty() {
            return Some(now);
        }
        let starved = self.starved.then_some(now + POOL_RETRY);
        let connections = self.connections.values().flat_map(|slot| {
            [slot.connection.poll_timeout(), slot.dial_at, slot.forget_at].into_iter().flatten()
        });
        let peers = self.peers.values().filter_map(Peer::deadline);
        starved.into_iter().chain(connections).chain(peers).min()
    }

    /// Closes for good. What was queued and could not be sent yet is dropped: wait for ENDED
    /// where that matters. The peer is told in the next poll, which brings [`Event::Gone`].
    pub fn close(&mut self, id: ConnectionId, code: CloseCode, reason: &str) {
        let now = self.clock.now();
        self.pump(now, id);
        self.retire(now, id, Some((code, reason)), GoneError::Closed);
    }

    /// True if every CLOSE has gone out, so that nothing is lost if the link is dropped now.
    #[must_use]
    pub fn has_sent_close(&self) -> bool {
        !self.peers.values().any(Peer::is_sending_close)
    }

    /// Frames of `session` that are queued, or sent and not acknowledged.
    #[must_use]
    pub fn held(&self, id: ConnectionId, session: u32) -> usize {
        self.connections.get(&id).map_or(0, |slot| slot.connection.held(session))
    }

    /// Traffic of a connection.
    #[must_use]
    pub fn traffic(&self, id: ConnectionId) -> Option<Traffic> {
        self.connections.get(&id).map(|slot| slot.connection.traffic())
    }

    /// System calls of the link so far, for all its connections.
    #[must_use]
    pub fn syscalls(&self) -> u64 {
        self.link.syscalls()
    }

    fn insert(&mut self, slot: Slot) -> ConnectionId {
        let id = ConnectionId(self.next_connection);
        self.next_connection += 1;
        self.connections.insert(id, slot);
        id
    }

    /// Everything that is due: timeouts, dials, frames to send, buffers to receive into.
    fn service(&mut self, now: Instant) {
        self.starved = false;
        self.service_peers(now);
        let mut next = self.connections.keys().next().copied();
        while let Some(id) = next {
            self.service_connection(now, id);
            next = self.connections.range(ConnectionId(id.0 + 1)..).next().map(|(id, _)| *id);
        }
    }

    fn service_connection(&mut self, now: Instant, id: ConnectionId) {
        let Some(slot) = self.connections.get_mut(&id) else {
            return;
        };
        if slot.forget_at.is_some_and(|at| at <= now) {
            return self.retire(now, id, None, GoneError::GraceOver);
        }
        if slot.dial_at.is_some_and(|at| at <= now) {
            slot.dial_at = None;
            return self.dial_now(now, id);
        }
        if slot.peer.is_none() {
            return;
        }
        if !self.was_away
            && let Err(expired) = slot.connection.handle_timeout(now)
        {
            return self.lose(now, id, &expired.to_string());
        }
        if let Err(error) = slot.connection.handle_room(now) {
            return self.fail(now, id, error);
        }
        self.drain_events(now, id);
        self.pump(now, id);
    }

    /// Gives the link what the connection wants to send, and a buffer to receive into.
    fn pump(&mut self, now: Instant, id: ConnectionId) {
        let Some(slot) = self.connections.get_mut(&id) else {
            return;
        };
        let Some(peer_id) = slot.peer else { return };
        let Some(peer) = self.peers.get_mut(&peer_id) else {
            return;
        };
        if !peer.is_attached() {
            return;
        }
        if !peer.receiving {
            match slot.connection.receive_room() {
                Some(buf) => {
                    peer.receiving = true;
                    self.link.receive(peer_id, buf);
                }
                None => self.starved = true,
            }
        }
        if !peer.sending && slot.connection.poll_transmit(now, &mut peer.batch) {
            peer.transmit(peer_id, &mut *self.link);
        }
    }

    fn dial_now(&mut self, now: Instant, id: ConnectionId) {
        let Some(slot) = self.connections.get_mut(&id) else {
            return;
        };
        match self.link.connect(slot.address) {
            Ok(peer_id) => {
                slot.peer = Some(peer_id);
                let until = now + self.config.connection.hello_within;
                let peer = Peer::new(slot.address, State::Dialling { until }, Some(id));
                self.peers.insert(peer_id, peer);
            }
            Err(error) => self.down(now, id, format!("connecting failed: {error}")),
        }
    }

    /// Takes over the events of a connection.
    fn drain_events(&mut self, now: Instant, id: ConnectionId) {
        let Some(slot) = self.connections.get_mut(&id) else {
            return;
        };
        while let Some(event) = slot.connection.poll_event() {
            match event {
                ConnectionEvent::Up { hello, resumed } => {
                    slot.was_up = true;
                    slot.redial = REDIAL_MIN;
                    self.events.push(Event::Up { connection: id, hello, resumed });
                }
                ConnectionEvent::Frame(frame) => {
                    self.events.push(Event::Frame { connection: id, frame });
                }
                ConnectionEvent::Closed { code, reason } => {
                    let address = slot.address;
                    let error = GoneError::ClosedByPeer { address, code, reason };
                    return self.retire(now, id, None, error);
                }
            }
        }
    }

    /// The peer has broken the protocol.
    fn fail(&mut self, now: Instant, id: ConnectionId, error: ProtocolError) {
        self.drain_events(now, id);
        let Some(slot) = self.connections.get(&id) else {
            return;
        };
        let address = slot.address;
        if !slot.was_up && speaks_no_protocol(&error) {
            return self.retire(now, id, None, GoneError::NotHat { address, error });
        }
        let reason = error.to_string();
        let close_frame = Some((error.close_code(), reason.as_str()));
        self.retire(now, id, close_frame, GoneError::Protocol { address, error });
    }

    /// Gives up the socket of a connection that will go on.
    fn lose(&mut self, now: Instant, id: ConnectionId, reason: &str) {
        let Some(slot) = self.connections.get_mut(&id) else {
            return;
        };
        if let Some(peer) = slot.peer.take() {
            self.leave(now, peer, None);
        }
        self.down(now, id, reason.to_owned());
    }

    /// The connection has no socket any more; it waits for the next.
    fn down(&mut self, now: Instant, id: ConnectionId, reason: String) {
        let Some(slot) = self.connections.get_mut(&id) else {
            return;
        };
        slot.peer = None;
        slot.connection.handle_disconnected();
        match self.config.connection.hello.role {
            Role::Device => {
                slot.dial_at = Some(now + slot.redial);
                slot.redial = (slot.redial * 2).min(REDIAL_MAX);
            }
            Role::Cloud => slot.forget_at = Some(now + self.config.grace),
        }
        self.events.push(Event::Down { connection: id, reason });
    }

    /// Ends a connection, with a CLOSE frame if there is something to say.
    fn retire(
        &mut self,
        now: Instant,
        id: ConnectionId,
        close_frame: Option<(CloseCode, &str)>,
        error: GoneError,
    ) {
        let Some(mut slot) = self.connections.remove(&id) else {
            return;
        };
        if let Some(peer) = slot.peer {
            let peer_hears = self.peers.get(&peer).is_some_and(Peer::is_attached);
            let close_frame = close_frame.filter(|_| peer_hears);
            let close_frame =
                close_frame.and_then(|(code, reason)| slot.connection.close_frame(code, reason));
            self.leave(now, peer, close_frame);
        }
        self.events.push(Event::Gone { connection: id, error });
    }
}

impl FrameSink for Endpoint {
    fn buffer(&mut self, priority: Priority, body_bytes: usize) -> Option<Buf> {
        match priority {
            Priority::Control => self.pool.take(body_bytes),
            Priority::Prompt => self.pool.take_leaving(body_bytes, POOL_RESERVE / 2),
            Priority::Verify | Priority::Bulk => self.pool.take_leaving(body_bytes, POOL_RESERVE),
        }
    }

    fn send(
        &mut self,
        to: ConnectionId,
        kind: Kind,
        session: u32,
        priority: Priority,
        body: Buf,
    ) -> Result<(), SendError> {
        match self.connections.get_mut(&to) {
            Some(slot) => slot.connection.send(kind, session, priority, body),
            None => Err(SendError { refusal: Refusal::Gone, body: Some(body) }),
        }
    }

    fn discard(&mut self, to: ConnectionId, session: u32) -> usize {
        self.connections.get_mut(&to).map_or(0, |slot| slot.connection.discard(session))
    }
}

impl Slot {
    fn new(connection: Connection, address: SocketAddr) -> Self {
        Self {
            connection,
            peer: None,
            address,
            was_up: false,
            redial: REDIAL_MIN,
            dial_at: None,
            forget_at: None,
        }
    }
}

/// True if the bytes are no frame at all, so that an answer would not be understood.
fn speaks_no_protocol(error: &ProtocolError) -> bool {
    let ProtocolError::Frame(FrameError::Header(error)) = error else { return false };
    matches!(error, HeaderError::Checksum { .. } | HeaderError::Http { .. })
}
