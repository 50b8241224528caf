//! Links that break, clouds that restart, devices that come back.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hat_transport::conn::{ConnectionId, Frame, FrameSink};
use hat_transport::endpoint::{Endpoint, GoneError};
use hat_transport::frame::{Kind, Priority};
use hat_transport::link::{Completion, Link, LinkKind, PeerId, Waker};
use hat_transport::message::{Message, Opened, Role};
use hat_transport::pool::Buf;

use super::pair::{
    Net, Pair, config, endpoint, kinds, loopback, take_down, take_frame, take_gone, take_up,
};

/// Sends a frame that holds `number`, if the queue takes one.
fn send(from: &mut Endpoint, to: ConnectionId, kind: Kind, number: u32) -> bool {
    let body_bytes = 4 + (number as usize * 977) % 9000;
    let Some(mut body) = from.buffer(Priority::Verify, body_bytes) else {
        return false;
    };
    body.fill(number as u8);
    body[..4].copy_from_slice(&number.to_le_bytes());
    from.send(to, kind, 1, Priority::Verify, body).is_ok()
}

fn number(frame: &Frame) -> u32 {
    let number = u32::from_le_bytes(frame.body[..4].try_into().unwrap());
    assert!(frame.body[4..].iter().all(|byte| *byte == number as u8));
    number
}

/// Numbers stream both ways while the link breaks six times.
fn cuts_lose_and_repeat_nothing(kind: LinkKind) {
    const FRAMES: u32 = 400;
    let mut pair = Pair::new(kind);
    let (cloud, _) = pair.up();
    let device = pair.dialled;
    let (mut sent, mut got) = ([0, 0], [0, 0]);
    let (mut ups, mut downs) = (0, 0);
    pair.until(|pair| {
        if sent[0] < FRAMES && send(&mut pair.device, device, Kind::Rows, sent[0]) {
            sent[0] += 1;
        }
        if sent[1] < FRAMES && send(&mut pair.cloud, cloud, Kind::Output, sent[1]) {
            sent[1] += 1;
        }
        while let Some(frame) = take_frame(&mut pair.cloud_events) {
            assert_eq!(number(&frame), got[0]);
            got[0] += 1;
            if got[0] % 60 == 0 {
                pair.cut.store(true, Ordering::Relaxed);
            }
        }
        while let Some(frame) = take_frame(&mut pair.device_events) {
            assert_eq!(number(&frame), got[1]);
            got[1] += 1;
        }
        while let Some((_, resumed)) = take_up(&mut pair.device_events) {
            assert!(resumed);
            ups += 1;
        }
        while take_down(&mut pair.device_events).is_some() {
            downs += 1;
        }
        (got == [FRAMES; 2] && ups == 6).then_some(())
    });
    assert_eq!(downs, 6);
    let traffic = pair.device.traffic(device).unwrap();
    assert!(traffic.replayed_frames > 0, "the cuts hit frames under way: {traffic:?}");
}

#[test]
fn cuts_lose_and_repeat_nothing_over_each_link() {
    kinds().for_each(cuts_lose_and_repeat_nothing);
}

fn a_restarted_cloud_is_found_again(kind: LinkKind) {
    let mut pair = Pair::new(kind);
    pair.up();
    let address = pair.cloud.local_address();
    let nowhere = endpoint(pair.net.link(None), config(Role::Cloud));
    drop(std::mem::replace(&mut pair.cloud, nowhere));
    pair.device_is_down();
    // Nobody listens for a while.
    pair.device_is_down();
    pair.cloud = endpoint(pair.net.link(address), config(Role::Cloud));
    let (cloud, resumed) = pair.up();
    assert!(!resumed, "the sessions are gone, and the device has to know");
    pair.cloud.send_message(cloud, 3, &Message::Opened(Opened { pages: 0 })).unwrap();
    let frame = pair.until(|pair| take_frame(&mut pair.device_events));
    assert_eq!(frame.session, 3);
}

#[test]
fn a_restarted_cloud_is_found_again_over_each_link() {
    kinds().for_each(a_restarted_cloud_is_found_again);
}

#[test]
fn a_cloud_may_come_later_than_its_device() {
    let mut pair = Pair::new(LinkKind::Mio);
    let address = pair.cloud.local_address();
    let nowhere = endpoint(pair.net.link(None), config(Role::Cloud));
    drop(std::mem::replace(&mut pair.cloud, nowhere));
    let reason = pair.device_is_down();
    assert!(reason.contains("refused"), "{reason}");
    pair.cloud = endpoint(pair.net.link(address), config(Role::Cloud));
    assert!(!pair.up().1);
}

