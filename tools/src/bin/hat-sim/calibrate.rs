//! Finds what no source states from the published U-shape rows, and from nothing else.

use indicatif::ProgressBar;

use crate::costs::{Calibrated, CostFile, Published, Ranged};
use crate::figures::Figures;
use crate::policy::Policy;
use crate::text::Guessing;
use crate::world::{Run, World};

/// Requests of one trial, and how many seeds are averaged.
const REQUESTS: usize = 400;
const SEEDS: u64 = 2;
/// First and last step of the search, as a share of a number's range.
const STEP_FIRST: f64 = 0.2;
const STEP_LAST: f64 = 0.01;
/// Weight of a standard deviation beside a mean.
const SPREAD_WEIGHT: f64 = 0.1;
/// A number is as good as the best while the mean square deviation grows by no more than this.
const SLACK: f64 = 0.01 * 0.01;

/// What came out.
pub(crate) struct Outcome {
    pub(crate) file: CostFile,
    /// Root mean square deviation from the rows.
    pub(crate) deviation: f64,
    /// For each number: from where to where it is nearly as good, the others fixed.
    pub(crate) good: [[f64; 2]; 5],
}

/// Searches along one number after the other, in ever smaller steps.
pub(crate) fn calibrate(file: &CostFile, bar: &ProgressBar) -> Outcome {
    let guessing = Guessing::fit(&file.drafters);
    let mut best = file.clone();
    let mut least = error(&best, &guessing);
    let mut step = STEP_FIRST;
    while step > STEP_LAST {
        let before = least;
        for index in 0..Calibrated::NAMES.len() {
            for sign in [1.0, -1.0] {
                while let Some(trial) = moved(&best, index, sign * step) {
                    let trial_error = error(&trial, &guessing);
                    bar.inc(1);
                    if trial_error >= least {
                        break;
                    }
                    (best, least) = (trial, trial_error);
                }
            }
        }
        if least >= before {
            step /= 2.0;
        }
        bar.set_message(format!("{:.1} % off, step {step:.3}", 100.0 * least.sqrt()));
    }
    let good = std::array::from_fn(|index| reach(&best, least, index, &guessing, bar));
    for ranged in best.calibrated.each_mut() {
        ranged.value = (ranged.value * 1e4).round() / 1e4;
    }
    Outcome { file: best, deviation: least.sqrt(), good }
}

/// How far a number may go to either side.
fn reach(
    best: &CostFile,
    least: f64,
    index: usize,
    guessing: &Guessing,
    bar: &ProgressBar,
) -> [f64; 2] {
    [-1.0, 1.0].map(|sign| {
        let mut at = best.clone();
        while let Some(next) = moved(&at, index, sign * 0.04) {
            bar.inc(1);
            if error(&next, guessing) > least + SLACK {
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
fn error(file: &CostFile, guessing: &Guessing) -> f64 {
    let rows: Vec<&Published> = file.published.iter().filter(|row| row.calibrates).collect();
    let (mut sum, mut weight) = (0.0, 0.0);
    for row in rows {
        let figures = predict(file, guessing, &row.policy, row.rate);
        for (index, pair) in figures.chunks(2).enumerate() {
            let (published, of) = match index {
                0 => (row.ttft_ms, [1.0, 0.0]),
                1 => (row.tbt_ms, [1.0, 0.0]),
                _ => (row.step_ms.map(|[mean, _]| mean), [1.0, SPREAD_WEIGHT]),
            };
            let Some(published) = published else { continue };
            let off = pair[0] / published - 1.0;
            sum += of[0] * off * off;
            weight += of[0];
            if let Some([_, spread]) = row.step_ms.filter(|_| of[1] > 0.0) {
                let off = pair[1] / spread - 1.0;
                sum += of[1] * off * off;
                weight += of[1];
            }
        }
    }
    sum / f64::max(weight, 1e-9)
}

/// TTFT, TBT and step, each with a spread (0 for the first two), averaged over seeds.
fn predict(file: &CostFile, guessing: &Guessing, policy: &str, rate: f64) -> [f64; 6] {
    let policy = Policy::named(policy).expect("a published row names a policy");
    let mut all = [0.0; 6];
    for seed in 1..=SEEDS {
        let run = Run { rate, requests: REQUESTS, ..Run::of(&policy, seed) };
        let mut world = World::new(file, guessing, run);
        world.live(&mut |_| {});
        let figures = Figures::of(&policy.name, &world);
        let [step, spread] = figures.step_ms;
        let these = [figures.ttft(), 0.0, figures.tbt(), 0.0, step, spread];
        all.iter_mut().zip(these).for_each(|(all, this)| *all += this / SEEDS as f64);
    }
    all
}
