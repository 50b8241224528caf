//! What goes wrong below the model while it runs.

/// Why a backend did not compute what it was asked to.
///
/// The methods of [`super::Backend`] return nothing: a GPU reports a fault in a kernel with a later
/// call, or a later step. So a backend keeps what went wrong, computes nothing more (what is
/// downloaded is NaN), and says so when [`super::Backend::fault`] asks, once after each step.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{backend}: {reason}")]
pub struct BackendFault {
    /// Which backend.
    pub backend: &'static str,
    /// What happened, in one line.
    pub reason: String,
    /// Whether the backend is lost to this process. If not, it goes on with the next step, but
    /// what KV stores hold is not what the plans before said.
    pub lasts: bool,
}
