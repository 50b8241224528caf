//! Answers beside those of the whole model in one process.

use std::collections::BTreeMap;
use std::path::Path;

use hat_compute::open;
use hat_engine::options::{Codec, DeviceLimits, Processor};
use hat_engine::reference_run::ReferenceRun;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::prompts::Prompts;
use crate::protocol::Ask;

/// An answer, or what came of it before it was given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) ask: u64,
    pub(crate) tokens: Vec<u32>,
    pub(crate) complete: bool,
}

impl Kept {
    fn fits(&self, whole: &[u32]) -> bool {
        match self.complete {
            true => self.tokens == whole,
            false => whole.starts_with(&self.tokens),
        }
    }
}

/// Result of a comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Compared {
    /// Complete answers.
    pub(crate) answers: usize,
    /// Beginnings of answers that were given up.
    pub(crate) beginnings: usize,
    /// Tokens compared.
    pub(crate) tokens: usize,
    /// Number of requests with another text than the whole model's.
    pub(crate) different: usize,
    pub(crate) first_different: Option<u64>,
}

impl Compared {
    pub(crate) fn json(&self) -> Value {
        json!({
            "answers": self.answers,
            "beginnings": self.beginnings,
            "tokens": self.tokens,
            "different": self.different,
        })
    }
}

/// Compares what was kept with the whole model's answers, one for each prompt.
pub(crate) fn compare(
    bundle: &Path,
    wire: &str,
    prompts: &Prompts,
    ask: &dyn Fn(u64) -> anyhow::Result<Ask>,
    kept: &[Kept],
) -> anyhow::Result<Compared> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let backend = open::cpu(Processor::Auto, threads)?;
    let wire = Codec::from_name(wire).expect("a codec's own name");
    let mut whole =
        ReferenceRun::open(backend, bundle, None, wire, DeviceLimits::default().context_max)?;
    let mut by_prompt: BTreeMap<u64, Vec<&Kept>> = BTreeMap::new();
    for answer in kept.iter().filter(|answer| !answer.tokens.is_empty()) {
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
    fn note(&mut self, answer: &Kept, whole: &[u32]) {
        match answer.complete {
            true => self.answers += 1,
            false => self.beginnings += 1,
        }
        self.tokens += answer.tokens.len();
        if !answer.fits(whole) {
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
        let mut note = |tokens: &[u32], complete| {
            compared.note(&Kept { ask: 3, tokens: tokens.to_vec(), complete }, &[1, 2, 3]);
            compared.different
        };
        assert_eq!(note(&[1, 2, 3], true), 0);
        assert_eq!(note(&[1, 2], false), 0);
        assert_eq!(note(&[1, 2], true), 1);
        assert_eq!(note(&[1, 9], false), 2);
        assert_eq!(note(&[1, 2, 3, 4], true), 3);
        assert_eq!(note(&[1, 2, 4], true), 4);
        let Compared { answers, beginnings, tokens, first_different, .. } = compared;
        assert_eq!((answers, beginnings, tokens, first_different), (4, 2, 16, Some(3)));
    }
}
