//! A session's rows on one side: a committed path, and a tree of pending rows at its end.
//!
//! Both roles keep one of these for each session; it says where a row's K and V live and which
//! rows it sees. Integers only. The rules are those of `docs/PROTOCOL.md`, section "Sessions":
//!
//! - Row ids are unique in a session and increase. A row's position is its parent's plus one.
//! - A commit names one row; the path from the root to it is kept, everything that does not
//!   descend from it is pruned. Committed rows stand at the slot of their own position.
//! - Decided rows (of a prompt, of plain decoding, at the root of a draft tree) never pend. They
//!   follow the committed tip, so whatever pended is stale.

use std::borrow::Borrow;

pub use hat_plan::{BatchBuffers, PENDING_ROWS_MAX};
use hat_plan::{PAGE_SIZE, RowMove};

/// An error in rows or a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SequenceError {
    /// Ids do not increase, or run past the last one.
    #[error("row id {id} does not follow row id {last}")]
    BadId {
        /// The id that came.
        id: u32,
        /// The highest id so far.
        last: u32,
    },
    /// A parent is neither the committed tip nor a pending row.
    #[error("row {id} has parent {parent}, which is neither the committed tip {tip} nor pending")]
    BadParent {
        /// The row.
        id: u32,
        /// The parent it names.
        parent: u32,
        /// Id of the last committed row.
        tip: u32,
    },
    /// A commit names a row that is neither the tip nor pending.
    #[error("commit of row {row}, which is neither the committed tip {tip} nor pending")]
    BadCommit {
        /// The row it names.
        row: u32,
        /// Id of the last committed row.
        tip: u32,
    },
    /// Too many rows pend.
    #[error("{pending} rows would pend, at most {PENDING_ROWS_MAX} may")]
    TooManyPending {
        /// Number of pending rows that there would be.
        pending: usize,
    },
    /// The session's reserved positions are used up.
    #[error("{rows} rows do not fit the {reserved} that the session reserved")]
    Full {
        /// Rows there would be.
        rows: usize,
        /// Rows reserved at open.
        reserved: usize,
    },
}

/// A row that is not decided yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pending {
    id: u32,
    parent: u32,
    position: u32,
    slot: u32,
}

/// A session's rows on one side.
#[derive(Debug)]
pub struct Sequence {
    pages: Vec<u32>,
    rows_max: u32,
    committed: u32,
    tip: u32,
    last_id: u32,
    pending: Vec<Pending>,
}

impl Sequence {
    /// An empty sequence on reserved pages, for at most `rows_max` committed rows. The pages
    /// beyond them are room for pending rows.
    #[must_use]
    pub fn new(pages: Vec<u32>, rows_max: u32) -> Self {
        debug_assert!(pages.len() * PAGE_SIZE >= rows_max as usize);
        Self {
            pages,
            rows_max,
            committed: 0,
            tip: 0,
            last_id: 0,
            // Most sessions of a cloud wait, and their pages are memory enough.
            pending: Vec::new(),
        }
    }

    /// As [`Sequence::new`], with `pages_cached` full pages of committed rows in front, which may
    /// be shared with others and are never written: their rows have the ids `1..=committed`.
    ///
    /// # Panics
    /// If they are more than `rows_max`.
    #[must_use]
    pub fn on_cached(pages: Vec<u32>, rows_max: u32, pages_cached: usize) -> Self {
        let cached = u32::try_from(pages_cached * PAGE_SIZE).expect("fewer rows than 2^32");
        assert!(cached <= rows_max, "{cached} rows are there, at most {rows_max} may be");
        Self { committed: cached, tip: cached, last_id: cached, ..Self::new(pages, rows_max) }
    }

    /// Forgets all rows. The pages stay.
    pub fn begin_anew(&mut self) {
        (self.committed, self.tip, self.last_id) = (0, 0, 0);
        self.pending.clear();
    }

    /// Committed rows.
    #[must_use]
    pub fn committed(&self) -> u32 {
        self.committed
    }

    /// Pages that committed rows fill.
    #[must_use]
    pub fn full_pages(&self) -> usize {
        self.committed as usize / PAGE_SIZE
    }

