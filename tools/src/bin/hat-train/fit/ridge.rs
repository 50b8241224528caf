//! Initial output matrices: the least squares fit of the deep row from their inputs.

use anyhow::Context as _;
use ndarray::Axis;

use super::data::Plan;
use super::loss::Loss;
use crate::drafter::{Dims, Params, Rows, Unroll};

/// Positions that the fit uses: many more than the 1152 numbers that each output is a sum of, or
/// it learns these positions by heart.
const POSITIONS: usize = 120_000;
/// Weight of the penalty, in positions.
const PENALTY: f64 = 100.0;

/// Sets `Wo` and `Wf` of a drafter that has them, and the size of its output.
pub(super) fn start_outputs(
    params: &mut Params,
    dims: &Dims,
    plan: &Plan,
    loss: &Loss,
) -> anyhow::Result<()> {
    let (mut seen, mut squares) = (0, 0.0);
    let mut sums: Option<(Vec<f64>, Vec<f64>, usize)> = None;
    for batch in 0..plan.steps() {
        let (batch, target) = plan.batch(batch, &loss.norm)?;
        let unroll = Unroll::forward(params, dims, &batch, 1);
        squares += target.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / dims.hidden as f64;
        seen += target.nrows();
        if let (Some(out), deep) = unroll.outputs() {
            let read = match deep {
                Some(deep) => ndarray::concatenate(Axis(1), &[out.view(), deep.view()])?,
                None => out.clone(),
            };
            let width = read.ncols();
            let (a, b, _) = sums.get_or_insert_with(|| {
                (vec![0.0; width * width], vec![0.0; width * dims.hidden], width)
            });
            add(a, &read.t().dot(&read));
            add(b, &read.t().dot(&target));
        }
        if seen >= POSITIONS {
            break;
        }
    }
    params.values[crate::drafter::NORM].fill((squares / seen.max(1) as f64).sqrt() as f32);
    let Some((mut a, mut b, width)) = sums else { return Ok(()) };
    for diagonal in 0..width {
        a[diagonal * width + diagonal] += PENALTY;
    }
    solve(&mut a, &mut b, width, dims.hidden).context("the start of the output matrices")?;
    let solution = Rows::from_shape_fn((dims.hidden, width), |(row, column)| {
        b[column * dims.hidden + row] as f32
    });
    let (out, deep) = solution.view().split_at(Axis(1), dims.hidden);
    params.values[crate::drafter::WO].assign(&out);
    if !deep.is_empty() {
        params.values[crate::drafter::WF].assign(&deep);
    }
    Ok(())
}

fn add(sums: &mut [f64], rows: &Rows) {
    for (sum, value) in sums.iter_mut().zip(rows.iter()) {
        *sum += f64::from(*value);
    }
}

/// Solves `A X = B` in place of `B`, for symmetric positive definite `A` (`[n, n]`); `B` has
/// `columns`. `A` is overwritten by its Cholesky factor.
fn solve(a: &mut [f64], b: &mut [f64], n: usize, columns: usize) -> anyhow::Result<()> {
    for row in 0..n {
        for column in 0..=row {
            let (before, rest) = a.split_at(row * n);
            let left = &rest[..column];
            let other = if column == row { left } else { &before[column * n..column * n + column] };
            let dot: f64 = left.iter().zip(other).map(|(x, y)| x * y).sum();
            let value = a[row * n + column] - dot;
            a[row * n + column] = if column == row {
                anyhow::ensure!(value > 0.0, "the system of {n} equations has no single solution");
                value.sqrt()
            } else {
                value / a[column * n + column]
            };
        }
    }
    for row in 0..n {
        for other in 0..row {
            subtract(b, row, other, a[row * n + other], columns);
        }
        scale(b, row, 1.0 / a[row * n + row], columns);
    }
    for row in (0..n).rev() {
        for other in row + 1..n {
            subtract(b, row, other, a[other * n + row], columns);
        }
        scale(b, row, 1.0 / a[row * n + row], columns);
    }
    Ok(())
}

/// Row `row` of `b` less `factor` times row `other`.
fn subtract(b: &mut [f64], row: usize, other: usize, factor: f64, columns: usize) {
    let (low, high) = b.split_at_mut(row.max(other) * columns);
    let (at, from) = if row > other {
        (&mut high[..columns], &low[other * columns..][..columns])
    } else {
        (&mut low[row * columns..][..columns], &high[..columns])
    };
    for (at, from) in at.iter_mut().zip(from) {
        *at -= factor * from;
    }
}

fn scale(b: &mut [f64], row: usize, factor: f64, columns: usize) {
    b[row * columns..][..columns].iter_mut().for_each(|value| *value *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equations_are_solved() {
        let mut a = vec![4.0, 1.0, 0.5, 1.0, 3.0, 0.2, 0.5, 0.2, 2.0];
        let x = [1.0, -2.0, 3.0, 0.5, -1.0, 4.0]; // [3, 2]
        let mut b = vec![0.0; 6];
        for (row, column, inner) in
            (0..3).flat_map(|r| (0..2).flat_map(move |c| (0..3).map(move |i| (r, c, i))))
        {
            b[row * 2 + column] += a[row * 3 + inner] * x[inner * 2 + column];
        }
        solve(&mut a, &mut b, 3, 2).unwrap();
        for (got, wanted) in b.iter().zip(x) {
            assert!((got - wanted).abs() < 1e-12, "{b:?}");
        }
        assert!(solve(&mut [1.0, 2.0, 2.0, 1.0], &mut [1.0, 1.0], 2, 1).is_err());
    }
}
