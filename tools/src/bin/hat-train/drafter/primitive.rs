//! The few operations that everything here is made of, with their derivatives.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayBase, Axis, Data, Ix2, Zip};

/// Rows of numbers.
pub(crate) type Rows = Array2<f32>;

/// `x W^T`, with `W` as `[outputs, inputs]`.
pub(crate) fn linear<S: Data<Elem = f32>, T: Data<Elem = f32>>(
    x: &ArrayBase<S, Ix2>,
    weight: &ArrayBase<T, Ix2>,
) -> Rows {
    let mut out = Rows::zeros((x.nrows(), weight.nrows()));
    general_mat_mul(1.0, x, &weight.t(), 0.0, &mut out);
    out
}

/// `out += x W^T`.
pub(crate) fn add_linear(x: &Rows, weight: &Rows, out: &mut Rows) {
    general_mat_mul(1.0, x, &weight.t(), 1.0, out);
}

/// `dx += dout W`.
pub(crate) fn add_linear_dx(dout: &Rows, weight: &Rows, dx: &mut Rows) {
    general_mat_mul(1.0, dout, weight, 1.0, dx);
}

/// `dW += dout^T x`.
pub(crate) fn add_linear_dw(dout: &Rows, x: &Rows, dweight: &mut Rows) {
    general_mat_mul(1.0, &dout.t(), x, 1.0, dweight);
}

/// `x / sqrt(mean(x^2) + eps) * weight`, and the reciprocal roots.
pub(crate) fn rms_norm(x: &Rows, weight: Option<&Rows>, eps: f32) -> (Rows, Vec<f32>) {
    let mut out = x.clone();
    let columns = x.ncols() as f32;
    let mut scales = Vec::with_capacity(x.nrows());
    for mut row in out.rows_mut() {
        let mean = row.iter().map(|v| v * v).sum::<f32>() / columns;
        let scale = 1.0 / (mean + eps).sqrt();
        scales.push(scale);
        match weight {
            Some(weight) => {
                Zip::from(&mut row).and(weight.row(0)).for_each(|v, w| *v *= scale * w);
            }
            None => row.mapv_inplace(|v| v * scale),
        }
    }
    (out, scales)
}

/// Adds the derivative of [`rms_norm`] to `dx`, and that of the weight to `dweight`.
pub(crate) fn rms_norm_backward(
    x: &Rows,
    weight: Option<(&Rows, &mut Rows)>,
    scales: &[f32],
    dout: &Rows,
    dx: &mut Rows,
) {
    let columns = x.ncols() as f32;
    let (weight, mut dweight) = match weight {
        Some((weight, dweight)) => (Some(weight), Some(dweight)),
        None => (None, None),
    };
    let mut scaled = vec![0.0; x.ncols()];
    for (row, scale) in scales.iter().enumerate() {
        let (x, dout) = (x.row(row), dout.row(row));
        if let Some(dweight) = dweight.as_deref_mut() {
            Zip::from(dweight.row_mut(0))
                .and(x)
                .and(dout)
                .for_each(|dw, x, d| *dw += x * scale * d);
        }
        for (column, scaled) in scaled.iter_mut().enumerate() {
            *scaled = dout[column] * weight.map_or(1.0, |weight| weight[[0, column]]);
        }
        let dot: f32 = scaled.iter().zip(x).map(|(d, x)| d * x).sum();
        let pull = scale * scale * scale * dot / columns;
        for ((dx, x), scaled) in dx.row_mut(row).iter_mut().zip(x).zip(&scaled) {
            *dx += scaled * scale - x * pull;
        }
    }
}

/// `silu(gate) * up`.
pub(crate) fn silu_mul(gate: &Rows, up: &Rows) -> Rows {
    let mut out = gate.clone();
    Zip::from(&mut out).and(up).for_each(|g, u| *g = *g / (1.0 + (-*g).exp()) * u);
    out
}

/// Derivatives of [`silu_mul`] by `gate` and `up`.
pub(crate) fn silu_mul_backward(gate: &Rows, up: &Rows, dout: &Rows) -> (Rows, Rows) {
    let (mut dgate, mut dup) = (dout.clone(), dout.clone());
    Zip::from(&mut dgate).and(&mut dup).and(gate).and(up).for_each(|dg, du, g, u| {
        let sigmoid = 1.0 / (1.0 + (-g).exp());
        *du *= g * sigmoid;
        *dg *= u * sigmoid * (1.0 + g * (1.0 - sigmoid));
    });
    (dgate, dup)
}

/// Rotates the pairs `(i, i + head_dim / 2)` of each head by the row's position; `-1` as
/// `direction` turns back, which is the derivative too.
pub(crate) fn rope(x: &mut Rows, positions: &[u32], inv_freq: &[f32], direction: f32) {
    let half = inv_freq.len();
    let mut angles = vec![(0.0, 0.0); half];
    for (mut row, position) in x.rows_mut().into_iter().zip(positions) {
        for (angle, freq) in angles.iter_mut().zip(inv_freq) {
            let (sin, cos) = (*position as f32 * freq).sin_cos();
            *angle = (cos, sin * direction);
        }
        let row = row.as_slice_mut().expect("rows are contiguous");
        for head in row.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(&angles) {
                (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
            }
        }
    }
}

/// The rows `indices` of `x`.
pub(crate) fn gather(x: &Rows, indices: &[usize]) -> Rows {
    x.select(Axis(0), indices)
}

/// Adds row `r` of `from` to row `indices[r]` of `to`.
pub(crate) fn scatter_add(from: &Rows, indices: &[usize], to: &mut Rows) {
    for (row, index) in from.rows().into_iter().zip(indices) {
        Zip::from(to.row_mut(*index)).and(row).for_each(|to, from| *to += from);
    }
}
