//! Drafts of a trained drafter along recorded answers: the engine's own drafter, with the rows
//! that a device has.

use anyhow::Context as _;
use half::f16;
use half::slice::HalfFloatSliceExt as _;
use hat_compute::{DraftModel, open};
use hat_core::draft::drafter::{Decided, Drafted, Drafter as _};
use hat_core::draft::tree::Proposal;
use hat_core::draft::{ModelDrafter, Node, Source};
use hat_core::page::pages_for;
use hat_core::sequence::PENDING_ROWS_MAX;
use hat_engine::options::Processor;
use hat_loader::{Bundle, DrafterArchitecture, DrafterFile};

use super::play::Proposals;
use crate::shard::Recording;

/// Draft steps that are computed.
pub(super) const DEPTH_MAX: usize = 8;
/// Drafts that are kept of each draft step.
pub(super) const PROPOSALS_MAX: usize = 16;
/// Rows of one step of the drafter.
const ROWS_MAX: usize = 256;

/// A trained drafter over recordings.
pub(crate) struct Proposer {
    drafter: ModelDrafter,
    hidden_size: usize,
    vocabulary: usize,
    /// Draft steps that say something of their own.
    steps: usize,
}

impl Proposer {
    /// The drafter of a file, for recordings of at most `rows` positions.
    pub(crate) fn new(adapter: &DrafterFile, device: &Bundle, rows: usize) -> anyhow::Result<Self> {
        let pages = pages_for(rows + PENDING_ROWS_MAX);
        let model =
            DraftModel::new(open::cpu(Processor::Auto, 1)?, device, adapter, ROWS_MAX, pages)?;
        let hidden_size = device.config().hidden_size;
        Ok(Self {
            drafter: ModelDrafter::new(Box::new(model), hidden_size, ROWS_MAX, pages),
            hidden_size,
            vocabulary: adapter.vocabulary().len(),
            steps: if adapter.kind() == DrafterArchitecture::Deep { DEPTH_MAX } else { 1 },
        })
    }

    /// Drafts at each position and depth; logits are divided by `temperature`.
    pub(crate) fn proposal(
        &mut self,
        recording: &Recording,
        temperature: f32,
    ) -> anyhow::Result<Proposals> {
        let (facts, hidden) = (&recording.facts, self.hidden_size);
        let (rows, tokens) = (facts.tokens - 1, &recording.tokens);
        let (shallow, deep) = (f32s(&recording.shallow[0]), f32s(&recording.deep));
        let shallow = |from: usize, to: usize| &shallow[from * hidden..to * hidden];
        let session = self.drafter.open(u32::try_from(facts.tokens)?).context("no session")?;
        let decided = |from: usize, to: usize, deep_before| Decided {
            first: u32::try_from(from).expect("a context fits u32"),
            tokens: &tokens[from..to],
            shallow: shallow(from, to),
            deep_before,
        };
        // A device has no deep rows of a prompt but the last.
        self.drafter.commit(session, &decided(0, facts.prompt, None));
        let width = if temperature == 1.0 { PROPOSALS_MAX } else { self.vocabulary };
        let mut steps = vec![vec![Vec::new(); rows - facts.prompt]; self.steps];
        let mut found = Vec::new();
        for root in facts.prompt..rows {
            let before = root - 1 - facts.deep_first;
            let deep_before = Some(&deep[before * hidden..(before + 1) * hidden]);
            self.drafter.commit(session, &decided(root, root + 1, deep_before));
            let end = rows.min(root + self.steps);
            let nodes = chain(&tokens[root..end]);
            let (root_position, shallow) = (u32::try_from(root)?, shallow(root, end));
            let drafted = Drafted { nodes: &nodes, first: 0, root_position, shallow, draw: None };
            found.clear();
            self.drafter.propose(session, &drafted, width, &mut found);
            self.drafter.rollback(session);
            for of_node in found.chunk_by(|a, b| a.0 == b.0) {
                let depth = of_node[0].0;
                steps[depth][root - facts.prompt + depth] = best(of_node, temperature);
            }
        }
        self.drafter.close(session);
        Ok(Proposals { steps })
    }
}

/// The first drafts of a node as they are with another temperature.
fn best(found: &[(usize, Proposal)], temperature: f32) -> Vec<Proposal> {
    let best = found.iter().take(PROPOSALS_MAX).map(|(_, proposal)| *proposal);
    if temperature == 1.0 {
        return best.collect();
    }
    let other = |proposal: &Proposal| proposal.probability.powf(1.0 / temperature);
    let sum: f32 = found.iter().map(|(_, proposal)| other(proposal)).sum();
    let best = best.enumerate().map(|(rank, proposal)| {
        let probability = other(&proposal) / sum;
        Proposal { probability, source: Source::of_model(rank, probability), ..proposal }
    });
    best.collect()
}

/// A tree that is the right path, below its first token.
fn chain(tokens: &[u32]) -> Vec<Node> {
    let node = |(depth, token): (u32, &u32)| Node {
        token: *token,
        parent: depth.saturating_sub(1) as usize,
        depth,
        probability: 1.0,
        source: None,
    };
    (0..).zip(tokens).map(node).collect()
}

fn f32s(rows: &[f16]) -> Vec<f32> {
    let mut numbers = vec![0.0; rows.len()];
    rows.convert_to_f32_slice(&mut numbers);
    numbers
}
