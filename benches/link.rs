//! Cost of a frame over a link: round trips of a verify row and uploads of the largest frame,
//! through two endpoints in two threads, over memory, mio and io_uring.
//!
//! The bound of a round trip and of an upload is a plain blocking socket of the standard library
//! on the same loopback in the same run, with no protocol at all; for memory it is the copy in and
//! out of the pipe. System calls are those of both ends for each frame.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hat_transport::clock::SystemClock;
use hat_transport::conn::{ConnectionId, FrameSink};
use hat_transport::endpoint::{Endpoint, EndpointConfig, Event};
use hat_transport::frame::{BODY_BYTES_MAX, FRAME_BYTES_MAX, HEADER_BYTES, Kind, Priority};
use hat_transport::link::memory::MemoryNet;
use hat_transport::link::{self, Link, LinkKind, Waker};
use hat_transport::message::{Hello, Role};

/// A verify row at hidden 576 in f16, with its head.
const ROW_BYTES: usize = 1168;
/// Frames of one upload: 4 MiB.
const UPLOAD_FRAMES: u64 = 64;

/// A device's endpoint here, and a cloud's in another thread that answers rounds and takes uploads.
struct World {
    device: Endpoint,
    connection: ConnectionId,
    events: Vec<Event>,
    stop: Arc<AtomicBool>,
    waker: Waker,
    /// Returns the cloud's system calls.
    cloud: Option<JoinHandle<u64>>,
}

impl World {
    fn new(kind: LinkKind) -> Self {
        let net = MemoryNet::new();
        let open = |listen| -> Box<dyn Link> {
            match kind {
                LinkKind::Memory => Box::new(net.link(listen).expect("the net is empty")),
                kind => link::open(kind, listen).expect("loopback is there").link,
            }
        };
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let cloud = endpoint(open(Some(loopback)), Role::Cloud);
        let mut device = endpoint(open(None), Role::Device);
        let connection = device.dial(cloud.local_address().expect("it listens"));
        let (stop, waker) = (Arc::new(AtomicBool::new(false)), cloud.waker());
        let cloud = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || serve(cloud, &stop)
        });
        let events = Vec::new();
        let mut world = Self { device, connection, events, stop, waker, cloud: Some(cloud) };
        while !world.events.iter().any(|event| matches!(event, Event::Up { .. })) {
            world.poll();
        }
        world
    }

    fn poll(&mut self) {
        self.device.poll(None, &mut self.events).expect("the link works");
    }

    /// Sends one frame, waiting for room.
    fn send(&mut self, priority: Priority, body_bytes: usize) {
        let body = loop {
            match self.device.buffer(priority, body_bytes) {
                Some(body) => break body,
                None => self.turn_briefly(),
            }
        };
        let mut refused = self.device.send(self.connection, Kind::Rows, 1, priority, body).err();
        while let Some(body) = refused.and_then(|error| error.body) {
            self.turn_briefly();
            refused = self.device.send(self.connection, Kind::Rows, 1, priority, body).err();
        }
    }

    fn turn_briefly(&mut self) {
        let pause = Some(Duration::from_micros(100));
        self.device.poll(pause, &mut self.events).expect("the link works");
    }

    /// Waits for one answer.
    fn answer(&mut self) {
        loop {
            let found = self.events.iter().any(|event| matches!(event, Event::Frame { .. }));
            self.events.clear();
            if found {
                return;
            }
            self.poll();
        }
    }

    fn round(&mut self) {
        self.send(Priority::Verify, ROW_BYTES);
        self.answer();
    }

    /// One upload; the cloud answers its last frame.
    fn upload(&mut self) {
        for _ in 1..UPLOAD_FRAMES {
            self.send(Priority::Prompt, BODY_BYTES_MAX);
        }
        self.round();
    }

    fn syscalls(&self) -> u64 {
        self.device.syscalls()
    }

    /// The cloud's system calls, after it has stopped.
    fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.waker.wake();
        self.cloud.take().map_or(0, |cloud| cloud.join().expect("the cloud thread lives"))
    }
}

fn endpoint(link: Box<dyn Link>, role: Role) -> Endpoint {
    Endpoint::new(link, Arc::new(SystemClock), EndpointConfig::new(Hello::new(role)))
}

