//! Attention of some rows over paged K and V, written once for every level.
//!
//! Keys are walked by logical position, in tiles of [`PAGE_SIZE`] positions that start at multiples
//! of it. A tile that stands in one page is read as it is, once for all rows of a task (and widened
//! first if many queries read it); a tile with rows of a draft tree is gathered key by key, for
//! each row. What follows sees only the tile, so the bits of a row depend on logical positions
//! alone.
#![expect(clippy::needless_range_loop, reason = "constant indices keep tiles in registers")]

use std::array::from_fn;
use std::ops::Range;

use super::super::PAGE_SIZE;
use super::kv::CpuKv;
use super::math;
use super::simd::{self, Job, Simd};
use super::threads::Part;

/// Rows that a task has at most.
pub(super) const ROWS_MAX: usize = 16;
/// Queries (rows times heads) of a task, unless one row has more: their sums stay in L1.
const QUERIES: usize = 32;

/// A number for each key of a tile.
type Tile = [f32; PAGE_SIZE];

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

/// Number of rows that a task takes together.
pub(super) fn rows_together(group: usize) -> usize {
    (QUERIES / group).clamp(1, ROWS_MAX)
}

impl Row<'_> {
    /// Keys that it sees of the tile that begins at `start`.
    fn part_of(&self, start: usize) -> Range<usize> {
        let from = self.first.saturating_sub(start).min(PAGE_SIZE);
        let end = (self.position + 1).saturating_sub(start).min(PAGE_SIZE);
        from..end.max(from)
    }

    /// True if the keys `part` of the tile stand in one page, in order.
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

/// Room for one tile of K and V.
#[derive(Default)]
struct KeyTile {
    /// Widened K. `[head_dim][PAGE_SIZE]`
    k: Vec<f32>,
    /// Widened V. `[PAGE_SIZE][head_dim]`
    v: Vec<f32>,
    /// Gathered K. `[head_dim][PAGE_SIZE]`
    gathered_k: Vec<u16>,
    /// Gathered V. `[PAGE_SIZE][head_dim]`
    gathered_v: Vec<u16>,
}

/// One tile of K, `[head_dim][PAGE_SIZE]`, and V, `[PAGE_SIZE][head_dim]`, as it is read: in f16,
/// or widened.
#[derive(Clone, Copy)]
struct Keys<'a, N> {
    k: &'a [N],
    v: &'a [N],
}

/// A number of a tile.
trait Key: Copy {
    /// Its value.
    fn number(self) -> f32;

    /// The values of 16.
    fn floats<S: Simd>(s: S, numbers: &[Self; 16]) -> S::Floats;
}

impl Key for u16 {
    #[inline(always)]
    fn number(self) -> f32 {
        math::f16_to_f32(self)
    }

    #[inline(always)]
    fn floats<S: Simd>(s: S, numbers: &[u16; 16]) -> S::Floats {
        s.halves(bytemuck::cast_ref(numbers))
    }
}

impl Key for f32 {
    #[inline(always)]
    fn number(self) -> f32 {
        self
    }

    #[inline(always)]
    fn floats<S: Simd>(s: S, numbers: &[f32; 16]) -> S::Floats {
        s.floats(numbers)
    }
}

impl AttendScratch {
    /// Makes room for these sizes; allocates only if they grow.
    pub(super) fn fit(&mut self, head_dim: usize, group: usize) {
        let queries = rows_together(group) * group;
        self.tile.k.resize(head_dim * PAGE_SIZE, 0.0);
        self.tile.v.resize(head_dim * PAGE_SIZE, 0.0);
        self.tile.gathered_k.resize(head_dim * PAGE_SIZE, 0);
        self.tile.gathered_v.resize(head_dim * PAGE_SIZE, 0);
        self.running.resize(queries, (0.0, 0.0));
        self.sums.resize(queries * head_dim, 0.0);
    }
}

/// `out = softmax(q K^T / sqrt(head_dim)) V` for each query. Row `i` of the task goes to row
/// `first + i` of `out`, from column `column`.
#[inline(always)]
pub(super) fn attend_task<S: Simd>(
    s: S,
    task: &AttendTask<'_>,
    scratch: &mut AttendScratch,
    out: &mut Part<'_, f32>,
    (first, column): (usize, usize),
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
            let (keys, rows) = (task.page(index), 0..task.rows.len());
            if queries > S::QUERIES {
                add_tile(s, task, tile.f16_to_f32(s, keys), rows, start, running, sums);
            } else {
                add_tile(s, task, keys, rows, start, running, sums);
            }
            continue;
        }
        for (r, row) in task.rows.iter().enumerate() {
            let part = row.part_of(start);
            if part.is_empty() {
                continue;
            }
            let keys = if row.is_plain(start, &part) {
                task.page(index)
            } else {
                tile.gather(task, row, start, part)
            };
            add_tile(s, task, keys, r..r + 1, start, running, sums);
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

impl AttendTask<'_> {
    /// The tile that is page `index` of the sequence.
    #[inline(always)]
    fn page(&self, index: usize) -> Keys<'_, u16> {
        let (k, v) = self.kv.page(self.layer, self.pages[index], self.kv_head);
        Keys { k, v }
    }
}

