//! Loss of a drafter: against the target's distribution and its deep row.

use candle_core::{DType, Device, Result, Tensor};
use hat_loader::DrafterArchitecture;

use super::data::draw;
use super::drafter::{Drafter, Example, linear, log_softmax};

/// Weights of the draft steps in the loss.
pub(super) const STEP_WEIGHTS: [f64; 6] = [1.0, 0.8, 0.64, 0.512, 0.41, 0.328];

/// The loss, with the part of the model that it needs.
pub(super) struct Loss {
    /// Rows of the head for the draft vocabulary, most frequent first. `[vocabulary, hidden_size]`
    pub(super) head: Tensor,
    pub(super) frequent: usize,
    pub(super) drawn: usize,
    pub(super) seed: u64,
}

/// The loss of one draft step over a batch, a position.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepLoss {
    /// Kullback-Leibler divergence from the target, nats.
    pub(super) divergence: f64,
    pub(super) smooth: f64,
    /// Share of positions where both say the same first.
    pub(super) agreement: f64,
}

/// Weights of divergence and distance in the loss.
const fn weights(kind: DrafterArchitecture) -> [f64; 2] {
    match kind {
        DrafterArchitecture::Paper => [0.1, 1.0],
        _ => [1.0, 0.5],
    }
}

impl Loss {
    /// The losses of all draft steps over a batch, and their weighted sum, which is what is
    /// learned from.
    pub(super) fn of(
        &self,
        drafter: &Drafter,
        examples: &[Example],
        unroll: usize,
        batch: usize,
    ) -> anyhow::Result<(Vec<StepLoss>, Tensor)> {
        let (head, correction) = self.choose_head(batch)?;
        let logits = |y: &Tensor| log_softmax(&linear(y, &head)?.broadcast_add(&correction)?);
        let mut steps: Vec<(usize, [Tensor; 3])> = Vec::new();
        for example in examples {
            let wanted = logits(&example.target)?;
            for (step, done) in drafter.unroll(example, unroll)?.iter().enumerate() {
                // The first rows of an example have no draft step before them to read from.
                let Some(count) = wanted.dim(0)?.checked_sub(step).filter(|count| *count > 0)
                else {
                    continue;
                };
                let rows = |of: &Tensor| of.narrow(0, step, count);
                let (y, wanted) = (rows(&done.y)?, rows(&wanted)?);
                let said = logits(&y)?;
                let agrees = said.argmax(1)?.eq(&wanted.argmax(1)?)?;
                let sums = [
                    (wanted.exp()? * (&wanted - said)?)?.sum_all()?,
                    smooth_l1(&y, &rows(&example.target)?)?.sum_all()?,
                    agrees.to_dtype(DType::F32)?.sum_all()?,
                ];
                match steps.get_mut(step) {
                    None => steps.push((count, sums)),
                    Some((counted, all)) => {
                        *counted += count;
                        for (all, sum) in all.iter_mut().zip(sums) {
                            *all = (&*all + sum)?;
                        }
                    }
                }
            }
        }
        let mut losses = Vec::with_capacity(steps.len());
        let mut total = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for ((counted, sums), step_weight) in steps.into_iter().zip(STEP_WEIGHTS) {
            for (sum, weight) in sums.iter().zip(weights(drafter.kind)) {
                total = (total + (sum * (step_weight * weight / counted as f64))?)?;
            }
            let mean = |sum: &Tensor| Ok(f64::from(sum.to_scalar::<f32>()?) / counted as f64);
            let means: Vec<f64> = sums.iter().map(mean).collect::<Result<_>>()?;
            let [divergence, smooth, agreement] = means[..] else { unreachable!("three sums") };
            losses.push(StepLoss { divergence, smooth, agreement });
        }
        Ok((losses, total))
    }

    /// Rows of the head for this batch, and what each logit is raised by: a drawn token stands
    /// for several.
    fn choose_head(&self, batch: usize) -> Result<(Tensor, Tensor)> {
        let others = self.head.dim(0)? - self.frequent;
        let mut rows: Vec<u32> = (0..self.frequent as u32).collect();
        let drawn = draw(others, self.drawn, self.seed, batch);
        rows.extend(drawn.map(|row| (self.frequent + row) as u32));
        let mut correction = vec![0.0; self.frequent];
        correction.resize(rows.len(), (others as f32 / self.drawn.max(1) as f32).ln());
        let correction = Tensor::from_vec(correction, rows.len(), &Device::Cpu)?;
        Ok((self.head.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?, correction))
    }
}

/// The mean smooth L1 distance of each two rows in units of the target's root mean square.
fn smooth_l1(y: &Tensor, target: &Tensor) -> Result<Tensor> {
    let unit = target.sqr()?.mean_keepdim(1)?.sqrt()?.maximum(1e-6)?;
    let off = (y - target)?.broadcast_div(&unit)?.abs()?;
    let near = off.minimum(1.0)?;
    (&near * (&off - (&near * 0.5)?)?)?.mean(1)
}