    /// Most committed rows.
    #[must_use]
    pub fn rows_max(&self) -> u32 {
        self.rows_max
    }

    /// Id of the last committed row; 0 before the first.
    #[must_use]
    pub fn tip(&self) -> u32 {
        self.tip
    }

    /// The highest row id so far.
    #[must_use]
    pub fn last_id(&self) -> u32 {
        self.last_id
    }

    /// Rows that pend.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The pages, in logical order.
    #[must_use]
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// The pages, for giving them back.
    #[must_use]
    pub fn into_pages(self) -> Vec<u32> {
        self.pages
    }

    /// Takes `count` decided rows with ids `first_id..`: each the child of the one before, the
    /// first a child of the committed tip. Rows that pended there are stale: what follows the tip
    /// is decided. Returns the position of the first, which is its slot.
    ///
    /// # Errors
    /// [`SequenceError`]; the sequence is unchanged then.
    pub fn append_committed(
        &mut self,
        first_id: u32,
        count: u32,
        parent: u32,
    ) -> Result<u32, SequenceError> {
        let last_new = self.check_ids(first_id, count)?;
        if parent != self.tip {
            return Err(SequenceError::BadParent { id: first_id, parent, tip: self.tip });
        }
        let rows = self.committed as usize + count as usize;
        if rows > self.rows_max as usize {
            return Err(SequenceError::Full { rows, reserved: self.rows_max as usize });
        }
        let first = self.committed;
        self.pending.clear();
        self.committed += count;
        self.tip = last_new;
        self.last_id = last_new;
        Ok(first)
    }

    /// Takes rows that pend, with ids `first_id..`, one for each of `parents`.
    ///
    /// # Errors
    /// [`SequenceError`]; the sequence is unchanged then.
    pub fn append_pending<P>(&mut self, first_id: u32, parents: P) -> Result<(), SequenceError>
    where
        P: IntoIterator<Item: Borrow<u32>, IntoIter: Clone>,
    {
        let parents = parents.into_iter();
        let count = parents.clone().count();
        let rows = u32::try_from(count).expect("a frame holds at most 2^16 rows");
        let last_new = self.check_ids(first_id, rows)?;
        let pending = self.pending.len() + count;
        if pending > PENDING_ROWS_MAX {
            return Err(SequenceError::TooManyPending { pending });
        }
        let slots_end = self.next_slot() as usize + count;
        if slots_end > self.pages.len() * PAGE_SIZE {
            let reserved = self.pages.len() * PAGE_SIZE;
            return Err(SequenceError::Full { rows: slots_end, reserved });
        }
        let before = self.pending.len();
        for (id, parent) in (first_id..).zip(parents) {
            let parent: u32 = *parent.borrow();
            let Some(parent_position) = self.position_of(parent) else {
                self.pending.truncate(before);
                return Err(SequenceError::BadParent { id, parent, tip: self.tip });
            };
            let slot = self.next_slot();
            let position = parent_position + 1;
            if position >= i64::from(self.rows_max) {
                self.pending.truncate(before);
                let reserved = self.rows_max as usize;
                return Err(SequenceError::Full { rows: reserved + 1, reserved });
            }
            let position = u32::try_from(position).expect("below rows_max");
            self.pending.push(Pending { id, parent, position, slot });
        }
        self.last_id = last_new;
        Ok(())
    }

    /// Takes back the pending rows from `first_id` on, as if they had never come. The other side
    /// must not have heard of them.
    pub fn retract(&mut self, first_id: u32) {
        let kept = self.pending.partition_point(|row| row.id < first_id);
        if kept < self.pending.len() {
            self.pending.truncate(kept);
            self.last_id = first_id - 1;
        }
    }

