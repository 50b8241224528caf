//! Costs of a frame: system calls, copied bytes, memory. Counts, not times.

use std::time::Duration;

use hat_transport::conn::{ConnectionId, FrameSink};
use hat_transport::endpoint::{Endpoint, Event};
use hat_transport::frame::{BODY_BYTES_MAX, FRAME_BYTES_MAX, Kind, Priority};
use hat_transport::link::LinkKind;
use hat_transport::message::Role;
use hat_transport::pool::PoolConfig;

use super::pair::{Pair, config, kinds, take_frame};

fn send(from: &mut Endpoint, to: ConnectionId, kind: Kind, body_bytes: usize) -> bool {
    let Some(mut body) = from.buffer(Priority::Verify, body_bytes) else {
        return false;
    };
    body.fill(7);
    from.send(to, kind, 1, Priority::Verify, body).is_ok()
}

/// System calls of both ends so far.
fn syscalls(pair: &Pair) -> u64 {
    pair.device.syscalls() + pair.cloud.syscalls()
}

fn copied(endpoint: &Endpoint, id: ConnectionId) -> u64 {
    endpoint.traffic(id).unwrap().copied_bytes
}

/// Many small frames at once: one system call a frame, both ends together.
fn a_burst_needs_one_call_a_frame(kind: LinkKind) {
    const FRAMES: u64 = 256;
    let mut pair = Pair::new(kind);
    pair.up();
    let device = pair.dialled;
    let before = syscalls(&pair);
    for _ in 0..FRAMES {
        assert!(send(&mut pair.device, device, Kind::Rows, 1168));
    }
    let mut got = 0;
    while got < FRAMES {
        // Each end waits until it has something to do, as in a process of its own.
        pair.device.poll(Some(Duration::ZERO), &mut pair.device_events).unwrap();
        pair.cloud.poll(Some(Duration::ZERO), &mut pair.cloud_events).unwrap();
        while take_frame(&mut pair.cloud_events).is_some() {
            got += 1;
        }
    }
    let calls = syscalls(&pair) - before;
    eprintln!("{kind}: {calls} system calls for {FRAMES} small frames");
    assert!(calls <= FRAMES, "{kind}: {calls} system calls for {FRAMES} frames");
}

#[test]
fn a_burst_needs_one_call_a_frame_over_each_link() {
    kinds().for_each(a_burst_needs_one_call_a_frame);
}

const ROUNDS: u64 = 200;

/// Answers each frame with one of its own; system calls and copied bytes meanwhile.
fn echo(mut cloud: Endpoint) -> (u64, u64, Endpoint) {
    let (mut events, mut echoed, mut before) = (Vec::new(), 0, None);
    while echoed < ROUNDS {
        cloud.poll(None, &mut events).unwrap();
        for event in events.drain(..) {
            if let Event::Frame { connection, frame } = event {
                let now = (connection, cloud.syscalls(), copied(&cloud, connection));
                before.get_or_insert(now);
                drop(frame);
                assert!(send(&mut cloud, connection, Kind::Output, 1168));
                echoed += 1;
            }
        }
    }
    let (connection, calls, copied_before) = before.unwrap();
    let (calls, copied) = (cloud.syscalls() - calls, copied(&cloud, connection) - copied_before);
    // The last echo is still to be sent.
    cloud.poll(Some(Duration::from_millis(50)), &mut events).unwrap();
    (calls, copied, cloud)
}

/// One verify up, one output down, each end in a thread of its own: (calls, copied bytes) a frame.
fn ping_pong(kind: LinkKind) -> (f64, u64) {
    let Pair { cloud, mut device, dialled, .. } = Pair::new(kind);
    let echo = std::thread::spawn(move || echo(cloud));
    let mut events = Vec::new();
    while !events.iter().any(|event| matches!(event, Event::Up { .. })) {
        device.poll(None, &mut events).unwrap();
    }
    let (calls_before, copied_before) = (device.syscalls(), copied(&device, dialled));
    for _ in 0..ROUNDS {
        assert!(send(&mut device, dialled, Kind::Rows, 1168));
        while take_frame(&mut events).is_none() {
            device.poll(None, &mut events).unwrap();
        }
    }
    let own = (device.syscalls() - calls_before, copied(&device, dialled) - copied_before);
    let (calls, copied, _cloud) = echo.join().unwrap();
    let (calls, copied) = (calls + own.0, copied + own.1);
    // Each frame is sent by one end and received by the other: four ends of frames a round.
    (calls as f64 / (4 * ROUNDS) as f64, copied / (2 * ROUNDS))
}

