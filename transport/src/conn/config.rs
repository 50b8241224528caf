//! The settings of a connection.

use std::time::Duration;

use crate::message::Hello;
use crate::planted::Planted;

/// Settings of a connection.
#[derive(Clone, Debug)]
pub struct ConnectionConfig {
    /// HELLO to send; its role and [`Hello::link`] are filled in.
    pub hello: Hello,
    /// Bytes of received frames that the application may hold. At least the largest chunk, since
    /// credit returns when the frames of a chunk are dropped; at least two whole frames.
    pub window_bytes: u32,
    /// Frames queued or unacknowledged, at most; control frames may exceed it by 64.
    pub queue_frames_max: usize,
    /// Bytes queued or unacknowledged, at most; control frames are not counted.
    pub queue_bytes_max: usize,
    /// Silence after which the peer is pinged.
    pub ping_after: Duration,
    /// Silence after which the link counts as broken.
    pub dead_after: Duration,
    /// Longest time for connecting, and then for the peer's HELLO.
    pub hello_within: Duration,
    /// Longest time that an acknowledgement waits for a frame to ride in.
    pub ack_delay: Duration,
    /// A fault, in tests.
    pub planted: Planted,
}

impl ConnectionConfig {
    /// Usual values around a HELLO.
    #[must_use]
    pub fn new(hello: Hello) -> Self {
        Self {
            hello,
            window_bytes: 4 << 20,
            queue_frames_max: 1024,
            queue_bytes_max: 16 << 20,
            ping_after: Duration::from_secs(1),
            dead_after: Duration::from_secs(3),
            hello_within: Duration::from_secs(5),
            ack_delay: Duration::from_millis(10),
            planted: Planted::default(),
        }
    }
}
