//! The forward pass against something nobody here wrote: logits that Hugging Face transformers
//! (four families), or numpy over the `gguf` package's dequantised tensors (GGUF, the default
//! model), computed once. How, and with which versions: `golden/README.md`.
use std::path::{Path, PathBuf};

use crate::support::collect;
use hat_compute::WholeModel;
use hat_compute::open;
use hat_engine::options::{Codec, Processor};
use hat_engine::reference_run::through_codec;
use hat_engine::{Engine, EngineConfig, Request};
use hat_loader::{Bundle, BundleOptions, SourceModel, Submodel, Weights, write_bundles};
use hat_program::pull;
use safetensors::SafeTensors;
use serde_json::Value;

/// K and V are stored as f16 here and as f32 there: 0.022 at most by the script's own measure.
const FLOAT_BOUND: f32 = 0.1;
/// Activations are rounded to int8 in blocks of 32 here: 0.46 at most by the script's measure.
const INT8_BOUND: f32 = 1.0;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Splits a golden checkpoint after its first layer, or before it where there is but one.
fn split(model: &Path) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("bundle");
    let source = SourceModel::open(model).unwrap();
    let split_layer = usize::from(source.config().num_hidden_layers > 1);
    let options = BundleOptions { split_layer, tail_layers: 0, weights: Weights::Keep };
    write_bundles(&source, options, &out, &mut |_| {}).unwrap();
    (directory, out)
}

fn whole(bundle: &Path, context: usize) -> WholeModel<hat_compute::backend::cpu::CpuBackend> {
    let device = Bundle::open(&bundle.join("device")).unwrap();
    let cloud = Bundle::open(&bundle.join("cloud")).unwrap();
    let backend = open::cpu(Processor::Auto, 1).unwrap();
    let crossings = device.split().layers(Submodel::Middle);
    let cross = through_codec(Codec::F32);
    WholeModel::load(backend, &device, &cloud, crossings, cross, context).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
        .collect()
}

