//! The engine thread's loop: compute, send, wait, sample, until told to stop.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};
use hat_transport::conn::Frame;
use hat_transport::frame::{HEADER_BYTES, Kind, Priority};
use hat_transport::link::Waker;
use hat_transport::message::{Message, Open, Output, Role, RowsHead, SessionErrorCode, Want};
use hat_transport::turn::{ConnectionId, Endpoint, Event as LinkEvent};

use super::active::{Active, Phase, Unsent};
use super::{Job, Shared};
use crate::answer::Answer;
use crate::config::{ChunkPolicy, CloudAddress, EngineConfig};
use crate::metrics::Meter;
use crate::model::DeviceForward;
use crate::page::{PagePool, pages_for};
use crate::request::FinishReason;
use crate::sequence::{PENDING_ROWS_MAX, PlanBuffers, Sequence};
use crate::wire::{self, ARITHMETIC_ID, BundleFacts, KV_TYPE_F16};
use crate::{Error, Event, Metrics};

/// What the engine thread starts with.
pub(super) struct Start {
    pub(super) config: EngineConfig,
    pub(super) facts: BundleFacts,
    pub(super) model: Box<dyn DeviceForward>,
    pub(super) shared: Arc<Shared>,
    pub(super) incoming: Receiver<Job>,
}

