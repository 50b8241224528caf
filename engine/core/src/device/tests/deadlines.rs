//! Clouds that do anything, in virtual time: every request ends by its deadline, tries no more
//! often than it may, and loses nothing to a cloud that comes back in time.

use std::collections::BTreeSet;

use hat_transport::message::{Busy, Computed, Dropped};
use proptest::prelude::*;

use super::super::budget::{ANSWER_FACTOR, LOSSES_MAX, PAUSE_MAX, PAUSE_MIN};
use super::*;

/// The configuration's own.
const RECONNECT: Duration = Duration::from_secs(30);
/// Longest time without news, and the pause in which it may end.
const DEADLINE: Duration =
    Duration::from_secs(RECONNECT.as_secs() * ANSWER_FACTOR as u64 + PAUSE_MAX.as_secs());

/// Next act of a cloud, or of the way to it.
#[derive(Clone, Debug)]
enum Act {
    /// It acknowledges everything, and answers it as it should.
    Answer,
    /// It acknowledges everything, and says nothing to it.
    Take,
    /// It takes nothing, and says nothing.
    Wait,
    /// It opens the session, whether that was asked for or not.
    Opened(u16),
    Busy(u32),
    Lost(SessionErrorCode),
    /// It has computed this many rows from this one on.
    Computed(u32, u16),
    Dropped(u32, u16),
    Ended,
    /// It returns these rows.
    Output(Vec<u32>),
    /// It says its last OUTPUT again.
    Again,
    /// Any bytes as a frame of any kind.
    Bytes(usize, Vec<u8>),
    Down,
    Up(bool),
    Gone,
}

fn act() -> impl Strategy<Value = (Act, u64)> {
    let act = prop_oneof![
        4 => Just(Act::Answer),
        4 => Just(Act::Take),
        2 => (0..3_u16).prop_map(Act::Opened),
        1 => prop_oneof![0..100_u32, any::<u32>()].prop_map(Act::Busy),
        3 => proptest::sample::select(&SessionErrorCode::ALL[..]).prop_map(Act::Lost),
        1 => Just(Act::Lost(SessionErrorCode::Evicted)),
        1 => Just(Act::Wait),
        2 => (0..60_u32, 0..40_u16).prop_map(|(first, count)| Act::Computed(first, count)),
        1 => (0..60_u32, 0..40_u16).prop_map(|(first, count)| Act::Dropped(first, count)),
        1 => Just(Act::Ended),
        1 => proptest::collection::vec(0..60_u32, 1..4).prop_map(Act::Output),
        1 => Just(Act::Again),
        1 => (any::<usize>(), proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(kind, bytes)| Act::Bytes(kind, bytes)),
        2 => Just(Act::Down),
        2 => any::<bool>().prop_map(Act::Up),
        1 => Just(Act::Gone),
    ];
    (act, prop_oneof![Just(4), 4..20_u64, 20..2_000_u64, 2_000..40_000_u64])
}

/// A device, a way to the cloud, and a cloud of acts.
struct World {
    bed: Bed,
    is_up: bool,
    /// The last OUTPUT.
    output: Option<(u32, Vec<u8>)>,
    /// Rows that came back, by session, and those that COMPUTED told of.
    back: BTreeSet<(u32, u32)>,
    told: BTreeSet<(u32, u32)>,
    /// Time of a request's last news: a computation, an acknowledgement, a row, a token.
    news_at: Instant,
    /// Attempts since rows or tokens came, and the time of the last.
    attempts: u32,
    attempt_at: Option<Instant>,
    /// True if the cloud has had no room since.
    was_busy: bool,
    /// True if there is one request, whose attempts these are.
    is_alone: bool,
    tokens: usize,
    ended: Vec<Result<Vec<TokenId>, RequestError>>,
}

impl World {
    fn new(drafts: &[DraftMode]) -> Self {
        let mut bed = Bed::new();
        drafts.iter().for_each(|draft| {
            bed.submit(*draft);
        });
        Self {
            news_at: bed.now,
            bed,
            is_up: false,
            output: None,
            back: BTreeSet::new(),
            told: BTreeSet::new(),
            attempts: 0,
            attempt_at: None,
            was_busy: false,
            is_alone: drafts.len() == 1,
            tokens: 0,
            ended: Vec::new(),
        }
    }

