//! The connection to the cloud, made and closed as the core says.

use std::time::Instant;

use hat_core::device::{DeviceCore, Inbound, LinkCommand};
use hat_transport::conn::ConnectionId;
use hat_transport::endpoint::{Endpoint, Event};

use super::resolve::Resolver;
use crate::config::Address;

/// The cloud's address, and the connection to it.
pub(super) struct Cloud {
    address: Address,
    resolver: Resolver,
    /// True if it is to be dialled as soon as it is known.
    dials: bool,
    pub(super) connection: Option<ConnectionId>,
}

impl Cloud {
    /// A cloud that has not been dialled.
    pub(super) fn new(address: Address, endpoint: &Endpoint) -> Self {
        let waker = endpoint.waker();
        let resolver = Resolver::new(move || waker.wake());
        Self { address, resolver, dials: false, connection: None }
    }

    /// Dials and closes as the core says.
    pub(super) fn obey(&mut self, now: Instant, core: &mut DeviceCore, endpoint: &mut Endpoint) {
        while let Some(command) = core.poll_link(now) {
            self.dials = command == LinkCommand::Dial;
            if let LinkCommand::Close { code, reason } = command
                && let Some(connection) = self.connection.take()
            {
                endpoint.close(connection, code, &reason);
            }
        }
        if !self.dials {
            return;
        }
        let Some(found) = self.resolver.poll(&self.address) else { return };
        self.dials = false;
        match found {
            Ok(address) => self.connection = Some(endpoint.dial(address)),
            Err(error) => {
                let (reason, is_final) = (error.to_string(), error.is_final);
                core.handle_inbound(Inbound::Gone { reason, is_final });
            }
        }
    }

    /// What an event of the endpoint says to the core. A connection that this device has closed has
    /// nothing more to say.
    pub(super) fn inbound(&mut self, event: Event) -> Option<Inbound> {
        if event.connection() != self.connection {
            return None;
        }
        match event {
            Event::Up { hello, resumed, .. } => Some(Inbound::Up { hello, resumed }),
            Event::Down { reason, .. } => Some(Inbound::Down { reason }),
            Event::Gone { error, .. } => {
                self.connection = None;
                Some(Inbound::gone(&error))
            }
            Event::Frame { frame, .. } => Some(Inbound::Frame(frame)),
            Event::Refused { .. } | Event::Woken => None,
        }
    }
}
