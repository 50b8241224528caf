//! Rounds of drafting over a recorded greedy answer: what a device would have kept.
//!
//! A device's core drafts as it does at work; its cloud is a stand-in that answers each row at
//! once, and a row is its position. A device computes the shallow rows of its own drafts exactly,
//! so what its drafter says below right drafts is known from the recording. Below a wrong draft it
//! isn't: there the drafts at the same depth of the right path stand in. They decide only which
//! nodes a wrong branch takes from the budget, never what is kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use hat_core::answer::{Answer, EndTokens, Prepared};
use hat_core::chunk::ChunkPolicy;
use hat_core::device::{DeviceConfig, DeviceCore, DeviceWork, Inbound, RequestEvent, Verdict};
use hat_core::draft::drafter::{Decided, Drafted, Drafter, SessionId};
use hat_core::draft::tree::Proposal;
use hat_core::draft::{DraftMode, DraftPolicy};
use hat_core::request::{Metrics, Request};
use hat_core::sequence::PENDING_ROWS_MAX;
use hat_core::wire::BundleFacts;
use hat_plan::TokenId;
use hat_transport::codec::Codec;
use hat_transport::conn::{ConnectionId, Frame, FrameSink, SendError};
use hat_transport::frame::{FRAME_BYTES_MAX, Kind, Priority};
use hat_transport::message::{Arrivals, Hello, Message, Opened, OutputHead, Role, Want};
use hat_transport::pool::{Buf, Pool, PoolConfig};

use crate::shard::Recording;

/// Drafts by draft step and position of the answer; a drafter that reads no deep rows has one
/// step for all.
pub(crate) struct Proposals {
    /// `[steps][positions]`, best first.
    pub(crate) steps: Vec<Vec<Vec<Proposal>>>,
}

impl Proposals {
    /// Drafts at the token after `position`, `depth` tokens below the last decided one. Below the
    /// last step its drafts stand in.
    fn at(&self, position: usize, depth: usize) -> Option<&[Proposal]> {
        let step = &self.steps[(depth - 1).min(self.steps.len() - 1)];
        step.get(position).map(Vec::as_slice)
    }
}

/// An answer and what was drafted.
pub(super) struct Trial<'a> {
    pub(super) source: &'a str,
    prompt: usize,
    tokens: &'a [TokenId],
    proposals: Option<Arc<Proposals>>,
}

impl<'a> Trial<'a> {
    pub(super) fn new(recording: &'a Recording, proposals: Option<Proposals>) -> Self {
        let facts = &recording.facts;
        let (source, prompt) = (facts.source.as_str(), facts.prompt);
        Self { source, prompt, tokens: &recording.tokens, proposals: proposals.map(Arc::new) }
    }

    /// Of the positions where draft step `step` has its say: how many, how often its first
    /// draft was right, and how often one of its first five.
    pub(super) fn hits(&self, step: usize) -> [usize; 3] {
        let mut hits = [0; 3];
        let Some(proposals) = &self.proposals else { return hits };
        let answer = &self.tokens[self.prompt..];
        for (position, right) in answer[1..].iter().enumerate().skip(step - 1) {
            let Some(at) = proposals.at(position, step) else { break };
            let rank = at.iter().position(|proposal| proposal.token == *right);
            hits[0] += 1;
            hits[1] += usize::from(rank == Some(0));
            hits[2] += usize::from(rank.is_some_and(|rank| rank < 5));
        }
        hits
    }
}

/// Tokens emitted after the first, and round trips that took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Score {
    pub(super) tokens: usize,
    pub(super) rounds: usize,
    /// Nodes that were sent, roots not counted.
    pub(super) nodes: usize,
}

/// A way of drafting: a mode of the device, and its sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rule {
    pub(super) mode: DraftMode,
    pub(super) policy: DraftPolicy,
}

impl Rule {
    /// Prompt lookup alone.
    pub(super) fn lookup(nodes_max: usize) -> Self {
        Self { mode: DraftMode::Lookup, policy: DraftPolicy { nodes_max, ..DraftPolicy::DEFAULT } }
    }

    /// The trained drafter's first drafts, one below the other, however unsure.
    pub(super) fn chain(chain_max: usize) -> Self {
        let policy = DraftPolicy { chain_max, chain_probability_min: 0.0, ..DraftPolicy::DEFAULT };
        Self { mode: DraftMode::Chain, policy }
    }

    /// The most probable drafts first, in levels and of a width as in `shape`.
    pub(super) fn tree(nodes_max: usize, with_lookup: bool, shape: DraftPolicy) -> Self {
        let branches_max = if with_lookup { shape.branches_max } else { 0 };
        Self { mode: DraftMode::Tree, policy: DraftPolicy { nodes_max, branches_max, ..shape } }
    }

