//! The vocabulary of a GGUF file as the text of a `tokenizer.json`.
//!
//! Two kinds exist. `gpt2` is byte-level BPE with a list of merges, and `tokenizer.ggml.pre` names
//! the pattern that cuts text into words first. `llama` is SentencePiece's BPE: pieces with
//! scores, from which merges follow (see [`super::vocabulary`]), spaces written as U+2581, and
//! bytes as pieces of their own where nothing else fits.

use serde_json::{Value as Json, json};

use super::GgufError;
use super::config::token_id;
use super::parse::{Container, Value};
use super::vocabulary::{TokenKind, Vocabulary};
use crate::source::TokenSettings;

/// SentencePiece's visible space.
const SPACE: &str = "\u{2581}";

/// The text of `tokenizer.json`, and the settings beside it.
pub(super) fn tokenizer(
    container: &Container<'_>,
    vocab_size: usize,
) -> Result<(String, TokenSettings), GgufError> {
    let vocabulary = Vocabulary::read(container)?;
    if vocabulary.tokens.len() > vocab_size {
        let reason =
            format!("{} tokens, but the embedding has {vocab_size} rows", vocabulary.tokens.len());
        return Err(GgufError::metadata("tokenizer.ggml.tokens", reason));
    }
    let key = "tokenizer.ggml.model";
    let (mut json, add_bos_default) = match container.metadata.get(key) {
        Some(Value::Text("gpt2")) => byte_level(container, &vocabulary)?,
        Some(Value::Text("llama")) => sentence_piece(container, &vocabulary)?,
        None => return Err(GgufError::metadata(key, "missing")),
        Some(other) => {
            let reason = format!("{other:?} is not supported; supported: gpt2, llama");
            return Err(GgufError::metadata(key, reason));
        }
    };
    let add_bos = flag(container, "tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos_default);
    let settings = settings(container, &vocabulary, add_bos)?;
    if add_bos {
        let id = token_id(container, "tokenizer.ggml.bos_token_id")?;
        let (Some(id), Some(text)) = (id, &settings.bos_token) else {
            let reason = "missing, but a prompt should begin with it";
            return Err(GgufError::metadata("tokenizer.ggml.bos_token_id", reason));
        };
        json["post_processor"] = begin_with(id, text);
    }
    Ok((json.to_string(), settings))
}

fn settings(
    container: &Container<'_>,
    vocabulary: &Vocabulary<'_>,
    add_bos_token: bool,
) -> Result<TokenSettings, GgufError> {
    let text = |name: &str| -> Result<Option<String>, GgufError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = token_id(container, &key)? else {
            return Ok(None);
        };
        match vocabulary.tokens.get(id as usize) {
            Some(text) => Ok(Some((*text).to_owned())),
            None => {
                let reason = format!("{id}, but there are {} tokens", vocabulary.tokens.len());
                Err(GgufError::metadata(&key, reason))
            }
        }
    };
    let chat_template = match container.metadata.get("tokenizer.chat_template") {
        Some(Value::Text(template)) => Some((*template).to_owned()),
        _ => None,
    };
    Ok(TokenSettings {
        bos_token: text("bos")?,
        eos_token: text("eos")?,
        unk_token: text("unknown")?,
        pad_token: text("padding")?,
        add_bos_token,
        chat_template,
    })
}

/// `gpt2`: the JSON, and whether a prompt begins with bos if the file doesn't say.
fn byte_level(
    container: &Container<'_>,
    vocabulary: &Vocabulary<'_>,
) -> Result<(Json, bool), GgufError> {
    let pre_key = "tokenizer.ggml.pre";
    let pre = match container.metadata.get(pre_key) {
        None => "default",
        Some(Value::Text(pre)) => *pre,
        Some(other) => {
            return Err(GgufError::metadata(pre_key, format!("{other:?} is not a string")));
        }
    };
    let pre_tokenizer = pre_tokenizer(pre).ok_or_else(|| {
        let known = "smollm, llama-bpe, qwen2, gpt-2, default";
        GgufError::metadata(pre_key, format!("{pre:?} is not supported; supported: {known}"))
    })?;
    let is_llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    let normalizer = if pre == "qwen2" { json!({"type": "NFC"}) } else { Json::Null };
    let merges = vocabulary.listed_merges(container)?;
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(vocabulary),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": byte_level_step(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": is_llama3,
            "vocab": vocabulary.json(),
            "merges": merges,
        },
    });
    Ok((json, is_llama3))
}

/// How `tokenizer.ggml.pre` cuts text into words.
fn pre_tokenizer(pre: &str) -> Option<Json> {
    // Contractions, words with at most one other character in front, numbers, other characters
    // with their line ends, spaces. The two patterns differ in how many digits go together.
    let words = |digits: &str| {
        let pattern = format!(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{digits}|\
             \x20?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
        );
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": false},
            byte_level_step(false),
        ]})
    };
    Some(match pre {
        "gpt-2" | "default" => byte_level_step(true),
        "smollm" => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            byte_level_step(true),
        ]}),
        "llama-bpe" | "llama3" | "llama-v3" => words("{1,3}"),
        "qwen2" => words(""),
        _ => return None,
    })
}

/// Bytes as letters; with `use_regex` cut by GPT-2's own pattern.
fn byte_level_step(use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
           "use_regex": use_regex})
}

/// `llama`: the JSON, and whether a prompt begins with bos if the file doesn't say.
fn sentence_piece(
    container: &Container<'_>,
    vocabulary: &Vocabulary<'_>,
) -> Result<(Json, bool), GgufError> {
    let add_space = flag(container, "tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let normalizer = if add_space {
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]})
    } else {
        replace
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if add_space {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = vocabulary
        .kinds
        .iter()
        .position(|kind| *kind == TokenKind::Unknown)
        .map(|id| vocabulary.tokens[id]);
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(vocabulary),
        "normalizer": normalizer,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary.json(),
            "merges": vocabulary.scored_merges(container)?,
        },
    });
    Ok((json, true))
}

/// Tokens that are matched before anything else: control tokens, hidden in the decoded text, and
/// the user-defined ones, shown in it.
fn added_tokens(vocabulary: &Vocabulary<'_>) -> Vec<Json> {
    let mut added = Vec::new();
    for (id, (text, kind)) in vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate() {
        let special = match kind {
            TokenKind::Control | TokenKind::Unknown => true,
            TokenKind::UserDefined => false,
            TokenKind::Normal | TokenKind::Byte => continue,
        };
        added.push(json!({
            "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special,
        }));
    }
    added
}

/// A post-processor that puts one token in front.
fn begin_with(id: u32, text: &str) -> Json {
    let bos = json!({"SpecialToken": {"id": text, "type_id": 0}});
    let first = json!({"Sequence": {"id": "A", "type_id": 0}});
    let second = json!({"Sequence": {"id": "B", "type_id": 1}});
    let bos_of_second = json!({"SpecialToken": {"id": text, "type_id": 1}});
    let mut special = serde_json::Map::new();
    special.insert(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
    json!({
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos_of_second, second],
        "special_tokens": special,
    })
}

fn flag(container: &Container<'_>, key: &str) -> Result<Option<bool>, GgufError> {
    match container.metadata.get(key) {
        None => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => {
            Err(GgufError::metadata(key, format!("{other:?} is neither true nor false")))
        }
    }
}
