//! Points in a stream's work, and the GPU's own time between them.

use std::sync::Arc;

use cudarc::driver::result::event;
use cudarc::driver::sys;

use super::{Context, Cuda};
use crate::gpu::GpuError;

/// A point in the work of a GPU.
pub struct Mark {
    context: Arc<Context>,
    event: sys::CUevent,
}

// SAFETY: the driver's handles may be used from any thread in which the context is current.
unsafe impl Send for Mark {}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: it was made once for this context, which lives. The driver keeps what its
            // stream still has to do with it.
            let _ = unsafe { event::destroy(self.event) };
        }
    }
}

impl Cuda {
    /// A point behind all work so far.
    ///
    /// # Errors
    /// If the GPU is lost, or an error of work before this is found.
    pub fn mark(&mut self) -> Result<Mark, GpuError> {
        self.lost()?;
        self.with_queue(super::Queue::flush)?;
        let made = event::create(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC);
        let event = self.check("cuEventCreate", made)?;
        let mark = Mark { context: Arc::clone(&self.context), event };
        // SAFETY: both were made for this context and live.
        let recorded = unsafe { event::record(event, self.context.stream) };
        self.check("cuEventRecord", recorded)?;
        Ok(mark)
    }

    /// Seconds of the GPU from one mark to a later one. Waits for the work between.
    ///
    /// # Errors
    /// As [`Cuda::mark`].
    pub fn seconds_between(&mut self, from: &Mark, to: &Mark) -> Result<f64, GpuError> {
        use crate::gpu::Gpu as _;
        self.finish()?;
        // SAFETY: both events live and were recorded.
        let elapsed = unsafe { event::elapsed(from.event, to.event) };
        Ok(f64::from(self.check("cuEventElapsedTime", elapsed)?) / 1e3)
    }
}