#[cfg(test)]
mod tests {
    use hat_loader::{LlamaConfig, TinyModel, generated};

    use super::super::adapter::tests::noise;
    use super::super::optimiser::AdamW;
    use super::*;

    /// A small model, and two sequences to draft in, of which 5 and 3 positions are drafted from.
    fn scene() -> (LlamaConfig, [Example; 2]) {
        let tiny = TinyModel { hidden: 32, intermediate: 32, head_dim: 8, ..TinyModel::default() };
        let example = |stream, rows, queries| Example {
            shallow: noise(&[rows, 32], stream, 1.0),
            deep_before: noise(&[queries, 32], stream + 1, 1.0),
            target: noise(&[queries, 32], stream + 2, 1.0),
        };
        (generated(&tiny).config().clone(), [example(100, 7, 5), example(110, 4, 3)])
    }

    fn drafter(kind: DrafterArchitecture, config: &LlamaConfig) -> Drafter {
        let mut stream = 0;
        let random = |_: &str, shape: &[usize]| {
            stream += 1;
            Ok(noise(shape, stream, if shape.len() == 1 { 1.0 } else { 0.3 }))
        };
        Drafter::new(kind, config, random).unwrap()
    }

    /// Of each tensor of each kind: what the loss gains on the way of its gradient is the length
    /// of that way. And an optimiser's step loses something.
    #[test]
    fn gradients_are_slopes() {
        let (config, examples) = scene();
        let loss = Loss { head: noise(&[40, 32], 1, 1.0), frequent: 10, drawn: 7, seed: 3 };
        assert_eq!(loss.choose_head(4).unwrap().0.dims(), [17, 32]);
        for kind in DrafterArchitecture::ALL {
            let drafter = drafter(kind, &config);
            let of = || loss.of(&drafter, &examples, 3, 4).unwrap();
            let value = || f64::from(of().1.to_scalar::<f32>().unwrap());
            let (steps, total) = of();
            assert_eq!(steps.len(), if kind == DrafterArchitecture::Deep { 3 } else { 1 });
            let grads = total.backward().unwrap();
            for (name, param) in &drafter.params {
                let grad = grads.get(param).unwrap();
                let square =
                    f64::from(grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
                let (start, by) = (param.as_tensor().copy().unwrap(), 3e-3 / square.sqrt());
                let at = |by: f64| {
                    param.set(&(&start + (grad * by).unwrap()).unwrap()).unwrap();
                    value()
                };
                let slope = (at(by) - at(-by)) / (2.0 * by);
                param.set(&start).unwrap();
                assert!((slope / square - 1.0).abs() < 0.02, "{kind:?} {name}: {slope}, {square}");
            }
            let before = value();
            let mut optimiser = AdamW::new(&drafter.params).unwrap();
            optimiser.update(&drafter.params, &grads, 1e-3, 0.0).unwrap();
            assert!(value() < before, "{kind:?}: {before}, then {}", value());
        }
    }

    /// The rows that each step says, as numbers.
    fn said(drafter: &Drafter, example: &Example) -> Vec<Vec<Vec<f32>>> {
        let steps = drafter.unroll(example, 3).unwrap();
        steps.iter().map(|step| step.y.to_vec2().unwrap()).collect()
    }

    #[test]
    fn a_step_sees_no_later_tokens_and_reads_what_the_one_before_said() {
        let (config, [example, _]) = scene();
        let drafter = drafter(DrafterArchitecture::Deep, &config);
        let plain = said(&drafter, &example);
        let with = |of: &Tensor, row: usize| {
            let other = noise(&[1, 32], 99, 1.0);
            let rows = of.dim(0).unwrap();
            let (before, after) = (of.narrow(0, 0, row), of.narrow(0, row + 1, rows - row - 1));
            Tensor::cat(&[before.unwrap(), other, after.unwrap()], 0).unwrap()
        };
        let later = Example { shallow: with(&example.shallow, 5), ..example.clone() };
        let deep = Example { deep_before: with(&example.deep_before, 3), ..example.clone() };
        let (later, deep) = (said(&drafter, &later), said(&drafter, &deep));
        for step in 0..3 {
            // Row 5 is the fourth query's.
            assert_eq!(plain[step][..3], later[step][..3], "step {step}");
            assert_ne!(plain[step][3], later[step][3]);
            assert_ne!(plain[step][4], later[step][4]);
        }
        // The deep row before query 3 is read by step 1 alone: step 2 there reads step 1's draft.
        assert_ne!(plain[0][3], deep[0][3]);
        assert_eq!(plain[1][3], deep[1][3]);
        assert_ne!(plain[1][4], deep[1][4]);
    }
}
