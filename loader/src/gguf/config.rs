//! Metadata to hyper-parameters.

use super::parse::{Container, TensorInfo, Value};
use super::types::Form;
use super::{GgufError, keys};
use crate::config::{Family, LlamaConfig, RopeScaling};
use crate::sampling::SamplingDefaults;
use crate::tensor::DType;

/// Numbers by which rotary frequencies are divided; in Llama 3 files.
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";

/// `general.architecture` values that we read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    /// Llama and Mistral; q and k rows are interleaved.
    Llama,
    /// Qwen2 and 2.5.
    Qwen2,
}

impl Architecture {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }
}

pub(super) fn architecture(container: &Container<'_>) -> Result<Architecture, GgufError> {
    let key = "general.architecture";
    match container.metadata.get(key) {
        Some(Value::Text("llama")) => Ok(Architecture::Llama),
        Some(Value::Text("qwen2")) => Ok(Architecture::Qwen2),
        Some(other) => {
            let reason =
                format!("{other:?} is not supported; supported: llama (Mistral too), qwen2");
            Err(GgufError::metadata(key, reason))
        }
        None => Err(GgufError::metadata(key, "missing")),
    }
}

pub(super) fn config(
    container: &Container<'_>,
    architecture: Architecture,
    rope_freqs: Option<(&TensorInfo, &[u8])>,
) -> Result<LlamaConfig, GgufError> {
    keys::check(container, architecture.name())?;
    let keys = Keys { container, prefix: architecture.name() };
    refuse_foreign(&keys)?;
    let hidden_size = keys.need("embedding_length")?;
    let num_attention_heads = keys.need("attention.head_count")?;
    let head_dim = head_dim(&keys, hidden_size, num_attention_heads)?;
    let embedding = container.tensors.get("token_embd.weight");
    let vocab_size = match embedding.map(|info| info.shape.as_slice()) {
        Some([rows, _]) => *rows,
        _ => return Err(GgufError::metadata("token_embd.weight", "no such matrix")),
    };
    let (bos_token_id, eos_token_ids) = end_tokens(container)?;
    let config = LlamaConfig {
        architecture: match architecture {
            Architecture::Llama => Family::Llama,
            Architecture::Qwen2 => Family::Qwen2,
        },
        hidden_size,
        intermediate_size: keys.need("feed_forward_length")?,
        num_hidden_layers: keys.need("block_count")?,
        num_attention_heads,
        num_key_value_heads: keys.count("attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps: keys.number("attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
            GgufError::metadata(&keys.key("attention.layer_norm_rms_epsilon"), "missing")
        })?,
        rope_theta: keys.number("rope.freq_base")?.unwrap_or(10_000.0),
        rope_scaling: rope_scaling(&keys, rope_freqs)?,
        vocab_size,
        max_position_embeddings: keys.need("context_length")?,
        sliding_window: match keys.count("attention.sliding_window")? {
            None | Some(0) => None,
            Some(window) => Some(u32::try_from(window).map_err(|_| {
                GgufError::metadata(&keys.key("attention.sliding_window"), "beyond 32 bits")
            })?),
        },
        attention_bias: container.tensors.contains_key("blk.0.attn_q.bias"),
        tie_word_embeddings: !container.tensors.contains_key("output.weight"),
        bos_token_id,
        eos_token_ids,
    };
    config.check()?;
    Ok(config)
}

/// Refuses settings that would change the arithmetic and are not implemented.
fn refuse_foreign(keys: &Keys<'_>) -> Result<(), GgufError> {
    if keys.count("expert_count")?.unwrap_or(0) > 0 {
        let key = keys.key("expert_count");
        return Err(GgufError::metadata(&key, "mixture-of-experts models are not supported"));
    }
    Ok(())
}

