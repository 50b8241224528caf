//! The loader from outside: files that are good, and each way of being bad.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod adapter;
mod bundle;
mod bundle_lies;
mod checkpoint;
#[path = "../files/mod.rs"]
mod files;
mod fuzz;
mod generated;
mod gguf;
mod gguf_lies;
mod gguf_parts;
mod gguf_types;
mod layout;
mod sampling;
mod schemes;
mod start_up;
mod verify;
