//! Cost of a frame without a network: header, checksum, queue, deframing.
//!
//! The bound is one pass over the frame's bytes at the bandwidth of a copy that this run measures
//! on a buffer of the same size: a checksum has to read each byte once, and nothing else does.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hat_transport::conn::{Connection, ConnectionConfig, ConnectionEvent};
use hat_transport::frame::{HEADER_BYTES, Header, Kind, Priority};
use hat_transport::message::{Hello, Role};
use hat_transport::pool::{Buf, Pool, PoolConfig};

/// A verify row at hidden 576 in f16, one at hidden 4096, the largest frame.
const BODIES: [usize; 3] = [1168, 8208, 65_536];

/// Two ends that are up, and their pool.
struct Pair {
    device: Connection,
    cloud: Connection,
    pool: Pool,
    now: Instant,
    batch: Vec<Buf>,
    wire: Vec<u8>,
}

impl Pair {
    fn new() -> Self {
        let pool = Pool::new(PoolConfig { small: 64, large: 64 });
        let config = |role| ConnectionConfig::new(Hello::new(role));
        let device = Connection::device(config(Role::Device), [1; 16], pool.clone());
        let cloud = Connection::cloud(config(Role::Cloud), [1; 16], 1, pool.clone());
        let (Some(device), Some(cloud)) = (device, cloud) else { panic!("the pool is large") };
        let (batch, wire) = (Vec::new(), Vec::with_capacity(1 << 17));
        let mut pair = Self { device, cloud, pool, now: Instant::now(), batch, wire };
        pair.device.handle_connected(pair.now);
        pair.cloud.handle_connected(pair.now);
        for _ in 0..4 {
            pair.carry(true);
            pair.carry(false);
        }
        pair
    }

    /// Queues one frame and writes what is to be sent into `wire`.
    fn encode(&mut self, body_bytes: usize) {
        let body = self.pool.take(body_bytes).expect("the pool is large");
        let sent = self.device.send(Kind::Rows, 1, Priority::Verify, body);
        sent.expect("the queue is empty");
        self.transmit(true);
    }

    fn transmit(&mut self, up: bool) {
        let end = if up { &mut self.device } else { &mut self.cloud };
        self.wire.clear();
        if end.poll_transmit(self.now, &mut self.batch) {
            self.batch.iter().for_each(|buf| self.wire.extend_from_slice(buf.wire()));
            end.handle_transmitted(&mut self.batch);
        }
    }

    /// Feeds `wire` to the other end, and drops the frames that come out.
    fn decode(&mut self, up: bool) {
        let end = if up { &mut self.cloud } else { &mut self.device };
        let taken = end.handle_bytes(self.now, &self.wire).expect("the frame is right");
        assert_eq!(taken, self.wire.len());
        while let Some(event) = end.poll_event() {
            if let ConnectionEvent::Frame(frame) = event {
                black_box(&frame.body[..]);
            }
        }
    }

    fn carry(&mut self, up: bool) {
        self.transmit(up);
        self.decode(up);
    }

    /// Returns credit and acknowledgements, outside of what is timed.
    fn settle(&mut self) {
        self.now += Duration::from_millis(20);
        self.carry(false);
    }
}

/// Median time of `run`, which stands between `before` and `after`.
fn median_ns<S>(
    state: &mut S,
    mut before: impl FnMut(&mut S),
    mut run: impl FnMut(&mut S),
    mut after: impl FnMut(&mut S),
) -> f64 {
    let mut times: Vec<u128> = (0..2001)
        .map(|_| {
            before(state);
            let start = Instant::now();
            run(state);
            let time = start.elapsed().as_nanos();
            after(state);
            time
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2] as f64
}

/// ns for one copy of `bytes`, warm.
fn copy_ns(bytes: usize) -> f64 {
    let mut state = (vec![1u8; bytes], vec![0u8; bytes]);
    let copy = |state: &mut (Vec<u8>, Vec<u8>)| {
        for _ in 0..16 {
            state.1.copy_from_slice(black_box(&state.0));
            black_box(&state.1);
        }
    };
    median_ns(&mut state, |_| {}, copy, |_| {}) / 16.0
}

fn header(c: &mut Criterion) {
    let header = Header {
        len: 1168,
        kind: Kind::Rows as u8,
        flags: 0,
        priority: Priority::Verify,
        version: 1,
        session: 7,
        body_crc: 1,
        seq: 2,
        ack: 3,
        credit: 4,
    };
    let wire = header.encode();
    let mut group = c.benchmark_group("header");
    group.throughput(Throughput::Bytes(HEADER_BYTES as u64));
    group.bench_function("encode", |b| b.iter(|| black_box(black_box(&header).encode())));
    group.bench_function("decode", |b| b.iter(|| Header::decode(black_box(&wire))));
    group.finish();
}

fn frame(c: &mut Criterion) {
    let mut pair = Pair::new();
    let mut group = c.benchmark_group("frame");
    for body_bytes in BODIES {
        group.throughput(Throughput::Bytes((HEADER_BYTES + body_bytes) as u64));
        group.bench_function(BenchmarkId::new("there", body_bytes), |b| {
            b.iter(|| {
                pair.encode(body_bytes);
                pair.decode(true);
                pair.settle();
            });
        });
    }
    group.finish();
    println!(
        "\nframe, bytes, encode ns, decode ns, one pass ns (bound), copy GB/s, encode %, decode %"
    );
    for body_bytes in BODIES {
        let bytes = HEADER_BYTES + body_bytes;
        let pass = copy_ns(bytes);
        let encode = |pair: &mut Pair| pair.encode(body_bytes);
        let decode = |pair: &mut Pair| pair.decode(true);
        let arrive = |pair: &mut Pair| {
            pair.decode(true);
            pair.settle();
        };
        // The copy into and out of the pretended socket belongs to the link, and is taken off.
        let encode_ns = median_ns(&mut pair, |_| {}, encode, arrive) - pass;
        let decode_ns = median_ns(&mut pair, encode, decode, Pair::settle) - pass;
        let (rate, of) = (bytes as f64 / pass, |ns: f64| 100.0 * pass / ns);
        println!(
            "frame, {bytes}, {encode_ns:.0}, {decode_ns:.0}, {pass:.0}, {rate:.1}, {:.0}, {:.0}",
            of(encode_ns),
            of(decode_ns)
        );
    }
}

criterion_group!(benches, header, frame);
criterion_main!(benches);
