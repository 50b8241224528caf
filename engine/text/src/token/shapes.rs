//! The shapes of `tokenizer.json` that reach the parser.
//!
//! The parser is not ours. Of a hostile file some of its parts allocate gigabytes, panic or abort
//! the process, when it is read or at the first text. So the file is read here first, as plain
//! JSON: each part is of a kind that the supported families use, with the fields of that kind and
//! no others, and the growth of a text in all steps is bounded before there is a text. The parser
//! gets what passed, written anew.

mod fields;
mod model;
mod steps;

use hat_plan::TokenId;
use serde_json::{Map, Value, json};

use self::fields::{Fields, Rule, wrong};
use self::steps::Steps;
use super::{TokenError, within};

/// Longest token, in bytes.
const TOKEN_BYTES_MAX: usize = 2048;
/// Most bytes that all added tokens have, before and after they are normalised.
const ADDED_BYTES_MAX: usize = 4 << 20;
/// Largest growth of a text in all steps.
const GROWTH_MAX: usize = 128;
/// Largest growth of a token in the decoder.
const DECODED_GROWTH_MAX: usize = 8;

/// A `tokenizer.json` of allowed shapes.
pub(super) struct Shapes {
    /// The file for the parser: written anew, without decoder, truncation and padding.
    pub(super) json: Value,
    /// The decoder, or null.
    pub(super) decoder: Value,
    /// Added tokens in the order of the file.
    pub(super) added: Vec<(TokenId, String)>,
    /// Bytes that one byte of a text becomes at most, before the model sees it.
    pub(super) growth: usize,
    /// True if text is cut by published expressions alone: those take no longer than it is long.
    pub(super) cuts_in_time: bool,
}

/// Reads a `tokenizer.json` for an embedding of `rows` rows.
///
/// # Errors
/// [`TokenError::TooLarge`] for a file of more values than such a vocabulary needs,
/// [`TokenError::Malformed`] with the path of the first field that is not allowed.
pub(super) fn check(json: &[u8], rows: usize) -> Result<Shapes, TokenError> {
    // A value takes many times the two bytes that it is written in.
    let values = json.iter().filter(|byte| matches!(byte, b'[' | b',' | b':')).count();
    within("tokenizer.json in values", values, 64 * rows + (64 << 10))?;
    let malformed = |error: serde_json::Error| TokenError::Malformed(error.to_string());
    let file: Map<String, Value> = serde_json::from_slice(json).map_err(malformed)?;
    let mut fields = Fields::new("", &file);
    fields.ignore(&["truncation", "padding"]);
    let version = fields.take("version", Rule::OneOf(&["1.0"], Some("1.0")))?;
    let normalizer = Steps::read("normalizer", fields.value("normalizer"), &steps::NORMALIZER)?;
    let cutting =
        Steps::read("pre_tokenizer", fields.value("pre_tokenizer"), &steps::PRE_TOKENIZER)?;
    let processor =
        Steps::read("post_processor", fields.value("post_processor"), &steps::POST_PROCESSOR)?;
    let decoder = Steps::read("decoder", fields.value("decoder"), &steps::DECODER)?;
    let added = added_tokens(fields.value("added_tokens"), normalizer.growth())?;
    let model = model::read(fields.value("model"), rows)?;
    fields.finish()?;

    let growth = normalizer.growth().saturating_mul(cutting.growth_of_pieces());
    if growth > GROWTH_MAX {
        let reason = format!(
            "with pre_tokenizer a text may become {growth} times as long, at most {GROWTH_MAX} \
             are supported"
        );
        return Err(wrong("normalizer", reason));
    }
    if decoder.growth() > DECODED_GROWTH_MAX {
        let reason = format!(
            "a token may become {} times as long, at most {DECODED_GROWTH_MAX} are supported",
            decoder.growth()
        );
        return Err(wrong("decoder", reason));
    }
    processor.check_ids(rows)?;
    let cuts_in_time = cutting.has_published_expressions();
    let listed = added.iter().map(|token| {
        let id = token["id"].as_u64().and_then(|id| TokenId::try_from(id).ok());
        (id.expect("checked"), token["content"].as_str().expect("checked").to_owned())
    });
    Ok(Shapes {
        added: listed.collect(),
        json: json!({
            "version": version,
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": normalizer.json,
            "pre_tokenizer": cutting.json,
            "post_processor": processor.json,
            "decoder": null,
            "model": model,
        }),
        decoder: decoder.json,
        growth,
        cuts_in_time,
    })
}

/// The added tokens; `growth` is that of the normaliser, which they may go through.
fn added_tokens(value: &Value, growth: usize) -> Result<Vec<Value>, TokenError> {
    let list = match value {
        Value::Null => &[][..],
        Value::Array(list) => list,
        _ => return Err(wrong("added_tokens", "not a list")),
    };
    let mut bytes = 0usize;
    let mut tokens = Vec::with_capacity(list.len());
    for (index, token) in list.iter().enumerate() {
        let path = format!("added_tokens[{index}]");
        let mut fields = Fields::of(&path, token)?;
        let mut made = Map::new();
        made.insert("id".into(), fields.take("id", Rule::Number(TokenId::MAX))?);
        let content = fields.take("content", Rule::Text(TOKEN_BYTES_MAX))?;
        bytes = bytes.saturating_add(content.as_str().map_or(0, str::len).saturating_mul(growth));
        made.insert("content".into(), content);
        for name in ["single_word", "lstrip", "rstrip", "normalized", "special"] {
            made.insert(name.into(), fields.take(name, Rule::Flag(None))?);
        }
        fields.finish()?;
        tokens.push(Value::Object(made));
    }
    if bytes > ADDED_BYTES_MAX {
        let reason = format!("{bytes} bytes in all, at most {ADDED_BYTES_MAX} are supported");
        return Err(wrong("added_tokens", reason));
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests;
