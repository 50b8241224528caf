//! After warm-up a decode round of both cores allocates the text of its events, and nothing else.

#![expect(clippy::disallowed_methods, clippy::unwrap_used, reason = "a test owns its cores")]

#[path = "../../compute/tests/counting/mod.rs"]
mod counting;
#[expect(dead_code, reason = "it has more than this test needs")]
mod sink;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hat_core::answer::{Answer, Prepared, Spelling, Vocabulary};
use hat_core::chunk::ChunkPolicy;
use hat_core::cloud::{CloudCore, CloudCoreConfig, CloudFigures, LinkEvent, StepBatch};
use hat_core::device::{
    DeviceConfig, DeviceCore, DeviceWork, Inbound, PageNamer, RequestEvent, Verdict,
};
use hat_core::draft::drafter::{Decided, Drafted, Drafter, SessionId};
use hat_core::draft::tree::Proposal;
use hat_core::draft::{DraftMode, Source};
use hat_core::request::{Event, Prompt, Request};
use hat_core::wire::{self, BundleFacts};
use hat_plan::TokenId;
use hat_transport::codec::Codec;
use hat_transport::conn::ConnectionId;
use hat_transport::message::{Hello, Role};

use counting::allocations;
use sink::TestSink;

const DEVICE: ConnectionId = ConnectionId(7);
const HIDDEN: usize = 8;
const SESSIONS: usize = 4;
/// Turns of a measurement.
const TURNS: usize = 200;
/// Turns before it: trees and batches of drafts have their largest sizes by then.
const WARM_UP: usize = 600;
const TOKENS: u32 = 30_000;
const VOCAB: usize = 400;
const CONTEXT: u32 = 1 << 15;

/// The token behind one.
fn next(token: TokenId) -> TokenId {
    (token + 1) % 6
}

/// A row is its token, many times over; the cloud sends it back as it came, and the head says
/// which token is next.
fn compute(work: DeviceWork<'_>) {
    match work {
        DeviceWork::Input { moves, tokens, hidden, .. } => {
            moves.clear();
            for (row, token) in hidden.chunks_exact_mut(HIDDEN).zip(tokens) {
                row.fill(*token as f32);
            }
        }
        DeviceWork::Head { hidden, verdict: Verdict::Argmax(argmax), .. } => {
            *argmax = Some((next(hidden[0] as TokenId), 1.0));
        }
        DeviceWork::Draft(work) => work.run(),
        _ => unreachable!("there are no tail layers, and greedy answers"),
    }
}

/// Drafts two tokens below each node: the first is right, or the second, or, behind one of six
/// tokens, neither.
struct TestDrafter;

impl Drafter for TestDrafter {
    fn describe(&self) -> String {
        "a table".to_owned()
    }

    fn open(&mut self, rows_max: u32) -> Option<SessionId> {
        Some(rows_max)
    }

    fn close(&mut self, _: SessionId) {}

    fn commit(&mut self, _: SessionId, _: &Decided<'_>) {}

    fn propose(
        &mut self,
        _: SessionId,
        rows: &Drafted<'_>,
        _: usize,
        proposals: &mut Vec<(usize, Proposal)>,
    ) {
        for node in rows.new_nodes() {
            let token = rows.nodes[node].token;
            let [first, second] = match token {
                2 => [(token + 3) % 6, next(token)],
                4 => [1, 2],
                _ => [next(token), (token + 3) % 6],
            };
            for (rank, (token, probability)) in [(first, 0.6), (second, 0.3)].iter().enumerate() {
                let (token, probability) = (*token, *probability);
                let source = Source::of_model(rank, probability);
                proposals.push((node, Proposal { token, probability, source }));
            }
        }
    }

    fn rollback(&mut self, _: SessionId) {}
}

/// Each token is a letter.
struct Letters;

impl Vocabulary for Letters {
    fn is_end(&self, _: TokenId) -> bool {
        false
    }

    fn token_bytes(&self, _: TokenId) -> &[u8] {
        b"a"
    }

    fn spelling(&self, _: &Prompt) -> Box<dyn Spelling> {
        Box::new(Self)
    }
}

impl Spelling for Letters {
    fn push(&mut self, _: TokenId) -> &str {
        "a"
    }

