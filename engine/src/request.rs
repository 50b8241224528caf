//! Requests and their events.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};
use hat_plan::TokenId;
use hat_transport::link::Waker;

use crate::Error;
use crate::draft::DraftMode;
use crate::metrics::Timings;
use crate::sample::SamplerConfig;
pub use crate::token::{Message, Role};

/// Input of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prompt {
    /// A conversation, put through the model's chat template.
    Chat(Vec<Message>),
    /// Plain text, without a template (`--raw`, `/v1/completions`).
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<TokenId>),
}

/// A request for one answer. Greedy unless a temperature is set.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Request {
    /// Input of the model.
    pub prompt: Prompt,
    /// Most tokens of the answer; `None` means up to the context's end.
    pub max_tokens: Option<u32>,
    /// Rule that chooses the next token.
    pub sampler: SamplerConfig,
    /// Index among several answers to the same request: part of the noise's counter.
    pub choice: u32,
    /// Strings that end the answer and are not part of it: at most 64, 4,096 bytes in all.
    pub stop: Vec<String>,
    /// Alternatives to report for each token; `None` reports no log-probabilities.
    pub top_logprobs: Option<u8>,
    /// Goes on after an end-of-sequence token (benches, the losslessness tests).
    pub ignore_eos: bool,
    /// Hashes the logits of each emitted position into the metrics' `logits_blake3`.
    pub hash_logits: bool,
    /// Drafting mode. The answer does not depend on it.
    pub draft: DraftMode,
}

impl Request {
    fn with_prompt(prompt: Prompt) -> Self {
        Self {
            prompt,
            max_tokens: None,
            sampler: SamplerConfig::default(),
            choice: 0,
            stop: Vec::new(),
            top_logprobs: None,
            ignore_eos: false,
            hash_logits: false,
            draft: DraftMode::default(),
        }
    }

    /// One user message, through the chat template.
    #[must_use]
    pub fn chat(content: impl Into<String>) -> Self {
        Self::conversation(vec![Message::new(Role::User, content)])
    }

    /// A conversation, through the chat template.
    #[must_use]
    pub fn conversation(messages: Vec<Message>) -> Self {
        Self::with_prompt(Prompt::Chat(messages))
    }

    /// Plain text, without a template.
    #[must_use]
    pub fn text(text: impl Into<String>) -> Self {
        Self::with_prompt(Prompt::Text(text.into()))
    }

    /// Token ids as they are.
    #[must_use]
    pub fn tokens(tokens: Vec<TokenId>) -> Self {
        Self::with_prompt(Prompt::Tokens(tokens))
    }

    /// Most tokens of the answer.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: u32) -> Self {
        self.max_tokens = Some(max_tokens);
        self
    }

    /// Sets the rule that chooses the next token.
    #[must_use]
    pub fn sampler(mut self, sampler: SamplerConfig) -> Self {
        self.sampler = sampler;
        self
    }

    /// A string that ends the answer.
    #[must_use]
    pub fn stop(mut self, stop: impl Into<String>) -> Self {
        self.stop.push(stop.into());
        self
    }

    /// Reports log-probabilities, with `top` alternatives for each token.
    #[must_use]
    pub fn logprobs(mut self, top: u8) -> Self {
        self.top_logprobs = Some(top);
        self
    }

    /// Goes on after an end-of-sequence token.
    #[must_use]
    pub fn ignore_eos(mut self) -> Self {
        self.ignore_eos = true;
        self
    }

    /// Sets the drafting mode.
    #[must_use]
    pub fn draft(mut self, draft: DraftMode) -> Self {
        self.draft = draft;
        self
    }

    /// Hashes the logits of each emitted position.
    #[must_use]
    pub fn hash_logits(mut self) -> Self {
        self.hash_logits = true;
        self
    }
}

/// Reason for the end of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
}

impl FinishReason {
    /// The name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A token with its natural-log probability under the raw logits.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// Its text by itself; half a character shows as U+FFFD.
    pub text: String,
    /// `ln p(token)`.
    pub logprob: f64,
}

/// Events of a [`Generation`], in order: any number of tokens, then one `Done`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// A part of the prompt is computed on the device, and is on its way to the cloud.
    Prefill {
        /// Prompt rows computed so far.
        sent: u32,
        /// Prompt rows in all.
        total: u32,
    },
    /// One token. Its text is empty while a character or a stop string may still be incomplete.
    Token {
        /// The token.
        token: TokenId,
        /// Text that is certain now.
        text: String,
        /// The token's log-probability and its alternatives, if asked for.
        logprobs: Option<(TokenLogprob, Vec<TokenLogprob>)>,
    },
    /// The end.
    Done {
        /// Text that was held back until the end.
        text: String,
        /// Reason for the end.
        finish_reason: FinishReason,
        /// The figures of this request.
        metrics: Box<Metrics>,
    },
}

/// An answer on its way: an iterator of [`Event`]s. Dropping it cancels the request on both sides.
pub struct Generation {
    pub(crate) events: Receiver<Result<Event, Error>>,
    pub(crate) prompt_tokens: usize,
    /// Guard that is held for its drop.
    pub(crate) _cancel: CancelOnDrop,
    pub(crate) finished: bool,
}

/// Tells the engine thread that nobody listens any more.
pub(crate) struct CancelOnDrop {
    pub(crate) cancelled: Arc<AtomicBool>,
    pub(crate) waker: Waker,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Release);
        self.waker.wake();
    }
}

impl Generation {
    /// Tokens of the prompt, template included.
    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// The next event if there is one already.
    pub fn try_next(&mut self) -> Option<Result<Event, Error>> {
        if self.finished {
            return None;
        }
        let event = self.events.try_recv().ok()?;
        Some(self.note(event))
    }

    /// The next event, waiting at most `timeout`; `None` if there was none, or none will come
    /// (see [`Generation::is_finished`]).
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<Result<Event, Error>> {
        if self.finished {
            return None;
        }
        match self.events.recv_timeout(timeout) {
            Ok(event) => Some(self.note(event)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(self.note(Err(stopped()))),
        }
    }

    /// True if the last event has been given out.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    fn note(&mut self, event: Result<Event, Error>) -> Result<Event, Error> {
        self.finished = !matches!(event, Ok(Event::Prefill { .. } | Event::Token { .. }));
        event
    }
}

impl Iterator for Generation {
    type Item = Result<Event, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finished {
            return None;
        }
        let event = self.events.recv().unwrap_or_else(|_| Err(stopped()));
        Some(self.note(event))
    }
}

fn stopped() -> Error {
    Error::Stopped("its thread ended before the answer did".into())
}

/// Costs of one answer, and the answer itself once more as a whole.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Metrics {
    /// The text.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<TokenId>,
    /// The figures.
    pub timings: Timings,
    /// BLAKE3 over the logits of each emitted position, in hex, if the request asked for it.
    pub logits_blake3: Option<String>,
}
