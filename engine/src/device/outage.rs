//! Outages: the cloud can't be reached, has closed the connection, or says nothing.
//!
//! A link that breaks is dialled again by the endpoint. A connection that one side has ended by a
//! CLOSE, or an address that could not be resolved, is dialled from here, for as long as the
//! device lives, each time after twice the pause. Requests wait for as long as they may.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hat_transport::message::Hello;

use super::active::Active;
use super::run::Device;
use super::violation::CloudViolation;
use crate::error::RequestError;
use crate::wire;

/// Length of an outage after which requests that come are not kept waiting for its end.
const OUTAGE_KNOWN: Duration = Duration::from_secs(2);
/// Patience of such a request: an attempt to reach the cloud ends within it.
const PATIENCE_KNOWN: Duration = Duration::from_secs(1);
/// A connected cloud may leave a request without any answer for so many times the patience with
/// one that is away.
pub(super) const SILENCE_FACTOR: u32 = 4;

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

impl Device {
    pub(super) fn dial(&mut self) {
        if self.connection.is_some() {
            return;
        }
        match self.address.resolve() {
            Ok(address) => self.connection = Some(self.endpoint.dial(address)),
            Err(error) => {
                let reason = error.to_string();
                if self.reason != reason {
                    tracing::info!(cloud = %self.cloud, %reason, "the cloud can't be dialled");
                }
                self.reason = reason;
                self.redial.put_off(self.start.shared.clock.now());
                if error.is_final {
                    self.fail_for_cloud();
                }
            }
        }
    }

    /// Compares the HELLO of the cloud that was found with this device's own, and with the rows
    /// that it sends.
    ///
    /// # Errors
    /// The reason to close with INCOMPATIBLE.
    pub(super) fn check_cloud(&self, hello: &Hello) -> Result<(), String> {
        wire::check_peer(&self.start.hello(), hello)?;
        let config = &self.start.config;
        wire::check_arithmetic(hello.arithmetic_id, config.cloud_arithmetic)?;
        wire::check_codec(config.codec(), self.start.facts.hidden_size, hello)
    }

    /// The link is up, to a cloud that has been checked.
    pub(super) fn take_up(&mut self, hello: &Hello, resumed: bool) {
        self.peer_arithmetic = hello.arithmetic_id;
        self.peer_frame_max = wire::frame_bytes_max(hello);
        self.peer_rows_max = hello.row_budget;
        self.peer_stages = u32::from(hello.stages.max(1));
        self.peer_pending_max = usize::from(hello.rows_pending_max);
        self.set_connected(true);
        tracing::info!(cloud = %self.cloud, resumed, "the cloud is connected");
        if !resumed {
            self.begin_anew();
        }
        self.actives.iter_mut().for_each(|active| active.deadline = None);
    }

    /// Ends all requests, since waiting for the cloud would not help them. The device dials on.
    pub(super) fn fail_for_cloud(&mut self) {
        for index in (0..self.actives.len()).rev() {
            let (peer, reason) = (self.cloud.clone(), self.reason.clone());
            self.fail(index, RequestError::Peer { peer, reason });
        }
    }

    /// Fails requests that have waited for the cloud as long as they may.
    pub(super) fn drop_overdue(&mut self, now: Instant) {
        let silence_max = self.start.config.reconnect * SILENCE_FACTOR;
        let acks_come = self.acks_come();
        for index in (0..self.actives.len()).rev() {
            let patience_now = self.patience_of(&self.actives[index]);
            let active = &mut self.actives[index];
            if !self.connected {
                active.start_deadline(now, patience_now);
            }
            let holds = self.connection.is_some_and(|id| self.endpoint.holds(id, active.wire_id));
            // Frames on their way are taken by a slow link, or by a cloud that is there.
            let is_due =
                active.has_session() && if holds { !acks_come } else { active.awaits_cloud() };
            if !self.connected || !is_due {
                active.heard = now;
            }
            if now.saturating_duration_since(active.heard) >= silence_max {
                self.fail_by(index, &CloudViolation::Silent { waited: silence_max });
                continue;
            }
            if self.actives[index].deadline.is_some_and(|deadline| deadline <= now) {
                let error = match self.actives[index].busy_ms.filter(|_| self.connected) {
                    Some(retry_after_ms) => RequestError::Busy {
                        reason: format!("cloud {} has no room for another session", self.cloud),
                        retry_after_ms: u64::from(retry_after_ms),
                    },
                    None => self.peer_error(patience_now),
                };
                self.fail(index, error);
            }
        }
    }

    /// True if the cloud has acknowledged bytes since the last look.
    fn acks_come(&mut self) -> bool {
        let counters = self.connection.and_then(|id| self.endpoint.counters(id));
        let acked = counters.map_or(0, |counters| counters.traffic.acked_bytes);
        std::mem::replace(&mut self.acked_bytes, acked) != acked
    }

    /// How long a request bears with a cloud that is away.
    fn patience_of(&self, active: &Active) -> Duration {
        let patience = self.start.config.reconnect;
        let began = self.down_since.filter(|_| !self.connected);
        match began.is_some_and(|began| active.job.asked > began + OUTAGE_KNOWN) {
            true => patience.min(PATIENCE_KNOWN),
            false => patience,
        }
    }

    /// Ends a request whose cloud does not keep to the protocol.
    pub(super) fn fail_by(&mut self, index: usize, violation: &CloudViolation) {
        let (peer, reason) = (self.cloud.clone(), violation.to_string());
        self.fail(index, RequestError::Peer { peer, reason });
    }

    fn peer_error(&self, waited: Duration) -> RequestError {
        let waited = waited.as_secs_f32();
        let reason =
            format!("{} (waited {waited:.0} s); is `hat-engine cloud` running there?", self.reason);
        RequestError::Peer { peer: self.cloud.clone(), reason }
    }

    /// The cloud knows none of the sessions: each is opened again, within reason.
    pub(super) fn begin_anew(&mut self) {
        for index in (0..self.actives.len()).rev() {
            let active = &mut self.actives[index];
            let had_session = active.wire_id != 0;
            if !had_session || active.may_return() {
                active.restart(None);
                continue;
            }
            let times = active.lost_n;
            self.fail_by(index, &CloudViolation::Forgets { times });
        }
    }

    pub(super) fn set_connected(&mut self, connected: bool) {
        if connected {
            self.down_since = None;
        } else if self.down_since.is_none() {
            self.down_since = Some(self.start.shared.clock.now());
        }
        self.connected = connected;
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
