//! Plan of a batch's attention, row by row: checked on the host, copied to the GPU once a step.
//!
//! A *place* counts rows of K and V over all pages: page times `PAGE_SIZE` plus row. Kernels trust
//! what was checked here.

use std::ops::Range;

pub use hat_plan::{AttendBatch, AttendShape, PAGE_SIZE};

use crate::abi;
use crate::gpu::{Gpu, GpuError, Memory, Slice, count};

const _: () = assert!(PAGE_SIZE == abi::HAT_PAGE_SIZE as usize, "as in the kernels");
/// Rows of an mma, and most query heads of one key/value head.
pub const GROUP_MAX: usize = 16;
/// Sizes of heads that attention has kernels for.
pub const HEAD_DIMS: [usize; 4] = [32, 64, 96, 128];
/// Warps of an attention kernel, each with its own rows.
const WARPS: usize = 4;

/// True if there are kernels for this shape: one of [`HEAD_DIMS`], at most [`GROUP_MAX`] query
/// heads for each key/value head.
#[must_use]
pub fn is_supported(shape: &AttendShape) -> bool {
    shape.kv_heads > 0
        && shape.heads.is_multiple_of(shape.kv_heads)
        && (1..=GROUP_MAX).contains(&shape.group())
        && HEAD_DIMS.contains(&shape.head_dim)
        && shape.window.is_none_or(|window| window > 0)
}

/// Rows that one task takes at most.
fn task_rows(shape: &AttendShape) -> usize {
    WARPS * (GROUP_MAX / shape.group())
}

/// A plan on the GPU.
pub struct PlanOnGpu<M> {
    /// u32: positions, prefix_len, tail_indptr, tail_slots, page_indices, places.
    numbers: M,
    tasks: M,
    staging: Vec<u32>,
    parts: [Range<usize>; 6],
    rows: usize,
    task_count: usize,
    splits: usize,
}

const POSITIONS: usize = 0;
const PREFIX_LEN: usize = 1;
const TAIL_INDPTR: usize = 2;
const TAIL_SLOTS: usize = 3;
const PAGE_INDICES: usize = 4;
const PLACES: usize = 5;

/// Room for so many tail slots or pages. Plans of one bucket have all parts at the same addresses,
/// so that the launches of one decode step are those of the next.
fn bucket(len: usize) -> usize {
    len.next_power_of_two()
}

fn numbers_bytes(rows: usize, tails: usize, pages: usize) -> usize {
    4 * (4 * rows + 1 + bucket(tails) + bucket(pages))
}

/// Words of a task.
const TASK_WORDS: usize = size_of::<abi::hat_attend_task>() / 4;

impl<M: Memory> PlanOnGpu<M> {
    /// Room for plans of at most `rows` rows, `tails` tail slots and `pages` pages.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(
        gpu: &mut impl Gpu<Memory = M>,
        rows: usize,
        tails: usize,
        pages: usize,
    ) -> Result<Self, GpuError> {
        let numbers = gpu.alloc(numbers_bytes(rows, tails, pages), "a step's plan")?;
        let tasks = gpu.alloc(4 * TASK_WORDS * rows, "a step's plan")?;
        let (parts, staging) = (std::array::from_fn(|_| 0..0), Vec::new());
        Ok(Self { numbers, tasks, staging, parts, rows: 0, task_count: 0, splits: 0 })
    }

    /// True if there is room for a plan of this size.
    #[must_use]
    pub fn has_room(&self, rows: usize, tails: usize, pages: usize) -> bool {
        let numbers = numbers_bytes(rows, tails, pages);
        numbers <= self.numbers.bytes() && 4 * TASK_WORDS * rows <= self.tasks.bytes()
    }

    /// Takes a plan over a store of `pages` pages.
    ///
    /// # Errors
    /// If the GPU fails.
    ///
    /// # Panics
    /// If the plan contradicts itself, names a page that is none, or is larger than there is
    /// room for.
    pub fn write(
        &mut self,
        gpu: &mut impl Gpu<Memory = M>,
        plan: &AttendBatch<'_>,
        heads: &AttendShape,
        pages: usize,
    ) -> Result<(), GpuError> {
        check(plan, heads, pages);
        let rows = plan.positions.len();
        self.rows = rows;
        self.splits = 0;
        self.staging.clear();
        for (part, numbers) in [
            (POSITIONS, plan.positions),
            (PREFIX_LEN, plan.prefix_len),
            (TAIL_INDPTR, plan.tail_indptr),
            (TAIL_SLOTS, plan.tail_slots),
            (PAGE_INDICES, plan.page_indices),
        ] {
            let begin = self.staging.len();
            self.staging.extend_from_slice(numbers);
            self.parts[part] = begin..self.staging.len();
            if matches!(part, TAIL_SLOTS | PAGE_INDICES) {
                self.staging.resize(begin + bucket(numbers.len()), 0);
            }
        }
        let begin = self.staging.len();
        for (rows, pages) in sequences(plan) {
            let place = |slot: &u32| {
                let slot = *slot as usize;
                let page = plan.page_indices[pages.start + slot / PAGE_SIZE];
                page * PAGE_SIZE as u32 + (slot % PAGE_SIZE) as u32
            };
            self.staging.extend(plan.slots[rows].iter().map(place));
        }
        self.parts[PLACES] = begin..self.staging.len();
        gpu.upload(&self.staging, &mut self.numbers, 0)?;
        self.staging.clear();
        for (rows, pages) in sequences(plan) {
            let step = task_rows(heads);
            for first in rows.clone().step_by(step) {
                let task = task(plan, heads, first..rows.end.min(first + step), pages.start);
                let keys = (task.end as usize).div_ceil(PAGE_SIZE);
                self.splits = self.splits.max(keys.div_ceil(abi::HAT_SPLIT_TILES as usize));
                self.staging.extend(words(&task));
            }
        }
        self.task_count = self.staging.len() / TASK_WORDS;
        gpu.upload(&self.staging, &mut self.tasks, 0)
    }

    /// Rows of the plan.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Tasks of the attention kernels.
    pub(crate) fn task_count(&self) -> usize {
        self.task_count
    }

    /// Splits of the longest sequence.
    pub(crate) fn splits(&self) -> usize {
        self.splits
    }

    pub(crate) fn tasks(&self) -> *const abi::hat_attend_task {
        self.tasks.slice::<u32>().pointer().cast()
    }

    fn part(&self, part: usize) -> Slice<'_, u32> {
        self.numbers.slice().range(self.parts[part].clone())
    }

    pub(crate) fn positions(&self) -> *const u32 {
        self.part(POSITIONS).pointer()
    }

    pub(crate) fn prefix_len(&self) -> *const u32 {
        self.part(PREFIX_LEN).pointer()
    }

    pub(crate) fn tail_indptr(&self) -> *const u32 {
        self.part(TAIL_INDPTR).pointer()
    }

    pub(crate) fn tail_slots(&self) -> *const u32 {
        self.part(TAIL_SLOTS).pointer()
    }

    pub(crate) fn page_indices(&self) -> *const u32 {
        self.part(PAGE_INDICES).pointer()
    }

    pub(crate) fn places(&self) -> *const u32 {
        self.part(PLACES).pointer()
    }
}