impl Start {
    /// Opens the link, says so, and serves until told to stop.
    pub(super) fn run(self, ready: &Sender<Result<Waker, Error>>) {
        let mut device = match self.open() {
            Ok(device) => {
                let _ = ready.send(Ok(device.endpoint.waker()));
                device
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        if let Err(error) = device.serve() {
            tracing::error!(%error, "the link failed; the device stops");
            let text = format!("its link failed: {error}");
            for active in &device.actives {
                active.fail(Error::Stopped(text.clone()));
            }
        }
    }

    fn open(self) -> Result<Device, Error> {
        let CloudAddress::Remote(cloud) = &self.config.cloud else {
            unreachable!("a cloud in this process has been started and has an address")
        };
        let facts = &self.facts;
        let layers = facts.layers.clone();
        let hello = wire::hello(Role::Device, facts.model_id, facts.hidden_size, layers);
        let clock = self.shared.clock.clone();
        let endpoint = wire::dialler(&self.config, clock, hello)?;
        let limits = self.config.limits;
        let pages = pages_for(limits.kv_rows_max as usize + PENDING_ROWS_MAX);
        let step_rows = limits.step_rows_max as usize;
        Ok(Device {
            endpoint,
            cloud: cloud.clone(),
            connection: None,
            peer_rows_max: limits.step_rows_max,
            connected: false,
            reason: "not connected yet".into(),
            actives: Vec::new(),
            waiting: VecDeque::new(),
            pages: PagePool::new(u32::try_from(pages).expect("row counts are u32")),
            next_wire_id: 1,
            plan: PlanBuffers::with_capacity(step_rows, 1, pages),
            logits: vec![0.0; self.shared.config.vocab_size],
            row: vec![0.0; facts.hidden_size],
            start: self,
        })
    }
}

struct Device {
    start: Start,
    endpoint: Endpoint,
    cloud: String,
    connection: Option<ConnectionId>,
    connected: bool,
    /// The cloud's row budget for one chunk.
    peer_rows_max: u32,
    /// Why the cloud is away, for people.
    reason: String,
    actives: Vec<Active>,
    /// Requests that have no session yet.
    waiting: VecDeque<Job>,
    pages: PagePool,
    next_wire_id: u32,
    plan: PlanBuffers,
    logits: Vec<f32>, // [vocab_size]
    row: Vec<f32>,    // [rows of one OUTPUT frame, hidden_size]
}

impl Device {
    fn serve(&mut self) -> std::io::Result<()> {
        let mut events = Vec::new();
        self.dial();
        while !self.start.shared.stop.load(Ordering::Acquire) {
            let now = self.start.shared.clock.now();
            self.admit();
            self.drop_cancelled();
            self.drop_overdue(now);
            self.open_sessions(now);
            let busy = self.compute_one();
            self.send_unsent();
            let timeout = if busy { Some(Duration::ZERO) } else { self.wait_for(now) };
            self.endpoint.turn(timeout, &mut events)?;
            for event in events.drain(..) {
                self.take(event);
            }
        }
        for active in &self.actives {
            active.fail(Error::Stopped("it was closed".into()));
        }
        Ok(())
    }

    fn dial(&mut self) {
        if self.connection.is_some() {
            return;
        }
        match wire::resolve(&self.cloud) {
            Ok(address) => self.connection = Some(self.endpoint.dial(address)),
            Err(reason) => self.reason = reason,
        }
    }

    /// Gives waiting requests a session of their own while there is room.
    fn admit(&mut self) {
        // Whatever finds no place here stays in the bounded queue, and its makers are told.
        let room = self.start.config.limits.queue_max as usize - self.waiting.len();
        self.waiting.extend(self.start.incoming.try_iter().take(room));
        if self.waiting.is_empty() {
            return;
        }
        self.dial();
        while self.actives.len() < self.start.config.limits.sessions_max as usize {
            let Some(job) = self.waiting.front() else { return };
            let rows_max = job.prepared.rows_max();
            let wanted = pages_for(rows_max as usize + PENDING_ROWS_MAX);
            let Ok(pages) = self.pages.take(wanted) else { return };
            let job = self.waiting.pop_front().expect("looked at above");
            let shared = &self.start.shared;
            let answer = Answer::new(&job.prepared, &shared.tokenizer, &shared.config);
            self.actives.push(Active {
                answer,
                meter: Meter::new(job.asked, job.prepared.prompt_n()),
                phase: Phase::Closed { not_before: None },
                wire_id: 0,
                tokens: job.prepared.prompt.clone(),
                sequence: Sequence::new(pages, rows_max),
                unsent: Unsent::default(),
                returned: 0,
                settled: 0,
                deadline: None,
                job,
            });
            shared.metrics().sessions = self.actives.len() as u64;
        }
    }

    fn drop_cancelled(&mut self) {
        let waiting = self.waiting.len();
        self.waiting.retain(|job| !job.cancelled.load(Ordering::Acquire));
        let mut cancelled = waiting - self.waiting.len();
        for index in (0..self.actives.len()).rev() {
            if self.actives[index].job.cancelled.load(Ordering::Acquire) {
                self.retire(index);
                cancelled += 1;
            }
        }
        if cancelled > 0 {
            self.start.shared.metrics().requests_cancelled += cancelled as u64;
        }
    }

    fn drop_overdue(&mut self, now: Instant) {
        for index in (0..self.actives.len()).rev() {
            if !self.connected {
                self.actives[index].start_deadline(now, self.start.config.reconnect);
            }
            if self.actives[index].deadline.is_some_and(|deadline| deadline <= now) {
                let error = self.peer_error();
                self.fail(index, error);
            }
        }
    }

    fn peer_error(&self) -> Error {
        let patience = self.start.config.reconnect.as_secs_f32();
        let reason = format!(
            "{} (waited {patience:.0} s); is `hat-engine cloud` running there?",
            self.reason
        );
        Error::Peer { peer: self.cloud.clone(), reason }
    }

    fn open_sessions(&mut self, now: Instant) {
        let Some(connection) = self.connection.filter(|_| self.connected) else { return };
        let facts = &self.start.facts;
        let layer = |layer: u32| u16::try_from(layer).expect("layers are few");
        for active in &mut self.actives {
            let Phase::Closed { not_before } = active.phase else { continue };
            if not_before.is_some_and(|time| now < time) {
                continue;
            }
            let open = Message::Open(Open {
                entry_layer: layer(facts.layers.start),
                exit_layer: layer(facts.layers.end),
                codec: self.start.config.wire.id(),
                kv_type: KV_TYPE_F16,
                arithmetic_id: ARITHMETIC_ID,
                rows_max: active.job.prepared.rows_max(),
            });
            let wire_id = self.next_wire_id;
            if self.endpoint.send_message(connection, wire_id, &open).is_ok() {
                self.next_wire_id = self.next_wire_id.checked_add(1).unwrap_or(1);
                active.wire_id = wire_id;
                active.phase = Phase::Opening;
            }
        }
    }

    /// Computes one chunk of one request, the one with the fewest rows left first: a decode step
    /// is not kept waiting by another's long prompt. Says whether there was anything to do.
    fn compute_one(&mut self) -> bool {
        let next = (0..self.actives.len())
            .filter(|index| self.actives[*index].wants_compute())
            .min_by_key(|index| self.actives[*index].rows() - self.actives[*index].computed());
        let Some(index) = next else { return false };
        let active = &mut self.actives[index];
        let first = active.computed();
        let policy = match self.start.config.chunks {
            ChunkPolicy::Off => u32::MAX,
            ChunkPolicy::Fixed(rows) => rows,
        };
        let rows_max = policy.min(self.peer_rows_max).min(self.start.config.limits.step_rows_max);
        let count = (active.rows() - first).min(rows_max);
        let place = active
            .sequence
            .append_committed(first + 1, count, first)
            .expect("ids are positions plus one, and the session reserved all of them");
        self.plan.clear();
        self.plan.push_committed(place, count);
        self.plan.end_sequence(&active.sequence);
        let end = (first + count) as usize;
        let tokens = &active.tokens[first as usize..end];
        let hidden_size = self.start.facts.hidden_size;
        active.unsent.first = first;
        active.unsent.count = count as usize;
        active.unsent.sent = 0;
        active.unsent.hidden.resize(count as usize * hidden_size, 0.0);
        self.start.model.input(&self.plan.plan(), tokens, &mut active.unsent.hidden);
        if let Some(row) = active.unsent.hidden.iter().position(|number| !number.is_finite()) {
            let row = u32::try_from(row / hidden_size).expect("below the chunk's rows");
            self.fail(index, Error::NotFinite { position: first + row });
            return true;
        }
        if active.answer.tokens().is_empty() {
            active.meter.counts.chunks.push(count);
            let event = Event::Prefill { sent: first + count, total: active.rows() };
            let _ = active.job.events.send(Ok(event));
        }
        true
    }

    /// Sends what is computed, as far as there are buffers and credit.
    fn send_unsent(&mut self) {
        let Some(connection) = self.connection.filter(|_| self.connected) else { return };
        let hidden_size = self.start.facts.hidden_size;
        let codec = self.start.config.wire;
        let has_tail = self.start.facts.has_tail;
        for active in &mut self.actives {
            if active.phase != Phase::Open {
                continue;
            }
            let last_row = active.rows();
            while active.unsent.sent < active.unsent.count {
                let unsent = &active.unsent;
                let rows =
                    (unsent.count - unsent.sent).min(wire::rows_per_frame(codec, hidden_size));
                let row_bytes = codec.row_bytes(hidden_size);
                let bytes = RowsHead::BYTES + rows * row_bytes;
                let Some(mut body) = self.endpoint.buffer(bytes) else { return };
                let count = u32::try_from(rows).expect("a frame holds few rows");
                let position = unsent.first + u32::try_from(unsent.sent).expect("few rows");
                let more = unsent.sent + rows < unsent.count;
                let ends = position + count == last_row;
                let head = RowsHead {
                    first_id: position + 1,
                    count: u16::try_from(rows).expect("a frame holds few rows"),
                    tree: false,
                    decided: true,
                    more,
                    want: match (has_tail, ends) {
                        (true, _) => Want::All,
                        (false, true) => Want::Last,
                        (false, false) => Want::None,
                    },
                    parent: position,
                    commit: 0,
                };
                let start = head.encode(&[], body.body_mut());
                let from = unsent.sent * hidden_size;
                let cut = codec
                    .pack(
                        &unsent.hidden[from..from + rows * hidden_size],
                        hidden_size,
                        &mut body.body_mut()[start..],
                    )
                    .expect("rows are checked when they are computed");
                if cut > 0 {
                    tracing::warn!(cut, "numbers beyond the wire codec's range were cut");
                }
                let urgent = !active.answer.tokens().is_empty() && unsent.count == 1;
                let priority = if urgent { Priority::Verify } else { Priority::Prompt };
                if self
                    .endpoint
                    .send(connection, Kind::Rows, active.wire_id, priority, body)
                    .is_err()
                {
                    return;
                }
                active.meter.rows_sent(count);
                active.meter.counts.bytes_up += (HEADER_BYTES + bytes) as u64;
                active.unsent.sent += rows;
            }
        }
    }

    /// How long a turn may wait: until the next deadline, or until something happens.
    fn wait_for(&self, now: Instant) -> Option<Duration> {
        if self.actives.iter().any(|active| active.unsent.sent < active.unsent.count) {
            return Some(Duration::from_millis(1));
        }
        let retries = self.actives.iter().filter_map(|active| match active.phase {
            Phase::Closed { not_before } => not_before,
            _ => None,
        });
        let deadlines = self.actives.iter().filter_map(|active| active.deadline);
        retries.chain(deadlines).min().map(|time| time.saturating_duration_since(now))
    }

    fn take(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up { hello, resumed, .. } => {
                self.set_connected(true);
                self.peer_rows_max = hello.row_budget.max(1);
                if !resumed {
                    self.actives.iter_mut().for_each(|active| active.restart(None));
                }
                self.actives.iter_mut().for_each(|active| active.deadline = None);
            }
            LinkEvent::Down { reason, .. } => {
                tracing::info!(%reason, "the cloud is away");
                self.reason = reason;
                self.set_connected(false);
            }
            LinkEvent::Gone { error, .. } => {
                tracing::info!(%error, "the cloud is gone");
                self.reason = error.to_string();
                self.set_connected(false);
                self.connection = None;
                for index in (0..self.actives.len()).rev() {
                    let (peer, reason) = (self.cloud.clone(), self.reason.clone());
                    self.fail(index, Error::Peer { peer, reason });
                }
            }
            LinkEvent::Frame { frame, .. } => self.take_frame(&frame),
            _ => {}
        }
    }

    fn set_connected(&mut self, connected: bool) {
        self.connected = connected;
        self.start.shared.connected.store(connected, Ordering::Release);
    }

    fn take_frame(&mut self, frame: &Frame) {
        // Frames of sessions that this side has ended are late, not wrong.
        let own = |active: &Active| active.wire_id == frame.session;
        let Some(index) = self.actives.iter().position(own) else { return };
        let now = self.start.shared.clock.now();
        let taken = match Message::decode(frame.kind, &frame.body) {
            Ok(Message::Opened) => {
                self.actives[index].phase = Phase::Open;
                self.actives[index].deadline = None;
                Ok(())
            }
            Ok(Message::Output(output)) => self.take_output(index, &output, frame.body.len()),
            Ok(Message::Busy(busy)) => {
                let wait = Duration::from_millis(u64::from(busy.retry_after_ms));
                self.reason = "it has no room for another session".into();
                let patience = self.start.config.reconnect;
                let active = &mut self.actives[index];
                active.start_deadline(now, patience);
                active.restart(Some(now + wait));
                Ok(())
            }
            Ok(Message::SessionError(error)) => match error.code {
                SessionErrorCode::NoSuchSession | SessionErrorCode::Evicted => {
                    self.actives[index].restart(None);
                    Ok(())
                }
                code => Err(format!("it ended the session: {code:?}: {}", error.text)),
            },
            Ok(Message::Ended | Message::Cancelled | Message::Dropped(_)) => Ok(()),
            Ok(other) => Err(format!("it sent {:?}, which a cloud does not", other.kind())),
            Err(error) => Err(format!("a {:?} frame is malformed: {error}", frame.kind)),
        };
        if let Err(reason) = taken {
            let error = Error::Peer { peer: self.cloud.clone(), reason };
            self.fail(index, error);
        }
    }

    /// Takes rows that came back; the last row of all leads to the next token.
    fn take_output(
        &mut self,
        index: usize,
        output: &Output<'_>,
        bytes: usize,
    ) -> Result<(), String> {
        let hidden_size = self.start.facts.hidden_size;
        let active = &mut self.actives[index];
        active.meter.counts.bytes_down += (HEADER_BYTES + bytes) as u64;
        active.deadline = None;
        let count = usize::from(output.head.count);
        self.row.resize(count.max(1) * hidden_size, 0.0);
        let rows = &mut self.row[..count * hidden_size];
        let codec = self.start.config.wire;
        if output.payload.len() != count * codec.row_bytes(hidden_size) {
            return Err(format!("{} bytes for {count} rows", output.payload.len()));
        }
        codec.unpack(output.payload, hidden_size, rows).map_err(|error| error.to_string())?;
        let first_id = output.ids.iter().next().ok_or("an OUTPUT without rows")?;
        let last_id = first_id + u32::from(output.head.count) - 1;
        let in_order = output.ids.iter().zip(first_id..).all(|(id, expected)| id == expected);
        if !in_order || last_id > active.computed() || first_id <= active.returned {
            return Err(format!("rows {first_id}..={last_id} come out of turn"));
        }
        if self.start.facts.has_tail {
            if first_id != active.returned + 1 {
                return Err(format!("row {first_id} before row {}", active.returned + 1));
            }
            let first = first_id - 1;
            self.plan.clear();
            let place = crate::sequence::RowPlace { position: first, slot: first };
            self.plan.push_committed(place, u32::from(output.head.count));
            self.plan.end_sequence(&active.sequence);
            self.start.model.tail(&self.plan.plan(), rows);
        }
        active.returned = last_id;
        active.meter.rows_settled(last_id - active.settled);
        active.settled = last_id;
        if last_id == active.rows() {
            let last = rows.len() - hidden_size;
            self.emit(index, last..last + hidden_size);
        }
        Ok(())
    }

    /// The last row is back, at `last` of `self.row`: decides the next token.
    fn emit(&mut self, index: usize, last: std::ops::Range<usize>) {
        let Start { shared, model, .. } = &mut self.start;
        let active = &mut self.actives[index];
        let position = active.rows() - 1;
        let emitted = if active.answer.wants_greatest() {
            let greatest = model.greatest(&self.row[last]);
            let emit = |(token, _)| active.answer.take_greatest(token, &shared.tokenizer);
            greatest.map(emit).ok_or(Error::NotFinite { position })
        } else {
            model.head(&self.row[last], &mut self.logits);
            active.answer.take(&self.logits, position, &shared.tokenizer)
        };
        let emitted = match emitted {
            Ok(emitted) => emitted,
            Err(error) => return self.fail(index, error),
        };
        if let Some(token) = emitted.token {
            active.meter.counts.rounds =
                u32::try_from(active.answer.tokens().len() - 1).expect("within the context");
            active.meter.token(shared.clock.now());
            active.tokens.push(token);
        }
        let heard = emitted.event.is_none_or(|event| active.job.events.send(Ok(event)).is_ok());
        match emitted.finish {
            Some(reason) => self.finish(index, reason),
            None if !heard => self.retire(index),
            None => {}
        }
    }

    fn finish(&mut self, index: usize, finish_reason: FinishReason) {
        let active = &mut self.actives[index];
        let text = active.answer.finish();
        let timings = active.meter.timings();
        self.start.shared.metrics().add(&active.meter);
        let metrics = Box::new(Metrics {
            timings,
            token_ids: active.answer.tokens().to_vec(),
            text: active.answer.text().to_owned(),
            logits_blake3: active.answer.logits_blake3(),
        });
        let _ = active.job.events.send(Ok(Event::Done { text, finish_reason, metrics }));
        self.retire(index);
    }

    /// Ends a request with an error.
    fn fail(&mut self, index: usize, error: Error) {
        self.start.shared.metrics().requests_failed += 1;
        self.actives[index].fail(error);
        self.retire(index);
    }

    /// Forgets a request, and tells the cloud if it has a session.
    fn retire(&mut self, index: usize) {
        let active = self.actives.swap_remove(index);
        self.start.shared.metrics().sessions = self.actives.len() as u64;
        if let Some(connection) = self.connection
            && !matches!(active.phase, Phase::Closed { .. })
            && active.wire_id != 0
        {
            let _ = self.endpoint.send_message(connection, active.wire_id, &Message::End);
        }
        self.pages.give_back(active.sequence.into_pages());
    }
}
