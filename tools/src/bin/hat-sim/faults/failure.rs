//! Invariants that did not hold.

use std::fmt;
use std::time::Duration;

use hat_core::RequestError;
use hat_plan::TokenId;
use hat_transport::message::SessionErrorCode;

use crate::bed::Node;

/// A breach of an invariant in a seed's simulation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// An answer, or a part of one, is not that of the whole model.
    Text { request: usize, right: Vec<TokenId>, got: Vec<TokenId> },
    /// A request ends with an error that nothing in the schedule explains.
    Error { request: usize, error: RequestError },
    /// A request does not end, so long after the last trouble.
    Endless { request: usize, waited: Duration },
    /// Resources are held that nobody needs.
    Kept(Vec<String>),
    /// An honest cloud accuses an honest device.
    Accused { device: usize, code: SessionErrorCode, text: String },
    /// A process takes turn after turn, and time stands still.
    Spins(Node),
    /// Nothing happens any more.
    Still,
    /// A panic.
    Panics { at: String, text: String },
    /// A model can't be made.
    Model(String),
}

impl Failure {
    /// True if it is the same kind of breach.
    pub fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}
