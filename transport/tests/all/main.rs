//! The protocol and its links from outside: properties over seeds, suites over each link, and
//! `docs/PROTOCOL.md` against the code.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[cfg(feature = "links")]
mod endpoint;
mod history;
#[cfg(feature = "links")]
mod link;
mod pair;
mod protocol;
