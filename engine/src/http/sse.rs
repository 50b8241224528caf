//! A streamed answer: server-sent events in the body of a response.
//!
//! `data:` lines hold chunks, the last one says `[DONE]`. While nothing else comes, comments keep
//! proxies and clients from giving up; while the prompt goes up they tell how far it is. An error
//! after the first byte is an event of its own, and ends the stream without `[DONE]`. Dropping the
//! body, as hyper does when the client is gone, cancels the generations.

use std::future::Future as _;
use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame};
use tokio::time::{Instant, Sleep};

use super::Shared;
use super::access::Figures;
use super::ask::Shape;
use super::error::ApiError;
use super::openai::{
    Choice, ChoiceLogprobs, Content, Delta, Envelope, Identity, Logprobs, Usage, cached_tokens,
};
use super::relay::{Answers, Told};
use crate::{Error, Event};
use hat_core::metrics::Timings;
use hat_core::request::FinishReason;

/// Most bytes of one frame of the body, before more events are taken.
const FRAME_BYTES: usize = 16 << 10;

/// Parts of a stream that its caller wants beside the text.
pub(super) struct Wanted {
    /// Log-probabilities with each token.
    pub(super) logprobs: bool,
    /// A last chunk about usage.
    pub(super) usage: bool,
    /// Answers to each prompt.
    pub(super) choices: u32,
    /// Answers to all prompts.
    pub(super) answers: u32,
    /// Figures for the log.
    pub(super) figures: Arc<Figures>,
}

/// The body.
pub(super) struct EventStream {
    /// `None` after the end.
    answers: Option<Answers>,
    first: Option<Told>,
    chunks: Chunks,
    out: Vec<u8>,
    keep_alive: Duration,
    silence: Pin<Box<Sleep>>,
}

impl EventStream {
    /// A stream of what `answers` tells, `first` before it.
    pub(super) fn new(
        shared: Arc<Shared>,
        identity: Identity,
        wanted: Wanted,
        answers: Answers,
        first: Option<Told>,
    ) -> Self {
        let keep_alive = shared.limits.keep_alive;
        let choices = wanted.answers;
        let chunks = Chunks {
            shared,
            identity,
            wanted,
            offsets: vec![0; choices as usize],
            going: choices,
            prompt_tokens: answers.prompt_tokens(),
            completion_tokens: 0,
            cached_tokens: 0,
        };
        let mut out = Vec::new();
        for index in 0..choices {
            chunks.role(index, &mut out);
        }
        let silence = Box::pin(tokio::time::sleep(keep_alive));
        Self { answers: Some(answers), first, chunks, out, keep_alive, silence }
    }

    /// Takes an event; ends the stream if it was the last.
    fn take(&mut self, told: Told) {
        match told.event {
            Ok(event) => self.chunks.event(told.choice, event, &mut self.out),
            Err(error) => {
                self.chunks.error(error, &mut self.out);
                self.answers = None;
                return;
            }
        }
        if self.chunks.going == 0 {
            self.chunks.end(&mut self.out);
            self.answers = None;
        }
    }

    fn take_all(&mut self, cx: &mut Context<'_>) -> Result<(), Cut> {
        if let Some(first) = self.first.take() {
            self.take(first);
        }
        while self.out.len() < FRAME_BYTES {
            let Some(answers) = &mut self.answers else {
                break;
            };
            match answers.poll_next(cx) {
                Poll::Ready(Some(told)) => self.take(told),
                Poll::Ready(None) => return Err(Cut),
                Poll::Pending => break,
            }
        }
        Ok(())
    }
}

/// The reader was too slow, or the server stops: the connection is cut.
#[derive(Debug, thiserror::Error)]
#[error("the answer was cut")]
pub(super) struct Cut;

impl Body for EventStream {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let this = &mut *self;
        if let Err(cut) = this.take_all(cx) {
            this.answers = None;
            return Poll::Ready(Some(Err(cut)));
        }
        if this.out.is_empty() {
            if this.answers.is_none() {
                return Poll::Ready(None);
            }
            if this.silence.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            this.out.extend_from_slice(b": keep-alive\n\n");
        }
        this.silence.as_mut().reset(Instant::now() + this.keep_alive);
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(std::mem::take(&mut this.out))))))
    }
}

