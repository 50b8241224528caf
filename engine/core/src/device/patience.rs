//! How long a request bears with a cloud that is away, busy, forgetful or silent.

use std::time::{Duration, Instant};

/// A request's bearing with its cloud.
pub(super) struct Patience {
    /// When to give up on a cloud that is away.
    pub(super) deadline: Option<Instant>,
    /// Time of the last answer of the cloud that was waited for, or of the last moment in which
    /// none was due.
    pub(super) heard: Instant,
    /// Times that the cloud lost the session since the last token.
    pub(super) lost_n: u32,
    /// The cloud is there and has no room: after how many ms it said it might.
    pub(super) busy_ms: Option<u32>,
    /// Whether a session was ever asked for.
    pub(super) has_opened: bool,
}

/// A cloud that loses a session so often before it gives a token will not give one.
const LOST_MAX: u32 = 3;
/// The same for a cloud that forgets sessions in order: it restarts, or needs their pages.
const RETURNS_MAX: u32 = 16;

/// Shortest pause before a session is opened again, whatever the cloud says.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest one.
const PAUSE_MAX: Duration = Duration::from_secs(30);

impl Patience {
    /// That of a request that begins to run.
    pub(super) fn new(now: Instant) -> Self {
        Self { deadline: None, heard: now, lost_n: 0, busy_ms: None, has_opened: false }
    }

    /// A token was decided: losses before it are forgiven.
    pub(super) fn token(&mut self) {
        self.lost_n = 0;
    }

    /// A session is asked for.
    pub(super) fn opens(&mut self) {
        self.has_opened = true;
    }

    /// The session is open.
    pub(super) fn opened(&mut self, now: Instant) {
        self.busy_ms = None;
        self.deadline = None;
        self.heard = now;
    }

    /// Starts the clock on a cloud that is away, if it does not run already.
    pub(super) fn start(&mut self, now: Instant, limit: Duration) {
        self.deadline.get_or_insert(now + limit);
    }

    /// The cloud has no room; returns when to ask again.
    pub(super) fn busy(&mut self, now: Instant, retry_after_ms: u32) -> Instant {
        let wait = Duration::from_millis(u64::from(retry_after_ms)).clamp(PAUSE_MIN, PAUSE_MAX);
        self.busy_ms = Some(u32::try_from(wait.as_millis()).expect("at most PAUSE_MAX"));
        now + wait
    }

    /// The cloud lost the session; returns when to open the next, or `None` if that is not worth
    /// another try.
    pub(super) fn after_loss(&mut self, now: Instant) -> Option<Instant> {
        self.lost_n += 1;
        (self.lost_n <= LOST_MAX).then(|| now + self.pause())
    }

    /// The cloud has forgotten the session: as [`Patience::after_loss`].
    pub(super) fn after_return(&mut self, now: Instant) -> Option<Instant> {
        self.lost_n += 1;
        (self.lost_n <= RETURNS_MAX).then(|| now + self.pause())
    }

    fn pause(&self) -> Duration {
        (PAUSE_MIN * 2_u32.pow(self.lost_n.clamp(1, 12) - 1)).min(PAUSE_MAX)
    }
}