fn head_dim(keys: &Keys<'_>, hidden_size: usize, heads: usize) -> Result<usize, GgufError> {
    let head_dim = match keys.count("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let reason = format!("{heads} does not divide embedding_length = {hidden_size}");
            return Err(GgufError::metadata(&keys.key("attention.head_count"), reason));
        }
    };
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(value) = keys.count(name)?
            && value != head_dim
        {
            let reason = format!("{value} differs from the head's {head_dim}: not supported");
            return Err(GgufError::metadata(&keys.key(name), reason));
        }
    }
    let scale = 1.0 / (head_dim as f32).sqrt();
    refuse_other(keys, "attention.scale", &[0.0, scale])?;
    refuse_other(keys, "embedding_length_out", &[0.0, hidden_size as f32])?;
    Ok(head_dim)
}

/// Refuses a number that is neither absent nor one of those that change nothing.
fn refuse_other(keys: &Keys<'_>, name: &str, neutral: &[f32]) -> Result<(), GgufError> {
    let key = keys.key(name);
    let Some(shown) = keys.container.metadata.get(&key) else {
        return Ok(());
    };
    let value = match shown {
        Value::Float(value) => Some(*value as f32),
        Value::Unsigned(value) => Some(*value as f32),
        _ => None,
    };
    if value.is_some_and(|value| neutral.contains(&value)) {
        return Ok(());
    }
    let reason = format!("{shown:?} is not supported, only one of {neutral:?}");
    Err(GgufError::metadata(&key, reason))
}

/// Scaling from the metadata or from the tensor of factors; both at once have no meaning.
fn rope_scaling(
    keys: &Keys<'_>,
    rope_freqs: Option<(&TensorInfo, &[u8])>,
) -> Result<Option<RopeScaling>, GgufError> {
    let kind_key = keys.key("rope.scaling.type");
    let factor = match keys.number("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.number("rope.scale_linear")?,
    };
    let linear = match keys.container.metadata.get(&kind_key) {
        None => factor.filter(|factor| *factor != 1.0),
        Some(Value::Text("none")) => None,
        Some(Value::Text("linear")) => match factor {
            Some(factor) => Some(factor),
            None => {
                return Err(GgufError::metadata(&keys.key("rope.scaling.factor"), "missing"));
            }
        },
        Some(other) => {
            let reason = format!("{other:?} is not supported; supported: none, linear");
            return Err(GgufError::metadata(&kind_key, reason));
        }
    };
    let Some((info, bytes)) = rope_freqs else {
        return Ok(linear.map(|factor| RopeScaling::Linear { factor }));
    };
    if linear.is_some() {
        return Err(GgufError::metadata(ROPE_FREQS, "present beside linear scaling"));
    }
    if !matches!(info.kind.form, Some(Form::Same(DType::F32))) {
        let reason = format!("type {}, expected F32", info.kind.name);
        return Err(GgufError::metadata(ROPE_FREQS, reason));
    }
    let factors = bytes
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().expect("chunks of 4")))
        .collect();
    Ok(Some(RopeScaling::Factors { factors }))
}

/// The first token, and those that end an answer by the metadata; `control` adds those of the
/// vocabulary.
fn end_tokens(container: &Container<'_>) -> Result<(Option<u32>, Vec<u32>), GgufError> {
    let bos = token_id(container, "tokenizer.ggml.bos_token_id")?;
    let mut eos = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        eos.extend(token_id(container, &format!("tokenizer.ggml.{key}"))?);
    }
    let key = "tokenizer.ggml.eos_token_ids";
    match container.metadata.get(key) {
        None => {}
        Some(Value::Array(array)) => {
            for value in array.iter() {
                eos.push(as_token_id(key, value)?);
            }
        }
        Some(other) => return Err(GgufError::metadata(key, format!("{other:?} is not a list"))),
    }
    eos.sort_unstable();
    eos.dedup();
    Ok((bos, eos))
}

/// A token id in the metadata; `u32::MAX` stands for "none" in some files.
pub(super) fn token_id(container: &Container<'_>, key: &str) -> Result<Option<u32>, GgufError> {
    match container.metadata.get(key) {
        None => Ok(None),
        Some(Value::Unsigned(id)) => match u32::try_from(*id) {
            Ok(u32::MAX) => Ok(None),
            Ok(id) => Ok(Some(id)),
            Err(_) => Err(GgufError::metadata(key, format!("{id} is not a token id"))),
        },
        Some(Value::Signed(-1)) => Ok(None),
        Some(other) => Err(GgufError::metadata(key, format!("{other:?} is not a token id"))),
    }
}

