//! Several draft steps one after the other over a batch of sequences.

use super::attention::KeyValues;
pub(crate) use super::attention::Span;
use super::layer::{self, Place, Step};
use super::params::{Dims, Params, W1, W2};
use super::primitive::{
    Rows, add_linear, add_linear_dw, linear, rms_norm, rms_norm_backward, scatter_add,
};

/// Sequences to draft in.
pub(crate) struct Batch {
    pub(crate) spans: Vec<Span>,
    /// Shallow rows. `[positions, hidden]`
    pub(crate) shallow: Rows,
    /// Position of each shallow row in its sequence.
    pub(crate) positions: Vec<u32>,
    /// Deep rows after the final norm, of the position before each query. `[queries, hidden]`
    pub(crate) deep_before: Rows,
}

impl Batch {
    /// Which rows are queries.
    fn queries(&self) -> Vec<usize> {
        let rows = |span: &Span| span.all.end - span.queries.len()..span.all.end;
        self.spans.iter().flat_map(rows).collect()
    }
}

/// The steps of a drafter over a batch.
pub(crate) struct Unroll<'a> {
    params: &'a Params,
    dims: &'a Dims,
    batch: &'a Batch,
    queries: Vec<usize>,
    query_positions: Vec<u32>,
    /// `nrm(s)`, or `s` for the paper's.
    shallow: Rows,
    /// Deep rows that each step reads, normalised.
    deep: Vec<Rows>,
    /// Reciprocal roots of `y` of each step.
    scales: Vec<Vec<f32>>,
    steps: Vec<Step>,
    keys: Vec<KeyValues>,
}

impl<'a> Unroll<'a> {
    /// Runs `steps` steps. A drafter that reads no deep row says the same at each step; it needs
    /// one.
    pub(crate) fn forward(
        params: &'a Params,
        dims: &'a Dims,
        batch: &'a Batch,
        steps: usize,
    ) -> Self {
        let reads_deep = params.kind.reads_deep();
        let steps = if reads_deep { steps } else { 1 };
        let queries = batch.queries();
        let query_positions = queries.iter().map(|row| batch.positions[*row]).collect();
        let (shallow, base) = if params.kind.feeds_forward() {
            let shallow = rms_norm(&batch.shallow, None, dims.eps).0;
            let base = linear(&shallow, &params.values[W1]);
            (shallow, base)
        } else {
            (batch.shallow.clone(), batch.shallow.clone())
        };
        let mut unroll = Self {
            params,
            dims,
            batch,
            queries,
            query_positions,
            shallow,
            deep: Vec::new(),
            scales: Vec::new(),
            steps: Vec::with_capacity(steps),
            keys: Vec::with_capacity(steps),
        };
        for step in 1..=steps {
            unroll.step(step, &base);
        }
        unroll
    }

    fn step(&mut self, step: usize, base: &Rows) {
        let Self { params, dims, batch, queries, query_positions, .. } = self;
        if params.kind.reads_deep() {
            let deep = match self.steps.last() {
                None => rms_norm(&batch.deep_before, None, dims.eps).0,
                Some(last) => {
                    let (normed, scales) = rms_norm(&last.y, None, dims.eps);
                    self.scales.push(scales);
                    shift(&normed, &batch.spans, 1)
                }
            };
            self.deep.push(deep);
        }
        let deep = self.deep.last();
        let mut u = if step == 1 { base.clone() } else { super::primitive::gather(base, queries) };
        if let Some(deep) = deep {
            let w2 = &params.values[W2];
            if step == 1 {
                scatter_add(&linear(deep, w2), queries, &mut u);
            } else {
                add_linear(deep, w2, &mut u);
            }
        }
        let place = place(step, batch, queries, query_positions);
        let (done, own) = layer::forward(params, dims, &place, u, deep, &self.keys);
        self.steps.push(done);
        self.keys.push(own);
    }

