//! Silence, pings and round-trip times. Times are arguments.

use std::time::{Duration, Instant};

use super::Expired;

#[derive(Debug, Default)]
pub(super) struct Timers {
    /// Time at which the socket came up.
    connected: Option<Instant>,
    /// Time of the last bytes.
    heard: Option<Instant>,
    /// Time of the last ping sent.
    pinged: Option<Instant>,
    ping_due: bool,
    /// Number of the last ping.
    nonce: u64,
    rtt: Option<Duration>,
}

impl Timers {
    /// A socket came up.
    pub(super) fn start(&mut self, now: Instant) {
        (self.connected, self.heard, self.pinged) = (Some(now), Some(now), None);
        self.ping_due = false;
    }

    /// Bytes came.
    pub(super) fn heard(&mut self, now: Instant) {
        self.heard = Some(now);
    }

    /// Asks for a ping at the next opportunity.
    pub(super) fn want_ping(&mut self) {
        self.ping_due = true;
    }

    /// The eight bytes of a ping that goes out now, if one is due.
    pub(super) fn ping(&mut self, now: Instant) -> Option<[u8; 8]> {
        if !std::mem::take(&mut self.ping_due) {
            return None;
        }
        self.pinged = Some(now);
        self.nonce += 1;
        Some(self.nonce.to_le_bytes())
    }

    /// A pong came: one more sample, with the weight of an eighth.
    pub(super) fn ponged(&mut self, now: Instant, nonce: [u8; 8]) {
        if let Some(pinged) = self.pinged
            && u64::from_le_bytes(nonce) == self.nonce
        {
            let sample = now.saturating_duration_since(pinged);
            self.rtt = Some(self.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        }
    }

    /// A frame that went out at `sent_at` was acknowledged. The peer may have waited before it
    /// did, so this only bounds the round trip from above.
    pub(super) fn acknowledged(&mut self, now: Instant, sent_at: Instant) {
        let bound = now.saturating_duration_since(sent_at);
        self.rtt = Some(self.rtt.map_or(bound, |rtt| rtt.min(bound)));
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// Deadline of HELLO.
    pub(super) fn hello_deadline(&self, within: Duration) -> Option<Instant> {
        self.connected.map(|connected| connected + within)
    }

    pub(super) fn check_hello(&self, now: Instant, within: Duration) -> Result<(), Expired> {
        match self.hello_deadline(within) {
            Some(deadline) if now >= deadline => Err(Expired::Hello(within)),
            _ => Ok(()),
        }
    }

    /// Wants a ping when the peer has been silent for `ping_after` since the last sign or ping.
    pub(super) fn check_silence(
        &mut self,
        now: Instant,
        ping_after: Duration,
        dead_after: Duration,
    ) -> Result<(), Expired> {
        if self.dead_at(dead_after).is_some_and(|at| now >= at) {
            return Err(Expired::Silent(dead_after));
        }
        self.ping_due |= self.ping_at(ping_after).is_some_and(|at| now >= at);
        Ok(())
    }

    /// Time at which the link counts as broken.
    pub(super) fn dead_at(&self, dead_after: Duration) -> Option<Instant> {
        self.heard.map(|heard| heard + dead_after)
    }

    /// Time at which the next ping is due.
    pub(super) fn ping_at(&self, ping_after: Duration) -> Option<Instant> {
        self.heard.max(self.pinged).map(|last| last + ping_after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_pong_is_no_sample() {
        let (mut timers, start) = (Timers::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        timers.start(start);
        timers.want_ping();
        let first = timers.ping(at(0)).unwrap();
        assert_eq!(timers.ping(at(1)), None);
        timers.want_ping();
        let second = timers.ping(at(1000)).unwrap();
        timers.ponged(at(1001), first);
        assert_eq!(timers.rtt(), None);
        timers.ponged(at(1040), second);
        assert_eq!(timers.rtt(), Some(Duration::from_millis(40)));
        // An acknowledgement may have waited: it only bounds the round trip.
        timers.acknowledged(at(1100), at(1000));
        assert_eq!(timers.rtt(), Some(Duration::from_millis(40)));
        timers.acknowledged(at(1130), at(1110));
        assert_eq!(timers.rtt(), Some(Duration::from_millis(20)));
    }
}
