//! `config.json` as Hugging Face transformers writes it.
//!
//! Transformers 5 puts `rope_theta` and `rope_scaling` into one object, `rope_parameters`; both
//! forms are read. Keys that are unknown or ask for something which we don't compute are refused
//! by name; see `keys`.

use serde_json::Value;

use super::{ConfigError, Family, LlamaConfig, RopeScaling, keys};
use crate::schemes::Scheme;

/// Families by `model_type`.
const FAMILIES: [Family; 3] = [Family::Llama, Family::Mistral, Family::Qwen2];

pub(super) fn parse(json: &Value) -> Result<LlamaConfig, ConfigError> {
    if !json.is_object() {
        return Err(ConfigError::new("config.json", "not a JSON object"));
    }
    let architecture = family(json)?;
    keys::check(&keys::TOP, json)?;
    refuse_foreign(json)?;
    let hidden_size = required(json, "hidden_size")?;
    let num_attention_heads = required(json, "num_attention_heads")?;
    let num_hidden_layers = required(json, "num_hidden_layers")?;
    let head_dim = match count(json, "head_dim")? {
        Some(head_dim) => head_dim,
        None if num_attention_heads > 0 && hidden_size.is_multiple_of(num_attention_heads) => {
            hidden_size / num_attention_heads
        }
        None => {
            let reason =
                format!("{num_attention_heads} does not divide hidden_size = {hidden_size}");
            return Err(ConfigError::new("num_attention_heads", reason));
        }
    };
    let attention_bias = match architecture {
        Family::Qwen2 => true,
        _ if flag(json, "attention_bias")? == Some(true) => {
            // In these families it would mean a bias on o_proj, too.
            return Err(ConfigError::new("attention_bias", "true is supported for qwen2 only"));
        }
        _ => false,
    };
    let (rope_theta, rope_scaling) = rope(json)?;
    Ok(LlamaConfig {
        architecture,
        hidden_size,
        intermediate_size: required(json, "intermediate_size")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: count(json, "num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps: number(json, "rms_norm_eps")?
            .ok_or_else(|| ConfigError::new("rms_norm_eps", "missing"))?,
        rope_theta,
        rope_scaling,
        vocab_size: required(json, "vocab_size")?,
        max_position_embeddings: required(json, "max_position_embeddings")?,
        sliding_window: sliding_window(json, architecture, num_hidden_layers)?,
        attention_bias,
        tie_word_embeddings: flag(json, "tie_word_embeddings")?.unwrap_or(false),
        bos_token_id: token_ids(json, "bos_token_id")?.first().copied(),
        eos_token_ids: token_ids(json, "eos_token_id")?,
    })
}

fn family(json: &Value) -> Result<Family, ConfigError> {
    let name = present(json, "model_type")
        .ok_or_else(|| ConfigError::new("model_type", "missing"))?
        .as_str()
        .ok_or_else(|| ConfigError::new("model_type", "not a string"))?;
    FAMILIES.into_iter().find(|family| family.name() == name).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().map(|family| family.name()).collect();
        let known = known.join(", ");
        let reason = format!("{} is not supported; supported: {known}", short(&Value::from(name)));
        ConfigError::new("model_type", reason)
    })
}

/// Refuses settings that would change the arithmetic and are not implemented.
fn refuse_foreign(json: &Value) -> Result<(), ConfigError> {
    if let Some(act) = present(json, "hidden_act")
        && act.as_str() != Some("silu")
    {
        return Err(ConfigError::new(
            "hidden_act",
            format!("{} is not supported, only \"silu\"", short(act)),
        ));
    }
    if flag(json, "mlp_bias")? == Some(true) {
        return Err(ConfigError::new("mlp_bias", "true is not supported"));
    }
    if let Some(partial) = number(json, "partial_rotary_factor")?
        && partial != 1.0
    {
        let reason = format!("{partial} is not supported, only 1");
        return Err(ConfigError::new("partial_rotary_factor", reason));
    }
    Scheme::of(json).map(drop)
}

/// `rope_theta` and the scaling, from either form.
fn rope(json: &Value) -> Result<(f32, Option<RopeScaling>), ConfigError> {
    let old = present(json, "rope_scaling");
    let (key, object) = match present(json, "rope_parameters") {
        Some(object) => ("rope_parameters", Some(object)),
        None => ("rope_scaling", old),
    };
    if key == "rope_parameters" && old.is_some_and(|old| Some(old) != object) {
        let reason = "says something else than rope_parameters; remove one of the two";
        return Err(ConfigError::new("rope_scaling", reason));
    }
    let theta = match object.map(|object| number(object, "rope_theta")).transpose()?.flatten() {
        Some(theta) => Some(theta),
        None => number(json, "rope_theta")?,
    };
    let theta = theta.unwrap_or(10_000.0);
    let Some(object) = object else {
        return Ok((theta, None));
    };
    if !object.is_object() {
        return Err(ConfigError::new(key, format!("{} is not an object", short(object))));
    }
    let within =
        |error: ConfigError| ConfigError::new(format!("{key}.{}", error.key), error.reason);
    keys::check(&keys::ROPE, object).map_err(within)?;
    let need = |name: &str| {
        number(object, name)
            .and_then(|value| value.ok_or_else(|| ConfigError::new(name, "missing")))
            .map_err(within)
    };
    let kind = present(object, "rope_type").or_else(|| present(object, "type"));
    let scaling = match kind.map(|kind| kind.as_str().unwrap_or("?")) {
        None if key == "rope_parameters" => None,
        None => return Err(ConfigError::new(format!("{key}.rope_type"), "missing")),
        Some("default") => None,
        Some("linear") => Some(RopeScaling::Linear { factor: need("factor")? }),
        Some("llama3") => Some(RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max_position_embeddings: required(object, "original_max_position_embeddings")
                .map_err(within)?,
        }),
        Some(other) => {
            let reason = "not supported; supported: default, linear, llama3";
            let reason = format!("{} is {reason}", short(&Value::from(other)));
            return Err(ConfigError::new(format!("{key}.rope_type"), reason));
        }
    };
    Ok((theta, scaling))
}

