//! The way to the cloud: dialled again for as long as the device lives.
//!
//! A link that breaks is dialled again by the endpoint. A connection that one side has ended by a
//! CLOSE, or an address that could not be resolved, is dialled from here, each time after twice the
//! pause.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hat_core::device::Inbound;
use hat_core::wire;
use hat_transport::conn::ConnectionId;
use hat_transport::endpoint::Event as LinkEvent;
use hat_transport::message::{CloseCode, Hello};

use super::resolve::Resolver;
use super::run::Device;
use crate::config::Address;

/// The first pause.
const FIRST: Duration = Duration::from_millis(100);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(5);

/// When to dial next.
#[derive(Debug, Default)]
pub(super) struct Redial {
    at: Option<Instant>,
    pause: Duration,
}

impl Redial {
    /// Puts the next attempt off.
    pub(super) fn put_off(&mut self, now: Instant) {
        self.pause = (2 * self.pause).clamp(FIRST, LONGEST);
        self.at = Some(now + self.pause);
    }

    /// Dials at the next chance: somebody asks for an answer.
    pub(super) fn hurry(&mut self) {
        self.at = None;
    }

    /// The cloud works: the next outage begins with the first pause.
    pub(super) fn works(&mut self) {
        *self = Self::default();
    }

    /// True if an attempt is due.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.at.is_none_or(|at| at <= now)
    }

    /// Time of the next attempt; `None` if it is due.
    pub(super) fn at(&self) -> Option<Instant> {
        self.at
    }
}

/// The cloud's address, and the connection to it.
pub(super) struct Link {
    pub(super) address: Address,
    pub(super) connection: Option<ConnectionId>,
    pub(super) redial: Redial,
    pub(super) resolver: Resolver,
    /// Why the cloud is away, as it was told last.
    reason: String,
    /// Why this device does not want the cloud that it found.
    refused: Option<String>,
}

impl Link {
    /// A link that has not been dialled.
    pub(super) fn new(address: Address, resolver: Resolver) -> Self {
        let (connection, redial) = (None, Redial::default());
        Self { address, connection, redial, resolver, reason: String::new(), refused: None }
    }
}

impl Device {
    /// Dials the cloud, if that is due and its name is known.
    pub(super) fn dial(&mut self, now: Instant) {
        if self.link.connection.is_some() || !self.link.redial.is_due(now) {
            return;
        }
        let Some(found) = self.link.resolver.poll(&self.link.address) else { return };
        match found {
            Ok(address) => self.link.connection = Some(self.endpoint.dial(address)),
            Err(error) => {
                let reason = error.to_string();
                self.tell_away(&reason, "the cloud can't be dialled");
                self.link.redial.put_off(now);
                let inbound = match error.is_final {
                    true => Inbound::Gone { reason, is_final: true },
                    false => Inbound::Down { reason },
                };
                self.core.handle_inbound(inbound);
            }
        }
    }

    /// Time of the next attempt to dial.
    pub(super) fn dials_at(&self) -> Option<Instant> {
        let dials = self.link.connection.is_none() && !self.link.resolver.is_asking();
        self.link.redial.at().filter(|_| dials)
    }

    /// Takes an event of the endpoint, and hands it on.
    pub(super) fn take(&mut self, now: Instant, event: LinkEvent) {
        // One that this device has closed itself has nothing more to say.
        if event.connection().is_some_and(|connection| Some(connection) != self.link.connection) {
            return;
        }
        let inbound = match event {
            LinkEvent::Up { connection, hello, resumed, .. } => {
                self.guard.look();
                if let Err(reason) = self.check_cloud(&hello) {
                    self.endpoint.close(connection, CloseCode::Incompatible, &reason);
                    self.link.refused = Some(reason);
                    return;
                }
                tracing::info!(cloud = %self.link.address, resumed, "the cloud is connected");
                self.set_connected(true);
                Inbound::Up { hello, resumed }
            }
            LinkEvent::Down { reason, .. } => {
                self.tell_away(&reason, "the cloud is away; dialling on");
                self.set_connected(false);
                Inbound::Down { reason }
            }
            LinkEvent::Gone { error, .. } => {
                let is_final = self.link.refused.is_some() || error.is_final();
                let reason = self.link.refused.take().unwrap_or_else(|| error.to_string());
                self.tell_away(&reason, "the cloud is gone; dialling on");
                self.set_connected(false);
                self.link.connection = None;
                self.link.redial.put_off(now);
                Inbound::Gone { reason, is_final }
            }
            LinkEvent::Frame { frame, .. } => {
                self.link.redial.works();
                Inbound::Frame(frame)
            }
            _ => return,
        };
        self.core.handle_inbound(inbound);
    }

    /// Compares the HELLO of the cloud that was found with this device's own, and with the rows
    /// that it sends.
    ///
    /// # Errors
    /// The reason to close with INCOMPATIBLE.
    fn check_cloud(&self, hello: &Hello) -> Result<(), String> {
        wire::check_peer(&self.start.hello(), hello)?;
        let config = &self.start.config;
        wire::check_arithmetic(hello.arithmetic_id, config.cloud_arithmetic)?;
        wire::check_codec(config.codec(), self.start.facts.hidden_size, hello)
    }

    /// Says that the cloud is away, once for each reason.
    fn tell_away(&mut self, reason: &str, told: &str) {
        if self.start.shared.connected.load(Ordering::Acquire) || self.link.reason != reason {
            tracing::info!(cloud = %self.link.address, %reason, "{told}");
        }
        reason.clone_into(&mut self.link.reason);
    }

    pub(super) fn set_connected(&self, connected: bool) {
        self.start.shared.connected.store(connected, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_once_it_works() {
        let mut now = Instant::now();
        let mut redial = Redial::default();
        assert!(redial.is_due(now));
        let mut pauses = Vec::new();
        for _ in 0..8 {
            redial.put_off(now);
            assert!(!redial.is_due(now));
            let at = redial.at().unwrap();
            pauses.push((at - now).as_millis());
            now = at;
            assert!(redial.is_due(now));
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        redial.hurry();
        assert!(redial.is_due(now));
        redial.put_off(now);
        assert_eq!(redial.at().unwrap() - now, LONGEST, "hurry alone proves nothing");
        redial.works();
        redial.put_off(now);
        assert_eq!(redial.at().unwrap() - now, FIRST);
    }
}
