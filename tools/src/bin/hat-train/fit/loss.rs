//! Loss of a drafter: against the target's distribution and its deep row.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Axis, s};

use super::data::{FinalNorm, draw};
use crate::drafter::{Kind, Rows, Span, Unroll, linear};

/// Weights of the two parts of the loss.
#[derive(Clone, Copy, Debug)]
pub(super) struct LossWeights {
    divergence: f32,
    smooth: f32,
}

impl LossWeights {
    pub(super) const fn of(kind: Kind) -> Self {
        match kind {
            Kind::Deep | Kind::Layer => Self { divergence: 1.0, smooth: 0.5 },
            Kind::Paper => Self { divergence: 0.1, smooth: 1.0 },
        }
    }
}

/// The loss, with the parts of the model that it needs.
pub(super) struct Loss {
    pub(super) weights: LossWeights,
    pub(super) norm: FinalNorm,
    /// Rows of the head for the draft vocabulary, most frequent first. `[vocabulary, hidden]`
    pub(super) head: Rows,
    pub(super) frequent: usize,
    pub(super) drawn: usize,
    pub(super) seed: u64,
}

/// The loss of one draft step over a batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepLoss {
    /// Kullback-Leibler divergence from the target, nats.
    pub(super) divergence: f64,
    pub(super) smooth: f64,
    /// Share of positions where both say the same first.
    pub(super) agreement: f64,
}

impl Loss {
    /// The losses of all steps, and the derivative of their weighted sum by each step's rows.
    pub(super) fn of(
        &self,
        unroll: &Unroll<'_>,
        spans: &[Span],
        target: &Rows,
        batch: usize,
    ) -> (Vec<StepLoss>, Vec<Rows>) {
        let (head, correction) = self.choose_head(batch);
        let wanted = probabilities(linear(target, &head), &correction);
        let (mut losses, mut derivatives) = (Vec::new(), Vec::new());
        for step in 1..=unroll.len() {
            let weight = super::STEP_WEIGHTS[step - 1];
            let (loss, dy) = self.of_step(
                unroll.y(step),
                spans,
                step,
                target,
                &wanted,
                &head,
                &correction,
                weight,
            );
            losses.push(loss);
            derivatives.push(dy);
        }
        (losses, derivatives)
    }

    /// Rows of the head for this batch, and what each logit is raised by: a drawn token stands
    /// for several.
    fn choose_head(&self, batch: usize) -> (Rows, Array1<f32>) {
        let others = self.head.nrows() - self.frequent;
        let mut rows: Vec<usize> = (0..self.frequent).collect();
        rows.extend(draw(others, self.drawn, self.seed, batch).map(|row| self.frequent + row));
        let mut correction = Array1::zeros(rows.len());
        let raise = (others as f32 / self.drawn.max(1) as f32).ln();
        correction.slice_mut(s![self.frequent..]).fill(raise);
        (self.head.select(Axis(0), &rows), correction)
    }

    #[expect(clippy::too_many_arguments, reason = "one loss, its operands")]
    fn of_step(
        &self,
        y: &Rows,
        spans: &[Span],
        step: usize,
        target: &Rows,
        wanted: &Rows,
        head: &Rows,
        correction: &Array1<f32>,
        weight: f32,
    ) -> (StepLoss, Rows) {
        let mut said = probabilities(linear(y, head), correction);
        let mut smooth = Rows::zeros(y.dim());
        let mut loss = StepLoss { divergence: 0.0, smooth: 0.0, agreement: 0.0 };
        let mut counted = 0usize;
        for span in spans {
            for row in span.queries.clone() {
                // The first rows of a span have no draft step before them to read from.
                if row - span.queries.start < step - 1 {
                    said.row_mut(row).fill(0.0);
                    continue;
                }
                counted += 1;
                let (wanted, mut said) = (wanted.row(row), said.row_mut(row));
                loss.agreement += f64::from(u8::from(argmax(said.view()) == argmax(wanted)));
                for (said, wanted) in said.iter_mut().zip(wanted) {
                    if *wanted > 0.0 {
                        let ratio = wanted / said.max(1e-30);
                        loss.divergence += f64::from(wanted * ratio.ln());
                    }
                    *said -= wanted;
                }
                loss.smooth += smooth_l1(y.row(row), target.row(row), smooth.row_mut(row));
            }
        }
        let scale = 1.0 / counted.max(1) as f32;
        loss.divergence *= f64::from(scale);
        loss.smooth *= f64::from(scale);
        loss.agreement *= f64::from(scale);
        let mut dy = smooth;
        let smooth_scale = weight * self.weights.smooth * scale;
        general_mat_mul(
            weight * self.weights.divergence * scale,
            &said,
            head,
            smooth_scale,
            &mut dy,
        );
        (loss, dy)
    }
}

