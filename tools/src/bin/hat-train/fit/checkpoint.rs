//! Checkpoints: what a run of `fit` needs to go on, and what another one may start from.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use candle_core::{DType, Device, Tensor};
use hat_loader::{DrafterArchitecture, LlamaConfig};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use super::Recipe;
use super::drafter::Drafter;
use super::optimiser::AdamW;
use crate::shard::write_tensors;

/// Origin of a run: the checkpoint of another one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Origin {
    blake3: String,
    /// Steps that were done.
    steps: usize,
    recipe: Recipe,
}

impl Origin {
    /// Optimiser steps that the numbers have seen, those of origins before included.
    pub(super) fn steps(&self) -> usize {
        self.steps + self.recipe.steps_before()
    }
}

/// A checkpoint that was read.
pub(super) struct Checkpoint {
    path: PathBuf,
    bytes: Vec<u8>,
    pub(super) recipe: Recipe,
    /// Steps that are done.
    pub(super) step: usize,
}

impl Checkpoint {
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let at = || format!("reading {}", path.display());
        let bytes = fs::read(path).with_context(at)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).with_context(at)?;
        let texts = header.metadata().clone().unwrap_or_default();
        let text = |name: &str| {
            let text = texts.get(name);
            text.with_context(|| format!("{}: no {name} in its metadata", path.display()))
        };
        let recipe = serde_json::from_str(text("recipe")?)
            .with_context(|| format!("{}: recipe", path.display()))?;
        let step = text("step")?.parse();
        let step = step.with_context(|| format!("{}: step", path.display()))?;
        Ok(Self { path: path.to_owned(), bytes, recipe, step })
    }

    /// Checks that it is of the run `wanted`, for any number of shards that the run began with.
    pub(super) fn ensure_is_of(&self, wanted: &Recipe) -> anyhow::Result<()> {
        let (path, found) = (self.path.display(), &self.recipe);
        let wanted = Recipe { shards: found.shards, ..wanted.clone() };
        ensure!(found == &wanted, "{path} is of another run: {found:?}, now {wanted:?}");
        Ok(())
    }

    /// Origin of a run of `wanted` that starts here; it has to be of the same drafter.
    pub(super) fn origin(&self, wanted: &Recipe) -> anyhow::Result<Origin> {
        let (path, found) = (self.path.display(), &self.recipe);
        let facts =
            |recipe: &Recipe| (recipe.drafter.clone(), recipe.split_layer, recipe.model_id.clone());
        ensure!(
            facts(found) == facts(wanted),
            "{path} holds a {} drafter after layer {} of model {}, not a {} drafter after layer \
             {} of model {}",
            found.drafter,
            found.split_layer,
            found.model_id,
            wanted.drafter,
            wanted.split_layer,
            wanted.model_id
        );
        let blake3 = blake3::hash(&self.bytes).to_string();
        Ok(Origin { blake3, steps: self.step, recipe: found.clone() })
    }

    /// The drafter and the optimiser's memory.
    pub(super) fn restore(
        &self,
        kind: DrafterArchitecture,
        config: &LlamaConfig,
    ) -> anyhow::Result<(Drafter, AdamW)> {
        let path = self.path.display();
        let file = candle_core::safetensors::load_buffer(&self.bytes, &Device::Cpu)
            .with_context(|| format!("in {path}"))?;
        let read = |name: String| -> anyhow::Result<Tensor> {
            let found = file.get(&name).with_context(|| format!("{path}: no {name} in it"))?;
            let dtype = found.dtype();
            ensure!(dtype == DType::F32, "{path}: {name} is {dtype:?}, expected F32");
            Ok(found.clone())
        };
        let drafter = Drafter::new(kind, config, |name, _| read(name.to_owned()))
            .with_context(|| format!("in {path}"))?;
        let mut moments = BTreeMap::new();
        for (name, value) in &drafter.params {
            let of = |which: &str| -> anyhow::Result<Tensor> {
                Ok(read(format!("{which}.{name}"))?.reshape(value.shape())?)
            };
            moments.insert(*name, [of("first")?, of("second")?]);
        }
        Ok((drafter, AdamW { moments, step: self.step + self.recipe.steps_before() }))
    }
}