/// Answers verify frames with one of the same size, and drops the rest.
fn serve(mut cloud: Endpoint, stop: &AtomicBool) -> u64 {
    let (mut events, mut syscalls) = (Vec::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        cloud.poll(None, &mut events).expect("the link works");
        for event in events.drain(..) {
            let Event::Frame { connection, frame } = event else {
                continue;
            };
            if frame.priority == Priority::Verify {
                drop(frame);
                let body = cloud.buffer(Priority::Verify, ROW_BYTES).expect("the pool is large");
                let sent = cloud.send(connection, Kind::Output, 1, Priority::Verify, body);
                sent.expect("the queue is short");
            }
            syscalls = cloud.syscalls();
        }
    }
    syscalls
}

/// A blocking socket pair whose far end answers `up` bytes with `down` bytes.
struct Plain {
    stream: TcpStream,
    up: Vec<u8>,
    down: Vec<u8>,
}

impl Plain {
    fn new(up: usize, down: usize) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (mut far, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let (mut request, answer) = (vec![0; up.min(FRAME_BYTES_MAX)], vec![0; down]);
        std::thread::spawn(move || {
            loop {
                let mut left = up;
                while left > 0 {
                    let most = left.min(request.len());
                    match far.read(&mut request[..most]) {
                        Ok(0) | Err(_) => return,
                        Ok(count) => left -= count,
                    }
                }
                if far.write_all(&answer).is_err() {
                    return;
                }
            }
        });
        Ok(Self { stream, up: vec![0; up], down: vec![0; down] })
    }

    fn round(&mut self) {
        let done =
            self.stream.write_all(&self.up).and_then(|()| self.stream.read_exact(&mut self.down));
        done.expect("the far end lives");
    }
}

/// Median, 1st and 99th percentile of `count` runs, in us.
fn percentiles_us(count: usize, mut run: impl FnMut()) -> [f64; 3] {
    let mut times: Vec<f64> = (0..count).map(|_| 1e6 * hat_benches::seconds(&mut run)).collect();
    times.sort_unstable_by(f64::total_cmp);
    [50, 1, 99].map(|percent| times[(count - 1) * percent / 100])
}

fn kinds() -> Vec<LinkKind> {
    let mut kinds = vec![LinkKind::Memory, LinkKind::Mio];
    match link::probe_uring() {
        Ok(()) => kinds.push(LinkKind::IoUring),
        Err(reason) => println!("io_uring is left out: {reason}"),
    }
    kinds
}

fn main() {
    let row = HEADER_BYTES + ROW_BYTES;
    let upload_bytes = (UPLOAD_FRAMES - 1) * FRAME_BYTES_MAX as u64 + row as u64;
    let mut plain = Plain::new(row, row).expect("loopback is there");
    let [bound_us, ..] = percentiles_us(4000, || plain.round());
    let up = usize::try_from(upload_bytes).expect("4 MiB");
    let mut plain = Plain::new(up, row).expect("loopback is there");
    let [plain_us, ..] = percentiles_us(60, || plain.round());
    let bound_rate = upload_bytes as f64 / plain_us;
    println!(
        "link, what, median, p1, p99, bound (plain blocking socket), % of bound, calls a frame"
    );
    for kind in kinds() {
        let mut world = World::new(kind);
        let before = world.syscalls();
        let [median, p1, p99] = percentiles_us(4000, || world.round());
        let calls = (world.syscalls() - before) as f64;
        let total = world.stop() as f64 + calls;
        let percent = 100.0 * bound_us / median;
        println!(
            "{kind}, round us, {median:.1}, {p1:.1}, {p99:.1}, {bound_us:.1}, {percent:.0}, {:.2}",
            total / 16_000.0
        );
        let mut world = World::new(kind);
        let before = world.syscalls();
        let [median, p1, p99] = percentiles_us(60, || world.upload());
        let calls = (world.syscalls() - before) as f64 + world.stop() as f64;
        let rate = |us: f64| upload_bytes as f64 / us;
        println!(
            "{kind}, upload MB/s, {:.0}, {:.0}, {:.0}, {bound_rate:.0}, {:.0}, {:.2}",
            rate(median),
            rate(p99),
            rate(p1),
            100.0 * rate(median) / bound_rate,
            calls / (60.0 * 2.0 * UPLOAD_FRAMES as f64)
        );
    }
}
