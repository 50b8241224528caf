//! Rows that wait and can no longer matter: a device that streams has sent them before it heard
//! how its walk went, and now says that it went another way.
//!
//! Decided rows follow the committed path, so whatever pends beside that path is void once they
//! are applied. Chunks of pending rows that still wait then are not computed at all. A chunk is
//! kept whole if anything that stays names a row of it: a commit, or a row that hangs below.

use std::collections::HashSet;

use hat_transport::message::{Dropped, Rows, Want};

use super::session::{Chunk, Item, Session, rows_of};

impl Session {
    /// A frame of decided rows has come, and with it the order to keep the path to row `commit`
    /// (0: nothing): takes the chunks out of the queue that are void by that. Rows of them that
    /// were to come back are put to the end of `dropped`. Says whether there were any chunks.
    pub(super) fn drop_void(&mut self, commit: u32, dropped: &mut Vec<Dropped>) -> bool {
        // What stands before the last decided chunk was looked at when that came.
        let decided = |item: &Item| matches!(item, Item::Chunk(chunk) if chunk.decided > 0);
        let start = self.items.iter().rposition(decided).map_or(0, |index| index + 1);
        if !self.items.range(start..).any(|item| matches!(item, Item::Chunk(_))) {
            return false;
        }
        let mut needed = HashSet::from([commit]);
        needed.extend(self.items.range(start..).filter_map(|item| match item {
            Item::Commit(row) => Some(*row),
            Item::Chunk(_) => None,
        }));
        let chunks = self.items.range(start..).filter_map(|item| match item {
            Item::Chunk(chunk) => Some(chunk),
            Item::Commit(_) => None,
        });
        for wire in chunks.chain([&self.gathering]).flat_map(frames_of) {
            needed.insert(wire.head.commit);
        }
        frames_of(&self.gathering).for_each(|wire| needed.extend(wire.parents_of_rows()));
        let mut any = false;
        // Rows come after their parents: what a chunk needs is known when its turn comes.
        for index in (start..self.items.len()).rev() {
            let Item::Chunk(chunk) = &self.items[index] else { continue };
            if frames_of(chunk).any(|wire| ids(&wire).any(|id| needed.contains(&id))) {
                frames_of(chunk).for_each(|wire| needed.extend(wire.parents_of_rows()));
                continue;
            }
            dropped.extend(frames_of(chunk).filter_map(|wire| answer(&wire)));
            // What the chunk committed stays committed.
            let commit = frames_of(chunk).map(|wire| wire.head.commit).max().unwrap_or(0);
            self.items[index] = Item::Commit(commit);
            any = true;
        }
        self.items.retain(|item| !matches!(item, Item::Commit(0)));
        any
    }
}

/// Frames were decoded when they came, so none is left out.
fn frames_of(chunk: &Chunk) -> impl Iterator<Item = Rows<'_>> {
    chunk.frames.iter().filter_map(|frame| rows_of(frame).ok())
}

fn ids(wire: &Rows<'_>) -> std::ops::Range<u32> {
    wire.head.first_id..wire.head.first_id + u32::from(wire.head.count)
}

/// The rows of a frame that are waited for.
fn answer(wire: &Rows<'_>) -> Option<Dropped> {
    let (first_id, count) = (wire.head.first_id, wire.head.count);
    match wire.head.want {
        Want::None => None,
        Want::Last => Some(Dropped { first_id: first_id + u32::from(count) - 1, count: 1 }),
        Want::All => Some(Dropped { first_id, count }),
    }
}
