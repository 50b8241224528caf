//! The file of a trained drafter, `adapter.safetensors`: written here, read by the loader.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use clap::ValueEnum as _;
use hat_loader::bundle::ADAPTER_FORMAT_VERSION;
use hat_loader::layout::{dequantise_row, quantise_q8_0};
use hat_loader::{Bundle, DType};
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::drafter::{Dims, Kind, NamedTensor, PARAMETERS, Params, Rows, write_tensors};

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

impl Adapter {
    /// Reads a file that is for the model of `device`.
    pub(crate) fn read(path: &Path, dims: &Dims, device: &Bundle) -> anyhow::Result<Self> {
        let file = hat_loader::Adapter::read(path, device)?;
        let kind = Kind::from_str(file.kind().name(), false).map_err(anyhow::Error::msg)?;
        let mut params = Params::zeros(kind, dims);
        for (parameter, name) in PARAMETERS.iter().enumerate() {
            if Params::has(kind, parameter) {
                let tensor = file.rows(name).map_err(anyhow::Error::msg)?;
                let (n, k) = dims.shape(parameter);
                let mut numbers = vec![0.0; n * k];
                let row_bytes = tensor.dtype.row_bytes(k).context("checked by the loader")?;
                let rows = tensor.bytes.chunks_exact(row_bytes);
                for (row, out) in rows.zip(numbers.chunks_exact_mut(k)) {
                    dequantise_row(tensor.dtype, k, row, out);
                }
                params.values[parameter] = Rows::from_shape_vec((n, k), numbers)?;
            }
        }
        Ok(Self {
            params,
            model_id: device.model_id().to_string(),
            split_layer: file.split_layer(),
            vocabulary: file.vocabulary().to_vec(),
            training: serde_json::from_str(file.training())
                .with_context(|| format!("{}: training", path.display()))?,
        })
    }

    /// Writes the file, matrices as q8_0.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut tensors = Vec::new();
        for (name, values) in PARAMETERS.iter().zip(&self.params.values) {
            ensure!(
                values.iter().all(|v| v.is_finite()),
                "{name} holds a number that is not finite"
            );
            let (name, (n, k)) = ((*name).to_owned(), values.dim());
            let numbers = values.as_slice().expect("standard layout");
            match n {
                0 => {}
                1 => tensors.push(NamedTensor {
                    name,
                    shape: vec![k],
                    dtype: Dtype::F32,
                    bytes: bytemuck::cast_slice(numbers).to_vec(),
                }),
                _ => {
                    let row = DType::Q8_0.row_bytes(k);
                    let row = row.with_context(|| format!("{name}: rows of {k} numbers"))?;
                    let mut bytes = vec![0; n * row];
                    for (from, to) in numbers.chunks_exact(k).zip(bytes.chunks_exact_mut(row)) {
                        quantise_q8_0(from, to);
                    }
                    tensors.push(NamedTensor {
                        name,
                        shape: vec![n, row],
                        dtype: Dtype::U8,
                        bytes,
                    });
                }
            }
        }
        tensors.push(NamedTensor {
            name: "vocabulary".to_owned(),
            shape: vec![self.vocabulary.len()],
            dtype: Dtype::U32,
            bytes: bytemuck::cast_slice(&self.vocabulary).to_vec(),
        });
        let texts = [
            ("format_version", ADAPTER_FORMAT_VERSION.to_string()),
            ("kind", self.params.kind.name().to_owned()),
            ("model_id", self.model_id.clone()),
            ("split_layer", self.split_layer.to_string()),
            ("training", serde_json::to_string(&self.training)?),
        ];
        let texts = texts.map(|(name, text)| (name.to_owned(), text));
        write_tensors(path, &tensors, texts.into())
    }
}
