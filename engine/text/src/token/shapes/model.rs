//! The model: BPE, the only kind of the supported families.

use serde_json::{Map, Value, json};

use super::fields::{Fields, Rule, short, wrong};
use super::{TOKEN_BYTES_MAX, TokenError};

const PATH: &str = "model";

/// Reads `model` for an embedding of `rows` rows.
pub(super) fn read(value: &Value, rows: usize) -> Result<Value, TokenError> {
    let mut fields = Fields::of(PATH, value)?;
    fields.take("type", Rule::OneOf(&["BPE"], None))?;
    let mut flags = Map::new();
    for name in ["fuse_unk", "byte_fallback", "ignore_merges"] {
        flags.insert(name.into(), fields.take(name, Rule::Flag(Some(false)))?);
    }
    // Merges left out at random are of training.
    if !matches!(fields.value("dropout"), Value::Null) && value["dropout"].as_f64() != Some(0.0) {
        return Err(wrong("model.dropout", "only null is supported"));
    }
    for name in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if !matches!(fields.value(name), Value::Null) && value[name] != "" {
            return Err(wrong(&fields.path_of(name), "only null is supported"));
        }
    }
    let vocab = vocabulary(fields.value("vocab"))?;
    let unknown = match fields.value("unk_token") {
        Value::Null => Value::Null,
        Value::String(text) if vocab.contains_key(text) => text.as_str().into(),
        _ => return Err(wrong("model.unk_token", "not a token of model.vocab")),
    };
    let merges = merges(fields.value("merges"), vocab, rows)?;
    fields.finish()?;
    let mut model = json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unknown,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "vocab": vocab,
        "merges": merges,
    });
    model.as_object_mut().expect("made above").append(&mut flags);
    Ok(model)
}

/// Ids by token; that each has a row of its own is checked with the added tokens.
fn vocabulary(value: &Value) -> Result<&Map<String, Value>, TokenError> {
    let vocab =
        value.as_object().ok_or_else(|| wrong("model.vocab", "not an object of tokens and ids"))?;
    for (token, id) in vocab {
        let path = || format!("model.vocab[\"{}\"]", short(token));
        if token.len() > TOKEN_BYTES_MAX {
            let reason = format!("{} bytes, at most {TOKEN_BYTES_MAX} are supported", token.len());
            return Err(wrong(&path(), reason));
        }
        if id.as_u64().is_none_or(|id| u32::try_from(id).is_err()) {
            return Err(wrong(&path(), "its id is not a whole number from 0 to 4294967295"));
        }
    }
    Ok(vocab)
}

/// The merges as pairs: of tokens, to a token.
fn merges(
    value: &Value,
    vocab: &Map<String, Value>,
    rows: usize,
) -> Result<Vec<Value>, TokenError> {
    let list = value.as_array().ok_or_else(|| wrong("model.merges", "not a list"))?;
    super::within("tokenizer.json model.merges in entries", list.len(), 8 * rows + 1024)?;
    let mut merges = Vec::with_capacity(list.len());
    let mut made = String::new();
    for (index, merge) in list.iter().enumerate() {
        let path = || format!("model.merges[{index}]");
        let pair = match merge {
            Value::String(line) if line.starts_with("#version") => continue,
            Value::String(line) => line.split_once(' ').filter(|(_, right)| !right.contains(' ')),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some((&left[..], &right[..])),
                _ => None,
            },
            _ => None,
        };
        let Some((left, right)) = pair else {
            return Err(wrong(&path(), "not two tokens"));
        };
        made.clear();
        made.extend([left, right]);
        if let Some(token) =
            [left, right, &made].into_iter().find(|token| !vocab.contains_key(*token))
        {
            return Err(wrong(&path(), format!("{:?} is no token of model.vocab", short(token))));
        }
        merges.push(json!([left, right]));
    }
    Ok(merges)
}