    pub(super) fn needs_drafter(self) -> bool {
        self.mode.asks_trained()
    }
}

const CLOUD: ConnectionId = ConnectionId(1);
/// Positions of the longest answer, its prompt included.
const POSITIONS_MAX: u32 = 1 << 17;

/// A device that drafts by one rule; it learns from one answer to the next.
pub(super) struct Player {
    rule: Rule,
    core: DeviceCore,
    frames: Frames,
    now: Instant,
    vocab_size: usize,
}

impl Player {
    /// A device whose model has `vocab_size` tokens.
    pub(super) fn new(rule: Rule, vocab_size: usize) -> Self {
        let config = DeviceConfig {
            sessions_max: 1,
            kv_rows_max: POSITIONS_MAX as usize + PENDING_ROWS_MAX,
            step_rows_max: 512,
            chunks: ChunkPolicy::Off,
            codec: Codec::F32,
            reconnect: Duration::MAX / 1024,
            cloud: "a recording".to_owned(),
        };
        let facts = BundleFacts {
            hidden_size: 1,
            context: POSITIONS_MAX,
            layers: 1..2,
            model_id: [0; 32],
            has_tail: false,
        };
        let now = Instant::now();
        let mut core = DeviceCore::new(now, config, &facts, vocab_size, None, None);
        core.work_by(rule.policy, false);
        let hello = Hello {
            row_budget: 512,
            rows_pending_max: PENDING_ROWS_MAX as u16,
            frame_bytes_max: FRAME_BYTES_MAX as u32,
            ..Hello::new(Role::Cloud)
        };
        core.handle_inbound(Inbound::Up { hello, resumed: false });
        let pool = Pool::new(PoolConfig { small: 64, large: 8 });
        Self { rule, core, frames: Frames { pool, queue: Vec::new() }, now, vocab_size }
    }

    /// Plays the whole answer. The first token comes with the prompt and does not count.
    pub(super) fn play(&mut self, trial: &Trial<'_>) -> anyhow::Result<Score> {
        let Trial { prompt, tokens, .. } = *trial;
        self.core.drafter = trial.proposals.clone().map(|proposals| {
            let drafter: Box<dyn Drafter> = Box::new(Recorded { prompt, proposals });
            drafter
        });
        let (before, said) = tokens.split_at(prompt);
        let request = Request::tokens(before.to_vec()).max_tokens(u32::try_from(said.len())?);
        let request = request.draft(self.rule.mode);
        let prepared = Prepared::new(request, before.to_vec(), self.vocab_size, POSITIONS_MAX)?;
        let answer = Answer::new(&prepared, &EndTokens::default(), self.vocab_size);
        self.core.submit(self.now, prepared, answer);
        let metrics = self.run(tokens)?;
        ensure!(metrics.token_ids == said, "the device says something else than was recorded");
        Ok(Score {
            tokens: said.len() - 1,
            rounds: metrics.timings.rounds as usize,
            nodes: metrics.timings.draft_n as usize,
        })
    }

    /// Goes on until the request ends; `text` follows from its prompt.
    fn run(&mut self, text: &[TokenId]) -> anyhow::Result<Metrics> {
        loop {
            let mut is_idle = true;
            self.core.handle_timeout(self.now, &|_| 0_usize);
            while let Some(work) = self.core.poll_work(self.now, true) {
                compute(work, text);
                self.core.handle_work(self.now, Duration::ZERO, None, &EndTokens::default());
                is_idle = false;
            }
            self.core.poll_transmit(self.now, CLOUD, &mut self.frames, true);
            while let Some((_, event)) = self.core.poll_event() {
                match event {
                    RequestEvent::Done(done) => return Ok(done.metrics),
                    RequestEvent::Failed(error) => bail!("the device ends the answer: {error:?}"),
                    _ => {}
                }
            }
            for frame in std::mem::take(&mut self.frames.queue) {
                self.answer(&frame)?;
                is_idle = false;
            }
            ensure!(!is_idle, "the device waits for nothing");
        }
    }

