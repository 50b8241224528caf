//! GGUF files, and what the loader says to them.

use std::path::{Path, PathBuf};

use hat_loader::{DType, Family, GgufError, LoadError, SourceModel, TinyModel};
use serde_json::Value;

/// A metadata value of a GGUF file.
#[derive(Clone, Debug)]
pub(crate) enum Meta {
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
    /// A type number and the bytes behind it.
    Raw(u32, Vec<u8>),
}

/// A tensor of a GGUF file.
#[derive(Clone, Debug)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    /// Fastest dimension first, as in the file.
    pub(crate) dimensions: Vec<u64>,
    pub(crate) kind: u32,
    /// `None` is where the data ends so far.
    pub(crate) offset: Option<u64>,
    pub(crate) bytes: Vec<u8>,
}

/// A GGUF file before it is bytes.
#[derive(Clone, Debug)]
pub(crate) struct Gguf {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    /// `None` is the truth.
    pub(crate) tensor_count: Option<u64>,
    pub(crate) metadata_count: Option<u64>,
    pub(crate) metadata: Vec<(String, Meta)>,
    pub(crate) tensors: Vec<GgufTensor>,
    pub(crate) alignment: usize,
}

impl Gguf {
    /// A file of a model, under architecture `llama` or `qwen2`. Q and k rows are interleaved for
    /// `llama`.
    pub(crate) fn of(model: &SourceModel) -> Self {
        let c = model.config();
        let arch = if c.architecture == Family::Qwen2 { "qwen2" } else { "llama" };
        let count = |value: usize| Meta::U32(u32::try_from(value).unwrap());
        let key = |name: &str| format!("{arch}.{name}");
        let mut metadata = vec![
            ("general.architecture".to_owned(), Meta::Text(arch.to_owned())),
            (key("embedding_length"), count(c.hidden_size)),
            (key("feed_forward_length"), count(c.intermediate_size)),
            (key("block_count"), count(c.num_hidden_layers)),
            (key("attention.head_count"), count(c.num_attention_heads)),
            (key("attention.head_count_kv"), count(c.num_key_value_heads)),
            (key("attention.key_length"), count(c.head_dim)),
            (key("attention.layer_norm_rms_epsilon"), Meta::F32(c.rms_norm_eps)),
            (key("rope.freq_base"), Meta::F32(c.rope_theta)),
            (key("rope.dimension_count"), count(c.head_dim)),
            (key("context_length"), count(c.max_position_embeddings)),
        ];
        metadata.extend(byte_level_metadata(model));
        let tensors = model.tensor_names().map(|name| gguf_tensor(model, name)).collect();
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            metadata_count: None,
            metadata,
            tensors,
            alignment: 32,
        }
    }

    /// Replaces a metadata value, or adds it.
    pub(crate) fn set(&mut self, key: &str, value: Meta) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.to_owned(), value));
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(name, _)| name != key);
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        let count = |count: Option<u64>, len: usize| count.unwrap_or(len as u64).to_le_bytes();
        out.extend(count(self.tensor_count, self.tensors.len()));
        out.extend(count(self.metadata_count, self.metadata.len()));
        for (key, value) in &self.metadata {
            put_text(&mut out, key);
            put_meta(&mut out, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.dimensions.len() as u32).to_le_bytes());
            for dimension in &tensor.dimensions {
                out.extend(dimension.to_le_bytes());
            }
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset += tensor.bytes.len().next_multiple_of(self.alignment) as u64;
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        for tensor in &self.tensors {
            out.extend(&tensor.bytes);
            out.resize(out.len().next_multiple_of(self.alignment), 0);
        }
        out
    }

    pub(crate) fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap();
    }

    /// The files of a model in `count` parts, as llama.cpp cuts them: only the first has metadata.
    pub(crate) fn parts(&self, count: usize) -> Vec<Self> {
        let tensors = self.tensors.len();
        let mut parts: Vec<Self> = (0..count)
            .map(|number| {
                let mut part = self.clone();
                if number > 0 {
                    part.metadata.clear();
                }
                let range = number * tensors / count..(number + 1) * tensors / count;
                part.tensors = self.tensors[range].to_vec();
                part.set("split.no", Meta::U32(number as u32));
                part.set("split.count", Meta::U32(count as u32));
                part
            })
            .collect();
        parts[0].set("split.tensors.count", Meta::I32(tensors as i32));
        parts
    }
}

