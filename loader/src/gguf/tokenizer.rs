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
use super::pre;
use super::vocabulary::{TokenKind, Vocabulary};
use crate::source::{TextReport, TokenSettings};

/// SentencePiece's visible space.
const SPACE: &str = "\u{2581}";

/// The text of `tokenizer.json`, the settings beside it, and what was found out. `pre` is the
/// name of the pattern, where a person gives it.
pub(super) fn tokenizer(
    container: &Container<'_>,
    vocab_size: usize,
    pre: Option<&str>,
) -> Result<(String, TokenSettings, TextReport), GgufError> {
    let vocabulary = Vocabulary::read(container)?;
    let mut report = TextReport { tokens_doubled: vocabulary.doubled, ..TextReport::default() };
    if vocabulary.tokens.len() > vocab_size {
        let reason =
            format!("{} tokens, but the embedding has {vocab_size} rows", vocabulary.tokens.len());
        return Err(GgufError::metadata("tokenizer.ggml.tokens", reason));
    }
    let key = "tokenizer.ggml.model";
    let (mut json, add_bos_default) = match container.metadata.get(key) {
        Some(Value::Text("gpt2")) => byte_level(container, &vocabulary, pre, &mut report)?,
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
    Ok((json.to_string(), settings, report))
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
        Some(other) => {
            let reason = format!("{other:?} is not a string");
            return Err(GgufError::metadata("tokenizer.chat_template", reason));
        }
        None => None,
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
    told: Option<&str>,
    report: &mut TextReport,
) -> Result<(Json, bool), GgufError> {
    let (merges, skipped) = vocabulary.listed_merges(container)?;
    let (row, from) = pre::of(container, &merges, told)?;
    report.merges_skipped = skipped;
    report.pattern = Some(from);
    let normalizer = if row.composes { json!({"type": "NFC"}) } else { Json::Null };
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(vocabulary),
        "normalizer": normalizer,
        "pre_tokenizer": row.pattern.json(),
        "post_processor": null,
        "decoder": pre::byte_level_step(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": row.ignore_merges,
            "vocab": vocabulary.json(),
            "merges": merges,
        },
    });
    Ok((json, row.begins_with_bos))
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
        if !vocabulary.is_first(id) {
            continue;
        }
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
