//! Requests and their events.

use hat_plan::TokenId;

use crate::draft::DraftMode;
use crate::error::InputError;
use crate::metrics::Timings;
use crate::sample::SamplerConfig;

/// Author of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions; also what the API calls `developer`.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The answer of a tool.
    Tool,
}

impl Role {
    /// The role of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn parse(name: &str) -> Result<Self, InputError> {
        match name {
            "system" | "developer" => Ok(Self::System),
            "user" => Ok(Self::User),
            "assistant" => Ok(Self::Assistant),
            "tool" => Ok(Self::Tool),
            _ => {
                let name: String = name.chars().take(64).collect();
                let reason =
                    format!("{name:?} is none of system, developer, user, assistant, tool");
                Err(InputError::field("messages[].role", reason))
            }
        }
    }

    /// The name that templates compare with.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its author.
    pub role: Role,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message.
    #[must_use]
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

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

/// Events of a generation, in order: any number of tokens, then one `Done`.
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
