//! The answers of `/v1/chat/completions`, `/v1/completions` and `/v1/models` as OpenAI's clients
//! read them, with llama.cpp's `timings` beside.

use std::collections::BTreeMap;

use hat_plan::PAGE_SIZE;
use serde::Serialize;

use super::ask::Shape;
use crate::{Event, Metrics};
use hat_core::metrics::Timings;
use hat_core::request::{FinishReason, TokenLogprob};
use hat_text::Tokenizer;

/// A token's log-probability and its alternatives.
pub(super) type Logprobs = (TokenLogprob, Vec<TokenLogprob>);

/// Fields that all chunks of an answer have in common.
#[derive(Debug)]
pub(super) struct Identity {
    /// Unique name of the answer.
    pub(super) id: String,
    /// Seconds since 1970.
    pub(super) created: u64,
    /// Name of the model that answers, whatever was asked for.
    pub(super) model: String,
    /// The route.
    pub(super) shape: Shape,
}

impl Identity {
    /// A new identity for an answer of `model`.
    pub(super) fn new(shape: Shape, model: &str) -> Self {
        let mut random = [0; 12];
        // Without random numbers ids repeat, which no client minds.
        let _ = getrandom::fill(&mut random);
        let prefix = match shape {
            Shape::Chat => "chatcmpl-",
            Shape::Text => "cmpl-",
        };
        let id = random.iter().fold(prefix.to_owned(), |id, byte| format!("{id}{byte:02x}"));
        Self { id, created: hat_transport::clock::unix_seconds(), model: model.to_owned(), shape }
    }

    pub(super) fn envelope<'a>(
        &'a self,
        object: &'static str,
        choices: &'a [Choice<'a>],
    ) -> Envelope<'a> {
        let (id, created, model) = (&*self.id, self.created, &*self.model);
        Envelope { id, object, created, model, choices, usage: None, timings: None }
    }
}

/// A whole answer, or a chunk of one.
#[derive(Serialize)]
pub(super) struct Envelope<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [Choice<'a>],
    /// Absent, `null` in a chunk of a stream that ends with usage, or the figures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) timings: Option<&'a Timings>,
}

/// Tokens of prompt and answers; the prompt counts once, however many answers there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

/// The part of a prompt whose rows the cloud had already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

impl Usage {
    pub(super) fn new(
        prompt_tokens: usize,
        completion_tokens: usize,
        cached_tokens: usize,
    ) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
        }
    }
}

/// Tokens of a prompt whose rows were not uploaded: whole pages that the cloud held.
pub(super) fn cached_tokens(timings: &Timings) -> usize {
    timings.pages_reused as usize * PAGE_SIZE
}

/// One answer, or a part of one.
#[derive(Serialize)]
pub(super) struct Choice<'a> {
    pub(super) index: u32,
    #[serde(flatten)]
    pub(super) content: Content<'a>,
    pub(super) logprobs: Option<ChoiceLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) timings: Option<&'a Timings>,
}

/// The text of a choice, under the name that its route has for it.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Content<'a> {
    /// An answer of a chat.
    Message { role: &'static str, content: &'a str, refusal: Option<&'a str> },
    /// A part of one.
    Delta(Delta<'a>),
    /// A completion, or a part of one.
    Text(&'a str),
}

#[derive(Default, Serialize)]
pub(super) struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<&'a str>,
}

/// Log-probabilities in the shape of the route.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum ChoiceLogprobs {
    Chat(ChatLogprobs),
    Text(TextLogprobs),
}

impl ChoiceLogprobs {
    /// `offset`: characters of a completion's tokens before; moved on behind these.
    pub(super) fn new(
        shape: Shape,
        logprobs: &[Logprobs],
        offset: &mut usize,
        tokenizer: &Tokenizer,
    ) -> Self {
        match shape {
            Shape::Chat => Self::Chat(ChatLogprobs::new(logprobs, tokenizer)),
            Shape::Text => Self::Text(TextLogprobs::new(logprobs, offset)),
        }
    }
}

#[derive(Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatLogprob>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ChatLogprob {
    #[serde(flatten)]
    token: ChatToken,
    top_logprobs: Vec<ChatToken>,
}

#[derive(Serialize)]
struct ChatToken {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    fn new(logprobs: &[Logprobs], tokenizer: &Tokenizer) -> Self {
        let named = |one: &TokenLogprob| ChatToken {
            token: one.text.clone(),
            logprob: one.logprob.max(LOGPROB_MIN),
            bytes: tokenizer.token_bytes(one.token).to_vec(),
        };
        let entry = |(token, top): &Logprobs| ChatLogprob {
            token: named(token),
            top_logprobs: top.iter().map(named).collect(),
        };
        Self { content: logprobs.iter().map(entry).collect(), refusal: None }
    }
}

