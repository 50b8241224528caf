//! Shared by the tests of both cores: a sink without a link.

use std::collections::BTreeSet;

use hat_transport::conn::{ConnectionId, Frame, FrameSink, Refusal, SendError};
use hat_transport::frame::{Kind, Priority};
use hat_transport::message::Message;
use hat_transport::pool::{Buf, Pool, PoolConfig};

/// A sink whose frames stay in it until the test takes them.
pub(crate) struct TestSink {
    pool: Pool,
    /// Frames that were sent, in order, and the connections that they are for.
    pub(crate) sent: Vec<(ConnectionId, Frame)>,
    /// False while the pool keeps what is left in reserve.
    pub(crate) has_buffers: bool,
    /// Connections whose queues have room for control frames alone.
    pub(crate) full: BTreeSet<ConnectionId>,
    /// Connections whose queues have no room at all.
    pub(crate) deaf: BTreeSet<ConnectionId>,
    /// One frame in so many finds no room.
    pub(crate) refuses: Option<usize>,
    /// Nor do those of prompts.
    pub(crate) refuses_prompts: bool,
    /// Frames that were offered, and those of them that were sent.
    tries: usize,
    pub(crate) total: usize,
}

impl TestSink {
    /// An empty sink that takes everything.
    pub(crate) fn new() -> Self {
        Self::with_pool(PoolConfig { small: 16_000, large: 64 })
    }

    /// The same with this many buffers.
    pub(crate) fn with_pool(buffers: PoolConfig) -> Self {
        Self {
            pool: Pool::new(buffers),
            sent: Vec::new(),
            has_buffers: true,
            full: BTreeSet::new(),
            deaf: BTreeSet::new(),
            refuses: None,
            refuses_prompts: false,
            tries: 0,
            total: 0,
        }
    }

    /// The next frame finds no room; those behind it do.
    pub(crate) fn refuse_next(&mut self) {
        self.refuses = Some(self.tries + 1);
    }

    /// A frame with this body, as one comes in.
    pub(crate) fn frame(
        &self,
        kind: Kind,
        session: u32,
        priority: Priority,
        bytes: &[u8],
    ) -> Frame {
        let mut body = self.pool.take(bytes.len()).expect("the pool is large");
        body.body_mut().copy_from_slice(bytes);
        Frame { kind, session, priority, body }
    }

    /// A small message, as one comes in.
    pub(crate) fn message(&self, session: u32, message: &Message<'_>) -> Frame {
        let mut body = self.pool.take(message.encoded_len()).expect("the pool is large");
        message.encode(body.body_mut());
        Frame { kind: message.kind(), session, priority: Priority::Control, body }
    }
}

impl FrameSink for TestSink {
    fn buffer(&mut self, priority: Priority, body_bytes: usize) -> Option<Buf> {
        let may = self.has_buffers || priority == Priority::Control;
        if may { self.pool.take(body_bytes) } else { None }
    }

    fn send(
        &mut self,
        to: ConnectionId,
        kind: Kind,
        session: u32,
        priority: Priority,
        body: Buf,
    ) -> Result<(), SendError> {
        let is_control = priority == Priority::Control;
        self.tries += 1;
        if self.deaf.contains(&to)
            || (self.full.contains(&to) && !is_control)
            || (self.refuses_prompts && priority == Priority::Prompt)
            || self.refuses.is_some_and(|every| self.tries.is_multiple_of(every))
        {
            return Err(SendError { refusal: Refusal::Full, body: Some(body) });
        }
        self.total += 1;
        self.sent.push((to, Frame { kind, session, priority, body }));
        Ok(())
    }

    fn discard(&mut self, to: ConnectionId, session: u32) -> usize {
        let before = self.sent.len();
        self.sent.retain(|(of, frame)| (*of, frame.session) != (to, session));
        before - self.sent.len()
    }
}