fn as_token_id(key: &str, value: Value<'_>) -> Result<u32, GgufError> {
    let id = match value {
        Value::Unsigned(id) => u32::try_from(id).ok(),
        Value::Signed(id) => u32::try_from(id).ok(),
        _ => None,
    };
    id.ok_or_else(|| GgufError::metadata(key, format!("{value:?} is not a token id")))
}

/// `general.sampling.*`, as llama.cpp's converter writes it from `generation_config.json`. A file
/// without a temperature is greedy.
pub(super) fn sampling(container: &Container<'_>) -> Result<SamplingDefaults, GgufError> {
    let key = |name: &str| format!("general.sampling.{name}");
    let number = |name: &str| match container.metadata.get(&key(name)) {
        None => Ok(None),
        Some(Value::Float(value)) => Ok(Some(*value as f32)),
        Some(other) => Err(GgufError::metadata(&key(name), format!("{other:?} is not a number"))),
    };
    // -1 stands for all.
    let count = |name: &str, all: u32| match container.metadata.get(&key(name)) {
        None => Ok(None),
        Some(Value::Signed(-1)) => Ok(Some(all)),
        Some(Value::Signed(value)) if u32::try_from(*value).is_ok() => Ok(Some(*value as u32)),
        Some(Value::Unsigned(value)) if u32::try_from(*value).is_ok() => Ok(Some(*value as u32)),
        Some(other) => {
            Err(GgufError::metadata(&key(name), format!("{other:?} is not a whole number")))
        }
    };
    let sampling = SamplingDefaults {
        temperature: number("temp")?,
        top_k: count("top_k", 0)?,
        top_p: number("top_p")?,
        min_p: number("min_p")?,
        repetition_penalty: number("penalty_repeat")?,
        repeat_last_n: count("penalty_last_n", u32::MAX)?,
    };
    sampling.checked().map_err(|error| {
        let name = match error.key.as_str() {
            "temperature" => "temp",
            "repetition_penalty" => "penalty_repeat",
            other => other,
        };
        GgufError::metadata(&key(name), error.reason)
    })
}

/// Metadata of one architecture.
struct Keys<'a> {
    container: &'a Container<'a>,
    prefix: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn count(&self, name: &str) -> Result<Option<usize>, GgufError> {
        let key = self.key(name);
        let value = match self.container.metadata.get(&key) {
            None => return Ok(None),
            Some(Value::Unsigned(value)) => usize::try_from(*value).ok(),
            Some(Value::Signed(value)) => usize::try_from(*value).ok(),
            // One number a layer: possible if all are the same.
            Some(Value::Array(array)) => {
                let mut values = array.iter();
                let first = values.next();
                match first {
                    Some(Value::Unsigned(value)) if values.all(|v| Some(v) == first) => {
                        usize::try_from(value).ok()
                    }
                    Some(Value::Signed(value)) if values.all(|v| Some(v) == first) => {
                        usize::try_from(value).ok()
                    }
                    _ => return Err(GgufError::metadata(&key, "differs from layer to layer")),
                }
            }
            Some(_) => None,
        };
        match value {
            Some(value) => Ok(Some(value)),
            None => Err(GgufError::metadata(&key, "not a whole number from 0")),
        }
    }

    fn need(&self, name: &str) -> Result<usize, GgufError> {
        self.count(name)?.ok_or_else(|| GgufError::metadata(&self.key(name), "missing"))
    }

    fn number(&self, name: &str) -> Result<Option<f32>, GgufError> {
        let key = self.key(name);
        match self.container.metadata.get(&key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value as f32)),
            Some(other) => Err(GgufError::metadata(&key, format!("{other:?} is not a number"))),
        }
    }
}
