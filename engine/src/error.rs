//! One error for the library, and what an embedder should do about it.

use std::path::Path;

use hat_compute::{LoadError, StepError};
use hat_core::{InputError, RequestError};

/// Remedy for an [`Error`]. Retrying is right for [`ErrorKind::Busy`] and [`ErrorKind::Peer`]
/// alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request is wrong; the message names the field.
    Input,
    /// There is no room now; try again after [`Error::retry_after_ms`].
    Busy,
    /// The other side is away, speaks another language, or holds another model.
    Peer,
    /// A file, memory or a thread could not be had.
    Resource,
    /// The engine has stopped; open a new one.
    Broken,
}

/// An error of the library. Each variant holds the error of the part that it comes from.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of a request or configuration is out of range, or the prompt does not fit.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The chat template refused the messages, or there is none.
    #[error("chat template: {0}")]
    Template(String),
    /// The model's chat template does not end; other prompts work.
    #[error("chat template: {0}")]
    TemplateHangs(String),
    /// A request ended without an answer, or was not taken.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A bundle cannot be used, or a backend cannot hold its model.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The operating system said no.
    #[error("{action}: {source}")]
    Io {
        /// Action that was tried.
        action: String,
        /// Its answer.
        source: std::io::Error,
    },
}

impl From<StepError> for Error {
    fn from(error: StepError) -> Self {
        Self::Request(match error {
            StepError::NotFinite { position } => RequestError::NotFinite { position },
            StepError::Fault(fault) => fault.into(),
        })
    }
}

impl Error {
    /// The remedy.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Input(_) | Self::Template(_) | Self::Load(LoadError::Field { .. }) => {
                ErrorKind::Input
            }
            Self::Request(error) => match error {
                RequestError::Busy { .. } => ErrorKind::Busy,
                RequestError::Peer { .. } => ErrorKind::Peer,
                RequestError::Backend(_) => ErrorKind::Resource,
                RequestError::NotFinite { .. } | RequestError::Stopped(_) => ErrorKind::Broken,
            },
            Self::Load(_) | Self::Io { .. } | Self::TemplateHangs(_) => ErrorKind::Resource,
        }
    }

    /// Milliseconds after which a [`ErrorKind::Busy`] request is worth another try.
    #[must_use]
    pub fn retry_after_ms(&self) -> Option<u64> {
        match self {
            Self::Request(RequestError::Busy { retry_after_ms, .. }) => Some(*retry_after_ms),
            _ => None,
        }
    }

    pub(crate) fn field(field: &'static str, reason: impl Into<String>) -> Self {
        InputError::field(field, reason).into()
    }

    pub(crate) fn stopped(reason: impl Into<String>) -> Self {
        RequestError::Stopped(reason.into()).into()
    }

    pub(crate) fn bundle(path: &Path, reason: impl ToString) -> Self {
        LoadError::Bundle { path: path.to_owned(), reason: reason.to_string() }.into()
    }

    pub(crate) fn io(action: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { action: action.into(), source }
    }
}
