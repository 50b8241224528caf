//! The seam under the launchers: memory by address, and a kernel with its parameter block.
//!
//! Two sides stand behind it, the driver and the emulator, so the launchers and their tests are
//! the same on both. Nothing here is asynchronous for the caller: work is queued on one stream,
//! and [`Gpu::download`] waits for it.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use crate::kernel::Kernel;

/// Numbers that may be copied to a GPU and back as bytes.
pub trait Number: Copy + sealed::Sealed {}

mod sealed {
    /// Types without padding, for which every bit pattern is a value.
    pub trait Sealed {}
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl sealed::Sealed for $number {}
        impl Number for $number {}
    )*};
}
numbers!(u8, i8, u16, i16, u32, i32, u64, f32);

/// An error below the launchers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// Memory could not be had.
    #[error("{gpu}: {bytes} bytes for {purpose} could not be allocated")]
    OutOfMemory {
        /// Name of the GPU.
        gpu: String,
        /// Bytes that were asked for.
        bytes: usize,
        /// Purpose of the memory.
        purpose: &'static str,
    },
    /// A kernel or a copy was refused; the GPU goes on.
    #[error("{gpu}: {kernel} failed: {reason}")]
    Launch {
        /// Name of the GPU.
        gpu: String,
        /// Kernel or call that failed.
        kernel: &'static str,
        /// The driver's text.
        reason: String,
    },
    /// The GPU is lost to this process: a fault in a kernel, or a broken driver. All that was
    /// queued is lost, and so is the content of its memory.
    #[error("{gpu} is lost to this process: {reason}")]
    Lost {
        /// Name of the GPU.
        gpu: String,
        /// The driver's text.
        reason: String,
    },
}

/// One launch: which kernel, how many blocks. A block's threads are the kernel's own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Kernel to launch.
    pub kernel: Kernel,
    /// Blocks in x, y, z; none is 0.
    pub grid: [u32; 3],
}

/// Memory of a GPU.
pub trait Memory {
    /// Its first byte, aligned to 256; of host memory in place to 16.
    fn address(&self) -> u64;
    /// Its length in bytes.
    fn bytes(&self) -> usize;

    /// All of it as numbers, to read.
    fn slice<T: Number>(&self) -> Slice<'_, T> {
        Slice { address: self.address(), len: self.bytes() / size_of::<T>(), life: PhantomData }
    }

    /// All of it as numbers, to write.
    fn slice_mut<T: Number>(&mut self) -> SliceMut<'_, T> {
        SliceMut { address: self.address(), len: self.bytes() / size_of::<T>(), life: PhantomData }
    }
}

/// A queue of work on one GPU, and its memory.
pub trait Gpu {
    /// Memory of this GPU; freed when it goes.
    type Memory: Memory + Send + Sync + 'static;

    /// One line for people.
    fn describe(&self) -> String;

