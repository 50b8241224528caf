//! The cloud's state machine: sessions, scheduler, pages, and the frames that go back. It has no
//! link, no clock, no channel and no thread: a shell says what happened and when, and asks what is
//! to be done.
//!
//! Whoever runs steps brings each [`StepBatch`] back exactly once, in the order in which they were
//! handed out, also one that was not computed, and lets the rows of one be written to the KV store
//! before those of the next. On that rest pages that are given back while a step may still write
//! them, pages that are named when their rows are planned, and moves that ride with the next step.

mod admission;
mod batch;
mod clients;
mod pace;
mod planner;
mod prune;
mod rows;
mod session;
mod sessions;
mod steps;
#[cfg(test)]
mod tests;
mod violation;

use std::time::{Duration, Instant};

use hat_plan::BackendFault;
use hat_transport::conn::{ConnectionId, Frame, FrameSink, Traffic};
use hat_transport::frame::Kind;
use hat_transport::message::{Busy, CloseCode, End, Hello, KV_F16, Message, Open, Opened};
use hat_transport::planted::{Fault, Planted};

use self::admission::Admission;
pub use self::batch::StepBatch;
use self::clients::Clients;
pub use self::clients::SEND_QUEUE_BYTES_MAX;
use self::planner::Planner;
use self::prune::Pruning;
use self::rows::RowsFrame;
use self::session::{Session, check_names, scope_of};
use self::sessions::Sessions;
use self::violation::{SessionEnd, SessionViolation};
use crate::page::pages_for;
use crate::prefix::PageStore;
use crate::sched::{BatchItem, SessionKey};
use crate::sequence::{PENDING_ROWS_MAX, Sequence};
use crate::wire;
use hat_transport::codec::Codec;

/// Frames that one device may have in chunks whose end has not come: one of its many sessions has
/// a few. The buffers are everybody's.
const BEGUN_FRAMES_MAX: usize = 512;

/// Bounds and times of a cloud. The row budget of a step is in its HELLO.
#[derive(Clone, Copy, Debug)]
pub struct CloudCoreConfig {
    /// Sessions open at once.
    pub sessions_max: u32,
    /// Sessions of one connection at once.
    pub sessions_per_device_max: u32,
    /// Positions of one session.
    pub context_max: u32,
    /// Silence after which a session gives way to others, and time in which a device has to take
    /// some of its outputs once its queue is full.
    pub idle_after: Duration,
    /// Time in which a step has to end.
    pub step_within: Duration,
}

/// News of a connection.
#[derive(Clone, Copy, Debug)]
pub enum LinkEvent {
    /// Frames flow. Unless it is `resumed`, the sessions of before are over.
    Up {
        /// The HELLO of the device.
        hello: Hello,
        /// True if its sessions are those of before.
        resumed: bool,
    },
    /// The connection has no socket; it may come back.
    Down,
    /// The connection is over.
    Gone,
}

/// Counters of a cloud, over its life. All only grow, but `sessions`, `pages_free` and
/// `pages_idle`, which are what they are now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CloudFigures<T = u64> {
    /// Steps run.
    pub steps: T,
    /// Rows run.
    pub rows: T,
    /// Microseconds spent in steps.
    pub step_us: T,
    /// Sessions opened.
    pub opened: T,
    /// Sessions and connections refused or ended for something that the peer did.
    pub refused: T,
    /// Idle sessions ended for the sake of others.
    pub evicted: T,
    /// Devices told to come back later.
    pub busy: T,
    /// Rows not computed, since their device had gone another way before their step.
    pub dropped: T,
    /// Sessions open now.
    pub sessions: T,
    /// KV pages that a new session can have now, those that are kept for others included.
    pub pages_free: T,
    /// Steps that a backend did not compute.
    pub faults: T,
    /// Free pages whose rows are kept: a session that names them need not upload those.
    pub pages_idle: T,
    /// Pages that sessions found when they opened.
    pub pages_reused: T,
}