impl KeyTile {
    #[inline(always)]
    fn f16_to_f32(&mut self, s: impl Simd, keys: Keys<'_, u16>) -> Keys<'_, f32> {
        simd::f16_to_f32(s, keys.k, &mut self.k);
        simd::f16_to_f32(s, keys.v, &mut self.v);
        Keys { k: &self.k, v: &self.v }
    }

    /// Copies the keys `part` of the tile that begins at `start`, one by one.
    #[inline(always)]
    fn gather(
        &mut self,
        task: &AttendTask<'_>,
        row: &Row<'_>,
        start: usize,
        part: Range<usize>,
    ) -> Keys<'_, u16> {
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
            for (to, from) in self.gathered_k[j..].iter_mut().step_by(PAGE_SIZE).zip(from) {
                *to = *from;
            }
            let from = &v[slot % PAGE_SIZE * head_dim..][..head_dim];
            self.gathered_v[j * head_dim..][..head_dim].copy_from_slice(from);
        }
        Keys { k: &self.gathered_k, v: &self.gathered_v }
    }
}

/// Adds a tile to the running softmax of the queries of `rows`, some at a time where they see the
/// same keys.
#[inline(always)]
fn add_tile<S: Simd, N: Key>(
    s: S,
    task: &AttendTask<'_>,
    tile: Keys<'_, N>,
    rows: Range<usize>,
    start: usize,
    running: &mut [(f32, f32)],
    sums: &mut [f32],
) {
    let (head_dim, group) = (task.head_dim, task.group);
    let end = rows.end * group;
    let mut query = rows.start * group;
    // Rows up to this one see the same keys.
    let (mut keys, mut same_end) = (0..0, rows.start);
    while query < end {
        if query == same_end * group {
            keys = task.rows[same_end].part_of(start);
            let same = |row: &Row<'_>| row.part_of(start) == keys;
            let next = task.rows[same_end..rows.end].iter().position(|row| !same(row));
            same_end = next.map_or(rows.end, |next| same_end + next);
        }
        let run = (same_end * group - query).min(S::QUERIES);
        if keys.is_empty() {
            query = same_end * group;
            continue;
        }
        let keys = keys.clone();
        let (running, sums) = (&mut running[query..], &mut sums[query * head_dim..]);
        macro_rules! together {
            ($queries:literal) => {
                add_together::<_, _, $queries>(s, task, tile, query, keys, running, sums)
            };
        }
        query += match run {
            4.. if S::QUERIES >= 4 => together!(4),
            3 if S::QUERIES >= 3 => together!(3),
            2.. => together!(2),
            _ => together!(1),
        };
    }
}

/// The queries `first..first + Q`, which see the same keys; gives back Q.
#[inline(always)]
fn add_together<S: Simd, N: Key, const Q: usize>(
    s: S,
    task: &AttendTask<'_>,
    tile: Keys<'_, N>,
    first: usize,
    keys: Range<usize>,
    running: &mut [(f32, f32)],
    sums: &mut [f32],
) -> usize {
    let (head_dim, group) = (task.head_dim, task.group);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let q: [&[f32]; Q] = from_fn(|i| {
        let query = first + i;
        &task.rows[query / group].q[query % group * head_dim..][..head_dim]
    });
    let mut tiles = scores(s, q, tile.k);
    let fades = weigh(s, &mut tiles, &keys, running, scale);
    let weights = tiles.each_ref().map(|tile| &tile[keys.clone()]);
    let mut sums = sums.chunks_exact_mut(head_dim);
    let sums = [(); Q].map(|()| sums.next().expect("a sum for each query"));
    let v = &tile.v[keys.start * head_dim..keys.end * head_dim];
    s.run(AddValues { weights, fades, v, sums });
    Q
}

/// Makes weights of scores, 0 for keys that are not seen, and takes them into the running softmax
/// of each query. Gives back the factors for everything before this tile.
#[inline(always)]
fn weigh<S: Simd, const Q: usize>(
    s: S,
    tiles: &mut [Tile; Q],
    keys: &Range<usize>,
    running: &mut [(f32, f32)],
    scale: f32,
) -> [f32; Q] {
    let running: &mut [(f32, f32); Q] = running.first_chunk_mut().expect("one for each query");
    for tile in tiles.iter_mut() {
        for score in tile.iter_mut() {
            *score *= scale;
        }
        if *keys != (0..PAGE_SIZE) {
            tile[..keys.start].fill(f32::NEG_INFINITY);
            tile[keys.end..].fill(f32::NEG_INFINITY);
        }
    }
    // All queries one step after another: their chains run side by side.
    let max: [f32; Q] = from_fn(|i| {
        let largest = s.largest(halves(s, &tiles[i]));
        if largest > running[i].0 { largest } else { running[i].0 }
    });
    let fades = from_fn(|i| math::exp(running[i].0 - max[i]));
    for (tile, max) in tiles.iter_mut().zip(max) {
        for weight in tile.iter_mut() {
            *weight = math::exp(*weight - max);
        }
    }
    for i in 0..Q {
        running[i] = (max[i], running[i].1.mul_add(fades[i], s.total(halves(s, &tiles[i]))));
    }
    fades
}