/// A link whose connections are neither made nor refused.
struct DeafLink {
    inner: Box<dyn Link>,
    closed: Vec<PeerId>,
}

impl Link for DeafLink {
    fn connect(&mut self, _address: SocketAddr) -> io::Result<PeerId> {
        Ok(PeerId(1))
    }

    fn send(&mut self, _peer: PeerId, _bufs: Vec<Buf>) {
        panic!("nothing is connected");
    }

    fn receive(&mut self, _peer: PeerId, _buf: Buf) {
        panic!("nothing is connected");
    }

    fn close(&mut self, peer: PeerId) {
        self.closed.push(peer);
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }

    fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<Completion>) -> io::Result<()> {
        let closed = self.closed.drain(..);
        done.extend(closed.map(|peer| Completion::Closed { peer, error: None }));
        self.inner.wait(timeout, done)
    }

    fn local_address(&self) -> Option<SocketAddr> {
        None
    }

    fn syscalls(&self) -> u64 {
        self.inner.syscalls()
    }
}

#[test]
fn connecting_does_not_take_forever() {
    let inner = Net::new(LinkKind::Memory).link(None);
    let mut config = config(Role::Device);
    config.connection.hello_within = Duration::from_millis(30);
    let closed = Vec::new();
    let mut device = endpoint(Box::new(DeafLink { inner, closed }), config);
    device.dial(loopback());
    let mut events = Vec::new();
    device.poll(None, &mut events).unwrap();
    assert_eq!(take_down(&mut events).as_deref(), Some("connecting takes too long"));
}

#[test]
fn a_device_that_stays_away_is_forgotten() {
    let mut cloud = config(Role::Cloud);
    cloud.grace = Duration::from_millis(20);
    let mut pair = Pair::with(LinkKind::Memory, cloud, config(Role::Device));
    pair.up();
    let nowhere = endpoint(pair.net.link(None), config(Role::Device));
    drop(std::mem::replace(&mut pair.device, nowhere));
    let gone = pair.until(|pair| take_gone(&mut pair.cloud_events));
    assert_eq!(gone, GoneError::GraceOver);
}

#[test]
fn a_silent_cloud_is_given_up() {
    let mut device = config(Role::Device);
    device.connection.ping_after = Duration::from_millis(20);
    device.connection.dead_after = Duration::from_millis(60);
    let mut pair = Pair::with(LinkKind::Mio, config(Role::Cloud), device);
    pair.up();
    // The cloud's process hangs: its sockets live, and nobody answers.
    let reason = loop {
        let pause = Some(Duration::from_millis(1));
        pair.device.poll(pause, &mut pair.device_events).unwrap();
        if let Some(reason) = take_down(&mut pair.device_events) {
            break reason;
        }
    };
    assert_eq!(reason, "silent for 60ms");
    // It wakes up again, and the link goes on.
    pair.until(|pair| take_up(&mut pair.cloud_events).filter(|(_, resumed)| *resumed));
}

#[test]
fn pings_keep_an_idle_link_and_measure_it() {
    let mut device = config(Role::Device);
    device.connection.ping_after = Duration::from_millis(5);
    device.connection.dead_after = Duration::from_millis(2000);
    let mut pair = Pair::with(LinkKind::Mio, config(Role::Cloud), device);
    pair.up();
    pair.until(|pair| {
        let traffic = pair.device.traffic(pair.dialled).unwrap();
        (traffic.sent_frames >= 4 && traffic.rtt.is_some()).then_some(())
    });
    assert!(take_down(&mut pair.device_events).is_none());
}

/// A device that computes for long and does not poll meanwhile finds what came in the meantime,
/// and does not take its cloud for dead.
#[test]
fn own_absence_is_not_held_against_the_peer() {
    for kind in kinds() {
        let mut device = config(Role::Device);
        device.connection.ping_after = Duration::from_millis(10);
        device.connection.dead_after = Duration::from_millis(30);
        let mut pair = Pair::with(kind, config(Role::Cloud), device);
        pair.up();
        for _ in 0..5 {
            for _ in 0..8 {
                pair.cloud.poll(Some(Duration::from_millis(5)), &mut pair.cloud_events).unwrap();
            }
            pair.device.waker().wake();
            pair.device.poll(Some(Duration::ZERO), &mut pair.device_events).unwrap();
        }
        assert!(take_down(&mut pair.device_events).is_none(), "{kind}");
    }
}
