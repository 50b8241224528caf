//! GGUF files, versions 2 and 3, of the architectures `llama` and `qwen2`.
//!
//! Tensors come out under their checkpoint names and in the checkpoint's order: the architecture
//! `llama` stores the rows of q and k interleaved for another form of rotary embedding, `qwen2`
//! does not.

mod config;
mod keys;
mod parse;
mod parts;
mod pre;
mod tokenizer;
mod types;
mod vocabulary;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::config::ConfigError;
use crate::error::LoadError;
use crate::rows::SourceTensor;
use crate::source::SourceModel;
use crate::tensor::TensorBytes;

pub use parts::gguf_files;

use config::Architecture;
use parse::Container;
use parts::Part;
use types::GgufType;

/// An error in a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The file does not begin with `GGUF`.
    #[error("not a GGUF file: it begins with {got:02x?}")]
    Magic {
        /// Its first four bytes.
        got: [u8; 4],
    },
    /// The file's numbers are in the other byte order.
    #[error("big-endian GGUF is not supported")]
    BigEndian,
    /// A version that we don't read.
    #[error("GGUF version {version} is not supported; versions 2 and 3 are")]
    Version {
        /// The version in the file.
        version: u32,
    },
    /// The file ends before what it announces.
    #[error("file ends within {what} (at byte {at})")]
    Truncated {
        /// Item that was being read.
        what: String,
        /// Offset in the file, in bytes.
        at: usize,
    },
    /// A count beyond reason.
    #[error("{what} is {count}, at most {max} are possible")]
    Count {
        /// Name of the count.
        what: &'static str,
        /// Its value.
        count: u64,
        /// The limit.
        max: u64,
    },
    /// A string is not UTF-8.
    #[error("{what} (at byte {at}) is not UTF-8")]
    NotUtf8 {
        /// Name of the string.
        what: String,
        /// Offset in the file, in bytes.
        at: usize,
    },
    /// A key or a tensor's name is empty or too long.
    #[error("{what} of {bytes} bytes, 1 to {max} are possible")]
    NameLength {
        /// Key or tensor name.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Two entries have one name.
    #[error("{what} {name} occurs twice")]
    Duplicate {
        /// Key or tensor.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A metadata value is missing, of another type, or impossible.
    #[error("{key}: {reason}")]
    Metadata {
        /// The key.
        key: String,
        /// Description of the fault.
        reason: String,
    },
    /// A tensor has no dimension or too many.
    #[error("tensor {tensor} has {dimensions} dimensions, 1 to {max} are possible")]
    Dimensions {
        /// The tensor.
        tensor: String,
        /// Number of its dimensions.
        dimensions: u32,
        /// The limit.
        max: u32,
    },
    /// A type that we don't read.
    #[error(
        "tensor {tensor} has type {kind} ({number}), which is not supported; these are: {}",
        GgufType::names()
    )]
    TensorType {
        /// The tensor.
        tensor: String,
        /// The type's number.
        number: u32,
        /// Its name.
        kind: &'static str,
    },
    /// Rows are no whole number of blocks.
    #[error("tensor {tensor} has rows of {row} weights, not a multiple of its blocks of {block}")]
    Blocks {
        /// The tensor.
        tensor: String,
        /// Weights in a row.
        row: usize,
        /// Weights in a block.
        block: usize,
    },
    /// A size or an offset beyond what can be counted.
    #[error("tensor {tensor}: its size or offset overflows")]
    Overflow {
        /// The tensor.
        tensor: String,
    },
    /// An offset is not aligned.
    #[error("tensor {tensor} at offset {offset}, not a multiple of the alignment {alignment}")]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// Its offset.
        offset: u64,
        /// Alignment of the file's data, in bytes.
        alignment: usize,
    },
    /// A tensor ends behind the file.
    #[error("tensor {tensor} ends at byte {end}, the file has {file_bytes}")]
    Outside {
        /// The tensor.
        tensor: String,
        /// Its end.
        end: usize,
        /// Size of the file.
        file_bytes: usize,
    },
    /// One of a model's files is not there.
    #[error("part {number} of {count} is missing")]
    MissingPart {
        /// Number of the file, from 1.
        number: u64,
        /// Number of files that the model has.
        count: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {first} and {second} overlap")]
    Overlap {
        /// The one in front.
        first: String,
        /// The one behind.
        second: String,
    },
    /// A tensor whose name is not one of these architectures'.
    #[error("tensor {tensor} is not known for architecture {architecture}")]
    UnknownTensor {
        /// The tensor.
        tensor: String,
        /// The architecture.
        architecture: String,
    },
}

