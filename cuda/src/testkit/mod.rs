//! The harness of tests and benches, no part of the product: the kernels on the CPU, one type for a
//! GPU or for them, and kernels that no model launches.

pub mod emulator;
pub mod fragments;
pub mod peak;
#[cfg(feature = "cuda")]
pub mod test_gpu;
