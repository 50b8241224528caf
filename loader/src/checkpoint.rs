//! Hugging Face directories: config.json, safetensors shards, tokenizer and chat template.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::config::{LlamaConfig, token_ids};
use crate::error::LoadError;
use crate::file;
use crate::header;
use crate::map::FileMap;
use crate::sampling::SamplingDefaults;
use crate::schemes::{self, RawTensor, RawTensors, Scheme};
use crate::source::{SourceModel, TextReport, TokenSettings};
use crate::split::LM_HEAD;
use crate::tensor::TensorBytes;

/// Longest JSON or template file that is read.
const TEXT_BYTES_MAX: u64 = 256 << 20;
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Opens a directory; the tensors are not yet checked against the configuration.
pub(crate) fn open(directory: &Path) -> Result<SourceModel, LoadError> {
    let config_path = directory.join("config.json");
    if !file::is_there(&config_path) {
        return Err(LoadError::NotAModel {
            path: directory.to_owned(),
            reason: "no config.json in it; expected a Hugging Face directory or a GGUF file".into(),
        });
    }
    let json = read_json(&config_path)?;
    let wrong = |error| LoadError::config(&config_path, error);
    let mut config = LlamaConfig::from_hf(&json).map_err(wrong)?;
    let scheme = Scheme::of(&json).map_err(wrong)?;
    let sampling = read_generation(directory, &mut config)?;

    let tokenizer_path = directory.join("tokenizer.json");
    if !file::is_there(&tokenizer_path) {
        let reason = "no such file; slow tokenizers (tokenizer.model) must be converted first";
        return Err(LoadError::tokenizer(&tokenizer_path, reason));
    }
    let tokenizer_json = read_text(&tokenizer_path)?;
    check_tokenizer(&tokenizer_path, &tokenizer_json, config.vocab_size)?;

    let mut tensors = schemes::assemble(read_tensors(directory)?, scheme.as_ref())?;
    // What a file may hold beside the model: a copy of the tied head, and rotary frequencies that
    // old transformers saved and new ones compute.
    if config.tie_word_embeddings {
        tensors.remove(LM_HEAD);
    }
    tensors.retain(|name, _| !name.ends_with(".self_attn.rotary_emb.inv_freq"));

    let absolute = directory.canonicalize().map_err(|error| LoadError::io(directory, error))?;
    let name = absolute.file_name().map_or("model".into(), |name| name.to_string_lossy());
    Ok(SourceModel {
        name: name.into_owned(),
        path: directory.to_owned(),
        config,
        tensors,
        tokenizer_json,
        settings: read_settings(directory)?,
        text: TextReport::default(),
        sampling,
    })
}

/// `generation_config.json` may know more tokens that end an answer, and how to sample.
fn read_generation(
    directory: &Path,
    config: &mut LlamaConfig,
) -> Result<SamplingDefaults, LoadError> {
    let path = directory.join("generation_config.json");
    if !file::is_there(&path) {
        return Ok(SamplingDefaults::default());
    }
    let wrong = |error| LoadError::config(&path, error);
    let json = read_json(&path)?;
    config.eos_token_ids.extend(token_ids(&json, "eos_token_id").map_err(wrong)?);
    config.eos_token_ids.sort_unstable();
    config.eos_token_ids.dedup();
    config.check().map_err(wrong)?;
    SamplingDefaults::from_hf(&json).map_err(wrong)
}

/// No id of the tokenizer may be beyond the embedding's rows.
pub(crate) fn check_tokenizer(path: &Path, json: &str, vocab_size: usize) -> Result<(), LoadError> {
    let json: Value = serde_json::from_str(json)
        .map_err(|error| LoadError::Json { path: path.to_owned(), error })?;
    let model = json.get("model").and_then(Value::as_object);
    let Some(vocab) = model.and_then(|model| model.get("vocab")) else {
        return Err(LoadError::tokenizer(path, "no model.vocab in it"));
    };
    let id_max = match vocab {
        Value::Object(vocab) => vocab.values().filter_map(Value::as_u64).max(),
        // Unigram: a list of [piece, score]; the index is the id.
        Value::Array(pieces) => (pieces.len() as u64).checked_sub(1),
        _ => None,
    };
    let Some(id_max) = id_max else {
        return Err(LoadError::tokenizer(path, "model.vocab is empty"));
    };
    let added = json.get("added_tokens").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let added = added.iter().filter_map(|token| token.get("id").and_then(Value::as_u64));
    let id_max = added.fold(id_max, u64::max);
    if id_max >= vocab_size as u64 {
        let reason = format!("token id {id_max}, but the embedding has {vocab_size} rows");
        return Err(LoadError::tokenizer(path, reason));
    }
    Ok(())
}

