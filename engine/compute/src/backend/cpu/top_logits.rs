//! The largest of each row of a product, without the product in memory.

use std::ops::Range;

use hat_loader::layout::PANEL;

use super::super::TopLogit;
use super::kernels::Kernels;
use super::matrix::Linear;
use super::threads::Part;

/// Columns that a thread computes before it looks at them.
const COLUMNS: usize = 8 * PANEL;

/// Scratch memory of one thread.
#[derive(Default)]
pub(super) struct TopScratch {
    /// `[rows][COLUMNS]`
    sums: Vec<f32>,
    /// The largest that this thread has seen. `[rows][k]`
    top: Vec<TopLogit>,
    /// True if all of them are finite.
    finite: bool,
}

impl TopScratch {
    /// Begins with `rows` lists of `k`; allocates only if they grow.
    pub(super) fn start(&mut self, rows: usize, k: usize) {
        self.sums.resize((rows * COLUMNS).max(self.sums.len()), 0.0);
        self.top.clear();
        self.top.resize(rows * k, TopLogit::NONE);
        self.finite = true;
    }

    /// Computes some columns and keeps the largest.
    pub(super) fn add(&mut self, kernels: &dyn Kernels, job: &Linear<'_>, columns: Range<usize>) {
        let k = self.top.len() / job.rows;
        for first in columns.clone().step_by(COLUMNS) {
            let some = first..columns.end.min(first + COLUMNS);
            let width = some.len();
            kernels.linear(job, some, &mut Part::new(&mut self.sums, width, job.rows));
            let rows = self.sums.chunks_exact(width).zip(self.top.chunks_exact_mut(k));
            for (sums, top) in rows {
                // By sixteen without a branch: almost all of them hold nothing to keep.
                for (column, sums) in (first..).step_by(PANEL).zip(sums.chunks(PANEL)) {
                    self.finite &= sums.iter().fold(true, |all, value| all & value.is_finite());
                    let least = top[k - 1].value;
                    if !sums.iter().fold(false, |any, value| any | (*value > least)) {
                        continue;
                    }
                    for (column, value) in (column..).zip(sums) {
                        if *value > top[k - 1].value {
                            let column = u32::try_from(column).expect("a vocabulary fits u32");
                            TopLogit { value: *value, column }.insert(top);
                        }
                    }
                }
            }
        }
    }

    /// Merges the lists of this thread, of `k` each, into `top`; returns true if all was finite.
    pub(super) fn merge_into(&self, top: &mut [TopLogit], k: usize) -> bool {
        for (mine, all) in self.top.chunks_exact(k).zip(top.chunks_exact_mut(k)) {
            for one in mine {
                one.insert(all);
            }
        }
        self.finite
    }
}
