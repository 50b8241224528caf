//! The io thread: everything that arrives, what runs next, and what goes back.

mod fault;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TryRecvError};
use hat_transport::clock::Clock;
use hat_transport::conn::Frame;
use hat_transport::frame::{Kind, Priority};
use hat_transport::link::Waker;
use hat_transport::message::{
    Arrivals, Busy, CloseCode, Hello, Message, Open, SessionError, SessionErrorCode,
};
use hat_transport::turn::{ConnectionId, Endpoint, Event};

use super::output::Outputs;
use super::session::{Offence, Session};
use super::step::Job;
use super::{CloudConfig, CloudCounters};
use crate::Error;
use crate::backend::BackendFault;
use crate::pack::{Codec, PackError};
use crate::page::{PagePool, pages_for};
use crate::sched::{Scheduler, SessionKey, Work};
use crate::sequence::{PENDING_ROWS_MAX, Sequence};
use crate::wire::{self, BundleFacts, KV_TYPE_F16};

/// What the io thread starts with.
pub(super) struct Start {
    pub(super) config: CloudConfig,
    pub(super) bundle: BundleFacts,
    pub(super) pages: u32,
    /// Pipeline stages.
    pub(super) stages: usize,
    /// What the stages compute in.
    pub(super) arithmetic_id: u32,
    /// What a fault that lasts is told to.
    pub(super) fault: Arc<OnceLock<BackendFault>>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) counters: Arc<CloudCounters>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) to_step: Sender<Job>,
    pub(super) from_step: Receiver<Job>,
}

type Ready = Result<(SocketAddr, Waker), Error>;

impl Start {
    /// Listens, says so, and serves until told to stop.
    pub(super) fn run(self, ready: &Sender<Ready>) {
        let mut io = match self.listen() {
            Ok((io, address)) => {
                io.note_gauges();
                let _ = ready.send(Ok((address, io.endpoint.waker())));
                io
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        if let Err(error) = io.serve() {
            tracing::error!(%error, "the cloud stops");
        }
    }

    fn listen(self) -> Result<(Io, SocketAddr), Error> {
        let hello = self.hello();
        let limits = self.config.limits;
        let (endpoint, address) = wire::listen(&self.config, self.clock.clone(), hello)?;
        let io = Io {
            endpoint,
            scheduler: Scheduler::new(limits.step_rows_max, limits.queue_max as usize),
            pages: PagePool::new(self.pages),
            sessions: HashMap::new(),
            keys: HashMap::new(),
            next_key: 1,
            jobs: std::iter::repeat_with(Job::default).take(super::jobs_of(self.stages)).collect(),
            works: Vec::new(),
            outbox: VecDeque::new(),
            told: HashMap::new(),
            moves: Vec::new(),
            start: self,
        };
        Ok((io, address))
    }

    fn hello(&self) -> Hello {
        let BundleFacts { hidden_size, layers, model_id, .. } = &self.bundle;
        Hello {
            row_budget: self.config.limits.step_rows_max,
            arithmetic_id: self.arithmetic_id,
            stages: u16::try_from(self.stages).unwrap_or(u16::MAX),
            ..wire::hello(wire::Role::Cloud, *model_id, *hidden_size, layers.clone())
        }
    }
}

/// Rows that found no free buffer yet, already in the wire's form.
struct Output {
    connection: ConnectionId,
    session: u32,
    body: Vec<u8>,
}

struct Io {
    start: Start,
    endpoint: Endpoint,
    scheduler: Scheduler,
    pages: PagePool,
    sessions: HashMap<SessionKey, Session>,
    keys: HashMap<(ConnectionId, u32), SessionKey>,
    next_key: SessionKey,
    jobs: Vec<Job>,
    works: Vec<Work>,
    outbox: VecDeque<Output>,
    /// Arrived bytes, and how long they took, that each connection was told of.
    told: HashMap<ConnectionId, (u64, Duration)>,
    /// Moves of commits that came on their own, for the next step.
    moves: Vec<crate::backend::RowMove>,
}

/// How long a turn may wait when output could not be sent for want of buffers.
const OUTBOX_RETRY: Duration = Duration::from_millis(1);
/// What a refused device is told to wait.
const RETRY_AFTER_MS: u32 = 500;

impl Io {
    fn serve(&mut self) -> std::io::Result<()> {
        let mut events = Vec::new();
        while !self.start.stop.load(Ordering::Acquire) {
            let timeout = (!self.outbox.is_empty()).then_some(OUTBOX_RETRY);
            self.endpoint.turn(timeout, &mut events)?;
            for event in events.drain(..) {
                self.take(event);
            }
            loop {
                match self.start.from_step.try_recv() {
                    Ok(job) => self.finish(job),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        return Err(std::io::Error::other("the step thread has ended"));
                    }
                }
            }
            if let Some(fault) = self.start.fault.get() {
                return Err(std::io::Error::other(fault.clone()));
            }
            self.flush_outbox();
            self.plan();
            self.note_gauges();
        }
        Ok(())
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Up { connection, hello, resumed, .. } => {
                if !resumed {
                    self.drop_sessions_of(connection);
                }
                if let Err((code, reason)) = self.check_hello(&hello) {
                    tracing::info!(%reason, "connection refused");
                    self.start.counters.refused.fetch_add(1, Ordering::Relaxed);
                    self.endpoint.close(connection, code, &reason);
                }
            }
            Event::Frame { connection, frame } => self.take_frame(connection, frame),
            Event::Down { reason, .. } => tracing::info!(%reason, "connection down"),
            Event::Gone { connection, error } => {
                tracing::info!(%error, "connection gone");
                self.told.remove(&connection);
                self.drop_sessions_of(connection);
            }
            _ => {}
        }
    }

