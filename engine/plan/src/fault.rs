//! What goes wrong below the model: while it starts, and while it runs.

use std::error::Error;
use std::fmt;

/// Why a backend did not compute what it was asked to.
///
/// The methods of a backend return nothing: a GPU reports a fault in a kernel with a later call, or
/// a later step. So a backend keeps what went wrong, computes nothing more (what is downloaded is
/// NaN), and says so when [`crate::Computes::fault`] asks, once after each step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendFault {
    /// Which backend.
    pub backend: &'static str,
    /// What happened, in one line.
    pub reason: String,
    /// Whether the backend is lost to this process. If not, it goes on with the next step, but
    /// what KV stores hold is not what the plans before said.
    pub lasts: bool,
}

impl fmt::Display for BackendFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.backend, self.reason)
    }
}

impl Error for BackendFault {}

/// Why a backend can't be started, hold a model, or run it.
#[derive(Debug)]
#[non_exhaustive]
pub enum BackendError {
    /// A tensor has a type, layout or shape that this backend has no kernel for.
    Unsupported {
        /// Which backend.
        backend: &'static str,
        /// The tensor's name.
        tensor: String,
        /// What does not fit.
        reason: String,
    },
    /// The backend can't be started as configured.
    Config {
        /// Which backend.
        backend: &'static str,
        /// The field of its configuration.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Memory could not be had.
    OutOfMemory {
        /// Which backend.
        backend: &'static str,
        /// How many bytes were asked for.
        bytes: usize,
        /// What for.
        purpose: &'static str,
    },
    /// It did not compute what it was asked to.
    Fault(BackendFault),
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported { backend, tensor, reason } => {
                write!(f, "{backend}: no kernel for tensor {tensor}: {reason}")
            }
            Self::Config { backend, field, reason } => write!(f, "{backend}: {field}: {reason}"),
            Self::OutOfMemory { backend, bytes, purpose } => {
                write!(f, "{backend}: {bytes} bytes for {purpose} could not be allocated")
            }
            Self::Fault(fault) => fault.fmt(f),
        }
    }
}

impl Error for BackendError {}

impl From<BackendFault> for BackendError {
    fn from(fault: BackendFault) -> Self {
        Self::Fault(fault)
    }
}
