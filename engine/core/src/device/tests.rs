//! Requests through the core: rows from a table, and no model, link or clock.

mod deadlines;
mod pitfalls;

use std::collections::BTreeSet;

use hat_plan::{PAGE_SIZE, TokenId};
use hat_transport::conn::ConnectionId;
use hat_transport::endpoint::GoneError;
use hat_transport::frame::{Kind, Priority};
use hat_transport::message::{
    Arrivals, CloseCode, Message, Opened, OutputHead, Role, Rows, SessionError, SessionErrorCode,
    Want,
};
use hat_transport::pool::PoolConfig;
use hat_transport::random::SeededRandom;

use super::work::{DeviceWork, Verdict};
use super::*;
use crate::answer::EndTokens;
use crate::draft::drafter::{Decided, Drafted, SessionId};
use crate::draft::tree::Proposal;
use crate::draft::{DrafterKind, Source};
use crate::prefix::PageId;
use crate::request::Request as Asked;
use crate::sink::TestSink;
use crate::wire;

const TO: ConnectionId = ConnectionId(7);
const HIDDEN: usize = 8;
const VOCAB: usize = 400;
const MS: Duration = Duration::from_millis(1);

/// Rows of a session, as a cloud has them.
#[derive(Default)]
struct Told {
    /// The last committed one, and how many there are.
    tip: u32,
    committed: u32,
    /// Pending rows, and their parents.
    pending: BTreeMap<u32, u32>,
    /// True if the chunk at hand goes on.
    more: bool,
}

impl Told {
    /// Keeps the path to a row, which has to be there; 0 keeps nothing.
    fn commit(&mut self, row: u32) {
        if row == 0 {
            return;
        }
        let path = std::iter::successors(Some(row), |row| self.pending.get(row).copied());
        let rows = path.clone().count() - 1;
        assert_eq!(path.last(), Some(self.tip), "row {row} is kept, and is not there");
        self.committed += u32::try_from(rows).unwrap();
        let mut kept = BTreeSet::from([row]);
        self.pending.retain(|id, parent| kept.contains(parent) && kept.insert(*id));
        self.tip = row;
    }

    /// Takes rows, which have to follow from those before.
    fn take(&mut self, rows: &Rows<'_>) {
        let head = rows.head;
        let is_whole = self.more || head.decided || !head.more;
        assert!(is_whole, "{head:?} begins a batch of drafts that leaves in parts");
        self.more = head.more;
        self.commit(head.commit);
        for (id, parent) in (head.first_id..).zip(rows.parents_of_rows()) {
            if head.decided {
                assert_eq!(parent, self.tip, "{head:?} does not follow the last decided row");
                (self.tip, self.committed) = (id, self.committed + 1);
                self.pending.clear();
            } else {
                let is_known = parent == self.tip || self.pending.contains_key(&parent);
                assert!(is_known, "{head:?} hangs below row {parent}, which is not there");
                self.pending.insert(id, parent);
                assert!(self.pending.len() <= PENDING_ROWS_MAX, "{head:?} is one too many");
            }
        }
    }
}

/// A core, and a cloud whose rows come back as they went up.
struct Bed {
    core: DeviceCore,
    now: Instant,
    /// Frames that have not left.
    sink: TestSink,
    /// Of all frames so far, those that were looked at.
    seen: usize,
    /// OPEN frames so far.
    asks: u32,
    told: BTreeMap<u32, Told>,
    /// Frames of rows so far: their session, priority, and decided rows.
    sent_rows: Vec<(u32, Priority, u16)>,
    /// Pages named by each END so far, and rows that its session has committed by then.
    named: Vec<(usize, u32)>,
    /// Requests of the inputs so far, and the moves that came first.
    carried: Vec<(RequestId, usize)>,
    /// Pages that the cloud finds for each OPEN.
    held: u16,
    /// Computations until one is not done.
    fails_in: Option<u32>,
    opens: u32,
    ends: u32,
    rows: u32,
}

/// The token behind one.
fn next(token: TokenId) -> TokenId {
    (token % 6 + 1) % 6
}

/// A row is its token, many times over, and says which token is next.
fn compute(work: DeviceWork<'_>) {
    match work {
        DeviceWork::Input { moves, tokens, hidden, .. } => {
            moves.clear();
            for (row, token) in hidden.chunks_exact_mut(HIDDEN).zip(tokens) {
                row.fill(f32::from(u16::try_from(*token).unwrap()));
            }
        }
        DeviceWork::Head { hidden, verdict: Verdict::Argmax(argmax), .. } => {
            *argmax = Some((next(hidden[0] as TokenId), 1.0));
        }
        DeviceWork::Draft(work) => work.run(),
        _ => unreachable!("there are no tail layers, and greedy answers"),
    }
}

