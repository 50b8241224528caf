//! Attention of some rows over paged K and V, written once for every level.
//!
//! Keys are walked by logical position, in tiles of [`PAGE_SIZE`] positions that start at multiples
//! of it. A tile that stands in one page is read as it is, once for all rows of a task (and widened
//! first if many queries read it); a tile with rows of a draft tree is gathered key by key, for
//! each row. What follows sees only the tile, so the bits of a row depend on logical positions
//! alone.

use std::array::from_fn;
use std::ops::Range;

use super::super::PAGE_SIZE;
use super::kv::CpuKv;
use super::math;
use super::threads::Part;

/// Rows that a task has at most.
pub(super) const ROWS_MAX: usize = 16;
/// Queries (rows times heads) of a task, unless one row has more: their sums stay in L1.
const QUERIES: usize = 32;

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

/// One tile of K, `[head_dim][PAGE_SIZE]`, and V, `[PAGE_SIZE][head_dim]`, as it is read.
#[derive(Clone, Copy)]
struct Keys<'a> {
    k: KvData<'a>,
    v: KvData<'a>,
}

/// Numbers of a tile.
#[derive(Clone, Copy)]
pub(super) enum KvData<'a> {
    /// f16, as they are stored.
    Half(&'a [u16]),
    /// Widened.
    Full(&'a [f32]),
}

impl<'a> KvData<'a> {
    fn range(self, range: Range<usize>) -> Self {
        match self {
            Self::Half(numbers) => Self::Half(&numbers[range]),
            Self::Full(numbers) => Self::Full(&numbers[range]),
        }
    }
}

/// A number of a tile.
pub(super) trait Key: Copy {
    /// Its value.
    fn number(self) -> f32;
}

impl Key for u16 {
    #[inline(always)]
    fn number(self) -> f32 {
        math::f16_to_f32(self)
    }
}

impl Key for f32 {
    #[inline(always)]
    fn number(self) -> f32 {
        self
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
pub(super) fn attend_task<O: TileOps>(
    task: &AttendTask<'_>,
    scratch: &mut AttendScratch,
    out: &mut Part<'_, f32>,
    (first, column): (usize, usize),
    ops: O,
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
            let keys = if queries > O::TOGETHER {
                tile.f16_to_f32(task.page(index), ops)
            } else {
                task.page(index)
            };
            add_tile(task, keys, 0..task.rows.len(), start, running, sums, ops);
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
            add_tile(task, keys, r..r + 1, start, running, sums, ops);
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
    fn page(&self, index: usize) -> Keys<'_> {
        let (k, v) = self.kv.page(self.layer, self.pages[index], self.kv_head);
        Keys { k: KvData::Half(k), v: KvData::Half(v) }
    }
}

impl KeyTile {
    #[inline(always)]
    fn f16_to_f32(&mut self, keys: Keys<'_>, ops: impl TileOps) -> Keys<'_> {
        for (from, to) in [(keys.k, &mut self.k), (keys.v, &mut self.v)] {
            match from {
                KvData::Half(from) => ops.f16_to_f32(from, to),
                KvData::Full(from) => to.copy_from_slice(from),
            }
        }
        Keys { k: KvData::Full(&self.k), v: KvData::Full(&self.v) }
    }

    /// Copies the keys `part` of the tile that begins at `start`, one by one.
    #[inline(always)]
    fn gather(
        &mut self,
        task: &AttendTask<'_>,
        row: &Row<'_>,
        start: usize,
        part: Range<usize>,
    ) -> Keys<'_> {
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
        Keys { k: KvData::Half(&self.gathered_k), v: KvData::Half(&self.gathered_v) }
    }
}

/// Adds a tile to the running softmax of the queries of `rows`, some at a time where they see the
/// same keys.
#[inline(always)]
fn add_tile<O: TileOps>(
    task: &AttendTask<'_>,
    tile: Keys<'_>,
    rows: Range<usize>,
    start: usize,
    running: &mut [(f32, f32)],
    sums: &mut [f32],
    ops: O,
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
        let run = (same_end * group - query).min(O::TOGETHER);
        if keys.is_empty() {
            query = same_end * group;
            continue;
        }
        let keys = keys.clone();
        let (running, sums) = (&mut running[query..], &mut sums[query * head_dim..]);
        macro_rules! together {
            ($queries:literal) => {
                add_together::<$queries>(task, tile, query, keys, running, sums, ops)
            };
        }
        query += match run {
            4.. if O::TOGETHER >= 4 => together!(4),
            3 if O::TOGETHER >= 3 => together!(3),
            2.. => together!(2),
            _ => together!(1),
        };
    }
}

/// The queries `first..first + Q`, which see the same keys; gives back Q.
#[inline(always)]
fn add_together<const Q: usize>(
    task: &AttendTask<'_>,
    tile: Keys<'_>,
    first: usize,
    keys: Range<usize>,
    running: &mut [(f32, f32)],
    sums: &mut [f32],
    ops: impl TileOps,
) -> usize {
    let (head_dim, group) = (task.head_dim, task.group);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let q: [&[f32]; Q] = from_fn(|i| {
        let query = first + i;
        &task.rows[query / group].q[query % group * head_dim..][..head_dim]
    });
    let mut tiles = ops.scores(q, tile.k);
    let fades = weigh(&mut tiles, &keys, running, scale, ops);
    let weights = tiles.each_ref().map(|tile| &tile[keys.clone()]);
    let mut sums = sums.chunks_exact_mut(head_dim);
    let sums = [(); Q].map(|()| sums.next().expect("a sum for each query"));
    ops.add_values(weights, fades, tile.v.range(keys.start * head_dim..keys.end * head_dim), sums);
    Q
}

/// Makes weights of scores, 0 for keys that are not seen, and takes them into the running softmax
/// of each query. Gives back the factors for everything before this tile.
#[inline(always)]
fn weigh<const Q: usize>(
    tiles: &mut [Tile; Q],
    keys: &Range<usize>,
    running: &mut [(f32, f32)],
    scale: f32,
    ops: impl TileOps,
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
        let largest = ops.largest(&tiles[i]);
        if largest > running[i].0 { largest } else { running[i].0 }
    });
    let fades = from_fn(|i| math::exp(running[i].0 - max[i]));
    for (tile, max) in tiles.iter_mut().zip(max) {
        for weight in tile.iter_mut() {
            *weight = math::exp(*weight - max);
        }
    }
    for i in 0..Q {
        running[i] = (max[i], running[i].1.mul_add(fades[i], ops.total(&tiles[i])));
    }
    fades
}

/// Operations that a level does by its own instructions.
pub(super) trait TileOps: Copy {
    /// Queries at a time: 2 to 4, as the registers allow.
    const TOGETHER: usize;

    /// Converts a run of f16; both have the same length.
    fn f16_to_f32(self, from: &[u16], to: &mut [f32]);
    /// The largest, by folding the upper half onto the lower.
    fn largest(self, tile: &Tile) -> f32;
    /// The sum, by folding the upper half onto the lower.
    fn total(self, tile: &Tile) -> f32;
    /// `q . k` of the 32 keys of a tile, K as `[head_dim][PAGE_SIZE]`: one chain of fused
    /// multiply-adds over the head for each key.
    fn scores<const Q: usize>(self, q: [&[f32]; Q], k: KvData<'_>) -> [Tile; Q];
    /// `sums = sums * fade`, then for each key in order `sums = weight * v + sums`; V and the
    /// weights are those of the keys that are seen.
    fn add_values<const Q: usize>(
        self,
        weights: [&[f32]; Q],
        fades: [f32; Q],
        v: KvData<'_>,
        sums: [&mut [f32]; Q],
    );
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