    fn check_hello(&self, hello: &Hello) -> Result<(), (CloseCode, String)> {
        let BundleFacts { hidden_size, layers, model_id, .. } = &self.start.bundle;
        wire::check_same_model(hello, model_id, *hidden_size)?;
        wire::check_layers(u32::from(hello.entry_layer)..u32::from(hello.exit_layer), layers)
            .map_err(|reason| (CloseCode::Incompatible, reason))
    }

    fn take_frame(&mut self, connection: ConnectionId, frame: Frame) {
        let (wire_id, kind) = (frame.session, frame.kind);
        if kind == Kind::Open {
            return self.open(connection, &frame);
        }
        let Some(&key) = self.keys.get(&(connection, wire_id)) else {
            // An END may cross the error that ended the session; it needs no second answer.
            if kind != Kind::End {
                let offence = Offence::new(
                    SessionErrorCode::NoSuchSession,
                    format!("there is no session {wire_id} on this connection"),
                );
                self.refuse(connection, wire_id, offence);
            }
            return;
        };
        let taken = match kind {
            Kind::Rows => self.take_rows(key, frame),
            Kind::Commit => self.take_commit(key, &frame),
            Kind::End => {
                self.end(key);
                self.answer(connection, wire_id, &Message::Ended);
                Ok(())
            }
            Kind::Cancel => {
                self.cancel(key);
                self.answer(connection, wire_id, &Message::Cancelled);
                Ok(())
            }
            kind => Err(Offence::new(
                SessionErrorCode::BadShape,
                format!("a device does not send {kind:?}"),
            )),
        };
        if let Err(offence) = taken {
            self.end(key);
            self.refuse(connection, wire_id, offence);
        }
    }

    fn open(&mut self, connection: ConnectionId, frame: &Frame) {
        let wire_id = frame.session;
        let opened = match Message::decode(Kind::Open, &frame.body) {
            Ok(Message::Open(open)) => self.admit(connection, wire_id, &open),
            Ok(other) => unreachable!("OPEN decoded as {:?}", other.kind()),
            Err(error) => Err(Offence::new(SessionErrorCode::BadShape, error.to_string())),
        };
        match opened {
            Ok(true) => self.answer(connection, wire_id, &Message::Opened),
            Ok(false) => {
                self.start.counters.refused.fetch_add(1, Ordering::Relaxed);
                let busy = Message::Busy(Busy { retry_after_ms: RETRY_AFTER_MS });
                self.answer(connection, wire_id, &busy);
            }
            Err(offence) => self.refuse(connection, wire_id, offence),
        }
    }

