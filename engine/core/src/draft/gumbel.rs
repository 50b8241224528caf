//! Prediction of the token that a request that samples is likely to choose, before its logits are
//! there.
//!
//! A token is chosen as the argmax of `logit / temperature + noise`, and the noise is known in
//! advance: it is a function of seed, answer number, position and token. So a drafter that has an
//! idea of the logits adds the same noise to its own. With the true logits it would always be
//! right; the better the idea, the more often it is.

use hat_plan::TokenId;

use crate::sample::{SamplerConfig, seeded_noise};

/// Tokens that a drafter should name for each choice, so that the noise has something to choose
/// from.
pub const SHORTLIST: usize = 64;

/// The part of a request that draws.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    config: &'a SamplerConfig,
    choice: u32,
}

impl<'a> Draw<'a> {
    /// Prediction for answer number `choice` of a request; `None` if it is greedy.
    #[must_use]
    pub fn new(config: &'a SamplerConfig, choice: u32) -> Option<Self> {
        (config.temperature > 0.0).then_some(Self { config, choice })
    }

    /// Tokens and their probabilities without noise, the likeliest first, become tokens and the
    /// probabilities that they are chosen at `position`, the likeliest first. Filters drop
    /// some; penalties and bias are left out of account.
    pub fn gumbel_rank(&self, position: u32, likely: &mut Vec<(TokenId, f32)>) {
        let Self { config, choice } = *self;
        let Some((_, first)) = likely.first().copied() else { return };
        if config.top_k > 0 {
            likely.truncate(config.top_k as usize);
        }
        if config.top_p < 1.0 {
            let mass: f32 = likely.iter().map(|(_, probability)| probability).sum();
            let mut sum = 0.0;
            let enough = likely.iter().position(|(_, probability)| {
                sum += probability;
                sum >= config.top_p * mass
            });
            likely.truncate(enough.map_or(likely.len(), |at| at + 1));
        }
        likely.retain(|(_, probability)| *probability >= config.min_p * first);
        let mut noise = seeded_noise(config.seed, choice, position);
        for (token, probability) in likely.iter_mut() {
            let scaled = probability.max(f32::MIN_POSITIVE).ln() / config.temperature;
            *probability = scaled + noise(*token) as f32;
        }
        likely.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let Some((_, best)) = likely.first().copied() else { return };
        let mut sum = 0.0;
        for (_, score) in likely.iter_mut() {
            *score = (*score - best).exp();
            sum += *score;
        }
        likely.iter_mut().for_each(|(_, probability)| *probability /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Sampler;

    /// Logits of a small vocabulary, their softmax, the likeliest first.
    fn logits(seed: u32) -> (Vec<f32>, Vec<(TokenId, f32)>) {
        let logits: Vec<f32> = (0..SHORTLIST as u32)
            .map(|token| {
                let mixed = (token + 97 * seed + 1).wrapping_mul(2_654_435_761) >> 16;
                (mixed % 1000) as f32 / 125.0
            })
            .collect();
        let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
        let mut likely: Vec<_> =
            (0..).zip(&logits).map(|(token, logit)| (token, logit.exp() / sum)).collect();
        likely.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        (logits, likely)
    }

    #[test]
    fn with_the_true_logits_the_first_is_the_choice() {
        let mut surprises = 0;
        for seed in 0..300u32 {
            let config = SamplerConfig {
                temperature: [0.3, 1.0, 2.0][seed as usize % 3],
                top_k: [0, 5, 0, 40][seed as usize % 4],
                top_p: [1.0, 0.7][seed as usize % 2],
                min_p: [0.0, 0.0, 0.05][seed as usize % 3],
                seed: u64::from(seed) << 30,
                ..SamplerConfig::default()
            };
            let (logits, mut likely) = logits(seed);
            let first = likely[0].0;
            let (choice, position) = (seed % 3, seed * 7);
            let mut sampler = Sampler::new(config.clone(), logits.len(), choice).unwrap();
            let chosen = sampler.choose(&logits, position).unwrap().token;
            Draw::new(&config, choice).unwrap().gumbel_rank(position, &mut likely);
            assert_eq!(likely[0].0, chosen, "seed {seed}");
            let sum: f32 = likely.iter().map(|(_, probability)| probability).sum();
            assert!((sum - 1.0).abs() < 1e-4 && likely.windows(2).all(|two| two[0].1 >= two[1].1));
            surprises += u32::from(first != chosen);
        }
        assert!(surprises > 50, "the noise decided {surprises} times of 300");
    }

    #[test]
    fn greedy_requests_draw_nothing() {
        assert!(Draw::new(&SamplerConfig::default(), 0).is_none());
        let config = SamplerConfig { temperature: 1.0, ..SamplerConfig::default() };
        let mut none = Vec::new();
        Draw::new(&config, 0).unwrap().gumbel_rank(3, &mut none);
        assert!(none.is_empty());
    }
}
