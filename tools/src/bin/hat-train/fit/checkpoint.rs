//! Checkpoints: what a run of `fit` needs to go on, and what another one may start from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use super::Recipe;
use super::optimiser::AdamW;
use crate::drafter::{Dims, Kind, Params, write_tensors};

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
    pub(super) fn restore(&self, kind: Kind, dims: &Dims) -> anyhow::Result<(Params, AdamW)> {
        let file = SafeTensors::deserialize(&self.bytes)
            .with_context(|| format!("in {}", self.path.display()))?;
        let read = |prefix| Params::from_tensors(kind, dims, &file, prefix, &self.path);
        let step = self.step + self.recipe.steps_before();
        Ok((read("")?, AdamW { first: read("first.")?, second: read("second.")?, step }))
    }
}

/// Writes a checkpoint after `step` steps of the run `recipe`.
pub(super) fn write(
    path: &Path,
    params: &Params,
    optimiser: &AdamW,
    step: usize,
    recipe: &Recipe,
) -> anyhow::Result<()> {
    let mut tensors = params.tensors("");
    tensors.extend(optimiser.first.tensors("first."));
    tensors.extend(optimiser.second.tensors("second."));
    let metadata = BTreeMap::from([
        ("step".to_owned(), step.to_string()),
        ("recipe".to_owned(), serde_json::to_string(recipe)?),
    ]);
    write_tensors(path, &tensors, metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dims() -> Dims {
        Dims {
            hidden: 4,
            intermediate: 6,
            heads: 2,
            kv_heads: 1,
            head_dim: 2,
            eps: 1e-5,
            inv_freq: vec![1.0],
        }
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

    /// A checkpoint after 7 steps, in which each number says where it belongs.
    fn written(path: &Path, recipe: &Recipe) -> (Params, AdamW) {
        let filled = |number: f32| {
            let mut params = Params::zeros(Kind::Paper, &dims());
            params.values.iter_mut().for_each(|values| values.fill(number));
            params
        };
        let (params, step) = (filled(1.0), 7 + recipe.steps_before());
        let optimiser = AdamW { first: filled(2.0), second: filled(3.0), step };
        write(path, &params, &optimiser, 7, recipe).unwrap();
        (params, optimiser)
    }

    #[test]
    fn a_run_goes_on_and_another_one_starts_from_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("checkpoint.safetensors");
        let (params, optimiser) = written(&path, &recipe());
        let read = Checkpoint::read(&path).unwrap();
        assert_eq!(read.step, 7);
        read.ensure_is_of(&Recipe { shards: 9, ..recipe() }).unwrap();
        let (found, memory) = read.restore(Kind::Paper, &dims()).unwrap();
        assert_eq!(found.values, params.values);
        assert_eq!(memory.first.values, optimiser.first.values);
        assert_eq!(memory.second.values, optimiser.second.values);
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
        assert_eq!(read.restore(Kind::Paper, &dims()).unwrap().1.step, 14);
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
        let error = read.restore(Kind::Layer, &dims()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("shallow_proj.weight"), "{error}");
        let bytes = fs::read(&path).unwrap();
        for keep in [0, 7, 100] {
            fs::write(&path, &bytes[..keep]).unwrap();
            assert!(Checkpoint::read(&path).is_err(), "{keep} bytes");
        }
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let read = Checkpoint::read(&path).and_then(|read| read.restore(Kind::Paper, &dims()));
        assert!(read.is_err());
    }
}
