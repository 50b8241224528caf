//! Pages of the KV store, and the prompts that some of them hold for whoever asks again.

use hat_transport::message::PageId;

use crate::page::PagePool;
use crate::prefix::{PrefixCache, PrefixScope};

/// The pages of one KV store.
#[derive(Debug)]
pub(super) struct Pages {
    pool: PagePool,
    names: PrefixCache,
}

impl Pages {
    /// A store of this many pages, all free.
    pub(super) fn new(pages: u32) -> Self {
        Self { pool: PagePool::new(pages), names: PrefixCache::default() }
    }

    /// Pages that a session can have: those that are kept give way.
    pub(super) fn available(&self) -> usize {
        self.pool.available()
    }

    /// Free pages, and pages that are kept and held by nobody.
    pub(super) fn free_and_idle(&self) -> (usize, usize) {
        (self.pool.free(), self.pool.idle())
    }

    /// Pages for a session, `wanted` in all, and how many of them, the first ones, hold the pages
    /// of `names` already.
    ///
    /// # Panics
    /// If there are not so many [`Self::available`].
    pub(super) fn admit(
        &mut self,
        scope: PrefixScope,
        names: &[PageId],
        wanted: usize,
    ) -> (Vec<u32>, usize) {
        self.names.admit(&mut self.pool, scope, names, wanted).expect("there is room")
    }

    /// Keeps `pages` of a path under `names`.
    pub(super) fn keep(&mut self, scope: PrefixScope, names: &[PageId], pages: &[u32]) {
        self.names.keep(&mut self.pool, scope, names, pages);
    }

    /// Gives back the pages of a session that has ended.
    pub(super) fn give_back(&mut self, pages: Vec<u32>) {
        self.pool.give_back(pages);
    }

    /// Forgets the names of these pages: what they hold is no good.
    pub(super) fn forget(&mut self, pages: &[u32]) {
        self.names.forget(&mut self.pool, pages);
    }

    /// Forgets all names: what the store holds means nothing any more.
    pub(super) fn clear(&mut self) {
        self.names.clear(&mut self.pool);
    }
}
