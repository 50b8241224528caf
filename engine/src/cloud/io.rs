//! The io thread: everything that arrives, what runs next, and what goes back.

mod fault;
mod plan;
mod prefix;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TryRecvError};
use hat_transport::clock::Clock;
use hat_transport::conn::Frame;
use hat_transport::frame::{Kind, Priority};
use hat_transport::link::Waker;
use hat_transport::message::{
    Arrivals, Busy, CloseCode, Dropped, Hello, Message, Open, Opened, SessionError,
};
use hat_transport::turn::{ConnectionId, Endpoint, Event};

use self::prefix::check_names;
pub(super) use self::prefix::scope_of;
use super::admission::Admission;
use super::outbox::{Guest, Output};
use super::output::Outputs;
use super::pace::Pace;
use super::rows::RowsFrame;
use super::session::Session;
use super::step::Job;
use super::violation::{SessionEnd, SessionViolation};
use super::{CloudConfig, CloudCounters};
use crate::Error;
use crate::backend::BackendFault;
use crate::pack::{Codec, PackError};
use crate::page::{PagePool, pages_for};
use crate::prefix::PrefixCache;
use crate::sched::{DeviceKey, Scheduler, SessionKey, Work};
use crate::sequence::{PENDING_ROWS_MAX, Sequence};
use crate::watch;
use crate::wire::{self, BundleFacts, KV_TYPE_F16};

/// What becomes of a session that a device wants to open.
enum Admitted {
    Open(Opened),
    /// Milliseconds.
    RetryAfter(u32),
}