impl<T> CloudFigures<T> {
    /// Joins each figure with the other's of the same name.
    pub fn zip<U, V>(
        &self,
        other: &CloudFigures<U>,
        join: impl Fn(&T, &U) -> V,
    ) -> CloudFigures<V> {
        CloudFigures {
            steps: join(&self.steps, &other.steps),
            rows: join(&self.rows, &other.rows),
            step_us: join(&self.step_us, &other.step_us),
            opened: join(&self.opened, &other.opened),
            refused: join(&self.refused, &other.refused),
            evicted: join(&self.evicted, &other.evicted),
            busy: join(&self.busy, &other.busy),
            dropped: join(&self.dropped, &other.dropped),
            sessions: join(&self.sessions, &other.sessions),
            pages_free: join(&self.pages_free, &other.pages_free),
            faults: join(&self.faults, &other.faults),
            pages_idle: join(&self.pages_idle, &other.pages_idle),
            pages_reused: join(&self.pages_reused, &other.pages_reused),
        }
    }
}

/// The cloud's side of the protocol, for any number of connections.
pub struct CloudCore {
    config: CloudCoreConfig,
    /// HELLO of this cloud.
    hello: Hello,
    clients: Clients,
    sessions: Sessions,
    pages: PageStore,
    admission: Admission,
    planner: Planner,
    begun_frames_max: usize,
    figures: CloudFigures,
    /// A fault that lasts, until it is told.
    fault: Option<BackendFault>,
    /// A fault, in tests.
    planted: Planted,
    pruning: Pruning,
    /// Reused from step to step.
    items: Vec<BatchItem>,
}

impl CloudCore {
    /// A cloud that says `hello`, with a KV store of this many pages; `figures` are of the runs
    /// before this one.
    pub fn new(config: CloudCoreConfig, hello: Hello, pages: u32, figures: CloudFigures) -> Self {
        Self {
            config,
            hello,
            clients: Clients::default(),
            sessions: Sessions::default(),
            pages: PageStore::new(pages as usize),
            admission: Admission::default(),
            planner: Planner::new(&hello),
            begun_frames_max: BEGUN_FRAMES_MAX,
            figures,
            fault: None,
            planted: Planted::default(),
            pruning: Pruning::default(),
            items: Vec::new(),
        }
    }

    /// Does this wrong from now on, in tests.
    pub fn plant(&mut self, planted: Planted) {
        self.planted = planted;
    }

    /// A connection came up, broke, or is over.
    pub fn handle_link(&mut self, now: Instant, from: ConnectionId, event: LinkEvent) {
        match event {
            LinkEvent::Up { hello, resumed } => {
                if !resumed {
                    self.drop_sessions_of(now, from);
                    self.clients.admit(from);
                }
                self.clients.set_up(from, Some(wire::frame_bytes_max(&hello)));
                if let Err(reason) = wire::check_peer(&self.hello, &hello) {
                    tracing::info!(%reason, "connection refused");
                    self.figures.refused += 1;
                    self.clients.close(from, CloseCode::Incompatible, reason);
                }
            }
            LinkEvent::Down => self.clients.set_up(from, None),
            LinkEvent::Gone => {
                self.drop_sessions_of(now, from);
                if let Some(device) = self.clients.remove(from) {
                    self.admission.forget(device);
                }
            }
        }
    }

    /// A frame of a connection that is up.
    pub fn handle_frame(&mut self, now: Instant, from: ConnectionId, frame: Frame) {
        if !self.clients.listens_to(from) {
            return;
        }
        let (wire_id, kind) = (frame.session, frame.kind);
        match (kind, self.sessions.key(from, wire_id)) {
            (Kind::Open, _) => {
                if let Err(violation) = self.take_open(now, from, &frame) {
                    self.refuse(from, wire_id, &violation.into());
                }
            }
            (_, Some(key)) => {
                if let Err(violation) = self.take_of_session(now, key, frame) {
                    self.end_for(now, key, violation);
                }
            }
            // An END may cross the error that ended the session; it needs no second answer.
            (Kind::End, None) => {}
            (_, None) => {
                let violation = SessionViolation::NoSession { session: wire_id };
                self.refuse(from, wire_id, &violation.into());
            }
        }
    }

