//! Finds what no source states from the published U-shape rows, and from nothing else.

use hat_tools::random::{Purpose, unit};
use indicatif::ProgressBar;

use crate::costs::{CostFile, Ranged};
use crate::text::Predictability;
use crate::trial::Trials;

/// Requests of one trial, and how many seeds are averaged.
const REQUESTS: usize = 500;
const SEEDS: u64 = 3;
/// Points that are tried before the search begins, and how many of them it begins from.
const POINTS: u64 = 64;
const STARTS: usize = 2;
/// First and last step of the search, as a share of a number's range.
const STEP_FIRST: f64 = 0.1;
const STEP_LAST: f64 = 0.012;
/// Weight of a standard deviation beside a mean.
const SPREAD_WEIGHT: f64 = 0.1;
/// A number is as good as the best while the deviation (root mean square) grows by no more.
const SLACK: f64 = 0.01;

/// Result of a calibration.
pub(crate) struct Outcome {
    pub(crate) file: CostFile,
    /// Root mean square deviation from the rows.
    pub(crate) deviation: f64,
    /// For each number: from where to where it is nearly as good, the others fixed.
    pub(crate) good: [[f64; 2]; 5],
}

/// Tries points all over the ranges, then searches from the best ones along one number after the
/// other, in ever smaller steps.
pub(crate) fn calibrate(file: &CostFile, bar: &ProgressBar) -> Outcome {
    let predictability = Predictability::fit(&file.drafters);
    let mut points: Vec<(f64, CostFile)> = (0..POINTS)
        .map(|point| {
            let mut trial = file.clone();
            for (index, ranged) in trial.calibrated.each_mut().into_iter().enumerate() {
                let share = unit(point, Purpose::Point, index as u64, 0);
                ranged.value = ranged.low + share * (ranged.high - ranged.low);
            }
            bar.inc(1);
            (error(&trial, &predictability), trial)
        })
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points.truncate(STARTS);
    let searched =
        points.into_iter().map(|(least, from)| search(from, least, &predictability, bar));
    let (least, mut best) =
        searched.min_by(|a, b| a.0.total_cmp(&b.0)).expect("there are starting points");
    let good: [[f64; 2]; 5] =
        std::array::from_fn(|index| reach(&best, least, index, &predictability, bar));
    // A cost that the rows do not ask for is not assumed.
    best.calibrated.message_ms.value = good[4][0];
    for ranged in best.calibrated.each_mut() {
        ranged.value = (ranged.value * 1e3).round() / 1e3;
    }
    Outcome { file: best, deviation: least.sqrt(), good }
}

fn search(
    mut best: CostFile,
    mut least: f64,
    predictability: &Predictability,
    bar: &ProgressBar,
) -> (f64, CostFile) {
    let mut step = STEP_FIRST;
    while step > STEP_LAST {
        let before = least;
        for (index, sign) in (0..5).flat_map(|index| [(index, 1.0), (index, -1.0)]) {
            while let Some(trial) = moved(&best, index, sign * step) {
                let trial_error = error(&trial, predictability);
                bar.inc(1);
                if trial_error >= least {
                    break;
                }
                (best, least) = (trial, trial_error);
            }
        }
        if least >= before {
            step /= 2.0;
        }
        bar.set_message(format!("{:.1} % off, step {step:.3}", 100.0 * least.sqrt()));
    }
    (least, best)
}

/// Distance that a number may go to either side.
fn reach(
    best: &CostFile,
    least: f64,
    index: usize,
    predictability: &Predictability,
    bar: &ProgressBar,
) -> [f64; 2] {
    [-1.0, 1.0].map(|sign| {
        let mut at = best.clone();
        while let Some(next) = moved(&at, index, sign * 0.04) {
            bar.inc(1);
            if error(&next, predictability).sqrt() > least.sqrt() + SLACK {
                break;
            }
            at = next;
        }
        at.calibrated.each()[index].value
    })
}

/// The file with one number moved by a share of its range; `None` at the range's end.
fn moved(file: &CostFile, index: usize, share: f64) -> Option<CostFile> {
    let mut file = file.clone();
    let Ranged { value, low, high } = file.calibrated.each()[index];
    let to = (value + share * (high - low)).clamp(low, high);
    file.calibrated.each_mut()[index].value = to;
    ((to - value).abs() > 1e-9).then_some(file)
}

/// Mean square deviation from the rows that calibrate.
fn error(file: &CostFile, predictability: &Predictability) -> f64 {
    let (mut sum, mut weights) = (0.0, 0.0);
    let mut add = |weight: f64, published: f64, simulated: f64| {
        let off = simulated / published - 1.0;
        sum += weight * off * off;
        weights += weight;
    };
    let runs = (1, SEEDS, REQUESTS);
    let mut trials = Trials::new(file, predictability.clone(), runs, ProgressBar::hidden());
    for row in file.published.iter().filter(|row| row.calibrates) {
        let figures = trials.figures(&row.policy, row.rate).expect("a row can be simulated");
        row.ttft_ms.into_iter().for_each(|ttft| add(1.0, ttft, figures.ttft()));
        row.tbt_ms.into_iter().for_each(|tbt| add(1.0, tbt, figures.tbt()));
        if let Some([mean, spread]) = row.step_ms {
            add(1.0, mean, figures.step_ms[0]);
            add(SPREAD_WEIGHT, spread, figures.step_ms[1]);
        }
    }
    sum / f64::max(weights, 1e-9)
}
