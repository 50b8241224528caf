//! Checkpoints and bundles: files of weights as borrowed tensors.
//!
//! What comes in is a Hugging Face directory or a GGUF file; what goes out is a *bundle*, one
//! directory a role, whose tensors are used straight from the memory map.

pub mod layout;
mod tensor;

pub use tensor::{DType, Layout, Tensor, TensorBytes};