    /// What each query of step `step` (1 is the first) says: a deep row after the final norm.
    pub(crate) fn y(&self, step: usize) -> &Rows {
        &self.steps[(step - 1).min(self.steps.len() - 1)].y
    }

    /// Steps that were run.
    pub(crate) fn len(&self) -> usize {
        self.steps.len()
    }

    /// What the output matrices read at step 1: the layer's output, and deep rows.
    pub(crate) fn outputs(&self) -> (Option<&Rows>, Option<&Rows>) {
        (self.steps[0].out(), self.deep.first())
    }

    /// Adds the derivatives by all parameters to `grads`, given those by the `y` of each step.
    pub(crate) fn backward(&self, mut dy: Vec<Rows>, grads: &mut Params) {
        let zeros =
            |kv: &KeyValues| KeyValues { k: Rows::zeros(kv.k.dim()), v: Rows::zeros(kv.v.dim()) };
        let mut dkeys: Vec<KeyValues> = self.keys.iter().map(zeros).collect();
        let mut dbase = Rows::zeros(self.shallow.dim());
        for step in (1..=self.steps.len()).rev() {
            let place = place(step, self.batch, &self.queries, &self.query_positions);
            let deep = self.deep.get(step - 1);
            let (du, ddeep) = layer::backward(
                self.params,
                self.dims,
                &place,
                &self.steps[step - 1],
                deep,
                &self.keys,
                &dy[step - 1],
                grads,
                &mut dkeys,
            );
            if step == 1 {
                dbase += &du;
                continue;
            }
            scatter_add(&du, &self.queries, &mut dbase);
            if let Some(ddeep) = ddeep {
                let back = shift(&ddeep, &self.batch.spans, -1);
                let (y, scales) = (&self.steps[step - 2].y, &self.scales[step - 2]);
                rms_norm_backward(y, None, scales, &back, &mut dy[step - 2]);
            }
        }
        if self.params.kind.feeds_forward() {
            add_linear_dw(&dbase, &self.shallow, &mut grads.values[W1]);
        }
    }
}

fn place<'a>(
    step: usize,
    batch: &'a Batch,
    queries: &'a [usize],
    query_positions: &'a [u32],
) -> Place<'a> {
    Place {
        spans: &batch.spans,
        step,
        queries: (step == 1).then_some(queries),
        positions: if step == 1 { &batch.positions } else { query_positions },
        query_positions,
    }
}

