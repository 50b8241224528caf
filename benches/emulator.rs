//! The link emulator beside what it is told to be: round trips of 1 KiB, and 4 MiB up.
//!
//! Bounds: a round trip takes the nominal RTT, 1 KiB at each rate, and what loopback takes without
//! the emulator; an upload 4 MiB at the rate, and a round trip for the answer of one byte. The
//! difference is the emulator's error.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use hat_emulator::{Calibration, Emulator, EmulatorConfig};

const PING_BYTES: usize = 1024;
const UPLOAD_BYTES: usize = 4 << 20;
const UPLOADS: usize = 5;
const RATES: [Option<(f64, f64)>; 2] = [None, Some((60.0, 100.0))];
const RTTS_MS: [u64; 4] = [0, 10, 40, 100];

/// Answers pings of 1 KiB with the same bytes, and an upload with one. The first byte says which.
fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut bytes = vec![0; UPLOAD_BYTES];
    loop {
        stream.read_exact(&mut bytes[..PING_BYTES])?;
        if bytes[0] == 0 {
            stream.write_all(&bytes[..PING_BYTES])?;
        } else {
            stream.read_exact(&mut bytes[PING_BYTES..])?;
            stream.write_all(&[1])?;
        }
    }
}

fn server() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let address = listener.local_addr().expect("it listens");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // It ends with the client's end.
            let _ = stream.and_then(serve);
        }
    });
    address
}

fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).expect("it listens");
    stream.set_nodelay(true).expect("a socket");
    stream
}

/// Milliseconds of `count` pings: median and 99th percentile.
fn pings(stream: &mut TcpStream, count: usize) -> (f64, f64) {
    let mut ping = [0; PING_BYTES];
    let mut times: Vec<f64> = (0..count + 5)
        .map(|_| {
            let begun = Instant::now();
            stream.write_all(&ping).expect("it relays");
            stream.read_exact(&mut ping).expect("it relays");
            begun.elapsed().as_secs_f64() * 1e3
        })
        .skip(5)
        .collect();
    times.sort_by(f64::total_cmp);
    (times[count / 2], times[count * 99 / 100])
}

/// Median of the milliseconds of an upload.
fn upload(stream: &mut TcpStream) -> f64 {
    let bytes = vec![1; UPLOAD_BYTES];
    let mut times: Vec<f64> = (0..UPLOADS)
        .map(|_| {
            let begun = Instant::now();
            stream.write_all(&bytes).expect("it relays");
            stream.read_exact(&mut [0]).expect("it relays");
            begun.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[UPLOADS / 2]
}

fn main() {
    let to = server();
    let (direct, direct_p99) = pings(&mut connect(to), 2000);
    println!("direct: p50 {direct:.3} ms, p99 {direct_p99:.3} ms; all times in ms");
    println!("Mbit/s  RTT | added  off | ping bound   p50  error   p99 | 4 MiB bound   p50  error");
    for rate in RATES {
        for rtt_ms in RTTS_MS {
            let mut config = EmulatorConfig::new(to).rtt(Duration::from_millis(rtt_ms));
            if let Some((up, down)) = rate {
                config = config.mbit(up, down);
            }
            let calibration = Calibration::measure(&config).expect("loopback works");
            config.calibration = Some(calibration);
            let emulator = Emulator::start(config).expect("a free port");
            let mut stream = connect(emulator.address());
            let (p50, p99) = pings(&mut stream, (2500 / rtt_ms.max(1)).clamp(30, 1000) as usize);
            let loaded = upload(&mut stream);
            let of = |bytes: usize, mbit: Option<f64>| {
                mbit.map_or(0.0, |mbit| bytes as f64 * 8.0 / mbit / 1e3)
            };
            let (up, down) = rate.unzip();
            let bound = rtt_ms as f64 + direct + of(PING_BYTES, up) + of(PING_BYTES, down);
            let bulk = rtt_ms as f64 + direct + of(UPLOAD_BYTES, up);
            let added = calibration.relayed.p50_us / 1e3 - direct;
            let off = if rtt_ms == 0 { 0.0 } else { calibration.added.as_secs_f64() * 1e3 };
            let name = rate.map_or("none".into(), |(up, down)| format!("{up}/{down}"));
            println!(
                "{name:<7} {rtt_ms:>3} | {added:5.3} {off:5.3} | {bound:10.3} {p50:7.3} {:+6.3} \
                 {p99:7.3} | {bulk:11.2} {loaded:7.2} {:+6.2}",
                p50 - bound,
                loaded - bulk
            );
        }
    }
}
