//! The file of a trained drafter: `adapter.safetensors`.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::drafter::{Dims, Params, write_tensors};

/// A drafter and what it is for.
pub(crate) struct Adapter {
    pub(crate) params: Params,
    pub(crate) dims: Dims,
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