/// A drafter that drafts right and wrong, and looks at what it is told.
#[derive(Default)]
struct Proposer {
    opened: SessionId,
    /// Positions that each session has taken, and whether it holds rows of a tree.
    sessions: BTreeMap<SessionId, (u32, bool)>,
    /// Pages of any path that it has from earlier sessions.
    kept: usize,
}

impl Drafter for Proposer {
    fn describe(&self) -> String {
        "a rule".into()
    }

    fn open(&mut self, _: u32) -> Option<SessionId> {
        self.opened += 1;
        self.sessions.insert(self.opened, (0, false));
        Some(self.opened)
    }

    fn begin_behind(&mut self, session: SessionId, pages: &[PageId]) -> usize {
        let pages = self.kept.min(pages.len());
        self.sessions.get_mut(&session).unwrap().0 = (pages * PAGE_SIZE) as u32;
        pages
    }

    fn close(&mut self, session: SessionId) {
        self.sessions.remove(&session).expect("it is closed once");
    }

    fn commit(&mut self, session: SessionId, rows: &Decided<'_>) {
        let (taken, has_tree) = self.sessions.get_mut(&session).unwrap();
        assert!(!*has_tree, "rows are committed on top of a tree");
        assert_eq!(rows.first, *taken, "each position once, in order");
        *taken += u32::try_from(rows.tokens.len()).unwrap();
        for (row, token) in rows.shallow.chunks_exact(HIDDEN).zip(rows.tokens) {
            assert_eq!(row[0] as TokenId, *token, "another token's row");
        }
    }

    fn propose(
        &mut self,
        session: SessionId,
        rows: &Drafted<'_>,
        width: usize,
        proposals: &mut Vec<(usize, Proposal)>,
    ) {
        let (taken, has_tree) = self.sessions.get_mut(&session).unwrap();
        assert_eq!(rows.root_position + 1, *taken, "the root is the last that it has taken");
        *has_tree = true;
        for (row, at) in rows.shallow.chunks_exact(HIDDEN).zip(rows.new_nodes()) {
            let token = rows.nodes[at].token;
            assert_eq!(row[0] as TokenId, token, "another node's row");
            let said = [(next(token), 0.7), (next(next(token)), 0.2)];
            for (class, (token, probability)) in said.into_iter().enumerate().take(width) {
                let class = u8::try_from(class).unwrap();
                let source = Source { drafter: DrafterKind::Model, class };
                proposals.push((at, Proposal { token, probability, source }));
            }
        }
    }

    fn rollback(&mut self, session: SessionId) {
        self.sessions.get_mut(&session).unwrap().1 = false;
    }
}

impl Bed {
    fn new() -> Self {
        Self::with(true)
    }

    fn with(has_drafter: bool) -> Self {
        Self::with_names(has_drafter, false)
    }

    fn with_names(has_drafter: bool, names: bool) -> Self {
        let config = DeviceConfig {
            sessions_max: 4,
            kv_rows_max: 4096,
            step_rows_max: 512,
            chunks: ChunkPolicy::default(),
            codec: Codec::F32,
            reconnect: Duration::from_secs(30),
            cloud: "a table".into(),
        };
        let facts = BundleFacts {
            hidden_size: HIDDEN,
            context: 512,
            layers: 1..4,
            model_id: [0; 32],
            has_tail: false,
        };
        let now = Instant::now();
        let drafter = has_drafter.then(|| Box::new(Proposer::default()) as _);
        let random = Box::new(SeededRandom::new(1));
        let hello = wire::hello(Role::Device, [0; 32], HIDDEN, 1..4);
        let namer = PageNamer::new(Codec::F32, &facts, 1, [1; 32].into()).filter(|_| names);
        let core = DeviceCore::new(now, config, &facts, VOCAB, namer, drafter);
        let core = core.with_link(now, hello, None, random);
        Self {
            core,
            now,
            sink: TestSink::with_pool(PoolConfig { small: 512, large: 32 }),
            seen: 0,
            asks: 0,
            told: BTreeMap::new(),
            sent_rows: Vec::new(),
            named: Vec::new(),
            carried: Vec::new(),
            held: 0,
            fails_in: None,
            opens: 0,
            ends: 0,
            rows: 0,
        }
    }