/// What the io thread starts with.
pub(super) struct Start {
    pub(super) config: CloudConfig,
    pub(super) bundle: BundleFacts,
    pub(super) watch: watch::Start,
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
    /// Steps that the first stage is done with.
    pub(super) first_done: Arc<AtomicU64>,
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
        let (code, reason) = match io.serve() {
            Ok(()) => (CloseCode::ShuttingDown, "the cloud is shutting down"),
            Err(error) => {
                tracing::error!(%error, "the cloud stops");
                // The error may name files of this machine, which are no business of a device.
                (CloseCode::Internal, "the cloud has failed; its log says why")
            }
        };
        io.say_goodbye(code, reason);
    }

    fn listen(self) -> Result<(Io, SocketAddr), Error> {
        let hello = self.hello();
        let limits = self.config.limits;
        let (endpoint, address) = wire::listen(&self.config, self.clock.clone(), hello)?;
        let guard = self.watch.start(endpoint.waker())?;
        let io = Io {
            endpoint,
            guard,
            now: self.clock.now(),
            scheduler: Scheduler::new(limits.step_rows_max),
            guests: BTreeMap::new(),
            next_device: 1,
            admission: Admission::default(),
            dropped: Vec::new(),
            pages: PagePool::new(self.pages),
            prefixes: PrefixCache::default(),
            sessions: BTreeMap::new(),
            keys: BTreeMap::new(),
            next_key: 1,
            pace: Pace::default(),
            sent_steps: 0,
            step_moved: self.clock.now(),
            is_step_long: false,
            jobs: std::iter::repeat_with(Job::default).take(super::jobs_of(self.stages)).collect(),
            works: Vec::new(),
            unsent: VecDeque::new(),
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

/// The io thread's own.
pub(super) struct Io {
    pub(super) start: Start,
    pub(super) endpoint: Endpoint,
    guard: watch::Guard,
    /// When the turn at hand began.
    pub(super) now: Instant,
    scheduler: Scheduler,
    pub(super) pages: PagePool,
    prefixes: PrefixCache,
    pub(super) sessions: BTreeMap<SessionKey, Session>,
    pub(super) keys: BTreeMap<(ConnectionId, u32), SessionKey>,
    next_key: SessionKey,
    pub(super) guests: BTreeMap<ConnectionId, Guest>,
    next_device: DeviceKey,
    pub(super) admission: Admission,
    /// Connections with outputs that wait, in turn.
    pub(super) unsent: VecDeque<ConnectionId>,
    dropped: Vec<Dropped>,
    pace: Pace,
    /// Steps that went to the first stage.
    sent_steps: u64,
    /// When a step ended, or began while none was on its way.
    step_moved: Instant,
    /// The last of them takes so long that planning the next one ahead saves little.
    is_step_long: bool,
    jobs: Vec<Job>,
    works: Vec<Work>,
    /// Moves of commits that came on their own, for the next step.
    moves: Vec<crate::backend::RowMove>,
}

/// Frames that one device may have in chunks whose end has not come: one of its many sessions has
/// a few. The buffers are everybody's.
const BEGUN_FRAMES_MAX: usize = 512;

/// Turns of the link for the last frames of a cloud that ends, and the time of each at most.
const LAST_TURNS: usize = 10;
const LAST_TURN_TIME: Duration = Duration::from_millis(20);

impl Io {
    /// Tells every device that the connection is over, so that it comes back instead of waiting
    /// for the silence to be long enough.
    fn say_goodbye(&mut self, code: CloseCode, reason: &str) {
        let connections: Vec<_> = self.guests.keys().copied().collect();
        for connection in &connections {
            self.endpoint.close(*connection, code, reason);
        }
        let mut events = Vec::new();
        for _ in 0..if connections.is_empty() { 0 } else { LAST_TURNS } {
            if self.endpoint.turn(Some(LAST_TURN_TIME), &mut events).is_err() {
                return; // the link has failed, and the sockets close with it
            }
            events.clear();
        }
    }

    fn serve(&mut self) -> std::io::Result<()> {
        let mut events = Vec::new();
        while !self.start.stop.load(Ordering::Acquire) {
            let timeout = self.outbox_retry().into_iter().chain(self.stuck_in()).min();
            self.endpoint.turn(timeout, &mut events)?;
            self.now = self.start.clock.now();
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
            self.look_for_stuck_step();
            if let Some(fault) = self.start.fault.get() {
                return Err(std::io::Error::other(fault.clone()));
            }
            if let Some(reason) = self.guard.changed() {
                return Err(std::io::Error::other(reason.to_owned()));
            }
            self.flush_outboxes();
            if self.guard.is_clear() {
                self.plan();
            }
            self.note_gauges();
        }
        Ok(())
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Up { connection, hello, resumed, .. } => {
                self.guard.look();
                let frame_bytes_max = wire::frame_bytes_max(&hello);
                if !resumed {
                    self.drop_sessions_of(connection);
                    let guest = Guest::new(self.next_device);
                    self.next_device += 1;
                    self.guests.insert(connection, guest);
                }
                if let Some(guest) = self.guests.get_mut(&connection) {
                    guest.frame_bytes_max = frame_bytes_max;
                }
                self.set_up(connection, true);
                if let Err(reason) = wire::check_peer(&self.start.hello(), &hello) {
                    tracing::info!(%reason, "connection refused");
                    self.start.counters.refused.fetch_add(1, Ordering::Relaxed);
                    self.endpoint.close(connection, CloseCode::Incompatible, &reason);
                }
            }
            Event::Frame { connection, frame } => self.take_frame(connection, frame),
            Event::Down { connection, reason, .. } => {
                tracing::info!(%reason, "connection down");
                self.set_up(connection, false);
            }
            Event::Gone { connection, error } => {
                tracing::info!(%error, "connection gone");
                self.drop_sessions_of(connection);
                if let Some(guest) = self.guests.remove(&connection) {
                    self.admission.forget(guest.device);
                }
            }
            _ => {}
        }
    }

    fn set_up(&mut self, connection: ConnectionId, is_up: bool) {
        if let Some(guest) = self.guests.get_mut(&connection) {
            guest.is_up = is_up;
        }
    }

    fn take_frame(&mut self, connection: ConnectionId, frame: Frame) {
        let (wire_id, kind) = (frame.session, frame.kind);
        let key = self.keys.get(&(connection, wire_id)).copied();
        let taken = match (kind, key) {
            (Kind::Open, _) => return self.take_open(connection, &frame),
            // An END may cross the error that ended the session; it needs no second answer.
            (Kind::End, None) => return,
            (_, None) => {
                let violation = SessionViolation::NoSession { session: wire_id };
                return self.refuse(connection, wire_id, &violation.into());
            }
            (_, Some(key)) => (key, self.take_of_session(key, frame)),
        };
        if let (key, Err(violation)) = taken {
            self.end_for(key, violation);
        }
    }

    fn take_open(&mut self, connection: ConnectionId, frame: &Frame) {
        let wire_id = frame.session;
        let admitted = match Message::decode(frame.kind, &frame.body) {
            Ok(Message::Open(open)) => self.admit(connection, wire_id, &open),
            Ok(_) => Err(SessionViolation::Unexpected { kind: frame.kind }),
            Err(error) => Err(error.into()),
        };
        match admitted {
            Ok(Admitted::Open(opened)) => {
                self.answer(connection, wire_id, &Message::Opened(opened));
            }
            Ok(Admitted::RetryAfter(retry_after_ms)) => {
                self.start.counters.busy.fetch_add(1, Ordering::Relaxed);
                self.answer(connection, wire_id, &Message::Busy(Busy { retry_after_ms }));
            }
            Err(violation) => self.refuse(connection, wire_id, &violation.into()),
        }
    }

    /// Takes a frame of a session that is open.
    fn take_of_session(&mut self, key: SessionKey, frame: Frame) -> Result<(), SessionViolation> {
        let session = self.sessions.get_mut(&key).expect("keys and sessions agree");
        session.active_at = self.now;
        let (connection, wire_id) = (session.connection, session.wire_id);
        if frame.kind == Kind::Cancel {
            self.cancel(key);
            self.answer(connection, wire_id, &Message::Cancelled);
            return Ok(());
        }
        match Message::decode(frame.kind, &frame.body)? {
            Message::Rows(rows) => {
                let head = rows.head;
                self.take_rows(key, RowsFrame::new(frame, head))
            }
            Message::Commit(commit) => session.take_commit(commit.row, &mut self.moves),
            Message::End(end) => {
                self.end_named(key, &end)?;
                self.answer(connection, wire_id, &Message::Ended);
                Ok(())
            }
            _ => Err(SessionViolation::Unexpected { kind: frame.kind }),
        }
    }

    /// Opens a session, or says when there may be room for it.
    fn admit(
        &mut self,
        connection: ConnectionId,
        wire_id: u32,
        open: &Open<'_>,
    ) -> Result<Admitted, SessionViolation> {
        if wire_id == 0 || self.keys.contains_key(&(connection, wire_id)) {
            return Err(SessionViolation::Taken { session: wire_id });
        }
        let layers = u32::from(open.entry_layer)..u32::from(open.exit_layer);
        wire::check_layers(layers, &self.start.bundle.layers)
            .map_err(|reason| SessionViolation::Layers { reason })?;
        let codec = Codec::from_id(open.codec).ok_or(SessionViolation::Codec { id: open.codec })?;
        let frame_bytes_max = self.guests.get(&connection).map_or(0, |guest| guest.frame_bytes_max);
        wire::check_row(codec.down(), self.start.bundle.hidden_size, frame_bytes_max)
            .map_err(|reason| SessionViolation::RowTooLong { reason })?;
        let (asked, here) = (open.arithmetic_id, self.start.arithmetic_id);
        let (kv_type, kv_type_here) = (open.kv_type, KV_TYPE_F16);
        if asked != here || kv_type != kv_type_here {
            return Err(SessionViolation::Arithmetic { asked, kv_type, here, kv_type_here });
        }
        let max = self.start.bundle.context.min(self.start.config.limits.context_max);
        if open.rows_max == 0 || open.rows_max > max {
            return Err(SessionViolation::Context { asked: open.rows_max, max });
        }
        check_names(open)?;
        let wanted = pages_for(open.rows_max as usize + PENDING_ROWS_MAX);
        if !self.make_room(connection, wanted) {
            return Ok(Admitted::RetryAfter(self.retry_after_ms(connection, wanted)));
        }
        let (pages, held) = self.reserve(open, wanted);
        let key = self.next_key;
        self.next_key += 1;
        let sequence = Sequence::on_held(pages, open.rows_max, held);
        let session = Session::new(key, connection, wire_id, codec, open, sequence, self.now);
        self.sessions.insert(key, session);
        self.keys.insert((connection, wire_id), key);
        if let Some(guest) = self.guests.get_mut(&connection) {
            guest.sessions += 1;
            self.admission.forget(guest.device);
        }
        self.start.counters.opened.fetch_add(1, Ordering::Relaxed);
        let pages = u16::try_from(held).expect("at most as many as one frame names");
        Ok(Admitted::Open(Opened { pages }))
    }

    fn take_rows(&mut self, key: SessionKey, rows: RowsFrame) -> Result<(), SessionViolation> {
        let session = self.sessions.get_mut(&key).expect("keys and sessions agree");
        let (hidden_size, rows_max) = (self.start.bundle.hidden_size, self.scheduler.rows_max());
        let (connection, wire_id) = (session.connection, session.wire_id);
        let begun = session.gathering.frames.len();
        let mut dropped = std::mem::take(&mut self.dropped);
        let taken = session.take_rows(self.now, rows, hidden_size, rows_max, &mut dropped);
        if let Ok(true) = taken {
            // The scheduler may have heard of a chunk that is no longer there.
            session.is_queued = false;
            self.scheduler.forget(key);
        }
        for rows in dropped.drain(..) {
            self.start.counters.dropped.fetch_add(u64::from(rows.count), Ordering::Relaxed);
            self.answer(connection, wire_id, &Message::Dropped(rows));
        }
        self.dropped = dropped;
        taken?;
        self.note_begun(key, begun)?;
        self.enqueue_next(key);
        Ok(())
    }

    /// A session had `before` frames of a chunk whose end has not come, and has others now.
    fn note_begun(&mut self, key: SessionKey, before: usize) -> Result<(), SessionViolation> {
        let session = &self.sessions[&key];
        let guest = self.guests.get_mut(&session.connection).expect("a session has a connection");
        guest.begun_frames = guest.begun_frames - before + session.gathering.frames.len();
        if guest.begun_frames <= BEGUN_FRAMES_MAX {
            return Ok(());
        }
        Err(SessionViolation::Begun { frames_max: BEGUN_FRAMES_MAX })
    }

    /// Sends back what a finished step computed.
    fn finish(&mut self, mut job: Job) {
        self.step_moved = self.now;
        if let Some(fault) = job.fault.take() {
            self.close_all(fault);
        }
        let step_rows = job.step.plan.rows();
        let counters = &self.start.counters;
        counters.steps.fetch_add(1, Ordering::Relaxed);
        counters.rows.fetch_add(step_rows as u64, Ordering::Relaxed);
        let took_us = u32::try_from(job.took.as_micros()).unwrap_or(u32::MAX);
        self.pace.note_step(step_rows, job.attended, job.urgent_rows, job.took);
        counters.step_us.fetch_add(u64::from(took_us), Ordering::Relaxed);
        for index in 0..job.sessions.len() {
            if let Some(session) = self.sessions.get_mut(&job.sessions[index]) {
                session.in_flight -= 1;
                session.active_at = self.now;
            }
            if let Err(error) = self.send_outputs(&job, index, took_us) {
                let key = job.sessions[index];
                let Some(session) = self.sessions.get(&key) else { continue };
                // Its rows may be no numbers from an early page on: nobody shall go on from them.
                self.prefixes.forget(&mut self.pages, session.sequence.pages());
                self.end_for(key, SessionEnd::Output(error));
            }
        }
        self.jobs.push(job);
    }

    /// Sends what one session gets out of a finished step.
    fn send_outputs(&mut self, job: &Job, index: usize, took_us: u32) -> Result<(), PackError> {
        let Some(session) = self.sessions.get_mut(&job.sessions[index]) else { return Ok(()) };
        let (connection, wire_id) = (session.connection, session.wire_id);
        let hidden_size = self.start.bundle.hidden_size;
        let codec = session.codec;
        let rows = &job.rows[index];
        let step = (took_us, u32::try_from(job.step.plan.rows()).expect("within the row budget"));
        let goes_back = !rows.wanted.is_empty();
        if goes_back {
            self.pace.note_decoder(job.sessions[index], self.now);
        }
        let spent = session.note_ran(&rows.planned, goes_back, job.queue_us(index), step);
        let Some(spent) = spent else { return Ok(()) };
        let arrivals = self.arrivals_of(connection);
        let frame_bytes_max = self.guests.get(&connection).map_or(0, |guest| guest.frame_bytes_max);
        let sizes = (hidden_size, frame_bytes_max);
        let mut outputs = Outputs::of(job, index, codec, sizes, spent, arrivals);
        if let Some(computed) = outputs.computed() {
            self.answer(connection, wire_id, &Message::Computed(computed));
            return Ok(());
        }
        while let Some(bytes) = outputs.next_bytes() {
            // Frames of one session keep their order: once one waits, all of its device wait.
            let waits = self.guests.get(&connection).is_some_and(Guest::has_outputs);
            let buffer = if waits { None } else { self.endpoint.buffer(bytes) };
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
                self.keep_output(connection, Output { session: wire_id, body });
            }
            outputs.advance();
        }
        Ok(())
    }

    /// What `connection` brought, and how fast, since the last time that it was told.
    fn arrivals_of(&mut self, connection: ConnectionId) -> Arrivals {
        let Some(counters) = self.endpoint.counters(connection) else { return Arrivals::default() };
        let now = (counters.traffic.arrived_bytes, counters.traffic.arrived_in);
        let Some(guest) = self.guests.get_mut(&connection) else { return Arrivals::default() };
        let (bytes, time) = std::mem::replace(&mut guest.told, now);
        let us = now.1.saturating_sub(time).as_micros();
        Arrivals {
            bytes: u32::try_from(now.0.saturating_sub(bytes)).unwrap_or(u32::MAX),
            us: u32::try_from(us).unwrap_or(u32::MAX),
        }
    }

    /// Ends a session: its waiting work is forgotten, its pages are free. A step that runs with
    /// its rows may still write those pages; whoever gets them next writes them in a later step.
    pub(super) fn end(&mut self, key: SessionKey) {
        let Some(session) = self.sessions.remove(&key) else { return };
        self.scheduler.forget(key);
        self.pace.forget(key);
        self.admission.note_life(self.now.saturating_duration_since(session.opened_at));
        if let Some(guest) = self.guests.get_mut(&session.connection) {
            guest.sessions -= 1;
            guest.begun_frames -= session.gathering.frames.len();
        }
        self.keys.remove(&(session.connection, session.wire_id));
        self.pages.give_back(session.sequence.into_pages());
    }

    fn cancel(&mut self, key: SessionKey) {
        self.scheduler.forget(key);
        self.pace.forget(key);
        if let Some(session) = self.sessions.get_mut(&key) {
            if let Some(guest) = self.guests.get_mut(&session.connection) {
                guest.begun_frames -= session.gathering.frames.len();
            }
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

    /// Ends a session and tells its device why.
    pub(super) fn end_for(&mut self, key: SessionKey, why: impl Into<SessionEnd>) {
        let Some(session) = self.sessions.get(&key) else { return };
        let (connection, wire_id) = (session.connection, session.wire_id);
        self.end(key);
        self.refuse(connection, wire_id, &why.into());
    }

    fn refuse(&mut self, connection: ConnectionId, wire_id: u32, why: &SessionEnd) {
        let (code, text) = (why.code(), why.to_string());
        // A fault is everybody's, and is told once.
        if !matches!(why, SessionEnd::Fault(_)) {
            tracing::info!(session = wire_id, ?code, %text, "refused");
            self.start.counters.refused.fetch_add(1, Ordering::Relaxed);
        }
        let error = SessionError { code, text: &text };
        self.answer(connection, wire_id, &Message::SessionError(error));
    }

    fn note_gauges(&self) {
        let counters = &self.start.counters;
        counters.sessions.store(self.sessions.len() as u64, Ordering::Relaxed);
        let (free, idle) = (self.pages.free() as u64, self.pages.idle() as u64);
        counters.pages_free.store(free + idle, Ordering::Relaxed);
        counters.pages_idle.store(idle, Ordering::Relaxed);
    }
}