impl GgufError {
    fn metadata(key: &str, reason: impl Into<String>) -> Self {
        Self::Metadata { key: key.to_owned(), reason: reason.into() }
    }
}

impl From<ConfigError> for GgufError {
    fn from(error: ConfigError) -> Self {
        Self::Metadata { key: error.key, reason: error.reason }
    }
}

/// Opens a file, and the other files of its model; the tensors are not yet checked against the
/// configuration.
pub(crate) fn open(path: &Path, pre: Option<&str>) -> Result<SourceModel, LoadError> {
    read(&parts::open(path)?, pre)
}

/// Entry for fuzzers.
pub(crate) fn fuzz(bytes: &[u8]) -> bool {
    let part = Part { path: "fuzz".into(), file: Arc::new(bytes.to_vec()) };
    read(&[part], None).is_ok_and(|model| model.check().is_ok())
}

fn read(parts: &[Part], pre: Option<&str>) -> Result<SourceModel, LoadError> {
    let containers = parts.iter().map(Part::parse).collect::<Result<Vec<_>, _>>()?;
    let container = parts::merge(parts, containers)?;
    model(parts, &container, pre).map_err(|error| parts[0].wrong(error))
}

/// The model of one container that has the tensors of all files.
fn model(
    parts: &[Part],
    container: &Container<'_>,
    pre: Option<&str>,
) -> Result<SourceModel, GgufError> {
    let path = &parts[0].path;
    let architecture = config::architecture(container)?;
    let rope_freqs = container.tensors.get(config::ROPE_FREQS);
    let rope_freqs = rope_freqs.map(|info| (info, &parts[info.part].bytes()[info.range.clone()]));
    let config = config::config(container, architecture, rope_freqs)?;
    let (tokenizer_json, settings, text) = tokenizer::tokenizer(container, config.vocab_size, pre)?;
    let sampling = config::sampling(container)?;

    let mut tensors = BTreeMap::new();
    for (name, info) in &container.tensors {
        let Some(checkpoint_name) = checkpoint_name(name) else {
            if name == config::ROPE_FREQS {
                continue;
            }
            let (tensor, architecture) = (name.clone(), architecture.name().to_owned());
            return Err(GgufError::UnknownTensor { tensor, architecture });
        };
        let heads = if checkpoint_name.contains(".self_attn.q_proj.") {
            Some(config.num_attention_heads)
        } else if checkpoint_name.contains(".self_attn.k_proj.") {
            Some(config.num_key_value_heads)
        } else {
            None
        };
        let part = &parts[info.part];
        let bytes = TensorBytes::new(Arc::clone(&part.file), info.range.clone());
        let (dtype, rows, origin) = info.kind.read(bytes);
        let tensor = SourceTensor {
            path: part.path.clone(),
            dtype,
            shape: info.shape.clone(),
            rows,
            origin,
            interleaved_heads: heads.filter(|_| architecture == Architecture::Llama),
        };
        tensors.insert(checkpoint_name, tensor);
    }
    // `general.name` is often what the converter found on its disk; people chose the file's name.
    let name = path.file_name().map_or("model".into(), |name| name.to_string_lossy());
    let name =
        parts::stem(&name).map_or(name.strip_suffix(".gguf").unwrap_or(&name), |(stem, _)| stem);
    Ok(SourceModel {
        name: name.to_owned(),
        path: path.clone(),
        config,
        tensors,
        tokenizer_json,
        settings,
        text,
        sampling,
    })
}

/// The checkpoint name of a GGUF tensor.
fn checkpoint_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some(crate::split::EMBED_TOKENS.to_owned()),
        "output_norm.weight" => return Some(crate::split::FINAL_NORM.to_owned()),
        "output.weight" => return Some(crate::split::LM_HEAD.to_owned()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    // Only the usual way to write a number, so that no two names mean one tensor.
    let layer: usize = layer.parse().ok().filter(|n: &usize| n.to_string() == layer)?;
    let part = match part {
        "attn_norm.weight" => "input_layernorm.weight",
        "attn_q.weight" => "self_attn.q_proj.weight",
        "attn_k.weight" => "self_attn.k_proj.weight",
        "attn_v.weight" => "self_attn.v_proj.weight",
        "attn_q.bias" => "self_attn.q_proj.bias",
        "attn_k.bias" => "self_attn.k_proj.bias",
        "attn_v.bias" => "self_attn.v_proj.bias",
        "attn_output.weight" => "self_attn.o_proj.weight",
        "ffn_norm.weight" => "post_attention_layernorm.weight",
        "ffn_gate.weight" => "mlp.gate_proj.weight",
        "ffn_up.weight" => "mlp.up_proj.weight",
        "ffn_down.weight" => "mlp.down_proj.weight",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}"))
}
