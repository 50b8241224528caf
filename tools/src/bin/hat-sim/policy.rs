//! Policies: values that the engine's cores work by, and costs that the simulator leaves out.

use anyhow::bail;
use hat_core::draft::DraftPolicy;
use hat_core::sched::Bound;
use hat_engine::EngineConfig;
use hat_engine::options::{ChunkPolicy, Codec, DraftMode};

use crate::costs::DeviceCosts;

/// Trained drafter of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proposer {
    Nobody,
    /// An adapter behind the input submodel.
    Adapter,
    /// Heads over the last deep row: what follows the root is computed once, and the rows of all
    /// levels together.
    Heads,
}

/// Policy by which a cloud cuts prompts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cut {
    /// As the engine's cloud does: a step takes as long as others bear.
    ByTime,
    /// Not at all: a chunk runs in one step.
    ReferenceRun,
    /// Into steps of this many rows of each.
    Rows(u32),
}

/// Place at which the device's layers are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The device.
    Device,
    /// The cloud, which holds the whole model: text goes up and comes down.
    Cloud,
}

/// A policy with a name.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Policy {
    pub(crate) name: String,
    /// Policy by which a device cuts prompts.
    pub(crate) chunks: ChunkPolicy,
    pub(crate) cut: Cut,
    /// A chunk is computed as a whole before any of it goes up.
    pub(crate) whole_chunks: bool,
    pub(crate) proposer: Proposer,
    pub(crate) draft: DraftMode,
    pub(crate) drafts: DraftPolicy,
    /// Drafting goes on below the likeliest tails while rows are away, as far as the device has
    /// nothing else to do, and what was right of it takes no time in the round that follows.
    pub(crate) ahead: bool,
    /// Rows that are back go through the head together.
    pub(crate) heads_together: bool,
    /// The draft head tells fewer tokens apart.
    pub(crate) short_head: bool,
    /// Codec of rows on the link.
    pub(crate) codec: Codec,
    /// Rows that the cloud holds already do not go up again.
    pub(crate) prefix: bool,
    pub(crate) place: Place,
}

/// Nodes of the tree that heads grow.
pub(crate) const HEADS_NODES: usize = 8;
/// Branches that are drafted ahead below the likeliest tails.
pub(crate) const AHEAD_WIDTH: usize = 4;
/// Rows of a step where the cloud alone cuts prompts.
const CLOUD_CHUNK_ROWS: u32 = 128;

/// Policies that are compared unless others are named.
pub(crate) const COMPARED: [&str; 5] = ["u-shape", "u-sarathi", "u-medusa", "hat", "ours"];

/// The published ablation, then our causes one by one on top of HAT, then together.
pub(crate) const ABLATION: [&str; 18] = [
    "u-shape",
    "pc",
    "sd",
    "sd+pc",
    "hat",
    "hat+auto",
    "hat+pieces",
    "hat+cut",
    "hat+heads",
    "hat+int8",
    "hat+prefix",
    "hat+short-head",
    "hat+levels",
    "hat+tree",
    "hat+tree+lookup",
    "hat+streaming",
    "ours",
    "ours+ahead",
];
/// Policies beside these.
const OTHERS: [&str; 6] =
    ["u-sarathi", "u-medusa", "lookup", "auto", "cloud-only", "cloud-only+drafts"];

impl Policy {
    /// A hidden layer cut in two and nothing more.
    pub(crate) fn u_shape() -> Self {
        Self {
            name: "u-shape".to_owned(),
            chunks: ChunkPolicy::Off,
            cut: Cut::ReferenceRun,
            whole_chunks: true,
            proposer: Proposer::Nobody,
            draft: DraftMode::Off,
            drafts: DraftPolicy {
                sends_unsure: false,
                sends_levels: false,
                branches_max: 0,
                batch_nodes: 0,
                ..DraftPolicy::DEFAULT
            },
            ahead: false,
            heads_together: true,
            short_head: false,
            codec: Codec::F16,
            prefix: false,
            place: Place::Device,
        }
    }

    /// HAT as published. The draft with which a chain ends is not sent: drafting ahead begins with
    /// it and its siblings.
    fn hat() -> Self {
        Self {
            chunks: ChunkPolicy::Paper,
            proposer: Proposer::Adapter,
            draft: DraftMode::Chain,
            ahead: true,
            ..Self::u_shape()
        }
    }

    /// The engine with a trained drafter, as a command starts it: the defaults of its
    /// configuration, and the row codec that `hat-split` writes into a bundle.
    pub(crate) fn ours() -> Self {
        let config = EngineConfig::new("device");
        let draft = DraftMode::default();
        Self {
            chunks: config.chunks,
            cut: Cut::ByTime,
            whole_chunks: false,
            proposer: if draft.asks_trained() { Proposer::Adapter } else { Proposer::Nobody },
            draft,
            drafts: DraftPolicy::DEFAULT,
            heads_together: false,
            short_head: true,
            codec: config.wire.unwrap_or_default(),
            prefix: config.prefix,
            ..Self::u_shape()
        }
    }

