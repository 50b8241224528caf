//! `bundle.json`: what a bundle holds, checked against the model that it claims to be.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ModelId;
use crate::config::{ConfigError, LlamaConfig};
use crate::layout;
use crate::sampling::SamplingDefaults;
use crate::split::{Role, Split, Submodel, TensorSpec};
use crate::tensor::{DType, Layout};

/// The format of the directory that this crate writes.
pub const FORMAT_VERSION: u64 = 2;
/// The oldest format that this crate reads: it knows neither `control_tokens`, which are derived at
/// opening then, nor `sampling`.
pub const FORMAT_VERSION_OLDEST: u64 = 1;
/// The manifest's file name.
pub const MANIFEST: &str = "bundle.json";
/// The weights' file name.
pub const WEIGHTS: &str = "weights.safetensors";
/// The tokenizer's file name; device only.
pub const TOKENIZER: &str = "tokenizer.json";
/// The file of special tokens and chat template; device only.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The file of the trained drafter; device only, and not in every bundle.
pub const ADAPTER: &str = "adapter.safetensors";
/// The row codec that a new bundle asks for.
pub const WIRE_DEFAULT: &str = "int8";
/// Tensors begin in the weights file at multiples of this many bytes.
pub const ALIGNMENT: usize = 64;

/// The content of `bundle.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Manifest {
    /// [`FORMAT_VERSION_OLDEST`] to [`FORMAT_VERSION`].
    pub format_version: u64,
    /// Role that the bundle is for.
    pub role: Role,
    /// The model's name, for people.
    pub model_name: String,
    /// The model's identity, for HELLO.
    pub model_id: ModelId,
    /// Layers of the input submodel.
    pub split_layer: usize,
    /// Layers of the output submodel.
    pub tail_layers: usize,
    /// The decoder layers in this bundle: `[first, one past the last]`.
    pub layers: Vec<[usize; 2]>,
    /// Numbers in one row on the wire.
    pub hidden_size: usize,
    /// The row codec that a session uses unless told otherwise.
    pub wire: String,
    /// The hyper-parameters of the whole model.
    pub config: LlamaConfig,
    /// Ids that no text of a user may make, ascending; device only, and from format 2 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_tokens: Option<Vec<u32>>,
    /// Sampling settings that the model's makers recommend; in the device's half.
    #[serde(default, skip_serializing_if = "SamplingDefaults::is_empty")]
    pub sampling: SamplingDefaults,
    /// Every other file of the bundle.
    pub files: BTreeMap<String, FileEntry>,
    /// The tensors in the order of the weights file.
    pub tensors: Vec<TensorEntry>,
}

/// Size and content of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of its content, 64 hexadecimal digits.
    pub blake3: String,
}

/// A tensor by its logical type and shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// The checkpoint name.
    pub name: String,
    /// [`DType::name`].
    pub dtype: String,
    /// [`Layout::name`].
    pub layout: String,
    /// `[n]` or `[n, k]`.
    pub shape: Vec<usize>,
}

impl TensorEntry {
    /// An entry in the layout that we write: vectors as rows, matrices in panels.
    pub(super) fn new(name: &str, dtype: DType, shape: &[usize]) -> Self {
        let layout = if shape.len() == 1 { Layout::Rows } else { Layout::Panel16 };
        Self {
            name: name.to_owned(),
            dtype: dtype.name().to_owned(),
            layout: layout.name().to_owned(),
            shape: shape.to_vec(),
        }
    }
}

/// Form of a tensor in the weights file.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) dtype: DType,
    pub(super) layout: Layout,
    /// Type and length in the safetensors header.
    pub(super) file_dtype: safetensors::Dtype,
    pub(super) file_len: usize,
    /// Bytes that mean something; the rest of `file_bytes` is padding.
    pub(super) bytes: usize,
    pub(super) file_bytes: usize,
}

impl Stored {
    /// Form in which an entry is stored: matrices as padded bytes, vectors as padded f32.
    pub(super) fn of(entry: &TensorEntry) -> Result<Self, ConfigError> {
        let wrong = |reason: String| ConfigError::new(format!("tensors.{}", entry.name), reason);
        let dtype = DType::from_name(&entry.dtype)
            .ok_or_else(|| wrong(format!("dtype {:?} is not known", entry.dtype)))?;
        let layout = Layout::from_name(&entry.layout)
            .ok_or_else(|| wrong(format!("layout {:?} is not known", entry.layout)))?;
        let (bytes, width, file_dtype) = match (layout, entry.shape.as_slice()) {
            (Layout::Rows, [n]) if dtype == DType::F32 => {
                (n.checked_mul(4), 4, safetensors::Dtype::F32)
            }
            (Layout::Panel16, [n, k]) => {
                (layout::packed_bytes(dtype, *n, *k), 1, safetensors::Dtype::U8)
            }
            (_, shape) => {
                let (dtype, layout) = (dtype.name(), layout.name());
                return Err(wrong(format!("{dtype} {shape:?} can't have layout {layout}")));
            }
        };
        let padded = bytes.and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT));
        let (Some(bytes), Some(file_bytes)) = (bytes, padded) else {
            return Err(wrong(format!("{} {:?} is impossible", dtype.name(), entry.shape)));
        };
        let file_len = file_bytes / width;
        Ok(Self { dtype, layout, file_dtype, file_len, bytes, file_bytes })
    }
}

