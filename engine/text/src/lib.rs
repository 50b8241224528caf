//! Text to token ids and back: tokenizer, chat template, streaming detokenizer, and the
//! conversations whose ids are known.
//!
//! [`prepare`] makes a request ready for a core; a [`Tokenizer`] is the vocabulary of its answer.

#![forbid(unsafe_code)]

mod history;
mod prepare;
mod token;

pub use history::TokenHistory;
pub use prepare::{BundleTextError, PrepareError, prepare};
pub use token::*;
