//! Attention over the keys of step 1 and one key of each later step, and its derivative.

use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::s;

use super::params::Dims;
use super::primitive::Rows;

/// One sequence in a batch: its rows, of which the last `queries.len()` are drafted from.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    /// Rows of all positions.
    pub(crate) all: Range<usize>,
    /// Rows among the queries.
    pub(crate) queries: Range<usize>,
}

impl Span {
    /// Position of the first query within the sequence.
    pub(crate) fn offset(&self) -> usize {
        self.all.len() - self.queries.len()
    }
}

/// Keys and values of one step, keys rotated. Step 1 has rows for all positions, later ones for
/// queries.
pub(super) struct KeyValues {
    pub(super) k: Rows,
    pub(super) v: Rows,
}

/// What attention weighed, for the derivative: per span and head, `[queries, keys of step 1]`
/// and `[queries, later steps]`.
pub(super) struct Weights(Vec<(Rows, Rows)>);

/// Which key of a later step query `row` of step `step` sees: step `later`'s, so many rows before.
const fn later_row(step: usize, later: usize, row: usize) -> Option<usize> {
    row.checked_sub(step - later)
}

/// `out = softmax(q K^T / sqrt(head_dim)) V` of step `step` (1 is the first); `keys[0]` is step
/// 1's, `keys[step - 1]` its own.
pub(super) fn forward(
    dims: &Dims,
    spans: &[Span],
    step: usize,
    q: &Rows,
    keys: &[&KeyValues],
) -> (Rows, Weights) {
    let scale = 1.0 / (dims.head_dim as f32).sqrt();
    let mut out = Rows::zeros(q.dim());
    let mut weights = Vec::with_capacity(spans.len() * dims.heads);
    for span in spans {
        let (rows, offset) = (span.queries.len(), span.offset());
        for head in 0..dims.heads {
            let (of_q, of_kv) = columns(dims, head);
            let q = q.slice(s![span.queries.clone(), of_q.clone()]);
            let k = keys[0].k.slice(s![span.all.clone(), of_kv.clone()]);
            let mut first = Rows::zeros((rows, span.all.len()));
            general_mat_mul(scale, &q, &k.t(), 0.0, &mut first);
            let mut later = Rows::from_elem((rows, step - 1), f32::NEG_INFINITY);
            for row in 0..rows {
                for other in 2..=step {
                    if let Some(at) = later_row(step, other, row) {
                        let k = &keys[other - 1].k;
                        let k = k.slice(s![span.queries.start + at, of_kv.clone()]);
                        later[[row, other - 2]] = scale * q.row(row).dot(&k);
                    }
                }
                let seen = (offset + row + 2).saturating_sub(step);
                let mut scores = first.row_mut(row);
                softmax(scores.as_slice_mut().expect("contiguous"), seen, later.row_mut(row));
            }
            let v = keys[0].v.slice(s![span.all.clone(), of_kv.clone()]);
            let mut out = out.slice_mut(s![span.queries.clone(), of_q]);
            general_mat_mul(1.0, &first, &v, 0.0, &mut out);
            for row in 0..rows {
                for other in 2..=step {
                    if let Some(at) = later_row(step, other, row) {
                        let v = &keys[other - 1].v;
                        let v = v.slice(s![span.queries.start + at, of_kv.clone()]);
                        out.row_mut(row).scaled_add(later[[row, other - 2]], &v);
                    }
                }
            }
            weights.push((first, later));
        }
    }
    (out, Weights(weights))
}

/// Softmax over the first `seen` of `first` and all of `later`; the rest gets nothing.
fn softmax(first: &mut [f32], seen: usize, mut later: ndarray::ArrayViewMut1<'_, f32>) {
    let (visible, hidden) = first.split_at_mut(seen);
    hidden.fill(0.0);
    let top = visible.iter().chain(later.iter()).copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in visible.iter_mut().chain(later.iter_mut()) {
        *score = (*score - top).exp();
        sum += *score;
    }
    for score in visible.iter_mut().chain(later.iter_mut()) {
        *score /= sum;
    }
}

/// Derivatives of [`forward`]: returns that of `q`, adds those of keys and values to `dkeys`.
#[expect(clippy::too_many_arguments, reason = "one operation, its operands")]
pub(super) fn backward(
    dims: &Dims,
    spans: &[Span],
    step: usize,
    q: &Rows,
    keys: &[&KeyValues],
    weights: &Weights,
    dout: &Rows,
    dkeys: &mut [KeyValues],
) -> Rows {
    let scale = 1.0 / (dims.head_dim as f32).sqrt();
    let mut dq_all = Rows::zeros(q.dim());
    for (index, span) in spans.iter().enumerate() {
        for head in 0..dims.heads {
            let (of_q, of_kv) = columns(dims, head);
            let (first, later) = &weights.0[index * dims.heads + head];
            let at_q = s![span.queries.clone(), of_q.clone()];
            let at_kv = s![span.all.clone(), of_kv.clone()];
            let (q, dout) = (q.slice(at_q), dout.slice(at_q));
            let mut dfirst = Rows::zeros(first.dim());
            general_mat_mul(1.0, &dout, &keys[0].v.slice(at_kv).t(), 0.0, &mut dfirst);
            general_mat_mul(1.0, &first.t(), &dout, 1.0, &mut dkeys[0].v.slice_mut(at_kv));
            let mut dlater = Rows::zeros(later.dim());
            for row in 0..span.queries.len() {
                for other in 2..=step {
                    let Some(at) = later_row(step, other, row) else { continue };
                    let at = s![span.queries.start + at, of_kv.clone()];
                    dlater[[row, other - 2]] = dout.row(row).dot(&keys[other - 1].v.slice(at));
                    let mut dv = dkeys[other - 1].v.slice_mut(at);
                    dv.scaled_add(later[[row, other - 2]], &dout.row(row));
                }
                let mean =
                    dfirst.row(row).dot(&first.row(row)) + dlater.row(row).dot(&later.row(row));
                let (mut df, mut dl) = (dfirst.row_mut(row), dlater.row_mut(row));
                df.zip_mut_with(&first.row(row), |d, p| *d = p * (*d - mean) * scale);
                dl.zip_mut_with(&later.row(row), |d, p| *d = p * (*d - mean) * scale);
            }
            let mut dq = dq_all.slice_mut(at_q);
            general_mat_mul(1.0, &dfirst, &keys[0].k.slice(at_kv), 0.0, &mut dq);
            general_mat_mul(1.0, &dfirst.t(), &q, 1.0, &mut dkeys[0].k.slice_mut(at_kv));
            for row in 0..span.queries.len() {
                for other in 2..=step {
                    let Some(at) = later_row(step, other, row) else { continue };
                    let at = s![span.queries.start + at, of_kv.clone()];
                    let d = dlater[[row, other - 2]];
                    dq.row_mut(row).scaled_add(d, &keys[other - 1].k.slice(at));
                    dkeys[other - 1].k.slice_mut(at).scaled_add(d, &q.row(row));
                }
            }
        }
    }
    dq_all
}

/// Columns of a query head, and of the key/value head that it shares.
fn columns(dims: &Dims, head: usize) -> (Range<usize>, Range<usize>) {
    let size = dims.head_dim;
    let kv = head * dims.kv_heads / dims.heads;
    (head * size..(head + 1) * size, kv * size..(kv + 1) * size)
}
