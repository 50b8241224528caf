//! Drafting: drafts of the tokens to come, so that one round trip may yield several.
//!
//! A [`Tree`] of drafts hangs below the last decided token. Its rows go to the cloud in one
//! frame; when they are back, the device verifies from the root: each visited row's logits decide a
//! token, and verification goes on as long as a child has it. What is emitted is what plain
//! decoding emits, whatever was drafted: drafters are free to be wrong, and only speed depends on
//! them.
//!
//! - [`tree`]: drafts of several drafters merged, the most probable ones first
//! - [`gumbel`]: what seeded noise says of a choice to come
//! - [`lookup`]: tokens that followed the same words earlier in the prompt or the answer
//! - [`drafter`]: the seam of drafters that compute
//! - [`policy`]: sizes and thresholds, and how many drafts pay

pub mod drafter;
pub mod gumbel;
pub mod lookup;
pub mod policy;
mod sessions;
pub mod tree;

pub use lookup::Lookup;
pub(crate) use policy::Acceptance;
pub use policy::DraftPolicy;
pub use sessions::ModelDrafter;
pub use tree::{Node, Tree};

use crate::InputError;

/// Drafting mode of a request. The answer does not depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DraftMode {
    /// Every drafter that there is, as far as it pays by what is measured; zero drafts if none do.
    #[default]
    Auto,
    /// No drafts: one row a round trip.
    Off,
    /// The trained drafter's likeliest token, and so on: a chain.
    Chain,
    /// The trained drafter's likeliest tokens and lookup in one tree.
    Tree,
    /// Lookup alone.
    Lookup,
    /// As `Tree`, and while its rows are away more go up, below what is likely or was right so
    /// far, where that pays by what is measured.
    Stream,
    /// As `Stream`, with as many rows away as there may be, whether it pays or not.
    All,
}

impl DraftMode {
    /// All modes.
    pub const ALL: [Self; 7] =
        [Self::Auto, Self::Off, Self::Chain, Self::Tree, Self::Lookup, Self::Stream, Self::All];

    /// The name in flags and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Chain => "chain",
            Self::Tree => "tree",
            Self::Lookup => "lookup",
            Self::Stream => "stream",
            Self::All => "all",
        }
    }

    /// True if rows may go up before earlier verdicts are back.
    #[must_use]
    pub const fn streams(self) -> bool {
        matches!(self, Self::Auto | Self::Stream | Self::All)
    }

    /// True if what followed the same words before is drafted; `has_trained` says if there is a
    /// trained drafter.
    #[must_use]
    pub const fn looks_up(self, has_trained: bool) -> bool {
        match self {
            Self::Off => false,
            Self::Chain => !has_trained,
            _ => true,
        }
    }

    /// True if the trained drafter is asked if there is one.
    #[must_use]
    pub const fn asks_trained(self) -> bool {
        !matches!(self, Self::Off | Self::Lookup)
    }

    /// True if it asks for a trained drafter by name.
    #[must_use]
    pub const fn wants_trained(self) -> bool {
        matches!(self, Self::Chain | Self::Tree | Self::Stream | Self::All)
    }
}

impl std::str::FromStr for DraftMode {
    type Err = InputError;

    fn from_str(text: &str) -> Result<Self, InputError> {
        // The others are for comparisons, and nobody is pointed to them.
        Self::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| {
            InputError::field("draft", format!("{text:?} is none of auto, off, lookup"))
        })
    }
}

/// Drafter that proposed a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrafterKind {
    /// [`Lookup`]: what followed the same words before.
    Lookup,
    /// [`drafter`]: a small model.
    Model,
}

impl DrafterKind {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Lookup, Self::Model];

    /// The name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Model => "adapter",
        }
    }
}

/// Drafter of a token, and the class of its confidence: proposals of one class are equally good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The drafter.
    pub drafter: DrafterKind,
    /// Class of the drafter's confidence, `0..CLASSES`.
    pub class: u8,
}

/// Classes of proposals that a drafter tells apart.
pub const CLASSES: usize = 16;

impl Source {
    /// A proposal of the trained drafter, which says itself how probable it is: alike are those
    /// of like probability, first choices and others apart.
    #[must_use]
    pub fn of_model(rank: usize, probability: f32) -> Self {
        let bin = (probability.clamp(0.0, 1.0) * BINS as f32) as usize;
        let class = bin.min(BINS - 1) + if rank == 0 { 0 } else { BINS };
        Self { drafter: DrafterKind::Model, class: u8::try_from(class).expect("few classes") }
    }
}

/// Parts of `0..=1` that tell proposals of the trained drafter apart.
const BINS: usize = CLASSES / 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_others_are_refused_by_name() {
        for mode in DraftMode::ALL {
            assert_eq!(mode.name().parse::<DraftMode>().unwrap(), mode);
        }
        let refused = |text: &str| text.parse::<DraftMode>().unwrap_err().to_string();
        assert!(refused("fast").ends_with("\"fast\" is none of auto, off, lookup"));
    }
}