/// The mean smooth L1 distance of two rows in units of the target's root mean square, and its
/// derivative by `y`.
fn smooth_l1(
    y: ndarray::ArrayView1<'_, f32>,
    target: ndarray::ArrayView1<'_, f32>,
    mut dy: ndarray::ArrayViewMut1<'_, f32>,
) -> f64 {
    let columns = y.len() as f32;
    let unit = (target.dot(&target) / columns).sqrt().max(1e-6);
    let mut sum = 0.0;
    for ((dy, y), target) in dy.iter_mut().zip(y).zip(target) {
        let off = (y - target) / unit;
        sum += if off.abs() < 1.0 { 0.5 * off * off } else { off.abs() - 0.5 };
        *dy = off.clamp(-1.0, 1.0) / unit / columns;
    }
    f64::from(sum / columns)
}

fn probabilities(mut logits: Rows, correction: &Array1<f32>) -> Rows {
    for mut row in logits.rows_mut() {
        row += correction;
        let top = row.fold(f32::NEG_INFINITY, |top, logit| top.max(*logit));
        row.mapv_inplace(|logit| (logit - top).exp());
        let sum = row.sum();
        row /= sum;
    }
    logits
}

fn argmax(row: ndarray::ArrayView1<'_, f32>) -> usize {
    let first = row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (index, value)| {
        if *value > best.1 { (index, *value) } else { best }
    });
    first.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in -1..1 that look random.
    fn noise(rows: usize, columns: usize, stream: u32) -> Rows {
        Rows::from_shape_fn((rows, columns), |(row, column)| {
            let at = [u32::try_from(row).unwrap(), u32::try_from(column).unwrap(), stream, 8];
            let [word, ..] = hat_engine::sample::noise::philox(at, [5, 6]);
            word as f32 / 2_147_483_648.0 - 1.0
        })
    }

    /// The derivative of each kind's loss is its slope, at the first draft step and at a later one.
    #[test]
    fn derivatives_are_slopes() {
        const HIDDEN: usize = 6;
        let spans = [Span { all: 0..5, queries: 0..3 }, Span { all: 5..9, queries: 3..6 }];
        for (kind, step) in [(Kind::Deep, 1), (Kind::Deep, 3), (Kind::Layer, 1), (Kind::Paper, 1)] {
            let loss = Loss {
                weights: LossWeights::of(kind),
                norm: FinalNorm { weight: Rows::ones((1, HIDDEN)), eps: 1e-5 },
                head: noise(40, HIDDEN, 1) * 2.0,
                frequent: 10,
                drawn: 7,
                seed: 3,
            };
            let (head, correction) = loss.choose_head(4);
            assert_eq!(head.nrows(), 17);
            let target = noise(6, HIDDEN, 2);
            let wanted = probabilities(linear(&target, &head), &correction);
            let of = |y: &Rows| {
                loss.of_step(y, &spans, step, &target, &wanted, &head, &correction, 0.64)
            };
            let value = |y: &Rows| {
                let of = of(y).0;
                let LossWeights { divergence, smooth } = loss.weights;
                0.64 * (f64::from(divergence) * of.divergence + f64::from(smooth) * of.smooth)
            };
            let y = noise(6, HIDDEN, 3) * 2.0;
            let dy = of(&y).1;
            let largest = dy.iter().fold(0f32, |most, d| most.max(d.abs()));
            for (at, d) in dy.indexed_iter() {
                let moved = |by: f32| {
                    let mut y = y.clone();
                    y[at] += by;
                    value(&y)
                };
                let slope = ((moved(1e-2) - moved(-1e-2)) / 2e-2) as f32;
                assert!((slope - d).abs() < 0.02 * largest, "{kind:?} {step} {at:?}: {slope}, {d}");
                // The first rows of a span have no earlier step to go by: they do not count.
                assert_eq!(*d == 0.0, at.0 % 3 < step - 1, "{kind:?} {step} {at:?}");
            }
        }
    }
}