/// Writes events as chunks.
struct Chunks {
    shared: Arc<Shared>,
    identity: Identity,
    wanted: Wanted,
    /// Characters of each choice's tokens so far, for completions with log-probabilities.
    offsets: Vec<usize>,
    /// Choices that have not ended.
    going: u32,
    prompt_tokens: usize,
    completion_tokens: usize,
    cached_tokens: usize,
}

impl Chunks {
    /// A chat's first chunk says who speaks.
    fn role(&self, index: u32, out: &mut Vec<u8>) {
        if self.identity.shape == Shape::Chat {
            let content = Content::Delta(Delta { role: Some("assistant"), content: Some("") });
            let choice =
                Choice { index, content, logprobs: None, finish_reason: None, timings: None };
            self.chunk(choice, None, out);
        }
    }

    fn event(&mut self, index: u32, event: Event, out: &mut Vec<u8>) {
        match event {
            Event::Prefill { sent, total } => {
                let _ = write!(out, ": prefill {sent}/{total}\n\n"); // a Vec takes everything
            }
            Event::Token { text, logprobs, .. } => {
                let logprobs = logprobs.filter(|_| self.wanted.logprobs);
                if !text.is_empty() || logprobs.is_some() {
                    self.part(index, Some(&text), logprobs, None, out);
                }
            }
            Event::Done { text, finish_reason, metrics } => {
                if !text.is_empty() {
                    self.part(index, Some(&text), None, None, out);
                }
                self.going -= 1;
                self.completion_tokens += metrics.timings.predicted_n as usize;
                self.wanted.figures.add(metrics.timings.predicted_n, metrics.timings.rounds);
                if index.is_multiple_of(self.wanted.choices) {
                    self.cached_tokens += cached_tokens(&metrics.timings);
                }
                self.part(index, None, None, Some((finish_reason, &metrics.timings)), out);
            }
            _ => {}
        }
    }

    /// A part of an answer: some text, or its end.
    fn part(
        &mut self,
        index: u32,
        text: Option<&str>,
        logprobs: Option<Logprobs>,
        end: Option<(FinishReason, &Timings)>,
        out: &mut Vec<u8>,
    ) {
        let shape = self.identity.shape;
        let content = match shape {
            Shape::Chat => Content::Delta(Delta { role: None, content: text }),
            Shape::Text => Content::Text(text.unwrap_or_default()),
        };
        let tokenizer = self.shared.engine.tokenizer();
        let offset = &mut self.offsets[index as usize];
        let logprobs = logprobs.map(|one| ChoiceLogprobs::new(shape, &[one], offset, tokenizer));
        let finish_reason = end.map(|(reason, _)| reason.name());
        let choice = Choice { index, content, logprobs, finish_reason, timings: None };
        self.chunk(choice, end.map(|(_, timings)| timings), out);
    }

    fn end(&self, out: &mut Vec<u8>) {
        if self.wanted.usage {
            let mut envelope = self.identity.envelope(self.object(), &[]);
            let (prompt, cached) = (self.prompt_tokens, self.cached_tokens);
            envelope.usage = Some(Some(Usage::new(prompt, self.completion_tokens, cached)));
            data(&envelope, out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn error(&self, error: Error, out: &mut Vec<u8>) {
        let error = ApiError::from(error);
        self.shared.counters.refuse(error.code());
        let _ = write!(out, "data: {}\n\n", error.json()); // a Vec takes everything
    }

    fn chunk(&self, choice: Choice<'_>, timings: Option<&Timings>, out: &mut Vec<u8>) {
        let choices = [choice];
        let mut envelope = self.identity.envelope(self.object(), &choices);
        envelope.timings = timings;
        envelope.usage = self.wanted.usage.then_some(None);
        data(&envelope, out);
    }

    fn object(&self) -> &'static str {
        match self.identity.shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Text => "text_completion",
        }
    }
}

fn data(envelope: &Envelope<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, envelope).expect("plain data into a Vec");
    out.extend_from_slice(b"\n\n");
}
