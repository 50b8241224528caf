//! The two roles as state machines without IO, and everything that they decide by.
//!
//! [`device::DeviceCore`] and [`cloud::CloudCore`] are told what happened, and when, by `handle_*`;
//! `poll_*` says what is to be done: computations, frames, news, the next timeout. Their owner has
//! the link, the clock, the threads and the model; `hat-engine` is one, simulated time another.
//!
//! | module | content |
//! |---|---|
//! | [`device`], [`cloud`] | requests and sessions of the two roles |
//! | [`draft`] | drafts of the tokens to come |
//! | [`chunk`], [`estimate`] | how a prompt is cut; estimates of device, link and cloud |
//! | [`sched`], [`sequence`], [`page`], [`prefix`] | rows: which run, where, and which are kept |
//! | [`request`], [`answer`], [`sample`], [`metrics`] | from a request to its answer |
//! | [`wire`] | what the two roles say of themselves |
//!
//! There is no tokenizer: an answer speaks of token ids through a [`answer::Vocabulary`]. There is
//! no unsafe code, and `clippy.toml` bans clocks, threads, files, sockets and processes.

#![forbid(unsafe_code)]
// A test is the owner of its core.
#![cfg_attr(test, allow(clippy::disallowed_methods, clippy::disallowed_types))]

pub mod answer;
pub mod chunk;
pub mod cloud;
pub mod device;
pub mod draft;
mod error;
pub mod estimate;
pub mod metrics;
pub mod page;
pub mod prefix;
pub mod request;
pub mod sample;
pub mod sched;
pub mod sequence;
#[cfg(test)]
#[path = "../tests/sink/mod.rs"]
mod sink;
mod stop;
pub mod wire;

pub use error::{InputError, PeerEvent, RequestError};