    /// Memory with undefined content.
    ///
    /// # Errors
    /// If there is not as much.
    fn alloc(&mut self, bytes: usize, purpose: &'static str) -> Result<Self::Memory, GpuError>;

    /// Copies numbers to `to`, from number `at` on.
    ///
    /// # Errors
    /// If the GPU is lost.
    ///
    /// # Panics
    /// If they do not fit.
    fn upload<T: Number>(
        &mut self,
        from: &[T],
        to: &mut Self::Memory,
        at: usize,
    ) -> Result<(), GpuError>;

    /// Copies numbers from `from`, from number `at` on; waits for all work before.
    ///
    /// # Errors
    /// If work before has failed.
    ///
    /// # Panics
    /// If there are not as many.
    fn download<T: Number>(
        &mut self,
        from: &Self::Memory,
        at: usize,
        to: &mut [T],
    ) -> Result<(), GpuError>;

    /// Queues a kernel.
    ///
    /// # Errors
    /// If it can't be queued, or work before has failed.
    ///
    /// # Safety
    /// `params` is the block that the kernel takes, its pointers are into memory of this GPU that
    /// lives until the work is done, and what the kernel reads and writes for them and this grid
    /// lies within that memory.
    unsafe fn launch<P: Copy>(&mut self, launch: Launch, params: &P) -> Result<(), GpuError>;

    /// Makes ready to [`Gpu::fetch`] from memory of `other`, and says how that will go.
    ///
    /// # Errors
    /// If this GPU is lost.
    fn reach(&mut self, other: &Self) -> Result<Reach, GpuError>;

    /// Queues a copy of the first `bytes` of this GPU's own memory.
    ///
    /// # Errors
    /// If the GPU is lost.
    ///
    /// # Panics
    /// If either has fewer.
    fn copy(
        &mut self,
        bytes: usize,
        from: &Self::Memory,
        to: &mut Self::Memory,
    ) -> Result<(), GpuError>;

    /// Queues a copy of the first `bytes` of memory that another [`Gpu`] of this kind has filled
    /// and waited for. `from` may go right away, but what it holds is read until this one has been
    /// waited for ([`Gpu::finish`], [`Gpu::download`]).
    ///
    /// # Errors
    /// If either GPU is lost.
    ///
    /// # Panics
    /// If either has fewer.
    fn fetch(
        &mut self,
        bytes: usize,
        from: &Self::Memory,
        to: &mut Self::Memory,
    ) -> Result<(), GpuError>;

    /// Waits for all work before.
    ///
    /// # Errors
    /// If it has failed.
    fn finish(&mut self) -> Result<(), GpuError>;

    /// The bytes `range` of `map` in place, to read alone, where the GPU has no memory but the
    /// host's and its driver lets it read these; else `None`. All pages of the map are kept in
    /// memory from then on, until the last memory of it goes.
    ///
    /// # Panics
    /// If the range is not within the map.
    fn in_place(&mut self, map: &HostMap, range: Range<usize>) -> Option<Self::Memory> {
        let _ = (map, range);
        None
    }
}

/// Host memory that begins at a page, has its last page for itself, and does not change: a file
/// that is mapped.
pub type HostMap = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Way in which memory of one GPU gets to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// They are the same.
    Same,
    /// One reads the other one's memory.
    Peer,
    /// The driver copies through the host, since the GPUs can't see each other.
    Staged,
}

impl std::fmt::Display for Reach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Same => "within the GPU",
            Self::Peer => "from GPU to GPU",
            Self::Staged => "by the driver, since the GPUs have no access to each other",
        })
    }
}

/// Numbers in memory of a GPU, to read.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a, T> {
    address: u64,
    len: usize,
    life: PhantomData<&'a [T]>,
}

/// Numbers in memory of a GPU, to write.
#[derive(Debug)]
pub struct SliceMut<'a, T> {
    address: u64,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

impl<T> Slice<'_, T> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of the slice.
    ///
    /// # Panics
    /// If the range is not within.
    #[must_use]
    pub fn range(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        let address = self.address + (range.start * size_of::<T>()) as u64;
        Self { address, len: range.len(), life: PhantomData }
    }

    pub(crate) fn pointer(&self) -> *const T {
        self.address as *const T
    }

    /// Address for kernels that read 16 bytes at a time.
    pub(crate) fn vectors(&self) -> *const T {
        assert!(self.address.is_multiple_of(16), "a part that begins at {:#x}", self.address);
        self.pointer()
    }
}

impl<T> SliceMut<'_, T> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of the slice.
    ///
    /// # Panics
    /// If the range is not within.
    #[must_use]
    pub fn range(&mut self, range: Range<usize>) -> SliceMut<'_, T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        let address = self.address + (range.start * size_of::<T>()) as u64;
        SliceMut { address, len: range.len(), life: PhantomData }
    }

    /// The same, to read.
    #[must_use]
    pub fn as_slice(&self) -> Slice<'_, T> {
        Slice { address: self.address, len: self.len, life: PhantomData }
    }

    pub(crate) fn pointer(&mut self) -> *mut T {
        self.address as *mut T
    }

    /// Address for kernels that write 16 bytes at a time.
    pub(crate) fn vectors(&mut self) -> *mut T {
        assert!(self.address.is_multiple_of(16), "a part that begins at {:#x}", self.address);
        self.pointer()
    }
}

/// The bytes of numbers.
#[cfg(any(feature = "cuda", feature = "testkit"))]
pub(crate) fn bytes<T: Number>(numbers: &[T]) -> &[u8] {
    // SAFETY: `Number` is implemented here alone, for types without padding.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// The bytes of numbers, to write.
#[cfg(any(feature = "cuda", feature = "testkit"))]
pub(crate) fn bytes_mut<T: Number>(numbers: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and every bit pattern is a value of each of them.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}

/// A count as a kernel takes it.
pub(crate) fn count(number: usize) -> u32 {
    u32::try_from(number).expect("a GPU does not hold 2^32 rows or columns")
}