    fn finish(&mut self) -> &str {
        ""
    }
}

/// A device, a cloud, and the frames between them.
struct Pair {
    device: DeviceCore,
    up: TestSink,
    cloud: CloudCore,
    down: TestSink,
    steps: VecDeque<StepBatch>,
    now: Instant,
    /// Tokens that were decided, each an event with a text.
    tokens: usize,
    /// Rows that moved in the device's KV store.
    moves: usize,
}

fn hello(role: Role) -> Hello {
    Hello { row_budget: 512, stages: 1, ..wire::hello(role, [7; 32], HIDDEN, 1..4) }
}

impl Pair {
    fn new(draft: DraftMode) -> Self {
        let now = Instant::now();
        let config = DeviceConfig {
            sessions_max: SESSIONS,
            kv_rows_max: SESSIONS * CONTEXT as usize,
            step_rows_max: 512,
            chunks: ChunkPolicy::default(),
            codec: Codec::F32,
            reconnect: Duration::from_secs(30),
            cloud: "a table".into(),
        };
        let facts = BundleFacts {
            hidden_size: HIDDEN,
            context: CONTEXT,
            layers: 1..4,
            model_id: [7; 32],
            has_tail: false,
        };
        let namer = PageNamer::new(Codec::F32, &facts, 1, [1; 32].into());
        let drafter: Box<dyn Drafter> = Box::new(TestDrafter);
        let device = DeviceCore::new(now, config, &facts, VOCAB, namer, Some(drafter));
        let config = CloudCoreConfig {
            sessions_max: 64,
            sessions_per_device_max: 64,
            context_max: CONTEXT,
            idle_after: Duration::from_secs(60),
            step_within: Duration::from_secs(60),
        };
        let cloud = CloudCore::new(config, hello(Role::Cloud), 5000, CloudFigures::default());
        let (up, down) = (TestSink::new(), TestSink::new());
        let (steps, tokens, moves) = (VecDeque::new(), 0, 0);
        let mut pair = Self { device, up, cloud, down, steps, now, tokens, moves };
        let (to_cloud, to_device) = (hello(Role::Device), hello(Role::Cloud));
        pair.cloud.handle_link(now, DEVICE, LinkEvent::Up { hello: to_cloud, resumed: false });
        pair.device.handle_inbound(Inbound::Up { hello: to_device, resumed: false });
        for first in 0..SESSIONS as u32 {
            let prompt: Vec<TokenId> = (first..first + 40).map(|token| token % 6).collect();
            let request = Request::tokens(prompt.clone()).max_tokens(TOKENS).draft(draft);
            let prepared = Prepared::new(request, prompt, VOCAB, CONTEXT).unwrap();
            let answer = Answer::new(&prepared, &Letters, VOCAB);
            pair.device.submit(now, prepared, answer);
        }
        pair
    }

    /// All that the device does at once, and then one step of the cloud in two turns of three.
    fn turn(&mut self, number: usize) {
        self.now += Duration::from_millis(1);
        let now = self.now;
        self.device.handle_timeout(now, &|_| false);
        self.device.poll_transmit(now, DEVICE, &mut self.up, true);
        while let Some(work) = self.device.poll_work(now, true) {
            if let DeviceWork::Input { moves, .. } = &work {
                self.moves += moves.len();
            }
            compute(work);
            self.device.handle_work(now, Duration::from_micros(10), None, &Letters);
            self.device.poll_transmit(now, DEVICE, &mut self.up, true);
        }
        for (_, frame) in self.up.sent.drain(..) {
            self.cloud.handle_frame(now, DEVICE, frame);
        }
        while (self.steps.len() as u64) < self.cloud.steps_ahead(now)
            && let Some(batch) = self.cloud.poll_step(now)
        {
            self.steps.push_back(batch);
        }
        if !number.is_multiple_of(3)
            && let Some(mut batch) = self.steps.pop_front()
        {
            batch.took = Duration::from_millis(1);
            self.cloud.handle_step(now, batch, &mut self.down);
        }
        self.cloud.poll_transmit(now, &mut self.down);
        for (_, frame) in self.down.sent.drain(..) {
            self.device.handle_inbound(Inbound::Frame(frame));
        }
        while let Some((_, event)) = self.device.poll_event() {
            match event {
                RequestEvent::Said(Event::Token { .. }) => self.tokens += 1,
                RequestEvent::Done(_) => panic!("an answer is whole, and no round any more"),
                RequestEvent::Failed(error) => panic!("{error:?}"),
                _ => {}
            }
        }
    }
}

/// One test in this binary: others would allocate meanwhile.
#[test]
fn a_decode_round_allocates_the_text_of_its_events_alone() {
    for draft in DraftMode::ALL {
        let (mut pair, name) = (Pair::new(draft), draft.name());
        (0..WARM_UP).for_each(|turn| pair.turn(turn));
        (pair.tokens, pair.moves) = (0, 0);
        let before = allocations();
        assert!(before > 0, "nothing is counted");
        (0..TURNS).for_each(|turn| pair.turn(turn));
        let count = allocations() - before;
        assert!(pair.tokens > SESSIONS * 100, "{name}: {} tokens", pair.tokens);
        assert_eq!(count, pair.tokens, "{name}: allocations, and tokens");
        // Trees are left beside their first branch, and batches of drafts are stale while they
        // wait.
        let tree = matches!(draft, DraftMode::Auto | DraftMode::Tree | DraftMode::Stream);
        assert!(!tree || pair.moves > 0, "{name}: no row moves");
        let dropped = pair.cloud.figures().dropped;
        assert!(draft != DraftMode::All || dropped > 1000, "{name}: {dropped} rows are dropped");
    }
}
