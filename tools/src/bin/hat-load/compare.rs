//! Answers beside those of the whole model in one process.

use std::collections::BTreeMap;
use std::path::Path;

use hat_compute::open;
use hat_engine::options::{Codec, DeviceLimits, Processor};
use hat_engine::reference_run::ReferenceRun;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::prompts::Prompts;
use crate::protocol::{Ask, End, Outcome};

/// Result of a comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Compared {
    /// Complete answers.
    pub(crate) answers: usize,
    /// Beginnings of answers that were given up.
    pub(crate) beginnings: usize,
    /// Tokens compared.
    pub(crate) tokens: usize,
    /// Number of requests with another text than the whole model's.
    pub(crate) different: usize,
    #[serde(skip)]
    pub(crate) first_different: Option<u64>,
}

/// Compares the answers, whose tokens were kept, with the whole model's, one for each prompt.
pub(crate) fn compare(
    bundle: &Path,
    wire: Codec,
    prompts: &Prompts,
    ask: &dyn Fn(u64) -> anyhow::Result<Ask>,
    outcomes: &[Vec<Outcome>],
) -> anyhow::Result<Compared> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let backend = open::cpu(Processor::Auto, threads)?;
    let mut whole =
        ReferenceRun::open(backend, bundle, None, wire, DeviceLimits::default().context_max)?;
    let mut by_prompt: BTreeMap<u64, Vec<&Outcome>> = BTreeMap::new();
    for answer in outcomes.iter().flatten().filter(|answer| !answer.token_ids.is_empty()) {
        by_prompt.entry(prompts.number(answer.ask)).or_default().push(answer);
    }
    let bar = ProgressBar::new(by_prompt.len() as u64);
    let mut compared = Compared::default();
    for answers in by_prompt.values() {
        let (_, metrics) = whole.generate(ask(answers[0].ask)?.request()?, |_| {})?;
        for answer in answers {
            compared.note(answer, &metrics.token_ids);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(compared)
}

impl Compared {
    fn note(&mut self, answer: &Outcome, whole: &[u32]) {
        let fits = if answer.end == End::Done {
            self.answers += 1;
            answer.token_ids == whole
        } else {
            self.beginnings += 1;
            whole.starts_with(&answer.token_ids)
        };
        self.tokens += answer.token_ids.len();
        if !fits {
            self.different += 1;
            self.first_different.get_or_insert(answer.ask);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_other_token_is_found() {
        let mut compared = Compared::default();
        let mut note = |tokens: &[u32], end| {
            let outcome = Outcome { token_ids: tokens.to_vec(), ..Outcome::of(3, end) };
            compared.note(&outcome, &[1, 2, 3]);
            compared.different
        };
        assert_eq!(note(&[1, 2, 3], End::Done), 0);
        assert_eq!(note(&[1, 2], End::Cancelled), 0);
        assert_eq!(note(&[1, 2], End::Done), 1);
        assert_eq!(note(&[1, 9], End::Cancelled), 2);
        assert_eq!(note(&[1, 2, 3, 4], End::Done), 3);
        assert_eq!(note(&[1, 2, 4], End::Done), 4);
        let Compared { answers, beginnings, tokens, first_different, .. } = compared;
        assert_eq!((answers, beginnings, tokens, first_different), (4, 2, 16, Some(3)));
    }
}
