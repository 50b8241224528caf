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
mod mode;
pub mod policy;
mod sessions;
pub mod tree;

pub use lookup::Lookup;
pub use mode::DraftMode;
pub(crate) use policy::Acceptance;
pub use policy::DraftPolicy;
pub use sessions::ModelDrafter;
pub use tree::{Node, Tree};

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