/// Writes a checkpoint after `step` steps of the run `recipe`.
pub(super) fn write(
    path: &Path,
    drafter: &Drafter,
    optimiser: &AdamW,
    step: usize,
    recipe: &Recipe,
) -> anyhow::Result<()> {
    let mut tensors = Vec::new();
    for ((name, value), [first, second]) in drafter.params.iter().zip(optimiser.moments.values()) {
        tensors.push(((*name).to_owned(), value.as_tensor()));
        tensors.push((format!("first.{name}"), first));
        tensors.push((format!("second.{name}"), second));
    }
    let metadata = HashMap::from([
        ("step".to_owned(), step.to_string()),
        ("recipe".to_owned(), serde_json::to_string(recipe)?),
    ]);
    write_tensors(path, tensors, metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> LlamaConfig {
        hat_loader::generated(&hat_loader::TinyModel::default()).config().clone()
    }

    fn recipe() -> Recipe {
        Recipe {
            drafter: "paper".to_owned(),
            model_id: "ab".repeat(32),
            split_layer: 2,
            epochs: 1,
            shards: 3,
            unroll: 1,
            batch: 8,
            prompt_tail: 0,
            vocabulary: 9,
            frequent: 4,
            drawn: 2,
            learning_rate: 1e-3,
            decay: 0.0,
            warmup: 1,
            seed: 1,
            from: None,
        }
    }

    fn filled(number: f64) -> Drafter {
        let value =
            |_: &str, shape: &[usize]| Ok(Tensor::full(number as f32, shape, &Device::Cpu)?);
        Drafter::new(DrafterArchitecture::Paper, &config(), value).unwrap()
    }

    /// Writes a checkpoint after 7 steps, in which each number says where it belongs.
    fn written(path: &Path, recipe: &Recipe) {
        let drafter = filled(1.0);
        let mut optimiser = AdamW::new(&drafter.params).unwrap();
        for [first, second] in optimiser.moments.values_mut() {
            *first = first.affine(0.0, 2.0).unwrap();
            *second = second.affine(0.0, 3.0).unwrap();
        }
        write(path, &drafter, &optimiser, 7, recipe).unwrap();
    }

    /// True if a tensor holds nothing but `number`.
    fn is_all(tensor: &Tensor, number: f32) -> bool {
        let numbers = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        !numbers.is_empty() && numbers.into_iter().all(|found| found == number)
    }

    #[test]
    fn a_run_goes_on_and_another_one_starts_from_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("checkpoint.safetensors");
        written(&path, &recipe());
        let read = Checkpoint::read(&path).unwrap();
        assert_eq!(read.step, 7);
        read.ensure_is_of(&Recipe { shards: 9, ..recipe() }).unwrap();
        let (found, memory) = read.restore(DrafterArchitecture::Paper, &config()).unwrap();
        assert!(found.params.values().all(|value| is_all(value, 1.0)));
        let mut moments = memory.moments.values();
        assert!(moments.all(|[first, second]| is_all(first, 2.0) && is_all(second, 3.0)));
        assert_eq!(memory.step, 7);

        let later = Recipe { seed: 2, shards: 5, ..recipe() };
        let from = Some(Box::new(read.origin(&later).unwrap()));
        let later = Recipe { from, ..later };
        assert_eq!(later.steps_before(), 7);
        let error = read.ensure_is_of(&later).unwrap_err().to_string();
        assert!(error.contains("another run"), "{error}");
        written(&path, &later);
        let read = Checkpoint::read(&path).unwrap();
        read.ensure_is_of(&later).unwrap();
        assert_eq!(read.restore(DrafterArchitecture::Paper, &config()).unwrap().1.step, 14);
        assert_eq!(read.origin(&recipe()).unwrap().steps(), 14);
    }

    #[test]
    fn a_checkpoint_of_another_drafter_or_half_of_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("checkpoint.safetensors");
        written(&path, &recipe());
        let read = Checkpoint::read(&path).unwrap();
        let others = [
            Recipe { drafter: "layer".to_owned(), ..recipe() },
            Recipe { split_layer: 4, ..recipe() },
            Recipe { model_id: "cd".repeat(32), ..recipe() },
        ];
        for other in others {
            let error = read.origin(&other).unwrap_err().to_string();
            assert!(error.contains("holds a paper drafter after layer 2"), "{error}");
        }
        let error = read.restore(DrafterArchitecture::Layer, &config()).map(|_| ()).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("shallow_proj.weight"), "{error}");
        let bytes = fs::read(&path).unwrap();
        for keep in [0, 7, 100] {
            fs::write(&path, &bytes[..keep]).unwrap();
            assert!(Checkpoint::read(&path).is_err(), "{keep} bytes");
        }
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let read = Checkpoint::read(&path)
            .and_then(|read| read.restore(DrafterArchitecture::Paper, &config()));
        assert!(read.is_err());
    }
}
