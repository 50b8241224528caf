//! Hugging Face directories: what comes out of good ones, and each way of being bad.

use std::path::Path;

use crate::files::{edit_json, write_directory, write_json, write_safetensors};
use hat_loader::{DType, HeaderError, LoadError, SourceModel, TinyModel, generated};
use safetensors::SafeTensorError;
use serde_json::{Value, json};
use tempfile::TempDir;

fn tiny() -> SourceModel {
    generated(&TinyModel { layers: 2, dtype: DType::Bf16, ..TinyModel::default() })
}

/// A directory of the tiny model in one weights file.
fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    write_directory(&tiny(), directory.path(), 1);
    directory
}

fn refused(directory: &TempDir) -> LoadError {
    match SourceModel::open(directory.path()) {
        Err(error) => error,
        Ok(_) => panic!("it opens"),
    }
}

/// Changes one JSON file of a good directory; the error must contain each of `parts`.
fn refused_with(file: &str, change: impl FnOnce(&mut Value), parts: &[&str]) {
    let directory = directory();
    edit_json(&directory.path().join(file), change);
    let text = refused(&directory).to_string();
    assert!(text.contains(file), "{text}");
    for part in parts {
        assert!(text.contains(part), "{text:?} without {part:?}");
    }
}

#[test]
fn one_file_and_shards_come_out_as_they_went_in() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let model = generated(&TinyModel { layers: 2, dtype, ..TinyModel::default() });
        for shards in [1, 3] {
            let directory = tempfile::tempdir().unwrap();
            write_directory(&model, directory.path(), shards);
            let opened = SourceModel::open(directory.path()).unwrap();
            assert_eq!(opened.config(), model.config());
            assert_eq!(opened.token_settings(), model.token_settings());
            assert_eq!(opened.tokenizer_json(), model.tokenizer_json());
            assert_eq!(Some(opened.name()), directory.path().file_name().unwrap().to_str());
            for name in model.tensor_names() {
                let (a, b) = (model.tensor(name).unwrap(), opened.tensor(name).unwrap());
                assert_eq!((a.dtype, &a.shape), (b.dtype, &b.shape));
                assert!(*a.bytes == *b.bytes, "{name}");
            }
        }
    }
}

#[test]
fn templates_and_tokens_have_several_forms() {
    let directory = directory();
    let path = directory.path().join("tokenizer_config.json");
    edit_json(&path, |json| {
        json["bos_token"] = json!({"content": "<|im_start|>", "lstrip": false});
        json["chat_template"] = json!([
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "chat"},
        ]);
    });
    let model = SourceModel::open(directory.path()).unwrap();
    assert_eq!(model.token_settings().bos_token.as_deref(), Some("<|im_start|>"));
    assert_eq!(model.chat_template(), Some("chat"));
    std::fs::write(directory.path().join("chat_template.jinja"), "from the file").unwrap();
    assert_eq!(SourceModel::open(directory.path()).unwrap().chat_template(), Some("from the file"));

    write_json(&directory.path().join("generation_config.json"), &json!({"eos_token_id": [7, 0]}));
    assert_eq!(SourceModel::open(directory.path()).unwrap().config().eos_token_ids, [0, 2, 7]);
    write_json(&directory.path().join("generation_config.json"), &json!({"eos_token_id": 512}));
    let text = refused(&directory).to_string();
    assert!(text.contains("generation_config.json: eos_token_id: 512"), "{text}");
}

#[test]
fn missing_files_are_named() {
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let directory = directory();
        std::fs::remove_file(directory.path().join(file)).unwrap();
        let text = refused(&directory).to_string();
        assert!(text.contains(file), "{text}");
    }
    let text = SourceModel::open(Path::new("/no/such/model")).err().unwrap().to_string();
    assert!(text.contains("/no/such/model"), "{text}");
}

