//! Initial output matrices: the least squares fit of the deep row from their inputs.

use anyhow::{Context as _, ensure};
use candle_core::{DType, Device, Tensor};

use super::data::Plan;
use super::drafter::{Drafter, NORM, WF, WO};

/// Positions that the fit uses: many more than the 1152 numbers that each output is a sum of, or
/// it learns these positions by heart.
const POSITIONS: usize = 120_000;
/// Weight of the penalty, in positions.
const PENALTY: f64 = 100.0;

/// Sets `Wo` and `Wf` of a drafter that has them, and the size of its output.
pub(super) fn start_outputs(drafter: &Drafter, plan: &Plan) -> anyhow::Result<()> {
    let (mut seen, mut squares) = (0, 0.0);
    let mut sums: Option<Tensor> = None; // [inputs, inputs + outputs]
    for batch in 0..plan.steps() {
        for example in plan.batch(batch)? {
            let target = &example.target;
            let square = target.sqr()?.mean(1)?.sum_all()?;
            squares += f64::from(square.to_scalar::<f32>()?);
            seen += target.dim(0)?;
            if let Some(read) = &drafter.unroll(&example, 1)?[0].read {
                let read = read.detach();
                let sum = read.t()?.matmul(&Tensor::cat(&[&read, target], 1)?)?;
                let sum = sum.to_dtype(DType::F64)?;
                sums = Some(sums.map_or(Ok(sum.clone()), |sums| sums + sum)?);
            }
        }
        if seen >= POSITIONS {
            break;
        }
    }
    let params = &drafter.params;
    let size = (squares / seen.max(1) as f64).sqrt();
    params[NORM].set(&params[NORM].ones_like()?.affine(size, 0.0)?)?;
    let Some(sums) = sums else { return Ok(()) };
    let mut rows = sums.to_vec2::<f64>()?;
    (0..rows.len()).for_each(|diagonal| rows[diagonal][diagonal] += PENALTY);
    solve(&mut rows).context("the start of the output matrices")?;
    let inputs = rows.len();
    let solution = rows.iter().flat_map(|row| row[inputs..].iter().map(|v| *v as f32));
    let solution = Tensor::from_iter(solution, &Device::Cpu)?.reshape((inputs, ()))?;
    let hidden = solution.dim(1)?;
    for (part, name) in [WO, WF].into_iter().enumerate().take(inputs / hidden) {
        params[name].set(&solution.narrow(0, part * hidden, hidden)?.t()?.contiguous()?)?;
    }
    Ok(())
}

/// Solves `A X = B` for symmetric positive definite `A`; each of `rows` holds one of `A` and one
/// of `B`, which becomes one of `X`.
fn solve(rows: &mut [Vec<f64>]) -> anyhow::Result<()> {
    let subtract = |row: &mut [f64], factor: f64, other: &[f64]| {
        row.iter_mut().zip(other).for_each(|(value, other)| *value -= factor * other);
    };
    let n = rows.len();
    for at in 0..n {
        let (done, below) = rows.split_at_mut(at + 1);
        let pivot = &done[at][at..];
        ensure!(pivot[0] > 0.0, "the system of {n} equations has no single solution");
        for row in below {
            let factor = row[at] / pivot[0];
            subtract(&mut row[at..], factor, pivot);
        }
    }
    for at in (0..n).rev() {
        let (above, rest) = rows.split_at_mut(at);
        let pivot = rest[0][at];
        rest[0][n..].iter_mut().for_each(|value| *value /= pivot);
        for row in above {
            let factor = row[at];
            subtract(&mut row[n..], factor, &rest[0][n..]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equations_are_solved() {
        let a = [[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]];
        let x = [[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0]];
        let product = |row: &[f64; 3], column: usize| -> f64 {
            row.iter().zip(&x).map(|(a, x)| a * x[column]).sum()
        };
        let row = |row: &[f64; 3]| [&row[..], &[product(row, 0), product(row, 1)]].concat();
        let mut rows: Vec<Vec<f64>> = a.iter().map(row).collect();
        solve(&mut rows).unwrap();
        for (got, wanted) in rows.iter().zip(x) {
            assert!(got[3..].iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-12), "{rows:?}");
        }
        assert!(solve(&mut [vec![1.0, 2.0, 1.0], vec![2.0, 1.0, 1.0]]).is_err());
    }
}
