//! The search behind `ChunkPolicy::Auto`: a dynamic program over prefixes of the prompt.
//!
//! For each place where the prompt may be cut, a few ways to get there are kept: those that no
//! other one beats at all four times (device, uplink, first stage, last stage). A way that can't
//! end before the best plan so far, whatever follows, is dropped. All plans of one size are tried
//! first, so the answer is never later than the best of them.

use super::{Ahead, CostModel, FOREVER_S, Limits, equal};

/// Cells of the prompt: a longer one is cut more coarsely than the grain.
const CELLS_MAX: u32 = 256;
/// Ways that are kept for one prefix.
const WAYS_MAX: usize = 8;
/// Number of cells up to which all sizes are tried; beyond that, four in each doubling.
const CELLS_DENSE: u32 = 24;
/// Gains below this share of the finish are not looked for.
const GAIN_MIN: f64 = 2e-3;
/// Chunks that the last improvements may look at.
const POLISH_MAX: u64 = 8192;
/// Share of the finish below which the difference of two ways is ignored: one is kept.
const ALIKE: f64 = 1e-4;

/// One way to a prefix.
#[derive(Clone, Copy, Debug)]
struct Way {
    at: Ahead,
    /// Index of the way before it.
    before: u32,
    /// The cell after which its last chunk began.
    from: u32,
}

/// Buffers of the search.
#[derive(Debug, Default)]
pub(super) struct Search {
    ways: Vec<Way>,     // [cells + 1, WAYS_MAX]
    counts: Vec<usize>, // ways of each prefix. [cells + 1]
    steps: Vec<u32>,    // cells of the chunks that are tried
    best: Vec<u32>,
    /// Chunks whose times the last run looked at.
    pub(super) evaluated: u64,
}

/// State of one search.
struct Problem<'a> {
    costs: &'a CostModel,
    cached: u32,
    rows: u32,
    /// Rows of a cell.
    cell: u32,
    rows_max: u32,
    step_s_max: f64,
    /// No chunk takes longer on the device than on the uplink.
    device_is_faster: bool,
    /// No chunk takes longer on the uplink than in a stage.
    uplink_is_faster: bool,
}

impl Search {
    /// Elements that the buffers hold without growing.
    #[cfg(test)]
    pub(super) fn rooms(&self) -> [usize; 4] {
        let Self { ways, counts, steps, best, .. } = self;
        [ways.capacity(), counts.capacity(), steps.capacity(), best.capacity()]
    }

    /// Writes the best sizes that it finds to `sizes`, and returns when the first token is there.
    pub(super) fn run(
        &mut self,
        costs: &CostModel,
        limits: &Limits,
        ahead: Ahead,
        cached: u32,
        rows: u32,
        sizes: &mut Vec<u32>,
    ) -> f64 {
        self.evaluated = 0;
        let rows_max = limits.rows_max.clamp(1, rows.max(1));
        let cell = limits.grain.max(rows.div_ceil(CELLS_MAX)).clamp(1, rows_max);
        let step_s_max = if limits.step_s_max > 0.0 { limits.step_s_max } else { 0.0 };
        let step_s_max = if limits.step_s_max.is_nan() { f64::INFINITY } else { step_s_max };
        let stages = f64::from(costs.stages);
        let problem = Problem {
            costs,
            cached,
            rows,
            cell,
            rows_max,
            step_s_max,
            device_is_faster: costs.device.fixed <= costs.frame_s
                && costs.device.per_row <= costs.row_up_s,
            uplink_is_faster: costs.frame_s <= costs.cloud.fixed / stages
                && costs.row_up_s <= costs.cloud.per_row / stages,
        };
        let best_s = self.try_equal(&problem, ahead, sizes);
        let cells = rows.div_ceil(problem.cell);
        let mut found_s = best_s;
        if cells <= 4 * CELLS_MAX {
            found_s = self.try_cuts(&problem, ahead, best_s, cells, sizes);
            found_s = self.polish(&problem, ahead, found_s, sizes);
        }
        if sizes.is_empty() {
            sizes.extend(equal(rows, problem.cell));
            return super::finish_s(costs, ahead, cached, sizes);
        }
        found_s + costs.return_s
    }

