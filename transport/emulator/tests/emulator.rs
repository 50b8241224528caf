//! The link emulator over real sockets: bytes arrive as they were sent, and cuts, ends and
//! refusals reach both sides. Times are asserted as lower bounds alone.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hat_emulator::{Calibration, Emulator, EmulatorConfig, EmulatorError, StallConfig};

/// No test waits longer than this for bytes.
const PATIENCE: Duration = Duration::from_secs(120);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn connect(to: SocketAddr) -> TcpStream {
    patient(TcpStream::connect(to).unwrap())
}

fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Bytes that differ everywhere, and by `seed`.
fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Accepts one connection after another and gives each what it sends back, until it ends.
fn echo(connections: usize) -> (SocketAddr, JoinHandle<()>) {
    let (listener, address) = listener();
    let serve = move || {
        let threads: Vec<JoinHandle<()>> = (0..connections)
            .map(|_| {
                let mut stream = patient(listener.accept().unwrap().0);
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 1 << 16];
                    while let Ok(bytes @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..bytes]).is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    };
    (address, std::thread::spawn(serve))
}

/// Sends all of it, ends, and reads until the other side ends.
fn round(to: SocketAddr, sent: &[u8]) -> Vec<u8> {
    let stream = connect(to);
    let mut reader = stream.try_clone().unwrap();
    let read = std::thread::spawn(move || {
        let mut back = Vec::new();
        reader.read_to_end(&mut back).map(|_| back)
    });
    (&stream).write_all(sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    read.join().unwrap().unwrap()
}

#[test]
fn bytes_come_back_as_they_were_sent() {
    let (to, server) = echo(4);
    let mut config = EmulatorConfig::new(to).rtt(ms(4)).mbit(400.0, 300.0);
    config.up.jitter = ms(3);
    config.down.jitter = ms(3);
    config.down.stall = Some(StallConfig { every: ms(40), lasts: ms(10) });
    config.up.queue_bytes = 20_000;
    let emulator = Emulator::start(config).unwrap();
    assert!(!emulator.finished());
    let address = emulator.address();
    let threads: Vec<JoinHandle<()>> = (0..4)
        .map(|seed| {
            std::thread::spawn(move || {
                let sent = bytes(1_000_003, seed);
                assert!(round(address, &sent) == sent, "seed {seed}");
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    server.join().unwrap();
    let report = emulator.stop().unwrap();
    for direction in [report.up, report.down] {
        assert_eq!(direction.bytes_in, 4_000_012);
        assert_eq!(direction.bytes_out, 4_000_012);
        assert!(direction.planned.unwrap().p50_us >= 2000.0);
    }
    assert!(report.down.busy_mbit_s.unwrap() > 0.0);
    assert!(report.up.busy_mbit_s.unwrap() <= 400.1, "{report:?}");
    assert!(report.down.busy_mbit_s.unwrap() <= 300.1, "{report:?}");
    assert!(report.down.stalls > 0 && report.up.stalls == 0);
    assert_eq!((report.connections, report.open, report.cuts), (4, 0, 0));
}

#[test]
fn a_link_is_finished_when_its_connections_are() {
    let (to, server) = echo(1);
    let emulator = Emulator::start(EmulatorConfig::new(to)).unwrap();
    assert_eq!(round(emulator.address(), b"hello"), b"hello");
    server.join().unwrap();
    let begun = Instant::now();
    while !emulator.finished() {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(ms(1));
    }
    assert_eq!(emulator.report().unwrap().open, 0);
}

#[test]
fn nothing_comes_sooner_than_it_may() {
    let (to, _server) = echo(1);
    let mut config = EmulatorConfig::new(to).rtt(ms(30)).mbit(1.0, 1000.0);
    config.up.stall = Some(StallConfig { every: ms(100), lasts: ms(50) });
    let emulator = Emulator::start(config).unwrap();
    let mut stream = connect(emulator.address());
    let begun = Instant::now();
    let mut ping = [1; 1000];
    stream.write_all(&ping).unwrap();
    stream.read_exact(&mut ping).unwrap();
    // Connecting is a round trip of its own.
    assert!(begun.elapsed() >= ms(60 + 8));
    let begun = Instant::now();
    for _ in 0..3 {
        stream.write_all(&ping).unwrap();
        stream.read_exact(&mut ping).unwrap();
    }
    assert!(begun.elapsed() >= ms(3 * (30 + 8)));
    let begun = Instant::now();
    // 200 ms of work, and at least one stall of 50 ms in it.
    let long = bytes(25_000, 1);
    stream.write_all(&long).unwrap();
    let mut back = vec![0; long.len()];
    stream.read_exact(&mut back).unwrap();
    assert!(begun.elapsed() >= ms(200 + 50 + 30));
    assert!(back == long);
}

#[test]
fn a_full_queue_holds_the_sender_back() {
    let (to, _server) = echo(1);
    let mut config = EmulatorConfig::new(to);
    config.up.rate_bits_s = Some(1_000_000);
    config.up.queue_bytes = 20_000;
    let emulator = Emulator::start(config).unwrap();
    let stream = TcpStream::connect(emulator.address()).unwrap();
    stream.set_nonblocking(true).unwrap();
    let chunk = vec![0; 1 << 16];
    let (begun, mut sent) = (Instant::now(), 0);
    while begun.elapsed() < ms(300) || emulator.report().unwrap().up.bytes_out == 0 {
        match (&stream).write(&chunk) {
            Ok(bytes) => sent += bytes,
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(ms(1)),
            Err(error) => panic!("{error}"),
        }
    }
    let report = emulator.report().unwrap();
    let left_by_now = begun.elapsed().as_micros() as u64 / 8;
    assert!(report.up.bytes_in <= 20_000 + left_by_now, "{left_by_now} of {report:?}");
    // What the link doesn't take stays in the kernel's buffers, which are full.
    assert!(sent as u64 > report.up.bytes_in && sent < 64 << 20, "{sent} sent");
}

#[test]
fn a_cut_after_bytes_resets_both_sides() {
    let (listener, to) = listener();
    let mut config = EmulatorConfig::new(to).rtt(ms(2));
    config.cut.after_bytes = Some(123_457);
    let emulator = Emulator::start(config).unwrap();
    let sent = bytes(400_000, 9);
    let expected = sent[..123_457].to_vec();
    let server = std::thread::spawn(move || {
        let mut stream = patient(listener.accept().unwrap().0);
        let (mut got, mut buffer) = (Vec::new(), [0; 5000]);
        loop {
            match stream.read(&mut buffer) {
                Ok(bytes) => {
                    assert!(bytes > 0, "a cut is no end");
                    got.extend_from_slice(&buffer[..bytes]);
                }
                Err(error) => return (got, error.kind(), listener),
            }
        }
    });
    let mut client = connect(emulator.address());
    // Writing may succeed as a whole, into the kernel's buffers.
    let _ = client.write_all(&sent);
    let error = client.read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let (got, kind, listener) = server.join().unwrap();
    assert_eq!(kind, ErrorKind::ConnectionReset);
    assert!(got == expected, "exactly the bytes before the cut: {}", got.len());
    // The link goes on: the cut was one.
    let mut client = connect(emulator.address());
    let mut server = patient(listener.accept().unwrap().0);
    client.write_all(&sent[..1000]).unwrap();
    let mut got = [0; 1000];
    server.read_exact(&mut got).unwrap();
    assert_eq!(got, sent[..1000]);
    let report = emulator.report().unwrap();
    assert_eq!((report.cuts, report.connections, report.open), (1, 2, 1));
    assert_eq!(report.up.bytes_out, 123_457 + 1000);
}

#[test]
fn nobody_listens_while_the_link_is_away() {
    let (to, _server) = echo(2);
    let mut config = EmulatorConfig::new(to);
    config.cut.after_bytes = Some(10);
    // Long enough for a look at it on a busy machine.
    config.cut.away = ms(2000);
    let emulator = Emulator::start(config).unwrap();
    let mut client = connect(emulator.address());
    client.write_all(&[7; 10]).unwrap();
    let error = client.read(&mut [0; 10]).unwrap_err();
    let cut = Instant::now();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let mut refused = 0;
    let mut client = loop {
        match TcpStream::connect(emulator.address()) {
            Ok(stream) => break patient(stream),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused),
        }
        refused += 1;
        assert!(cut.elapsed() < PATIENCE);
        std::thread::sleep(ms(5));
    };
    assert!(refused > 0);
    client.write_all(b"again").unwrap();
    let mut back = [0; 5];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"again");
}

#[test]
fn an_unreachable_end_closes_its_connection_alone() {
    let (listener, to) = listener();
    drop(listener);
    let emulator = Emulator::start(EmulatorConfig::new(to).rtt(ms(2))).unwrap();
    for unreachable in 1..=2 {
        let mut client = connect(emulator.address());
        let error = client.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert_eq!(emulator.report().unwrap().unreachable, unreachable);
    }
    let listener = TcpListener::bind(to).unwrap();
    let mut client = connect(emulator.address());
    let mut server = patient(listener.accept().unwrap().0);
    server.write_all(b"first").unwrap();
    let mut got = [0; 5];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"first");
}

#[test]
fn a_reset_and_a_half_end_travel() {
    let (listener, to) = listener();
    let emulator = Emulator::start(EmulatorConfig::new(to).rtt(ms(4))).unwrap();
    let mut client = connect(emulator.address());
    let mut server = patient(listener.accept().unwrap().0);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut question = String::new();
    server.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    server.write_all(b"answer").unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");

    let mut client = connect(emulator.address());
    let server = patient(listener.accept().unwrap().0);
    client.write_all(b"unread").unwrap();
    server.peek(&mut [0; 6]).unwrap();
    // Closing with unread bytes is a reset.
    drop(server);
    let error = client.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn dropping_an_emulator_resets_and_ends_it() {
    let (to, _server) = echo(1);
    let emulator = Emulator::start(EmulatorConfig::new(to).rtt(ms(1000))).unwrap();
    let address = emulator.address();
    let mut client = connect(address);
    drop(emulator);
    let error = client.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn an_address_in_use_is_named() {
    let (_listener, address) = listener();
    let mut config = EmulatorConfig::new(address);
    config.listen = address;
    match Emulator::start(config) {
        Err(error @ EmulatorError::Listen { .. }) => {
            assert!(error.to_string().contains(&address.to_string()), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_measured_comes_off_the_delay() {
    let (to, _server) = echo(1);
    let mut config = EmulatorConfig::new(to).rtt(ms(20));
    let mut calibration = Calibration::measure(&config).unwrap();
    assert!(calibration.added <= ms(1));
    calibration.added = ms(5);
    assert!(calibration.delayed.unwrap().p50_us >= 20_000.0);
    assert!(calibration.relayed.p50_us > 0.0 && calibration.direct.p50_us > 0.0);
    config.calibration = Some(calibration);
    let emulator = Emulator::start(config).unwrap();
    let mut stream = connect(emulator.address());
    let mut ping = [1; 100];
    for _ in 0..5 {
        let begun = Instant::now();
        stream.write_all(&ping).unwrap();
        stream.read_exact(&mut ping).unwrap();
        assert!(begun.elapsed() + calibration.added >= ms(20));
    }
    let report = emulator.stop().unwrap();
    assert_eq!(report.calibration, Some(calibration));
    for direction in [report.up, report.down] {
        let planned = direction.planned.unwrap().p50_us;
        assert!((planned / 7500.0 - 1.0).abs() < 0.03, "{planned} us planned");
    }
}
