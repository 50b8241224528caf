//! CUDA kernels and their safe launchers. Knows no model, layer or session: slices and numbers.
//!
//! - [`gpu`] is the seam: memory and launches. `driver` (feature `cuda`) stands behind it with a
//!   real GPU, whose driver is looked for at run time; `testkit` (a feature) has an emulator that
//!   runs the kernels on the CPU, and kernels for tests and benches alone.
//! - One module for each kernel file, with its stem, and [`product`] for the three that multiply
//!   with weights: shapes are asserted there, above the launch.
//! - [`kernel`] names them all; `kernels/gen/` holds what `hat-kernels` compiled of them.
//!
//! `docs/KERNELS.md` says which parts are emulated and compiled, `HARDWARE.md` which ran on a GPU.
//! The crate opens `unsafe`: launchers and what stands below them are where pointers leave Rust.

#![expect(unsafe_code, reason = "launches kernels and calls C libraries")]

#[rustfmt::skip] // made by bindgen, compared byte for byte
#[cfg_attr(not(feature = "testkit"), allow(dead_code, reason = "tests launch two of the kernels"))]
mod abi;
#[cfg(feature = "cuda")]
pub mod artefact;
pub mod attend;
pub mod bound;
#[cfg(feature = "cuda")]
pub mod driver;
pub mod embed;
pub mod gpu;
pub mod kernel;
pub mod kv;
pub mod plan;
pub mod product;
pub mod quantise_rows;
pub mod rms_norm;
pub mod rope_angles;
pub mod rope_append;
pub mod silu_mul;
pub mod table;
#[cfg(feature = "testkit")]
pub mod testkit;
pub mod top_k;
