//! Rows that wait and can no longer matter: a device that streams has sent them before it heard
//! how its walk went, and now says that it went another way.
//!
//! Decided rows follow the committed path, so whatever pends beside that path is void once they
//! are applied. Chunks of pending rows that still wait then are not computed at all. A chunk is
//! kept whole if anything that stays names a row of it: a commit, or a row that hangs below.

use std::collections::BTreeSet;

use hat_transport::message::Dropped;

use super::session::{Item, Session};

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
        let mut needed = BTreeSet::from([commit]);
        for item in self.items.range(start..) {
            match item {
                Item::Commit(row) => needed.extend([*row]),
                Item::Chunk(chunk) => {
                    needed.extend(chunk.frames.iter().map(|rows| rows.head.commit))
                }
            }
        }
        for rows in &self.gathering.frames {
            needed.insert(rows.head.commit);
            needed.extend(rows.parents());
        }
        let mut any = false;
        // Rows come after their parents: what a chunk needs is known when its turn comes.
        for index in (start..self.items.len()).rev() {
            let Item::Chunk(chunk) = &self.items[index] else { continue };
            if chunk.frames.iter().any(|rows| rows.ids().any(|id| needed.contains(&id))) {
                needed.extend(chunk.frames.iter().flat_map(|rows| rows.parents()));
                continue;
            }
            dropped.extend(chunk.frames.iter().filter_map(|rows| rows.awaited()));
            // What the chunk committed stays committed.
            let commit = chunk.frames.iter().map(|rows| rows.head.commit).max().unwrap_or(0);
            self.items[index] = Item::Commit(commit);
            any = true;
        }
        self.items.retain(|item| !matches!(item, Item::Commit(0)));
        any
    }
}
