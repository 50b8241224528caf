//! One direction of a link, without a socket, a clock or a thread: bytes go in at a time, and it
//! says when each of them comes out.
//!
//! A bottleneck sends one byte after another at its rate and rests in a stall; what waits for it
//! is the queue. From there each byte travels for the delay and the jitter of its moment, and
//! overtakes none.

use std::collections::VecDeque;

use super::schedule::{Draws, Jitter, Stalls};
use super::{DirectionConfig, nanos};

/// Bytes come out in pieces that the bottleneck needs about this long for.
const PIECE_NS: u64 = 250_000;
const PIECE_BYTES_MIN: usize = 1448;
const PIECE_BYTES_MAX: usize = 64 << 10;
/// A queue that was full takes bytes again when this many fit.
const ROOM_BYTES_MIN: usize = 16 << 10;
const SECOND_NS: u128 = 1_000_000_000;

/// Bytes that come out together. Times are nanoseconds of link time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of bytes.
    pub bytes: usize,
    /// Number, from 1, of the busy period of the bottleneck that they fall in.
    pub period: u64,
    /// Time at which the bottleneck begins with them.
    pub begun: u64,
    /// Time from then on that the bottleneck rests in stalls.
    pub stalled: u64,
    /// Time at which the last of them has left the bottleneck.
    pub sent: u64,
    /// Time at which they come out.
    pub release: u64,
}

/// The schedule of one direction.
#[derive(Clone, Debug)]
pub struct Shape {
    rate_bits_s: Option<u64>,
    delay_ns: u64,
    jitter: Jitter,
    stalls: Option<Stalls>,
    queue_bytes: usize,
    piece_bytes: usize,
    /// End of the bottleneck's work, and the fraction of a nanosecond that it still owes, in bits
    /// times
    /// nanoseconds a second.
    free_at: u64,
    carry: u128,
    period: u64,
    last_release: u64,
    /// Pieces that have not left the bottleneck: the time at which each will, and its bytes.
    waiting: VecDeque<(u64, usize)>,
    waiting_bytes: usize,
}

impl Shape {
    /// A link that nothing has passed yet. `stream` keeps the draws of two directions with one
    /// seed apart.
    #[must_use]
    pub fn new(config: &DirectionConfig, seed: u64, stream: u64) -> Self {
        let draws = |of: u64| Draws::new(seed, stream << 8 | of);
        let piece_bytes = config.rate_bits_s.map_or(PIECE_BYTES_MAX, |rate| {
            let bytes = u128::from(rate) * u128::from(PIECE_NS) / 8 / SECOND_NS;
            usize::try_from(bytes).unwrap_or(usize::MAX).clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX)
        });
        Self {
            rate_bits_s: config.rate_bits_s,
            delay_ns: nanos(config.delay),
            jitter: Jitter::new(draws(0), nanos(config.jitter)),
            stalls: config.stall.map(|stall| Stalls::new(draws(1), stall)),
            queue_bytes: config.queue_bytes,
            piece_bytes,
            free_at: 0,
            carry: 0,
            period: 1,
            last_release: 0,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
        }
    }

    /// Number of bytes that may go in at `now`; 0 if the queue is full.
    pub fn room(&mut self, now: u64) -> usize {
        while let Some(&(sent, bytes)) = self.waiting.front()
            && sent <= now
        {
            self.waiting_bytes -= bytes;
            self.waiting.pop_front();
        }
        let room = self.queue_bytes - self.waiting_bytes;
        if room < self.room_min() { 0 } else { room }
    }

    /// Time at which a full queue takes bytes again.
    #[must_use]
    pub fn room_at(&self) -> u64 {
        let mut room = self.queue_bytes - self.waiting_bytes;
        let mut at = 0;
        for &(sent, bytes) in &self.waiting {
            if room >= self.room_min() {
                break;
            }
            room += bytes;
            at = sent;
        }
        at
    }

    fn room_min(&self) -> usize {
        ROOM_BYTES_MIN.min(self.queue_bytes / 4)
    }

    /// Takes bytes in at `now`, no more than `room` says, and tells how they come out, in order.
    /// With 0 bytes it is one piece that takes no time in the bottleneck: an end, say.
    pub fn enter(&mut self, now: u64, bytes: usize, mut out: impl FnMut(Piece)) {
        let mut left = bytes;
        loop {
            let bytes = left.min(self.piece_bytes);
            out(self.piece(now, bytes));
            left -= bytes;
            if left == 0 {
                break;
            }
        }
    }

    fn piece(&mut self, now: u64, bytes: usize) -> Piece {
        if self.free_at < now {
            self.carry = 0;
            self.period += 1;
        }
        let begun = self.free_at.max(now);
        let work = self.work(bytes);
        let sent = self.stalls.map_or(begun + work, |stalls| stalls.finish(begun, work));
        self.free_at = sent;
        let release = (sent + self.delay_ns + self.jitter.at(sent)).max(self.last_release);
        self.last_release = release;
        if sent > now && bytes > 0 {
            self.waiting.push_back((sent, bytes));
            self.waiting_bytes += bytes;
        }
        Piece { bytes, period: self.period, begun, stalled: sent - begun - work, sent, release }
    }

    /// Time that the bottleneck needs for `bytes`, in ns.
    fn work(&mut self, bytes: usize) -> u64 {
        let Some(rate) = self.rate_bits_s else { return 0 };
        let owed = bytes as u128 * 8 * SECOND_NS + self.carry;
        self.carry = owed % u128::from(rate);
        u64::try_from(owed / u128::from(rate)).expect("a piece takes less than 584 years")
    }

    /// Forgets all that waits: the link was cut.
    pub fn clear(&mut self, now: u64) {
        self.waiting.clear();
        self.waiting_bytes = 0;
        self.carry = 0;
        self.period += 1;
        self.free_at = now;
        self.last_release = now;
    }

    /// Number of stalls that began up to `now`.
    #[must_use]
    pub fn stalls_begun(&self, now: u64) -> u64 {
        self.stalls.map_or(0, |stalls| stalls.begun(now))
    }
}
