//! One sequence on its way: its tokens, its rows, and who chooses what comes next.

use std::ops::Range;

use anyhow::{Context as _, ensure};
use half::f16;
use hat_core::sample::{Sampler, SamplerConfig};
use hat_engine::options::{Message, Role, TokenId};
use hat_text::Tokenizer;
use hat_text::{ChatOptions, Special};

use super::prompts::{Job, Prompt};
use crate::shard::{Recording, SequenceFacts};
use crate::target::{StepRows, Target};

/// The text of a chat around one user turn, as tokens.
pub(crate) struct Template {
    before: Vec<TokenId>,
    after: Vec<TokenId>,
}

impl Template {
    pub(crate) fn new(tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        const MARK: &str = "MARK";
        let chat = [Message::new(Role::User, MARK)];
        let text = tokenizer.render_chat(&chat, &ChatOptions::at(0))?;
        let (before, after) = text
            .split_once(MARK)
            .context("the chat template does not repeat what the user says")?;
        Ok(Self {
            before: tokenizer.encode_prompt(before, Special::Parse)?,
            after: tokenizer.encode(after, Special::Parse)?,
        })
    }
}

/// Phase of a slot.
enum Phase {
    /// The model writes its prompt.
    Writing(Box<Sampler>),
    /// The model answers.
    Answering,
}

/// A sequence on its way.
pub(crate) struct Slot {
    job: Job,
    phase: Phase,
    answer: Sampler,
    tokens: Vec<TokenId>,
    /// Tokens whose rows are there.
    computed: usize,
    prompt: usize,
    shallow: Vec<Vec<f16>>,
    deep: Vec<f16>,
    limits: Limits,
}

/// Bounds of a sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Tokens of the prompt.
    pub(crate) prompt_max: usize,
    /// Tokens of the answer.
    pub(crate) tokens_max: usize,
    /// True if an answer that goes round in circles ends.
    pub(crate) cut_loops: bool,
}

/// Longest prompt that the model writes by itself, in tokens beyond the template.
const WRITTEN_MAX: usize = 256;
/// Temperature of prompts that the model writes.
const WRITTEN_TEMPERATURE: f32 = 1.0;

impl Slot {
    /// Begins a job; `None` if its prompt is too long.
    pub(crate) fn begin(
        job: Job,
        target: &Target,
        template: &Template,
        limits: &Limits,
    ) -> anyhow::Result<Option<Self>> {
        let vocab = target.vocab_size;
        let (tokens, phase) = match &job.prompt {
            Prompt::Text(text) => {
                let chat = [Message::new(Role::User, text.as_str())];
                let tokens = target.tokenizer.encode_chat(&chat, &ChatOptions::at(0))?;
                (tokens, Phase::Answering)
            }
            Prompt::Written { start, seed } => {
                let mut tokens = template.before.clone();
                let start = start.trim_end_matches(' ');
                tokens.extend(target.tokenizer.encode(start, Special::AsText)?);
                let config = SamplerConfig {
                    temperature: WRITTEN_TEMPERATURE,
                    seed: *seed,
                    ..SamplerConfig::default()
                };
                (tokens, Phase::Writing(Box::new(Sampler::new(config, vocab, 0)?)))
            }
        };
        if tokens.len() > limits.prompt_max {
            return Ok(None);
        }
        Ok(Some(Self {
            answer: Sampler::new(job.sampler.clone(), vocab, 0)?,
            prompt: tokens.len(),
            computed: 0,
            shallow: Vec::new(),
            deep: Vec::new(),
            job,
            phase,
            tokens,
            limits: *limits,
        }))
    }

    /// Tokens whose rows are still to be computed.
    pub(crate) fn waiting(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The next `count` of them.
    pub(crate) fn next(&self, count: usize) -> Vec<TokenId> {
        self.tokens[self.computed..self.computed + count].to_vec()
    }

    /// Keeps the rows of the next `count` tokens: numbers `rows` of a step.
    pub(crate) fn take_rows(&mut self, count: usize, rows: Range<usize>, out: &StepRows) {
        self.shallow.resize_with(out.taps.len(), Vec::new);
        for (kept, tap) in self.shallow.iter_mut().zip(&out.taps) {
            kept.extend_from_slice(&tap[rows.clone()]);
        }
        self.deep.extend_from_slice(&out.deep[rows]);
        self.computed += count;
    }

    /// Chooses the next token; true if that ends the sequence.
    pub(crate) fn choose(
        &mut self,
        logits: &[f32],
        tokenizer: &Tokenizer,
        template: &Template,
    ) -> anyhow::Result<bool> {
        let position = u32::try_from(self.tokens.len())?;
        if let Phase::Writing(sampler) = &mut self.phase {
            let token = sampler.choose(logits, position)?.token;
            let is_end = tokenizer.is_end(token);
            let room = self.limits.prompt_max.saturating_sub(template.after.len());
            let written = self.tokens.len() + 1 - template.before.len();
            if !is_end {
                self.tokens.push(token);
            }
            if is_end || written >= WRITTEN_MAX || self.tokens.len() >= room {
                self.tokens.extend_from_slice(&template.after);
                self.prompt = self.tokens.len();
                ensure!(
                    self.prompt <= self.limits.prompt_max,
                    "--prompt-max is below the template's size"
                );
                self.phase = Phase::Answering;
            }
            return Ok(false);
        }
        let token = self.answer.choose(logits, position)?.token;
        self.tokens.push(token);
        let answer = &self.tokens[self.prompt..];
        Ok(tokenizer.is_end(token)
            || answer.len() >= self.limits.tokens_max
            || self.limits.cut_loops && is_loop(answer))
    }

    /// The finished sequence; `None` if there is no row to learn from.
    pub(crate) fn finish(mut self, hidden_size: usize, prompt_tail: usize) -> Option<Recording> {
        if self.tokens.len() < self.prompt + 2 {
            return None;
        }
        let deep_first = (self.prompt - 1).saturating_sub(prompt_tail);
        self.deep.drain(..deep_first * hidden_size);
        Some(Recording {
            facts: SequenceFacts {
                job: self.job.number,
                source: self.job.source,
                prompt: self.prompt,
                tokens: self.tokens.len(),
                deep_first,
                sampled: self.job.sampler.temperature > 0.0,
            },
            tokens: self.tokens,
            shallow: self.shallow,
            deep: self.deep,
        })
    }
}

/// Longest period of a loop that is noticed.
const LOOP_PERIOD_MAX: usize = 24;
/// Shortest run that counts as a loop.
const LOOP_TOKENS_MIN: usize = 40;

/// True if a text ends in at least three and a third times the same words. Small models run into
/// that; prompt lookup drafts it for nothing, and a drafter learns nothing more from it.
fn is_loop(tokens: &[TokenId]) -> bool {
    (1..=LOOP_PERIOD_MAX).any(|period| {
        let run = LOOP_TOKENS_MIN.max(period * 10 / 3);
        tokens.len() >= run + period
            && tokens[tokens.len() - run..]
                .iter()
                .zip(&tokens[tokens.len() - run - period..])
                .all(|(a, b)| a == b)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_noticed_and_a_list_is_not() {
        let mut text: Vec<TokenId> = (0..60).collect();
        assert!(!is_loop(&text));
        text.extend((0..47).map(|n| 100 + n % 7));
        assert!(is_loop(&text));
        text.push(3);
        assert!(!is_loop(&text));
        let list: Vec<TokenId> = (0..90).map(|n| if n % 3 == 0 { n } else { 7 + n % 3 }).collect();
        assert!(!is_loop(&list));
    }
}