impl Manifest {
    /// The row codec that whoever made the bundle asked for. Format 1 wrote f16 unasked.
    #[must_use]
    pub fn wire_asked(&self) -> Option<&str> {
        (self.format_version > 1 || self.wire != "f16").then_some(&self.wire)
    }

    /// The cut.
    pub(super) fn split(&self) -> Result<Split, ConfigError> {
        Split::new(self.config.num_hidden_layers, self.split_layer, self.tail_layers)
    }

    /// Checks everything that needs no other file: the numbers, the layers, the files' names, and
    /// that the tensors are those of the role, each once and in its shape.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        self.config
            .check()
            .map_err(|error| ConfigError::new(format!("config.{}", error.key), error.reason))?;
        let split = self.split()?;
        if self.hidden_size != self.config.hidden_size {
            let (got, expected) = (self.hidden_size, self.config.hidden_size);
            let reason = format!("{got}, but config.hidden_size is {expected}");
            return Err(ConfigError::new("hidden_size", reason));
        }
        let layers = held_layers(&split, self.role);
        if self.layers != layers {
            let reason = format!("{:?}, the split gives {layers:?}", self.layers);
            return Err(ConfigError::new("layers", reason));
        }
        if !matches!(self.wire.as_str(), "f32" | "f16" | "int8" | "int4") {
            let reason = format!("{:?} is no row codec", self.wire);
            return Err(ConfigError::new("wire", reason));
        }
        self.check_control()?;
        self.sampling
            .checked()
            .map_err(|error| ConfigError::new(format!("sampling.{}", error.key), error.reason))?;
        self.check_files()?;
        self.check_tensors(&split)
    }

    fn check_control(&self) -> Result<(), ConfigError> {
        let wrong = |reason: String| Err(ConfigError::new("control_tokens", reason));
        match (&self.control_tokens, self.role) {
            (None, Role::Device) if self.format_version > FORMAT_VERSION_OLDEST => {
                wrong("missing; run hat-split again".into())
            }
            (Some(_), Role::Cloud) => wrong("belong to no cloud bundle".into()),
            (Some(ids), Role::Device) => {
                match ids.iter().find(|id| **id as usize >= self.config.vocab_size) {
                    None => Ok(()),
                    Some(id) => {
                        wrong(format!("{id} is beyond vocab_size = {}", self.config.vocab_size))
                    }
                }
            }
            (None, _) => Ok(()),
        }
    }

    fn check_files(&self) -> Result<(), ConfigError> {
        let expected = file_names(self.role);
        for name in expected {
            if !self.files.contains_key(*name) {
                return Err(ConfigError::new(format!("files.{name}"), "missing"));
            }
        }
        for (name, entry) in &self.files {
            let key = format!("files.{name}");
            let is_optional = self.role == Role::Device && name == ADAPTER;
            if !expected.contains(&name.as_str()) && !is_optional {
                let reason = format!("belongs to no {} bundle", self.role.name());
                return Err(ConfigError::new(key, reason));
            }
            if blake3::Hash::from_hex(&entry.blake3).is_err() {
                return Err(ConfigError::new(key, "blake3 is not 64 hexadecimal digits"));
            }
        }
        Ok(())
    }

    fn check_tensors(&self, split: &Split) -> Result<(), ConfigError> {
        let specs = split.role_tensors(self.role, &self.config);
        let mut wanted: BTreeMap<&str, &TensorSpec> =
            specs.iter().map(|spec| (spec.name.as_str(), spec)).collect();
        for entry in &self.tensors {
            let key = || format!("tensors.{}", entry.name);
            let Some(spec) = wanted.remove(entry.name.as_str()) else {
                let role = self.role.name();
                let reason = format!("occurs twice, or belongs to no {role} bundle of this split");
                return Err(ConfigError::new(key(), reason));
            };
            if spec.shape != entry.shape {
                let reason = format!("shape {:?}, expected {:?}", entry.shape, spec.shape);
                return Err(ConfigError::new(key(), reason));
            }
            Stored::of(entry)?;
        }
        match wanted.keys().next() {
            None => Ok(()),
            Some(name) => Err(ConfigError::new(format!("tensors.{name}"), "missing")),
        }
    }
}

/// Decoder layers of a role: input and output of the device (empty runs left out), or the middle.
pub(super) fn held_layers(split: &Split, role: Role) -> Vec<[usize; 2]> {
    let submodels: &[Submodel] = match role {
        Role::Device => &[Submodel::Input, Submodel::Output],
        Role::Cloud => &[Submodel::Middle],
    };
    submodels
        .iter()
        .map(|submodel| split.layers(*submodel))
        .filter(|layers| !layers.is_empty())
        .map(|layers| [layers.start, layers.end])
        .collect()
}

/// The files that each bundle of a role has beside the manifest.
pub(super) fn file_names(role: Role) -> &'static [&'static str] {
    match role {
        Role::Device => &[WEIGHTS, TOKENIZER, TOKENIZER_CONFIG],
        Role::Cloud => &[WEIGHTS],
    }
}
