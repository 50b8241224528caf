//! Page pool: which pages of the KV store are free, and how many hold the others. Integers only.
//!
//! A page is free, or held by sessions, or kept for sessions to come, or both of the latter. A
//! page that is kept and held by nobody is *idle*.

use std::collections::VecDeque;

use hat_plan::PAGE_SIZE;

/// State of one page.
#[derive(Clone, Copy, Debug, Default)]
struct Page {
    /// Sessions that hold it.
    references: u32,
    /// True if it is cached for others.
    is_cached: bool,
}

/// Pages of one KV store. A session's pages are reserved on admission, all at once, so a
/// running session never stalls for want of one.
#[derive(Debug)]
pub(crate) struct PagePool {
    free: VecDeque<u32>,
    pages: Vec<Page>,
    idle: usize,
}

/// Pages for this many rows.
#[must_use]
pub fn pages_for(rows: usize) -> usize {
    rows.div_ceil(PAGE_SIZE)
}

impl PagePool {
    /// A pool of pages `0..pages`, all free.
    pub(crate) fn new(pages: u32) -> Self {
        Self { free: (0..pages).collect(), pages: vec![Page::default(); pages as usize], idle: 0 }
    }

    /// Free pages.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages that are kept and held by nobody.
    pub(crate) fn idle(&self) -> usize {
        self.idle
    }

    /// Pages that a session can have: those that are kept give way.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.idle
    }

    /// Sessions that hold `page`.
    pub(crate) fn references(&self, page: u32) -> u32 {
        self.pages[page as usize].references
    }

    /// True if `page` is cached.
    pub(crate) fn is_cached(&self, page: u32) -> bool {
        self.pages[page as usize].is_cached
    }

    /// Takes `pages` pages out of the pool, for one holder each.
    ///
    /// # Panics
    /// If fewer are free.
    pub(crate) fn take(&mut self, pages: usize) -> Vec<u32> {
        let taken: Vec<u32> = self.free.drain(..pages).collect();
        for page in &taken {
            self.pages[*page as usize].references = 1;
        }
        taken
    }

    /// One holder more for a page that is held or kept.
    ///
    /// # Panics
    /// If the page is free.
    pub(crate) fn hold(&mut self, page: u32) {
        let entry = &mut self.pages[page as usize];
        assert!(entry.references > 0 || entry.is_cached, "page {page} is free");
        if entry.references == 0 {
            self.idle -= 1;
        }
        entry.references += 1;
    }

    /// Each of `pages` has one holder less. Those without one are free, the longest unused handed
    /// out first, or idle.
    ///
    /// # Panics
    /// If nobody holds one of them: somebody gave a page back twice.
    pub(crate) fn give_back(&mut self, pages: Vec<u32>) {
        for page in pages {
            let entry = &mut self.pages[page as usize];
            assert!(entry.references > 0, "page {page} was given back twice");
            entry.references -= 1;
            match (entry.references, entry.is_cached) {
                (0, true) => self.idle += 1,
                (0, false) => self.free.push_back(page),
                _ => {}
            }
        }
    }

    /// A page that is held is not free when its last holder has gone, until [`PagePool::release`].
    ///
    /// # Panics
    /// If nobody holds it, or it is kept already.
    pub(crate) fn keep(&mut self, page: u32) {
        let entry = &mut self.pages[page as usize];
        assert!(entry.references > 0, "page {page} is held by nobody");
        assert!(!entry.is_cached, "page {page} is kept already");
        entry.is_cached = true;
    }

    /// A page is kept no longer: free now, or when its last holder has gone.
    ///
    /// # Panics
    /// If it is not kept.
    pub(crate) fn release(&mut self, page: u32) {
        let entry = &mut self.pages[page as usize];
        assert!(entry.is_cached, "page {page} is not kept");
        entry.is_cached = false;
        if entry.references == 0 {
            self.idle -= 1;
            self.free.push_back(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_given_back_are_handed_out_last() {
        let mut pool = PagePool::new(4);
        let first = pool.take(3);
        assert_eq!(first, [0, 1, 2]);
        assert_eq!(pool.free(), 1);
        pool.give_back(first);
        assert_eq!(pool.take(4), [3, 0, 1, 2]);
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn a_page_given_back_twice_is_noticed() {
        let mut pool = PagePool::new(1);
        let pages = pool.take(1);
        pool.give_back(pages.clone());
        pool.give_back(pages);
    }

    #[test]
    fn a_page_is_free_when_nobody_holds_or_keeps_it() {
        let mut pool = PagePool::new(2);
        let held = pool.take(1);
        pool.hold(0);
        pool.give_back(held.clone());
        assert_eq!((pool.free(), pool.idle(), pool.references(0)), (1, 0, 1));
        pool.keep(0);
        pool.give_back(held.clone());
        assert_eq!((pool.free(), pool.idle(), pool.references(0)), (1, 1, 0));
        pool.hold(0);
        assert_eq!((pool.free(), pool.idle()), (1, 0));
        pool.release(0);
        assert_eq!((pool.free(), pool.idle()), (1, 0));
        pool.give_back(held);
        assert_eq!(pool.take(2), [1, 0]);
    }

    #[test]
    #[should_panic(expected = "is free")]
    fn a_free_page_is_not_shared() {
        PagePool::new(1).hold(0);
    }

    #[test]
    fn pages_round_up() {
        assert_eq!((pages_for(0), pages_for(1), pages_for(32), pages_for(33)), (0, 1, 1, 2));
    }
}
