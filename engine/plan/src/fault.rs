//! Faults below the model: while it starts, and while it runs.

use std::error::Error;
use std::fmt;

/// A fault of a backend, which did not compute its step.
///
/// The methods of a backend return nothing: a GPU reports a fault in a kernel with a later call, or
/// a later step. So a backend keeps what went wrong, computes nothing more (what is downloaded is
/// NaN), and says so when [`crate::Computes::fault`] asks, once after each step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendFault {
    /// Name of the backend.
    pub backend: &'static str,
    /// Description of the fault, in one line.
    pub reason: String,
    /// True if the backend is lost to this process. If not, it goes on with the next step, but the
    /// content of KV stores is not what the plans before said.
    pub lasts: bool,
}

impl fmt::Display for BackendFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.backend, self.reason)
    }
}

impl Error for BackendFault {}

/// An error in starting a backend, in loading a model into it, or in running the model.
#[derive(Debug)]
#[non_exhaustive]
pub enum BackendError {
    /// A tensor has a type, layout or shape that this backend has no kernel for.
    Unsupported {
        /// Name of the backend.
        backend: &'static str,
        /// The tensor's name.
        tensor: String,
        /// Description of the mismatch.
        reason: String,
    },
    /// The backend can't be started as configured.
    Config {
        /// Name of the backend.
        backend: &'static str,
        /// The field of its configuration.
        field: &'static str,
        /// Description of the fault.
        reason: String,
    },
    /// Memory could not be had.
    OutOfMemory {
        /// Name of the backend.
        backend: &'static str,
        /// Bytes that were asked for.
        bytes: usize,
        /// Purpose of the memory.
        purpose: &'static str,
    },
    /// The backend did not compute its step.
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
