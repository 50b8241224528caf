//! Bundles that lie: each way of being bad.

use std::path::Path;

use crate::files::bundle::{options, tiny, write};
use crate::files::{edit_json, read_json};
use hat_loader::{
    Bundle, BundleError, DType, Role, SourceModel, TinyModel, Weights, check_same_model, generated,
    write_bundles,
};
use serde_json::{Value, json};

#[test]
fn numbers_beyond_the_type_are_refused() {
    let model = generated(&TinyModel { dtype: DType::F32, ..tiny() });
    let directory = tempfile::tempdir().unwrap();
    crate::files::write_directory(&model, directory.path(), 1);
    let path = directory.path().join("model.safetensors");
    let good = std::fs::read(&path).unwrap();
    // A scale of eight bits holds more than f16 does.
    for (number, kinds) in [
        (70_000.0, &[Weights::F16][..]),
        (9e6, &[Weights::F16, Weights::Q8]),
        (f32::NAN, &[Weights::F16, Weights::Q8]),
        (f32::NEG_INFINITY, &[Weights::F16, Weights::Q8]),
    ] {
        let mut bytes = good.clone();
        let file = safetensors::SafeTensors::deserialize(&good).unwrap();
        let data = file.tensor("model.layers.0.mlp.up_proj.weight").unwrap().data();
        let at = data.as_ptr() as usize - good.as_ptr() as usize;
        bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let opened = SourceModel::open(directory.path()).unwrap();
        let out = directory.path().join("out");
        for &weights in kinds {
            let error =
                write_bundles(&opened, options(2, 0, weights), &out, &mut |_| {}).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("layers.0.mlp.up_proj") && text.contains("row 0"), "{text}");
        }
        drop(opened);
    }
    // Nothing is left behind.
    let names = std::fs::read_dir(directory.path()).unwrap();
    assert!(names.map(|n| n.unwrap().file_name()).all(|n| !n.to_string_lossy().contains("out")));
}

#[test]
fn impossible_splits_and_full_directories_are_refused() {
    let model = generated(&tiny());
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("deep/out");
    let write =
        |split, tail| write_bundles(&model, options(split, tail, Weights::Keep), &out, &mut |_| {});
    for (split, tail, named) in [
        (5, 0, "split_layer: 5"),
        (0, 5, "tail_layers: 5"),
        (3, 2, "tail_layers: 2"),
        (usize::MAX, 1, "split_layer"),
        (1, usize::MAX, "tail_layers"),
    ] {
        let text = write(split, tail).unwrap_err().to_string();
        assert!(text.contains(named), "{text}");
    }
    write(2, 0).unwrap();
    assert!(matches!(write(2, 0), Err(BundleError::Exists { .. })));
    // Only the target is there, no directory of another name.
    let names: Vec<_> = std::fs::read_dir(out.parent().unwrap()).unwrap().collect();
    assert_eq!(names.len(), 1);
}

#[test]
fn halves_of_different_models_are_told_apart() {
    let one = write(&generated(&tiny()), options(2, 0, Weights::Keep));
    let other = write(&generated(&TinyModel { seed: 2, ..tiny() }), options(2, 0, Weights::Keep));
    let (device, cloud) = (one.open(Role::Device).unwrap(), other.open(Role::Cloud).unwrap());
    let text = check_same_model(&device, &cloud).unwrap_err().to_string();
    assert!(text.contains(&one.report.model_id.to_string()), "{text}");
    assert!(text.contains(&other.report.model_id.to_string()), "{text}");
}

#[test]
fn other_directories_are_refused() {
    let written = write(&generated(&tiny()), options(2, 0, Weights::Keep));
    let text = Bundle::open(&written.directory).err().unwrap().to_string();
    assert!(text.contains("did you mean") && text.contains("device"), "{text}");
    assert!(matches!(
        Bundle::open(Path::new("/no/such/bundle")),
        Err(BundleError::NotABundle { .. })
    ));
}

#[test]
fn manifests_that_lie_are_refused() {
    let written = write(&generated(&tiny()), options(2, 0, Weights::Keep));
    let refused = |change: &dyn Fn(&mut Value), parts: &[&str]| written.refused(change, parts);
    refused(&|m| m["control_tokens"] = json!([512]), &["control_tokens", "512"]);
    refused(&|m| m["control_tokens"] = Value::Null, &["control_tokens: missing"]);
    refused(&|m| m["format_version"] = json!(3), &["format_version 3", "reads 1 to 2"]);
    refused(&|m| m["format_version"] = json!(0), &["format_version 0", "reads 1 to 2"]);
    refused(&|m| m["sampling"] = json!({"top_p": 2}), &["sampling.top_p", "0..=1"]);
    refused(&|m| m["sampling"] = json!({"mirostat": 2}), &["mirostat"]);
    refused(&|m| m["format_version"] = Value::Null, &["format_version"]);
    refused(&|m| m["role"] = json!("server"), &["server"]);
    refused(&|m| m["role"] = json!("cloud"), &["layers"]);
    refused(&|m| m["model_id"] = json!("abc"), &["64 hexadecimal digits"]);
    refused(&|m| m["extra"] = json!(1), &["extra"]);
    refused(&|m| m["config"]["extra"] = json!(1), &["extra"]);
    refused(&|m| m["split_layer"] = json!(3), &["layers"]);
    refused(&|m| m["split_layer"] = json!(5), &["split_layer: 5"]);
    refused(&|m| m["tail_layers"] = json!(1), &["layers"]);
    refused(&|m| m["hidden_size"] = json!(65), &["hidden_size: 65"]);
    refused(&|m| m["wire"] = json!("f8"), &["wire", "f8"]);
    refused(&|m| m["config"]["num_attention_heads"] = json!(0), &["config.num_attention_heads"]);
    refused(&|m| m["config"]["num_key_value_heads"] = json!(3), &["config.num_key_value_heads"]);
    refused(&|m| m["config"]["rope_theta"] = json!(0.0), &["config.rope_theta"]);
    refused(&|m| m["config"]["vocab_size"] = json!(513), &["embed_tokens", "513"]);
    refused(&|m| m["files"]["weights.safetensors"]["blake3"] = json!("zz"), &["blake3"]);
    refused(
        &|m| m["files"]["../../etc/passwd"] = m["files"]["tokenizer.json"].clone(),
        &["../../etc/passwd"],
    );
    let files =
        |m: &mut Value| m["files"].as_object_mut().unwrap().remove("tokenizer.json").map(drop);
    refused(&|m| files(m).unwrap(), &["files.tokenizer.json", "missing"]);
}

