//! Requests through the core: rows from a table, and no model, link or clock.

use hat_plan::TokenId;
use hat_transport::conn::ConnectionId;
use hat_transport::frame::{FRAME_BYTES_MAX, Kind, Priority};
use hat_transport::message::{
    Arrivals, Message, Opened, OutputHead, Role, SessionError, SessionErrorCode, Want,
};

use super::work::{DeviceWork, Verdict};
use super::*;
use crate::answer::EndTokens;
use crate::request::Request as Asked;
use crate::testkit::TestSink;

const TO: ConnectionId = ConnectionId(7);
const HIDDEN: usize = 8;
const VOCAB: usize = 400;
const MS: Duration = Duration::from_millis(1);

/// A core, and a cloud whose rows come back as they went up.
struct Bed {
    core: DeviceCore,
    now: Instant,
    sink: TestSink,
    /// Computations until one is not done.
    fails_in: Option<u32>,
    opens: u32,
    ends: u32,
    rows: u32,
}

/// The token behind one.
fn next(token: TokenId) -> TokenId {
    (token + 1) % 6
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
        DeviceWork::Head { hidden, verdict: Verdict::Greatest(greatest), .. } => {
            *greatest = Some((next(hidden[0] as TokenId), 1.0));
        }
        DeviceWork::Draft(work) => work.run(),
        _ => unreachable!("there are no tail layers, and greedy answers"),
    }
}

impl Bed {
    fn new() -> Self {
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
        let core = DeviceCore::new(now, config, &facts, VOCAB, None, None);
        let sink = TestSink::new();
        Self { core, now, sink, fails_in: None, opens: 0, ends: 0, rows: 0 }
    }

    fn up(&mut self, resumed: bool) {
        let hello = Hello {
            row_budget: 512,
            rows_pending_max: 64,
            frame_bytes_max: u32::try_from(FRAME_BYTES_MAX).unwrap(),
            ..Hello::new(Role::Cloud)
        };
        self.core.handle_inbound(Inbound::Up { hello, resumed });
    }

    fn submit(&mut self, draft: DraftMode) -> RequestId {
        let prompt = [0, 1, 2, 3, 4, 5].repeat(6);
        let request = Asked::tokens(prompt.clone()).max_tokens(20).ignore_eos().draft(draft);
        let prepared = Prepared::new(request, prompt, VOCAB, 512).unwrap();
        let answer = Answer::new(&prepared, &EndTokens::default(), VOCAB);
        self.core.submit(self.now, prepared, answer)
    }

    /// One computation, if one is due, and frames for the connection.
    fn step(&mut self) -> bool {
        self.now += MS;
        self.core.handle_timeout(self.now, &|_| false);
        let work = self.core.poll_work(self.now, true);
        let has_work = work.is_some();
        work.into_iter().for_each(compute);
        let reason = "the plug was pulled".to_owned();
        let fault = BackendFault { backend: "a table", reason, lasts: false };
        let fails = has_work && self.fails_in == Some(0);
        self.fails_in = self.fails_in.map(|left| left.saturating_sub(u32::from(has_work)));
        self.core.handle_work(self.now, MS, fails.then_some(&fault), &EndTokens::default());
        self.core.poll_transmit(self.now, TO, &mut self.sink, true);
        has_work
    }

    fn say(&mut self, session: u32, message: &Message<'_>) {
        self.core.handle_inbound(Inbound::Frame(self.sink.message(session, message)));
    }

    /// The cloud answers all that has left.
    fn answer(&mut self) {
        for (_, frame) in std::mem::take(&mut self.sink.sent) {
            let session = frame.session;
            let rows = match Message::decode(frame.kind, frame.body.body()).unwrap() {
                Message::Open(_) => {
                    self.opens += 1;
                    self.say(session, &Message::Opened(Opened { pages: 0 }));
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
        assert_eq!(bed.ends, 1, "it says goodbye");
        assert_eq!(bed.core.running(), 0);
        assert!(!bed.step(), "nothing is left to compute");
    }
}

/// What is lost with a session goes up again, whenever it is lost; what is emitted stays.
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

/// Whatever was not computed, be it drafts alone, the request ends with the fault, and leaves the
/// core as it was.
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
    let message = Message::decode(Kind::End, bed.sink.sent[0].1.body.body()).unwrap();
    assert!(matches!(message, Message::End(end) if end.commit == 0), "{message:?}");
    assert_eq!(bed.core.running(), 0);
}
