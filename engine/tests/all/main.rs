//! The engine from outside: one binary, so that it is linked once. A test with a binary of its own
//! has its reason in `Cargo.toml`.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod backend_faults;
#[cfg(feature = "daemon")]
mod chat;
mod chunk_cap;
mod codecs;
#[cfg(feature = "daemon")]
mod cuda_processes;
mod deadlines;
#[cfg(feature = "daemon")]
mod files;
#[cfg(feature = "daemon")]
mod flags;
#[cfg(feature = "daemon")]
mod forged_turn;
mod golden;
#[cfg(feature = "daemon")]
mod half_written;
mod hellos;
#[cfg(feature = "http")]
mod http;
mod limits;
#[cfg(feature = "daemon")]
mod models;
mod no_numbers;
mod outages;
#[cfg(feature = "daemon")]
mod output;
mod overload;
mod prefix;
#[cfg(feature = "daemon")]
mod processes;
#[cfg(feature = "daemon")]
mod prompt;
mod roles;
mod stuck;
#[path = "../support/mod.rs"]
mod support;
mod tree;
