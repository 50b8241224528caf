//! A cloud core, and hands that move time, frames and steps.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hat_plan::BackendFault;
use hat_transport::conn::{ConnectionId, Frame, Traffic};
use hat_transport::frame::{Kind, Priority};
use hat_transport::message::{
    Hello, Message, Open, PageId, Role, RowsHead, SessionErrorCode, Want,
};

use super::super::{CloudCore, CloudCoreConfig, CloudFigures, LinkEvent, StepBatch};
use super::ledger::{HIDDEN, Ledger};
use crate::sink::TestSink;
use crate::wire;

pub(super) const MS: Duration = Duration::from_millis(1);

/// Event that a device hears.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Heard {
    Opened(u16),
    Busy(u32),
    /// Row ids, and what they came back as.
    Rows(Vec<(u32, u32)>),
    Computed(u32, u16),
    Dropped(u32, u16),
    Ended,
    Cancelled,
    Error(SessionErrorCode),
}

impl Heard {
    fn of(frame: &Frame) -> Self {
        match Message::decode(frame.kind, &frame.body).unwrap() {
            Message::Opened(opened) => Self::Opened(opened.pages),
            Message::Busy(busy) => Self::Busy(busy.retry_after_ms),
            Message::Output(output) => {
                let rows = output.payload.chunks_exact(HIDDEN * 4);
                let digest = |row: &[u8]| f32::from_le_bytes(row[..4].try_into().unwrap()) as u32;
                Self::Rows(output.ids.iter().zip(rows.map(digest)).collect())
            }
            Message::Computed(of) => Self::Computed(of.first_id, of.count),
            Message::Dropped(of) => Self::Dropped(of.first_id, of.count),
            Message::Ended => Self::Ended,
            Message::Cancelled => Self::Cancelled,
            Message::SessionError(error) => Self::Error(error.code),
            other => panic!("a cloud does not send {other:?}"),
        }
    }
}

/// Everything that a history needs.
pub(super) struct Bed {
    pub(super) core: CloudCore,
    pub(super) sink: TestSink,
    pub(super) out: VecDeque<StepBatch>,
    /// Of these, steps that the first stage is not done with.
    pub(super) at_first: u64,
    start: Instant,
    pub(super) now: Duration,
    /// None where nobody reads what comes back.
    pub(super) model: Option<Ledger>,
    connections: u64,
}

pub(super) fn hello(role: Role) -> Hello {
    let own = wire::hello(role, [7; 32], HIDDEN, 1..4);
    match role {
        Role::Device => own,
        Role::Cloud => Hello { row_budget: 160, stages: 2, ..own },
    }
}

impl Bed {
    pub(super) fn new() -> Self {
        Self::with(1000, |_| {})
    }

    /// With this many pages, of one prompt of 64 rows and what may pend four a session.
    pub(super) fn with(pages: u32, edit: impl FnOnce(&mut CloudCoreConfig)) -> Self {
        let mut config = CloudCoreConfig {
            sessions_max: 64,
            sessions_per_device_max: 64,
            context_max: 2000,
            idle_after: 1000 * MS,
            step_within: 60_000 * MS,
        };
        edit(&mut config);
        Self {
            core: CloudCore::new(config, hello(Role::Cloud), pages, CloudFigures::default()),
            sink: TestSink::new(),
            out: VecDeque::new(),
            at_first: 0,
            start: Instant::now(),
            now: Duration::ZERO,
            model: Some(Ledger::default()),
            connections: 0,
        }
    }

    pub(super) fn now(&self) -> Instant {
        self.start + self.now
    }

    pub(super) fn connect(&mut self) -> ConnectionId {
        self.connections += 1;
        let connection = ConnectionId(self.connections);
        self.up(connection, false);
        connection
    }

    pub(super) fn up(&mut self, connection: ConnectionId, resumed: bool) {
        let event = LinkEvent::Up { hello: hello(Role::Device), resumed };
        self.link(connection, event);
    }

    pub(super) fn link(&mut self, connection: ConnectionId, event: LinkEvent) {
        self.core.handle_link(self.now(), connection, event);
    }

    pub(super) fn frame(
        &mut self,
        from: ConnectionId,
        kind: Kind,
        session: u32,
        priority: Priority,
        bytes: &[u8],
    ) {
        let frame = self.sink.frame(kind, session, priority, bytes);
        self.core.handle_frame(self.now(), from, frame);
    }