    fn up(&mut self, resumed: bool) {
        let own = wire::hello(Role::Cloud, [0; 32], HIDDEN, 1..4);
        let hello = Hello { row_budget: 512, stages: 1, ..own };
        self.core.handle_inbound(Inbound::Up { hello, resumed });
    }

    fn submit(&mut self, draft: DraftMode) -> RequestId {
        self.submit_long(36, 20, draft)
    }

    fn submit_long(&mut self, rows: u32, tokens: u32, draft: DraftMode) -> RequestId {
        let prompt = (0..rows).map(|row| row % 6).collect::<Vec<_>>();
        let request = Asked::tokens(prompt.clone()).max_tokens(tokens).ignore_eos().draft(draft);
        let prepared = Prepared::new(request, prompt, VOCAB, 512).unwrap();
        let answer = Answer::new(&prepared, &EndTokens::default(), VOCAB);
        self.core.submit(self.now, prepared, answer)
    }

    /// One computation, if one is due, and frames for the connection.
    fn step(&mut self) -> bool {
        self.now += MS;
        self.turn()
    }

    /// The same at one moment.
    fn turn(&mut self) -> bool {
        let frames = &self.sink.sent;
        while self.core.poll_link(self.now).is_some() {}
        let cached = |session| frames.iter().filter(|(_, frame)| frame.session == session).count();
        self.core.handle_timeout(self.now, &cached);
        let work = self.core.poll_work(self.now, true);
        let has_work = work.is_some();
        if let Some(DeviceWork::Input { request, moves, .. }) = &work {
            self.carried.push((*request, moves.len()));
        }
        work.into_iter().for_each(compute);
        let reason = "the plug was pulled".to_owned();
        let fault = BackendFault { backend: "a table", reason, lasts: false };
        let fails = has_work && self.fails_in == Some(0);
        self.fails_in = self.fails_in.map(|left| left.saturating_sub(u32::from(has_work)));
        self.core.handle_work(self.now, MS, fails.then_some(&fault), &EndTokens::default());
        self.core.poll_transmit(self.now, TO, &mut self.sink, true);
        self.look_at_sent();
        has_work
    }

    /// Looks at frames that are new, which are the last.
    fn look_at_sent(&mut self) {
        let new = self.sink.total - std::mem::replace(&mut self.seen, self.sink.total);
        let first = self.sink.sent.len() - new;
        for (to, frame) in &self.sink.sent[first..] {
            assert_eq!(*to, TO);
            let told = self.told.entry(frame.session).or_default();
            match Message::decode(frame.kind, &frame.body) {
                Ok(Message::Open(_)) => self.asks += 1,
                Ok(Message::Rows(rows)) => {
                    let decided = if rows.head.decided { rows.head.count } else { 0 };
                    self.sent_rows.push((frame.session, frame.priority, decided));
                    told.take(&rows);
                }
                Ok(Message::End(end)) => {
                    assert!(end.commit == 0 || !end.pages.is_empty(), "a commit without names");
                    told.commit(end.commit);
                    self.named.push((end.pages.len(), told.committed));
                }
                _ => {}
            }
        }
    }

    fn say(&mut self, session: u32, message: &Message<'_>) {
        let frame = self.sink.message(session, message);
        self.core.handle_inbound(Inbound::Frame(frame));
    }

    /// The cloud answers all that has left.
    fn answer(&mut self) {
        for (_, frame) in std::mem::take(&mut self.sink.sent) {
            let session = frame.session;
            let rows = match Message::decode(frame.kind, frame.body.body()).unwrap() {
                Message::Open(_) => {
                    self.opens += 1;
                    let rows = u32::from(self.held) * PAGE_SIZE as u32;
                    let told = Told { tip: rows, committed: rows, ..Told::default() };
                    self.told.insert(session, told);
                    self.say(session, &Message::Opened(Opened { pages: self.held }));
                    continue;
                }
                Message::Rows(rows) => rows,
                Message::End(_) => {
                    self.ends += 1;
                    continue;
                }
                _ => continue,
            };
            let ids = rows.head.first_id..rows.head.first_id + u32::from(rows.head.count);
            self.rows += u32::from(rows.head.count);
            let skip = match rows.head.want {
                Want::None => continue,
                Want::Last => ids.len() - 1,
                Want::All => 0,
            };
            let ids: Vec<u32> = ids.skip(skip).collect();
            let count = u16::try_from(ids.len()).unwrap();
            let arrivals = Arrivals::default();
            let head = OutputHead { count, queue_us: 1, step_us: 2, step_rows: 3, arrivals };
            let payload = &rows.payload[skip * HIDDEN * 4..];
            let mut body = vec![0; head.payload_start() + payload.len()];
            let start = head.encode(&ids, &mut body);
            body[start..].copy_from_slice(payload);
            let frame = self.sink.frame(Kind::Output, session, Priority::Verify, &body);
            self.core.handle_inbound(Inbound::Frame(frame));
        }
    }

