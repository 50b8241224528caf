//! Memory of a GPU: who frees it, and when.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::Context;
use super::register::Registered;
use crate::gpu::Memory;

/// Memory of a GPU.
pub struct CudaMemory {
    allocation: Arc<Allocation>,
}

/// Memory of a GPU, which a [`CudaMemory`] names. A stream of another GPU that copies from it keeps
/// it, too.
pub(super) struct Allocation {
    context: Arc<Context>,
    address: sys::CUdeviceptr,
    bytes: usize,
    /// The use of the host memory that it is in, if it is in any.
    registered: Option<Registered>,
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
        Ok(Self { context: Arc::clone(context), address, bytes, registered: None })
    }

    /// Registered host memory at the address that the GPU knows.
    pub(super) fn in_place(
        context: &Arc<Context>,
        registered: Registered,
        address: sys::CUdeviceptr,
        bytes: usize,
    ) -> Self {
        let (context, registered) = (Arc::clone(context), Some(registered));
        Self { context, address, bytes, registered }
    }

    /// True if it is read where it lies, so that nobody may write to it.
    pub(super) fn is_in_place(&self) -> bool {
        self.registered.is_some()
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
            if self.is_in_place() {
                // SAFETY: the stream lives as long as the context. Who unregisters waits for
                // nothing.
                let _ = unsafe { result::stream::synchronize(self.context.stream) };
                return;
            }
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
