//! The model: a Llama-shaped decoder layer, and the submodels that are runs of it.

mod drafter;
mod llama;
mod submodel;
mod whole;

pub use drafter::{DraftForward, DraftModel, Likely};
pub use llama::Tensors;
pub use submodel::{DeviceForward, DeviceModel, MiddleForward, MiddleModel, MiddleStep};
pub use whole::WholeModel;