    fn brings(&mut self) {
        (self.news_at, self.attempts, self.was_busy) = (self.bed.now, 0, false);
    }

    /// Everything that is due at this moment.
    fn settle(&mut self) {
        for turns in 0.. {
            assert!(turns < 10_000, "time stands still");
            let opens = self.bed.asks;
            if self.bed.turn() {
                self.news_at = self.bed.now;
            }
            if self.bed.asks > opens {
                self.note_attempt();
            }
            while let Some((_, event)) = self.bed.core.poll_event() {
                match event {
                    RequestEvent::Said(Event::Token { .. }) => {
                        self.tokens += 1;
                        self.brings();
                    }
                    RequestEvent::Done(done) => self.ended.push(Ok(done.metrics.token_ids)),
                    RequestEvent::Failed(error) => self.ended.push(Err(error)),
                    // It had no room before.
                    RequestEvent::Runs => self.news_at = self.bed.now,
                    RequestEvent::Said(_) => {}
                }
            }
            if self.bed.core.poll_timeout(self.bed.now) != Some(Duration::ZERO) {
                return;
            }
        }
    }

    /// Of one request: an attempt is no earlier than its schedule says.
    fn note_attempt(&mut self) {
        let before = self.attempt_at.replace(self.bed.now);
        self.attempts += 1;
        let Some(before) = before.filter(|_| self.is_alone) else { return };
        let doubled = match self.was_busy {
            true => PAUSE_MIN,
            false => (PAUSE_MIN * 2_u32.pow(self.attempts.clamp(2, 12) - 2)).min(PAUSE_MAX / 2),
        };
        let pause = if self.attempts > 1 { doubled } else { PAUSE_MIN };
        let passed = self.bed.now - before;
        assert!(passed >= pause, "attempt {} after {passed:?}, not {pause:?}", self.attempts);
        assert!(self.was_busy || self.attempts <= LOSSES_MAX + 1, "{} attempts", self.attempts);
    }

    /// Time passes, as its owner lets it.
    fn pass(&mut self, lasts: Duration) {
        let until = self.bed.now + lasts;
        self.settle();
        while self.bed.now < until {
            let left = until - self.bed.now;
            let wait = self.bed.core.poll_timeout(self.bed.now).map_or(left, |wait| wait.min(left));
            self.bed.now += wait;
            self.settle();
        }
        let silence = self.bed.now - self.news_at;
        assert!(self.bed.core.running() == 0 || silence <= DEADLINE, "no end after {silence:?}");
    }

    fn say(&mut self, message: &Message<'_>) {
        let session = self.session();
        self.bed.say(session, message);
    }

    /// The session that was asked for last.
    fn session(&self) -> u32 {
        self.bed.asks.max(1)
    }

    fn act(&mut self, act: &Act) {
        let session = self.session();
        match act {
            Act::Up(resumed) => {
                if !resumed {
                    self.bed.sink.sent.clear();
                }
                self.is_up = true;
                return self.bed.up(*resumed);
            }
            Act::Down | Act::Gone => {
                self.is_up = false;
                let reason = "the cable is out".to_owned();
                return self.bed.core.handle_inbound(match act {
                    Act::Down => Inbound::Down { reason },
                    _ => Inbound::Gone { reason, is_final: false },
                });
            }
            _ if !self.is_up => return,
            _ => {}
        }
        match act {
            Act::Answer => {
                let is_some = !self.bed.sink.sent.is_empty();
                self.note_outputs();
                self.bed.answer();
                if is_some {
                    self.brings();
                }
            }
            Act::Take => {
                if !std::mem::take(&mut self.bed.sink.sent).is_empty() {
                    self.news_at = self.bed.now;
                }
            }
            Act::Opened(pages) => self.say(&Message::Opened(Opened { pages: *pages })),
            Act::Busy(retry_after_ms) => {
                self.was_busy = true;
                self.say(&Message::Busy(Busy { retry_after_ms: *retry_after_ms }));
            }
            Act::Lost(code) => {
                let error = SessionError { code: *code, text: "a lie" };
                self.say(&Message::SessionError(error));
            }
            Act::Computed(first_id, count) => self.computed(session, *first_id, *count),
            Act::Dropped(first_id, count) => {
                self.say(&Message::Dropped(Dropped { first_id: *first_id, count: *count }));
            }
            Act::Ended => self.say(&Message::Ended),
            Act::Output(ids) => self.outputs(session, ids),
            Act::Again => {
                if let Some((session, body)) = self.output.clone() {
                    self.frame(Kind::Output, session, &body);
                }
            }
            Act::Bytes(kind, bytes) => {
                let kind = Kind::ALL[kind % Kind::ALL.len()];
                if kind.is_sequenced() {
                    self.was_busy |= kind == Kind::Busy;
                    self.frame(kind, session, bytes);
                }
            }
            Act::Wait | Act::Down | Act::Up(_) | Act::Gone => {}
        }
    }

