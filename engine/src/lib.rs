//! A large language model split between a device and a cloud.
#![allow(missing_docs)]
pub mod backend;
