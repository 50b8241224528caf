//! HELLO: which version, whose link, and whether it goes on where it was.

use std::time::Instant;

use super::receive::ReceiveState;
use super::{Connection, ConnectionEvent, Phase, ProtocolError};
use crate::frame::{BODY_BYTES_MAX, Header, Kind};
use crate::message::{Hello, LinkState, Role};
use crate::planted::Fault;

impl Connection {
    pub(super) fn handle_hello(
        &mut self,
        now: Instant,
        header: &Header,
        body: &[u8],
    ) -> Result<(), ProtocolError> {
        if self.phase == Phase::Up {
            return Err(ProtocolError::SecondHello);
        }
        let message = |error| ProtocolError::Message { kind: Kind::Hello, error };
        let hello = Hello::decode(body).map_err(message)?;
        let version = agree(&self.config.hello, &hello)?;
        if hello.link.id != self.link_id() {
            return Err(ProtocolError::Link);
        }
        let planted = self.config.planted;
        let is_ours = hello.link.epoch == self.epoch.number || planted.is(Fault::StaleEpoch);
        let resumed = is_ours && self.epoch.number != 0;
        if resumed {
            self.send.resume(hello.link.recv_next, usize::from(planted.is(Fault::LateReplay)))?;
            self.send.grant(header.credit);
            self.epoch.known = true;
        } else {
            self.forget(header, &hello)?;
        }
        // Both ends speak version 1 only, so that the common version fits the header's byte.
        self.version = u8::try_from(version).unwrap_or(crate::WIRE_VERSION);
        self.send.set_peer(&hello);
        self.phase = Phase::Up;
        self.deframer.limit(BODY_BYTES_MAX);
        self.receive.want_ack(now);
        self.timers.want_ping();
        self.events.push_back(ConnectionEvent::Up { hello, resumed });
        Ok(())
    }

    /// True if the device has acknowledged more than this HELLO of its knows, or names another
    /// epoch than the one that it is known to be in: it was sent before, over a socket that the
    /// device has given up.
    #[must_use]
    pub fn has_overtaken(&self, hello: &Hello) -> bool {
        match hello.link.epoch == self.epoch.number {
            true => self.send.has_forgotten(hello.link.recv_next),
            false => self.epoch.known,
        }
    }

    /// A new epoch: both ends start from nothing.
    fn forget(&mut self, header: &Header, hello: &Hello) -> Result<(), ProtocolError> {
        let LinkState { epoch, recv_next, .. } = hello.link;
        if self.config.hello.role == Role::Device && recv_next != 0 {
            return Err(ProtocolError::Replay { recv_next, oldest: 0, next: 0 });
        }
        self.send.reset();
        self.receive = ReceiveState::new(self.config.window_bytes);
        match self.config.hello.role {
            Role::Device => {
                self.epoch.number = epoch;
                self.send.grant(header.credit);
            }
            // The device's credit counts in its old epoch; its first ACK in the new one tells.
            // An epoch that has been offered before is not offered again.
            Role::Cloud if self.epoch.used => {
                self.epoch.number = self.epoch.number.wrapping_add(1).max(1);
            }
            Role::Cloud => {}
        }
        (self.epoch.used, self.epoch.known) = (true, false);
        Ok(())
    }
}

/// The wire version in which two peers speak.
///
/// # Errors
/// [`ProtocolError::Role`], [`ProtocolError::Version`].
pub(crate) fn agree(ours: &Hello, peer: &Hello) -> Result<u16, ProtocolError> {
    if peer.role == ours.role {
        return Err(ProtocolError::Role { role: peer.role });
    }
    let error = ProtocolError::Version { ours: ours.versions, theirs: peer.versions };
    ours.common_version(peer).ok_or(error)
}
