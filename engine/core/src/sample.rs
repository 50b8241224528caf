//! Logits to a token: penalties, filters, seeded noise.
//!
//! The choice at a position is a function of the logits, of the path before it (prompt and
//! answer) and of the seed; nothing else. In this order:
//!
//! 1. **Penalties** on tokens among the last `penalty_last_n` of the path, in f32: the repetition
//!    penalty divides positive logits and multiplies others; then
//!    `logit -= count * frequency_penalty + presence_penalty`.
//! 2. **Bias**: `logit += bias`.
//! 3. **Filters**, on logits before temperature. Tokens are ranked by logit, then by lower id, and
//!    each filter keeps a prefix of the ranking, never less than the first token:
//!    `top_k` the first k; `top_p` the shortest prefix whose share of the probability left by
//!    `top_k` reaches p; `min_p` those with at least `min_p` times the probability of the first.
//! 4. **Temperature and noise**: the token with the largest `logit / temperature + noise` in f64,
//!    noise as in [`noise`]. Temperature 0 is greedy: the largest logit.
//!
//! Ties go to the lowest id. Sums run in ascending order of ids (mass) or in ranking order
//! (prefix), so results are the same bits on every platform.

mod filters;
pub mod noise;

use std::collections::HashMap;

use hat_plan::TokenId;

use self::filters::{Kept, Ranked};
use self::noise::{NOISE_MAX, Noise, exp, gumbel, gumbel_max, ln};
use crate::error::InputError;

/// Most entries of `logit_bias`.
pub const LOGIT_BIAS_MAX: usize = 1024;

/// Rule that chooses tokens. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerConfig {
    /// 0 is greedy; 1 samples from the model's own distribution. `0..=100`
    pub temperature: f32,
    /// Keep this many tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep this much probability; 1 keeps all. `0..=1`
    pub top_p: f32,
    /// Keep tokens with this share of the first one's probability; 0 keeps all. `0..=1`
    pub min_p: f32,
    /// Divides the logits of tokens in the window; 1 is off. `0.01..=100`
    pub repetition_penalty: f32,
    /// Taken off once from each token in the window; 0 is off. `-2..=2`
    pub presence_penalty: f32,
    /// Taken off for each time that a token is in the window; 0 is off. `-2..=2`
    pub frequency_penalty: f32,
    /// Number of the path's tokens that the penalties look at; `u32::MAX` is all of it.
    pub penalty_last_n: u32,
    /// Terms added to the logits of single tokens. `-100..=100`, at most [`LOGIT_BIAS_MAX`] entries
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed of the noise.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_last_n: 64,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplerConfig {
    /// Checks each field against its range, and biased tokens against the vocabulary.
    ///
    /// # Errors
    /// The first field that is out of range, NaN included.
    pub fn check(&self, vocab_size: usize) -> Result<(), InputError> {
        let fields = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
        ];
        for (field, value, low, high) in fields {
            in_range(field, value, low, high)?;
        }
        let wrong = |reason: String| Err(InputError::field("logit_bias", reason));
        let entries = self.logit_bias.len();
        if entries > LOGIT_BIAS_MAX {
            return wrong(format!("{entries} entries is not in 0..={LOGIT_BIAS_MAX} entries"));
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocab_size {
                return wrong(format!("token {token} is not in 0..{vocab_size}"));
            }
            in_range("logit_bias", bias, -100.0, 100.0)?;
        }
        Ok(())
    }

    /// True if the choice is the largest logit, of equal ones the lowest token, so that no full
    /// row of logits is needed.
    #[must_use]
    pub fn is_plain_greedy(&self) -> bool {
        self.temperature == 0.0 && !self.penalises() && self.logit_bias.is_empty()
    }

    fn penalises(&self) -> bool {
        self.penalty_last_n > 0
            && (self.repetition_penalty != 1.0
                || self.presence_penalty != 0.0
                || self.frequency_penalty != 0.0)
    }
}

fn in_range(field: &'static str, value: f32, low: f32, high: f32) -> Result<(), InputError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(InputError::field(field, format!("{value} is not in {low}..={high}")))
}