    /// A server that holds the whole model, and streams text.
    fn cloud_only() -> Self {
        Self {
            draft: DraftMode::Off,
            proposer: Proposer::Nobody,
            place: Place::Cloud,
            ..Self::ours()
        }
    }

    /// The policy of a name.
    pub(crate) fn named(name: &str) -> anyhow::Result<Self> {
        let (u_shape, hat, ours) = (Self::u_shape(), Self::hat(), Self::ours());
        let tree = |lookup: bool| {
            let (branches_max, draft) = (DraftPolicy::DEFAULT.branches_max, DraftMode::Auto);
            let branches_max = if lookup { branches_max } else { 0 };
            Self { draft, drafts: DraftPolicy { branches_max, ..hat.drafts }, ..hat.clone() }
        };
        let batch_nodes = DraftPolicy::DEFAULT.batch_nodes;
        let policy = match name {
            "u-shape" => u_shape,
            "u-sarathi" => Self { cut: Cut::Rows(CLOUD_CHUNK_ROWS), ..u_shape },
            "u-medusa" => Self {
                proposer: Proposer::Heads,
                draft: DraftMode::Tree,
                drafts: DraftPolicy { nodes_max: HEADS_NODES, ..u_shape.drafts },
                ..u_shape
            },
            "pc" => Self { chunks: ChunkPolicy::Paper, ..u_shape },
            "sd" => Self { ahead: false, chunks: ChunkPolicy::Off, ..hat },
            "sd+pc" => Self { ahead: false, ..hat },
            "hat" => hat,
            "hat+auto" => Self { chunks: ChunkPolicy::Auto, ..hat },
            "hat+pieces" => Self { whole_chunks: false, ..hat },
            "hat+cut" => Self { cut: Cut::ByTime, ..hat },
            "hat+heads" => Self { heads_together: false, ..hat },
            "hat+int8" => Self { codec: Codec::Int8, ..hat },
            "hat+prefix" => Self { prefix: true, ..hat },
            "hat+short-head" => Self { short_head: true, ..hat },
            "hat+levels" => {
                Self { drafts: DraftPolicy { sends_levels: true, ..hat.drafts }, ..hat }
            }
            "hat+tree" => tree(false),
            "hat+tree+lookup" => tree(true),
            "hat+streaming" => {
                let tree = tree(false);
                Self { drafts: DraftPolicy { batch_nodes, ..tree.drafts }, ..tree }
            }
            "ours" => ours,
            "ours+ahead" => Self { ahead: true, ..ours },
            "auto" => {
                let drafts = DraftPolicy { batch_nodes: 0, ..ours.drafts };
                Self { drafts, codec: Codec::F16, prefix: false, ..ours }
            }
            "lookup" => Self {
                draft: DraftMode::Lookup,
                proposer: Proposer::Nobody,
                codec: Codec::F16,
                prefix: false,
                ..ours
            },
            "cloud-only" => Self::cloud_only(),
            "cloud-only+drafts" => Self {
                draft: DraftMode::default(),
                proposer: Proposer::Adapter,
                ..Self::cloud_only()
            },
            _ => bail!("policy {name:?} is none of {}, {}", OTHERS.join(", "), ABLATION.join(", ")),
        };
        Ok(Self { name: name.to_owned(), ..policy })
    }

    /// The bound of the cloud's steps; `None` if it is measured.
    pub(crate) fn bound(&self) -> Option<Bound> {
        match self.cut {
            Cut::ByTime => None,
            Cut::ReferenceRun => Some(Bound::NONE),
            Cut::Rows(rows) => Some(Bound::of_rows(rows)),
        }
    }

    /// True if a prompt may go up in one piece of any length.
    pub(crate) fn is_uncut(&self) -> bool {
        self.chunks == ChunkPolicy::Off
    }

    /// Seconds of asking the adapter about this many nodes.
    pub(crate) fn proposal_seconds(&self, device: &DeviceCosts, nodes: usize) -> f64 {
        let head = if self.short_head { device.short_head } else { device.head };
        device.adapter.seconds(nodes) + head.seconds(nodes)
    }

    /// Seconds of one step of drafting ahead.
    pub(crate) fn ahead_seconds(&self, device: &DeviceCosts) -> f64 {
        device.layers.seconds(AHEAD_WIDTH) + self.proposal_seconds(device, AHEAD_WIDTH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_a_policy_and_differs_from_the_others() {
        let names: Vec<&str> = ABLATION.into_iter().chain(OTHERS).collect();
        let policies: Vec<Policy> = names.iter().map(|name| Policy::named(name).unwrap()).collect();
        for (index, policy) in policies.iter().enumerate() {
            for other in &policies[..index] {
                let renamed = Policy { name: other.name.clone(), ..policy.clone() };
                assert_ne!(renamed, *other, "{} and {}", policy.name, other.name);
            }
        }
        // What a reader takes for the engine is what a command starts.
        let ours = Policy::ours();
        assert_eq!((ours.chunks, ours.drafts), (ChunkPolicy::default(), DraftPolicy::DEFAULT));
        assert_eq!((ours.codec, ours.prefix), (Codec::default(), true));
        assert_eq!(ours.draft, DraftMode::default());
        assert!(Policy::named("best").unwrap_err().to_string().contains("ours"));
    }
}