/// Expected logits `[n - first, vocab]` of one prompt.
fn expected(file: &SafeTensors<'_>, prompt: &str) -> Vec<f32> {
    let tensor = file.tensor(prompt).unwrap();
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
    tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn check_family(name: &str, bound: f32) {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(folder().join(format!("{name}.json"))).unwrap())
            .unwrap();
    let file = std::fs::read(folder().join(format!("{name}.logits.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let (_directory, bundle) = split(&folder().join(golden["model"].as_str().unwrap()));
    let engine = Engine::open(EngineConfig::new(bundle.join("device")).wire(Codec::F32)).unwrap();
    let mut model = whole(&bundle, 256);

    for prompt in golden["prompts"].as_array().unwrap() {
        let prompt_name = prompt["name"].as_str().unwrap();
        let (prompt_ids, first) = (ids(&prompt["ids"]), prompt["first"].as_u64().unwrap());
        let expected = expected(&file, prompt_name);
        let vocab_size = expected.len() / (prompt_ids.len() - usize::try_from(first).unwrap());
        let mut logits = vec![0.0; vocab_size];
        let mut rows = expected.chunks_exact(vocab_size);
        model.reset();
        let mut worst = 0.0_f32;
        for (position, id) in (0..).zip(&prompt_ids) {
            model.step(*id, Some(&mut logits)).unwrap();
            if position >= first {
                let row = rows.next().unwrap();
                let distance = |(a, b): (&f32, &f32)| (a - b).abs();
                worst = logits.iter().zip(row).map(distance).fold(worst, f32::max);
            }
        }
        assert!(worst <= bound, "{name}, {prompt_name}: logits differ by {worst}, bound {bound}");
        println!("{name}, {prompt_name}: logits differ by {worst} at most");

        let greedy = &prompt["greedy"];
        let sure = greedy["gaps"]
            .as_array()
            .unwrap()
            .iter()
            .take_while(|gap| gap.as_f64().unwrap() > f64::from(2.0 * bound))
            .count();
        let request = Request::tokens(prompt_ids).max_tokens(12).ignore_eos();
        let answer = collect(&engine, request);
        assert_eq!(answer.token_ids[..sure], ids(&greedy["ids"])[..sure], "{name}, {prompt_name}");
    }
}

#[test]
fn llama2_with_a_sentencepiece_tokenizer() {
    check_family("checkpoints/llama2", FLOAT_BOUND);
}

#[test]
fn llama3_with_rope_scaling() {
    check_family("checkpoints/llama3", FLOAT_BOUND);
}

#[test]
fn mistral_with_a_sliding_window() {
    check_family("checkpoints/mistral", FLOAT_BOUND);
}

#[test]
fn qwen2_with_biases() {
    check_family("checkpoints/qwen2", FLOAT_BOUND);
}

#[test]
fn gguf_with_a_sentencepiece_vocabulary() {
    check_family("gguf/llama_spm", INT8_BOUND);
}

#[test]
fn gguf_with_merges_and_rope_factors() {
    check_family("gguf/llama_bpe", INT8_BOUND);
}

/// Perplexity and top-10 logits of the real model. Q and K left in GGUF's order would give a
/// perplexity five times as high and still answer "Paris".
#[test]
fn the_default_model_says_what_numpy_says() {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(folder().join("default_model.json")).unwrap())
            .unwrap();
    let bundle = pull::default_bundle(&pull::cache_dir().unwrap(), 2, 0).unwrap();
    let mut model = whole(&bundle, 256);
    let mut logits = vec![0.0_f32; 49152];
    for text in golden["texts"].as_array().unwrap() {
        let name = text["name"].as_str().unwrap();
        let token_ids = ids(&text["token_ids"]);
        let (mut nll, mut squares, mut compared) = (0.0, 0.0, 0.0_f64);
        model.reset();
        for (position, pair) in token_ids.windows(2).enumerate() {
            model.step(pair[0], Some(&mut logits)).unwrap();
            nll -= log_probability(&logits, pair[1]);
            let entry = text["top10"]
                .as_array()
                .unwrap()
                .iter()
                .find(|entry| entry["position"].as_u64() == u64::try_from(position).ok());
            if let Some(entry) = entry {
                let there = entry["logits"]["f32"].as_array().unwrap();
                let differences: Vec<f64> = ids(&entry["ids"])
                    .into_iter()
                    .zip(there)
                    .map(|(id, there)| f64::from(logits[id as usize]) - there.as_f64().unwrap())
                    .collect();
                squares += differences.iter().map(|difference| difference.powi(2)).sum::<f64>();
                compared += 10.0;
            }
        }
        let perplexity = (nll / (token_ids.len() - 1) as f64).exp();
        let there = text["perplexity"]["f32"].as_f64().unwrap();
        let rms = (squares / compared).sqrt();
        println!("{name}: perplexity {perplexity:.3}, numpy {there:.3}; top-10 rms {rms:.3}");
        assert!((perplexity / there - 1.0).abs() < 0.03, "{name}: {perplexity}, numpy {there}");
        assert!(compared > 0.0 && rms < 0.6, "{name}: top-10 logits differ by {rms} (rms)");
    }
}

fn log_probability(logits: &[f32], token: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    f64::from(logits[token as usize] - largest) - sum.ln()
}

/// A file that says nothing of its pattern is known by its merges, and refused with one of them
/// changed.
#[test]
fn the_default_model_s_pattern_is_recognised_without_its_name() {
    let path = pull::default_model(&pull::cache_dir().unwrap()).unwrap();
    let named = SourceModel::open(&path).unwrap();
    assert_eq!(named.text_report().pattern.as_deref(), Some("smollm, by the file"));
    let mut bytes = std::fs::read(&path).unwrap();
    let find = |bytes: &[u8], what: &[u8]| {
        bytes.windows(what.len()).position(|window| window == what).unwrap() + what.len()
    };
    // A text is its length in eight bytes, then its characters. The name of the model gives the
    // character that "default" has more than "smollm", so nothing behind them moves.
    let key = find(&bytes, b"tokenizer.ggml.pre") + 4;
    assert_eq!(&bytes[key + 8..key + 14], b"smollm");
    bytes.splice(key..key + 14, [&7u64.to_le_bytes()[..], b"default"].concat());
    let name = find(&bytes, b"general.name") + 4;
    let length = u64::from_le_bytes(bytes[name..name + 8].try_into().unwrap());
    bytes.splice(name..name + 8, (length - 1).to_le_bytes());
    bytes.remove(name + 8);
    let directory = tempfile::tempdir().unwrap();
    let unnamed = directory.path().join("unnamed.gguf");
    std::fs::write(&unnamed, &bytes).unwrap();
    let opened = SourceModel::open(&unnamed).unwrap();
    let pattern = opened.text_report().pattern.as_deref();
    assert_eq!(pattern, Some("smollm, recognised by its merges"));
    assert!(opened.tokenizer_json() == named.tokenizer_json());
    drop(opened);

    let merges = find(&bytes, b"tokenizer.ggml.merges");
    let first = merges + find(&bytes[merges..], b" ");
    assert!(bytes[first].is_ascii_lowercase());
    bytes[first] ^= 1;
    std::fs::write(&unnamed, &bytes).unwrap();
    let error = SourceModel::open(&unnamed).err().unwrap().to_string();
    assert!(error.contains("tokenizer.ggml.pre") && error.contains("--pre NAME"), "{error}");
}
