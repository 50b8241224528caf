//! Errors of a model's files, one variant for each way of being wrong.

use std::path::{Path, PathBuf};

use crate::gguf::GgufError;
use crate::header::HeaderError;

/// A hyper-parameter that no model of ours can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct ConfigError {
    /// The key as written in the file, for example `rope_scaling.factor`.
    pub key: String,
    /// Description of the fault, with the value.
    pub reason: String,
}

impl ConfigError {
    pub(crate) fn new(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { key: key.into(), reason: reason.into() }
    }
}

/// An error in opening a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The operating system said no.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its answer.
        error: std::io::Error,
    },
    /// The path is neither a checkpoint directory nor a GGUF file.
    #[error("{}: not a model: {reason}", path.display())]
    NotAModel {
        /// Path that was opened.
        path: PathBuf,
        /// Files that were looked for.
        reason: String,
    },
    /// A file is larger than anything of its kind.
    #[error("{}: {bytes} bytes, at most {bytes_max} are read", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// A JSON file does not parse.
    #[error("{}: {error}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's error, with its place.
        error: serde_json::Error,
    },
    /// A hyper-parameter is impossible or not supported.
    #[error("{}: {error}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Key and reason.
        error: ConfigError,
    },
    /// The header of a safetensors file is wrong.
    #[error("{}: {error}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The header's error.
        error: HeaderError,
    },
    /// A GGUF file is wrong.
    #[error("{}: {error}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// The reader's error.
        error: GgufError,
    },
    /// `model.safetensors.index.json` names a file that it may not, or lies about one.
    #[error("{}: {reason}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// Entry at fault, and why.
        reason: String,
    },
    /// The model needs a tensor that is not there.
    #[error("{}: tensor {name} is missing", path.display())]
    MissingTensor {
        /// Path of the file.
        path: PathBuf,
        /// The checkpoint name.
        name: String,
    },
    /// A tensor is there that no model of this family has.
    #[error("{}: tensor {name} belongs to no {family} model: {reason}", path.display())]
    UnknownTensor {
        /// Path of the file.
        path: PathBuf,
        /// The name in the file.
        name: String,
        /// The family that the configuration names.
        family: &'static str,
        /// Consequence of the fault.
        reason: &'static str,
    },
    /// A tensor has another type or shape than the configuration asks for.
    #[error("{}: tensor {name}: expected {expected}, got {got}", path.display())]
    TensorMismatch {
        /// The file that holds it.
        path: PathBuf,
        /// The checkpoint name.
        name: String,
        /// Types and shape that would do.
        expected: String,
        /// Type and shape in the file.
        got: String,
    },
    /// The tokenizer does not fit the model, or is of an unknown kind.
    #[error("{}: tokenizer: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Description of the mismatch.
        reason: String,
    },
}

impl LoadError {
    pub(crate) fn io(path: &Path, error: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), error }
    }

    pub(crate) fn config(path: &Path, error: ConfigError) -> Self {
        Self::Config { path: path.to_owned(), error }
    }

    pub(crate) fn tokenizer(path: &Path, reason: impl Into<String>) -> Self {
        Self::Tokenizer { path: path.to_owned(), reason: reason.into() }
    }
}
