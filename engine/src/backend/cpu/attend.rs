//! Attention of some rows over paged K and V, written once for every level.
//!
//! Keys are walked by logical position, in tiles of [`PAGE_SIZE`] positions that start at multiples
//! of it. A tile that stands in one page is read as it is, once for all rows of a task; a tile
//! with rows of a draft tree is gathered key by key, for each row. What follows sees only the
//! tile, so the bits of a row depend on logical positions alone.

use std::ops::Range;

use super::super::PAGE_SIZE;
use super::kv::CpuKv;
use super::math;
use super::threads::Part;

/// Rows that a task has at most.
pub(super) const ROWS_MAX: usize = 8;
/// Queries (rows times heads) of a task, unless one row has more: their sums stay in L1.
const QUERIES: usize = 16;

/// A number for each key of a tile.
pub(super) type Tile = [f32; PAGE_SIZE];

/// One row, and the keys it sees.
#[derive(Clone, Copy, Default)]
pub(super) struct Row<'a> {
    /// `[group][head_dim]`
    pub(super) q: &'a [f32],
    /// Its own logical position: the last key it sees.
    pub(super) position: usize,
    /// First logical position it sees.
    pub(super) first: usize,
    /// Positions below this stand at the slot of the same number.
    pub(super) prefix_len: usize,
    /// Slots of the positions from `prefix_len`.
    pub(super) tail: &'a [u32],
}

/// The query heads of one key/value head, for rows of one sequence.
pub(super) struct AttendTask<'a> {
    pub(super) kv: &'a CpuKv,
    pub(super) layer: usize,
    pub(super) kv_head: usize,
    pub(super) head_dim: usize,
    /// Query heads of the key/value head.
    pub(super) group: usize,
    /// Pages of the sequence.
    pub(super) pages: &'a [u32],
    /// At most [`ROWS_MAX`].
    pub(super) rows: &'a [Row<'a>],
}

/// How many rows a task takes together.
pub(super) fn rows_together(group: usize) -> usize {
    (QUERIES / group).clamp(1, ROWS_MAX)
}

impl Row<'_> {
    /// Which keys of the tile that begins at `start` it sees.
    fn part_of(&self, start: usize) -> Range<usize> {
        let from = self.first.saturating_sub(start).min(PAGE_SIZE);
        let end = (self.position + 1).saturating_sub(start).min(PAGE_SIZE);
        from..end.max(from)
    }

    /// Whether the keys `part` of the tile stand in one page, in order.
    fn is_plain(&self, start: usize, part: &Range<usize>) -> bool {
        part.is_empty() || start + part.end <= self.prefix_len
    }
}

/// One thread's room.
#[derive(Default)]
pub(super) struct AttendScratch {
    tile: KeyTile,
    /// Running softmax of each query: largest score, sum of weights. `[rows][group]`
    running: Vec<(f32, f32)>,
    /// Running sums of V. `[rows][group][head_dim]`
    sums: Vec<f32>,
}

/// One tile of K and V.
#[derive(Default)]
struct KeyTile {
    /// `[head_dim][PAGE_SIZE]`
    k: Vec<f32>,
    /// `[PAGE_SIZE][head_dim]`
    v: Vec<f32>,
}

impl AttendScratch {
    /// Makes room for these sizes; allocates only if they grow.
    pub(super) fn fit(&mut self, head_dim: usize, group: usize) {
        let queries = rows_together(group) * group;
        self.tile.k.resize(head_dim * PAGE_SIZE, 0.0);
        self.tile.v.resize(head_dim * PAGE_SIZE, 0.0);
        self.running.resize(queries, (0.0, 0.0));
        self.sums.resize(queries * head_dim, 0.0);
    }
}

/// `out = softmax(q K^T / sqrt(head_dim)) V` for each query. Row `i` of the task goes to row
/// `first + i` of `out`, from column `column`.
#[inline(always)]
pub(super) fn attend_task(
    task: &AttendTask<'_>,
    scratch: &mut AttendScratch,
    out: &mut Part<'_, f32>,
    (first, column): (usize, usize),
    ops: impl TileOps,
) {
    let queries = task.rows.len() * task.group;
    let AttendScratch { tile, running, sums } = scratch;
    let (running, sums) = (&mut running[..queries], &mut sums[..queries * task.head_dim]);
    running.fill((f32::NEG_INFINITY, 0.0));
    sums.fill(0.0);
    let begin = task.rows.iter().map(|row| row.first).min().unwrap_or(0) / PAGE_SIZE;
    let end = task.rows.iter().map(|row| row.position).max().unwrap_or(0) / PAGE_SIZE;
    for index in begin..=end {
        let start = index * PAGE_SIZE;
        let all_plain = task.rows.iter().all(|row| row.is_plain(start, &row.part_of(start)));
        if all_plain {
            tile.read_page(task, index, ops);
            tile.add_to(task, 0..task.rows.len(), start, running, sums, ops);
            continue;
        }
        for (r, row) in task.rows.iter().enumerate() {
            let part = row.part_of(start);
            if row.is_plain(start, &part) && !part.is_empty() {
                tile.read_page(task, index, ops);
            } else {
                tile.gather(task, row, start, part);
            }
            tile.add_to(task, r..r + 1, start, running, sums, ops);
        }
    }
    let width = task.group * task.head_dim;
    for (r, (sums, running)) in
        sums.chunks_exact(width).zip(running.chunks_exact(task.group)).enumerate()
    {
        let out = &mut out.row(first + r)[column..][..width];
        for ((out, sums), (_, total)) in
            out.chunks_exact_mut(task.head_dim).zip(sums.chunks_exact(task.head_dim)).zip(running)
        {
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum / total;
            }
        }
    }
}

