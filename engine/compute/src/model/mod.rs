//! The model: a Llama-shaped decoder layer, and the submodels that are runs of it.

/// A model says of itself what its backend says.
macro_rules! as_its_backend {
    ($model:ident) => {
        impl<B: Backend> hat_plan::Computes for $model<B> {
            fn describe(&self) -> String {
                self.backend.describe()
            }

            fn arithmetic_id(&self) -> u32 {
                self.backend.arithmetic_id()
            }

            fn fault(&mut self) -> Option<hat_plan::BackendFault> {
                self.backend.fault()
            }
        }
    };
}

mod drafter;
mod llama;
mod submodel;
mod whole;

pub use drafter::DraftModel;
pub use llama::Tensors;
pub use submodel::{DeviceModel, MiddleModel};
pub use whole::{Cross, Crossing, WholeModel};
