//! The trained drafter in a device's bundle: `adapter.safetensors`.
//!
//! One safetensors file: matrices in row order, f16 or q8_0 (as bytes, `[n, bytes of a row]`),
//! norms f32, `vocabulary` u32; and texts: `format_version`, `kind`, `model_id`, `split_layer`,
//! and `training`, which is for people. It comes from somebody else's machine, so everything is
//! checked.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;

use super::manifest::{ADAPTER, FileEntry, MANIFEST, Manifest};
use super::{BundleError, ModelId, read_manifest};
use crate::config::LlamaConfig;
use crate::file;
use crate::header::{self, Entry, Texts};
use crate::layout;
use crate::split::Role;
use crate::tensor::{DType, Layout, Tensor, TensorBytes};

/// The format of the file that this crate reads.
pub const DRAFTER_FORMAT_VERSION: u32 = 1;
/// Largest file that is read, in bytes.
const BYTES_MAX: u64 = 1 << 30;

/// Architecture of a drafter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DrafterArchitecture {
    /// A decoder layer that reads shallow rows and the deep rows of tokens before.
    Deep,
    /// A decoder layer that reads shallow rows alone.
    Layer,
    /// Attention and two norms, as in HAT (arXiv 2503.18989).
    Paper,
}

impl DrafterArchitecture {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Deep, Self::Layer, Self::Paper];

    /// The name in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deep => "deep",
            Self::Layer => "layer",
            Self::Paper => "paper",
        }
    }

    /// Names and shapes of the tensors of a drafter of this kind.
    #[must_use]
    pub fn tensors(self, config: &LlamaConfig) -> Vec<(&'static str, Vec<usize>)> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let mut tensors = vec![
            ("input_layernorm.weight", vec![hidden]),
            ("self_attn.q_proj.weight", vec![q, hidden]),
            ("self_attn.k_proj.weight", vec![kv, hidden]),
            ("self_attn.v_proj.weight", vec![kv, hidden]),
            ("self_attn.o_proj.weight", vec![hidden, q]),
            ("norm.weight", vec![hidden]),
        ];
        if self != Self::Paper {
            tensors.extend([
                ("shallow_proj.weight", vec![hidden, hidden]),
                ("post_attention_layernorm.weight", vec![hidden]),
                ("mlp.gate_proj.weight", vec![inner, hidden]),
                ("mlp.up_proj.weight", vec![inner, hidden]),
                ("mlp.down_proj.weight", vec![hidden, inner]),
                ("out_proj.weight", vec![hidden, hidden]),
            ]);
        }
        if self == Self::Deep {
            tensors.extend([
                ("deep_proj.weight", vec![hidden, hidden]),
                ("out_deep_proj.weight", vec![hidden, hidden]),
            ]);
        }
        tensors
    }
}

/// A trained drafter, in memory of its own.
#[derive(Clone)]
pub struct DrafterFile {
    kind: DrafterArchitecture,
    split_layer: usize,
    vocabulary: Vec<u32>,
    training: String,
    /// Tensors in row order, by name.
    tensors: BTreeMap<String, Tensor>,
}

impl DrafterFile {
    /// Reads a drafter for the model of the device bundle at `device`.
    ///
    /// # Errors
    /// The file can't be read or is no drafter for that model; [`BundleError::Drafter`] says
    /// why.
    pub fn read(path: &Path, device: &super::Bundle) -> Result<Self, BundleError> {
        Self::from_bytes(path, &read_file(path)?, device.manifest())
    }

    /// As [`DrafterFile::read`], of the content of a file; `name` is for messages.
    ///
    /// # Errors
    /// As [`DrafterFile::read`].
    pub fn of_bytes(
        name: &Path,
        bytes: &[u8],
        device: &super::Bundle,
    ) -> Result<Self, BundleError> {
        Self::from_bytes(name, bytes, device.manifest())
    }

    /// The model that a drafter was trained for, and the number of layers whose rows it reads;
    /// nothing else of the file is looked at.
    ///
    /// # Errors
    /// The file is no drafter; `name` is for the message.
    pub fn trained_for(name: &Path, bytes: &[u8]) -> Result<(ModelId, usize), BundleError> {
        let wrong = |reason: String| BundleError::Drafter { path: name.to_owned(), reason };
        let (_, texts) = header::read_with_metadata(bytes)
            .map_err(|error| BundleError::Header { path: name.to_owned(), error })?;
        let text =
            |name: &str| texts.get(name).ok_or_else(|| wrong(format!("it states no {name}")));
        let model = text("model_id")?.parse();
        let model = model.map_err(|error| wrong(format!("model_id: {error}")))?;
        let split = text("split_layer")?;
        let split = split.parse().map_err(|_| wrong(format!("split_layer {split:?}")))?;
        Ok((model, split))
    }

