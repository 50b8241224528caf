//! The protocol and its links from outside: properties over seeds, suites over each link, and
//! `docs/PROTOCOL.md` against the code.

#[cfg(feature = "links")]
mod endpoint;
mod history;
#[cfg(feature = "links")]
mod link;
mod pair;
mod protocol;
