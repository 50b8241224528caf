//! Errors of requests: those that are refused, and those that end without an answer.

use hat_plan::BackendFault;

/// A request that no model could answer, or not this one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InputError {
    /// A field is out of range.
    #[error("{field}: {reason}")]
    Field {
        /// The field, as flags, JSON and configuration call it.
        field: &'static str,
        /// The fault, and what would be right.
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
}

impl InputError {
    /// A field that is out of range.
    #[must_use]
    pub fn field(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Field { field, reason: reason.into() }
    }
}

/// Reason that a running request ended without an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The device's model computed something that is no number.
    #[error("the model's output at position {position} is not finite")]
    NotFinite {
        /// Position of the row.
        position: u32,
    },
    /// The cloud is away, or does not keep to the protocol.
    #[error("cloud {peer}: {reason}")]
    Peer {
        /// Its address.
        peer: String,
        /// The event, and the remedy.
        reason: String,
    },
    /// There is no room: in the cloud, or among the requests that wait on the device.
    #[error("busy: {reason}; try again in {retry_after_ms} ms")]
    Busy {
        /// The full place.
        reason: String,
        /// Time after which to try again.
        retry_after_ms: u64,
    },
    /// The device's backend did not compute.
    #[error(transparent)]
    Backend(#[from] BackendFault),
    /// The device stops.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}
