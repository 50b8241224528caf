//! A fixed pool of page-aligned buffers: the transport's whole memory, taken at start.
//!
//! Two sizes, because a cloud keeps many small frames until they are acknowledged. The memory
//! comes zeroed from the operating system and is not touched before a buffer is first used, so a
//! large pool costs nothing until it is needed. A [`Buf`] holds one frame as it stands on the
//! wire: [`HEADER_BYTES`] for the header, then the body.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::frame::{BODY_BYTES_MAX, HEADER_BYTES};

/// Bytes of a small buffer, header included.
pub const SMALL_BYTES: usize = 16 << 10;
/// Bytes of a large buffer: a whole frame with the largest body, and some bytes of the next one.
pub const LARGE_BYTES: usize = 68 << 10;
const PAGE_BYTES: usize = 4096;

/// Number and size of a pool's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Buffers of [`SMALL_BYTES`].
    pub small: u32,
    /// Buffers of [`LARGE_BYTES`].
    pub large: u32,
}

impl PoolConfig {
    /// Address space of the pool; resident only as far as it is used.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.small as usize * SMALL_BYTES + self.large as usize * LARGE_BYTES
    }
}

/// A fixed set of buffers, shared between whoever holds one.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

impl Pool {
    /// Reserves all buffers.
    #[must_use]
    pub fn new(config: PoolConfig) -> Self {
        let small = Class::new(config.small, SMALL_BYTES);
        let large = Class::new(config.large, LARGE_BYTES);
        Self { inner: Arc::new(Inner { classes: [small, large] }) }
    }

    /// A buffer for `body_bytes` body bytes, or `None` if none is free. A small one is preferred
    /// where it is big enough. The body's content is whatever its last user left there.
    ///
    /// # Panics
    /// If `body_bytes` exceeds [`BODY_BYTES_MAX`].
    #[must_use]
    pub fn take(&self, body_bytes: usize) -> Option<Buf> {
        self.take_leaving(body_bytes, 0)
    }

    /// As [`Pool::take`], but leaves one buffer of each `reserve` in its class for others.
    /// A reserve of 0 takes the last one too.
    pub(crate) fn take_leaving(&self, body_bytes: usize, reserve: usize) -> Option<Buf> {
        assert!(body_bytes <= BODY_BYTES_MAX, "a body of {body_bytes} bytes fits no frame");
        let needed = HEADER_BYTES + body_bytes;
        for (index, class) in self.inner.classes.iter().enumerate() {
            if class.buf_bytes < needed {
                continue;
            }
            let keep = class.count.checked_div(reserve).unwrap_or(0);
            let mut free = class.free();
            if free.len() > keep
                && let Some(slot) = free.pop()
            {
                let slot = Slot { pool: Arc::clone(&self.inner), class: index, slot };
                return Some(Buf { slot: Some(slot), end: needed, charge: None, tag: 0 });
            }
        }
        None
    }

    /// Free buffers: (small, large).
    #[must_use]
    pub fn free(&self) -> (usize, usize) {
        (self.inner.classes[0].free().len(), self.inner.classes[1].free().len())
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("free", &self.free()).finish_non_exhaustive()
    }
}

struct Inner {
    classes: [Class; 2],
}

/// All buffers of one size.
struct Class {
    /// First byte of the first buffer, page-aligned, inside `memory`.
    base: NonNull<u8>,
    /// The allocation; kept as a raw pointer, since buffers alias parts of it.
    memory: NonNull<[u8]>,
    buf_bytes: usize,
    count: usize,
    /// Last in, first out: what was used last is in the cache, and what was never needed is never
    /// touched.
    free: Mutex<Vec<u32>>,
}

// SAFETY: `base` and `memory` are one allocation that lives as long as the class, and each part of
// it is reached only through the one `Slot` that holds its index.
unsafe impl Send for Class {}
// SAFETY: as above; `free` is behind a lock, the rest never changes.
unsafe impl Sync for Class {}