    /// All plans of one size, from a cell up: smaller ones promise little, and what each chunk
    /// costs is known too badly to take a hundred for that. Returns the earliest last step,
    /// infinite if no size is allowed.
    fn try_equal(&mut self, problem: &Problem<'_>, ahead: Ahead, sizes: &mut Vec<u32>) -> f64 {
        sizes.clear();
        let (mut best_s, mut best_size) = (f64::INFINITY, None);
        // From the top, so that of plans that end together the one with the fewest chunks wins.
        for size in (problem.cell..=problem.rows_max).rev() {
            if let Some(finish_s) = self.try_size(problem, ahead, size, best_s) {
                (best_s, best_size) = (finish_s, Some(size));
            }
        }
        if let Some(size) = best_size {
            sizes.extend(equal(problem.rows, size));
        }
        best_s
    }

    /// End of chunks of `size`, if they are allowed and end before `best_s`.
    fn try_size(
        &mut self,
        problem: &Problem<'_>,
        ahead: Ahead,
        size: u32,
        best_s: f64,
    ) -> Option<f64> {
        if problem.bound_of(&ahead, size) >= best_s {
            return None;
        }
        let finish_s = self.finish(problem, ahead, 0, equal(problem.rows, size), best_s);
        (finish_s < best_s).then_some(finish_s)
    }

    /// The dynamic program. Overwrites `sizes` if it finds something earlier than `best_s`, and
    /// returns the earlier of both.
    fn try_cuts(
        &mut self,
        problem: &Problem<'_>,
        ahead: Ahead,
        mut best_s: f64,
        cells: u32,
        sizes: &mut Vec<u32>,
    ) -> f64 {
        let nobody = Way { at: ahead, before: 0, from: 0 };
        self.ways.clear();
        self.ways.resize((cells as usize + 1) * WAYS_MAX, nobody);
        self.counts.clear();
        self.counts.resize(cells as usize + 1, 0);
        self.counts[0] = 1;
        self.steps.clear();
        self.steps.extend(steps(cells.min(problem.rows_max / problem.cell)));
        let mut end = None;
        for from in 0..cells {
            for way in 0..self.counts[from as usize] {
                let before = from as usize * WAYS_MAX + way;
                let at = self.ways[before].at;
                if problem.bound(&at, from) >= best_s {
                    continue;
                }
                let before = u32::try_from(before).expect("cells and ways are few");
                let rest = cells - from;
                let mut last = 0;
                for index in 0..=self.steps.len() {
                    // The sizes that are tried, and the rest of the prompt.
                    let step = self.steps.get(index).copied().unwrap_or(rest).min(rest);
                    if step == last
                        || !problem.allows(problem.rows_of(from, step), from * problem.cell)
                    {
                        break;
                    }
                    last = step;
                    let mut way = problem.extend(at, before, from, step);
                    self.evaluated += 1;
                    if step < rest {
                        problem.settle(&mut way.at, from + step);
                        self.keep(problem, way, from + step, best_s);
                    } else if way.at.last_s < best_s * (1.0 - GAIN_MIN) {
                        (best_s, end) = (way.at.last_s, Some(way));
                    }
                }
            }
        }
        if let Some(way) = end {
            self.write(problem, way, cells, sizes);
        }
        best_s
    }

    /// Keeps a way to cell `to` unless another one is as early, or it can't be the best.
    fn keep(&mut self, problem: &Problem<'_>, way: Way, to: u32, best_s: f64) {
        let bound = problem.bound(&way.at, to);
        if bound >= best_s * (1.0 - GAIN_MIN) {
            return;
        }
        let alike_s = if best_s < FOREVER_S { best_s * ALIKE } else { 0.0 };
        let first = to as usize * WAYS_MAX;
        let mut count = self.counts[to as usize];
        let ways = &mut self.ways[first..first + WAYS_MAX];
        if ways[..count].iter().any(|other| beats(&other.at, &way.at, alike_s)) {
            return;
        }
        let mut index = 0;
        while index < count {
            if beats(&way.at, &ways[index].at, 0.0) {
                count -= 1;
                ways[index] = ways[count];
            } else {
                index += 1;
            }
        }
        if count < WAYS_MAX {
            ways[count] = way;
            count += 1;
        } else {
            let bounds = ways.iter().map(|way| problem.bound(&way.at, to)).enumerate();
            let (worst, worst_s) =
                bounds.max_by(|a, b| a.1.total_cmp(&b.1)).expect("there are some");
            if bound < worst_s {
                ways[worst] = way;
            }
        }
        self.counts[to as usize] = count;
    }

