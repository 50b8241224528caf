//! Rules that cut text into words: the names of `tokenizer.ggml.pre`, and tokenizers known by
//! content.
//!
//! A file without a name, or with `default`, is never guessed at: another pattern gives other ids
//! in silence. It is recognised by its merges, or refused.

use serde_json::{Value as Json, json};

use super::GgufError;
use super::parse::{Container, Value};

const KEY: &str = "tokenizer.ggml.pre";

/// A way to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    /// GPT-2's own.
    Gpt2,
    /// GPT-2's own, behind digits that stand alone.
    SingleDigits,
    /// Contractions in any case, words with one other character in front, up to three digits.
    ThreeDigits,
    /// As [`Pattern::ThreeDigits`], digits alone.
    OneDigit,
}

/// A name and what it stands for.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) pattern: Pattern,
    /// A word that is a token is taken whole, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// A plain prompt begins with bos unless the file says otherwise.
    pub(super) begins_with_bos: bool,
    /// Text is composed (NFC) first.
    pub(super) composes: bool,
}

const fn row(name: &'static str, pattern: Pattern) -> Row {
    Row { name, pattern, ignore_merges: false, begins_with_bos: false, composes: false }
}

const fn llama3(name: &'static str) -> Row {
    let plain = row(name, Pattern::ThreeDigits);
    Row { ignore_merges: true, begins_with_bos: true, ..plain }
}

const fn qwen2(name: &'static str) -> Row {
    Row { composes: true, ..row(name, Pattern::OneDigit) }
}

const ROWS: &[Row] = &[
    row("gpt-2", Pattern::Gpt2),
    row("phi-2", Pattern::Gpt2),
    row("smollm", Pattern::SingleDigits),
    row("starcoder", Pattern::SingleDigits),
    row("refact", Pattern::SingleDigits),
    row("command-r", Pattern::SingleDigits),
    llama3("llama-bpe"),
    llama3("llama3"),
    llama3("llama-v3"),
    llama3("falcon3"),
    row("dbrx", Pattern::ThreeDigits),
    row("smaug-bpe", Pattern::ThreeDigits),
    qwen2("qwen2"),
    qwen2("deepseek-r1-qwen"),
];

/// Published tokenizers by the first 16 digits of the BLAKE3 of their merges, each followed by a
/// line feed, and the architectures for which the merges decide (Qwen2's merges also come with a
/// newer pattern, in files of another architecture). Taken from the default model and from the
/// vocabularies in the source package of llama-cpp-python 0.3.36.
const KNOWN: &[(&str, &str, &[&str])] = &[
    ("d0a6943b438af71f", "smollm", &["llama"]),
    ("8a0255c95df6aca3", "gpt-2", &["llama", "qwen2"]),
    ("e9fce1984214cd07", "llama-bpe", &["llama"]),
    ("1af09d2fb0802de7", "qwen2", &["qwen2"]),
    ("55c263a329927273", "starcoder", &["llama"]),
    ("3169295dbc1eac9a", "refact", &["llama"]),
    ("f61132cee7c57752", "command-r", &["llama"]),
];

/// The row of a file, and where its name is from.
pub(super) fn of(
    container: &Container<'_>,
    merges: &[[&str; 2]],
    told: Option<&str>,
) -> Result<(&'static Row, String), GgufError> {
    let find = |name: &str| {
        ROWS.iter().find(|row| row.name == name).ok_or_else(|| {
            let reason = format!("{name:?} is not supported; supported: {}", names());
            GgufError::metadata(KEY, reason)
        })
    };
    if let Some(name) = told {
        return Ok((find(name)?, format!("{name}, as told by --pre")));
    }
    match container.metadata.get(KEY) {
        Some(Value::Text("default")) | None => {}
        Some(Value::Text(name)) => return Ok((find(name)?, format!("{name}, by the file"))),
        Some(other) => return Err(GgufError::metadata(KEY, format!("{other:?} is not a string"))),
    }
    let print = fingerprint(merges);
    let architecture = match container.metadata.get("general.architecture") {
        Some(Value::Text(name)) => *name,
        _ => "",
    };
    match recognised(&print, architecture) {
        Some(name) => Ok((find(name)?, format!("{name}, recognised by its merges"))),
        None => {
            let reason = format!(
                "the file does not say how its text is cut into words, and its merges ({print}) \
                 are of no tokenizer that we know; if you know it, pass --pre NAME to hat-split, \
                 NAME one of {}",
                names()
            );
            Err(GgufError::metadata(KEY, reason))
        }
    }
}

/// The name of a known tokenizer's pattern.
fn recognised(print: &str, architecture: &str) -> Option<&'static str> {
    let decides = |(known, _, architectures): &&(&str, &str, &[&str])| {
        *known == print && architectures.contains(&architecture)
    };
    KNOWN.iter().find(decides).map(|(_, name, _)| *name)
}

fn names() -> String {
    let names: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
    names.join(", ")
}

/// Hash of the merges as the file lists them.
fn fingerprint(merges: &[[&str; 2]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for [left, right] in merges {
        for part in [left, " ", right, "\n"] {
            hasher.update(part.as_bytes());
        }
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

impl Pattern {
    /// The `pre_tokenizer`.
    pub(super) fn json(self) -> Json {
        match self {
            Self::Gpt2 => byte_level_step(true),
            Self::SingleDigits => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                byte_level_step(true),
            ]}),
            Self::ThreeDigits => words("{1,3}"),
            Self::OneDigit => words(""),
        }
    }
}

/// Contractions, words with at most one other character in front, numbers, other characters with
/// their line ends, spaces. The two patterns differ in how many digits go together.
fn words(digits: &str) -> Json {
    let pattern = format!(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{digits}|\
         \x20?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    );
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
         "invert": false},
        byte_level_step(false),
    ]})
}

/// Bytes as letters; with `use_regex` cut by GPT-2's own pattern.
pub(super) fn byte_level_step(use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
           "use_regex": use_regex})
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hash that other programs give: `printf 'a b\nab c\n' | b3sum`.
    #[test]
    fn a_fingerprint_is_the_hash_of_the_merges_as_text() {
        let text = blake3::hash(b"a b\nab c\n").to_hex();
        assert_eq!(fingerprint(&[["a", "b"], ["ab", "c"]]), text[..16]);
        assert_ne!(fingerprint(&[["ab", "c"], ["a", "b"]]), text[..16]);
    }

    #[test]
    fn what_is_recognised_has_a_row_and_is_of_its_architecture_alone() {
        for (print, name, architectures) in KNOWN {
            assert!(ROWS.iter().any(|row| row.name == *name), "{name}");
            assert_eq!(KNOWN.iter().filter(|(other, ..)| other == print).count(), 1, "{print}");
            for architecture in *architectures {
                assert_eq!(recognised(print, architecture), Some(*name));
            }
            let of_another = if architectures.contains(&"llama") { "gemma" } else { "llama" };
            assert_eq!(recognised(print, of_another), None, "{name} of {of_another}");
            let last = if print.ends_with('0') { '1' } else { '0' };
            assert_eq!(recognised(&format!("{}{last}", &print[..15]), architectures[0]), None);
        }
    }
}