fn read_tensors(directory: &Path) -> Result<RawTensors, LoadError> {
    let single = directory.join(SINGLE);
    if single.exists() {
        let mut tensors = BTreeMap::new();
        read_shard(&single, &mut tensors)?;
        return Ok(tensors);
    }
    let index_path = directory.join(INDEX);
    if !file::is_there(&index_path) {
        return Err(LoadError::NotAModel {
            path: directory.to_owned(),
            reason: format!("neither {SINGLE} nor {INDEX} in it"),
        });
    }
    let weight_map = read_index(&index_path)?;
    let shards: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    let mut tensors = BTreeMap::new();
    for shard in shards {
        read_shard(&directory.join(shard), &mut tensors)?;
    }
    for (name, shard) in &weight_map {
        let holder = tensors.get(name).map(|tensor: &RawTensor| &tensor.path);
        if holder != Some(&directory.join(shard)) {
            let reason = format!("{name} should be in {shard} and is not");
            return Err(LoadError::Index { path: index_path, reason });
        }
    }
    Ok(tensors)
}

/// The index: which tensor is in which shard.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, LoadError> {
    let wrong = |reason: String| LoadError::Index { path: path.to_owned(), reason };
    let json = read_json(path)?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| wrong("weight_map is not an object".into()))?;
    map.iter()
        .map(|(name, shard)| match shard.as_str() {
            Some(shard) if is_shard_name(shard) => Ok((name.clone(), shard.to_owned())),
            _ => Err(wrong(format!(
                "weight_map.{name}: {shard} is not a shard's name (NAME-00001-of-00002.safetensors)"
            ))),
        })
        .collect()
}

/// `STEM-DIGITS-of-DIGITS.safetensors`, or `STEM.safetensors`, of letters, digits, `.`, `_`
/// and `-`, without a leading dot: nothing that leads out of the directory.
fn is_shard_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.len() <= 255
        && name.strip_suffix(".safetensors").is_some_and(|stem| !stem.is_empty())
        && !name.starts_with('.')
        && name.chars().all(plain)
}

fn read_shard(path: &Path, tensors: &mut RawTensors) -> Result<(), LoadError> {
    let map = FileMap::open(path).map_err(|error| LoadError::io(path, error))?;
    let entries = header::read((*map).as_ref())
        .map_err(|error| LoadError::Header { path: path.to_owned(), error })?;
    for (name, entry) in entries {
        let bytes = TensorBytes::new(Arc::clone(&map) as _, entry.range);
        let (dtype, shape) = (entry.dtype, entry.shape);
        let tensor = RawTensor { path: path.to_owned(), dtype, shape, bytes };
        if let Some(other) = tensors.insert(name.clone(), tensor) {
            let reason = format!("{name} is also in {}", other.path.display());
            return Err(LoadError::Index { path: path.to_owned(), reason });
        }
    }
    Ok(())
}

/// `tokenizer_config.json` and `chat_template.jinja`; both may be absent.
fn read_settings(directory: &Path) -> Result<TokenSettings, LoadError> {
    let path = directory.join("tokenizer_config.json");
    let json = if file::is_there(&path) { read_json(&path)? } else { Value::Null };
    let token = |key: &str| {
        let value = json.get(key)?;
        // A plain text, or the object that describes an added token.
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    };
    let template_path = directory.join("chat_template.jinja");
    let chat_template = if file::is_there(&template_path) {
        Some(read_text(&template_path)?)
    } else {
        json.get("chat_template").and_then(chat_template)
    };
    Ok(TokenSettings {
        bos_token: token("bos_token"),
        eos_token: token("eos_token"),
        unk_token: token("unk_token"),
        pad_token: token("pad_token"),
        add_bos_token: json.get("add_bos_token").and_then(Value::as_bool).unwrap_or(false),
        chat_template,
    })
}

/// A template's text, or of a list of named ones the `default`, else the first.
fn chat_template(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    let list = value.as_array()?;
    let named = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
    let entry = list.iter().find(named).or_else(|| list.first())?;
    entry.get("template")?.as_str().map(str::to_owned)
}

fn read_json(path: &Path) -> Result<Value, LoadError> {
    serde_json::from_str(&read_text(path)?)
        .map_err(|error| LoadError::Json { path: path.to_owned(), error })
}

/// A text file of at most [`TEXT_BYTES_MAX`].
fn read_text(path: &Path) -> Result<String, LoadError> {
    file::read_text(path, TEXT_BYTES_MAX).map_err(|error| match error.kind() {
        std::io::ErrorKind::FileTooLarge => {
            let bytes = std::fs::metadata(path).map_or(0, |found| found.len());
            LoadError::TooLarge { path: path.into(), bytes, bytes_max: TEXT_BYTES_MAX }
        }
        _ => LoadError::io(path, error),
    })
}