/// Row `r` gets row `r - by` of the same span; where there is none, zeros.
fn shift(rows: &Rows, spans: &[Span], by: isize) -> Rows {
    let mut out = Rows::zeros(rows.dim());
    for span in spans {
        for row in span.queries.clone() {
            if let Some(from) = row.checked_add_signed(-by)
                && span.queries.contains(&from)
            {
                out.row_mut(row).assign(&rows.row(from));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::params::{Kind, PARAMETERS};
    use super::*;

    fn dims() -> Dims {
        Dims {
            hidden: 12,
            intermediate: 10,
            heads: 4,
            kv_heads: 2,
            head_dim: 4,
            eps: 1e-5,
            inv_freq: vec![1.0, 0.1],
        }
    }

    /// Numbers in -1..1 that look random.
    fn noise(shape: (usize, usize), stream: u32) -> Rows {
        Rows::from_shape_fn(shape, |(row, column)| {
            let at = [u32::try_from(row).unwrap(), u32::try_from(column).unwrap(), stream, 7];
            let [word, ..] = hat_engine::sample::noise::philox(at, [1, 2]);
            word as f32 / 2_147_483_648.0 - 1.0
        })
    }

    fn batch(dims: &Dims) -> Batch {
        // Two sequences: 7 rows of which 5 are queries, 4 rows of which 3.
        Batch {
            spans: vec![Span { all: 0..7, queries: 0..5 }, Span { all: 7..11, queries: 5..8 }],
            shallow: noise((11, dims.hidden), 100),
            positions: (0..7).chain(0..4).collect(),
            deep_before: noise((8, dims.hidden), 101),
        }
    }

    fn params(kind: Kind, dims: &Dims) -> Params {
        let mut params = Params::zeros(kind, dims);
        for (stream, values) in (0..).zip(&mut params.values) {
            let shape = values.dim();
            *values = noise(shape, stream) * if shape.0 == 1 { 1.0 } else { 0.5 };
        }
        params
    }

    /// A loss with a different weight on each number of each step.
    fn loss(params: &Params, dims: &Dims, batch: &Batch, weights: &[Rows]) -> f64 {
        let unroll = Unroll::forward(params, dims, batch, weights.len());
        let step = |(step, weight): (usize, &Rows)| {
            let y = unroll.y(step + 1);
            y.iter().zip(weight).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum::<f64>()
        };
        weights.iter().enumerate().map(step).sum()
    }

    fn check(kind: Kind, steps: usize) {
        let dims = dims();
        let (batch, params) = (batch(&dims), params(kind, &dims));
        let weights: Vec<Rows> =
            (0..steps).map(|step| noise((8, dims.hidden), 200 + step as u32)).collect();
        let mut grads = Params::zeros(kind, &dims);
        Unroll::forward(&params, &dims, &batch, steps).backward(weights.clone(), &mut grads);
        for (parameter, name) in PARAMETERS.iter().enumerate() {
            let size = params.values[parameter].len();
            let largest = grads.values[parameter].iter().fold(0f32, |m, g| m.max(g.abs()));
            for element in (0..size).step_by(7) {
                let at =
                    (element / dims_of(&params, parameter), element % dims_of(&params, parameter));
                let moved = |by: f32| {
                    let mut params = params.clone();
                    params.values[parameter][at] += by;
                    loss(&params, &dims, &batch, &weights)
                };
                let by = 4e-3;
                let slope = ((moved(by) - moved(-by)) / f64::from(2.0 * by)) as f32;
                let grad = grads.values[parameter][at];
                assert!(
                    (slope - grad).abs() < 0.02 * largest + 2e-3,
                    "{kind:?} {name}{at:?}: slope {slope}, gradient {grad}, largest {largest}"
                );
            }
        }
    }

    fn dims_of(params: &Params, parameter: usize) -> usize {
        params.values[parameter].ncols()
    }

    #[test]
    fn gradients_are_slopes() {
        check(Kind::Paper, 1);
        check(Kind::Layer, 1);
        check(Kind::Deep, 1);
        check(Kind::Deep, 3);
    }

    #[test]
    fn a_step_sees_neither_later_tokens_nor_other_sequences() {
        let dims = dims();
        let params = params(Kind::Deep, &dims);
        let whole = batch(&dims);
        let mut changed = batch(&dims);
        changed.shallow.row_mut(5).fill(0.3); // the fourth query of the first sequence
        changed.deep_before.row_mut(3).fill(-0.2);
        let (a, b) = (
            Unroll::forward(&params, &dims, &whole, 3),
            Unroll::forward(&params, &dims, &changed, 3),
        );
        for step in 1..=3 {
            for row in [0, 1, 2, 5, 6, 7] {
                assert_eq!(a.y(step).row(row), b.y(step).row(row), "step {step}, row {row}");
            }
            assert_ne!(a.y(step).row(4), b.y(step).row(4));
        }
        // The deep row of query 3 is read by step 1 alone: step 2 there draws on step 1's guess.
        let mut deep = batch(&dims);
        deep.deep_before.row_mut(3).fill(-0.2);
        let deep = Unroll::forward(&params, &dims, &deep, 3);
        assert_ne!(a.y(1).row(3), deep.y(1).row(3));
        assert_eq!(a.y(2).row(3), deep.y(2).row(3));
        assert_ne!(a.y(2).row(4), deep.y(2).row(4));
    }
}
