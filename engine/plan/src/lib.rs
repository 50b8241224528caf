//! The vocabulary that roles, models and kernels share: which rows are computed, what can go wrong,
//! and the traits of the submodels. No dependency, no computation.
//!
//! An [`AttendBatch`] says which rows attend to which; it is made in [`BatchBuffers`]. K and V
//! live in a store of pages of [`PAGE_SIZE`] rows ([`KvShape`]). [`DeviceForward`],
//! [`MiddleForward`] and [`DraftForward`] are the submodels, whatever backend computes them.

#![forbid(unsafe_code)]

mod attend;
mod buffers;
mod fault;
mod model;
mod shared_rows;

pub use attend::{AttendBatch, AttendShape, KvShape, PAGE_SIZE, PENDING_ROWS_MAX, RowMove, Write};
pub use buffers::BatchBuffers;
pub use fault::{BackendError, BackendFault};
pub use model::{
    ARITHMETIC_CPU, ARITHMETIC_CUDA, Computes, DeviceForward, DraftForward, Likely, MiddleForward,
    MiddleStep, TokenId,
};
pub use shared_rows::SharedRows;
