//! Backends, and the decoder-only models that run on them.
//!
//! [`backend`] is the seam under the model, one method for each kernel. [`DeviceModel`],
//! [`MiddleModel`] and [`DraftModel`] are the submodels over any backend, behind the traits of
//! [`hat_plan`]; [`WholeModel`] is the yardstick. [`open`] chooses a backend and loads them.
//!
//! This crate knows no link, session or text.

pub mod backend;
mod error;
mod model;
pub mod open;

pub use error::{LoadError, StepError, bundle_text};
pub use model::{Cross, Crossing, DeviceModel, DraftModel, MiddleModel, Tensors, WholeModel};