/// The window that all layers share, if they have one.
fn sliding_window(
    json: &Value,
    architecture: Family,
    layers: usize,
) -> Result<Option<u32>, ConfigError> {
    let window = family_window(json, architecture, layers)?;
    // Newer files say it once more, layer by layer.
    let Some(types) = present(json, "layer_types") else {
        return Ok(window);
    };
    let list = types.as_array().map_or(&[][..], Vec::as_slice);
    let all = |name: &str| !list.is_empty() && list.iter().all(|kind| kind.as_str() == Some(name));
    if all("full_attention") {
        Ok(None)
    } else if all("sliding_attention") && window.is_some() {
        Ok(window)
    } else {
        let reason = "supported: all full_attention, or all sliding_attention with a window";
        Err(ConfigError::new("layer_types", reason))
    }
}

fn family_window(
    json: &Value,
    architecture: Family,
    layers: usize,
) -> Result<Option<u32>, ConfigError> {
    let window = match count(json, "sliding_window")? {
        Some(window) => Some(u32::try_from(window).map_err(|_| {
            ConfigError::new("sliding_window", format!("{window} does not fit 32 bits"))
        })?),
        // Absent is not null: transformers' Mistral has a window unless told otherwise.
        None if architecture == Family::Mistral && json.get("sliding_window").is_none() => {
            Some(4096)
        }
        None => None,
    };
    match architecture {
        Family::Llama => Ok(None),
        Family::Mistral => Ok(window),
        Family::Qwen2 => {
            if flag(json, "use_sliding_window")? != Some(true) || window.is_none() {
                return Ok(None);
            }
            match count(json, "max_window_layers")?.unwrap_or(28) {
                0 => Ok(window),
                full if full >= layers => Ok(None),
                full => {
                    let reason =
                        format!("{full} of {layers} layers without a window: not supported");
                    Err(ConfigError::new("max_window_layers", reason))
                }
            }
        }
    }
}

/// A value for a message: short, whatever the file holds.
pub(crate) fn short(value: &Value) -> String {
    const CHARS_MAX: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(CHARS_MAX) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

/// `key`'s value unless it is absent or null.
fn present<'a>(json: &'a Value, key: &str) -> Option<&'a Value> {
    json.get(key).filter(|value| !value.is_null())
}

fn count(json: &Value, key: &str) -> Result<Option<usize>, ConfigError> {
    let Some(value) = present(json, key) else {
        return Ok(None);
    };
    let count = value.as_u64().and_then(|value| usize::try_from(value).ok());
    match count {
        Some(count) => Ok(Some(count)),
        None => {
            Err(ConfigError::new(key, format!("{} is not a whole number from 0", short(value))))
        }
    }
}

fn required(json: &Value, key: &str) -> Result<usize, ConfigError> {
    count(json, key)?.ok_or_else(|| ConfigError::new(key, "missing"))
}

pub(crate) fn number(json: &Value, key: &str) -> Result<Option<f32>, ConfigError> {
    let Some(value) = present(json, key) else {
        return Ok(None);
    };
    match value.as_f64() {
        Some(number) => Ok(Some(number as f32)),
        None => Err(ConfigError::new(key, format!("{} is not a number", short(value)))),
    }
}

pub(crate) fn flag(json: &Value, key: &str) -> Result<Option<bool>, ConfigError> {
    let Some(value) = present(json, key) else {
        return Ok(None);
    };
    match value.as_bool() {
        Some(flag) => Ok(Some(flag)),
        None => Err(ConfigError::new(key, format!("{} is not true or false", short(value)))),
    }
}

/// One token id or a list of them, ascending. Also read from `generation_config.json`.
pub(crate) fn token_ids(json: &Value, key: &str) -> Result<Vec<u32>, ConfigError> {
    let Some(value) = present(json, key) else {
        return Ok(Vec::new());
    };
    let id = |value: &Value| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| ConfigError::new(key, format!("{} is not a token id", short(value))))
    };
    let mut ids = match value {
        Value::Array(values) => values.iter().map(id).collect::<Result<Vec<_>, _>>()?,
        one => vec![id(one)?],
    };
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}
