//! Rows that wait and can no longer matter: a device that streams has sent them before it heard
//! how its verification went, and now says that it went another way.
//!
//! Decided rows follow the committed path, so whatever pends beside that path is stale once they
//! are applied. Chunks of pending rows that still wait then are not computed at all. A chunk is
//! kept whole if anything that stays names a row of it: a commit, or a row that hangs below.

use std::collections::BinaryHeap;
use std::ops::RangeInclusive;

use hat_transport::message::Dropped;

use super::session::{QueueItem, Session};

/// Rows that became stale, and the ids by which others stay. Reused from frame to frame.
#[derive(Default)]
pub(super) struct Pruning {
    /// Rows that were to come back, those of the latest chunk first.
    pub(super) dropped: Vec<Dropped>,
    /// Ids that are named by something that stays, the largest first.
    needed: BinaryHeap<u32>,
}

impl Pruning {
    /// True if one of these rows is needed. To be asked from the last rows to the first: those that
    /// come later are forgotten.
    fn needs(&mut self, ids: RangeInclusive<u32>) -> bool {
        while self.needed.peek().is_some_and(|id| id > ids.end()) {
            self.needed.pop();
        }
        self.needed.peek().is_some_and(|id| id >= ids.start())
    }
}

impl Session {
    /// A frame of decided rows has come, and with it the order to keep the path to row `commit`
    /// (0: nothing): takes the chunks out of the queue that are stale by that. Rows of them that
    /// were to come back are put to the end of `pruning.dropped`. Returns true if there were any
    /// chunks.
    pub(super) fn prune_stale(&mut self, commit: u32, pruning: &mut Pruning) -> bool {
        // What stands before the last decided chunk was looked at when that came.
        let decided =
            |item: &QueueItem| matches!(item, QueueItem::Chunk(chunk) if chunk.decided > 0);
        let start = self.items.iter().rposition(decided).map_or(0, |index| index + 1);
        pruning.needed.clear();
        pruning.needed.push(commit);
        let mut frames = 0;
        for item in self.items.range(start..) {
            match item {
                QueueItem::Commit(row) => pruning.needed.push(*row),
                QueueItem::Chunk(chunk) => frames += chunk.frames,
            }
        }
        if frames == 0 {
            return false;
        }
        let mut end = self.frames.len() - self.gathering.frames;
        pruning.needed.extend(self.frames.range(end - frames..).map(|rows| rows.head.commit));
        pruning.needed.extend(self.frames.range(end..).flat_map(|rows| rows.parents()));
        let mut any = false;
        // Rows come after their parents: what a chunk needs is known when its turn comes.
        for index in (start..self.items.len()).rev() {
            let QueueItem::Chunk(chunk) = self.items[index] else { continue };
            let of_chunk = end - chunk.frames..end;
            end = of_chunk.start;
            let rows = || self.frames.range(of_chunk.clone());
            let first = rows().next().map_or(0, |rows| rows.head.first_id);
            let last = rows().next_back().map_or(0, |rows| rows.ids().end - 1);
            if pruning.needs(first..=last) {
                pruning.needed.extend(rows().flat_map(|rows| rows.parents()));
                continue;
            }
            pruning.dropped.extend(rows().filter_map(|rows| rows.awaited()));
            // What the chunk committed stays committed.
            let commit = rows().map(|rows| rows.head.commit).max().unwrap_or(0);
            self.items[index] = QueueItem::Commit(commit);
            self.frames.drain(of_chunk);
            any = true;
        }
        self.items.retain(|item| !matches!(item, QueueItem::Commit(0)));
        any
    }
}
