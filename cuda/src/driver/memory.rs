//! Memory of a GPU: who frees it, and when.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::Context;
use crate::gpu::Memory;

/// Memory of a GPU.
pub struct CudaMemory {
    allocation: Arc<Allocation>,
}

/// What a [`CudaMemory`] names. A stream of another GPU that copies from it keeps it, too.
pub(super) struct Allocation {
    context: Arc<Context>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl Allocation {
    /// Memory of undefined content; none has the address 0.
    ///
    /// # Safety
    /// The context is current.
    pub(super) unsafe fn new(
        context: &Arc<Context>,
        bytes: usize,
    ) -> Result<Self, result::DriverError> {
        let address = match bytes {
            0 => 0,
            // SAFETY: the caller's promise; the memory is not read before it is written.
            bytes => unsafe { result::malloc_sync(bytes) }?,
        };
        Ok(Self { context: Arc::clone(context), address, bytes })
    }

    pub(super) fn address(&self) -> sys::CUdeviceptr {
        self.address
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.address != 0 && self.context.make_current().is_ok() {
            // Launches that wait may use it.
            self.context.queue().flush_unheard();
            // SAFETY: it was allocated in this context and is freed here alone; the driver waits
            // for work that uses it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

impl CudaMemory {
    pub(super) fn new(allocation: Allocation) -> Self {
        Self { allocation: Arc::new(allocation) }
    }

    pub(super) fn allocation(&self) -> &Arc<Allocation> {
        &self.allocation
    }
}

impl Memory for CudaMemory {
    fn address(&self) -> u64 {
        self.allocation.address
    }

    fn bytes(&self) -> usize {
        self.allocation.bytes
    }
}