/// Logits from which no token can be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// The model gave a logit that is no number, or infinitely large.
    #[error("the logit of token {token} at position {position} is not finite")]
    NotFinite {
        /// The first such token.
        token: TokenId,
        /// The position that was to be filled.
        position: u32,
    },
    /// Every token is excluded.
    #[error("no token is left to choose from at position {position}")]
    Empty {
        /// The position that was to be filled.
        position: u32,
    },
}

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: TokenId,
    /// Its logit after penalties and bias.
    pub logit: f32,
}

/// Chooses tokens along one path, which [`Sampler::accept`] follows.
pub struct Sampler {
    config: SamplerConfig,
    vocab_size: usize,
    /// Index among several answers to one request (`n` of the API).
    choice: u32,
    path: Path,
    /// Logits after penalties and bias. `[vocab_size]`, empty until they are needed
    adjusted: Vec<f32>,
    /// Candidates, as far as a filter needs them. At most `[vocab_size]`, empty as above
    ranked: Vec<Ranked>,
}

impl Sampler {
    /// A sampler at an empty path, for answer number `choice` of a request.
    ///
    /// # Errors
    /// As [`SamplerConfig::check`].
    pub fn new(config: SamplerConfig, vocab_size: usize, choice: u32) -> Result<Self, InputError> {
        config.check(vocab_size)?;
        let path = Path::new(if config.penalises() { config.penalty_last_n } else { 0 });
        Ok(Self { config, vocab_size, choice, path, adjusted: Vec::new(), ranked: Vec::new() })
    }

    /// Its settings.
    #[must_use]
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// Puts a token at the end of the path, of prompt or answer.
    pub fn accept(&mut self, token: TokenId) {
        self.path.push(token);
    }

    /// The token at `position` (the number of tokens before it), given its logits
    /// (`[vocab_size]`). Does not move along the path. Allocates at most in the first call.
    ///
    /// # Errors
    /// If a logit is NaN or positive infinity, or all are negative infinity.
    ///
    /// # Panics
    /// If `logits` is not `vocab_size` long.
    pub fn choose(&mut self, logits: &[f32], position: u32) -> Result<Choice, SampleError> {
        assert_eq!(logits.len(), self.vocab_size, "one logit a token");
        let mut adjusted = std::mem::take(&mut self.adjusted);
        let logits = self.adjust(logits, &mut adjusted);
        let choice = self.choose_adjusted(logits, position);
        self.adjusted = adjusted;
        choice
    }

    fn choose_adjusted(&mut self, logits: &[f32], position: u32) -> Result<Choice, SampleError> {
        let first = argmax(logits, position)?;
        if self.config.temperature == 0.0 {
            return Ok(first);
        }
        let kept = filters::keep(&self.config, logits, first, &mut self.ranked);
        if kept.narrowed {
            let narrowed = self.ranked.iter().map(|ranked| (ranked.token, ranked.logit));
            return Ok(self.draw(narrowed, position, first, &kept));
        }
        let all = (0..).zip(logits.iter().copied());
        Ok(self.draw(all, position, first, &kept))
    }

    /// `argmax(logit / temperature + noise)` over what the filters kept. Tokens that the largest
    /// possible noise would not lift over the best so far are passed over; that changes nothing,
    /// since rounding keeps order.
    fn draw(
        &self,
        candidates: impl Iterator<Item = (TokenId, f32)>,
        position: u32,
        first: Choice,
        kept: &Kept,
    ) -> Choice {
        let temperature = f64::from(self.config.temperature);
        let mut noise = Noise::new(self.config.seed, self.choice, position);
        let mut best = first;
        let mut score_max = f64::from(first.logit) / temperature + gumbel(noise.word(first.token));
        for (token, logit) in candidates {
            let scaled = f64::from(logit) / temperature;
            if scaled + NOISE_MAX < score_max || !kept.has(logit, token) {
                continue;
            }
            let word = noise.word(token);
            if scaled + gumbel_max(word) < score_max {
                continue;
            }
            let score = scaled + gumbel(word);
            if score > score_max || (score == score_max && token < best.token) {
                best = Choice { token, logit };
                score_max = score;
            }
        }
        best
    }

