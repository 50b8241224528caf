//! The sockets of an endpoint, from accept or connect to their last completion.

use std::net::SocketAddr;
use std::time::Instant;

use super::event::{Event, GoneError};
use super::{Endpoint, LINGER, Slot, speaks_no_protocol};
use crate::conn::{Connection, ConnectionId, Handshake, ProtocolError, agree};
use crate::link::{Completion, Link, PeerId};
use crate::message::{CloseCode, Hello, Role};
use crate::planted::Fault;
use crate::pool::Buf;

/// One socket.
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    pub(super) state: State,
    /// Owner of the buffers that the link has; also when the connection goes on over another
    /// socket.
    owner: Option<ConnectionId>,
    pub(super) sending: bool,
    pub(super) receiving: bool,
    /// Frames to send next; empty but for its memory otherwise.
    pub(super) batch: Vec<Buf>,
}

pub(super) enum State {
    /// The socket connects, and has until then.
    Dialling { until: Instant },
    /// The socket was accepted, and its HELLO has not come yet.
    Handshake(Box<Handshake>),
    /// The socket carries its owner's frames.
    Attached,
    /// The socket is closing: the close frame is sent, and the peer has until then to close.
    Leaving { close_frame: Option<Buf>, until: Instant, closed: bool },
}

impl Peer {
    pub(super) fn new(address: SocketAddr, state: State, owner: Option<ConnectionId>) -> Self {
        Self { address, state, owner, sending: false, receiving: false, batch: Vec::new() }
    }

    /// Gives the link the frames in `batch`. All bytes that leave pass here.
    pub(super) fn transmit(&mut self, id: PeerId, link: &mut dyn Link) {
        self.sending = true;
        link.send(id, std::mem::take(&mut self.batch));
    }

    pub(super) fn is_attached(&self) -> bool {
        matches!(self.state, State::Attached)
    }

    pub(super) fn is_sending_close(&self) -> bool {
        match &self.state {
            State::Leaving { close_frame, closed: false, .. } => {
                close_frame.is_some() || self.sending
            }
            _ => false,
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Handshake(handshake) => Some(handshake.poll_timeout()),
            State::Leaving { until, closed: false, .. } => Some(*until),
            State::Dialling { until } => Some(*until),
            State::Attached | State::Leaving { .. } => None,
        }
    }
}

impl Endpoint {
    pub(super) fn handle_completion(&mut self, now: Instant, completion: Completion) {
        match completion {
            Completion::Woken => self.events.push(Event::Woken),
            Completion::Accepted { peer, address } => self.accepted(now, peer, address),
            Completion::Connected { peer } => self.connected(now, peer),
            Completion::Sent { peer, bufs } => self.handle_sent(peer, bufs),
            Completion::Received { peer, buf, bytes } => {
                self.handle_received(now, peer, buf, bytes);
            }
            Completion::Closed { peer, error } => {
                let reason = match error {
                    Some(error) => format!("the link broke: {error}"),
                    None => "the peer closed the link".to_owned(),
                };
                self.closed(now, peer, reason);
            }
        }
    }

    /// Buffers to receive into for handshakes, close frames, and sockets whose time is over.
    pub(super) fn service_peers(&mut self, now: Instant) {
        let mut late = Vec::new();
        for (id, peer) in &mut self.peers {
            match &mut peer.state {
                State::Dialling { until } if *until <= now => late.push(*id),
                State::Dialling { .. } | State::Attached => {}
                State::Handshake(handshake) => {
                    if handshake.handle_timeout(now).is_err() {
                        late.push(*id);
                    } else if !peer.receiving {
                        match handshake.receive_room() {
                            Some(buf) => {
                                peer.receiving = true;
                                self.link.receive(*id, buf);
                            }
                            None => self.starved = true,
                        }
                    }
                }
                State::Leaving { closed: true, .. } => {}
                State::Leaving { close_frame, until, closed } => {
                    if *until <= now {
                        *closed = true;
                        self.link.close(*id);
                        continue;
                    }
                    // What the peer still sends is read, so that it can read our last frame.
                    if !peer.receiving
                        && let Some(mut buf) = self.pool.take(0)
                    {
                        buf.clear();
                        peer.receiving = true;
                        self.link.receive(*id, buf);
                    }
                    if !peer.sending
                        && let Some(buf) = close_frame.take()
                    {
                        peer.batch.push(buf);
                        peer.transmit(*id, &mut *self.link);
                    }
                }
            }
        }
        for id in late {
            let Peer { address, owner, .. } = self.peers[&id];
            match owner {
                Some(owner) => self.lose(now, owner, "connecting takes too long"),
                None => self.refuse(now, id, None, GoneError::HelloLate { address }),
            }
        }
    }