/// Path of part `number`, from 1, of a model below a directory.
pub(crate) fn part_path(directory: &Path, number: usize, count: usize) -> PathBuf {
    directory.join(format!("tiny.x-{number:05}-of-{count:05}.gguf"))
}

/// Writes the parts of a model below a directory.
pub(crate) fn write_parts(directory: &Path, parts: &[Gguf]) {
    for (index, part) in parts.iter().enumerate() {
        part.write(&part_path(directory, index + 1, parts.len()));
    }
}

/// The tokenizer of a generated model as GGUF metadata.
fn byte_level_metadata(model: &SourceModel) -> Vec<(String, Meta)> {
    let json: Value = serde_json::from_str(model.tokenizer_json()).unwrap();
    let tokens: Vec<String> = json["model"]["vocab"].as_object().unwrap().keys().cloned().collect();
    let merges = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
    let specials = json["added_tokens"].as_array().unwrap().len();
    let types = (0..tokens.len()).map(|id| if id < specials { 3 } else { 1 }).collect();
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    vec![
        (key("model"), Meta::Text("gpt2".into())),
        (key("pre"), Meta::Text("gpt-2".into())),
        (key("tokens"), Meta::Texts(tokens)),
        (key("token_type"), Meta::I32s(types)),
        (key("merges"), Meta::Texts(merges.collect())),
        (key("bos_token_id"), Meta::U32(1)),
        (key("eos_token_id"), Meta::U32(2)),
        ("tokenizer.chat_template".into(), Meta::Text(model.chat_template().unwrap().into())),
    ]
}

fn gguf_tensor(model: &SourceModel, name: &str) -> GgufTensor {
    let tensor = model.tensor(name).unwrap();
    let config = model.config();
    let heads = match name {
        _ if config.architecture == Family::Qwen2 => None,
        _ if name.contains("q_proj") => Some(config.num_attention_heads),
        _ if name.contains("k_proj") => Some(config.num_key_value_heads),
        _ => None,
    };
    let mut bytes = tensor.bytes.to_vec();
    if let Some(heads) = heads {
        bytes = interleave_rows(&bytes, tensor.shape[0], heads);
    }
    let kind = match tensor.dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q8_0 => 8,
        DType::Q6K => 14,
        DType::Bf16 => 30,
        other => panic!("{other:?} has no number here"),
    };
    let dimensions = tensor.shape.iter().rev().map(|d| *d as u64).collect();
    GgufTensor { name: gguf_name(name), dimensions, kind, offset: None, bytes }
}

/// Rows `i` and `i + head_dim / 2` of each head become rows `2i` and `2i + 1`.
fn interleave_rows(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (row_bytes, head_dim) = (bytes.len() / rows, rows / heads);
    let mut out = vec![0; bytes.len()];
    for head in 0..heads {
        for pair in 0..head_dim / 2 {
            for half in 0..2 {
                let from = (head * head_dim + half * head_dim / 2 + pair) * row_bytes;
                let to = (head * head_dim + 2 * pair + half) * row_bytes;
                out[to..to + row_bytes].copy_from_slice(&bytes[from..from + row_bytes]);
            }
        }
    }
    out
}

