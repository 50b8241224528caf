//! From the rows of a plan to the tasks of attention.

use std::ops::Range;

use super::super::{AttendBatch, AttendShape};
use super::attend::{AttendTask, ROWS_MAX, Row, rows_together};
use super::kv::CpuKv;

/// The row of the batch -> the index of its sequence.
pub(super) fn sequence_of(plan: &AttendBatch<'_>, row: usize) -> usize {
    plan.q_indptr.partition_point(|first| *first as usize <= row) - 1
}

/// Operands of `attend`.
pub(super) struct Batch<'a> {
    pub(super) plan: &'a AttendBatch<'a>,
    pub(super) shape: &'a AttendShape,
    pub(super) layer: usize,
    pub(super) q: &'a [f32],
    pub(super) kv: &'a CpuKv,
}

impl Batch<'_> {
    /// End of a run of parts that can be one task: rows of one sequence, the same key/value head.
    /// `of` tells row and first head of a part.
    pub(super) fn together(
        &self,
        parts: Range<usize>,
        group: usize,
        of: impl Fn(usize) -> (usize, usize),
    ) -> usize {
        let key = |part| (sequence_of(self.plan, of(part).0), of(part).1);
        let first = key(parts.start);
        let end = parts.end.min(parts.start + rows_together(group));
        (parts.start + 1..end).find(|part| key(*part) != first).unwrap_or(end)
    }

    /// Runs `run` on the task of the rows of `parts` at one key/value head.
    pub(super) fn task(
        &self,
        parts: Range<usize>,
        kv_head: usize,
        row_of: impl Fn(usize) -> usize,
        run: impl FnOnce(&AttendTask<'_>),
    ) {
        let Self { plan, shape, layer, q, kv } = *self;
        let AttendShape { heads, kv_heads, head_dim, window } = *shape;
        let group = heads / kv_heads;
        let mut rows = [Row::default(); ROWS_MAX];
        for (to, part) in rows.iter_mut().zip(parts.clone()) {
            let row = row_of(part);
            let position = plan.positions[row] as usize;
            let tail = plan.tail_indptr[row] as usize..plan.tail_indptr[row + 1] as usize;
            let window = window.map_or(usize::MAX, |window| window as usize);
            *to = Row {
                q: &q[(row * heads + kv_head * group) * head_dim..][..group * head_dim],
                position,
                first: (position + 1).saturating_sub(window),
                prefix_len: plan.prefix_len[row] as usize,
                tail: &plan.tail_slots[tail],
            };
        }
        let sequence = sequence_of(plan, row_of(parts.start));
        let pages = plan.page_indptr[sequence] as usize..plan.page_indptr[sequence + 1] as usize;
        run(&AttendTask {
            kv,
            layer,
            kv_head,
            head_dim,
            group,
            pages: &plan.page_indices[pages],
            rows: &rows[..parts.len()],
        });
    }
}