impl Class {
    fn new(count: u32, buf_bytes: usize) -> Self {
        let bytes = count as usize * buf_bytes + PAGE_BYTES;
        // A zeroed vector comes from calloc, which does not touch fresh memory.
        let memory = NonNull::from(Box::leak(vec![0; bytes].into_boxed_slice()));
        let first: NonNull<u8> = memory.cast();
        let skip = first.as_ptr().align_offset(PAGE_BYTES);
        assert!(skip < PAGE_BYTES, "a byte pointer can be aligned");
        // SAFETY: `skip` is less than the page that the allocation has to spare.
        let base = unsafe { first.add(skip) };
        let free = Mutex::new((0..count).rev().collect());
        Self { base, memory, buf_bytes, count: count as usize, free }
    }

    /// A poisoned lock means that another thread panicked while it moved one number; the list is
    /// whole.
    fn free(&self) -> MutexGuard<'_, Vec<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, slot: u32) -> NonNull<u8> {
        assert!((slot as usize) < self.count, "the slot is one of this class");
        // SAFETY: `count` buffers fit behind `base` (see `new`), and `slot` is below `count`.
        unsafe { self.base.add(slot as usize * self.buf_bytes) }
    }
}

impl Drop for Class {
    fn drop(&mut self) {
        // SAFETY: `memory` was leaked from a box in `new`, and is freed here alone. No `Slot` is
        // left, since each keeps the pool alive.
        drop(unsafe { Box::from_raw(self.memory.as_ptr()) });
    }
}

/// The exclusive right to one buffer.
struct Slot {
    pool: Arc<Inner>,
    class: usize,
    slot: u32,
}

impl Slot {
    fn bytes(&self) -> &[u8] {
        let class = &self.pool.classes[self.class];
        // SAFETY: the index was popped from the free list and is pushed back only on drop, so
        // this slot alone reaches these initialised bytes; the borrow of `self` guards them.
        unsafe { std::slice::from_raw_parts(class.start(self.slot).as_ptr(), class.buf_bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let class = &self.pool.classes[self.class];
        // SAFETY: as in `bytes`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(class.start(self.slot).as_ptr(), class.buf_bytes) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool.classes[self.class].free().push(self.slot);
    }
}

/// Received bytes that count against the sender's credit until this is dropped.
pub(crate) struct Charge {
    /// Bytes released so far, wrapping; the connection reads it.
    pub(crate) released: Arc<AtomicU32>,
    pub(crate) bytes: u32,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.released.fetch_add(self.bytes, Ordering::Release);
    }
}

/// One frame in a pool buffer: header room, then the body. Dereferences to the body.
///
/// Dropping it gives the buffer back and, if it was received, the credit for its bytes.
pub struct Buf {
    slot: Option<Slot>,
    /// Bytes in use, counted from the start of the header.
    end: usize,
    charge: Option<Charge>,
    /// A note of the connection that lent this buffer to a link.
    tag: u32,
}

impl Buf {
    /// A buffer without memory, for a received frame that has no body.
    pub(crate) fn empty() -> Self {
        Self { slot: None, end: HEADER_BYTES, charge: None, tag: 0 }
    }

    /// The body. After [`Pool::take`] its content is undefined: write all of it.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        self.raw().get(HEADER_BYTES..self.end).unwrap_or_default()
    }

    /// The body, to be written.
    #[must_use]
    pub fn body_mut(&mut self) -> &mut [u8] {
        let end = self.end;
        self.raw_mut().get_mut(HEADER_BYTES..end).unwrap_or_default()
    }

