//! Errors of reading or writing a bundle.

use std::path::{Path, PathBuf};

use super::ModelId;
use crate::error::{ConfigError, LoadError};
use crate::header::HeaderError;

/// An error in writing, opening or verifying a bundle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The operating system said no.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Its answer.
        error: std::io::Error,
    },
    /// The directory is no bundle.
    #[error("{}: no bundle: {reason}", path.display())]
    NotABundle {
        /// The directory.
        path: PathBuf,
        /// File that was looked for, and where it may be.
        reason: String,
    },
    /// The directory that is to be written exists.
    #[error("{}: exists and is not empty; remove it or choose another", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// A file is larger than anything of its kind.
    #[error("{}: larger than the {bytes_max} bytes that are read", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        bytes_max: u64,
    },
    /// A file has another size than the manifest says.
    #[error(
        "{}: {got} bytes, the manifest says {expected}; remove the bundle and split again",
        path.display()
    )]
    FileSize {
        /// The file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes of the file.
        got: u64,
    },
    /// A file has other content than the manifest says.
    #[error(
        "{}: not the content that was split: BLAKE3 {got}, the manifest says {expected}; \
         remove the bundle and split again",
        path.display()
    )]
    FileHash {
        /// The file.
        path: PathBuf,
        /// Hash by the manifest.
        expected: String,
        /// Hash of the file.
        got: String,
    },
    /// `bundle.json` or another JSON file does not parse.
    #[error("{}: {error}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The parser's error, with its place.
        error: serde_json::Error,
    },
    /// The bundle is of another format.
    #[error(
        "{}: format_version {got}, this program reads {oldest} to {newest}; run hat-split again",
        path.display()
    )]
    FormatVersion {
        /// The manifest.
        path: PathBuf,
        /// The oldest that we read.
        oldest: u64,
        /// The newest that we read.
        newest: u64,
        /// The value found.
        got: String,
    },
    /// The manifest contradicts itself or the model.
    #[error("{}: {error}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Key and reason.
        error: ConfigError,
    },
    /// The header of the weights is wrong.
    #[error("{}: {error}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The header's error.
        error: HeaderError,
    },
    /// A tensor is not stored as the manifest says.
    #[error("{}: tensor {name}: expected {expected}, got {got}", path.display())]
    TensorMismatch {
        /// The file.
        path: PathBuf,
        /// The checkpoint name.
        name: String,
        /// Type, shape and place by the manifest.
        expected: String,
        /// Type, shape and place in the file.
        got: String,
    },
    /// A tensor that the role needs is not there.
    #[error("{}: tensor {name} is missing", path.display())]
    MissingTensor {
        /// Path of the file.
        path: PathBuf,
        /// The checkpoint name.
        name: String,
    },
    /// A tensor is there that the manifest doesn't know.
    #[error("{}: tensor {name} is not in the manifest of this {role} bundle", path.display())]
    UnknownTensor {
        /// Path of the file.
        path: PathBuf,
        /// Its name.
        name: String,
        /// The bundle's role.
        role: &'static str,
    },
    /// A tensor can't be converted to the type that was asked for.
    #[error("tensor {name} can't become {dtype}: {reason}")]
    Convert {
        /// The checkpoint name.
        name: String,
        /// The type that was asked for.
        dtype: &'static str,
        /// The reason.
        reason: String,
    },
    /// The file of a trained drafter can't be used.
    #[error("{}: {reason}", path.display())]
    Drafter {
        /// The file.
        path: PathBuf,
        /// Description of the fault.
        reason: String,
    },
    /// The two halves are of different models.
    #[error("device and cloud hold different models: {device} and {cloud}")]
    DifferentModels {
        /// The device's model id.
        device: ModelId,
        /// The cloud's.
        cloud: ModelId,
    },
    /// The split leaves the cloud without layers.
    #[error(transparent)]
    Split(ConfigError),
    /// The source model could not be read.
    #[error(transparent)]
    Source(#[from] LoadError),
}

