//! A cost model from scattered measurements: seconds = fixed + rows (per_row + context * each).

use super::Moving;
use crate::chunk::CloudCost;

/// Row counts are averaged in cells: 1, 2, 3 to 4, 5 to 8, and so on to 4,096.
const SIZES: usize = 13;
/// Contexts likewise: below 256, below 1,024, below 4,096, and more.
const CONTEXTS: usize = 4;
/// Unknowns of the model.
const TERMS: usize = 3;
/// Which unknowns are looked for, the most first: a model with fewer is taken where the
/// measurements say nothing of the others, or would make them negative.
const MODELS: [[bool; TERMS]; 4] =
    [[true, true, true], [true, true, false], [false, true, true], [false, true, false]];

/// Means of what fell into one cell.
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    rows: Moving,
    context: Moving,
    seconds: Moving,
}

/// Measurements of steps, by rows and context. A cell moves by its own measurements alone, so
/// that a thousand decoded tokens don't wash away what a long prompt has taught.
#[derive(Clone, Debug, Default)]
pub struct Fit {
    cells: [[Cell; CONTEXTS]; SIZES],
}

impl Fit {
    /// `rows` rows behind `prefix` rows took so long; `past` is the share of the past.
    pub fn note(&mut self, past: f64, rows: u32, prefix: u32, seconds: f64) {
        self.note_mean(past, rows, f64::from(prefix) + f64::from(rows) / 2.0, seconds);
    }

    /// As [`Fit::note`], for rows that attend to `context` rows each, in the mean.
    pub fn note_mean(&mut self, past: f64, rows: u32, context: f64, seconds: f64) {
        if !(seconds.is_finite() && seconds >= 0.0) || rows == 0 {
            return;
        }
        let size = (rows.ilog2() + u32::from(!rows.is_power_of_two())) as usize;
        let prefix = (context - f64::from(rows) / 2.0).max(64.0) as u32;
        let place = (prefix.ilog2() as usize - 6) / 2;
        let cell = &mut self.cells[size.min(SIZES - 1)][place.min(CONTEXTS - 1)];
        cell.rows.note(past, f64::from(rows));
        cell.context.note(past, context);
        cell.seconds.note(past, seconds);
    }

    /// The model with the least sum of squared relative errors and no negative term; `None`
    /// before the first measurement.
    #[must_use]
    pub fn cost(&self) -> Option<CloudCost> {
        let mut points = [([0.0; TERMS], 0.0); SIZES * CONTEXTS];
        let mut count = 0;
        for cell in self.cells.iter().flatten() {
            let (rows, context) = (cell.rows.value(), cell.context.value());
            if let (Some(rows), Some(context), Some(seconds)) =
                (rows, context, cell.seconds.value())
            {
                points[count] = ([1.0, rows, rows * context], seconds);
                count += 1;
            }
        }
        let points = &points[..count];
        let found = MODELS.iter().find_map(|model| least_squares(points, *model))?;
        Some(CloudCost { fixed: found[0], per_row: found[1], per_row_context: found[2] })
    }
}

/// The terms of `model` that fit `points` best, the others 0; `None` if they are not determined
/// or one is negative.
fn least_squares(points: &[([f64; TERMS], f64)], model: [bool; TERMS]) -> Option<[f64; TERMS]> {
    let mut matrix = [[0.0; TERMS + 1]; TERMS];
    // Terms in units of their greatest value, so that pivots can be compared with 1.
    let mut units = [0.0f64; TERMS];
    for (terms, _) in points {
        units.iter_mut().zip(terms).for_each(|(unit, term)| *unit = unit.max(*term));
    }
    for (terms, seconds) in points {
        let weight = 1.0 / seconds.max(1e-6).powi(2);
        for row in 0..TERMS {
            for column in 0..TERMS {
                let both = terms[row] / units[row] * (terms[column] / units[column]);
                matrix[row][column] += weight * both;
            }
            matrix[row][TERMS] += weight * terms[row] / units[row] * seconds;
        }
    }
    for index in (0..TERMS).filter(|index| !model[*index]) {
        matrix[index] = [0.0; TERMS + 1];
        matrix.iter_mut().for_each(|row| row[index] = 0.0);
        matrix[index][index] = 1.0;
    }
    let found = solve(matrix)?;
    let fits = found.iter().all(|term| term.is_finite() && *term >= 0.0);
    fits.then(|| std::array::from_fn(|index| found[index] / units[index].max(f64::MIN_POSITIVE)))
}

/// Elimination without exchange of rows, which a positive definite matrix doesn't need; `None` if
/// it is not.
fn solve(mut matrix: [[f64; TERMS + 1]; TERMS]) -> Option<[f64; TERMS]> {
    let whole: [f64; TERMS] = std::array::from_fn(|index| matrix[index][index]);
    for pivot in 0..TERMS {
        // What is left of a term beside those before it: nothing, if they say the same.
        if matrix[pivot][pivot] <= 1e-6 * whole[pivot] || whole[pivot] <= 0.0 {
            return None;
        }
        let row = matrix[pivot];
        for below in matrix.iter_mut().skip(pivot + 1) {
            let factor = below[pivot] / row[pivot];
            below.iter_mut().zip(row).for_each(|(to, from)| *to -= factor * from);
        }
    }
    let mut found = [0.0; TERMS];
    for index in (0..TERMS).rev() {
        let known: f64 = (index + 1..TERMS).map(|next| matrix[index][next] * found[next]).sum();
        found[index] = (matrix[index][TERMS] - known) / matrix[index][index];
    }
    Some(found)
}
