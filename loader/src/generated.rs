//! A small model from a seed: tests and examples need no download.
//!
//! Weights come from BLAKE3's output stream, keyed by seed and tensor name, and are scaled so that
//! hidden states stay near one and logits differ by several units: greedy text varies.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::json;

use crate::bundle::{BundleError, BundleOptions, Weights, write_bundles};
use crate::config::{Family, LlamaConfig, RopeScaling};
use crate::rows::SourceTensor;
use crate::sampling::SamplingDefaults;
use crate::source::{SourceModel, TextReport, TokenSettings};
use crate::split::{self, EMBED_TOKENS, LM_HEAD, TensorSpec};
use crate::tensor::{DType, TensorBytes};

/// Tokens that mean something else than text: end of text, begin and end of a message.
const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Special tokens and one token for each byte.
const VOCAB_MIN: usize = SPECIAL_TOKENS.len() + 256;
/// Letters by frequency, for merges.
const LETTERS: &str = "etaoinshrdlucmfwypvbgkjqxz";

const CHAT_TEMPLATE: &str = "{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Shape of the model to generate. Fields as in [`LlamaConfig`].
#[derive(Clone, Debug, PartialEq)]
pub struct TinyModel {
    /// Biases on q, k and v if [`Family::Qwen2`].
    pub architecture: Family,
    /// `num_hidden_layers`
    pub layers: usize,
    /// `hidden_size`
    pub hidden: usize,
    /// `intermediate_size`
    pub intermediate: usize,
    /// `num_attention_heads`
    pub heads: usize,
    /// `num_key_value_heads`
    pub kv_heads: usize,
    /// `head_dim`
    pub head_dim: usize,
    /// `vocab_size`: 259 or more.
    pub vocab: usize,
    /// `max_position_embeddings`
    pub positions: usize,
    /// `sliding_window`
    pub window: Option<u32>,
    /// `rope_scaling`
    pub rope_scaling: Option<RopeScaling>,
    /// `tie_word_embeddings`
    pub tied: bool,
    /// The type of all matrices.
    pub dtype: DType,
    /// Another seed, another model.
    pub seed: u64,
}

impl Default for TinyModel {
    fn default() -> Self {
        Self {
            architecture: Family::Llama,
            layers: 4,
            hidden: 64,
            intermediate: 128,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab: 512,
            positions: 2048,
            window: None,
            rope_scaling: None,
            tied: false,
            dtype: DType::Q8_0,
            seed: 1,
        }
    }
}

/// Generates a model. The same description gives the same bytes on every machine.
///
/// The special tokens are never the likeliest next token unless `tied`.
///
/// # Panics
/// If the numbers are no model's: see [`LlamaConfig::check`]; `vocab` is below 259, or a row of
/// some matrix is no whole number of blocks of `dtype`.
#[must_use]
pub fn generated(tiny: &TinyModel) -> SourceModel {
    assert!(tiny.vocab >= VOCAB_MIN, "vocab is {}, at least {VOCAB_MIN} are needed", tiny.vocab);
    let config = LlamaConfig {
        architecture: tiny.architecture,
        hidden_size: tiny.hidden,
        intermediate_size: tiny.intermediate,
        num_hidden_layers: tiny.layers,
        num_attention_heads: tiny.heads,
        num_key_value_heads: tiny.kv_heads,
        head_dim: tiny.head_dim,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: tiny.rope_scaling.clone(),
        vocab_size: tiny.vocab,
        max_position_embeddings: tiny.positions,
        sliding_window: tiny.window,
        attention_bias: tiny.architecture == Family::Qwen2,
        tie_word_embeddings: tiny.tied,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    };
    config.check().expect("the caller describes a possible model");
    let path = PathBuf::from(format!("generated-{}", tiny.seed));
    let mut tensors = BTreeMap::new();
    for spec in split::model_tensors(&config) {
        let dtype = if spec.shape.len() == 1 { DType::F32 } else { tiny.dtype };
        let bytes = tensor_bytes(tiny, &spec, dtype);
        let bytes = TensorBytes::owned(bytes);
        let tensor = SourceTensor::stored(path.clone(), dtype, spec.shape, bytes);
        tensors.insert(spec.name, tensor);
    }
    let mut model = SourceModel {
        name: format!("generated-{}", tiny.seed),
        path,
        config,
        tensors,
        tokenizer_json: tokenizer(tiny.vocab),
        settings: TokenSettings {
            bos_token: Some(SPECIAL_TOKENS[1].to_owned()),
            eos_token: Some(SPECIAL_TOKENS[2].to_owned()),
            unk_token: None,
            pad_token: Some(SPECIAL_TOKENS[0].to_owned()),
            add_bos_token: false,
            chat_template: Some(CHAT_TEMPLATE.to_owned()),
        },
        text: TextReport::default(),
        sampling: SamplingDefaults::default(),
    };
    model.derive_control().expect("our own JSON");
    model
}

/// A generated 4-layer model, split after its first layer, below `directory`.
///
/// # Errors
/// A file can't be written.
pub fn tiny_bundle(directory: &Path) -> Result<PathBuf, BundleError> {
    let out = directory.join("tiny");
    let options = BundleOptions { split_layer: 1, tail_layers: 0, weights: Weights::Keep };
    write_bundles(&generated(&TinyModel::default()), options, &out, &mut |_| {})?;
    Ok(out)
}

/// Random numbers of one tensor.
struct Numbers(blake3::OutputReader);