    /// The cloud says that rows are computed, which may be news.
    fn computed(&mut self, session: u32, first_id: u32, count: u16) {
        let row = first_id.saturating_add(u32::from(count));
        let is_told = self.told.range((session, row)..(session + 1, 0)).next().is_some();
        if self.told.insert((session, row)) && !is_told {
            self.brings();
        }
        let arrivals = Arrivals::default();
        self.say(&Message::Computed(Computed {
            first_id,
            count,
            queue_us: 1,
            step_us: 1,
            step_rows: 1,
            arrivals,
        }));
    }

    /// The cloud answers rows, of which it may have none.
    fn outputs(&mut self, session: u32, ids: &[u32]) {
        let count = u16::try_from(ids.len()).unwrap();
        let (arrivals, queue_us) = (Arrivals::default(), 1);
        let head = OutputHead { count, queue_us, step_us: 2, step_rows: 3, arrivals };
        let mut body = vec![0; head.payload_start() + ids.len() * HIDDEN * 4];
        head.encode(ids, &mut body);
        if ids.iter().any(|id| self.back.insert((session, *id))) {
            self.brings();
        }
        self.frame(Kind::Output, session, &body);
        self.output = Some((session, body));
    }

    /// Rows of the frames that are answered next.
    fn note_outputs(&mut self) {
        for (_, frame) in &self.bed.sink.sent {
            if let Ok(Message::Rows(rows)) = Message::decode(frame.kind, frame.body.body()) {
                let first = rows.head.first_id;
                let ids = first..first + u32::from(rows.head.count);
                self.back.extend(ids.map(|id| (frame.session, id)));
            }
        }
    }

    fn frame(&mut self, kind: Kind, session: u32, bytes: &[u8]) {
        let frame = self.bed.sink.frame(kind, session, Priority::Verify, bytes);
        self.bed.core.handle_inbound(Inbound::Frame(frame));
    }

    /// Goes on by `acts`, again and again, until all requests have ended.
    fn run(&mut self, acts: &[(Act, u64)]) {
        self.bed.up(false);
        self.is_up = true;
        self.settle();
        for (act, pause) in acts.iter().cycle() {
            self.act(act);
            self.pass(Duration::from_millis(pause + 1));
            if self.bed.core.running() + self.bed.core.waiting() == 0 {
                return;
            }
        }
    }
}

fn draft() -> impl Strategy<Value = DraftMode> {
    proptest::sample::select(DraftMode::ALL.to_vec())
}

/// Begin and end of an outage.
#[derive(Clone, Copy, Debug)]
enum Outage {
    /// The link breaks, and goes on where it was.
    Cut,
    /// The cloud restarts.
    Restart,
    /// It ends the connection.
    Close,
    /// It needs the session's memory, and asks back after this many milliseconds.
    Full(u32),
}

fn outage() -> impl Strategy<Value = Outage> {
    prop_oneof![
        Just(Outage::Cut),
        Just(Outage::Restart),
        Just(Outage::Close),
        (0..5_000_u32).prop_map(Outage::Full),
    ]
}

