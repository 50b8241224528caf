//! Prompts: lines of a file, or words in an order by the seed.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use hat_loader::Bundle;
use hat_text::{Special, Tokenizer};
use hat_tools::random::{Purpose, unit};
use serde_json::Value;

use crate::protocol::Prompt;

/// Words of made prompts.
const WORDS: [&str; 48] = [
    "the", "a", "light", "river", "of", "and", "keeper", "to", "in", "winter", "harbour", "is",
    "slowly", "that", "for", "engine", "on", "with", "bridge", "as", "old", "was", "letter", "by",
    "salt", "carries", "it", "map", "from", "into", "window", "finds", "under", "night", "not",
    "garden", "seven", "wind", "asks", "near", "copper", "returns", "voice", "when", "field",
    "small", "counts", "stone",
];
/// Bytes of a line of a file.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Prompts by number.
pub(crate) enum Prompts {
    Given(Vec<Prompt>),
    Made { tokenizer: Box<Tokenizer>, lengths: Lengths, distinct: Option<u64>, seed: u64 },
}

/// Tokens of a made prompt: from, and to (included).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lengths {
    pub(crate) from: u32,
    pub(crate) to: u32,
}

impl std::str::FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (from, to) = text.split_once("..").unwrap_or((text, text));
        let number = |text: &str| text.parse::<u32>().map_err(|_| "not N or FROM..TO".to_owned());
        let lengths = Self { from: number(from)?, to: number(to)? };
        if lengths.from == 0 || lengths.to < lengths.from || lengths.to > 1 << 20 {
            return Err("allowed are 1 to 1048576 tokens, in rising order".to_owned());
        }
        Ok(lengths)
    }
}

impl Prompts {
    /// Lines of JSON with a `prompt`, or with `turns`, whose first counts.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("--prompts: {}", path.display()))?;
        let mut prompts = vec![];
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let prompt = prompt_of(line)
                .with_context(|| format!("--prompts: {} line {}", path.display(), index + 1))?;
            prompts.push(Prompt::Chat(prompt));
        }
        ensure!(!prompts.is_empty(), "--prompts: {} has no lines", path.display());
        Ok(Self::Given(prompts))
    }

    /// Words, as tokens of the bundle whose device half is at `device`.
    pub(crate) fn make(
        device: &Path,
        lengths: Lengths,
        distinct: Option<u64>,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let tokenizer = Tokenizer::of_bundle(&Bundle::open(device)?)
            .with_context(|| device.display().to_string())?;
        Ok(Self::Made { tokenizer: Box::new(tokenizer), lengths, distinct, seed })
    }

    /// The prompt of request `id`.
    pub(crate) fn prompt(&self, id: u64) -> anyhow::Result<Prompt> {
        match self {
            Self::Given(prompts) => {
                Ok(prompts[usize::try_from(id % prompts.len() as u64)?].clone())
            }
            Self::Made { tokenizer, lengths, distinct, seed } => {
                let number = distinct.map_or(id, |distinct| id % distinct);
                let span = f64::from(lengths.to - lengths.from + 1);
                let more = (unit(*seed, Purpose::Length, number, 0) * span) as u32;
                let length = (lengths.from + more).min(lengths.to) as usize;
                // A word is a token at least, and so is the space in front of the next.
                let words: Vec<&str> = (0..length as u64)
                    .map(|place| unit(*seed, Purpose::Word, number, place))
                    .map(|share| WORDS[(share * WORDS.len() as f64) as usize])
                    .collect();
                let mut tokens = tokenizer.encode_prompt(&words.join(" "), Special::AsText)?;
                if tokens.len() < length {
                    bail!("{length} words are {} tokens for this tokenizer", tokens.len());
                }
                tokens.truncate(length);
                Ok(Prompt::Tokens(tokens))
            }
        }
    }

    /// Number of the prompt of request `id`: requests with one number have one prompt.
    pub(crate) fn number(&self, id: u64) -> u64 {
        match self {
            Self::Given(prompts) => id % prompts.len() as u64,
            Self::Made { distinct, .. } => distinct.map_or(id, |distinct| id % distinct),
        }
    }
}

fn prompt_of(line: &str) -> anyhow::Result<String> {
    ensure!(line.len() <= LINE_BYTES_MAX, "longer than {LINE_BYTES_MAX} bytes");
    let value: Value = serde_json::from_str(line).context("not JSON")?;
    let text = value["prompt"].as_str().or_else(|| value["turns"][0].as_str());
    Ok(text.context("it has neither a text `prompt` nor a list `turns` of texts")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_a_number_or_a_range() {
        assert_eq!("7".parse(), Ok(Lengths { from: 7, to: 7 }));
        assert_eq!("16..256".parse(), Ok(Lengths { from: 16, to: 256 }));
        for wrong in ["", "0", "9..8", "a..b", "1..9999999", "..", "-1", "1.5"] {
            assert!(wrong.parse::<Lengths>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn made_prompts_have_the_lengths_and_depend_on_the_seed() {
        let directory = tempfile::tempdir().unwrap();
        let bundle = hat_loader::tiny_bundle(directory.path()).unwrap();
        let make = |seed| {
            let lengths = Lengths { from: 5, to: 40 };
            Prompts::make(&bundle.join("device"), lengths, Some(50), seed).unwrap()
        };
        let (prompts, others) = (make(1), make(2));
        let mut seen = std::collections::BTreeSet::new();
        for id in 0..50 {
            let Prompt::Tokens(tokens) = prompts.prompt(id).unwrap() else { panic!("no tokens") };
            assert!((5..=40).contains(&tokens.len()), "{}", tokens.len());
            assert_ne!(prompts.prompt(id).unwrap(), others.prompt(id).unwrap());
            assert_eq!(prompts.prompt(id).unwrap(), prompts.prompt(id + 50).unwrap());
            seen.insert(tokens.len());
        }
        assert!(seen.len() > 15, "{seen:?}");
    }

    #[test]
    fn a_wrong_line_is_named() {
        assert_eq!(prompt_of(r#"{"prompt": "a"}"#).unwrap(), "a");
        assert_eq!(prompt_of(r#"{"turns": ["b", "c"]}"#).unwrap(), "b");
        for wrong in ["x", "{}", r#"{"prompt": 1}"#, r#"{"turns": []}"#] {
            assert!(prompt_of(wrong).is_err(), "{wrong}");
        }
    }
}
