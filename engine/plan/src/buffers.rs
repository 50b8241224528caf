//! A plan in the making.

use std::ops::Range;

use crate::{AttendBatch, PENDING_ROWS_MAX};

/// The arrays of an [`AttendBatch`], reused from step to step.
#[derive(Debug, Default)]
pub struct BatchBuffers {
    positions: Vec<u32>,
    slots: Vec<u32>,
    prefix_len: Vec<u32>,
    tail_indptr: Vec<u32>,
    tail_slots: Vec<u32>,
    q_indptr: Vec<u32>,
    page_indptr: Vec<u32>,
    page_indices: Vec<u32>,
}

impl BatchBuffers {
    /// Room for this many rows, sequences and pages, so that a step allocates nothing.
    #[must_use]
    pub fn with_capacity(rows: usize, sequences: usize, pages: usize) -> Self {
        Self {
            positions: Vec::with_capacity(rows),
            slots: Vec::with_capacity(rows),
            prefix_len: Vec::with_capacity(rows),
            tail_indptr: Vec::with_capacity(rows + 1),
            tail_slots: Vec::with_capacity(rows * 2 + PENDING_ROWS_MAX),
            q_indptr: Vec::with_capacity(sequences + 1),
            page_indptr: Vec::with_capacity(sequences + 1),
            page_indices: Vec::with_capacity(pages),
        }
    }

    /// Empties the plan.
    pub fn clear(&mut self) {
        self.positions.clear();
        self.slots.clear();
        self.prefix_len.clear();
        self.tail_slots.clear();
        self.page_indices.clear();
        for indptr in [&mut self.tail_indptr, &mut self.q_indptr, &mut self.page_indptr] {
            indptr.clear();
            indptr.push(0);
        }
    }

    /// Rows so far.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Rows of sequence `index`.
    #[must_use]
    pub fn rows_of(&self, index: usize) -> Range<usize> {
        self.q_indptr[index] as usize..self.q_indptr[index + 1] as usize
    }

    /// Adds a row whose K and V go to `slot`. It sees the slots `0..prefix_len` and those of
    /// `tail`, its own among them.
    pub fn push_row(&mut self, position: u32, slot: u32, prefix_len: u32, tail: &[u32]) {
        self.positions.push(position);
        self.slots.push(slot);
        self.prefix_len.push(prefix_len);
        self.tail_slots.extend_from_slice(tail);
        self.tail_indptr.push(count(&self.tail_slots));
    }

    /// Adds `count` committed rows from position `first` on: each stands at the slot of its own
    /// position, and sees all positions up to that.
    pub fn push_committed(&mut self, first: u32, count: u32) {
        for position in first..first + count {
            self.push_row(position, position, position + 1, &[]);
        }
    }

    /// Ends the rows of one sequence, which has these pages.
    pub fn end_sequence(&mut self, pages: &[u32]) {
        self.page_indices.extend_from_slice(pages);
        self.q_indptr.push(count(&self.positions));
        self.page_indptr.push(count(&self.page_indices));
    }

    /// The plan of everything so far.
    #[must_use]
    pub fn batch(&self) -> AttendBatch<'_> {
        self.plan_front(self.q_indptr.len() - 1)
    }

    /// The plan of the first `sequences` sequences.
    #[must_use]
    pub fn plan_front(&self, sequences: usize) -> AttendBatch<'_> {
        let rows = self.q_indptr[sequences] as usize;
        AttendBatch {
            positions: &self.positions[..rows],
            slots: &self.slots[..rows],
            prefix_len: &self.prefix_len[..rows],
            tail_indptr: &self.tail_indptr[..=rows],
            tail_slots: &self.tail_slots,
            q_indptr: &self.q_indptr[..=sequences],
            page_indptr: &self.page_indptr[..=sequences],
            page_indices: &self.page_indices,
        }
    }
}

fn count(entries: &[u32]) -> u32 {
    u32::try_from(entries.len()).expect("a step holds far fewer than 2^32 rows")
}