    pub(super) fn message(&mut self, from: ConnectionId, session: u32, message: &Message<'_>) {
        let frame = self.sink.message(session, message);
        self.core.handle_frame(self.now(), from, frame);
    }

    /// Opens a session of 64 positions whose prompt's full pages have these names.
    pub(super) fn open(&mut self, from: ConnectionId, session: u32, pages: &[PageId]) {
        self.message(from, session, &Message::Open(Open { pages, ..open() }));
    }

    /// Sends rows with these contents.
    pub(super) fn rows(
        &mut self,
        from: ConnectionId,
        session: u32,
        head: RowsHead,
        parents: &[u32],
        contents: &[u32],
    ) {
        let mut body = vec![0; head.payload_start() + contents.len() * HIDDEN * 4];
        let start = head.encode(parents, &mut body);
        for (row, to) in contents.iter().zip(body[start..].chunks_exact_mut(HIDDEN * 4)) {
            to[..4].copy_from_slice(&(*row as f32).to_le_bytes());
        }
        let urgent = head.want == Want::All;
        let priority = if urgent { Priority::Verify } else { Priority::Prompt };
        self.frame(from, Kind::Rows, session, priority, &body);
    }

    /// Plans steps while the first stage has room; returns how many.
    pub(super) fn plan(&mut self) -> usize {
        let before = self.out.len();
        while self.at_first < self.core.steps_ahead(self.now()) {
            let Some(batch) = self.core.poll_step(self.now()) else { break };
            self.at_first += 1;
            self.out.push_back(batch);
        }
        self.out.len() - before
    }

    /// The oldest step that is out has run, with or without a fault, and comes back.
    pub(super) fn finish(&mut self, fault: Option<BackendFault>) {
        self.finish_as(2 * MS, fault);
        self.at_first = self.at_first.min(self.out.len() as u64);
    }

    /// The oldest step that is out comes back and says that it took so long.
    pub(super) fn finish_in(&mut self, took: Duration) {
        self.finish_as(took, None);
    }

    fn finish_as(&mut self, took: Duration, fault: Option<BackendFault>) {
        let mut batch = self.out.pop_front().expect("a step is out");
        batch.began = Some(self.now());
        batch.took = took;
        if let (None, Some(model)) = (&fault, &mut self.model) {
            model.run(&mut batch.step);
        }
        batch.fault = fault;
        self.core.handle_step(self.now(), batch, &mut self.sink);
    }

    /// Runs steps until there are none.
    pub(super) fn settle(&mut self) {
        while self.plan() + self.out.len() > 0 {
            self.finish(None);
        }
        self.transmit();
    }

    pub(super) fn transmit(&mut self) {
        self.core.poll_transmit(self.now(), &mut self.sink);
    }

    /// Events of a session that a device has heard since the last call.
    pub(super) fn heard(&mut self, by: ConnectionId, session: u32) -> Vec<Heard> {
        self.transmit();
        let is_for = |(to, frame): &mut (_, Frame)| (*to, frame.session) == (by, session);
        self.sink.sent.extract_if(.., is_for).map(|(_, frame)| Heard::of(&frame)).collect()
    }

    pub(super) fn bytes_arrived(&mut self, from: ConnectionId, bytes: u64, time: Duration) {
        let traffic = Traffic { arrived_bytes: bytes, arrived_in: time, ..Traffic::default() };
        self.core.handle_traffic(from, &traffic);
    }

    pub(super) fn free_pages(&self) -> u64 {
        self.core.figures().pages_free
    }
}

pub(super) fn open() -> Open<'static> {
    Open {
        entry_layer: 1,
        exit_layer: 4,
        codec: 0,
        kv_type: 1,
        arithmetic_id: 1,
        rows_max: 64,
        pages: &[],
    }
}

/// Decided rows of a prompt, of which none is to come back.
pub(super) fn prompt(first_id: u32, count: u16) -> RowsHead {
    RowsHead {
        first_id,
        count,
        tree: false,
        more: false,
        decided: true,
        want: Want::None,
        parent: first_id - 1,
        commit: 0,
    }
}

/// A chain of pending rows below `parent`, all of which are to come back.
pub(super) fn pending_rows(first_id: u32, count: u16, parent: u32) -> RowsHead {
    RowsHead { decided: false, want: Want::All, parent, ..prompt(first_id, count) }
}

pub(super) fn fault(lasts: bool) -> BackendFault {
    BackendFault { backend: "planted", reason: "planted".to_owned(), lasts }
}
