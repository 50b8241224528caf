//! HELLO: which version, whose link, and whether it goes on where it was.

use std::time::Instant;

use super::receive::ReceiveState;
use super::{Connection, ConnectionEvent, Phase, ProtocolError};
use crate::frame::{BODY_BYTES_MAX, Header, Kind};
use crate::message::{Hello, Role};
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
        let ours = &self.config.hello;
        if hello.role == ours.role {
            return Err(ProtocolError::Role { role: hello.role });
        }
        let Some(version) = ours.common_version(&hello) else {
            let ours = (ours.min_version, ours.max_version);
            let theirs = (hello.min_version, hello.max_version);
            return Err(ProtocolError::Version { ours, theirs });
        };
        if hello.link_id != ours.link_id {
            return Err(ProtocolError::Link);
        }
        let planted = self.config.planted;
        let is_ours = hello.link_epoch == self.epoch || planted.is(Fault::StaleEpoch);
        let resumed = is_ours && self.epoch != 0;
        if resumed {
            self.send.resume(hello.recv_next, usize::from(planted.is(Fault::LateReplay)))?;
            self.send.grant(header.credit);
            self.known = true;
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
        match hello.link_epoch == self.epoch {
            true => self.send.has_forgotten(hello.recv_next),
            false => self.known,
        }
    }

    /// A new epoch: both ends start from nothing.
    fn forget(&mut self, header: &Header, hello: &Hello) -> Result<(), ProtocolError> {
        if self.config.hello.role == Role::Device && hello.recv_next != 0 {
            let recv_next = hello.recv_next;
            return Err(ProtocolError::Replay { recv_next, oldest: 0, next: 0 });
        }
        self.send.reset();
        self.receive = ReceiveState::new(self.config.window_bytes);
        match self.config.hello.role {
            Role::Device => {
                self.epoch = hello.link_epoch;
                self.send.grant(header.credit);
            }
            // The device's credit counts in its old epoch; its first ACK in the new one tells.
            // An epoch that has been offered before is not offered again.
            Role::Cloud if self.used => self.epoch = self.epoch.wrapping_add(1).max(1),
            Role::Cloud => {}
        }
        (self.used, self.known) = (true, false);
        Ok(())
    }
}
