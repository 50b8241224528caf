//! Rows from one GPU to the next: buffers on the GPU that made them, from which the next one
//! copies.
//!
//! A lender waits for its own stream first, so a fault is found by the stage that made it, and
//! the next one needs no event. A buffer is free when nobody else holds it.

use std::sync::Arc;

use hat_cuda::gpu::Gpu;

use super::{Buffer, CudaBackend, start_error};
use crate::backend::{BackendError, SharedRows};

/// The buffers of one backend, and what it has of its neighbour.
pub(super) struct SharedBuffers<M> {
    pool: Vec<Arc<M>>,
    /// Rows whose copy may be on its way. At most one for each step since the last wait.
    borrowed: Vec<SharedRows>,
}

impl<M> Default for SharedBuffers<M> {
    fn default() -> Self {
        Self { pool: Vec::new(), borrowed: Vec::with_capacity(2) }
    }
}

impl<M> SharedBuffers<M> {
    /// The stream was waited for: what was borrowed goes back.
    pub(super) fn give_back(&mut self) {
        self.borrowed.clear();
    }

    /// A buffer that nobody has, out of the pool.
    fn take(&mut self) -> Option<Arc<M>> {
        let free = self.pool.iter_mut().position(|buffer| Arc::get_mut(buffer).is_some());
        free.map(|free| self.pool.swap_remove(free))
    }
}

impl<G: Gpu> CudaBackend<G> {
    pub(super) fn make_lanes(
        &mut self,
        next: &Self,
        bytes: usize,
        count: usize,
    ) -> Result<String, BackendError> {
        let reach = self.gpu.reach(&next.gpu).map_err(start_error)?;
        for _ in 0..count {
            let buffer = self.gpu.alloc(bytes, "rows for the next stage").map_err(start_error)?;
            self.shared_buffers.pool.push(Arc::new(buffer));
        }
        Ok(reach.to_string())
    }

    pub(super) fn lend_rows(
        &mut self,
        rows: usize,
        from: &Buffer<G::Memory>,
    ) -> Option<SharedRows> {
        if self.fault.is_some() {
            return None;
        }
        let mut buffer = self.shared_buffers.take()?;
        let to = Arc::get_mut(&mut buffer).expect("nobody else has it");
        self.queue(|this| {
            this.gpu.copy(4 * rows * from.columns, &from.memory, to)?;
            this.gpu.finish()
        });
        let shared = self.fault.is_none().then(|| {
            self.shared_buffers.give_back();
            SharedRows::new(&buffer)
        });
        self.shared_buffers.pool.push(buffer);
        shared
    }

    pub(super) fn borrow_rows(
        &mut self,
        rows: usize,
        shared: SharedRows,
        to: &mut Buffer<G::Memory>,
    ) {
        let bytes = 4 * rows * to.columns;
        self.queue(|this| {
            let from = shared.rows::<G::Memory>().expect("lent by a backend of this type");
            this.gpu.fetch(bytes, from, &mut to.memory)
        });
        self.shared_buffers.borrowed.push(shared);
    }

    /// After a step that was not computed: nothing of it reads what was borrowed any more.
    pub(super) fn give_back_after_fault(&mut self) {
        if !self.shared_buffers.borrowed.is_empty() {
            let _ = self.gpu.finish();
            self.shared_buffers.give_back();
        }
    }
}