impl Numbers {
    fn new(seed: u64, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"hat-loader generated model\n");
        hasher.update(&seed.to_le_bytes());
        hasher.update(name.as_bytes());
        Self(hasher.finalize_xof())
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill(bytes);
    }

    /// Uniform in -1..1.
    fn uniform(&mut self) -> f32 {
        let mut bytes = [0; 4];
        self.fill(&mut bytes);
        // The upper 24 bits: exact in f32.
        (i32::from_le_bytes(bytes) >> 8) as f32 / (1 << 23) as f32
    }
}

/// Half the width of the uniform distribution that a matrix is drawn from. A row over `k` unit
/// inputs then sums to a number of the size `gain`.
fn half_width(spec: &TensorSpec) -> f32 {
    let name = spec.name.as_str();
    let gain = match name {
        EMBED_TOKENS => return 3f32.sqrt(),
        LM_HEAD => 4.0,
        _ if name.contains(".q_proj.") || name.contains(".k_proj.") => 1.5,
        _ if name.contains(".down_proj.") => 3.0,
        _ => 2.0,
    };
    let k = spec.shape.last().copied().unwrap_or(1);
    gain * (3.0 / k as f32).sqrt()
}

fn tensor_bytes(tiny: &TinyModel, spec: &TensorSpec, dtype: DType) -> Vec<u8> {
    let mut numbers = Numbers::new(tiny.seed, &spec.name);
    let &[n, k] = spec.shape.as_slice() else {
        let is_bias = spec.name.ends_with(".bias");
        let mut vector = || {
            let x = numbers.uniform();
            if is_bias { x } else { 1.0 + 0.5 * x }
        };
        return (0..spec.shape[0]).flat_map(|_| vector().to_le_bytes()).collect();
    };
    let row_bytes = dtype.row_bytes(k);
    let row_bytes = row_bytes.expect("the caller's rows are whole numbers of blocks");
    let half_width = half_width(spec);
    let mut bytes = Vec::with_capacity(n * row_bytes);
    for _ in 0..n {
        for _ in 0..k / dtype.block_weights() {
            block(&mut numbers, dtype, half_width, &mut bytes);
        }
    }
    if spec.name == LM_HEAD {
        // Zero in every type: the logits of special tokens are 0.
        bytes[..SPECIAL_TOKENS.len() * row_bytes].fill(0);
    }
    bytes
}

/// Appends one block of weights between about `-half_width` and `half_width`.
fn block(numbers: &mut Numbers, dtype: DType, half_width: f32, out: &mut Vec<u8>) {
    if dtype.block_weights() == 1 {
        let x = half_width * numbers.uniform();
        match dtype {
            DType::F16 => out.extend_from_slice(&f16::from_f32(x).to_le_bytes()),
            DType::Bf16 => out.extend_from_slice(&bf16::from_f32(x).to_le_bytes()),
            _ => out.extend_from_slice(&x.to_le_bytes()),
        }
        return;
    }
    let width = half_width * (1.0 + 0.25 * numbers.uniform());
    let start = out.len();
    out.resize(start + dtype.block_bytes(), 0);
    let block = &mut out[start..];
    numbers.fill(block);
    let scale = |d: f32| f16::from_f32(d).to_le_bytes();
    match dtype {
        DType::Q8_0 => block[..2].copy_from_slice(&scale(width / 127.0)),
        DType::Q4_0 => block[..2].copy_from_slice(&scale(width / 8.0)),
        DType::Q4_1 => {
            block[..2].copy_from_slice(&scale(width / 7.5));
            block[2..4].copy_from_slice(&scale(-width));
        }
        DType::Q6K => {
            // Sub-block scales of 16..64 in either sign, behind 192 bytes of quants.
            for sub_scale in &mut block[192..208] {
                let magnitude = 16 + (*sub_scale & 0x7f) as i8 % 48;
                let signed = if *sub_scale & 0x80 == 0 { magnitude } else { -magnitude };
                *sub_scale = signed.to_le_bytes()[0];
            }
            block[208..].copy_from_slice(&scale(width / (32.0 * 40.0)));
        }
        DType::F32 | DType::F16 | DType::Bf16 => unreachable!("blocks of one"),
    }
}

/// A byte-level tokenizer of exactly `vocab` tokens: special ones, bytes, then merges: pairs of
/// letters (a word's first with the space in front), and pairs of what is there already.
fn tokenizer(vocab: usize) -> String {
    let mut tokens: Vec<String> = SPECIAL_TOKENS.iter().map(|&text| text.to_owned()).collect();
    tokens.extend(byte_letters().iter().map(char::to_string));
    let mut merges: Vec<[String; 2]> = Vec::new();
    let space = byte_letters()[usize::from(b' ')].to_string();
    let letters: Vec<String> = LETTERS.chars().map(String::from).collect();
    let mut lefts = vec![space];
    lefts.extend(letters.iter().cloned());
    let mut rights = letters;
    while tokens.len() < vocab {
        let mut made = Vec::new();
        for left in &lefts {
            for right in &rights {
                if tokens.len() < vocab {
                    let joined = format!("{left}{right}");
                    merges.push([left.clone(), right.clone()]);
                    tokens.push(joined.clone());
                    made.push(joined);
                }
            }
        }
        // Words of four letters from pairs, of eight from those; a space stays in front.
        let space_free = |token: &&String| token.is_ascii();
        rights = made.iter().filter(space_free).cloned().collect();
        lefts = made;
    }
    let added: Vec<_> = SPECIAL_TOKENS
        .iter()
        .enumerate()
        .map(|(id, text)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let vocabulary: serde_json::Map<_, _> =
        tokens.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                            "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocabulary, "merges": merges},
    })
    .to_string()
}

/// The letter that stands for each byte in byte-level vocabularies: visible Latin-1 characters
/// for themselves, the others for the code points from 256.
fn byte_letters() -> Vec<char> {
    let mut next = 256;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).expect("256..=323 are letters")
            }
        })
        .collect()
}
