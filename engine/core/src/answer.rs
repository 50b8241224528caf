//! From logits to tokens and text: what happens to one answer, on the device and by the whole
//! model.

use hat_plan::TokenId;

use crate::error::{InputError, RequestError};
use crate::metrics::Meter;
use crate::request::{Event, FinishReason, Metrics, Prompt, Request, TokenLogprob};
use crate::sample::{Sampler, log_probabilities};
use crate::stop::StopStrings;

/// The meaning of token ids to an answer.
pub trait Vocabulary {
    /// True if the token ends an answer.
    fn is_end(&self, token: TokenId) -> bool;
    /// The bytes of a token by itself.
    fn token_bytes(&self, token: TokenId) -> &[u8];
    /// The text of an answer to a prompt, before its first token.
    fn spelling(&self, prompt: &Prompt) -> Box<dyn Spelling>;
}

/// The text of tokens that come one by one.
pub trait Spelling: Send {
    /// Takes a token; gives the text that is certain now.
    fn push(&mut self, token: TokenId) -> &str;
    /// Text that was held back, at the end.
    fn finish(&mut self) -> &str;
}

/// Tokens without text: answers are ids, and end at one of these.
#[derive(Clone, Debug, Default)]
pub struct EndTokens(pub Vec<TokenId>);

impl Vocabulary for EndTokens {
    fn is_end(&self, token: TokenId) -> bool {
        self.0.contains(&token)
    }

    fn token_bytes(&self, _: TokenId) -> &[u8] {
        &[]
    }

    fn spelling(&self, _: &Prompt) -> Box<dyn Spelling> {
        Box::new(NoText)
    }
}

struct NoText;

impl Spelling for NoText {
    fn push(&mut self, _: TokenId) -> &str {
        ""
    }

    fn finish(&mut self) -> &str {
        ""
    }
}

/// A request, checked, with the ids of its prompt.
#[derive(Debug)]
pub struct Prepared {
    /// The prompt, template included.
    pub prompt: Vec<TokenId>,
    /// Most tokens of the answer; at least 1, and within the context.
    pub max_tokens: u32,
    /// The request itself.
    pub request: Request,
}

impl Request {
    /// Refuses what no model could answer: fields out of their ranges, as far as these don't
    /// depend on the model.
    ///
    /// # Errors
    /// [`InputError::Field`].
    pub fn check(&self) -> Result<(), InputError> {
        self.check_for(usize::MAX)
    }

    /// As [`Request::check`], for a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// [`InputError::Field`].
    pub fn check_for(&self, vocab_size: usize) -> Result<(), InputError> {
        self.sampler.check(vocab_size)?;
        StopStrings::new(self.stop.clone())?;
        if self.max_tokens == Some(0) {
            return Err(InputError::field("max_tokens", "0 asks for nothing; at least 1"));
        }
        if self.top_logprobs.is_some_and(|top| top > TOP_LOGPROBS_MAX) {
            let reason = format!("more than {TOP_LOGPROBS_MAX} alternatives");
            return Err(InputError::field("top_logprobs", reason));
        }
        Ok(())
    }
}

impl Prepared {
    /// Checks a request whose prompt has these ids, for a model of `vocab_size` tokens and
    /// sessions of `context` positions.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn new(
        request: Request,
        prompt: Vec<TokenId>,
        vocab_size: usize,
        context: u32,
    ) -> Result<Self, InputError> {
        request.check_for(vocab_size)?;
        if prompt.len() >= context as usize {
            let (prompt, context) = (prompt.len(), context as usize);
            return Err(InputError::ContextLength { prompt, context });
        }
        if let Some(token) = prompt.iter().find(|token| **token as usize >= vocab_size) {
            let reason = format!("token id {token} is not below the {vocab_size} there are");
            return Err(InputError::field("prompt", reason));
        }
        if prompt.is_empty() {
            return Err(InputError::field("prompt", "it has no token; give at least one"));
        }
        let room = context - u32::try_from(prompt.len()).expect("below the context");
        let max_tokens = request.max_tokens.unwrap_or(room).min(room);
        Ok(Self { prompt, max_tokens, request })
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn prompt_n(&self) -> u32 {
        u32::try_from(self.prompt.len()).expect("below the context")
    }

    /// Positions that a session for this request needs.
    #[must_use]
    pub fn rows_max(&self) -> u32 {
        self.prompt_n() + self.max_tokens
    }
}

/// Bytes of text that a token has in the mean: room for an answer's.
const TOKEN_BYTES: usize = 4;

/// Most alternatives that a request may ask for with each token.
pub const TOP_LOGPROBS_MAX: u8 = 20;

/// One answer as it grows.
pub struct Answer {
    max_tokens: u32,
    ignore_eos: bool,
    top_logprobs: Option<u8>,
    tokens: Vec<TokenId>,
    text: String,
    sampler: Sampler,
    spelling: Box<dyn Spelling>,
    stop: StopStrings,
    logits_hash: Option<blake3::Hasher>,
}