    pub(super) fn from_bytes(
        path: &Path,
        bytes: &[u8],
        manifest: &Manifest,
    ) -> Result<Self, BundleError> {
        let (mut entries, texts) = header::read_with_metadata(bytes)
            .map_err(|error| BundleError::Header { path: path.to_owned(), error })?;
        Self::parse(bytes, &mut entries, &texts, manifest)
            .map_err(|reason| BundleError::Drafter { path: path.to_owned(), reason })
    }

    fn parse(
        bytes: &[u8],
        entries: &mut BTreeMap<String, Entry>,
        texts: &Texts,
        manifest: &Manifest,
    ) -> Result<Self, String> {
        let text = |name: &str| texts.get(name).ok_or_else(|| format!("it states no {name}"));
        let version = text("format_version")?;
        if version.parse() != Ok(DRAFTER_FORMAT_VERSION) {
            let reads = DRAFTER_FORMAT_VERSION;
            return Err(format!("format_version {version:?}, this program reads {reads}"));
        }
        let (model_id, expected) = (text("model_id")?, manifest.model_id.to_string());
        if *model_id != expected {
            return Err(format!(
                "model_id {model_id}: it was trained for another model than {expected}"
            ));
        }
        let name = text("kind")?;
        let kind = DrafterArchitecture::ALL.into_iter().find(|kind| kind.name() == name);
        let kind = kind.ok_or_else(|| format!("kind {name:?} is none of deep, layer, paper"))?;
        let layers = manifest.config.num_hidden_layers;
        let split = text("split_layer")?;
        let split_layer = split.parse().ok().filter(|split: &usize| *split < layers);
        let split_layer =
            split_layer.ok_or_else(|| format!("split_layer {split:?} is not below {layers}"))?;
        let vocabulary = vocabulary(bytes, entries, manifest.config.vocab_size)?;
        let mut tensors = BTreeMap::new();
        for (name, shape) in kind.tensors(&manifest.config) {
            let entry = entries.remove(name).ok_or_else(|| format!("tensor {name} is missing"))?;
            let tensor = tensor(name, &shape, &entry, &bytes[entry.range.clone()])
                .map_err(|reason| format!("tensor {name}: {reason}"))?;
            tensors.insert(name.to_owned(), tensor);
        }
        if let Some(name) = entries.keys().next() {
            return Err(format!("tensor {name} belongs to no {} drafter", kind.name()));
        }
        let training = texts.get("training").cloned().unwrap_or_default();
        Ok(Self { kind, split_layer, vocabulary, training, tensors })
    }

    /// Its architecture.
    #[must_use]
    pub const fn kind(&self) -> DrafterArchitecture {
        self.kind
    }

    /// It reads rows after this many layers.
    #[must_use]
    pub const fn split_layer(&self) -> usize {
        self.split_layer
    }

    /// Tokens that it may draft, most frequent first. Each at most once, all in the model's
    /// vocabulary.
    #[must_use]
    pub fn vocabulary(&self) -> &[u32] {
        &self.vocabulary
    }

    /// Description of its training, a JSON text; for people.
    #[must_use]
    pub fn training(&self) -> &str {
        &self.training
    }

    /// A tensor of [`DrafterArchitecture::tensors`], packed as the bundle's own are.
    ///
    /// # Errors
    /// The name, if a drafter of this kind has no such tensor.
    pub fn tensor(&self, name: &str) -> Result<Tensor, String> {
        let tensor = self.rows(name)?;
        let [n, k] = tensor.shape[..] else { return Ok(tensor.clone()) };
        let bytes = layout::packed_bytes(tensor.dtype, n, k).expect("checked when it was read");
        let mut packed = vec![0; bytes];
        layout::pack(tensor.dtype, n, k, &tensor.bytes, &mut packed);
        let bytes = TensorBytes::owned(packed);
        Ok(Tensor { layout: Layout::Panel16, bytes, ..tensor.clone() })
    }

    /// A tensor in row order.
    ///
    /// # Errors
    /// As [`DrafterFile::tensor`].
    pub fn rows(&self, name: &str) -> Result<&Tensor, String> {
        self.tensors
            .get(name)
            .ok_or_else(|| format!("a {} drafter has no {name}", self.kind.name()))
    }
}