    /// Lets a socket go, with a last frame if there is one.
    pub(super) fn leave(&mut self, now: Instant, id: PeerId, close_frame: Option<Buf>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let closed = close_frame.is_none();
        if closed {
            self.link.close(id);
        }
        peer.state = State::Leaving { close_frame, until: now + LINGER, closed };
    }

    fn accepted(&mut self, now: Instant, id: PeerId, address: SocketAddr) {
        let handshakes = |peer: &&Peer| !peer.is_attached();
        let limit = self.config.handshakes_max;
        let state = if self.peers.values().filter(handshakes).count() >= limit {
            self.events
                .push(Event::Refused { address, error: GoneError::Overload { address, limit } });
            self.link.close(id);
            State::Leaving { close_frame: None, until: now, closed: true }
        } else {
            let handshake =
                Handshake::new(now, self.config.connection.hello_within, self.pool.clone());
            State::Handshake(Box::new(handshake))
        };
        self.peers.insert(id, Peer::new(address, state, None));
    }

    fn connected(&mut self, now: Instant, id: PeerId) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        if !matches!(peer.state, State::Dialling { .. }) {
            return;
        }
        if let Some(slot) = peer.owner.and_then(|owner| self.connections.get_mut(&owner)) {
            peer.state = State::Attached;
            slot.connection.handle_connected(now);
        }
    }

    fn handle_sent(&mut self, id: PeerId, mut bufs: Vec<Buf>) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        peer.sending = false;
        if let Some(slot) = peer.owner.and_then(|owner| self.connections.get_mut(&owner)) {
            slot.connection.handle_transmitted(&mut bufs);
        }
        bufs.clear();
        peer.batch = bufs;
    }

    fn handle_received(&mut self, now: Instant, id: PeerId, buf: Buf, bytes: usize) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        peer.receiving = false;
        match &mut peer.state {
            // Bytes of a socket that is not a connection's any more are read and dropped.
            State::Dialling { .. } | State::Leaving { .. } => {}
            State::Handshake(handshake) => match handshake.handle_received(buf) {
                Ok(None) => {}
                Ok(Some(hello)) => self.admit(now, id, &hello),
                Err(error) => self.refuse_protocol(now, id, error),
            },
            State::Attached => {
                let Some(owner) = peer.owner else { return };
                let Some(slot) = self.connections.get_mut(&owner) else {
                    return;
                };
                match slot.connection.handle_received(now, buf, bytes) {
                    Ok(()) => self.drain_events(now, owner),
                    Err(error) => self.fail(now, owner, error),
                }
            }
        }
    }

    fn closed(&mut self, now: Instant, id: PeerId, reason: String) {
        let Some(peer) = self.peers.remove(&id) else {
            return;
        };
        let (State::Dialling { .. } | State::Attached) = peer.state else {
            return;
        };
        if let Some(owner) = peer.owner {
            self.down(now, owner, reason);
        }
    }

    /// An unknown peer said HELLO: its socket becomes that of a new connection, or of one that it
    /// had.
    fn admit(&mut self, now: Instant, id: PeerId, hello: &Hello) {
        let ours = &self.config.connection.hello;
        if let Err(error) = agree(ours, hello) {
            return self.refuse_protocol(now, id, error);
        }
        debug_assert_eq!(ours.role, Role::Cloud, "only a cloud accepts");
        let known = self.connections.iter();
        let known = known.filter(|(_, slot)| slot.connection.link_id() == hello.link.id);
        let owner = known.map(|(owner, _)| *owner).next();
        let Some(owner) = owner.or_else(|| self.admit_new(now, id, hello)) else {
            let (address, limit) = (self.peers[&id].address, self.config.connections_max);
            let error = match self.connections.len() < limit {
                true => GoneError::NoBuffer { address },
                false => GoneError::Overload { address, limit },
            };
            return self.refuse(now, id, Some(CloseCode::Overload), error);
        };
        let slot = self.connections.get_mut(&owner).expect("it was found or made above");
        if slot.connection.has_overtaken(hello) {
            let address = self.peers[&id].address;
            return self.refuse(now, id, None, GoneError::Overtaken { address });
        }
        // The device has given the old socket up, whatever it looks like from here.
        if let Some(old) = slot.peer.replace(id) {
            if !self.config.connection.planted.is(Fault::NoFence) {
                self.leave(now, old, None);
            }
            self.events.push(Event::Down {
                connection: owner,
                reason: "the device came back over another socket".to_owned(),
            });
        }
        let peer = self.peers.get_mut(&id).expect("the caller read from it");
        peer.owner = Some(owner);
        let State::Handshake(handshake) = std::mem::replace(&mut peer.state, State::Attached)
        else {
            return;
        };
        let slot = self.connections.get_mut(&owner).expect("it was found or made above");
        (slot.address, slot.forget_at) = (peer.address, None);
        match slot.connection.handle_greeting(now, *handshake) {
            Ok(()) => self.drain_events(now, owner),
            Err(error) => self.fail(now, owner, error),
        }
    }

    fn admit_new(&mut self, now: Instant, id: PeerId, hello: &Hello) -> Option<ConnectionId> {
        if self.connections.len() >= self.config.connections_max {
            // A device that is here goes before one that may come back.
            let away = self.connections.iter();
            let away = away.filter_map(|(id, slot)| Some((slot.forget_at?, *id))).min();
            self.retire(now, away?.1, None, GoneError::GraceOver);
        }
        let mut epoch = [0; 8];
        self.random.fill(&mut epoch);
        let epoch = u64::from_le_bytes(epoch).max(1);
        let (config, pool) = (self.config.connection.clone(), self.pool.clone());
        let connection = Connection::cloud(config, hello.link.id, epoch, pool)?;
        let address = self.peers.get(&id)?.address;
        Some(self.insert(Slot::new(connection, address)))
    }

    fn refuse_protocol(&mut self, now: Instant, id: PeerId, error: ProtocolError) {
        let address = self.peers[&id].address;
        let code = error.close_code();
        if speaks_no_protocol(&error) {
            self.refuse(now, id, None, GoneError::NotHat { address, error });
        } else {
            self.refuse(now, id, Some(code), GoneError::Protocol { address, error });
        }
    }

    /// Turns an unknown peer away, with a CLOSE frame if it would understand one.
    fn refuse(&mut self, now: Instant, id: PeerId, code: Option<CloseCode>, error: GoneError) {
        let reason = match &error {
            GoneError::Protocol { error, .. } => error.to_string(),
            other => other.to_string(),
        };
        let close_frame = code.and_then(|code| Connection::refusal(&self.pool, code, &reason));
        let address = self.peers[&id].address;
        let limit = self.refusals.entry(std::mem::discriminant(&error)).or_default();
        if let Some(suppressed) = limit.admit(now) {
            tracing::warn!(%address, %error, suppressed, "a peer is turned away");
        }
        self.leave(now, id, close_frame);
        self.events.push(Event::Refused { address, error });
    }
}
