//! Counters of the API itself, for `/metrics`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Counters of a server. The maps have few keys: routes, statuses and reasons are our own words.
#[derive(Debug, Default)]
pub(super) struct Counters {
    responses: Mutex<BTreeMap<(&'static str, u16), u64>>,
    refused: Mutex<BTreeMap<&'static str, u64>>,
    /// Connections open now.
    pub(super) connections: AtomicUsize,
}

impl Counters {
    /// A response has been decided.
    pub(super) fn respond(&self, route: &'static str, status: u16) {
        *lock(&self.responses).entry((route, status)).or_default() += 1;
    }

    /// Counts a refusal, or a failure after the response had begun.
    pub(super) fn refuse(&self, reason: &'static str) {
        *lock(&self.refused).entry(reason).or_default() += 1;
    }

    /// The counters as Prometheus reads them. `cut`: requests whose reader was too slow.
    pub(super) fn prometheus(&self, in_flight: usize, cut: u64, out: &mut String) {
        family(out, "hat_rejected_total", "counter", "Refusals and late failures, by reason.");
        for (reason, count) in lock(&self.refused).iter().chain([(&"slow_reader", &cut)]) {
            sample(out, &format!("hat_rejected_total{{reason=\"{reason}\"}}"), *count);
        }
        family(out, "hat_http_requests_total", "counter", "Responses by route and status.");
        for ((route, status), count) in lock(&self.responses).iter() {
            let labels = format!("route=\"{route}\",status=\"{status}\"");
            sample(out, &format!("hat_http_requests_total{{{labels}}}"), *count);
        }
        family(out, "hat_http_connections", "gauge", "HTTP connections open now.");
        sample(out, "hat_http_connections", self.connections.load(Ordering::Relaxed));
        family(out, "hat_http_answers_in_flight", "gauge", "Answers asked for and not complete.");
        sample(out, "hat_http_answers_in_flight", in_flight as u64);
    }
}

/// Present backends of this process, by role: another line once a GPU is lost.
pub(super) fn backends(each: impl Iterator<Item = (&'static str, String)>, out: &mut String) {
    family(out, "hat_backend_info", "gauge", "1 for the backend that computes now, by role.");
    for (role, backend) in each {
        let backend = backend.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        sample(out, &format!("hat_backend_info{{role=\"{role}\",backend=\"{backend}\"}}"), 1);
    }
}

/// The two comment lines above a metric's samples.
pub(super) fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n"); // a String takes it
}

/// One sample.
pub(super) fn sample(out: &mut String, name: &str, value: impl std::fmt::Display) {
    let _ = writeln!(out, "{name} {value}"); // a String takes it
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
