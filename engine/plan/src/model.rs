//! The submodels, whatever backend computes them. One dynamic call a step.

use std::any::Any;
use std::ops::Range;

use crate::{AttendBatch, BackendError, BackendFault, BatchBuffers, RowMove, SharedRows};

/// An index into the vocabulary.
pub type TokenId = u32;

/// The arithmetic of the CPU backends, as specified in `docs/ARITHMETIC.md`.
pub const ARITHMETIC_CPU: u32 = 1;
/// The arithmetic of the CUDA kernels, which stands in their sources (`docs/KERNELS.md`).
pub const ARITHMETIC_CUDA: u32 = 2;

/// Something that computes: its kernels, its arithmetic, its faults.
pub trait Computes {
    /// One line for people: which kernels run, and why.
    fn describe(&self) -> String;
    /// The exact arithmetic of all methods; the CPU's where nothing else is said. Equal ids give
    /// equal bits; 0 promises nothing.
    fn arithmetic_id(&self) -> u32 {
        ARITHMETIC_CPU
    }
    /// The fault since the last question, if there was one. Then nothing was computed since, and
    /// what KV stores hold means nothing. A fault that lasts is the answer from then on.
    fn fault(&mut self) -> Option<BackendFault> {
        None
    }
}

/// The device's side of the model.
pub trait DeviceForward: Computes + Send {
    /// Embedding and layers `0..split_layer` for the rows of `plan`; `hidden` gets
    /// `[rows, hidden_size]`.
    fn input(&mut self, plan: &AttendBatch<'_>, tokens: &[TokenId], hidden: &mut [f32]);
    /// The last layers, for rows that came back from the cloud, in place. Fills their KV. Does
    /// nothing without tail layers.
    fn tail(&mut self, plan: &AttendBatch<'_>, hidden: &mut [f32]);
    /// Final norm and LM head for a row `[hidden_size]`, or for as many as there is room for;
    /// `logits` gets `[rows, vocab_size]`.
    fn head(&mut self, hidden: &[f32], logits: &mut [f32]);
    /// As [`DeviceForward::head`], but only the token with the largest logit and that logit, of
    /// equal ones the lowest. `None` if some logit is not finite.
    fn argmax(&mut self, hidden: &[f32]) -> Option<(TokenId, f32)>;
    /// Moves KV rows of all layers.
    fn compact(&mut self, moves: &[RowMove]);
}

/// The rows of one step of the middle submodel.
#[derive(Debug, Default)]
pub struct MiddleStep {
    /// Plan of the rows, sequence after sequence; sequences stand in ascending order of entry
    /// layer.
    pub plan: BatchBuffers,
    /// Entry layer of each sequence, ascending. `[sequences]`
    pub entry_layers: Vec<u32>,
    /// Layer before which all rows leave.
    pub exit_layer: u32,
    /// Rows that move in the KV store before anything is computed.
    pub moves: Vec<RowMove>,
    /// The rows, in and out. `[rows, hidden_size]`
    pub hidden: Vec<f32>,
    /// The rows that somebody reads afterwards, ascending; all of them if it is `None`. What
    /// `hidden` holds of the others then means nothing.
    pub wanted: Option<Vec<Range<usize>>>,
    /// Between two stages: the rows where the next one takes them. `hidden` means nothing then.
    pub shared: Option<SharedRows>,
}

/// The cloud's side of the model.
pub trait MiddleForward: Computes + Send {
    /// Runs a step, in place.
    fn forward(&mut self, step: &mut MiddleStep);
    /// Makes this stage hand its rows to `next` without the host, if both can: rows of `steps`
    /// steps at most at a time.
    ///
    /// # Errors
    /// [`BackendError`] if there is no memory for them.
    fn link(&mut self, next: &dyn MiddleForward, steps: usize) -> Result<(), BackendError> {
        let _ = (next, steps);
        Ok(())
    }
    /// Description of the way in which rows get to the stage that this one is linked to; `None`
    /// through `hidden`.
    fn hands_over(&self) -> Option<&str> {
        None
    }
    /// The model as `Any`, for the stage before it.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }
}

/// A token and how probable the drafter thinks it is, given that all before it is right.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likely {
    /// The token.
    pub token: TokenId,
    /// Over the draft vocabulary. `0..=1`
    pub probability: f32,
}

/// A trained drafter's layer and head. The caller keeps the slots: a sequence of the drafter's own,
/// whose committed rows are decided tokens.
pub trait DraftForward: Computes + Send {
    /// Shallow rows are those after this many layers.
    fn split_layer(&self) -> usize;
    /// True if [`DraftForward::remember`] and [`DraftForward::decide`] look at deep rows.
    fn reads_deep(&self) -> bool;
    /// Fills the keys of decided rows from which nothing is drafted. `shallow` and `deep_before`
    /// are `[rows, hidden_size]`; `deep_before` holds what the cloud returned for the token before
    /// each, zeros where it returned nothing (within the prompt).
    fn remember(&mut self, plan: &AttendBatch<'_>, shallow: &[f32], deep_before: &[f32]);
    /// As [`DraftForward::remember`], and says in `y` (`[rows, hidden_size]`) what follows.
    fn decide(
        &mut self,
        plan: &AttendBatch<'_>,
        shallow: &[f32],
        deep_before: &[f32],
        y: &mut [f32],
    );
    /// Rows of drafted tokens: `y_before` is what was said for their parents.
    fn draft(&mut self, plan: &AttendBatch<'_>, shallow: &[f32], y_before: &[f32], y: &mut [f32]);
    /// The `count` likeliest tokens after each row of `y`, best first, appended to `out`: `count`
    /// for each row, or the whole draft vocabulary where it is smaller.
    fn likeliest(&mut self, y: &[f32], count: usize, out: &mut Vec<Likely>);
}
