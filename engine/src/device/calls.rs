//! The callers of a device: their requests on the way to the core, its events on the way back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use crossbeam::channel::{Receiver, Sender};
use hat_core::answer::Answer;
use hat_core::device::{DeviceCore, RequestEvent, RequestId};

use super::{Shared, Submission, Waits};
use crate::text::Rendered;
use crate::{Error, Event};

/// A request's caller.
struct Call {
    events: Sender<Result<Event, Error>>,
    cancelled: Arc<AtomicBool>,
    waits: Option<Waits>,
    rendered: Rendered,
}

/// All callers. When this is dropped the engine thread has ended, whatever ended it, and nobody
/// waits for it after that: a bounded channel keeps what is in it when its receiver goes, so the
/// last requests are taken out; one that comes later finds the flag.
pub(super) struct Calls {
    shared: Arc<Shared>,
    incoming: Receiver<Submission>,
    /// Requests that may wait in the core.
    queue_max: usize,
    of_request: BTreeMap<RequestId, Call>,
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.incoming.try_iter().for_each(drop);
    }
}

impl Calls {
    pub(super) fn new(
        shared: Arc<Shared>,
        incoming: Receiver<Submission>,
        queue_max: usize,
    ) -> Self {
        Self { shared, incoming, queue_max, of_request: BTreeMap::new() }
    }

    /// Hands requests on to the core. Those beyond its queue stay in the bounded channel, and their
    /// makers are told.
    pub(super) fn submit(&mut self, core: &mut DeviceCore) {
        let room = self.queue_max - core.waiting();
        for submission in self.incoming.try_iter().take(room) {
            let Submission { prepared, rendered, events, cancelled, asked, waits } = submission;
            let vocab_size = self.shared.config.vocab_size;
            let answer = Answer::new(&prepared, self.shared.text.vocabulary(), vocab_size);
            let id = core.submit(asked, prepared, answer);
            self.of_request.insert(id, Call { events, cancelled, waits, rendered });
        }
    }

    /// Ends the requests whose callers have gone.
    pub(super) fn drop_cancelled(&mut self, core: &mut DeviceCore) {
        let is_cancelled =
            |(id, call): (&RequestId, &Call)| call.cancelled.load(Ordering::Acquire).then_some(*id);
        while let Some(id) = self.of_request.iter().find_map(is_cancelled) {
            core.cancel(id);
            self.of_request.remove(&id);
            let mut sums = self.shared.metrics();
            sums.requests_cancelled += 1;
            sums.sessions = core.running() as u64;
        }
    }

    /// Passes news on to whom they are for.
    pub(super) fn tell(&mut self, core: &mut DeviceCore) {
        let shared = &self.shared;
        shared.connected.store(core.is_connected(), Ordering::Release);
        while let Some((id, event)) = core.poll_event() {
            if !matches!(event, RequestEvent::Said(_)) {
                shared.metrics().sessions = core.running() as u64;
            }
            let Some(call) = self.of_request.get_mut(&id) else { continue };
            let said = match event {
                RequestEvent::Runs => {
                    drop(call.waits.take());
                    continue;
                }
                RequestEvent::Said(event) => {
                    let _ = call.events.send(Ok(event)); // who does not listen has cancelled
                    continue;
                }
                RequestEvent::Done(done) => {
                    shared.text.note(&call.rendered, &done.prepared, &done.metrics);
                    let mut sums = shared.metrics();
                    sums.add(&done.meter);
                    sums.estimates = done.estimates;
                    drop(sums);
                    let (text, finish_reason) = (done.text, done.finish_reason);
                    Ok(Event::Done { text, finish_reason, metrics: Box::new(done.metrics) })
                }
                RequestEvent::Failed(error) => {
                    shared.metrics().requests_failed += 1;
                    Err(error.into())
                }
            };
            let _ = call.events.send(said);
            self.of_request.remove(&id);
        }
    }

    /// Ends all requests.
    pub(super) fn stop(&mut self, why: &str) {
        for call in std::mem::take(&mut self.of_request).into_values() {
            let _ = call.events.send(Err(Error::stopped(why)));
        }
    }
}
