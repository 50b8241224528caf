//! The tools as processes.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod link;
mod load;
mod output;
mod split;
