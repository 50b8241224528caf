//! What a backend's fault does to the sessions: they close, and their devices replay them.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::jobs_of;
use super::super::violation::SessionEnd;
use super::Io;
use crate::backend::BackendFault;

/// Turns of the link, and the time of each, in which devices hear that their sessions are closed
/// before a cloud stops.
const FAREWELL_TURNS: u32 = 10;
const FAREWELL_TURN: Duration = Duration::from_millis(5);

impl Io {
    /// True if a step is on its way, those left out of which the caller has the jobs in hand.
    pub(super) fn is_stepping(&self, in_hand: usize) -> bool {
        self.jobs.len() + in_hand < jobs_of(self.start.stages)
    }

    /// Time after which the steps on their way are taken for stuck; `None` if there are none.
    pub(super) fn stuck_in(&self) -> Option<Duration> {
        let at = self.step_moved + self.start.config.step_within;
        self.is_stepping(0).then(|| at.saturating_duration_since(self.start.clock.now()))
    }

    /// Takes a backend that does not come back from a step for lost: nobody would be served.
    pub(super) fn look_for_stuck_step(&mut self) {
        if self.stuck_in() == Some(Duration::ZERO) {
            let seconds = self.start.config.step_within.as_secs_f32();
            let reason = format!("a step has not ended within {seconds} s: the backend hangs");
            tracing::error!(reason, "the cloud computes nothing");
            let _ = self.start.fault.set(BackendFault { backend: "cloud", reason, lasts: true });
        }
    }

    /// Closes every session: what the KV store holds is not what the plans before said, also for
    /// sessions that had no row in the step. If the fault lasts, the cloud stops after that.
    pub(super) fn close_all(&mut self, fault: BackendFault) {
        let sessions = self.sessions.len();
        tracing::error!(%fault, lasts = fault.lasts, sessions, "a step was not computed");
        self.start.counters.faults.fetch_add(1, Ordering::Relaxed);
        self.moves.clear();
        // Pages have their names from when their rows are planned.
        self.prefixes.clear(&mut self.pages);
        let keys: Vec<_> = self.sessions.keys().copied().collect();
        for key in keys {
            self.end_for(key, SessionEnd::Fault(fault.clone()));
        }
        if fault.lasts {
            let mut events = Vec::new();
            for _ in 0..FAREWELL_TURNS {
                if self.endpoint.turn(Some(FAREWELL_TURN), &mut events).is_err() {
                    break;
                }
            }
            let _ = self.start.fault.set(fault);
        }
    }
}
