//! One error for the library, and what an embedder should do about it.

use std::path::Path;

use hat_compute::{LoadError, StepError};
use hat_core::{InputError, RequestError};
use hat_plan::BackendFault;

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

/// An error of the library.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of a request or configuration is out of range.
    #[error("{field}: {reason}")]
    Field {
        /// The field, as flags, JSON and configuration call it.
        field: &'static str,
        /// Description of the fault, and of a valid value.
        reason: String,
    },
    /// The prompt does not fit the model's context.
    #[error(
        "the prompt has {prompt} tokens, but the context holds {context} \
         and at least one is needed for the answer: shorten the prompt"
    )]
    ContextLength {
        /// Tokens of the prompt.
        prompt: usize,
        /// Positions of the model or of the session limit, whichever is less.
        context: usize,
    },
    /// The chat template refused the messages, or there is none.
    #[error("chat template: {0}")]
    Template(String),
    /// The model's chat template does not end; other prompts work.
    #[error("chat template: {0}")]
    TemplateHangs(String),
    /// Too many requests at once.
    #[error("busy: {reason}; try again in {retry_after_ms} ms")]
    Busy {
        /// Description of the limit that is reached.
        reason: String,
        /// Time after which it is worth trying again.
        retry_after_ms: u64,
    },
    /// The cloud cannot be reached, or went away and did not come back in time.
    #[error("cloud {peer}: {reason}")]
    Peer {
        /// Its address.
        peer: String,
        /// Description of the event, and the remedy.
        reason: String,
    },
    /// A bundle cannot be used, or a backend cannot hold its model.
    #[error(transparent)]
    Load(LoadError),
    /// A backend did not compute.
    #[error(transparent)]
    Backend(#[from] BackendFault),
    /// The operating system said no.
    #[error("{action}: {source}")]
    Io {
        /// Action that was tried.
        action: String,
        /// Its answer.
        source: std::io::Error,
    },
    /// The model computed something that is no number.
    #[error("the model's output at position {position} is not finite")]
    NotFinite {
        /// Position of the row.
        position: u32,
    },
    /// The engine's thread has ended.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}

impl From<LoadError> for Error {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Field { field, reason } => Self::Field { field, reason },
            error => Self::Load(error),
        }
    }
}

impl From<StepError> for Error {
    fn from(error: StepError) -> Self {
        match error {
            StepError::NotFinite { position } => Self::NotFinite { position },
            StepError::Fault(fault) => Self::Backend(fault),
        }
    }
}

impl From<InputError> for Error {
    fn from(error: InputError) -> Self {
        match error {
            InputError::Field { field, reason } => Self::Field { field, reason },
            InputError::ContextLength { prompt, context } => {
                Self::ContextLength { prompt, context }
            }
        }
    }
}

impl From<RequestError> for Error {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::NotFinite { position } => Self::NotFinite { position },
            RequestError::Peer { peer, reason, .. } => Self::Peer { peer, reason },
            RequestError::Busy { reason, retry_after_ms } => Self::Busy { reason, retry_after_ms },
            RequestError::Backend(fault) => Self::Backend(fault),
            RequestError::Stopped(reason) => Self::Stopped(reason),
        }
    }
}

impl Error {
    /// The remedy.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Field { .. } | Self::ContextLength { .. } | Self::Template(_) => ErrorKind::Input,
            Self::Busy { .. } => ErrorKind::Busy,
            Self::Peer { .. } => ErrorKind::Peer,
            Self::Load(_) | Self::Backend(_) | Self::Io { .. } | Self::TemplateHangs(_) => {
                ErrorKind::Resource
            }
            Self::NotFinite { .. } | Self::Stopped(_) => ErrorKind::Broken,
        }
    }

    /// Milliseconds after which a [`ErrorKind::Busy`] request is worth another try.
    #[must_use]
    pub fn retry_after_ms(&self) -> Option<u64> {
        match self {
            Self::Busy { retry_after_ms, .. } => Some(*retry_after_ms),
            _ => None,
        }
    }

    pub(crate) fn field(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Field { field, reason: reason.into() }
    }

    pub(crate) fn bundle(path: &Path, reason: impl ToString) -> Self {
        Self::Load(LoadError::Bundle { path: path.to_owned(), reason: reason.to_string() })
    }

    pub(crate) fn io(action: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { action: action.into(), source }
    }
}