    /// Keeps the path to `row`, prunes what does not descend from it, and appends to `moves`
    /// what has to move in the KV store.
    ///
    /// # Errors
    /// [`SequenceError::BadCommit`] if `row` is neither the tip nor pending.
    pub fn commit(&mut self, row: u32, moves: &mut Vec<RowMove>) -> Result<(), SequenceError> {
        if self.position_of(row).is_none() {
            return Err(SequenceError::BadCommit { row, tip: self.tip });
        }
        let mut keep = [RowState::Pruned; PENDING_ROWS_MAX];
        let mut cursor = row;
        while let Some(index) = self.index_of(cursor) {
            keep[index] = RowState::Committed;
            cursor = self.pending[index].parent;
        }
        for index in 0..self.pending.len() {
            let parent = self.pending[index].parent;
            let below = parent == row
                || self.index_of(parent).is_some_and(|above| keep[above] == RowState::Survives);
            if below && keep[index] == RowState::Pruned {
                keep[index] = RowState::Survives;
            }
        }
        self.apply(&keep, moves);
        self.tip = row;
        Ok(())
    }

    /// Slots were given out in order of arrival, so each target is at or before its source, and
    /// moving in order of arrival never overwrites a row that still has to move.
    fn apply(&mut self, keep: &[RowState; PENDING_ROWS_MAX], moves: &mut Vec<RowMove>) {
        let count = self.pending.len();
        for index in (0..count).filter(|index| keep[*index] == RowState::Committed) {
            let row = self.pending[index];
            self.move_row(row.slot, self.committed, moves);
            debug_assert_eq!(row.position, self.committed);
            self.committed += 1;
        }
        let mut survive = 0;
        for index in (0..count).filter(|index| keep[*index] == RowState::Survives) {
            let row = self.pending[index];
            let slot = self.committed + u32::try_from(survive).expect("at most 64 rows pend");
            self.move_row(row.slot, slot, moves);
            self.pending[survive] = Pending { slot, ..row };
            survive += 1;
        }
        self.pending.truncate(survive);
    }

    /// Position and slot of row `id`, if it is pending.
    #[must_use]
    pub fn place(&self, id: u32) -> Option<(u32, u32)> {
        let row = self.pending[self.index_of(id)?];
        Some((row.position, row.slot))
    }

    /// Adds row `id` to a plan, if it pends; returns true if it does.
    pub fn push_row(&self, id: u32, plan: &mut BatchBuffers) -> bool {
        let Some((position, slot)) = self.place(id) else { return false };
        // Slots that it sees beyond the committed rows, in logical order, its own last.
        let mut tail = [0; PENDING_ROWS_MAX];
        let mut begin = tail.len();
        let mut cursor = id;
        while let Some(index) = self.index_of(cursor) {
            begin -= 1;
            tail[begin] = self.pending[index].slot;
            cursor = self.pending[index].parent;
        }
        // The first of them may stand at the slots of their own positions.
        let places = (self.committed..).zip(&tail[begin..]);
        let in_place = places.take_while(|(position, slot)| position == *slot).count();
        let prefix_len = self.committed + u32::try_from(in_place).expect("at most 64 rows pend");
        plan.push_row(position, slot, prefix_len, &tail[begin + in_place..]);
        true
    }

    fn check_ids(&self, first_id: u32, count: u32) -> Result<u32, SequenceError> {
        let bad = SequenceError::BadId { id: first_id, last: self.last_id };
        if first_id <= self.last_id || count == 0 {
            return Err(bad);
        }
        first_id.checked_add(count - 1).ok_or(bad)
    }

    /// Position of the tip or of a pending row; -1 for the root of an empty session.
    fn position_of(&self, id: u32) -> Option<i64> {
        if id == self.tip {
            return Some(i64::from(self.committed) - 1);
        }
        self.index_of(id).map(|index| i64::from(self.pending[index].position))
    }

    fn index_of(&self, id: u32) -> Option<usize> {
        self.pending.binary_search_by_key(&id, |row| row.id).ok()
    }

    fn next_slot(&self) -> u32 {
        self.pending.last().map_or(self.committed, |row| row.slot + 1)
    }

    fn move_row(&self, from: u32, to: u32, moves: &mut Vec<RowMove>) {
        if from != to {
            moves.push(RowMove { from: self.page_row(from), to: self.page_row(to) });
        }
    }

    fn page_row(&self, slot: u32) -> (u32, u32) {
        let slot = slot as usize;
        (self.pages[slot / PAGE_SIZE], u32::try_from(slot % PAGE_SIZE).expect("below PAGE_SIZE"))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum RowState {
    Committed,
    Survives,
    Pruned,
}

#[cfg(test)]
mod tests;
