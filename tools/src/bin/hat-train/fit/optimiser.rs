//! AdamW with a clipped gradient, and the learning rate over time.

use ndarray::Zip;

use crate::drafter::{Dims, Kind, Params};

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.98;
const EPSILON: f32 = 1e-8;
/// Longest gradient.
const NORM_MAX: f32 = 1.0;

/// The optimiser's memory.
pub(super) struct AdamW {
    pub(super) first: Params,
    pub(super) second: Params,
    pub(super) step: usize,
}

impl AdamW {
    pub(super) fn new(kind: Kind, dims: &Dims) -> Self {
        Self { first: Params::zeros(kind, dims), second: Params::zeros(kind, dims), step: 0 }
    }

    /// One step against `grads`. Norms do not decay.
    pub(super) fn update(
        &mut self,
        params: &mut Params,
        grads: &mut Params,
        rate: f32,
        decay: f32,
    ) {
        self.step += 1;
        let squares = grads.values.iter().flat_map(|g| g.iter()).map(|g| f64::from(*g).powi(2));
        let length = squares.sum::<f64>().sqrt() as f32;
        let clip = (NORM_MAX / (length + 1e-6)).min(1.0);
        let step = i32::try_from(self.step).unwrap_or(i32::MAX);
        let (correct1, correct2) = (1.0 - BETA1.powi(step), 1.0 - BETA2.powi(step));
        let memory = self.first.values.iter_mut().zip(&mut self.second.values);
        for ((value, grad), (first, second)) in
            params.values.iter_mut().zip(&grads.values).zip(memory)
        {
            let decay = if value.nrows() > 1 { decay } else { 0.0 };
            Zip::from(value).and(grad).and(first).and(second).for_each(|p, g, m, v| {
                let g = g * clip;
                *m = BETA1 * *m + (1.0 - BETA1) * g;
                *v = BETA2 * *v + (1.0 - BETA2) * g * g;
                let step = (*m / correct1) / ((*v / correct2).sqrt() + EPSILON);
                *p -= rate * (step + decay * *p);
            });
        }
    }
}

/// A linear rise and half a cosine, to a twentieth of the highest rate.
pub(super) struct Schedule {
    pub(super) highest: f32,
    pub(super) warmup: usize,
    pub(super) steps: usize,
}

impl Schedule {
    pub(super) fn rate(&self, step: usize) -> f32 {
        let rise = ((step + 1) as f32 / self.warmup.max(1) as f32).min(1.0);
        let turn = std::f32::consts::PI * step as f32 / self.steps.max(1) as f32;
        self.highest * rise * (0.05 + 0.95 * 0.5 * (1.0 + turn.cos()))
    }
}
