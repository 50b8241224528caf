//! CUDA kernels and their safe launchers. Knows no model, layer or session: slices and numbers.
//!
//! This crate is a leaf and still empty: the kernels come with the CUDA issue.