    /// Largest body that fits.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.raw().len().saturating_sub(HEADER_BYTES).min(BODY_BYTES_MAX)
    }

    /// Sets the body's length.
    ///
    /// # Panics
    /// If it exceeds [`Buf::capacity`].
    pub fn set_len(&mut self, body_bytes: usize) {
        assert!(body_bytes <= self.capacity(), "{body_bytes} bytes in {}", self.capacity());
        self.end = HEADER_BYTES + body_bytes;
    }

    /// The frame as it stands on the wire, header first; what a link sends.
    #[must_use]
    pub fn wire(&self) -> &[u8] {
        self.raw().get(..self.end).unwrap_or_default()
    }

    /// Free bytes behind those in use; what a link receives into.
    #[must_use]
    pub fn spare_mut(&mut self) -> &mut [u8] {
        let end = self.end;
        self.raw_mut().get_mut(end..).unwrap_or_default()
    }

    /// Counts `bytes` more as in use, after they were received into [`Buf::spare_mut`].
    ///
    /// # Panics
    /// If there is no such room.
    pub fn advance(&mut self, bytes: usize) {
        assert!(self.end + bytes <= self.raw().len(), "{bytes} bytes beyond the buffer");
        self.end += bytes;
    }

    /// Makes this an empty buffer for received bytes.
    pub(crate) fn clear(&mut self) {
        self.end = 0;
    }

    /// The whole buffer.
    pub(crate) fn raw(&self) -> &[u8] {
        self.slot.as_ref().map(Slot::bytes).unwrap_or_default()
    }

    /// The whole buffer, to be written.
    pub(crate) fn raw_mut(&mut self) -> &mut [u8] {
        self.slot.as_mut().map(Slot::bytes_mut).unwrap_or_default()
    }

    /// Writes the header room.
    pub(crate) fn write_header(&mut self, header: &[u8; HEADER_BYTES]) {
        self.raw_mut()[..HEADER_BYTES].copy_from_slice(header);
    }

    pub(crate) fn tag(&self) -> u32 {
        self.tag
    }

    pub(crate) fn set_tag(&mut self, tag: u32) {
        self.tag = tag;
    }

    /// Exchanges the charge; the old one is released.
    pub(crate) fn set_charge(&mut self, charge: Option<Charge>) {
        self.charge = charge;
    }
}

impl Deref for Buf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.body()
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.body_mut()
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Bodies hold hidden states and are never printed.
        f.debug_struct("Buf").field("body_bytes", &self.body().len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_apart_and_come_back() {
        let pool = Pool::new(PoolConfig { small: 2, large: 1 });
        let mut bufs = Vec::new();
        for fill in 0..3u8 {
            let mut buf = pool.take(100).unwrap();
            assert_eq!(buf.raw().as_ptr().align_offset(PAGE_BYTES), 0);
            buf.raw_mut().fill(fill);
            bufs.push(buf);
        }
        assert!(pool.take(0).is_none(), "three buffers, the large one included, are out");
        for (fill, buf) in bufs.iter().enumerate() {
            assert!(buf.raw().iter().all(|byte| usize::from(*byte) == fill));
            assert_eq!(buf.body().len(), 100);
        }
        bufs.clear();
        assert_eq!(pool.free(), (2, 1));
    }

    #[test]
    fn a_large_body_takes_a_large_buffer() {
        let pool = Pool::new(PoolConfig { small: 1, large: 1 });
        let buf = pool.take(BODY_BYTES_MAX).unwrap();
        assert_eq!(buf.raw().len(), LARGE_BYTES);
        assert!(pool.take(BODY_BYTES_MAX).is_none());
        assert!(pool.take(1).is_some());
    }

    #[test]
    fn a_reserve_stays() {
        let pool = Pool::new(PoolConfig { small: 8, large: 0 });
        let taken: Vec<Buf> = std::iter::from_fn(|| pool.take_leaving(1, 4)).collect();
        assert_eq!(taken.len(), 6);
        assert!(pool.take(1).is_some());
    }

    #[test]
    fn a_dropped_buffer_releases_its_charge() {
        let pool = Pool::new(PoolConfig { small: 1, large: 0 });
        let released = Arc::new(AtomicU32::new(u32::MAX));
        let mut buf = pool.take(8).unwrap();
        buf.set_charge(Some(Charge { released: Arc::clone(&released), bytes: 40 }));
        assert_eq!(released.load(Ordering::Acquire), u32::MAX);
        drop(buf);
        assert_eq!(released.load(Ordering::Acquire), 39);
    }

    #[test]
    fn a_buffer_outlives_its_pool() {
        let mut buf = Pool::new(PoolConfig { small: 1, large: 0 }).take(8).unwrap();
        buf.body_mut().copy_from_slice(b"12345678");
        assert_eq!(&buf[..], b"12345678");
    }
}