#[test]
fn a_round_trip_copies_nothing_and_calls_little() {
    for kind in kinds() {
        let (calls, copied) = ping_pong(kind);
        eprintln!("{kind}: {calls:.2} system calls and {copied} copied bytes a frame end");
        // Two frame ends a poll: mio waits, writes and reads; io_uring waits twice.
        let limit = if kind == LinkKind::Mio { 1.75 } else { 1.25 };
        assert!(calls <= limit, "{kind}: {calls}");
        assert!(copied <= 32, "{kind}: {copied} bytes, more than a header");
    }
}

#[test]
fn an_upload_copies_less_than_a_tenth() {
    for kind in kinds() {
        let mut pair = Pair::new(kind);
        let (cloud, _) = pair.up();
        let (mut sent, mut got) = (0, 0);
        pair.until(|pair| {
            while sent < 100 && send(&mut pair.device, pair.dialled, Kind::Rows, BODY_BYTES_MAX) {
                sent += 1;
            }
            while take_frame(&mut pair.cloud_events).is_some() {
                got += 1;
            }
            (got == 100).then_some(())
        });
        let copied = copied(&pair.cloud, cloud) / 100;
        eprintln!("{kind}: {copied} bytes copied a frame of {BODY_BYTES_MAX}");
        assert!(copied <= BODY_BYTES_MAX as u64 / 10, "{kind}: {copied}");
    }
}

#[test]
fn a_slow_application_costs_one_window() {
    for kind in kinds() {
        let mut cloud = config(Role::Cloud);
        cloud.connection.window_bytes = 5 * FRAME_BYTES_MAX as u32;
        cloud.pool = PoolConfig { small: 64, large: 64 };
        let mut pair = Pair::with(kind, cloud, config(Role::Device));
        pair.up();
        let mut held = Vec::new();
        for _ in 0..100 {
            send(&mut pair.device, pair.dialled, Kind::Rows, BODY_BYTES_MAX);
            pair.poll();
            held.extend(std::iter::from_fn(|| take_frame(&mut pair.cloud_events)));
        }
        assert_eq!(held.len(), 5, "{kind}");
        let (_, large) = pair.cloud.pool().free();
        assert!(large >= 64 - 5 - 2, "{kind}: {large} buffers are free");
        // It catches up, and the rest comes.
        held.clear();
        pair.until(|pair| take_frame(&mut pair.cloud_events));
    }
}

#[test]
fn an_empty_pool_is_survived() {
    let mut device = config(Role::Device);
    device.pool = PoolConfig { small: 16, large: 8 };
    let mut pair = Pair::with(LinkKind::Mio, config(Role::Cloud), device);
    pair.up();
    let device = pair.dialled;
    let held: Vec<_> = std::iter::from_fn(|| pair.device.buffer(Priority::Verify, 100)).collect();
    assert!(held.len() < 24, "some are kept for receiving");
    drop(held);
    let (mut sent, mut got) = (0, 0);
    pair.until(|pair| {
        while sent < 300 && send(&mut pair.device, device, Kind::Rows, 1000) {
            sent += 1;
        }
        while take_frame(&mut pair.cloud_events).is_some() {
            got += 1;
        }
        (got == 300).then_some(())
    });
}

/// A peer that reads nothing any more: how many bytes the kernel takes before the endpoint, which
/// can still choose what goes first, has to keep the rest.
#[test]
fn the_kernel_takes_little_that_it_can_not_send() {
    for kind in kinds().filter(|kind| *kind != LinkKind::Memory) {
        let mut pair = Pair::new(kind);
        pair.up();
        let sent = |pair: &Pair| pair.device.traffic(pair.dialled).unwrap().sent_bytes;
        let before = sent(&pair);
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(100) {
            send(&mut pair.device, pair.dialled, Kind::Rows, BODY_BYTES_MAX);
            let pause = Some(Duration::from_millis(1));
            pair.device.poll(pause, &mut pair.device_events).unwrap();
        }
        let taken = sent(&pair) - before;
        eprintln!("{kind}: {taken} bytes went into the kernel");
        // The peer's socket buffer, three frames; without the limit it would be the credit, 4 MiB.
        let is_limited = cfg!(target_os = "linux");
        assert!(!is_limited || taken <= 512 << 10, "{kind}: {taken} bytes went into the kernel");
    }
}
