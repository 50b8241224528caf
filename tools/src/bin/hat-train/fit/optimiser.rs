//! AdamW with a clipped gradient, and the learning rate over time.

use std::collections::BTreeMap;

use anyhow::Context as _;
use candle_core::Tensor;
use candle_core::backprop::GradStore;

use super::drafter::Params;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.98;
const EPSILON: f64 = 1e-8;
/// Longest gradient.
const NORM_MAX: f64 = 1.0;

/// The optimiser's memory. candle-nn has this optimiser, but shows nobody its moments, and a run
/// goes on from them.
pub(super) struct AdamW {
    /// Averages of each tensor's gradient and of its square.
    pub(super) moments: BTreeMap<&'static str, [Tensor; 2]>,
    pub(super) step: usize,
}

impl AdamW {
    pub(super) fn new(params: &Params) -> candle_core::Result<Self> {
        let mut moments = BTreeMap::new();
        for (name, value) in params {
            moments.insert(*name, [value.zeros_like()?, value.zeros_like()?]);
        }
        Ok(Self { moments, step: 0 })
    }

    /// One step against `grads`. Norms do not decay.
    pub(super) fn update(
        &mut self,
        params: &Params,
        grads: &GradStore,
        rate: f64,
        decay: f64,
    ) -> anyhow::Result<()> {
        self.step += 1;
        let grads = self.moments.keys().map(|name| {
            let grad = grads.get(&params[name]);
            grad.with_context(|| format!("the loss does not depend on {name}"))
        });
        let grads: Vec<&Tensor> = grads.collect::<Result<_, _>>()?;
        let mut squares = 0.0;
        for grad in &grads {
            squares += f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        let clip = (NORM_MAX / (squares.sqrt() + 1e-6)).min(1.0);
        let step = i32::try_from(self.step).unwrap_or(i32::MAX);
        let (correct1, correct2) = (1.0 - BETA1.powi(step), 1.0 - BETA2.powi(step));
        for ((name, [first, second]), grad) in self.moments.iter_mut().zip(grads) {
            let (value, grad) = (&params[name], (grad * clip)?);
            *first = ((&*first * BETA1)? + (&grad * (1.0 - BETA1))?)?;
            *second = ((&*second * BETA2)? + (grad.sqr()? * (1.0 - BETA2))?)?;
            let root = (&*second / correct2)?.sqrt()?;
            let decayed =
                value.as_tensor().affine(if value.rank() > 1 { decay } else { 0.0 }, 0.0)?;
            let step = (((&*first / correct1)? / (root + EPSILON)?)? + decayed)?;
            value.set(&(value.as_tensor() - (step * rate)?)?.detach())?;
        }
        Ok(())
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
