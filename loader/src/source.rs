//! A whole model as it comes in, whatever it comes from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::LlamaConfig;
use crate::control::{ControlTokens, TextFacts};
use crate::error::LoadError;
use crate::rows::SourceTensor;
use crate::sampling::SamplingDefaults;
use crate::split::{self, TensorSpec};
use crate::tensor::{DType, Layout, Tensor};
use crate::{checkpoint, gguf};

/// Settings of the conversion between text and ids that are not in `tokenizer.json`. This is the
/// part of `tokenizer_config.json` that an engine needs, and is written in its form.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct TokenSettings {
    /// Text of the token in front of a prompt; chat templates name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_token: Option<String>,
    /// Text of the token that ends an answer; chat templates name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eos_token: Option<String>,
    /// Text of the token for what has no token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unk_token: Option<String>,
    /// Text of the padding token; chat templates may name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pad_token: Option<String>,
    /// True if a plain prompt begins with `bos_token`. Informative: the post-processor of
    /// `tokenizer.json` is what puts it there.
    #[serde(default)]
    pub add_bos_token: bool,
    /// Jinja template that turns messages into a prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
}

/// Facts about a model's text, found at the split, for people and for the manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct TextReport {
    /// Control tokens by id: no text of a user makes one.
    pub control_tokens: BTreeMap<u32, String>,
    /// Control tokens that the file typed otherwise.
    pub retyped_tokens: usize,
    /// Ids that end an answer.
    pub ends: Vec<u32>,
    /// The pattern that cuts text into words, and where its name is from; of GGUF files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// Merges left out, since they join what are no tokens.
    pub merges_skipped: usize,
    /// Ids left without a token, since an earlier one has the same text.
    pub tokens_doubled: usize,
}

/// A model: configuration, tensors in row order under their checkpoint names, tokenizer.
///
/// Tensors are borrowed from the memory map; copied are q and k of a GGUF file, since their rows
/// change places, and what stands there in a type that has no kernels.
pub struct SourceModel {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) config: LlamaConfig,
    pub(crate) tensors: BTreeMap<String, SourceTensor>,
    pub(crate) tokenizer_json: String,
    pub(crate) settings: TokenSettings,
    pub(crate) text: TextReport,
    pub(crate) sampling: SamplingDefaults,
}

impl SourceModel {
    /// Opens a Hugging Face directory or a GGUF file, and checks that it holds each tensor that
    /// its configuration asks for, in its shape, and no other.
    ///
    /// The files are mapped: they must not be changed or shortened while the model is open.
    ///
    /// # Errors
    /// The first thing that is wrong, with the file and the name.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        Self::open_with(path, None)
    }

    /// As [`SourceModel::open`]; `pre` names the pattern of a GGUF file that doesn't name its
    /// own, as `tokenizer.ggml.pre` would.
    ///
    /// # Errors
    /// As [`SourceModel::open`], and if the name is none.
    pub fn open_with(path: &Path, pre: Option<&str>) -> Result<Self, LoadError> {
        let metadata = std::fs::metadata(path).map_err(|error| LoadError::io(path, error))?;
        let mut model =
            if metadata.is_dir() { checkpoint::open(path)? } else { gguf::open(path, pre)? };
        model.check()?;
        model.derive_control()?;
        Ok(model)
    }

    /// The model's name: from its metadata, or the name of its directory or file.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The hyper-parameters.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Names of all tensors, ascending.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor in [`Layout::Rows`], q and k in the order of `config.json`'s models (half-split
    /// rotary pairs).
    ///
    /// # Errors
    /// [`LoadError::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<Tensor, LoadError> {
        let source = self.source(name)?;
        Ok(Tensor {
            name: name.to_owned(),
            dtype: source.dtype,
            layout: Layout::Rows,
            shape: source.shape.clone(),
            bytes: source.bytes(),
        })
    }

    /// A tensor as it comes from its file.
    pub(crate) fn source(&self, name: &str) -> Result<&SourceTensor, LoadError> {
        self.tensors.get(name).ok_or_else(|| LoadError::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
        })
    }

    /// The text of `tokenizer.json`.
    #[must_use]
    pub fn tokenizer_json(&self) -> &str {
        &self.tokenizer_json
    }

    /// Special tokens by text, and the chat template.
    #[must_use]
    pub fn token_settings(&self) -> &TokenSettings {
        &self.settings
    }

    /// Facts about its text.
    #[must_use]
    pub fn text_report(&self) -> &TextReport {
        &self.text
    }

    /// Derives control tokens and ends, and writes them into tokenizer, configuration and report.
    pub(crate) fn derive_control(&mut self) -> Result<(), LoadError> {
        let wrong = |error| LoadError::Json { path: self.path.join("tokenizer.json"), error };
        let mut json = serde_json::from_str(&self.tokenizer_json).map_err(wrong)?;
        let facts = TextFacts {
            bos: self.settings.bos_token.as_deref(),
            eos: self.settings.eos_token.as_deref(),
            end_ids: &self.config.eos_token_ids,
            template: self.settings.chat_template.as_deref(),
        };
        let derived = ControlTokens::derive(&mut json, facts);
        if derived.retyped > 0 {
            self.tokenizer_json = json.to_string();
        }
        self.config.eos_token_ids.extend(&derived.ends);
        self.config.eos_token_ids.sort_unstable();
        self.config.eos_token_ids.dedup();
        self.text.control_tokens = derived.control;
        self.text.retyped_tokens = derived.retyped;
        self.text.ends = self.config.eos_token_ids.clone();
        Ok(())
    }

    /// Sampling settings that the model's makers recommend.
    #[must_use]
    pub fn sampling(&self) -> SamplingDefaults {
        self.sampling
    }

    /// The chat template, if the model has one.
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        self.settings.chat_template.as_deref()
    }

    /// Checks tensors against the configuration.
    pub(crate) fn check(&self) -> Result<(), LoadError> {
        let specs = split::model_tensors(&self.config);
        for spec in &specs {
            self.check_tensor(spec)?;
        }
        if self.tensors.len() == specs.len() {
            return Ok(());
        }
        let known: std::collections::HashSet<&str> =
            specs.iter().map(|spec| spec.name.as_str()).collect();
        let unknown = self.tensors.iter().find(|(name, _)| !known.contains(name.as_str()));
        let (name, tensor) = unknown.expect("more tensors than names");
        Err(LoadError::UnknownTensor {
            path: tensor.path.clone(),
            name: name.clone(),
            family: self.config.architecture.name(),
            reason: "leaving it out would change the answers",
        })
    }

    fn check_tensor(&self, spec: &TensorSpec) -> Result<(), LoadError> {
        let tensor = self.source(&spec.name)?;
        let is_float = matches!(tensor.dtype, DType::F32 | DType::F16 | DType::Bf16);
        if tensor.shape == spec.shape && (is_float || spec.shape.len() == 2) {
            return Ok(());
        }
        let types = if spec.shape.len() == 1 { "f32, f16 or bf16" } else { "any type" };
        Err(LoadError::TensorMismatch {
            path: tensor.path.clone(),
            name: spec.name.clone(),
            expected: format!("{types} {:?}", spec.shape),
            got: format!("{} {:?}", tensor.origin.name, tensor.shape),
        })
    }
}

impl fmt::Debug for SourceModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceModel")
            .field("path", &self.path)
            .field("config", &self.config)
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}