impl KeyTile {
    #[inline(always)]
    fn read_page(&mut self, task: &AttendTask<'_>, index: usize, ops: impl TileOps) {
        let (k, v) = task.kv.page(task.layer, task.pages[index], task.kv_head);
        ops.widen(k, &mut self.k);
        ops.widen(v, &mut self.v);
    }

    /// Copies the keys `part` of the tile that begins at `start`, one by one.
    #[inline(always)]
    fn gather(&mut self, task: &AttendTask<'_>, row: &Row<'_>, start: usize, part: Range<usize>) {
        let head_dim = task.head_dim;
        for j in part {
            let position = start + j;
            let slot = if position < row.prefix_len {
                position
            } else {
                row.tail[position - row.prefix_len] as usize
            };
            let page = task.pages[slot / PAGE_SIZE];
            let (k, v) = task.kv.page(task.layer, page, task.kv_head);
            let from = k[slot % PAGE_SIZE..].iter().step_by(PAGE_SIZE);
            for (to, from) in self.k[j..].iter_mut().step_by(PAGE_SIZE).zip(from) {
                *to = math::widen(*from);
            }
            let from = &v[slot % PAGE_SIZE * head_dim..][..head_dim];
            for (to, from) in self.v[j * head_dim..][..head_dim].iter_mut().zip(from) {
                *to = math::widen(*from);
            }
        }
    }

    /// Adds the tile to the running softmax of the queries of `rows`, two at a time where they see
    /// the same keys.
    #[inline(always)]
    fn add_to(
        &self,
        task: &AttendTask<'_>,
        rows: Range<usize>,
        start: usize,
        running: &mut [(f32, f32)],
        sums: &mut [f32],
        ops: impl TileOps,
    ) {
        let (head_dim, group) = (task.head_dim, task.group);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let part = |query: usize| task.rows[query / group].part_of(start);
        let q = |query: usize| &task.rows[query / group].q[query % group * head_dim..][..head_dim];
        let end = rows.end * group;
        let mut query = rows.start * group;
        while query < end {
            let keys = part(query);
            if keys.is_empty() {
                query += 1;
                continue;
            }
            let sums = &mut sums[query * head_dim..];
            let v = &self.v[keys.start * head_dim..keys.end * head_dim];
            if query + 1 < end && part(query + 1) == keys {
                let [mut a, mut b] = ops.scores([q(query), q(query + 1)], &self.k);
                let fade_a = weigh(&mut a, &keys, &mut running[query], scale, ops);
                let fade_b = weigh(&mut b, &keys, &mut running[query + 1], scale, ops);
                let (sums_a, sums_b) = sums[..2 * head_dim].split_at_mut(head_dim);
                let weights = [&a[keys.clone()], &b[keys]];
                ops.add_values(weights, [fade_a, fade_b], v, [sums_a, sums_b]);
                query += 2;
            } else {
                let [mut a] = ops.scores([q(query)], &self.k);
                let fade = weigh(&mut a, &keys, &mut running[query], scale, ops);
                ops.add_values([&a[keys]], [fade], v, [&mut sums[..head_dim]]);
                query += 1;
            }
        }
    }
}

/// What a level does by its own instructions.
pub(super) trait TileOps: Copy {
    /// Converts a run of f16; both have the same length.
    fn widen(self, from: &[u16], to: &mut [f32]);
    /// The largest, by folding the upper half onto the lower.
    fn largest(self, tile: &Tile) -> f32;
    /// The sum, by folding the upper half onto the lower.
    fn total(self, tile: &Tile) -> f32;
    /// `q . k` of the 32 keys of a tile, K as `[head_dim][PAGE_SIZE]`: one chain of fused
    /// multiply-adds over the head for each key.
    fn scores<const Q: usize>(self, q: [&[f32]; Q], k: &[f32]) -> [Tile; Q];
    /// `sums = sums * fade`, then for each key in order `sums = weight * v + sums`; V and the
    /// weights are those of the keys that are seen.
    fn add_values<const Q: usize>(
        self,
        weights: [&[f32]; Q],
        fades: [f32; Q],
        v: &[f32],
        sums: [&mut [f32]; Q],
    );
}

/// Makes weights of scores, 0 for keys that are not seen, and takes them into the running softmax.
/// Gives back the factor for everything before this tile.
#[inline(always)]
fn weigh(
    tile: &mut Tile,
    keys: &Range<usize>,
    (max, total): &mut (f32, f32),
    scale: f32,
    ops: impl TileOps,
) -> f32 {
    for score in tile.iter_mut() {
        *score *= scale;
    }
    if *keys != (0..PAGE_SIZE) {
        tile[..keys.start].fill(f32::NEG_INFINITY);
        tile[keys.end..].fill(f32::NEG_INFINITY);
    }
    let largest = ops.largest(tile);
    let new_max = if largest > *max { largest } else { *max };
    let fade = math::exp(*max - new_max);
    for weight in tile.iter_mut() {
        *weight = math::exp(*weight - new_max);
    }
    *max = new_max;
    *total = total.mul_add(fade, ops.total(tile));
    fade
}

/// Folds the upper half onto the lower until one number is left.
#[inline(always)]
pub(super) fn fold(mut tile: Tile, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = PAGE_SIZE / 2;
    while half > 0 {
        for i in 0..half {
            tile[i] = f(tile[i], tile[i + half]);
        }
        half /= 2;
    }
    tile[0]
}