/// The keys of a tile, or the numbers for them.
#[inline(always)]
fn halves<S: Simd, N: Key>(s: S, tile: &[N; PAGE_SIZE]) -> [S::Floats; 2] {
    let (halves, _) = tile.as_chunks::<16>();
    [N::floats(s, &halves[0]), N::floats(s, &halves[1])]
}

/// `q . k` of the keys of a tile, K as `[head_dim][PAGE_SIZE]`: one chain of fused multiply-adds
/// over the head for each key.
#[inline(always)]
fn scores<S: Simd, N: Key, const Q: usize>(s: S, q: [&[f32]; Q], k: &[N]) -> [Tile; Q] {
    let head_dim = k.len() / PAGE_SIZE;
    let q = q.map(|q| &q[..head_dim]);
    let mut sums = [[s.splat(0.0); 2]; Q];
    for (d, keys) in k.as_chunks::<PAGE_SIZE>().0.iter().enumerate() {
        let keys = halves(s, keys);
        for r in 0..Q {
            let q = s.splat(q[r][d]);
            for i in 0..2 {
                sums[r][i] = s.fma(q, keys[i], sums[r][i]);
            }
        }
    }
    let mut tiles = [[0.0; PAGE_SIZE]; Q];
    for r in 0..Q {
        tiles[r] = bytemuck::cast([s.array(sums[r][0]), s.array(sums[r][1])]);
    }
    tiles
}

/// `sums = sums * fade`, then for each key in order `sums = weight * v + sums`; V and the weights
/// are those of the keys that are seen.
struct AddValues<'a, N, const Q: usize> {
    weights: [&'a [f32]; Q],
    fades: [f32; Q],
    v: &'a [N],
    sums: [&'a mut [f32]; Q],
}

impl<N: Key, const Q: usize> Job for AddValues<'_, N, Q> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let head_dim = self.sums[0].len();
        let mut at = 0;
        while S::RUNS >= 4 && at + 64 <= head_dim {
            self.add_runs::<S, 4>(s, at);
            at += 64;
        }
        while at + 32 <= head_dim {
            self.add_runs::<S, 2>(s, at);
            at += 32;
        }
        while at + 16 <= head_dim {
            self.add_runs::<S, 1>(s, at);
            at += 16;
        }
        let Self { weights, fades, v, sums } = self;
        for d in at..head_dim {
            for r in 0..Q {
                let column = v[d..].iter().step_by(head_dim).zip(weights[r]);
                let chain = |sum: f32, (v, weight): (&N, &f32)| weight.mul_add(v.number(), sum);
                sums[r][d] = column.fold(sums[r][d] * fades[r], chain);
            }
        }
    }
}

impl<N: Key, const Q: usize> AddValues<'_, N, Q> {
    /// Dimensions `at..at + 16 * RUNS`.
    #[inline(always)]
    fn add_runs<S: Simd, const RUNS: usize>(&mut self, s: S, at: usize) {
        let mut run = [[s.splat(0.0); RUNS]; Q];
        for r in 0..Q {
            let (sums, fade) = (self.sums[r][at..].as_chunks::<16>().0, s.splat(self.fades[r]));
            for i in 0..RUNS {
                run[r][i] = s.mul(s.floats(&sums[i]), fade);
            }
        }
        let keys = self.weights[0].len();
        let weights = self.weights.map(|weights| &weights[..keys]);
        for (j, v) in self.v.chunks_exact(self.sums[0].len()).enumerate().take(keys) {
            let (v, _) = v[at..at + 16 * RUNS].as_chunks::<16>();
            let mut values = [s.splat(0.0); RUNS];
            for i in 0..RUNS {
                values[i] = N::floats(s, &v[i]);
            }
            for r in 0..Q {
                let weight = s.splat(weights[r][j]);
                for i in 0..RUNS {
                    run[r][i] = s.fma(weight, values[i], run[r][i]);
                }
            }
        }
        for r in 0..Q {
            let (sums, _) = self.sums[r][at..].as_chunks_mut::<16>();
            for i in 0..RUNS {
                sums[i] = s.array(run[r][i]);
            }
        }
    }
}