    /// Opens a session; `false` if there is no room now.
    fn admit(
        &mut self,
        connection: ConnectionId,
        wire_id: u32,
        open: &Open,
    ) -> Result<bool, Offence> {
        use SessionErrorCode as Code;
        if wire_id == 0 || self.keys.contains_key(&(connection, wire_id)) {
            let text = format!("session id {wire_id} is taken");
            return Err(Offence::new(Code::NoSuchSession, text));
        }
        let layers = u32::from(open.entry_layer)..u32::from(open.exit_layer);
        wire::check_layers(layers.clone(), &self.start.bundle.layers)
            .map_err(|reason| Offence::new(Code::Layers, reason))?;
        let codec = Codec::from_id(open.codec).ok_or_else(|| {
            Offence::new(Code::Codec, format!("row codec {} is not offered", open.codec))
        })?;
        let here = self.start.arithmetic_id;
        if open.arithmetic_id != here || open.kv_type != KV_TYPE_F16 {
            let text = format!(
                "arithmetic {} and KV type {} were asked for, {here} and {KV_TYPE_F16} run here",
                open.arithmetic_id, open.kv_type
            );
            return Err(Offence::new(Code::Arithmetic, text));
        }
        let limits = &self.start.config.limits;
        let context = self.start.bundle.context.min(limits.context_max);
        if open.rows_max == 0 || open.rows_max > context {
            let text = format!("{} positions asked for, the context is {context}", open.rows_max);
            return Err(Offence::new(Code::BadShape, text));
        }
        if self.sessions.len() >= limits.sessions_max as usize {
            return Ok(false);
        }
        let pages = pages_for(open.rows_max as usize + PENDING_ROWS_MAX);
        let Ok(pages) = self.pages.take(pages) else { return Ok(false) };
        let key = self.next_key;
        self.next_key += 1;
        let sequence = Sequence::new(pages, open.rows_max);
        let session = Session::new(key, connection, wire_id, codec, layers, sequence);
        self.sessions.insert(key, session);
        self.keys.insert((connection, wire_id), key);
        self.start.counters.opened.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    fn take_rows(&mut self, key: SessionKey, frame: Frame) -> Result<(), Offence> {
        let session = self.sessions.get_mut(&key).expect("keys and sessions agree");
        let rows_max = self.scheduler.rows_max();
        let complete = session.take_rows(frame, self.start.bundle.hidden_size, rows_max)?;
        let Some(complete) = complete else { return Ok(()) };
        let work = Work {
            session: key,
            rows: complete.rows,
            urgent: complete.urgent,
            class: session.exit_layer,
        };
        self.scheduler
            .enqueue(work)
            .map_err(|error| Offence::new(SessionErrorCode::Resource, error.to_string()))
    }

    fn take_commit(&mut self, key: SessionKey, frame: &Frame) -> Result<(), Offence> {
        let commit = match Message::decode(Kind::Commit, &frame.body) {
            Ok(Message::Commit(commit)) => commit,
            Ok(other) => unreachable!("COMMIT decoded as {:?}", other.kind()),
            Err(error) => {
                return Err(Offence::new(SessionErrorCode::BadShape, error.to_string()));
            }
        };
        let session = self.sessions.get_mut(&key).expect("keys and sessions agree");
        session.take_commit(commit.row, &mut self.moves)
    }

    /// Plans steps while there is work and a job to put it in.
    fn plan(&mut self) {
        while self.scheduler.queued() > 0 && !self.start.to_step.is_full() {
            let Some(mut job) = self.jobs.pop() else { return };
            job.clear();
            job.step.moves.append(&mut self.moves);
            let mut works = std::mem::take(&mut self.works);
            self.scheduler.plan(&mut works);
            works.sort_by_key(|work| self.sessions[&work.session].entry_layer);
            for work in &works {
                job.step.exit_layer = work.class;
                let session = self.sessions.get_mut(&work.session).expect("forgotten when ended");
                if let Err(offence) = job.put(session, self.start.bundle.hidden_size) {
                    let (connection, wire_id) = (session.connection, session.wire_id);
                    self.end(work.session);
                    self.refuse(connection, wire_id, offence);
                }
            }
            self.works = works;
            if self.start.to_step.send(job).is_err() {
                return;
            }
        }
    }

    /// Sends back what a finished step computed.
    fn finish(&mut self, mut job: Job) {
        if let Some(fault) = job.fault.take() {
            self.close_all(fault);
        }
        let step_rows = job.step.plan.rows();
        let counters = &self.start.counters;
        counters.steps.fetch_add(1, Ordering::Relaxed);
        counters.rows.fetch_add(step_rows as u64, Ordering::Relaxed);
        let took_us = u32::try_from(job.took.as_micros()).unwrap_or(u32::MAX);
        counters.step_us.fetch_add(u64::from(took_us), Ordering::Relaxed);
        for index in 0..job.sessions.len() {
            if let Err(error) = self.send_outputs(&job, index, took_us) {
                let key = job.sessions[index];
                let Some(session) = self.sessions.get(&key) else { continue };
                let (connection, wire_id) = (session.connection, session.wire_id);
                self.end(key);
                let text = format!("the model's output cannot be sent: {error}");
                self.refuse(connection, wire_id, Offence::new(SessionErrorCode::Internal, text));
            }
        }
        self.jobs.push(job);
    }

    /// Sends what one session gets out of a finished step.
    fn send_outputs(&mut self, job: &Job, index: usize, took_us: u32) -> Result<(), PackError> {
        let Some(session) = self.sessions.get(&job.sessions[index]) else { return Ok(()) };
        let (connection, wire_id) = (session.connection, session.wire_id);
        let hidden_size = self.start.bundle.hidden_size;
        let codec = session.codec;
        let arrivals = self.arrivals_of(connection);
        let mut outputs = Outputs::of(job, index, codec, hidden_size, took_us, arrivals);
        if let Some(computed) = outputs.computed() {
            self.answer(connection, wire_id, &Message::Computed(computed));
            return Ok(());
        }
        while let Some(bytes) = outputs.next_bytes() {
            // Frames of one session keep their order: once one waits, all wait.
            let buffer = if self.outbox.is_empty() { self.endpoint.buffer(bytes) } else { None };
            let waiting = match buffer {
                Some(mut body) => {
                    outputs.encode(body.body_mut())?;
                    self.endpoint
                        .send(connection, Kind::Output, wire_id, Priority::Verify, body)
                        .err()
                        .and_then(|refused| refused.body)
                        .map(|body| body.to_vec())
                }
                None => {
                    let mut body = vec![0; bytes];
                    outputs.encode(&mut body)?;
                    Some(body)
                }
            };
            if let Some(body) = waiting {
                self.outbox.push_back(Output { connection, session: wire_id, body });
            }
            outputs.advance();
        }
        Ok(())
    }

    /// What `connection` brought, and how fast, since the last time that it was told.
    fn arrivals_of(&mut self, connection: ConnectionId) -> Arrivals {
        let Some(counters) = self.endpoint.counters(connection) else { return Arrivals::default() };
        let now = (counters.traffic.arrived_bytes, counters.traffic.arrived_in);
        let (bytes, time) = self.told.insert(connection, now).unwrap_or_default();
        let us = now.1.saturating_sub(time).as_micros();
        Arrivals {
            bytes: u32::try_from(now.0.saturating_sub(bytes)).unwrap_or(u32::MAX),
            us: u32::try_from(us).unwrap_or(u32::MAX),
        }
    }

    fn flush_outbox(&mut self) {
        while let Some(output) = self.outbox.front() {
            if !self.keys.contains_key(&(output.connection, output.session)) {
                self.outbox.pop_front();
                continue;
            }
            let Some(mut body) = self.endpoint.buffer(output.body.len()) else { return };
            body.body_mut().copy_from_slice(&output.body);
            let (connection, session) = (output.connection, output.session);
            if self
                .endpoint
                .send(connection, Kind::Output, session, Priority::Verify, body)
                .is_err()
            {
                return;
            }
            self.outbox.pop_front();
        }
    }

    /// Ends a session: its waiting work is forgotten, its pages are free. A step that runs with
    /// its rows may still write those pages; whoever gets them next writes them in a later step.
    fn end(&mut self, key: SessionKey) {
        let Some(session) = self.sessions.remove(&key) else { return };
        self.scheduler.forget(key);
        self.keys.remove(&(session.connection, session.wire_id));
        self.pages.give_back(session.sequence.into_pages());
    }

    fn cancel(&mut self, key: SessionKey) {
        self.scheduler.forget(key);
        if let Some(session) = self.sessions.get_mut(&key) {
            session.cancel();
        }
    }

    fn drop_sessions_of(&mut self, connection: ConnectionId) {
        let of: Vec<_> =
            self.keys.iter().filter(|(id, _)| id.0 == connection).map(|(_, key)| *key).collect();
        for key in of {
            self.end(key);
        }
    }

    fn answer(&mut self, connection: ConnectionId, wire_id: u32, message: &Message<'_>) {
        if let Err(error) = self.endpoint.send_message(connection, wire_id, message) {
            // Its queue is full or it is gone; a peer that does not read is not waited for.
            tracing::warn!(%error, "an answer could not be queued; the connection is closed");
            self.endpoint.close(connection, CloseCode::Overload, "you do not read your answers");
        }
    }

    fn refuse(&mut self, connection: ConnectionId, wire_id: u32, offence: Offence) {
        tracing::info!(session = wire_id, code = ?offence.code, text = %offence.text, "refused");
        self.start.counters.refused.fetch_add(1, Ordering::Relaxed);
        let error = SessionError { code: offence.code, text: &offence.text };
        self.answer(connection, wire_id, &Message::SessionError(error));
    }

    fn note_gauges(&self) {
        let counters = &self.start.counters;
        counters.sessions.store(self.sessions.len() as u64, Ordering::Relaxed);
        counters.pages_free.store(self.pages.free() as u64, Ordering::Relaxed);
    }
}
