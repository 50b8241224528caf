//! From logits to text: what happens to one answer on the device, and in `--whole` alike.

use std::sync::{Mutex, PoisonError};

use hat_loader::LlamaConfig;
use hat_plan::TokenId;

use crate::error::RequestError;
use crate::request::{FinishReason, Prompt, Request, TokenLogprob};
use crate::sample::{Sampler, log_probabilities};
use crate::stop::StopStrings;
use crate::token::{ChatOptions, ChatText, Detokenizer, Special, SpecialText, Start, Tokenizer};
use crate::turns::Turns;
use crate::{Error, Event};

/// A request, checked and tokenised: what the engine thread takes.
#[derive(Debug)]
pub struct Prepared {
    /// The prompt, template included.
    pub prompt: Vec<TokenId>,
    /// The text of a conversation.
    pub rendered: Option<ChatText>,
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
    /// [`Error::Field`].
    pub fn check(&self) -> Result<(), Error> {
        self.sampler.check(usize::MAX).map_err(|error| {
            Error::field(error.field, format!("{} is not in {}", error.value, error.range))
        })?;
        StopStrings::new(self.stop.clone()).map_err(|error| {
            Error::field("stop", format!("{} is not in {}", error.value, error.range))
        })?;
        if self.max_tokens == Some(0) {
            return Err(Error::field("max_tokens", "0 asks for nothing; at least 1"));
        }
        if self.top_logprobs.is_some_and(|top| top > TOP_LOGPROBS_MAX) {
            let reason = format!("more than {TOP_LOGPROBS_MAX} alternatives");
            return Err(Error::field("top_logprobs", reason));
        }
        Ok(())
    }
}

impl Prepared {
    /// Checks and tokenises a request.
    ///
    /// # Errors
    /// [`Error::Field`], [`Error::Template`] or [`Error::ContextLength`].
    pub fn new(
        request: Request,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        context: u32,
    ) -> Result<Self, Error> {
        Self::following(request, tokenizer, vocab_size, context, &Mutex::default())
    }

    /// As [`Prepared::new`]; a conversation that goes on from one of `turns` keeps its ids.
    ///
    /// # Errors
    /// As [`Prepared::new`].
    pub(crate) fn following(
        request: Request,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        context: u32,
        turns: &Mutex<Turns>,
    ) -> Result<Self, Error> {
        request.sampler.check(vocab_size).map_err(|error| {
            Error::field(error.field, format!("{} is not in {}", error.value, error.range))
        })?;
        request.check()?;
        let too_long = |prompt| Error::ContextLength { prompt, context: context as usize };
        // What can't fit is not looked at: the limit on text stands in front of the tokenizer.
        if let Prompt::Tokens(tokens) = &request.prompt
            && tokens.len() >= context as usize
        {
            return Err(too_long(tokens.len()));
        }
        let (prompt, rendered) = encode(&request.prompt, tokenizer, vocab_size, turns)?;
        if prompt.is_empty() {
            return Err(Error::field("prompt", "it has no token; give at least one"));
        }
        if prompt.len() >= context as usize {
            return Err(too_long(prompt.len()));
        }
        let room = context - u32::try_from(prompt.len()).expect("below the context");
        let max_tokens = request.max_tokens.unwrap_or(room).min(room);
        Ok(Self { prompt, rendered, max_tokens, request })
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

/// Most alternatives that a request may ask for with each token.
pub const TOP_LOGPROBS_MAX: u8 = 20;

fn encode(
    prompt: &Prompt,
    tokenizer: &Tokenizer,
    vocab_size: usize,
    turns: &Mutex<Turns>,
) -> Result<(Vec<TokenId>, Option<ChatText>), Error> {
    let text_error = |error: crate::token::TokenError| Error::field("prompt", error.to_string());
    match prompt {
        Prompt::Tokens(tokens) => {
            if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) {
                let reason = format!("token id {token} is not below the {vocab_size} there are");
                return Err(Error::field("prompt", reason));
            }
            Ok((tokens.clone(), None))
        }
        Prompt::Text(text) => {
            let ids = tokenizer.encode_prompt(text, Special::Parse).map_err(text_error)?;
            Ok((ids, None))
        }
        Prompt::Chat(messages) => {
            let options = ChatOptions::at(hat_transport::clock::unix_seconds());
            let refused = |error: crate::token::TokenError| match error {
                hangs @ crate::token::TokenError::TemplateHangs => {
                    Error::TemplateHangs(hangs.to_string())
                }
                error => Error::Template(error.to_string()),
            };
            let rendered = tokenizer.render(messages, &options).map_err(refused)?;
            // Encoding takes its time, and is nobody else's.
            let known =
                turns.lock().unwrap_or_else(PoisonError::into_inner).find(&rendered, tokenizer);
            let (from, mut ids) = known.unwrap_or_default();
            ids.extend(tokenizer.encode_rendered(&rendered, from).map_err(refused)?);
            Ok((ids, Some(rendered)))
        }
    }
}

/// One answer as it grows.
pub struct Answer {
    max_tokens: u32,
    ignore_eos: bool,
    top_logprobs: Option<u8>,
    tokens: Vec<TokenId>,
    text: String,
    sampler: Sampler,
    detokenizer: Detokenizer,
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
    pub fn new(prepared: &Prepared, tokenizer: &Tokenizer, config: &LlamaConfig) -> Self {
        let request = &prepared.request;
        let start = match request.prompt {
            Prompt::Chat(_) => Start::Text,
            _ => Start::Continue,
        };
        let mut sampler = Sampler::new(request.sampler.clone(), config.vocab_size, request.choice)
            .expect("checked when the request was prepared");
        for token in &prepared.prompt {
            sampler.accept(*token);
        }
        Self {
            max_tokens: prepared.max_tokens,
            ignore_eos: request.ignore_eos,
            top_logprobs: request.top_logprobs,
            tokens: Vec::with_capacity(prepared.max_tokens as usize),
            text: String::new(),
            sampler,
            detokenizer: tokenizer.detokenizer(start, SpecialText::Skip),
            stop: StopStrings::new(request.stop.clone()).expect("checked when it was prepared"),
            logits_hash: request.hash_logits.then(blake3::Hasher::new),
        }
    }