/// Rows and pages of each sequence.
fn sequences(plan: &AttendBatch<'_>) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let range = |pair: &[u32]| pair[0] as usize..pair[1] as usize;
    plan.q_indptr
        .windows(2)
        .zip(plan.page_indptr.windows(2))
        .map(move |(q, p)| (range(q), range(p)))
}

fn task(
    plan: &AttendBatch<'_>,
    heads: &AttendShape,
    rows: Range<usize>,
    first_page: usize,
) -> abi::hat_attend_task {
    let positions = &plan.positions[rows.clone()];
    let end = positions.iter().max().map_or(0, |last| last + 1);
    let first = |position: &u32| (position + 1).saturating_sub(heads.window.unwrap_or(u32::MAX));
    let first_tile = positions.iter().map(first).min().unwrap_or(0) / PAGE_SIZE as u32;
    // A row without a tail sees every tile at the slots of its positions.
    let with_tail = rows.clone().filter(|row| plan.prefix_len[*row] <= plan.positions[*row]);
    let plain_end = with_tail.map(|row| plan.prefix_len[row] / PAGE_SIZE as u32).min();
    abi::hat_attend_task {
        first_row: count(rows.start),
        rows: count(rows.len()),
        first_page: count(first_page),
        first_tile,
        plain_end: plain_end.unwrap_or(end.div_ceil(PAGE_SIZE as u32)),
        end,
        reserved: [0; 2],
    }
}

fn words(task: &abi::hat_attend_task) -> [u32; TASK_WORDS] {
    let abi::hat_attend_task { first_row, rows, first_page, first_tile, plain_end, end, .. } =
        *task;
    [first_row, rows, first_page, first_tile, plain_end, end, 0, 0]
}

/// True if ends are in order and the last one is at most `len`: anything behind it belongs to
/// sequences that are not in this plan.
fn is_indptr(indptr: &[u32], len: usize) -> bool {
    indptr.first() == Some(&0)
        && indptr.last().is_some_and(|last| *last as usize <= len)
        && indptr.is_sorted()
}

fn check(plan: &AttendBatch<'_>, heads: &AttendShape, pages: usize) {
    assert!(is_supported(heads), "no kernel for {heads:?}");
    let rows = plan.positions.len();
    assert_eq!((plan.slots.len(), plan.prefix_len.len()), (rows, rows), "arrays of {rows} rows");
    assert_eq!(plan.tail_indptr.len(), rows + 1, "tails of {rows} rows");
    assert!(is_indptr(plan.tail_indptr, plan.tail_slots.len()), "ends of tails");
    assert_eq!(plan.q_indptr.len(), plan.page_indptr.len(), "sequences");
    assert!(is_indptr(plan.q_indptr, rows), "ends of sequences");
    assert_eq!(plan.q_indptr.last().map(|last| *last as usize), Some(rows), "rows of sequences");
    assert!(is_indptr(plan.page_indptr, plan.page_indices.len()), "ends of pages");
    let known = plan.page_indices.iter().all(|page| (*page as usize) < pages);
    assert!(known, "a page of {pages}: {:?}", plan.page_indices);
    for (rows, pages) in sequences(plan) {
        let slots = pages.len() * PAGE_SIZE;
        for row in rows {
            let tail = plan.tail_indptr[row] as usize..plan.tail_indptr[row + 1] as usize;
            let (prefix, keys) = (plan.prefix_len[row] as usize, plan.positions[row] as usize + 1);
            assert_eq!(prefix + tail.len(), keys, "keys of row {row}");
            let known = |slot: &u32| (*slot as usize) < slots;
            let mut named = plan.tail_slots[tail].iter().chain(&plan.slots[row..=row]);
            assert!(prefix <= slots && named.all(known), "a slot of row {row} of {slots}");
        }
    }
}