impl BundleError {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Io { path, error }
    }

    /// The error of reading a file of at most `bytes_max` bytes.
    pub(super) fn reading(path: &Path, bytes_max: u64) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |error| match error.kind() {
            std::io::ErrorKind::FileTooLarge => Self::TooLarge { path, bytes_max },
            _ => Self::Io { path, error },
        }
    }

    pub(super) fn manifest(path: &Path) -> impl FnOnce(ConfigError) -> Self {
        let path = path.to_owned();
        move |error| Self::Manifest { path, error }
    }

    pub(super) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Json { path, error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/a/file";

    fn config() -> ConfigError {
        ConfigError::new("key", "reason")
    }

    fn io() -> std::io::Error {
        std::io::ErrorKind::NotFound.into()
    }

    fn json() -> serde_json::Error {
        serde_json::from_str::<u8>("{").expect_err("no number")
    }

    fn text() -> String {
        "text".to_owned()
    }

    fn loading(path: PathBuf) -> Vec<LoadError> {
        let (name, family) = (text(), "llama");
        vec![
            LoadError::Io { path: path.clone(), error: io() },
            LoadError::NotAModel { path: path.clone(), reason: text() },
            LoadError::TooLarge { path: path.clone(), bytes: 2, bytes_max: 1 },
            LoadError::Json { path: path.clone(), error: json() },
            LoadError::Config { path: path.clone(), error: config() },
            LoadError::Header { path: path.clone(), error: HeaderError::TooShort { bytes: 1 } },
            LoadError::Gguf { path: path.clone(), error: crate::GgufError::BigEndian },
            LoadError::Index { path: path.clone(), reason: text() },
            LoadError::MissingTensor { path: path.clone(), name: name.clone() },
            LoadError::UnknownTensor { path: path.clone(), name, family, reason: "reason" },
            LoadError::TensorMismatch {
                path: path.clone(),
                name: text(),
                expected: text(),
                got: text(),
            },
            LoadError::Tokenizer { path, reason: text() },
        ]
    }

    fn of_a_bundle(path: PathBuf) -> Vec<BundleError> {
        let [name, expected, got] = [(); 3].map(|()| text());
        let header = HeaderError::TooShort { bytes: 1 };
        vec![
            BundleError::io(&path)(io()),
            BundleError::NotABundle { path: path.clone(), reason: text() },
            BundleError::Exists { path: path.clone() },
            BundleError::TooLarge { path: path.clone(), bytes_max: 1 },
            BundleError::FileSize { path: path.clone(), expected: 2, got: 1 },
            BundleError::FileHash { path: path.clone(), expected: text(), got: text() },
            BundleError::json(&path)(json()),
            BundleError::FormatVersion { path: path.clone(), oldest: 1, newest: 2, got: text() },
            BundleError::manifest(&path)(config()),
            BundleError::Header { path: path.clone(), error: header },
            BundleError::TensorMismatch { path: path.clone(), name, expected, got },
            BundleError::MissingTensor { path: path.clone(), name: text() },
            BundleError::UnknownTensor { path: path.clone(), name: text(), role: "device" },
            BundleError::Drafter { path, reason: text() },
        ]
    }

    #[test]
    fn an_error_of_a_file_begins_with_its_path_and_names_it_once() {
        let loading = loading(PATH.into()).into_iter().map(BundleError::from);
        for error in loading.chain(of_a_bundle(PATH.into())) {
            let said = error.to_string();
            assert!(said.starts_with(&format!("{PATH}: ")), "{said}");
            assert_eq!(said.matches(PATH).count(), 1, "{said}");
            let mut parts: Vec<&str> = said.split(": ").collect();
            parts.sort_unstable();
            assert!(parts.windows(2).all(|pair| pair[0] != pair[1]), "{said}");
        }
    }
}
