//! Two endpoints that reach each other over a link of choice, which can be cut.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use std::io;

use hat_transport::clock::SystemClock;
use hat_transport::conn::ConnectionId;
use hat_transport::conn::Frame;
use hat_transport::endpoint::{Endpoint, EndpointConfig, Event, GoneError};
use hat_transport::link::memory::MemoryNet;
use hat_transport::link::{self, Completion, Link, LinkKind, PeerId, Waker};
use hat_transport::message::{Hello, Role};
use hat_transport::pool::Buf;

const PATIENCE: Duration = Duration::from_secs(120);
pub(crate) const KINDS: [LinkKind; 3] = [LinkKind::Memory, LinkKind::Mio, LinkKind::IoUring];

pub(crate) fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// The kinds of link that run here; says what does not.
pub(crate) fn kinds() -> impl Iterator<Item = LinkKind> {
    KINDS.into_iter().filter(|kind| {
        let probe = if *kind == LinkKind::IoUring { link::probe_uring() } else { Ok(()) };
        if let Err(reason) = &probe {
            eprintln!("not tested here: {reason}");
        }
        probe.is_ok()
    })
}

/// Opens links that reach each other.
#[derive(Clone)]
pub(crate) struct Net {
    pub(crate) kind: LinkKind,
    memory: MemoryNet,
}

impl Net {
    pub(crate) fn new(kind: LinkKind) -> Self {
        Self { kind, memory: MemoryNet::new() }
    }

    pub(crate) fn link(&self, listen: Option<SocketAddr>) -> Box<dyn Link> {
        if self.kind == LinkKind::Memory {
            return Box::new(self.memory.link(listen).unwrap());
        }
        let opened = link::open(self.kind, listen).unwrap();
        assert_eq!(opened.kind, self.kind, "{:?}", opened.fallback);
        opened.link
    }
}

/// A link whose sockets all break when the flag is set.
pub(crate) struct CutLink {
    pub(crate) inner: Box<dyn Link>,
    pub(crate) cut: Arc<AtomicBool>,
    pub(crate) peers: Vec<PeerId>,
}

impl Link for CutLink {
    fn connect(&mut self, address: SocketAddr) -> io::Result<PeerId> {
        let peer = self.inner.connect(address)?;
        self.peers.push(peer);
        Ok(peer)
    }

    fn send(&mut self, peer: PeerId, bufs: Vec<Buf>) {
        self.inner.send(peer, bufs);
    }

    fn receive(&mut self, peer: PeerId, buf: Buf) {
        self.inner.receive(peer, buf);
    }

    fn close(&mut self, peer: PeerId) {
        self.inner.close(peer);
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>) -> io::Result<()> {
        if self.cut.swap(false, Ordering::Relaxed) {
            self.peers.drain(..).for_each(|peer| self.inner.close(peer));
        }
        self.inner.wait(timeout, done)
    }

    fn local_address(&self) -> Option<SocketAddr> {
        self.inner.local_address()
    }

    fn syscalls(&self) -> u64 {
        self.inner.syscalls()
    }
}

pub(crate) fn config(role: Role) -> EndpointConfig {
    EndpointConfig::new(Hello::new(role))
}

pub(crate) fn endpoint(link: Box<dyn Link>, config: EndpointConfig) -> Endpoint {
    Endpoint::new(link, Arc::new(SystemClock), config)
}

pub(crate) struct Pair {
    pub(crate) net: Net,
    pub(crate) cloud: Endpoint,
    pub(crate) device: Endpoint,
    pub(crate) dialled: ConnectionId,
    pub(crate) cloud_events: Vec<Event>,
    pub(crate) device_events: Vec<Event>,
    /// Breaks the device's sockets.
    pub(crate) cut: Arc<AtomicBool>,
}

impl Pair {
    pub(crate) fn new(kind: LinkKind) -> Self {
        Self::with(kind, config(Role::Cloud), config(Role::Device))
    }

    pub(crate) fn with(kind: LinkKind, cloud: EndpointConfig, device: EndpointConfig) -> Self {
        let net = Net::new(kind);
        let cloud = endpoint(net.link(Some(loopback())), cloud);
        let cut = Arc::new(AtomicBool::new(false));
        let link = CutLink { inner: net.link(None), cut: Arc::clone(&cut), peers: Vec::new() };
        let mut device = endpoint(Box::new(link), device);
        let dialled = device.dial(cloud.local_address().unwrap());
        let (cloud_events, device_events) = (Vec::new(), Vec::new());
        Self { net, cloud, device, dialled, cloud_events, device_events, cut }
    }

    /// Polls both until `found` finds something in the events, which are kept.
    pub(crate) fn until<T>(&mut self, mut found: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = found(self) {
                return found;
            }
            let (device, cloud) = (&self.device_events, &self.cloud_events);
            assert!(Instant::now() < deadline, "device: {device:?}, cloud: {cloud:?}");
            self.poll();
        }
    }

    pub(crate) fn poll(&mut self) {
        let pause = Some(Duration::from_micros(200));
        self.cloud.poll(pause, &mut self.cloud_events).unwrap();
        self.device.poll(pause, &mut self.device_events).unwrap();
    }

    /// The cloud's id of the connection and whether it resumed, once both are up.
    pub(crate) fn up(&mut self) -> (ConnectionId, bool) {
        let mut ends = (None, None);
        self.until(|pair| {
            ends.0 = ends.0.or(take_up(&mut pair.cloud_events));
            ends.1 = ends.1.or(take_up(&mut pair.device_events));
            let (cloud, device) = (ends.0?, ends.1?);
            assert_eq!(cloud.1, device.1);
            Some(cloud)
        })
    }

    pub(crate) fn device_is_down(&mut self) -> String {
        self.until(|pair| take_down(&mut pair.device_events))
    }
}

/// Takes the first event out that `is` turns into something.
pub(crate) fn take<T>(
    events: &mut Vec<Event>,
    is: impl Fn(&Event) -> bool,
    get: impl Fn(Event) -> T,
) -> Option<T> {
    let index = events.iter().position(is)?;
    Some(get(events.remove(index)))
}

pub(crate) fn take_up(events: &mut Vec<Event>) -> Option<(ConnectionId, bool)> {
    take(
        events,
        |event| matches!(event, Event::Up { .. }),
        |event| match event {
            Event::Up { connection, resumed, .. } => (connection, resumed),
            _ => unreachable!(),
        },
    )
}

pub(crate) fn take_down(events: &mut Vec<Event>) -> Option<String> {
    take(
        events,
        |event| matches!(event, Event::Down { .. }),
        |event| match event {
            Event::Down { reason, .. } => reason,
            _ => unreachable!(),
        },
    )
}

pub(crate) fn take_frame(events: &mut Vec<Event>) -> Option<Frame> {
    take(
        events,
        |event| matches!(event, Event::Frame { .. }),
        |event| match event {
            Event::Frame { frame, .. } => frame,
            _ => unreachable!(),
        },
    )
}

pub(crate) fn take_gone(events: &mut Vec<Event>) -> Option<GoneError> {
    let is = |event: &Event| matches!(event, Event::Gone { .. } | Event::Refused { .. });
    take(events, is, |event| match event {
        Event::Gone { error, .. } | Event::Refused { error, .. } => error,
        _ => unreachable!(),
    })
}
