//! Page pool: which pages of the KV store are free. Integers only.

use std::collections::VecDeque;

use crate::backend::PAGE_SIZE;

/// There are not enough free pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} pages wanted, {free} of {total} free")]
pub struct NoPages {
    /// Pages asked for.
    pub wanted: usize,
    /// Pages that were free.
    pub free: usize,
    /// Pages of the pool.
    pub total: usize,
}

/// Free pages of one KV store. A session's pages are reserved on admission, all at once, so a
/// running session never stalls for want of one.
#[derive(Debug)]
pub struct PagePool {
    free: VecDeque<u32>,
    total: usize,
}

/// Pages for so many rows.
#[must_use]
pub fn pages_for(rows: usize) -> usize {
    rows.div_ceil(PAGE_SIZE)
}

impl PagePool {
    /// A pool of pages `0..pages`, all free.
    #[must_use]
    pub fn new(pages: u32) -> Self {
        Self { free: (0..pages).collect(), total: pages as usize }
    }

    /// Free pages.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes `pages` pages out of the pool.
    ///
    /// # Errors
    /// [`NoPages`] if there are fewer; the pool is unchanged then.
    pub fn take(&mut self, pages: usize) -> Result<Vec<u32>, NoPages> {
        if pages > self.free.len() {
            return Err(NoPages { wanted: pages, free: self.free.len(), total: self.total });
        }
        Ok(self.free.drain(..pages).collect())
    }

    /// Gives pages back. The longest unused are handed out first.
    ///
    /// # Panics
    /// If more pages come back than the pool has: somebody gave a page back twice.
    pub fn give_back(&mut self, pages: Vec<u32>) {
        self.free.extend(pages);
        assert!(self.free.len() <= self.total, "a page was given back twice");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_all_or_nothing_and_gets_them_back() {
        let mut pool = PagePool::new(4);
        let first = pool.take(3).unwrap();
        assert_eq!(first, [0, 1, 2]);
        assert_eq!(pool.take(2), Err(NoPages { wanted: 2, free: 1, total: 4 }));
        assert_eq!(pool.free(), 1);
        pool.give_back(first);
        assert_eq!(pool.take(4).unwrap(), [3, 0, 1, 2]);
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_page_given_back_twice_is_noticed() {
        let mut pool = PagePool::new(1);
        let pages = pool.take(1).unwrap();
        pool.give_back(pages.clone());
        pool.give_back(pages);
    }

    #[test]
    fn pages_round_up() {
        assert_eq!((pages_for(0), pages_for(1), pages_for(32), pages_for(33)), (0, 1, 1, 2));
    }
}
