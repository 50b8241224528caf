//! The way to the cloud: dialled again for as long as the device lives, since what stands at an
//! address may change.

use std::time::{Duration, Instant};

use hat_transport::endpoint::GoneError;
use hat_transport::message::{CloseCode, Hello};
use hat_transport::random::{Random, SeededRandom};

use super::Inbound;
use super::budget::{Limits, pause};
use super::context::Facts;
use crate::wire;

/// Longest pause before the cloud is dialled again.
const DIAL_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Length of an outage after which requests that come are not kept waiting for its end.
const OUTAGE_KNOWN: Duration = Duration::from_secs(2);
/// Time of such a request: an attempt to reach the cloud ends within it.
const KNOWN_WAIT: Duration = Duration::from_secs(1);

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
pub(super) struct Way {
    pub(super) connected: bool,
    /// Begin of the outage at hand; `None` while the cloud is connected.
    down_since: Option<Instant>,
    /// Reason that the cloud is away, for people.
    pub(super) reason: String,
    /// Source of the pauses between attempts.
    pub(super) random: Box<dyn Random>,
    /// The device's HELLO, and the only arithmetic of a cloud that will do, if one is wanted;
    /// `None` if others see to the way.
    pub(super) own: Option<(Hello, Option<u32>)>,
    /// Time of the next dial; `None` if that was done.
    pub(super) dial_at: Option<Instant>,
    /// Connections that ended, or could not be made, since the last that carried a frame.
    tries: u32,
    pub(super) close: Option<(CloseCode, String)>,
    /// Reason that the cloud is away, as last reported.
    told: Option<String>,
}

impl Way {
    /// The way to a cloud that has not been dialled.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            connected: false,
            down_since: Some(now),
            reason: "not connected yet".into(),
            random: Box::new(SeededRandom::new(0)),
            own: None,
            dial_at: None,
            tries: 0,
            close: None,
            told: None,
        }
    }

    /// Somebody asks for an answer: the pause ends.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.dial_at = self.dial_at.map(|at| at.min(now));
    }

    /// The cloud works: the next outage begins with the shortest pause.
    pub(super) fn works(&mut self) {
        self.tries = 0;
    }

    /// There is no connection any more.
    pub(super) fn put_off(&mut self, now: Instant) {
        self.tries = self.tries.saturating_add(1);
        let at = now + pause(self.tries, DIAL_PAUSE_MAX, &mut *self.random);
        self.dial_at = self.own.is_some().then_some(at);
    }

    /// Time of the next command.
    pub(super) fn next_time(&self, now: Instant) -> Option<Instant> {
        if self.close.is_some() { Some(now) } else { self.dial_at }
    }

    /// The cloud is connected; returns the begin of the outage that ends.
    pub(super) fn set_connected(&mut self, now: Instant) -> Instant {
        self.connected = true;
        self.down_since.take().unwrap_or(now)
    }

    /// The cloud is away, for this reason.
    pub(super) fn set_away(&mut self, now: Instant, reason: String) {
        self.connected = false;
        self.reason = reason;
        self.down_since.get_or_insert(now);
    }

    /// The time without news of a request that came at `asked`.
    pub(super) fn limits(&self, asked: Instant, reconnect: Duration) -> Limits {
        let limits = Limits::new(reconnect);
        match self.down_since.is_some_and(|began| asked > began + OUTAGE_KNOWN) {
            true => Limits { cloud: reconnect.min(KNOWN_WAIT), ..limits },
            false => limits,
        }
    }

    /// Compares the HELLO of the cloud that was found with this device's own, and with the rows
    /// that it sends.
    ///
    /// # Errors
    /// The reason to close with INCOMPATIBLE.
    pub(super) fn check(&self, hello: &Hello, facts: &Facts) -> Result<(), String> {
        let Some((own, wanted)) = &self.own else { return Ok(()) };
        wire::check_peer(own, hello)?;
        wire::check_arithmetic(hello.arithmetic_id, *wanted)?;
        wire::check_codec(facts.codec, facts.hidden_size, hello)
    }

    /// Says in the log that `cloud` is there, or away for another reason than before.
    pub(super) fn tell(&mut self, cloud: &str, away: Option<&str>) {
        match away {
            Some(reason) if self.told.as_deref() == Some(reason) => return,
            Some(reason) => tracing::info!(%cloud, %reason, "the cloud is away; dialling on"),
            None => tracing::info!(%cloud, "the cloud is connected"),
        }
        self.told = away.map(str::to_owned);
    }
}

impl Inbound {
    /// The end of a connection, as an endpoint tells it.
    pub fn gone(error: &GoneError) -> Self {
        Self::Gone { reason: error.to_string(), is_final: error.is_final() }
    }
}
