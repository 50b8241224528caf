//! CUDA kernels and their safe launchers. Knows no model, layer or session: slices and numbers.
//!
//! - [`gpu`] is the seam: memory and launches. `Emulator` (feature `emulator`) runs the kernels
//!   on the CPU, for tests.
//! - One module for each kernel file, with its stem: shapes are asserted there, above the launch.
//! - [`kernel`] names them all; `kernels/gen/` holds what `hat-kernels` compiled of them.
//! - `nvrtc` (feature `nvrtc`) is the compiler behind `hat-kernels`.
//!
//! What is emulated, what is compiled and what has run on a GPU is said in `docs/KERNELS.md`.
//! The crate opens `unsafe`: launchers and what stands below them are where pointers leave Rust.

#![expect(unsafe_code, reason = "launches kernels and calls C libraries")]

#[rustfmt::skip] // made by bindgen, compared byte for byte
mod abi;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod gpu;
pub mod kernel;
#[cfg(feature = "nvrtc")]
pub mod nvrtc;
pub mod rms_norm;
