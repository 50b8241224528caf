//! Errors of loading a model and of running the whole one.

use std::path::{Path, PathBuf};

use hat_loader::Bundle;
use hat_plan::{BackendError, BackendFault};

/// An error in loading a model.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A field of a configuration is out of range.
    #[error("{field}: {reason}")]
    Field {
        /// The field, as flags and configuration call it.
        field: &'static str,
        /// Its fault, and the value that would be right.
        reason: String,
    },
    /// A bundle cannot be used.
    #[error("bundle {}", bundle_text(path, reason))]
    Bundle {
        /// The bundle's directory.
        path: PathBuf,
        /// The fault, with the names of file and field.
        reason: String,
    },
    /// A backend cannot hold or run this model.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl LoadError {
    pub(crate) fn bundle(bundle: &Bundle, reason: impl ToString) -> Self {
        Self::Bundle { path: bundle.directory().to_path_buf(), reason: reason.to_string() }
    }
}

/// An error in a step of the whole model, which gave no logits.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The model computed something that is no number.
    #[error("the model's output at position {position} is not finite")]
    NotFinite {
        /// Position of the row.
        position: u32,
    },
    /// The backend did not compute it.
    #[error(transparent)]
    Fault(#[from] BackendFault),
}

/// Path and reason of an error in a bundle as one text. The reason may begin with the path: it is
/// said once.
#[must_use]
pub fn bundle_text(path: &Path, reason: &str) -> String {
    let path = path.display().to_string();
    if reason.starts_with(&path) { reason.to_owned() } else { format!("{path}: {reason}") }
}