/// Result of sampling at one position.
pub struct Emitted {
    /// The token, unless the answer ended without one.
    pub token: Option<TokenId>,
    /// Event to report, if there is one.
    pub event: Option<Event>,
    /// Reason for the end, if this was the last token.
    pub finish: Option<FinishReason>,
}

impl Answer {
    /// The beginning of the answer to `prepared`.
    #[must_use]
    pub fn new(prepared: &Prepared, vocabulary: &dyn Vocabulary, vocab_size: usize) -> Self {
        let request = &prepared.request;
        let mut sampler = Sampler::new(request.sampler.clone(), vocab_size, request.choice)
            .expect("checked when the request was prepared");
        for token in &prepared.prompt {
            sampler.accept(*token);
        }
        Self {
            max_tokens: prepared.max_tokens,
            ignore_eos: request.ignore_eos,
            top_logprobs: request.top_logprobs,
            tokens: Vec::with_capacity(prepared.max_tokens as usize),
            text: String::with_capacity(TOKEN_BYTES * prepared.max_tokens as usize),
            sampler,
            spelling: vocabulary.spelling(&request.prompt),
            stop: StopStrings::new(request.stop.clone()).expect("checked when it was prepared"),
            logits_hash: request.hash_logits.then(blake3::Hasher::new),
        }
    }

    /// Tokens emitted so far.
    #[must_use]
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Its costs, and the answer itself as a whole. `logits_blake3` is over the little-endian
    /// f32 logits of each position so far.
    #[must_use]
    pub fn metrics(&self, meter: &Meter) -> Metrics {
        Metrics {
            timings: meter.timings(),
            token_ids: self.tokens.clone(),
            text: self.text.clone(),
            logits_blake3: self.logits_hash.as_ref().map(|it| it.finalize().to_hex().to_string()),
        }
    }

    /// True if it needs nothing but the token with the largest logit: see
    /// [`Answer::take_argmax`].
    #[must_use]
    pub fn wants_argmax(&self) -> bool {
        self.sampler.config().is_plain_greedy()
            && self.logits_hash.is_none()
            && self.top_logprobs.is_none()
    }

    /// Takes the logits that follow `position`, and decides the next token.
    ///
    /// # Errors
    /// [`RequestError::NotFinite`].
    pub fn take(
        &mut self,
        logits: &[f32],
        position: u32,
        vocabulary: &dyn Vocabulary,
    ) -> Result<Emitted, RequestError> {
        if let Some(hash) = &mut self.logits_hash {
            hash.update(bytemuck::cast_slice(logits));
        }
        let choice = self
            .sampler
            .choose(logits, position + 1)
            .map_err(|_| RequestError::NotFinite { position })?;
        let token = choice.token;
        let logprobs = match self.top_logprobs {
            Some(top) => Some(Self::logprobs(logits, position, token, top, vocabulary)?),
            None => None,
        };
        Ok(self.emit(token, logprobs, vocabulary))
    }

    /// Takes the token with the largest logit as the next, where [`Answer::wants_argmax`].
    pub fn take_argmax(&mut self, token: TokenId, vocabulary: &dyn Vocabulary) -> Emitted {
        self.emit(token, None, vocabulary)
    }

    /// The next token is decided: what it leads to.
    fn emit(
        &mut self,
        token: TokenId,
        logprobs: Option<(TokenLogprob, Vec<TokenLogprob>)>,
        vocabulary: &dyn Vocabulary,
    ) -> Emitted {
        if vocabulary.is_end(token) && !self.ignore_eos {
            return Emitted { token: None, event: None, finish: Some(FinishReason::Stop) };
        }
        self.sampler.accept(token);
        self.tokens.push(token);
        let text = self.stop.push(self.spelling.push(token)).to_owned();
        self.text.push_str(&text);
        let finish = if self.stop.is_stopped() {
            Some(FinishReason::Stop)
        } else if self.tokens.len() >= self.max_tokens as usize {
            Some(FinishReason::Length)
        } else {
            None
        };
        let event = Event::Token { token, text, logprobs };
        Emitted { token: Some(token), event: Some(event), finish }
    }

    /// Text that was held back and is certain at the end.
    pub fn finish(&mut self) -> String {
        if self.stop.is_stopped() {
            return String::new();
        }
        let mut text = self.stop.push(self.spelling.finish()).to_owned();
        text.push_str(self.stop.finish());
        self.text.push_str(&text);
        text
    }

    fn logprobs(
        logits: &[f32],
        position: u32,
        token: TokenId,
        top: u8,
        vocabulary: &dyn Vocabulary,
    ) -> Result<(TokenLogprob, Vec<TokenLogprob>), RequestError> {
        let named = |(token, logprob): (TokenId, f32)| TokenLogprob {
            token,
            text: String::from_utf8_lossy(vocabulary.token_bytes(token)).into_owned(),
            logprob: f64::from(logprob),
        };
        let mut likeliest = Vec::with_capacity(usize::from(top) + 1);
        let chosen = log_probabilities(logits, position, token, usize::from(top), &mut likeliest)
            .map_err(|_| RequestError::NotFinite { position })?;
        Ok((named((token, chosen)), likeliest.into_iter().map(named).collect()))
    }
}