    /// Counters of a connection, for [`Self::handle_step`] to tell its device of.
    pub fn handle_traffic(&mut self, from: ConnectionId, traffic: &Traffic) {
        self.clients.note_traffic(from, traffic);
    }

    /// Writes what is to go out: answers, and outputs that waited.
    pub fn poll_transmit(&mut self, now: Instant, sink: &mut dyn FrameSink) {
        let idle_after = self.config.idle_after;
        loop {
            let sessions = &self.sessions;
            let is_open = |to, session| sessions.key(to, session).is_some();
            let too_long = self.clients.flush(now, idle_after, &is_open, sink);
            let Some((to, session)) = too_long else { break };
            if let Some(key) = self.sessions.key(to, session) {
                self.end_for(now, key, SessionEnd::TooLong);
            }
        }
        self.clients.send_answers(sink);
    }

    /// A connection that is to be closed.
    pub fn poll_close(&mut self) -> Option<(ConnectionId, CloseCode, String)> {
        self.clients.closes.pop_front()
    }

    /// A fault that lasts: nothing is computed any more. A step that does not end is one.
    pub fn poll_fault(&mut self, now: Instant) -> Option<BackendFault> {
        let within = self.config.step_within;
        if self.fault.is_none() && self.planner.stuck_at(within).is_some_and(|at| at <= now) {
            let seconds = within.as_secs_f32();
            let reason = format!("a step has not ended within {seconds} s: the backend hangs");
            tracing::error!(reason, "the cloud computes nothing");
            return Some(BackendFault { backend: "cloud", reason, lasts: true });
        }
        self.fault.take()
    }