    /// The cloud answers a frame.
    fn answer(&mut self, frame: &Frame) -> anyhow::Result<()> {
        let (kind, body) = match Message::decode(frame.kind, frame.body.body())? {
            Message::Open(_) => {
                let message = Message::Opened(Opened { pages: 0 });
                let mut body = self.frames.take(message.encoded_len())?;
                message.encode(body.body_mut());
                (Kind::Opened, body)
            }
            Message::Rows(rows) => {
                let count = usize::from(rows.head.count);
                let skip = match rows.head.want {
                    Want::None => return Ok(()),
                    Want::Last => count - 1,
                    Want::All => 0,
                };
                let ids: Vec<u32> = (rows.head.first_id..).take(count).skip(skip).collect();
                let head = OutputHead {
                    count: u16::try_from(ids.len())?,
                    queue_us: 0,
                    step_us: 1,
                    step_rows: u32::from(rows.head.count),
                    arrivals: Arrivals::default(),
                };
                let payload = &rows.payload[rows.payload.len() * skip / count..];
                let mut body = self.frames.take(head.payload_start() + payload.len())?;
                let start = head.encode(&ids, body.body_mut());
                body.body_mut()[start..].copy_from_slice(payload);
                (Kind::Output, body)
            }
            _ => return Ok(()),
        };
        let (session, priority) = (frame.session, Priority::Verify);
        self.core.handle_inbound(Inbound::Frame(Frame { kind, session, priority, body }));
        Ok(())
    }
}

/// A row is its position, and says what comes after it in `text`.
fn compute(work: DeviceWork<'_>, text: &[TokenId]) {
    match work {
        DeviceWork::Input { moves, plan, hidden, .. } => {
            moves.clear();
            for (row, position) in hidden.iter_mut().zip(plan.positions) {
                *row = *position as f32;
            }
        }
        DeviceWork::Head { hidden, verdict: Verdict::Argmax(argmax), .. } => {
            *argmax = text.get(hidden[0] as usize + 1).map(|token| (*token, 1.0));
        }
        DeviceWork::Draft(work) => work.run(),
        _ => unreachable!("there are no tail layers, and greedy answers"),
    }
}

/// Frames on their way to the cloud.
struct Frames {
    pool: Pool,
    queue: Vec<Frame>,
}

impl Frames {
    fn take(&self, bytes: usize) -> anyhow::Result<Buf> {
        self.pool.take(bytes).ok_or_else(|| anyhow::anyhow!("no buffer of {bytes} bytes is left"))
    }
}

impl FrameSink for Frames {
    fn buffer(&mut self, _: Priority, body_bytes: usize) -> Option<Buf> {
        self.pool.take(body_bytes)
    }

    fn send(
        &mut self,
        _: ConnectionId,
        kind: Kind,
        session: u32,
        priority: Priority,
        body: Buf,
    ) -> Result<(), SendError> {
        self.queue.push(Frame { kind, session, priority, body });
        Ok(())
    }

    fn discard(&mut self, _: ConnectionId, _: u32) -> usize {
        0
    }
}

/// The drafts over one answer, in the trained drafter's place.
struct Recorded {
    /// Tokens before the answer.
    prompt: usize,
    proposals: Arc<Proposals>,
}

impl Drafter for Recorded {
    fn describe(&self) -> String {
        "recorded drafts".to_owned()
    }

    fn open(&mut self, _: u32) -> Option<SessionId> {
        Some(1)
    }

    fn close(&mut self, _: SessionId) {}

    fn commit(&mut self, _: SessionId, _: &Decided<'_>) {}

    fn propose(
        &mut self,
        _: SessionId,
        rows: &Drafted<'_>,
        width: usize,
        proposals: &mut Vec<(usize, Proposal)>,
    ) {
        let root = rows.root_position as usize - self.prompt;
        for node in rows.new_nodes() {
            let depth = rows.nodes[node].depth as usize;
            let at = self.proposals.at(root + depth, depth + 1).unwrap_or_default();
            proposals.extend(at.iter().take(width).map(|proposal| (node, *proposal)));
        }
    }

    fn rollback(&mut self, _: SessionId) {}
}

#[cfg(test)]
mod tests {
    use hat_core::draft::Source;

    use super::*;

    fn proposal(list: &[(u32, f32)]) -> Vec<Proposal> {
        let proposal = |(rank, &(token, probability)): (usize, &(u32, f32))| Proposal {
            token,
            probability,
            source: Source::of_model(rank, probability),
        };
        list.iter().enumerate().map(proposal).collect()
    }