    /// The logits after penalties and bias; the same slice if there are none.
    fn adjust<'a>(&self, logits: &'a [f32], adjusted: &'a mut Vec<f32>) -> &'a [f32] {
        let config = &self.config;
        if !config.penalises() && config.logit_bias.is_empty() {
            return logits;
        }
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        for (&token, &count) in &self.path.counts {
            // A path may hold ids beyond the logits, if a tokenizer has more than its model.
            let Some(logit) = adjusted.get_mut(token as usize) else {
                continue;
            };
            if *logit > 0.0 {
                *logit /= config.repetition_penalty;
            } else {
                *logit *= config.repetition_penalty;
            }
            *logit -= count as f32 * config.frequency_penalty + config.presence_penalty;
        }
        for &(token, bias) in &config.logit_bias {
            adjusted[token as usize] += bias;
        }
        adjusted
    }
}

/// The noise of each token at one position, for drafters.
pub(crate) fn seeded_noise(seed: u64, choice: u32, position: u32) -> impl FnMut(TokenId) -> f64 {
    let mut noise = Noise::new(seed, choice, position);
    move |token| gumbel(noise.word(token))
}

/// The largest logit, the lowest id among equals; refuses what is no number.
fn argmax(logits: &[f32], position: u32) -> Result<Choice, SampleError> {
    let mut best = Choice { token: 0, logit: f32::NEG_INFINITY };
    for (token, &logit) in (0..).zip(logits) {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(SampleError::NotFinite { token, position });
        }
        if logit > best.logit {
            best = Choice { token, logit };
        }
    }
    if best.logit == f32::NEG_INFINITY {
        return Err(SampleError::Empty { position });
    }
    Ok(best)
}

/// The tokens before the choice, and how often each is in the window.
struct Path {
    window: usize,
    /// Empty if `window` is 0.
    tokens: Vec<TokenId>,
    /// Only tokens that are in the window.
    counts: HashMap<TokenId, u32>,
}

impl Path {
    fn new(last_n: u32) -> Self {
        Self { window: last_n as usize, tokens: Vec::new(), counts: HashMap::new() }
    }

    fn push(&mut self, token: TokenId) {
        if self.window == 0 {
            return;
        }
        self.tokens.push(token);
        *self.counts.entry(token).or_insert(0) += 1;
        if let Some(left) = self.tokens.len().checked_sub(self.window + 1) {
            let left = self.tokens[left];
            let count = self.counts.get_mut(&left).expect("tokens of the window are counted");
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&left);
            }
        }
    }
}

/// Log-probabilities of the model's own distribution (before penalties, bias, filters and
/// temperature): that of `chosen` is returned, and the `top` most likely tokens are left in `out`,
/// in ranking order.
///
/// # Errors
/// As [`Sampler::choose`].
///
/// # Panics
/// If `chosen` is not in the vocabulary.
pub(crate) fn log_probabilities(
    logits: &[f32],
    position: u32,
    chosen: TokenId,
    top: usize,
    out: &mut Vec<(TokenId, f32)>,
) -> Result<f32, SampleError> {
    let max = f64::from(argmax(logits, position)?.logit);
    let mut mass = 0.0;
    out.clear();
    for (token, &logit) in (0..).zip(logits) {
        mass += exp(f64::from(logit) - max);
        if out.len() == top && out.last().is_none_or(|last| last.1 >= logit) {
            continue;
        }
        out.truncate(top.saturating_sub(1));
        let at = out.partition_point(|other| other.1 >= logit);
        out.insert(at, (token, logit));
    }
    let ln_mass = ln(mass);
    let log_probability = |logit: f32| (f64::from(logit) - max - ln_mass) as f32;
    for entry in out.iter_mut() {
        entry.1 = log_probability(entry.1);
    }
    Ok(log_probability(logits[chosen as usize]))
}

#[cfg(test)]
mod tests;