impl World {
    fn suffer(&mut self, outage: Outage, lasts: Duration) {
        match outage {
            Outage::Cut | Outage::Restart => {
                self.act(&Act::Down);
                self.pass(lasts);
                self.act(&Act::Up(matches!(outage, Outage::Cut)));
            }
            Outage::Close => {
                self.act(&Act::Gone);
                self.pass(lasts);
                self.act(&Act::Up(false));
            }
            Outage::Full(hint) => {
                self.act(&Act::Take);
                let evicted = SessionError { code: SessionErrorCode::Evicted, text: "made room" };
                self.say(&Message::SessionError(evicted));
                let until = self.bed.now + lasts;
                while self.bed.now < until && self.ended.is_empty() {
                    self.pass(10 * MS);
                    if !std::mem::take(&mut self.bed.sink.sent).is_empty() {
                        self.act(&Act::Busy(hint));
                    }
                }
            }
        }
        self.pass(MS);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A request ends, whatever comes, and at any time.
    #[test]
    fn a_request_ends_whatever_its_cloud_does(
        acts in proptest::collection::vec(act(), 1..30),
        draft in draft(),
    ) {
        let mut world = World::new(&[draft]);
        world.run(&acts);
        prop_assert_eq!(world.ended.len(), 1);
    }

    #[test]
    fn so_do_many(acts in proptest::collection::vec(act(), 1..30), draft in draft()) {
        let mut world = World::new(&[draft; 5]);
        world.run(&acts);
        prop_assert_eq!(world.ended.len(), 5);
    }

    /// Each outage is shorter than a request waits for a cloud, and finds another token decided.
    #[test]
    fn a_cloud_that_comes_back_in_time_loses_nothing(
        outages in proptest::collection::vec((outage(), 0..24_000_u64, 1..4_usize), 1..8),
        draft in draft(),
    ) {
        let mut world = World::new(&[draft]);
        let mut outages = outages.into_iter();
        let mut next = outages.next();
        let mut due = 0;
        world.act(&Act::Up(false));
        for _ in 0..1_000 {
            world.pass(MS);
            if let Some((outage, lasts, tokens)) = next.filter(|_| world.tokens >= due) {
                due = world.tokens + tokens;
                next = outages.next();
                // Where pauses double, the next may be twice as long as all before together.
                let doubles = matches!(outage, Outage::Full(hint) if hint < 50);
                let lasts = if doubles { lasts.min(9_000) } else { lasts };
                world.suffer(outage, Duration::from_millis(lasts));
            }
            world.act(&Act::Answer);
            if !world.ended.is_empty() {
                break;
            }
            // A pause of its own.
            if world.bed.sink.sent.is_empty() {
                world.pass(PAUSE_MAX / 64);
            }
        }
        let ended = world.ended.pop().map(|end| end.map_err(|error| format!("{error:?}")));
        prop_assert_eq!(ended, Some(Ok(expected())));
    }
}

/// The lies that have a name each: without news, none outlasts its deadline.
#[test]
fn a_lie_that_is_told_again_and_again_ends_the_request() {
    use SessionErrorCode::{Evicted, NoSuchSession};
    let opens = |then: &[Act]| [&[Act::Opened(0), Act::Take], then].concat();
    for (lie, acts) in [
        ("says nothing", vec![Act::Take]),
        ("takes nothing", vec![Act::Wait]),
        ("never answers rows", opens(&[])),
        ("evicts at each OPEN", vec![Act::Take, Act::Lost(Evicted)]),
        ("evicts at each ROWS", opens(&[Act::Lost(Evicted)])),
        ("forgets at each ROWS", opens(&[Act::Lost(NoSuchSession)])),
        ("is busy for ever", vec![Act::Take, Act::Busy(0)]),
        ("is busy for longer", vec![Act::Take, Act::Busy(u32::MAX)]),
        ("flaps", vec![Act::Down, Act::Up(true)]),
        ("restarts for ever", opens(&[Act::Down, Act::Up(false)])),
        ("closes at each OPEN", vec![Act::Take, Act::Gone, Act::Up(false)]),
    ] {
        for pause in [1, 3, 40, 900, 7_000] {
            let mut world = World::new(&[DraftMode::Off]);
            let begin = world.bed.now;
            world.act(&Act::Up(false));
            world.settle();
            let mut opened = 0;
            for act in acts.iter().cycle() {
                // A session is opened once.
                let asked = world.bed.asks;
                match act {
                    Act::Opened(_) if opened == asked => {}
                    _ => world.act(act),
                }
                if matches!(act, Act::Opened(_)) {
                    opened = asked;
                }
                world.pass(Duration::from_millis(pause));
                if world.bed.core.running() == 0 {
                    break;
                }
            }
            let lasts = world.bed.now - begin;
            assert!(world.ended[0].is_err(), "{lie}");
            assert!(lasts <= DEADLINE + RECONNECT, "{lie}, {pause} ms: {lasts:?}");
        }
    }
}
