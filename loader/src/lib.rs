//! Checkpoints and bundles: files of weights as borrowed tensors.
//!
//! The input is a Hugging Face directory or a GGUF file, a [`SourceModel`]; the output is a
//! *bundle*, one directory a role, whose tensors are used straight from the memory map, a
//! [`Bundle`]. The loader computes nothing with weights except, on request, other storage types
//! for them. It knows no network, no backend and no text.
//!
//! ```
//! use hat_loader::{Bundle, BundleOptions, Role, TinyModel, Weights, generated, write_bundles};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = generated(&TinyModel::default());
//! let parent = tempfile::tempdir()?;
//! let directory = parent.path().join("tiny");
//! let options = BundleOptions { split_layer: 1, tail_layers: 0, weights: Weights::Keep };
//! let report = write_bundles(&model, options, &directory, &mut |_| {})?;
//!
//! let cloud = Bundle::open(&directory.join(Role::Cloud.name()))?;
//! assert_eq!(cloud.model_id(), report.model_id);
//! assert!(cloud.tensor("model.embed_tokens.weight").is_err());
//! # Ok(())
//! # }
//! ```
//!
//! # Mapped files
//! Models and bundles are memory maps. A file must not be changed or shortened while it is open:
//! a shorter file ends the process with `SIGBUS` when the missing part is read. Replace files by
//! renaming, as [`write_bundles`] does. [`Watch`] finds out that a file was changed all the same.

pub mod bundle;
mod checkpoint;
pub mod config;
mod control;
mod drafters;
mod error;
pub mod file;
mod fuzz;
mod generated;
mod gguf;
mod hash;
mod header;
mod keys;
pub mod layout;
#[expect(unsafe_code, reason = "memory maps; the contract is in the module")]
mod map;
mod rows;
mod sampling;
mod schemes;
mod source;
pub mod split;
mod tensor;

pub use bundle::{
    Bundle, BundleError, BundleOptions, DrafterArchitecture, DrafterFile, ModelId, Progress,
    Report, RoleReport, TypeReport, Verified, Watch, Weights, add_drafter, check_same_model,
    write_bundles,
};
pub use config::{Family, LlamaConfig, RopeScaling};
pub use control::{ControlTokens, TextFacts};
pub use drafters::{Drafters, Fitting};
pub use error::{ConfigError, LoadError};
#[doc(hidden)]
pub use fuzz::{fuzz_gguf, fuzz_safetensors_header};
pub use generated::{TinyModel, generated, tiny_bundle};
pub use gguf::{GgufError, gguf_files};
pub use header::HeaderError;
pub use sampling::SamplingDefaults;
pub use source::{SourceModel, TextReport, TokenSettings};
pub use split::{Role, Split, Submodel};
pub use tensor::{DType, Layout, Tensor, TensorBytes};