    /// Goes on until a request ends; `each` may do something after each computation.
    fn run(&mut self, mut each: impl FnMut(&mut Self, u32)) -> Vec<TokenId> {
        let mut tokens = 0;
        for _ in 0..10_000 {
            while self.step() {
                each(self, tokens);
            }
            self.answer();
            while let Some((_, event)) = self.core.poll_event() {
                match event {
                    RequestEvent::Said(Event::Token { .. }) => tokens += 1,
                    RequestEvent::Done(done) => return done.metrics.token_ids,
                    RequestEvent::Failed(error) => panic!("{error:?}"),
                    _ => {}
                }
            }
        }
        panic!("no end after {tokens} tokens");
    }
}

/// The answer to `0 1 2 .. 5`.
fn expected() -> Vec<TokenId> {
    (0..20).map(|at| at % 6).collect()
}

#[test]
fn a_request_runs_without_a_model() {
    for draft in DraftMode::ALL {
        let mut bed = Bed::new();
        bed.up(false);
        bed.submit(draft);
        assert_eq!(bed.run(|_, _| {}), expected(), "{}", draft.name());
        assert_eq!(bed.opens, 1);
        assert_eq!(bed.ends, 1, "it sends END");
        assert_eq!(bed.core.running(), 0);
        assert!(!bed.step(), "nothing is left to compute");
    }
}

/// A lost session is replayed, whenever it is lost; emitted tokens stay.
#[test]
fn a_session_may_be_lost_after_any_computation() {
    let evicted = SessionError { code: SessionErrorCode::Evicted, text: "made room" };
    let mut replays = 0;
    for draft in [DraftMode::Off, DraftMode::Lookup, DraftMode::All] {
        for lost_at in 0..40 {
            for is_evicted in [false, true] {
                let mut bed = Bed::new();
                bed.up(false);
                bed.submit(draft);
                let mut computed = 0;
                let said = bed.run(|bed, _| {
                    if computed == lost_at {
                        match is_evicted {
                            true => bed.say(bed.opens, &Message::SessionError(evicted)),
                            false => bed.up(false),
                        }
                    }
                    computed += 1;
                });
                let case = format!("{}, lost at {lost_at}, {is_evicted}", draft.name());
                assert_eq!(said, expected(), "{case}");
                // Rows that came before the news may have been the answer's last.
                assert!(bed.opens <= 2, "{case}: {} sessions", bed.opens);
                replays += bed.opens - 1;
            }
        }
    }
    assert!(replays > 60, "{replays} replays");
}

/// A fault in any computation, be it of drafts alone, ends its request and leaves the core as it
/// was.
#[test]
fn a_fault_is_noticed_at_any_computation() {
    for draft in [DraftMode::Off, DraftMode::Lookup, DraftMode::All] {
        let mut bed = Bed::new();
        bed.up(false);
        for fails_in in 0..12 {
            bed.submit(draft);
            bed.fails_in = Some(fails_in);
            let failed = (0..1000).find_map(|_| {
                while bed.step() {}
                bed.answer();
                std::iter::from_fn(|| bed.core.poll_event()).find_map(|(_, event)| match event {
                    RequestEvent::Failed(error) => Some(error),
                    RequestEvent::Done(_) => panic!("{}: {fails_in}", draft.name()),
                    _ => None,
                })
            });
            assert!(matches!(failed, Some(RequestError::Backend(_))), "{fails_in}: {failed:?}");
            assert_eq!(bed.core.running(), 0);
        }
        bed.fails_in = None;
        bed.submit(draft);
        assert_eq!(bed.run(|_, _| {}), expected(), "{}", draft.name());
    }
}

