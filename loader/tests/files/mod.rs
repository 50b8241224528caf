//! Model files for tests, written by us from a model in memory: Hugging Face directories and GGUF
//! files. Every field can be made to lie before the bytes are taken.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod bundle;
pub(crate) mod gguf;

use std::path::Path;

use hat_loader::{DType, SourceModel};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// `config.json` of a model.
pub(crate) fn config_json(model: &SourceModel) -> Value {
    let c = model.config();
    json!({
        "model_type": c.architecture.name(),
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "sliding_window": c.sliding_window,
        "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_ids,
    })
}

/// Writes tensors of a model as one safetensors file.
pub(crate) fn write_safetensors(model: &SourceModel, names: &[&str], path: &Path) {
    let tensors: Vec<_> = names.iter().map(|name| model.tensor(name).unwrap()).collect();
    let views = tensors.iter().map(|tensor| {
        let dtype = match tensor.dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::Bf16 => Dtype::BF16,
            other => panic!("{other:?} is not for safetensors"),
        };
        let view = TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes).unwrap();
        (tensor.name.clone(), view)
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Writes a Hugging Face directory with `shards` weight files; 1 is a single file, no index.
pub(crate) fn write_directory(model: &SourceModel, directory: &Path, shards: usize) {
    std::fs::create_dir_all(directory).unwrap();
    write_json(&directory.join("config.json"), &config_json(model));
    std::fs::write(directory.join("tokenizer.json"), model.tokenizer_json()).unwrap();
    let settings = serde_json::to_value(model.token_settings()).unwrap();
    write_json(&directory.join("tokenizer_config.json"), &settings);
    let names: Vec<&str> = model.tensor_names().collect();
    if shards == 1 {
        write_safetensors(model, &names, &directory.join("model.safetensors"));
        return;
    }
    let mut weight_map = serde_json::Map::new();
    for (index, names) in names.chunks(names.len().div_ceil(shards)).enumerate() {
        let shard = format!("model-{:05}-of-{shards:05}.safetensors", index + 1);
        write_safetensors(model, names, &directory.join(&shard));
        for name in names {
            weight_map.insert((*name).to_owned(), json!(shard));
        }
    }
    let index = json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
    write_json(&directory.join("model.safetensors.index.json"), &index);
}

pub(crate) fn write_json(path: &Path, json: &Value) {
    std::fs::write(path, json.to_string()).unwrap();
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Reads a JSON file, changes it, and writes it back.
pub(crate) fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json = read_json(path);
    change(&mut json);
    write_json(path, &json);
}
