//! The model: a Llama-shaped decoder layer, and the submodels that are runs of it.

mod drafter;
mod llama;
mod submodel;
mod whole;

pub use drafter::DraftModel;
pub use llama::Tensors;
pub use submodel::{DeviceModel, MiddleModel};
pub use whole::{Cross, Crossing, WholeModel};