    /// Tokens emitted so far.
    #[must_use]
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Text given out so far.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// BLAKE3 over the little-endian f32 logits of each position so far, in hex.
    #[must_use]
    pub fn logits_blake3(&self) -> Option<String> {
        self.logits_hash.as_ref().map(|hash| hash.finalize().to_hex().to_string())
    }

    /// True if it needs nothing but the token with the greatest logit: see
    /// [`Answer::take_greatest`].
    #[must_use]
    pub fn wants_greatest(&self) -> bool {
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
        tokenizer: &Tokenizer,
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
            Some(top) => Some(Self::logprobs(logits, position, token, top, tokenizer)?),
            None => None,
        };
        Ok(self.emit(token, logprobs, tokenizer))
    }

    /// Takes the token with the greatest logit as the next, where [`Answer::wants_greatest`].
    pub fn take_greatest(&mut self, token: TokenId, tokenizer: &Tokenizer) -> Emitted {
        self.emit(token, None, tokenizer)
    }

    /// The next token is decided: what it leads to.
    fn emit(
        &mut self,
        token: TokenId,
        logprobs: Option<(TokenLogprob, Vec<TokenLogprob>)>,
        tokenizer: &Tokenizer,
    ) -> Emitted {
        if tokenizer.is_end(token) && !self.ignore_eos {
            return Emitted { token: None, event: None, finish: Some(FinishReason::Stop) };
        }
        self.sampler.accept(token);
        self.tokens.push(token);
        let seen = self.stop.push(self.detokenizer.push(token));
        let (text, stopped) = (seen.text.to_owned(), seen.stopped);
        self.text.push_str(&text);
        let finish = if stopped {
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
        let mut text = self.stop.push(self.detokenizer.finish()).text.to_owned();
        text.push_str(self.stop.finish());
        self.text.push_str(&text);
        text
    }

    fn logprobs(
        logits: &[f32],
        position: u32,
        token: TokenId,
        top: u8,
        tokenizer: &Tokenizer,
    ) -> Result<(TokenLogprob, Vec<TokenLogprob>), RequestError> {
        let named = |(token, logprob): (TokenId, f32)| TokenLogprob {
            token,
            text: String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned(),
            logprob: f64::from(logprob),
        };
        let mut likeliest = Vec::with_capacity(usize::from(top) + 1);
        let chosen = log_probabilities(logits, position, token, usize::from(top), &mut likeliest)
            .map_err(|_| RequestError::NotFinite { position })?;
        Ok((named((token, chosen)), likeliest.into_iter().map(named).collect()))
    }
}