    /// Time at which [`Self::poll_transmit`] and [`Self::poll_fault`] are to be called again, if
    /// nothing happens before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let stuck_at = self.planner.stuck_at(self.config.step_within);
        self.clients.retry_at.into_iter().chain(stuck_at).min()
    }

    /// Totals so far, and the present state.
    pub fn figures(&self) -> CloudFigures {
        let refused = self.figures.refused + self.clients.sent_away;
        let pool = &self.pages.pool;
        CloudFigures {
            refused,
            sessions: self.sessions.len() as u64,
            pages_free: pool.available() as u64,
            pages_idle: pool.idle() as u64,
            ..self.figures
        }
    }

    /// Connections that are not over.
    pub fn connections(&self) -> impl Iterator<Item = ConnectionId> {
        self.clients.connections()
    }

    fn take_open(
        &mut self,
        now: Instant,
        from: ConnectionId,
        frame: &Frame,
    ) -> Result<(), SessionViolation> {
        let Message::Open(open) = Message::decode(frame.kind, &frame.body)? else {
            return Err(SessionViolation::Unexpected { kind: frame.kind });
        };
        let codec = self.check_open(from, frame.session, &open)?;
        let wanted = pages_for(open.rows_max as usize + PENDING_ROWS_MAX);
        if !self.make_room(now, from, wanted) {
            let retry_after_ms = self.retry_after_ms(now, from, wanted);
            self.figures.busy += 1;
            self.clients.answer(from, frame.session, Message::Busy(Busy { retry_after_ms }));
            return Ok(());
        }
        let admitted = self.pages.admit(scope_of(&open), open.pages, wanted);
        let (pages, held) = admitted.expect("there is room");
        let sequence = Sequence::on_cached(pages, open.rows_max, held);
        self.sessions.insert(Session::new(from, frame.session, codec, &open, sequence, now));
        if let Some(device) = self.clients.device(from) {
            self.admission.forget(device);
        }
        self.figures.opened += 1;
        self.figures.pages_reused += held as u64;
        let pages = u16::try_from(held).expect("at most as many as one frame names");
        self.clients.answer(from, frame.session, Message::Opened(Opened { pages }));
        Ok(())
    }

    /// Checks that a session can be had as asked for, apart from room; gives its codec.
    fn check_open(
        &self,
        from: ConnectionId,
        wire_id: u32,
        open: &Open<'_>,
    ) -> Result<Codec, SessionViolation> {
        if wire_id == 0 || self.sessions.key(from, wire_id).is_some() {
            return Err(SessionViolation::Taken { session: wire_id });
        }
        let layers = |entry: u16, exit: u16| u32::from(entry)..u32::from(exit);
        let held = layers(self.hello.entry_layer, self.hello.exit_layer);
        wire::check_layers(layers(open.entry_layer, open.exit_layer), &held)
            .map_err(|reason| SessionViolation::Layers { reason })?;
        let codec = Codec::from_id(open.codec).ok_or(SessionViolation::Codec { id: open.codec })?;
        let frame_bytes_max = self.clients.frame_bytes_max(from);
        wire::check_row(codec.down(), self.hidden_size(), frame_bytes_max)
            .map_err(|reason| SessionViolation::RowTooLong { reason })?;
        let (asked, here) = (open.arithmetic_id, self.hello.arithmetic_id);
        let (kv_type, kv_type_here) = (open.kv_type, KV_F16);
        if asked != here || kv_type != kv_type_here {
            return Err(SessionViolation::Arithmetic { asked, kv_type, here, kv_type_here });
        }
        let max = self.config.context_max;
        if open.rows_max == 0 || open.rows_max > max {
            return Err(SessionViolation::Context { asked: open.rows_max, max });
        }
        check_names(open)?;
        Ok(codec)
    }

    /// A frame of a session that is open.
    fn take_of_session(
        &mut self,
        now: Instant,
        key: SessionKey,
        frame: Frame,
    ) -> Result<(), SessionViolation> {
        let session = self.sessions.session(key);
        session.active_at = now;
        let (from, wire_id) = (session.connection, session.wire_id);
        if frame.kind == Kind::Cancel {
            session.cancel();
            self.planner.forget(key);
            self.clients.answer(from, wire_id, Message::Cancelled);
            return Ok(());
        }
        match Message::decode(frame.kind, &frame.body)? {
            Message::Rows(rows) => {
                let head = rows.head;
                self.take_rows(now, key, RowsFrame::new(frame, head))
            }
            Message::Commit(commit) => session.take_commit(commit.row, &mut self.planner.moves),
            Message::End(end) => {
                self.take_end(now, key, &end)?;
                self.clients.answer(from, wire_id, Message::Ended);
                Ok(())
            }
            _ => Err(SessionViolation::Unexpected { kind: frame.kind }),
        }
    }

    fn take_rows(
        &mut self,
        now: Instant,
        key: SessionKey,
        mut rows: RowsFrame,
    ) -> Result<(), SessionViolation> {
        let (hidden_size, rows_max) = (self.hidden_size(), self.hello.row_budget);
        let session = self.sessions.session(key);
        let (from, wire_id, begins) = (session.connection, session.wire_id, rows.head.more);
        if self.planted.is(Fault::EarlyCommit) && rows.head.commit != 0 {
            let commit = std::mem::take(&mut rows.head.commit);
            session.sequence.commit(commit, &mut self.planner.moves)?;
        }
        let taken = session.take_rows(now, rows, hidden_size, rows_max, &mut self.pruning);
        if let Ok(true) = taken {
            // The scheduler may have heard of a chunk that is no longer there.
            self.planner.scheduler.forget(key);
        }
        for rows in self.pruning.dropped.drain(..) {
            self.figures.dropped += u64::from(rows.count);
            self.clients.answer(from, wire_id, Message::Dropped(rows));
        }
        taken?;
        if begins && self.sessions.begun_frames(from) > self.begun_frames_max {
            return Err(SessionViolation::Begun { frames_max: self.begun_frames_max });
        }
        self.enqueue_next(now, key);
        Ok(())
    }

    /// A device is done with a session: its pages may be kept under the names that it gives.
    fn take_end(
        &mut self,
        now: Instant,
        key: SessionKey,
        end: &End<'_>,
    ) -> Result<(), SessionViolation> {
        let session = self.sessions.session(key);
        if end.commit != 0 {
            session.take_commit(end.commit, &mut self.planner.moves)?;
        }
        let full = session.sequence.full_pages().min(end.pages.len());
        self.pages.keep(session.scope, &end.pages[..full], session.sequence.pages());
        self.end(now, key);
        Ok(())
    }

    /// Makes room for a session of this many pages; returns true if there is.
    fn make_room(&mut self, now: Instant, from: ConnectionId, pages: usize) -> bool {
        let Some(device) = self.clients.device(from) else { return false };
        let sessions = self.sessions.count_of(from);
        if sessions >= self.config.sessions_per_device_max {
            return false;
        }
        let kept = self.admission.kept_from(now, device, sessions);
        let wanted = admission::Room {
            pages: pages + kept.unwrap_or(0),
            places: 1 + usize::from(kept.is_some()),
        };
        // Pages that are kept for prompts to come give way before any session does.
        let room = self.room();
        if room.holds(wanted) {
            return true;
        }
        let idle_after = self.config.idle_after;
        let is_up = |connection| self.clients.is_up(connection);
        let idle = admission::idle_sessions(&self.sessions, now, idle_after, is_up);
        let in_idle: usize = idle.iter().map(|session| session.pages).sum();
        let all = admission::Room { pages: room.pages + in_idle, places: room.places + idle.len() };
        if !all.holds(wanted) {
            return false; // no session ends in vain
        }
        for session in idle {
            if self.room().holds(wanted) {
                break;
            }
            self.figures.evicted += 1;
            let silent = now.saturating_duration_since(session.active_at);
            self.end_for(now, session.key, SessionEnd::Evicted { silent });
        }
        self.room().holds(wanted)
    }

    /// Pages and places that are free.
    fn room(&self) -> admission::Room {
        let sessions_max = self.config.sessions_max as usize;
        let places = sessions_max.saturating_sub(self.sessions.len());
        admission::Room { pages: self.pages.pool.available(), places }
    }

    /// Retry time for a device that finds no room for a session of `pages` pages.
    fn retry_after_ms(&mut self, now: Instant, from: ConnectionId, pages: usize) -> u32 {
        let device = self.clients.device(from).unwrap_or(0);
        let sessions = self.sessions.count_of(from);
        let mut retry = self.admission.next_retry(now, self.sessions.len());
        // Whoever has all it may have waits for itself, and is in nobody's line.
        if sessions < self.config.sessions_per_device_max {
            retry = self.admission.refuse(now, device, pages, sessions, retry);
        }
        u32::try_from(retry.as_millis()).unwrap_or(u32::MAX)
    }

    fn drop_sessions_of(&mut self, now: Instant, connection: ConnectionId) {
        for key in self.sessions.keys_of(connection) {
            self.end(now, key);
        }
    }

    /// Ends a session and tells its device why.
    fn end_for(&mut self, now: Instant, key: SessionKey, why: impl Into<SessionEnd>) {
        let Some((connection, wire_id)) = self.end(now, key) else { return };
        self.refuse(connection, wire_id, &why.into());
    }

    /// Ends a session: its waiting work is forgotten, its pages are free. A step that runs with
    /// its rows may still write those pages; whoever gets them next writes them in a later step.
    fn end(&mut self, now: Instant, key: SessionKey) -> Option<(ConnectionId, u32)> {
        let session = self.sessions.remove(key)?;
        self.planner.forget(key);
        self.admission.note_life(now.saturating_duration_since(session.opened_at));
        if self.planted.is(Fault::PagesTwice) {
            self.pages.pool.give_back(session.sequence.pages().to_vec());
        }
        self.pages.pool.give_back(session.sequence.into_pages());
        Some((session.connection, session.wire_id))
    }

    /// Tells a device that a session is not, or no longer, open.
    fn refuse(&mut self, connection: ConnectionId, wire_id: u32, why: &SessionEnd) {
        let (code, text) = (why.code(), why.to_string());
        // A fault is everybody's, and is told once.
        if !matches!(why, SessionEnd::Fault(_)) {
            tracing::info!(session = wire_id, ?code, %text, "refused");
            self.figures.refused += 1;
        }
        self.clients.answer_error(connection, wire_id, code, text);
    }

    fn hidden_size(&self) -> usize {
        self.hello.hidden_size as usize
    }
}