    /// Moves single cuts by a cell, and leaves cuts out, as long as that helps. Returns the earlier
    /// of `best_s` and what it comes to.
    fn polish(
        &mut self,
        problem: &Problem<'_>,
        ahead: Ahead,
        mut best_s: f64,
        sizes: &mut Vec<u32>,
    ) -> f64 {
        let end = self.evaluated + POLISH_MAX;
        let mut again = true;
        while std::mem::take(&mut again) {
            let (mut at, mut done) = (ahead, 0);
            let mut index = 0;
            while index + 1 < sizes.len() {
                let both = sizes[index] + sizes[index + 1];
                for first in
                    [sizes[index] + problem.cell, sizes[index].saturating_sub(problem.cell), both]
                {
                    if self.evaluated > end {
                        return best_s;
                    }
                    if first == 0 || first > both {
                        continue;
                    }
                    let rest = sizes[index + 2..].iter().copied();
                    let changed = [first, both - first].into_iter().chain(rest);
                    let finish_s = self.finish(problem, at, done, changed, best_s);
                    if finish_s < best_s * (1.0 - 1e-4) {
                        best_s = finish_s;
                        again = true;
                        sizes[index] = first;
                        sizes[index + 1] = both - first;
                        if first == both {
                            sizes.remove(index + 1);
                        }
                        break;
                    }
                }
                at.push(problem.costs, sizes[index], problem.cached.saturating_add(done));
                done += sizes[index];
                index += 1;
            }
        }
        best_s
    }

    /// End of chunks of `sizes` after `done` rows; infinite if not before `best_s` or not allowed.
    fn finish(
        &mut self,
        problem: &Problem<'_>,
        mut at: Ahead,
        mut done: u32,
        sizes: impl Iterator<Item = u32>,
        best_s: f64,
    ) -> f64 {
        for size in sizes.filter(|size| *size > 0) {
            if !problem.allows(size, done) || at.last_s >= best_s {
                return f64::INFINITY;
            }
            at.push(problem.costs, size, problem.cached.saturating_add(done));
            self.evaluated += 1;
            done += size;
        }
        at.last_s
    }

    /// The sizes of the way that ends with `way`.
    fn write(&mut self, problem: &Problem<'_>, mut way: Way, cells: u32, sizes: &mut Vec<u32>) {
        self.best.clear();
        let mut to = cells;
        loop {
            self.best.push(problem.rows_of(way.from, to - way.from));
            if way.from == 0 {
                break;
            }
            to = way.from;
            way = self.ways[way.before as usize];
        }
        sizes.clear();
        sizes.extend(self.best.iter().rev());
    }
}

