//! `top_k`, `top_p`, `min_p`: how far down the ranking tokens are kept.
//!
//! Each keeps a prefix of the ranking (logit, then lower id), so all that is to be known is the
//! last token kept. What is kept is then looked up by comparing with it.

use std::cmp::Ordering;

use hat_plan::TokenId;

use super::noise::{exp, ln};
use super::{Choice, SamplerConfig};

/// A candidate; [`rank`] orders them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ranked {
    pub(super) logit: f32,
    pub(super) token: TokenId,
}

/// Tokens that the filters keep.
pub(super) struct Kept {
    /// The last of the ranking that is kept.
    last: Ranked,
    /// `min_p`: logits below are dropped.
    floor: f64,
    /// True if all that is kept is among the `ranked` of [`keep`], in no order.
    pub(super) narrowed: bool,
}

impl Kept {
    pub(super) fn has(&self, logit: f32, token: TokenId) -> bool {
        rank(&Ranked { logit, token }, &self.last) != Ordering::Greater
            && f64::from(logit) >= self.floor
    }
}

/// The higher logit first, then the lower id. Logits are no NaN.
fn rank(a: &Ranked, b: &Ranked) -> Ordering {
    let logits = b.logit.partial_cmp(&a.logit).expect("NaN is refused before");
    logits.then(a.token.cmp(&b.token))
}

/// Runs the filters over all of `logits`, whose largest is `first`.
pub(super) fn keep(
    config: &SamplerConfig,
    logits: &[f32],
    first: Choice,
    ranked: &mut Vec<Ranked>,
) -> Kept {
    let first_logit = f64::from(first.logit);
    let last = Ranked { logit: f32::NEG_INFINITY, token: TokenId::MAX };
    // At min_p = 1 this is exactly the first logit: ln(1) is 0.
    let floor = match config.min_p {
        0.0 => f64::NEG_INFINITY,
        min_p => first_logit + ln(f64::from(min_p)),
    };
    let mut kept = Kept { last, floor, narrowed: false };
    let k = config.top_k as usize;
    if k > 0 && k < logits.len() {
        kept.last = first_k(logits, k, ranked);
        kept.narrowed = true;
    }
    if config.top_p < 1.0 {
        if kept.narrowed {
            ranked.sort_unstable_by_key(|candidate| candidate.token);
        } else {
            ranked.clear();
            ranked.extend((0..).zip(logits).map(|(token, &logit)| Ranked { logit, token }));
            kept.narrowed = true;
        }
        let share = |logit: f32| exp(f64::from(logit) - first_logit);
        let mass: f64 = ranked.iter().map(|candidate| share(candidate.logit)).sum();
        let prefix = shortest_prefix(ranked, f64::from(config.top_p) * mass, share);
        kept.last = ranked[prefix - 1];
        ranked.truncate(prefix);
    }
    kept
}

/// Leaves the first `k` of the ranking in `ranked`, in no order, and returns the last of them.
/// `0 < k < logits.len()`
///
/// Candidates are gathered until there are a few times `k`, then cut to `k`; what comes after has
/// to beat the last of those, and little does.
fn first_k(logits: &[f32], k: usize, ranked: &mut Vec<Ranked>) -> Ranked {
    let full = (4 * k).max(256);
    let mut floor = f32::NEG_INFINITY;
    ranked.clear();
    for (token, &logit) in (0..).zip(logits) {
        // An equal logit of a higher id ranks lower, so only a greater one gets in.
        if ranked.len() < k || logit > floor {
            ranked.push(Ranked { logit, token });
        }
        if ranked.len() == full {
            floor = ranked.select_nth_unstable_by(k - 1, rank).1.logit;
            ranked.truncate(k);
        }
    }
    // Also where there are just `k`: they came in order of ids.
    let last = *ranked.select_nth_unstable_by(k - 1, rank).1;
    ranked.truncate(k);
    last
}

/// Length of the shortest prefix of the ranking whose shares add up to `wanted`; all of it if they
/// never do. Sorts as many to the front of `ranked`. Goes by ever larger blocks, since a prefix is
/// mostly short.
fn shortest_prefix(ranked: &mut [Ranked], wanted: f64, share: impl Fn(f32) -> f64) -> usize {
    let mut sum = 0.0;
    let mut sorted = 0;
    let mut block = 64;
    while sorted < ranked.len() {
        let rest = &mut ranked[sorted..];
        let block_len = block.min(rest.len());
        if block_len < rest.len() {
            rest.select_nth_unstable_by(block_len - 1, rank);
        }
        let head = &mut rest[..block_len];
        head.sort_unstable_by(rank);
        for (at, candidate) in head.iter().enumerate() {
            sum += share(candidate.logit);
            if sum >= wanted {
                return sorted + at + 1;
            }
        }
        sorted += block_len;
        block *= 4;
    }
    sorted
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The short lists equal a full sort, ties and all.
        #[test]
        fn partial_selection_equals_a_sort(
            mut logits in prop::collection::vec(-40i32..40, 2..2000), k in 1usize..300,
            minus_infinity in any::<bool>(), share in 0.0f64..1.1,
        ) {
            logits.iter_mut().step_by(3).for_each(|logit| *logit = 0);
            let mut logits: Vec<f32> = logits.iter().map(|&logit| logit as f32 / 4.0).collect();
            if minus_infinity {
                logits.iter_mut().step_by(2).for_each(|logit| *logit = f32::NEG_INFINITY);
            }
            let mut sorted: Vec<Ranked> =
                (0..).zip(&logits).map(|(token, &logit)| Ranked { logit, token }).collect();
            sorted.sort_by(rank);
            let tokens = |ranked: &[Ranked]| ranked.iter().map(|r| r.token).collect::<Vec<_>>();

            let k = k.min(logits.len() - 1);
            let mut ranked = Vec::new();
            prop_assert_eq!(first_k(&logits, k, &mut ranked).token, sorted[k - 1].token);
            ranked.sort_by(rank);
            prop_assert_eq!(tokens(&ranked), tokens(&sorted[..k]));

            let weight = |logit: f32| f64::from(logit.max(-20.0)) + 21.0;
            let wanted = share * sorted.iter().map(|r| weight(r.logit)).sum::<f64>();
            let mut sum = 0.0;
            let enough = sorted.iter().position(|r| {
                sum += weight(r.logit);
                sum >= wanted
            });
            let expected = enough.map_or(sorted.len(), |at| at + 1);
            let mut ranked = sorted.clone();
            ranked.sort_by_key(|r| r.token);
            prop_assert_eq!(shortest_prefix(&mut ranked, wanted, weight), expected);
            prop_assert_eq!(tokens(&ranked[..expected]), tokens(&sorted[..expected]));
        }
    }
}
