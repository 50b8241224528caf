//! Policies: switches over one cost file, and nothing else.

use anyhow::bail;
use hat_engine::EngineConfig;
use hat_engine::draft::DraftPolicy;
use hat_engine::options::{ChunkPolicy, Codec, DraftMode};

/// How a prompt goes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chunking {
    /// In one piece; the cloud runs it in one step.
    Off,
    /// In one piece; the cloud cuts it into steps of so many rows.
    Cloud(u32),
    /// In chunks, as the engine's planner cuts it.
    Device(ChunkPolicy),
}

/// Who guesses by computing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trained {
    Nobody,
    /// An adapter behind the input submodel.
    Adapter,
    /// Heads over the last deep row.
    Heads,
}

/// How guesses grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One below the other, until the drafter's confidence is below a threshold.
    Chain,
    /// The most probable first, as many as pay.
    Tree,
}

/// The switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Switches {
    pub(crate) chunking: Chunking,
    pub(crate) trained: Trained,
    pub(crate) shape: Shape,
    /// Prompt lookup guesses too.
    pub(crate) lookup: bool,
    /// Drafting goes on below the likeliest tail while rows are away.
    pub(crate) parallel: bool,
    /// Each level of a tree is on its way while the next is computed.
    pub(crate) levels: bool,
    /// More drafts go up while rows are away, where the engine finds that they pay.
    pub(crate) streaming: bool,
    /// The draft head tells fewer tokens apart.
    pub(crate) short_head: bool,
    /// How the numbers of a row cross the link.
    pub(crate) codec: Codec,
    /// Rows that the cloud holds already do not go up again.
    pub(crate) prefix: bool,
}

/// Switches with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) name: String,
    pub(crate) switches: Switches,
}

/// Sizes and thresholds of every policy: the engine's. The guess with which a chain ends is not
/// sent, drafting ahead begins with it and its siblings. (Kangaroo and the engine send it.)
pub(crate) const DRAFTS: DraftPolicy = DraftPolicy::DEFAULT;
/// Nodes of the tree that heads grow.
pub(crate) const HEADS_NODES: usize = 8;
/// Branches that are drafted ahead below a chain's tail.
pub(crate) const AHEAD_WIDTH: usize = 4;
/// Rows of a step where the cloud alone cuts prompts.
const CLOUD_CHUNK_ROWS: u32 = 128;

/// A hidden layer cut in two and nothing more.
pub(crate) const U_SHAPE: Switches = Switches {
    chunking: Chunking::Off,
    trained: Trained::Nobody,
    shape: Shape::Chain,
    lookup: false,
    parallel: false,
    levels: false,
    streaming: false,
    short_head: false,
    codec: Codec::F16,
    prefix: false,
};

/// HAT as published.
pub(crate) const HAT: Switches = Switches {
    chunking: Chunking::Device(ChunkPolicy::Paper),
    trained: Trained::Adapter,
    parallel: true,
    ..U_SHAPE
};

/// The engine with a trained drafter, as a command starts it: the defaults of its configuration,
/// and the row codec that `hat-split` writes into a bundle.
pub(crate) fn ours() -> Switches {
    let config = EngineConfig::new("device");
    let draft = DraftMode::default();
    Switches {
        chunking: Chunking::Device(config.chunks),
        trained: if draft.asks_trained() { Trained::Adapter } else { Trained::Nobody },
        shape: if draft == DraftMode::Chain { Shape::Chain } else { Shape::Tree },
        lookup: draft.looks_up(true),
        parallel: false,
        levels: true,
        streaming: draft.streams(),
        short_head: true,
        codec: config.wire.unwrap_or_default(),
        prefix: config.prefix,
    }
}

/// Policies that are compared unless others are named.
pub(crate) const COMPARED: [&str; 5] = ["u-shape", "u-sarathi", "u-medusa", "hat", "ours"];

/// The published ablation, then our causes one by one on top of HAT, then together.
pub(crate) const ABLATION: [&str; 15] = [
    "u-shape",
    "pc",
    "sd",
    "sd+pc",
    "hat",
    "hat+auto",
    "hat+int8",
    "hat+prefix",
    "hat+short-head",
    "hat+tree",
    "hat+levels",
    "hat+lookup",
    "hat+streaming",
    "ours",
    "ours+ahead",
];

impl Policy {
    /// The policy of a name.
    pub(crate) fn named(name: &str) -> anyhow::Result<Self> {
        let paper = Switches { chunking: Chunking::Device(ChunkPolicy::Paper), ..U_SHAPE };
        let drafts = Switches { trained: Trained::Adapter, ..U_SHAPE };
        let switches = match name {
            "u-shape" => U_SHAPE,
            "u-sarathi" => Switches { chunking: Chunking::Cloud(CLOUD_CHUNK_ROWS), ..U_SHAPE },
            "u-medusa" => Switches { trained: Trained::Heads, shape: Shape::Tree, ..U_SHAPE },
            "pc" => paper,
            "sd" => drafts,
            "sd+pc" => Switches { chunking: paper.chunking, ..drafts },
            "hat" => HAT,
            "hat+auto" => Switches { chunking: Chunking::Device(ChunkPolicy::Auto), ..HAT },
            "hat+int8" => Switches { codec: Codec::Int8, ..HAT },
            "hat+prefix" => Switches { prefix: true, ..HAT },
            "hat+short-head" => Switches { short_head: true, ..HAT },
            "hat+tree" => Switches { shape: Shape::Tree, ..HAT },
            "hat+lookup" => Switches { lookup: true, ..HAT },
            "hat+levels" => Switches { levels: true, ..HAT },
            "hat+streaming" => Switches { streaming: true, ..HAT },
            "ours" => ours(),
            "ours+ahead" => Switches { parallel: true, ..ours() },
            "auto" => Switches { streaming: false, codec: Codec::F16, prefix: false, ..ours() },
            "lookup" => Switches { lookup: true, shape: Shape::Tree, ..U_SHAPE },
            _ => bail!(
                "policy {name:?} is none of u-sarathi, u-medusa, lookup, auto, {}",
                ABLATION.join(", ")
            ),
        };
        Ok(Self { name: name.to_owned(), switches })
    }
}

impl Switches {
    /// Bytes of a row of `hidden` numbers.
    pub(crate) fn row_bytes(&self, hidden: usize) -> u64 {
        self.codec.row_bytes(hidden) as u64
    }

    /// Whether there is anything to draft with.
    pub(crate) fn drafts(&self) -> bool {
        self.lookup || self.trained != Trained::Nobody
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_a_policy_and_differs_from_the_others() {
        let names: Vec<&str> =
            ABLATION.into_iter().chain(["u-sarathi", "u-medusa", "lookup", "auto"]).collect();
        let policies: Vec<Policy> = names.iter().map(|name| Policy::named(name).unwrap()).collect();
        for (index, policy) in policies.iter().enumerate() {
            for other in &policies[..index] {
                assert_ne!(policy.switches, other.switches, "{} and {}", policy.name, other.name);
            }
        }
        // What a reader takes for the engine is what a command starts.
        assert_eq!(ours().chunking, Chunking::Device(ChunkPolicy::default()));
        assert_eq!((ours().codec, ours().prefix), (Codec::default(), true));
        assert!(Policy::named("best").unwrap_err().to_string().contains("ours"));
    }
}
