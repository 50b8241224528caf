//! Activations, and a stamp that tells one content from another.

use std::sync::atomic::{AtomicU64, Ordering};

use super::super::BackendError;

/// Activations in ordinary memory.
pub struct CpuBuffer {
    /// `[capacity][columns]`
    pub(super) data: Box<[f32]>,
    pub(super) columns: usize,
    /// Changes with the content; what is computed from it may be kept.
    pub(super) stamp: u64,
}

/// Source of [`CpuBuffer::stamp`]; no two contents share one, in any backend of the process.
static STAMP: AtomicU64 = AtomicU64::new(1);

impl CpuBuffer {
    /// Zeros, and how many.
    pub(super) fn new(
        backend: &'static str,
        capacity: usize,
        columns: usize,
    ) -> Result<(Self, usize), BackendError> {
        let numbers = capacity.checked_mul(columns);
        let error = || BackendError::OutOfMemory {
            backend,
            bytes: numbers.and_then(|n| n.checked_mul(4)).unwrap_or(usize::MAX),
            purpose: "activations",
        };
        let numbers = numbers.ok_or_else(error)?;
        let data = bytemuck::try_zeroed_slice_box(numbers).map_err(|()| error())?;
        let stamp = STAMP.fetch_add(1, Ordering::Relaxed);
        Ok((Self { data, columns, stamp }, numbers))
    }

    /// The first `rows` rows, to be changed.
    pub(super) fn rows_mut(&mut self, rows: usize) -> &mut [f32] {
        self.stamp = STAMP.fetch_add(1, Ordering::Relaxed);
        let (capacity, columns) = (self.data.len(), self.columns);
        assert!(rows * columns <= capacity, "{rows} rows of {columns} in {capacity} numbers");
        &mut self.data[..rows * columns]
    }

    /// The first `rows` rows.
    pub(super) fn rows(&self, rows: usize) -> &[f32] {
        let (capacity, columns) = (self.data.len(), self.columns);
        assert!(rows * columns <= capacity, "{rows} rows of {columns} in {capacity} numbers");
        &self.data[..rows * columns]
    }
}