pub(crate) fn gguf_name(name: &str) -> String {
    let parts = [
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("lm_head.", "output."),
        ("model.layers.", "blk."),
        ("self_attn.q_proj.", "attn_q."),
        ("self_attn.k_proj.", "attn_k."),
        ("self_attn.v_proj.", "attn_v."),
        ("self_attn.o_proj.", "attn_output."),
        ("post_attention_layernorm.", "ffn_norm."),
        ("input_layernorm.", "attn_norm."),
        ("mlp.gate_proj.", "ffn_gate."),
        ("mlp.up_proj.", "ffn_up."),
        ("mlp.down_proj.", "ffn_down."),
    ];
    parts.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

pub(crate) fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_meta(out: &mut Vec<u8>, value: &Meta) {
    let (kind, bytes) = match value {
        Meta::U32(value) => (4, value.to_le_bytes().to_vec()),
        Meta::I32(value) => (5, value.to_le_bytes().to_vec()),
        Meta::F32(value) => (6, value.to_le_bytes().to_vec()),
        Meta::Bool(value) => (7, vec![u8::from(*value)]),
        Meta::U64(value) => (10, value.to_le_bytes().to_vec()),
        Meta::Text(text) => {
            let mut bytes = Vec::new();
            put_text(&mut bytes, text);
            (8, bytes)
        }
        Meta::Texts(texts) => {
            let mut bytes = array_head(8, texts.len());
            texts.iter().for_each(|text| put_text(&mut bytes, text));
            (9, bytes)
        }
        Meta::F32s(values) => {
            let mut bytes = array_head(6, values.len());
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            (9, bytes)
        }
        Meta::I32s(values) => {
            let mut bytes = array_head(5, values.len());
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            (9, bytes)
        }
        Meta::Raw(kind, bytes) => (*kind, bytes.clone()),
    };
    out.extend(u32::to_le_bytes(kind));
    out.extend(bytes);
}

fn array_head(kind: u32, len: usize) -> Vec<u8> {
    let mut head = kind.to_le_bytes().to_vec();
    head.extend((len as u64).to_le_bytes());
    head
}

pub(crate) fn tiny() -> TinyModel {
    TinyModel { layers: 2, ..TinyModel::default() }
}

pub(crate) fn open(gguf: &Gguf) -> Result<SourceModel, LoadError> {
    open_bytes(&gguf.bytes())
}

pub(crate) fn open_bytes(bytes: &[u8]) -> Result<SourceModel, LoadError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    std::fs::write(&path, bytes).unwrap();
    SourceModel::open(&path)
}

/// The error of a file that must not open.
pub(crate) fn refused(gguf: &Gguf) -> GgufError {
    refused_bytes(&gguf.bytes())
}

pub(crate) fn refused_bytes(bytes: &[u8]) -> GgufError {
    match open_bytes(bytes) {
        Err(LoadError::Gguf { error, path }) => {
            assert!(path.ends_with("tiny.gguf"));
            error
        }
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("it opens"),
    }
}

/// A metadata error must name `key` and contain `reason`.
pub(crate) fn refused_metadata(gguf: &Gguf, key: &str, reason: &str) {
    match refused(gguf) {
        GgufError::Metadata { key: got, reason: text } => {
            assert_eq!(got, key, "{text}");
            assert!(text.contains(reason), "{text}");
        }
        other => panic!("another error: {other}"),
    }
}

pub(crate) fn assert_same_tensors(a: &SourceModel, b: &SourceModel) {
    let names: Vec<&str> = a.tensor_names().collect();
    assert_eq!(names, b.tensor_names().collect::<Vec<_>>());
    for name in names {
        let (a, b) = (a.tensor(name).unwrap(), b.tensor(name).unwrap());
        assert_eq!((a.dtype, &a.shape), (b.dtype, &b.shape), "{name}");
        assert!(*a.bytes == *b.bytes, "{name}");
    }
}

/// A SentencePiece vocabulary: unknown, bos, eos, 256 bytes, then pieces by falling score.
pub(crate) fn sentence_piece(gguf: &mut Gguf, pieces: &[&str]) {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    let mut types = vec![2, 3, 3];
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    types.extend([6; 256]);
    tokens.extend(pieces.iter().map(|piece| (*piece).to_owned()));
    types.resize(tokens.len(), 1);
    let scores = (0..tokens.len()).map(|id| -(id as f32 - 258.0).max(0.0)).collect();
    gguf.remove("tokenizer.ggml.merges");
    gguf.remove("tokenizer.ggml.pre");
    gguf.set("tokenizer.ggml.model", Meta::Text("llama".into()));
    gguf.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    gguf.set("tokenizer.ggml.token_type", Meta::I32s(types));
    gguf.set("tokenizer.ggml.scores", Meta::F32s(scores));
    gguf.set("tokenizer.ggml.unknown_token_id", Meta::U32(0));
}