/// A request that is gone leaves nothing: its frames, its pages, its place.
#[test]
fn a_cancelled_request_takes_its_frames_along() {
    let mut bed = Bed::new();
    bed.up(false);
    let id = bed.submit(DraftMode::Off);
    bed.step();
    bed.answer();
    while bed.step() {}
    assert!(bed.sink.sent.iter().any(|(_, frame)| frame.kind == Kind::Rows));
    bed.core.cancel(id);
    bed.step();
    let kinds: Vec<Kind> = bed.sink.sent.iter().map(|(_, frame)| frame.kind).collect();
    assert_eq!(kinds, [Kind::End]);
    let message = Message::decode(Kind::End, &bed.sink.sent[0].1.body).unwrap();
    assert!(matches!(message, Message::End(end) if end.commit == 0), "{message:?}");
    assert_eq!(bed.core.running(), 0);
}

/// Frames of others are taken between two levels of a tree; its own wait until it is whole.
#[test]
fn only_the_request_whose_tree_grows_is_left_alone() {
    let mut bed = Bed::new();
    bed.up(false);
    let growing = bed.submit(DraftMode::Tree);
    let other = bed.submit(DraftMode::Off);
    let (mut levels, mut ended) = (0, 0);
    for _ in 0..10_000 {
        while bed.step() {
            let session = |id| bed.core.requests.get(&id).and_then(|it| it.session.wire_id());
            let (Some(own), Some(others)) = (session(growing), session(other)) else { continue };
            if bed.core.work.growing != Some(growing) || !bed.core.inbox.is_empty() {
                continue;
            }
            bed.say(own, &Message::Ended);
            bed.say(others, &Message::Ended);
            bed.step();
            if bed.core.work.growing == Some(growing) {
                levels += 1;
                let left = bed.core.inbox.iter().map(|inbound| match inbound {
                    Inbound::Frame(frame) => frame.session,
                    _ => 0,
                });
                assert_eq!(left.collect::<Vec<_>>(), [own]);
            }
        }
        bed.answer();
        while let Some((_, event)) = bed.core.poll_event() {
            if let RequestEvent::Done(done) = event {
                assert_eq!(done.metrics.token_ids, expected());
                ended += 1;
            }
        }
        if ended == 2 {
            break;
        }
    }
    assert!(ended == 2 && levels > 0, "{ended} answers, {levels} levels");
}

/// A close is an outage, which requests outlast, or an end of them; the cloud is dialled again
/// after both, by and by.
#[test]
fn close_codes_are_of_two_kinds() {
    use CloseCode::{
        Done, Incompatible, Internal, Other, Overload, Protocol, ShuttingDown, Version,
    };
    let address = ([127, 0, 0, 1], 7433).into();
    let end = |code| {
        let reason = "for lunch".to_owned();
        Inbound::gone(&GoneError::ClosedByPeer { address, code, reason })
    };
    for code in [Done, Overload, ShuttingDown, Internal, Other(77)] {
        let mut bed = Bed::new();
        bed.up(false);
        bed.submit(DraftMode::Off);
        let said = bed.run(|bed, tokens| {
            if tokens == 5 && bed.opens == 1 {
                // What came before is taken before: a cloud that drains finishes its steps.
                bed.answer();
                bed.core.handle_inbound(end(code));
                bed.up(false);
                bed.opens += 1;
            }
        });
        assert_eq!(said, expected(), "{code:?}");
        assert_eq!(bed.asks, 2, "{code:?}");
    }
    for code in [Protocol, Version, Incompatible] {
        let mut bed = Bed::new();
        bed.up(false);
        bed.submit(DraftMode::Off);
        bed.step();
        bed.core.handle_inbound(end(code));
        bed.step();
        let failed = std::iter::from_fn(|| bed.core.poll_event()).find_map(|event| match event {
            (_, RequestEvent::Failed(error)) => Some(format!("{error:?}")),
            _ => None,
        });
        assert!(failed.is_some_and(|text| text.contains("for lunch")), "{code:?}");
        let mut pauses = Vec::new();
        for _ in 0..12 {
            let begin = bed.now;
            while bed.core.poll_link(bed.now) != Some(LinkCommand::Dial) {
                bed.now += bed.core.poll_timeout(bed.now).expect("it dials on");
            }
            pauses.push(bed.now - begin);
            bed.core.handle_inbound(end(code));
            bed.step();
        }
        assert!(pauses[0] <= 100 * MS && pauses[11] >= 2500 * MS, "{pauses:?}");
        assert!(pauses.iter().all(|pause| *pause <= 5000 * MS), "{pauses:?}");
    }
}
