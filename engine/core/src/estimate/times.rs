//! Seconds as a function of rows: averages by size, with lines between them or one line through
//! all of them.

use super::Average;
use crate::chunk::StepCost;

/// Row counts are averaged in cells: 1, 2, 3 to 4, 5 to 8, and so on to 4,096.
const SIZES: usize = 13;
/// Contexts likewise: below 256, below 1,024, below 4,096, and more.
const CONTEXTS: usize = 4;
/// Unknowns of a fit: seconds of a step, of a row, and of a row for each row it attends to.
const TERMS: usize = 3;
/// Models of a step, largest first: a smaller one is taken where the measurements don't determine
/// a term, or would make it negative.
const STEP_MODELS: [[bool; TERMS]; 4] =
    [[true, true, true], [true, true, false], [false, true, true], [false, true, false]];
/// The same where context plays no part.
const LINE_MODELS: [[bool; TERMS]; 2] = [[true, true, false], [false, true, false]];

/// A point of a fit: its terms and its seconds.
type Point = ([f64; TERMS], f64);

/// Means of the measurements in one cell.
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    rows: Average,
    context: Average,
    seconds: Average,
}

/// The means of a cell that has measurements.
#[derive(Clone, Copy, Debug)]
struct Means {
    rows: f64,
    context: f64,
    seconds: f64,
}

impl Cell {
    fn note(&mut self, rows: f64, context: f64, seconds: f64) {
        self.rows.note(rows);
        self.context.note(context);
        self.seconds.note(seconds);
    }

    fn means(&self) -> Option<Means> {
        let (rows, context) = (self.rows.value()?, self.context.value()?);
        Some(Means { rows, context, seconds: self.seconds.value()? })
    }
}

/// Seconds by rows.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowTimes {
    cells: [Cell; SIZES],
}

impl RowTimes {
    /// Takes one measurement; no rows, and seconds that are no number from 0 up, say nothing.
    pub(crate) fn note(&mut self, rows: usize, seconds: f64) {
        if rows > 0 && seconds.is_finite() && seconds >= 0.0 {
            self.cells[size_of(rows)].note(rows as f64, 0.0, seconds);
        }
    }

    fn known(&self) -> impl DoubleEndedIterator<Item = Means> + Clone {
        self.cells.iter().filter_map(Cell::means)
    }

    /// Seconds of this many rows; `None` before the first measurement. The line goes on beyond the
    /// largest size that was measured; one size alone, and one below the smallest, is scaled.
    pub(crate) fn seconds(&self, rows: usize) -> Option<f64> {
        let rows = rows as f64;
        let below = self.known().rfind(|cell| cell.rows <= rows);
        let above = self.known().find(|cell| cell.rows > rows);
        let (from, to) = match (below, above) {
            (Some(below), Some(above)) => (below, above),
            (Some(last), None) => match self.known().rev().nth(1) {
                Some(before) => (before, last),
                None => return Some(last.seconds * rows / last.rows),
            },
            (None, first) => return first.map(|first| first.seconds * rows / first.rows),
        };
        let slope = ((to.seconds - from.seconds) / (to.rows - from.rows)).max(0.0);
        Some(from.seconds + slope * (rows - from.rows))
    }

    /// The line through the sizes from `rows_min` rows up, or through all if there are none.
    pub(crate) fn line(&self, rows_min: f64) -> Option<StepCost> {
        let of = |least: f64| {
            let cells = self.known().filter(move |cell| cell.rows >= least);
            fit(cells.map(|cell| ([1.0, cell.rows, 0.0], cell.seconds)), &LINE_MODELS)
        };
        let [fixed, per_row, per_row_context] = of(rows_min).or_else(|| of(0.0))?;
        Some(StepCost { fixed, per_row, per_row_context })
    }
}

/// Seconds of steps by rows and context. A cell moves by its own measurements alone, so that a
/// thousand decoded tokens don't wash away what a long prompt has taught.
#[derive(Clone, Debug, Default)]
pub(crate) struct StepTimes {
    /// The same in the contexts of late, whatever they are.
    pub(crate) by_rows: RowTimes,
    cells: [[Cell; CONTEXTS]; SIZES],
}

impl StepTimes {
    /// Takes the seconds of a step of `rows` rows behind `prefix` rows.
    pub(crate) fn note(&mut self, rows: u32, prefix: u32, seconds: f64) {
        self.note_mean(rows, f64::from(prefix) + f64::from(rows) / 2.0, seconds);
    }

    /// As [`StepTimes::note`], for rows that attend to `context` rows each, in the mean.
    pub(crate) fn note_mean(&mut self, rows: u32, context: f64, seconds: f64) {
        if !(seconds.is_finite() && seconds >= 0.0) || rows == 0 {
            return;
        }
        self.by_rows.note(rows as usize, seconds);
        let prefix = (context - f64::from(rows) / 2.0).max(64.0) as u32;
        let place = (prefix.ilog2() as usize - 6) / 2;
        let cell = &mut self.cells[size_of(rows as usize)][place.min(CONTEXTS - 1)];
        cell.note(f64::from(rows), context, seconds);
    }

    /// The model with the least sum of squared relative errors and no negative term, of the sizes
    /// from `rows_min` rows up, or of all if there are none; `None` before the first measurement.
    pub(crate) fn cost(&self, rows_min: f64) -> Option<StepCost> {
        let of = |least: f64| {
            let cells = self.cells.iter().flatten().filter_map(Cell::means);
            let cells = cells.filter(move |cell| cell.rows >= least);
            let terms = |cell: &Means| [1.0, cell.rows, cell.rows * cell.context];
            fit(cells.map(|cell| (terms(&cell), cell.seconds)), &STEP_MODELS)
        };
        let [fixed, per_row, per_row_context] = of(rows_min).or_else(|| of(0.0))?;
        Some(StepCost { fixed, per_row, per_row_context })
    }
}

/// The cell of a row count.
fn size_of(rows: usize) -> usize {
    let size = rows.max(1).ilog2() + u32::from(!rows.is_power_of_two());
    (size as usize).min(SIZES - 1)
}

/// The terms of the first of `models` that fits `points`.
fn fit(
    points: impl Iterator<Item = Point> + Clone,
    models: &[[bool; TERMS]],
) -> Option<[f64; TERMS]> {
    models.iter().find_map(|model| least_squares(points.clone(), *model))
}

/// The terms of `model` that fit `points` best, the others 0; `None` if they are not determined
/// or one is negative.
fn least_squares(
    points: impl Iterator<Item = Point> + Clone,
    model: [bool; TERMS],
) -> Option<[f64; TERMS]> {
    let mut matrix = [[0.0; TERMS + 1]; TERMS];
    // Terms in units of their largest value, so that pivots can be compared with 1.
    let mut units = [f64::MIN_POSITIVE; TERMS];
    for (terms, _) in points.clone() {
        units.iter_mut().zip(terms).for_each(|(unit, term)| *unit = unit.max(term));
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
    fits.then(|| std::array::from_fn(|index| found[index] / units[index]))
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