impl Problem<'_> {
    /// Rows of the `step` cells from cell `from` on.
    fn rows_of(&self, from: u32, step: u32) -> u32 {
        ((from + step) * self.cell).min(self.rows) - from * self.cell
    }

    /// True if a chunk of `rows` rows may run after `done` rows. A cell always may.
    fn allows(&self, rows: u32, done: u32) -> bool {
        let prefix = self.cached.saturating_add(done);
        rows <= self.rows_max
            && (rows <= self.cell || self.costs.stage(rows, prefix) <= self.step_s_max)
    }

    fn extend(&self, mut at: Ahead, before: u32, from: u32, step: u32) -> Way {
        let prefix = self.cached.saturating_add(from * self.cell);
        at.push(self.costs, self.rows_of(from, step), prefix);
        Way { at, before, from }
    }

    /// Puts off each time of `at`, reached after `cells` cells, as far as that changes nothing of
    /// what can follow: ways that differ in what doesn't matter become alike.
    fn settle(&self, at: &mut Ahead, cells: u32) {
        let Self { costs, cached, rows, .. } = *self;
        let done = (cells * self.cell).min(rows);
        let most = self.rows_max.min(rows - done);
        let least = self.cell.min(most);
        let up_s = |rows: u32| costs.frame_s + costs.row_up_s * f64::from(rows);
        let others = f64::from(costs.stages - 1);
        let latency_s = costs.up_latency_s + costs.cloud_wait_s;
        // Whatever comes next comes no earlier than its smallest chunk can.
        at.uplink_s = at.uplink_s.max(at.device_s + costs.device.seconds(least, 0));
        at.stage_s = at.stage_s.max(at.uplink_s + up_s(least) + latency_s);
        let least_s = costs.stage(least, cached.saturating_add(done));
        at.last_s = at.last_s.max(at.stage_s + others * least_s);
        // A place that is faster than the next one, whatever the chunk, and is free so early that
        // the largest chunk would wait behind it, is never waited for.
        if self.device_is_faster {
            at.device_s = at.device_s.max(at.uplink_s - costs.device.seconds(most, 0));
        }
        let most_s = costs.stage(most, cached.saturating_add(rows - most));
        at.stage_s = at.stage_s.max(at.last_s - others * most_s);
        if self.uplink_is_faster {
            at.uplink_s = at.uplink_s.max(at.stage_s - latency_s - up_s(most));
        }
    }

    /// As [`Problem::bound`], for chunks of `size` from the start.
    fn bound_of(&self, ahead: &Ahead, size: u32) -> f64 {
        let Self { costs, cached, rows, .. } = *self;
        let (count, stages) = (f64::from(rows.div_ceil(size)), f64::from(costs.stages));
        let last = rows - (rows.div_ceil(size).max(1) - 1) * size;
        let last_s = costs.stage(last, cached);
        let latency_s = costs.up_latency_s + costs.cloud_wait_s;
        let all = |fixed: f64, each: f64| count * fixed + f64::from(rows) * each;
        let first_s = ahead.device_s + costs.device.seconds(size.min(rows), 0);
        let up_s = ahead.uplink_s.max(first_s) + all(costs.frame_s, costs.row_up_s);
        let enter_s = first_s + costs.frame_s + costs.row_up_s * f64::from(size.min(rows));
        let steps_s = all(costs.cloud.fixed, costs.cloud.per_row) / stages;
        let ended_s = ahead.stage_s.max(enter_s + latency_s) + steps_s + (stages - 1.0) * last_s;
        let made_s = ahead.device_s + all(costs.device.fixed, costs.device.per_row);
        ended_s.max(up_s.max(made_s) + latency_s + stages * last_s)
    }

    /// The last step can't end before this if `at` is reached after `cells` cells: each place
    /// still has the rest to do, and the last row has to pass the places behind it.
    fn bound(&self, at: &Ahead, cells: u32) -> f64 {
        let Self { costs, cached, rows, .. } = *self;
        let rest = rows - (cells * self.cell).min(rows);
        if rest == 0 {
            return at.last_s;
        }
        let stages = f64::from(costs.stages);
        let row_s = costs.stage(1, cached);
        let rest_s = costs.stage(rest, cached.saturating_add(rows - rest));
        let steps = (at.stage_s + rest_s + (stages - 1.0) * row_s).max(at.last_s + rest_s);
        let latency = costs.up_latency_s + costs.cloud_wait_s + stages * row_s;
        let up = at.uplink_s + costs.frame_s + costs.row_up_s * f64::from(rest) + latency;
        let made = at.device_s + costs.device.seconds(rest, 0) + costs.frame_s + costs.row_up_s;
        steps.max(up).max(made + latency)
    }
}

/// True if `one` is nowhere later than `other`, but for `alike_s`.
fn beats(one: &Ahead, other: &Ahead, alike_s: f64) -> bool {
    one.device_s <= other.device_s + alike_s
        && one.uplink_s <= other.uplink_s + alike_s
        && one.stage_s <= other.stage_s + alike_s
        && one.last_s <= other.last_s + alike_s
}

/// Sizes that are tried, in cells, up to `most`: all, or four in each doubling.
fn steps(most: u32) -> impl Iterator<Item = u32> {
    let wide = move |last: u32| if last < 8 { 1 } else { 1 << (last.ilog2() - 2) };
    let next = move |&last: &u32| {
        let by = if most <= CELLS_DENSE { 1 } else { wide(last) };
        Some(last + by).filter(|&next| next <= most)
    };
    std::iter::successors(Some(1), next)
}
