//! The file of a trained drafter: `adapter.safetensors`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use clap::ValueEnum as _;
use hat_loader::Bundle;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::drafter::{Dims, Kind, Params, write_tensors};

/// A drafter and what it is for.
pub(crate) struct Adapter {
    pub(crate) params: Params,
    pub(crate) model_id: String,
    pub(crate) split_layer: usize,
    /// Tokens that it may guess, most frequent first.
    pub(crate) vocabulary: Vec<u32>,
    pub(crate) training: TrainingFacts,
}

/// What the card of a drafter says of its training.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TrainingFacts {
    pub(crate) positions: usize,
    pub(crate) sequences: usize,
    pub(crate) sources: BTreeMap<String, usize>,
    pub(crate) steps: usize,
    pub(crate) recipe: serde_json::Value,
    /// Name and BLAKE3 of each prompt file.
    pub(crate) prompts: Vec<(String, String)>,
}

/// The format of the file.
pub(crate) const FORMAT_VERSION: u32 = 1;

impl Adapter {
    /// Reads a file that is for the model of `device`.
    pub(crate) fn read(path: &Path, dims: &Dims, device: &Bundle) -> anyhow::Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let at = || format!("in {}", path.display());
        let (_, header) = SafeTensors::read_metadata(&bytes).with_context(at)?;
        let metadata = header.metadata().as_ref();
        let field = |name: &str| {
            let value = metadata.and_then(|metadata| metadata.get(name));
            value.with_context(|| format!("{}: no {name} in its metadata", path.display()))
        };
        let version = field("format_version")?;
        ensure!(
            version.parse() == Ok(FORMAT_VERSION),
            "{}: format {version}, this program reads {FORMAT_VERSION}",
            path.display()
        );
        let (model_id, expected) = (field("model_id")?, device.model_id().to_string());
        ensure!(*model_id == expected, "{}: of model {model_id}, not {expected}", path.display());
        let kind = field("kind")?;
        let kind = Kind::from_str(kind, false)
            .map_err(|error| anyhow::anyhow!("{}: kind: {error}", path.display()))?;
        let file = SafeTensors::deserialize(&bytes).with_context(at)?;
        let vocabulary = file.tensor("vocabulary").with_context(at)?;
        ensure!(
            vocabulary.dtype() == Dtype::U32 && vocabulary.shape().len() == 1,
            "{}: vocabulary is {:?} {:?}",
            path.display(),
            vocabulary.dtype(),
            vocabulary.shape()
        );
        let vocabulary: Vec<u32> = bytemuck::pod_collect_to_vec(vocabulary.data());
        let tokens = device.config().vocab_size;
        ensure!(
            !vocabulary.is_empty() && vocabulary.iter().all(|token| (*token as usize) < tokens),
            "{}: vocabulary: 1 to {tokens} tokens below {tokens} are needed",
            path.display()
        );
        Ok(Self {
            params: Params::from_tensors(kind, dims, &file, "", path)?,
            model_id: expected,
            split_layer: field("split_layer")?.parse().context("split_layer")?,
            training: serde_json::from_str(field("training")?).with_context(at)?,
            vocabulary,
        })
    }

    /// Writes the file, parameters as f16.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut tensors = self.params.tensors("", true);
        let vocabulary = bytemuck::cast_slice(&self.vocabulary).to_vec();
        tensors.push(("vocabulary".into(), vec![self.vocabulary.len()], Dtype::U32, vocabulary));
        let metadata = [
            ("format_version", FORMAT_VERSION.to_string()),
            ("kind", self.params.kind.name().to_owned()),
            ("model_id", self.model_id.clone()),
            ("split_layer", self.split_layer.to_string()),
            ("training", serde_json::to_string(&self.training)?),
        ];
        let metadata = metadata.into_iter().map(|(name, value)| (name.to_owned(), value));
        write_tensors(path, &tensors, metadata.collect())
    }
}