    fn trial<'a>(tokens: &'a [u32], prompt: usize, proposals: Option<Proposals>) -> Trial<'a> {
        Trial { source: "test", prompt, tokens, proposals: proposals.map(Arc::new) }
    }

    fn play(trial: &Trial<'_>, rule: Rule) -> Score {
        Player::new(rule, 20).play(trial).unwrap()
    }

    fn tree(nodes: usize, with_lookup: bool) -> Rule {
        Rule::tree(nodes, with_lookup, DraftPolicy { width: 4, ..DraftPolicy::DEFAULT })
    }

    #[test]
    fn a_chain_accepts_what_is_right_from_its_front() {
        // Answer 5 6 7 8 9 10; drafts at each position, the same at each depth.
        let tokens = [1, 5, 6, 7, 8, 9, 10];
        let right = [(6, 0.9), (7, 0.9), (0, 0.9), (9, 0.9), (0, 0.9)];
        let steps = vec![right.iter().map(|pair| proposal(&[*pair])).collect()];
        let trial = trial(&tokens, 1, Some(Proposals { steps }));
        // 5: 6 and 7 are accepted, 8 follows; 8: 9 is accepted, and 10, the last, needs no draft.
        let score = Score { tokens: 5, rounds: 2, nodes: 2 + 1 };
        assert_eq!(play(&trial, Rule::chain(2)), score);
        assert_eq!(trial.hits(1), [5, 3, 3]);
        assert_eq!(trial.hits(2), [4, 2, 2]);
    }

    #[test]
    fn each_depth_asks_its_own_draft_step_and_deeper_ones_the_last() {
        let tokens = [1, 5, 6, 7, 8, 9, 10];
        let step = |said: [u32; 5]| said.iter().map(|token| proposal(&[(*token, 0.1)])).collect();
        let steps = vec![step([6, 0, 0, 0, 0]), step([0, 7, 8, 0, 0])];
        let trial = trial(&tokens, 1, Some(Proposals { steps }));
        let score = Score { tokens: 5, rounds: 2, nodes: 3 };
        assert_eq!(play(&trial, Rule::chain(3)), score);
        assert_eq!([trial.hits(1), trial.hits(2)], [[5, 1, 1], [4, 2, 2]]);
    }

    #[test]
    fn a_tree_takes_the_most_probable_nodes() {
        let tokens = [1, 5, 6, 7, 2, 3];
        let steps = vec![vec![
            proposal(&[(9, 0.6), (6, 0.3)]),
            proposal(&[(7, 0.9), (8, 0.05)]),
            proposal(&[(4, 0.5), (2, 0.4)]),
            proposal(&[(3, 0.9)]),
        ]];
        let trial = trial(&tokens, 1, Some(Proposals { steps }));
        // The first level takes both drafts for 5. Below 9 stands what follows 6, so that its
        // path is worth .54, below 6 it is worth .27: the third node is wrong, the fourth right.
        let score = |nodes| {
            let score = play(&trial, tree(nodes, false));
            (score.rounds, score.nodes)
        };
        assert_eq!([1, 2, 3, 4].map(score), [(3, 2), (2, 2 + 2), (2, 3 + 2), (2, 4)]);
    }

    #[test]
    fn lookup_copies_and_a_device_learns_from_one_answer_to_the_next() {
        let tokens = [7, 1, 2, 3, 4, 9, 2, 3, 8, 1, 2, 3, 4, 9, 5];
        let alone = trial(&tokens, 11, None); // the answer is 3 4 9 5
        assert_eq!(play(&alone, Rule::lookup(6)), Score { tokens: 3, rounds: 1, nodes: 2 });
        // A drafter that is surer than lookup, and always wrong, has the only node at first.
        let wrong = Proposals { steps: vec![vec![proposal(&[(0, 0.9)]); 3]] };
        let both = trial(&tokens, 11, Some(wrong));
        let mut player = Player::new(tree(1, true), 20);
        let rounds: Vec<usize> = (0..40).map(|_| player.play(&both).unwrap().rounds).collect();
        assert_eq!((rounds[0], rounds[39]), (3, 2), "{rounds:?}");
    }

    #[test]
    fn drafter_and_lookup_share_one_tree() {
        // Lookup copies 4 9 after "1 2 3"; the drafter has only the first of these, and 6 6 6.
        let tokens = [7, 1, 2, 3, 4, 9, 8, 1, 2, 3, 4, 9, 6, 5];
        let proposals = || {
            let at = [(4, 0.9), (6, 0.2), (6, 0.9), (0, 0.1)];
            Some(Proposals { steps: vec![at.iter().map(|pair| proposal(&[*pair])).collect()] })
        };
        let with = trial(&tokens, 9, proposals());
        let rounds = |lookup| play(&with, tree(8, lookup)).rounds;
        assert_eq!([rounds(false), rounds(true)], [2, 1]);
        assert_eq!(play(&trial(&tokens, 9, None), Rule::lookup(8)).rounds, 2);
    }
}