/// JSON has no infinity; clients know this number for "impossible".
const LOGPROB_MIN: f64 = -9999.0;

#[derive(Serialize)]
pub(super) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f64>,
    top_logprobs: Option<Vec<BTreeMap<String, f64>>>,
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    fn new(logprobs: &[Logprobs], offset: &mut usize) -> Self {
        let mut text_offset = Vec::with_capacity(logprobs.len());
        for (token, _) in logprobs {
            text_offset.push(*offset);
            *offset += token.text.chars().count();
        }
        let top = |(_, top): &Logprobs| {
            let best_last = top.iter().rev();
            best_last.map(|one| (one.text.clone(), one.logprob.max(LOGPROB_MIN))).collect()
        };
        let any = logprobs.iter().any(|(_, top)| !top.is_empty());
        Self {
            tokens: logprobs.iter().map(|(token, _)| token.text.clone()).collect(),
            token_logprobs: logprobs
                .iter()
                .map(|(token, _)| token.logprob.max(LOGPROB_MIN))
                .collect(),
            top_logprobs: any.then(|| logprobs.iter().map(top).collect()),
            text_offset,
        }
    }
}

/// One answer as it is collected.
#[derive(Default)]
pub(super) struct Collected {
    text: String,
    logprobs: Vec<Logprobs>,
    ended: Option<(FinishReason, Box<Metrics>)>,
}

impl Collected {
    /// Adds an event.
    pub(super) fn add(&mut self, event: Event) {
        match event {
            Event::Token { text, logprobs, .. } => {
                self.text.push_str(&text);
                self.logprobs.extend(logprobs);
            }
            Event::Done { text, finish_reason, metrics } => {
                self.text.push_str(&text);
                self.ended = Some((finish_reason, metrics));
            }
            _ => {}
        }
    }

    /// Tokens of the answer and round trips, once it is complete.
    pub(super) fn figures(&self) -> Option<(u32, u32)> {
        self.timings().map(|timings| (timings.predicted_n, timings.rounds))
    }

    /// True if the answer is complete.
    pub(super) fn is_complete(&self) -> bool {
        self.ended.is_some()
    }

    fn timings(&self) -> Option<&Timings> {
        self.ended.as_ref().map(|(_, metrics)| &metrics.timings)
    }

    fn finish_reason(&self) -> Option<&'static str> {
        self.ended.as_ref().map(|(reason, _)| reason.name())
    }
}

/// The whole answer as JSON: `choices` answers to each prompt, one prompt after the other.
/// `logprobs` tells whether they were asked for.
pub(super) fn whole(
    identity: &Identity,
    collected: &[Collected],
    choices: u32,
    prompt_tokens: usize,
    logprobs: bool,
    tokenizer: &Tokenizer,
) -> String {
    let predicted =
        |one: &Collected| one.timings().map_or(0, |timings| timings.predicted_n as usize);
    // The first choice of each prompt stands for the prompt.
    let first = collected.iter().step_by(choices as usize);
    let cached = first.filter_map(Collected::timings).map(cached_tokens).sum();
    let usage = Usage::new(prompt_tokens, collected.iter().map(predicted).sum(), cached);
    let shape = identity.shape;
    let choices = (0..).zip(collected).map(|(index, one)| Choice {
        index,
        content: match shape {
            Shape::Chat => {
                Content::Message { role: "assistant", content: &one.text, refusal: None }
            }
            Shape::Text => Content::Text(&one.text),
        },
        logprobs: logprobs.then(|| ChoiceLogprobs::new(shape, &one.logprobs, &mut 0, tokenizer)),
        finish_reason: one.finish_reason(),
        timings: one.timings().filter(|_| collected.len() > 1),
    });
    let choices: Vec<_> = choices.collect();
    let object = if shape == Shape::Chat { "chat.completion" } else { "text_completion" };
    let mut envelope = identity.envelope(object, &choices);
    envelope.usage = Some(Some(usage));
    // One answer has its timings on top, as in llama.cpp; several have them each.
    if let [one] = collected {
        envelope.timings = one.timings();
    }
    serde_json::to_string(&envelope).expect("plain data serialises")
}

/// One entry of `/v1/models`.
#[derive(Serialize)]
pub(super) struct Model<'a> {
    /// Name of the model.
    pub(super) id: &'a str,
    /// `model`.
    pub(super) object: &'static str,
    /// Seconds since 1970.
    pub(super) created: u64,
    /// `hat-engine`.
    pub(super) owned_by: &'static str,
    /// Positions of one session, as vLLM calls it.
    pub(super) max_model_len: u32,
}

/// The list of models.
#[derive(Serialize)]
pub(super) struct ModelList<'a> {
    pub(super) object: &'static str,
    pub(super) data: [Model<'a>; 1],
}
