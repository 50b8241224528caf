//! A device that speaks the protocol by hand, truthfully or not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hat_engine::Cloud;
use hat_transport::clock::SystemClock;
use hat_transport::conn::{ConnectionId, FrameSink};
use hat_transport::endpoint::{Endpoint, EndpointConfig, Event};
use hat_transport::frame::{Kind, Priority};
use hat_transport::link::LinkKind;
use hat_transport::message::{
    End, Hello, KvPages, Message, Open, Role, RowsHead, SessionErrorCode, Want,
};

use super::Bundles;

/// A device without an engine.
pub struct Hand {
    endpoint: Endpoint,
    connection: ConnectionId,
}

/// Width of the generated model's rows.
pub const HIDDEN: usize = 64;

impl Hand {
    pub fn connect(bundles: &Bundles, cloud: &Cloud) -> Self {
        Self::connect_to(bundles, cloud.address(), |_| {})
    }

    /// A device at any address, with queues of any length.
    pub fn connect_to(
        bundles: &Bundles,
        address: SocketAddr,
        edit: impl FnOnce(&mut EndpointConfig),
    ) -> Self {
        let bundle = hat_loader::Bundle::open(&bundles.path.join("cloud")).unwrap();
        let hello = Hello {
            model_id: *bundle.model_id().as_bytes(),
            arithmetic_id: 1,
            hidden_size: u32::try_from(HIDDEN).unwrap(),
            entry_layer: 1,
            exit_layer: 4,
            codecs: 0x71,
            kv: KvPages { kv_type: 1, page_size: 32 },
            ..Hello::new(Role::Device)
        };
        let link = hat_transport::link::open(LinkKind::Mio, None).unwrap().link;
        let clock = Arc::new(SystemClock);
        let mut config = EndpointConfig::new(hello);
        edit(&mut config);
        let mut endpoint = Endpoint::new(link, clock, config);
        let connection = endpoint.dial(address);
        let mut hand = Self { endpoint, connection };
        hand.until(|event| matches!(event, Event::Up { .. }).then_some(()));
        hand
    }

    pub fn until<T>(&mut self, mut wanted: impl FnMut(&Event) -> Option<T>) -> T {
        let start = Instant::now();
        let mut events = Vec::new();
        loop {
            self.endpoint.poll(Some(Duration::from_millis(50)), &mut events).unwrap();
            if let Some(found) = events.drain(..).find_map(|event| wanted(&event)) {
                return found;
            }
            assert!(start.elapsed() < super::PATIENCE, "no answer");
        }
    }

    /// Polls for the given time; counts the frames that come.
    pub fn turn_for(&mut self, time: Duration, mut count: impl FnMut(&Event)) {
        let start = Instant::now();
        let mut events = Vec::new();
        while start.elapsed() < time {
            self.endpoint.poll(Some(Duration::from_millis(5)), &mut events).unwrap();
            events.drain(..).for_each(|event| count(&event));
        }
    }

    pub fn open(&mut self, session: u32, change: impl FnOnce(&mut Open<'_>)) {
        let mut open = Open {
            entry_layer: 1,
            exit_layer: 4,
            codec: 0,
            kv_type: 1,
            arithmetic_id: 1,
            rows_max: 100,
            pages: &[],
        };
        change(&mut open);
        self.endpoint.send_message(self.connection, session, &Message::Open(open)).unwrap();
    }

    pub fn rows(&mut self, session: u32, head: &RowsHead, parents: &[u32], payload: &[u8]) {
        let bytes = head.payload_start() + payload.len();
        let mut body = self.endpoint.buffer(Priority::Verify, bytes).unwrap();
        let start = head.encode(parents, body.body_mut());
        body.body_mut()[start..].copy_from_slice(payload);
        let (connection, priority) = (self.connection, Priority::Prompt);
        self.endpoint.send(connection, Kind::Rows, session, priority, body).unwrap();
    }

    /// Number of pages that `session` found.
    pub fn opened(&mut self, session: u32) -> u16 {
        self.until(|event| {
            let Event::Frame { frame, .. } = event else { return None };
            match Message::decode(frame.kind, &frame.body) {
                Ok(Message::Opened(opened)) if frame.session == session => Some(opened.pages),
                _ => None,
            }
        })
    }

    pub fn end(&mut self, session: u32, end: End<'_>) {
        self.endpoint.send_message(self.connection, session, &Message::End(end)).unwrap();
    }

    /// The next `count` output rows of `session`: ids and bytes.
    pub fn outputs(&mut self, session: u32, count: usize) -> Vec<(u32, Vec<u8>)> {
        let mut rows = Vec::new();
        self.until(|event| {
            let Event::Frame { frame, .. } = event else { return None };
            if let Ok(Message::Output(output)) = Message::decode(frame.kind, &frame.body)
                && frame.session == session
            {
                let payload = output.payload.chunks_exact(HIDDEN * 4).map(<[u8]>::to_vec);
                rows.extend(output.ids.iter().zip(payload));
            }
            (rows.len() >= count).then_some(())
        });
        rows
    }

    /// The code and text that end `session`.
    pub fn error(&mut self, session: u32) -> (SessionErrorCode, String) {
        self.until(|event| {
            let Event::Frame { frame, .. } = event else { return None };
            match Message::decode(frame.kind, &frame.body) {
                Ok(Message::SessionError(error)) if frame.session == session => {
                    Some((error.code, error.text.to_owned()))
                }
                _ => None,
            }
        })
    }
}

/// Decided rows, of which the last is to come back.
pub fn chain(first_id: u32, count: u16, parent: u32) -> RowsHead {
    RowsHead {
        first_id,
        count,
        tree: false,
        more: false,
        decided: true,
        want: Want::Last,
        parent,
        commit: 0,
    }
}
