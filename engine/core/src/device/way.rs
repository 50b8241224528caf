//! The way to the cloud: dialled again for as long as the device lives, since what stands at an
//! address may change.

use std::time::{Duration, Instant};

use hat_transport::endpoint::GoneError;
use hat_transport::message::{CloseCode, Hello};
use hat_transport::random::Random;

use super::budget::pause;
use super::{DeviceCore, Inbound};
use crate::wire;

/// Longest pause before the cloud is dialled again.
const DIAL_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Command for the owner of the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkCommand {
    /// Look the cloud's address up, and dial it.
    Dial,
    /// Close the connection: it is over, and nothing of it is to be heard any more.
    Close {
        /// The code of CLOSE.
        code: CloseCode,
        /// Its text.
        reason: String,
    },
}

/// A connection, or the time until there is to be one.
#[derive(Default)]
pub(super) struct Way {
    /// The device's HELLO, and the only arithmetic of a cloud that will do, if one is wanted;
    /// `None` if others see to the way.
    own: Option<(Hello, Option<u32>)>,
    /// Time of the next dial; `None` if that was done.
    dial_at: Option<Instant>,
    /// Connections that ended, or could not be made, since the last that carried a frame.
    tries: u32,
    close: Option<(CloseCode, String)>,
    /// Reason that the cloud is away, as last reported.
    told: Option<String>,
}

impl Way {
    /// Somebody asks for an answer: the pause ends.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.dial_at = self.dial_at.map(|at| at.min(now));
    }

    /// The cloud works: the next outage begins with the shortest pause.
    pub(super) fn works(&mut self) {
        self.tries = 0;
    }

    /// There is no connection any more.
    pub(super) fn put_off(&mut self, now: Instant, random: &mut dyn Random) {
        self.tries = self.tries.saturating_add(1);
        let at = now + pause(self.tries, DIAL_PAUSE_MAX, random);
        self.dial_at = self.own.is_some().then_some(at);
    }

    /// Time of the next command.
    pub(super) fn next_time(&self, now: Instant) -> Option<Instant> {
        if self.close.is_some() { Some(now) } else { self.dial_at }
    }
}

impl Inbound {
    /// The end of a connection, as an endpoint tells it.
    pub fn gone(error: &GoneError) -> Self {
        Self::Gone { reason: error.to_string(), is_final: error.is_final() }
    }
}

impl DeviceCore {
    /// The core sees to the way to its cloud from now on: [`DeviceCore::poll_link`] says when to
    /// dial, and a cloud whose HELLO does not go with this one, or whose arithmetic is not the one
    /// that is wanted, is closed. `random` draws the pauses between attempts.
    #[must_use]
    pub fn with_link(
        mut self,
        now: Instant,
        hello: Hello,
        cloud_arithmetic: Option<u32>,
        random: Box<dyn Random>,
    ) -> Self {
        self.way = Way { own: Some((hello, cloud_arithmetic)), dial_at: Some(now), ..self.way };
        self.cloud.random = random;
        self
    }

    /// The layers that compute are lost. The link ends, since HELLO names this device's arithmetic,
    /// and so no session is left in the cloud.
    pub fn leave_link(&mut self, now: Instant) {
        let reason = "the device's backend is lost".to_owned();
        self.inbox.clear();
        self.close(now, CloseCode::Internal, reason, false);
    }

    /// The cloud is dialled again, with this HELLO.
    pub fn dial_again(&mut self, now: Instant, hello: Hello) {
        self.way.own = self.way.own.map(|(_, wanted)| (hello, wanted));
        self.way.hurry(now);
    }

    /// Next command for the link.
    pub fn poll_link(&mut self, now: Instant) -> Option<LinkCommand> {
        if let Some((code, reason)) = self.way.close.take() {
            return Some(LinkCommand::Close { code, reason });
        }
        self.way.dial_at.take_if(|at| *at <= now).map(|_| LinkCommand::Dial)
    }

    /// Ends the connection, if there is one, and with it all sessions. Waiting does not help if
    /// `is_final`.
    pub(super) fn close(&mut self, now: Instant, code: CloseCode, reason: String, is_final: bool) {
        if self.way.dial_at.is_none() {
            self.way.close = Some((code, reason.clone()));
            self.take(now, Inbound::Gone { reason, is_final });
        }
    }

    /// Compares the HELLO of the cloud that was found with this device's own, and with the rows
    /// that it sends.
    ///
    /// # Errors
    /// The reason to close with INCOMPATIBLE.
    pub(super) fn check_cloud(&self, hello: &Hello) -> Result<(), String> {
        let Some((own, wanted)) = &self.way.own else { return Ok(()) };
        let facts = &self.cx.facts;
        wire::check_peer(own, hello)?;
        wire::check_arithmetic(hello.arithmetic_id, *wanted)?;
        wire::check_codec(facts.codec, facts.hidden_size, hello)
    }

    /// Says in the log that the cloud is there, or away for another reason than before.
    pub(super) fn tell_link(&mut self, away: Option<&str>) {
        let cloud = &self.config.cloud;
        match away {
            Some(reason) if self.way.told.as_deref() == Some(reason) => return,
            Some(reason) => tracing::info!(%cloud, %reason, "the cloud is away; dialling on"),
            None => tracing::info!(%cloud, "the cloud is connected"),
        }
        self.way.told = away.map(str::to_owned);
    }
}
