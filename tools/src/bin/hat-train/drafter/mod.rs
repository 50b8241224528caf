//! The drafters, as the training loop sees them: f32 matrices, forward and backward written out.
//!
//! The `deep` drafter, for the token at position `i` with shallow row `s_i`:
//!
//! ```text
//! u_i = W1 nrm(s_i) + W2 nrm(f_{i-1})        f: deep row after the model's final norm, or the
//! x_i = decoder layer(u)_i                      drafter's own y where that is not known yet
//! y_i = rms_norm(Wo nrm(x_i) + Wf nrm(f_{i-1}))
//! ```
//!
//! and `y_i` times the rows of the model's own head are the logits of token `i + 1`. The `layer`
//! drafter is the same without `W2` and `Wf`; the `paper` drafter has neither these nor the
//! feed-forward part, as in HAT (arXiv 2503.18989).
//!
//! Training unrolls: step 1 reads the true deep row of the token before, step `k` what step
//! `k - 1` said of it, and attends to what a device has then: keys of step 1 up to where the round
//! began, and after that one key of each later step.

mod attention;
mod layer;
mod params;
mod primitive;
mod unroll;

pub(crate) use params::{
    Dims, Kind, NORM, NamedTensor, PARAMETERS, Params, WF, WO, WeightReader, write_tensors,
};
pub(crate) use primitive::{Rows, linear, rms_norm};
pub(crate) use unroll::{Batch, Span, Unroll};