#[test]
fn configurations_that_lie_are_refused() {
    let check = |key: &str, value: Value, reason: &str| {
        refused_with("config.json", |json| json[key] = value, &[key, reason]);
    };
    check("model_type", json!("gemma3"), "gemma3");
    check("num_attention_heads", json!(0), "0");
    check("num_key_value_heads", json!(3), "does not divide");
    check("num_hidden_layers", json!(1_000_000), "1000000");
    check("num_hidden_layers", json!(-1), "-1");
    check("hidden_size", json!(64.5), "64.5");
    check("hidden_size", json!(u64::MAX), "18446744073709551615");
    check("head_dim", json!(15), "odd");
    check("rms_norm_eps", json!(-1e-5), "between 0 and 1");
    check("rope_theta", json!(0), "rope_theta: 0");
    check("rope_theta", json!(1e300), "inf");
    check("hidden_act", json!("gelu"), "silu");
    check("mlp_bias", json!(true), "not supported");
    check("vocab_size", json!(1 << 30), "1073741824");
    check("bos_token_id", json!(512), "512");
    check("eos_token_id", json!([1, -1]), "-1");
    check("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "yarn");
    check("rope_scaling", json!({"rope_type": "linear"}), "factor: missing");
    check("rope_scaling", json!({"rope_type": "linear", "factor": 0.5}), "0.5");
    check("quantization_config", json!({"quant_method": "hqq"}), "hqq");
    let directory = directory();
    std::fs::write(directory.path().join("config.json"), "{\"rope_theta\": NaN}").unwrap();
    assert!(matches!(refused(&directory), LoadError::Json { .. }));
    std::fs::write(directory.path().join("config.json"), "[".repeat(100_000)).unwrap();
    assert!(matches!(refused(&directory), LoadError::Json { .. }));
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    let file = "tokenizer.json";
    refused_with(file, |json| json["model"]["vocab"]["far"] = json!(512), &["512 rows", "id 512"]);
    refused_with(file, |json| json["added_tokens"][0]["id"] = json!(9999), &["9999"]);
    refused_with(file, |json| json["model"]["vocab"] = json!({}), &["vocab"]);
    refused_with(file, |json| *json = json!({}), &["model.vocab"]);
}

#[test]
fn tensors_are_held_against_the_configuration() {
    let config = "config.json";
    let model = tiny();
    // Another width than the tensors have.
    let directory = directory();
    edit_json(&directory.path().join(config), |json| json["intermediate_size"] = json!(127));
    match refused(&directory) {
        LoadError::TensorMismatch { name, expected, got, path } => {
            assert!(path.ends_with("model.safetensors"));
            assert!(name.contains("mlp."), "{name}");
            assert!(expected.contains("127") && got.contains("128"), "{expected} {got}");
        }
        other => panic!("{other}"),
    }
    // A layer too few, a layer too many.
    edit_json(&directory.path().join(config), |json| {
        json["intermediate_size"] = json!(128);
        json["num_hidden_layers"] = json!(3);
    });
    assert!(matches!(refused(&directory), LoadError::MissingTensor { .. }));
    edit_json(&directory.path().join(config), |json| json["num_hidden_layers"] = json!(1));
    assert!(matches!(refused(&directory), LoadError::UnknownTensor { .. }));
    // A tied model may carry a copy of its head; old files carry rotary frequencies.
    edit_json(&directory.path().join(config), |json| {
        json["num_hidden_layers"] = json!(2);
        json["tie_word_embeddings"] = json!(true);
    });
    let opened = SourceModel::open(directory.path()).unwrap();
    assert!(opened.tensor("lm_head.weight").is_err());
    assert!(opened.tensor("model.norm.weight").is_ok());
    drop(opened);
    let names: Vec<&str> = model.tensor_names().filter(|name| !name.contains("v_proj")).collect();
    write_safetensors(&model, &names, &directory.path().join("model.safetensors"));
    assert!(matches!(refused(&directory), LoadError::MissingTensor { .. }));
}

#[test]
fn an_index_cannot_lead_out_of_the_directory() {
    let index = "model.safetensors.index.json";
    let sharded = || {
        let directory = tempfile::tempdir().unwrap();
        write_directory(&tiny(), directory.path(), 2);
        directory
    };
    for shard in [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        ".safetensors",
        "x.bin",
        "..safetensors/../x.safetensors",
        "x\0.safetensors",
        "",
    ] {
        let directory = sharded();
        edit_json(&directory.path().join(index), |json| {
            json["weight_map"]["model.norm.weight"] = json!(shard);
        });
        let error = refused(&directory);
        assert!(matches!(error, LoadError::Index { .. }), "{shard}: {error}");
    }
    // A tensor that is elsewhere, one that is nowhere, one that is in both.
    let directory = sharded();
    edit_json(&directory.path().join(index), |json| {
        json["weight_map"]["model.norm.weight"] = json!("model-00001-of-00002.safetensors");
    });
    assert!(matches!(refused(&directory), LoadError::Index { .. }));
    edit_json(&directory.path().join(index), |json| {
        json["weight_map"]["model.norm.weight"] = json!("model-00003-of-00002.safetensors");
    });
    assert!(matches!(refused(&directory), LoadError::Io { .. }));
    let directory = sharded();
    let model = tiny();
    let names: Vec<&str> = model.tensor_names().collect();
    write_safetensors(&model, &names, &directory.path().join("model-00001-of-00002.safetensors"));
    let text = refused(&directory).to_string();
    assert!(text.contains("is also in"), "{text}");
    edit_json(&directory.path().join(index), |json| json["weight_map"] = json!([]));
    assert!(matches!(refused(&directory), LoadError::Index { .. }));
}

/// A weights file with this header and this many bytes of data.
fn refused_header(header: &str, data: usize) -> HeaderError {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    refused_weights(&bytes)
}

fn refused_weights(bytes: &[u8]) -> HeaderError {
    let directory = directory();
    std::fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
    match refused(&directory) {
        LoadError::Header { error, path } => {
            assert!(path.ends_with("model.safetensors"));
            error
        }
        other => panic!("another error: {other}"),
    }
}

#[test]
fn headers_that_lie_are_refused() {
    let short = refused_weights(b"1234567");
    assert!(matches!(short, HeaderError::TooShort { bytes: 7 }), "{short}");
    for length in [1, 100, 200_000_000, u64::MAX, u64::MAX - 7] {
        let error = refused_weights(&length.to_le_bytes());
        assert!(matches!(error, HeaderError::Length { available: 0, .. }), "{error}");
    }
    let json = |error: HeaderError, part: &str| {
        assert!(
            matches!(error, HeaderError::Json(_)) && error.to_string().contains(part),
            "{error}"
        );
    };
    json(refused_header("{", 0), "EOF");
    json(refused_header("{} {}", 0), "trailing");
    json(refused_header("[]", 0), "invalid type");
    json(refused_header(&"[".repeat(100_000), 0), "");
    json(one("F33", "[4]", 0, 16, 16), "tensor a");
    json(one("F32", "[-4]", 0, 16, 16), "tensor a");
    json(two(tensor("a", "F32", "[4]", 16, 32), 32), "a occurs twice");
}

/// One entry of a header.
fn tensor(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

/// A file of one tensor `a`.
fn one(dtype: &str, shape: &str, start: u64, end: u64, data: usize) -> HeaderError {
    let tensor = tensor("a", dtype, shape, start, end);
    refused_header(&format!("{{{tensor}}}"), data)
}

/// A file of a good tensor of 16 bytes and a second one.
fn two(second: String, data: usize) -> HeaderError {
    let first = tensor("a", "F32", "[4]", 0, 16);
    refused_header(&format!("{{{first},{second}}}"), data)
}

#[test]
fn offsets_that_lie_are_refused() {
    let tensors = |error: HeaderError| assert!(matches!(error, HeaderError::Tensors(_)), "{error}");
    // A hole, an overlap, the wrong size, a size that overflows, an end before the start.
    tensors(two(tensor("b", "F32", "[4]", 20, 36), 36));
    tensors(two(tensor("b", "F32", "[4]", 12, 28), 28));
    tensors(one("F32", "[5]", 0, 16, 16));
    let huge = one("F32", "[4294967296,4294967296,4294967296]", 0, 16, 16);
    assert!(matches!(huge, HeaderError::Tensors(SafeTensorError::ValidationOverflow)), "{huge}");
    tensors(one("F32", "[0]", 16, 0, 16));
    let rank = one("F32", "[1,1,1,1,1,1,1,1,4]", 0, 16, 16);
    assert!(matches!(rank, HeaderError::Dimensions { dimensions: 9, .. }), "{rank}");
    // The sum of header and data wraps around: each tensor is as large as one can be.
    let size = (1 << 61) - 1;
    let many: Vec<String> = (0..8u64)
        .map(|i| tensor(&i.to_string(), "U8", &format!("[{size}]"), i * size, (i + 1) * size))
        .collect();
    let wrapped = refused_header(&format!("{{{}}}", many.join(",")), 16);
    assert!(matches!(wrapped, HeaderError::DataLength { file: 16, .. }), "{wrapped}");
    // A truncated and a prolonged file.
    let short = one("F32", "[4]", 0, 16, 15);
    assert!(matches!(short, HeaderError::DataLength { tensors: 16, file: 15 }), "{short}");
    let long = one("F32", "[4]", 0, 16, 17);
    assert!(matches!(long, HeaderError::DataLength { tensors: 16, file: 17 }), "{long}");
}

#[test]
fn other_types_are_refused_by_name() {
    let directory = directory();
    let header = r#"{"w":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 8]);
    std::fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
    match refused(&directory) {
        LoadError::TensorMismatch { name, got, .. } => {
            assert_eq!((name.as_str(), got.as_str()), ("w", "I64 [1]"));
        }
        other => panic!("{other}"),
    }
}