/// Adds a drafter to the device bundle at `directory`, in place of the one it has. The manifest
/// names no drafter while the file is replaced, so the bundle can be opened at any moment.
///
/// # Errors
/// As [`DrafterFile::read`]; and if `directory` is no device's bundle, or the disk says no.
pub fn add_drafter(directory: &Path, file: &Path) -> Result<(), BundleError> {
    add_drafter_bytes(directory, file, &read_file(file)?)
}

/// As [`add_drafter`], of the content of a file; `name` is for messages.
///
/// # Errors
/// As [`add_drafter`].
pub fn add_drafter_bytes(directory: &Path, name: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    let mut manifest = read_manifest(directory)?;
    if manifest.role != Role::Device {
        let (path, role) = (directory.to_owned(), manifest.role.name());
        let reason = format!("a drafter belongs to a device's bundle, this is a {role}'s");
        return Err(BundleError::NotABundle { path, reason });
    }
    DrafterFile::from_bytes(name, bytes, &manifest)?;
    if manifest.files.remove(ADAPTER).is_some() {
        replace_manifest(directory, &manifest)?;
    }
    let entry = replace(directory, ADAPTER, bytes)?;
    manifest.files.insert(ADAPTER.to_owned(), entry);
    replace_manifest(directory, &manifest)
}

fn replace_manifest(directory: &Path, manifest: &Manifest) -> Result<(), BundleError> {
    let path = directory.join(MANIFEST);
    let json = serde_json::to_string_pretty(manifest).map_err(BundleError::json(&path))?;
    replace(directory, MANIFEST, json.as_bytes()).map(drop)
}

/// Writes a file under another name and renames it.
fn replace(directory: &Path, name: &str, bytes: &[u8]) -> Result<FileEntry, BundleError> {
    let path = directory.join(name);
    file::replace(&path, bytes, false).map_err(BundleError::io(&path))?;
    let blake3 = blake3::hash(bytes).to_hex().to_string();
    Ok(FileEntry { bytes: bytes.len() as u64, blake3 })
}

pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, BundleError> {
    file::read(path, BYTES_MAX).map_err(BundleError::reading(path, BYTES_MAX))
}

fn vocabulary(
    bytes: &[u8],
    entries: &mut BTreeMap<String, Entry>,
    vocab_size: usize,
) -> Result<Vec<u32>, String> {
    let entry = entries.remove("vocabulary").ok_or("tensor vocabulary is missing")?;
    let (dtype, shape) = (entry.dtype, &entry.shape);
    if dtype != safetensors::Dtype::U32 || shape.len() != 1 || !(1..=vocab_size).contains(&shape[0])
    {
        return Err(format!("vocabulary is {dtype:?} {shape:?}, expected U32 [1..={vocab_size}]"));
    }
    let ids = bytes[entry.range].chunks_exact(4);
    let ids = ids.map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]));
    let ids: Vec<u32> = ids.collect();
    let mut seen = vec![false; vocab_size];
    for id in &ids {
        match seen.get_mut(*id as usize) {
            None => return Err(format!("vocabulary: token {id} of {vocab_size}")),
            Some(true) => return Err(format!("vocabulary: token {id} twice")),
            Some(seen) => *seen = true,
        }
    }
    Ok(ids)
}

/// A tensor in row order, with its numbers checked.
fn tensor(name: &str, shape: &[usize], entry: &Entry, bytes: &[u8]) -> Result<Tensor, String> {
    let stored =
        |shape: &[usize]| format!("{:?} {:?}, expected {shape:?}", entry.dtype, entry.shape);
    let dtype = match (shape, entry.dtype) {
        ([n], safetensors::Dtype::F32) if entry.shape == [*n] => DType::F32,
        ([n, k], safetensors::Dtype::F16) if entry.shape == [*n, *k] => DType::F16,
        ([n, k], safetensors::Dtype::U8)
            if DType::Q8_0.row_bytes(*k).is_some_and(|row| entry.shape == [*n, row]) =>
        {
            DType::Q8_0
        }
        _ => return Err(stored(shape)),
    };
    let half = |at: &[u8]| f16::from_le_bytes([at[0], at[1]]).is_finite();
    let is_finite = match dtype {
        DType::F32 => bytes
            .chunks_exact(4)
            .all(|at| f32::from_le_bytes([at[0], at[1], at[2], at[3]]).is_finite()),
        DType::F16 => bytes.chunks_exact(2).all(half),
        _ => bytes.chunks_exact(dtype.block_bytes()).all(half),
    };
    if !is_finite {
        return Err("a number in it is not finite".to_owned());
    }
    Ok(Tensor {
        name: format!("adapter.{name}"),
        dtype,
        layout: Layout::Rows,
        shape: shape.to_vec(),
        bytes: TensorBytes::owned(bytes.to_vec()),
    })
}