#[test]
fn manifests_with_other_tensors_are_refused() {
    let written = write(&generated(&tiny()), options(2, 0, Weights::Keep));
    let refused = |change: &dyn Fn(&mut Value), parts: &[&str]| written.refused(change, parts);
    let first = &read_json(&written.path(Role::Device).join("bundle.json"))["tensors"][0]["name"];
    let first = first.as_str().unwrap();
    refused(&|m| m["tensors"][0]["shape"] = json!([512, 65]), &[first, "[512, 65]"]);
    refused(&|m| m["tensors"][0]["dtype"] = json!("q5_1"), &[first, "q5_1"]);
    refused(&|m| m["tensors"][0]["layout"] = json!("panel8"), &[first, "panel8"]);
    refused(&|m| m["tensors"][0]["layout"] = json!("rows"), &[first, "rows"]);
    refused(&|m| m["tensors"][0]["name"] = json!("model.extra"), &["model.extra"]);
    refused(&|m| m["tensors"][0] = m["tensors"][1].clone(), &["twice"]);
    refused(&|m| drop(m["tensors"].as_array_mut().unwrap().remove(0)), &[first, "missing"]);
    written.open(Role::Device).unwrap();
}

#[test]
fn weights_that_differ_from_the_manifest_are_refused() {
    let model = generated(&tiny());
    let written = write(&model, options(2, 0, Weights::Keep));
    let device = written.path(Role::Device);
    let weights = device.join("weights.safetensors");
    let good = std::fs::read(&weights).unwrap();
    let refused = |bytes: &[u8]| {
        std::fs::write(&weights, bytes).unwrap();
        Bundle::open(&device).expect_err("it opens")
    };
    // Too short, too long, empty, and the other half's file.
    for bytes in [&good[..good.len() - 1], &[&good[..], &[0]].concat(), &[]] {
        assert!(matches!(refused(bytes), BundleError::FileSize { .. }));
    }
    let foreign = std::fs::read(written.path(Role::Cloud).join("weights.safetensors")).unwrap();
    assert!(matches!(refused(&foreign), BundleError::FileSize { .. }));
    // The manifest believes the foreign file's size, too: then its tensors are the wrong ones.
    let manifest = device.join("bundle.json");
    let good_manifest = std::fs::read(&manifest).unwrap();
    edit_json(&manifest, |m| m["files"]["weights.safetensors"]["bytes"] = json!(foreign.len()));
    assert!(matches!(refused(&foreign), BundleError::MissingTensor { .. }));
    std::fs::write(&manifest, good_manifest).unwrap();

    // Header bytes: a type, a name, a length. Sizes stay.
    let edit = |from: &str, to: &str| {
        let at = good.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut bytes = good.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    assert!(matches!(refused(&edit("\"U8\"", "\"I8\"")), BundleError::TensorMismatch { .. }));
    assert!(matches!(refused(&edit("lm_head", "lm_tail")), BundleError::MissingTensor { .. }));
    let mut length = good.clone();
    length[0] ^= 1;
    assert!(matches!(refused(&length), BundleError::Header { .. }));

    // One flipped bit in the data is for `verify` alone.
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    std::fs::write(&weights, &flipped).unwrap();
    let error = Bundle::open(&device).unwrap().verify().unwrap_err();
    assert!(matches!(error, BundleError::FileHash { ref path, .. } if *path == weights), "{error}");
    std::fs::write(&weights, &good).unwrap();
    Bundle::open(&device).unwrap().verify().unwrap();
}

#[test]
fn tokenizer_files_that_differ_are_refused() {
    let written = write(&generated(&tiny()), options(2, 0, Weights::Keep));
    let device = written.path(Role::Device);
    for (name, is_seen_at_open) in [("tokenizer_config.json", true), ("tokenizer.json", false)] {
        let path = device.join(name);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        *bad.last_mut().unwrap() = b' ';
        std::fs::write(&path, &bad).unwrap();
        let error = match Bundle::open(&device) {
            Err(error) if is_seen_at_open => error,
            Ok(bundle) if !is_seen_at_open => bundle.tokenizer_json().unwrap_err(),
            _ => panic!("{name}"),
        };
        assert!(matches!(error, BundleError::FileHash { .. }), "{error}");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(Bundle::open(&device), Err(BundleError::Io { .. })));
        std::fs::write(&path, &good).unwrap();
    }
    Bundle::open(&device).unwrap();
}
