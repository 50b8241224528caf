//! `fit`: trains a drafter on what `collect` gathered.

mod checkpoint;
mod data;
mod loss;
mod optimiser;
mod ridge;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use clap::Args;
use hat_engine::note;
use hat_engine::pull;
use hat_loader::Bundle;
use serde::{Deserialize, Serialize};

use self::checkpoint::{Checkpoint, Origin};
use self::data::Plan;
use self::loss::{Loss, LossWeights, StepLoss};
use self::optimiser::{AdamW, Schedule};
use crate::adapter::{Adapter, TrainingFacts};
use crate::drafter::{Dims, Kind, Params, Unroll, WeightReader};
use crate::shard::Collection;

pub(crate) use self::data::{FinalNorm, batch_of, is_held_out};

/// Flags of `hat-train fit`.
#[derive(Args)]
pub(crate) struct FitArgs {
    /// A directory that `collect` wrote.
    collection: PathBuf,
    /// Folder for the drafter and its checkpoint. Training continues from a checkpoint that is
    /// there.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Directory with device/ and cloud/; the default model's otherwise.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Kind of the drafter.
    #[arg(long, value_enum, default_value_t = Kind::Deep)]
    drafter: Kind,
    /// The device's layers; the drafter reads the rows after them.
    #[arg(long, default_value_t = 2)]
    split_layer: usize,
    /// Number of times that each answer is seen.
    #[arg(long, default_value_t = 1)]
    epochs: u32,
    /// Most shards to use.
    #[arg(long)]
    shards: Option<usize>,
    /// Draft steps that are unrolled (`deep` alone).
    #[arg(long, default_value_t = 3)]
    unroll: usize,
    /// Draft positions of one optimiser step.
    #[arg(long, default_value_t = 512)]
    batch: usize,
    /// Tokens at the end of each prompt in which drafts are trained, too.
    #[arg(long, default_value_t = 0)]
    prompt_tail: usize,
    /// Size of the draft vocabulary, in tokens.
    #[arg(long, default_value_t = 8192)]
    vocabulary: usize,
    /// Number of its most frequent tokens in each step's loss.
    #[arg(long, default_value_t = 2048)]
    frequent: usize,
    /// Number of its other tokens in each step's loss, drawn anew each step.
    #[arg(long, default_value_t = 512)]
    drawn: usize,
    /// Highest learning rate.
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f32,
    /// Weight decay of the matrices.
    #[arg(long, default_value_t = 0.05)]
    decay: f32,
    /// Steps of rising learning rate.
    #[arg(long, default_value_t = 40)]
    warmup: usize,
    /// Steps from one checkpoint to the next.
    #[arg(long, default_value_t = 50)]
    checkpoint: usize,
    /// Write matrices as f16 instead of q8_0.
    #[arg(long)]
    f16: bool,
    /// Seed of order and draws.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Start from this checkpoint of another run of the same drafter, not from the model's layer.
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
}

/// Weights of the draft steps in the loss.
const STEP_WEIGHTS: [f32; 6] = [1.0, 0.8, 0.64, 0.512, 0.41, 0.328];

/// Everything that a run of `fit` depends on; a checkpoint of another one is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Recipe {
    drafter: String,
    model_id: String,
    split_layer: usize,
    epochs: u32,
    /// Shards of the first run, which later ones keep to.
    shards: usize,
    unroll: usize,
    batch: usize,
    prompt_tail: usize,
    vocabulary: usize,
    frequent: usize,
    drawn: usize,
    learning_rate: f32,
    decay: f32,
    warmup: usize,
    seed: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    from: Option<Box<Origin>>,
}

impl Recipe {
    /// Optimiser steps that the numbers have seen before this run.
    fn steps_before(&self) -> usize {
        self.from.as_ref().map_or(0, |origin| origin.steps())
    }
}

const CHECKPOINT: &str = "checkpoint.safetensors";

/// Trains to the end of the last epoch.
pub(crate) fn run(args: &FitArgs) -> anyhow::Result<()> {
    ensure!(
        (1..=STEP_WEIGHTS.len()).contains(&args.unroll),
        "--unroll: 1 to {}",
        STEP_WEIGHTS.len()
    );
    ensure!(args.batch > 0 && args.epochs > 0, "--batch, --epochs: at least 1");
    ensure!(
        args.frequent + args.drawn <= args.vocabulary,
        "--vocabulary: at least --frequent + --drawn"
    );
    let collection = Collection::read(&args.collection)?;
    ensure!(
        collection.split_layers.contains(&args.split_layer),
        "--split-layer {}: the collection has {:?}",
        args.split_layer,
        collection.split_layers
    );
    fs::create_dir_all(&args.out).with_context(|| format!("creating {}", args.out.display()))?;
    Trainer::new(args, collection)?.run()
}

struct Trainer<'a> {
    args: &'a FitArgs,
    recipe: Recipe,
    dims: Dims,
    plan: Plan,
    loss: Loss,
    params: Params,
    optimiser: AdamW,
    /// Steps that are done.
    step: usize,
    vocabulary: Vec<u32>,
    /// The collection's own account of itself, for the drafter's file.
    collection: Collection,
}

impl<'a> Trainer<'a> {
    fn new(args: &'a FitArgs, collection: Collection) -> anyhow::Result<Self> {
        let path = match &args.bundle {
            Some(bundle) => bundle.clone(),
            None => pull::default_bundle(&pull::cache_dir()?, pull::SPLIT_LAYER_DEFAULT, 0)?,
        };
        let device = Bundle::open(&path.join("device"))?;
        let cloud = Bundle::open(&path.join("cloud"))?;
        let model_id = device.model_id().to_string();
        ensure!(
            model_id == collection.model_id,
            "{} is of model {}, {} of {model_id}",
            args.collection.display(),
            collection.model_id,
            path.display()
        );
        let mut recipe = recipe_of(args, model_id);
        let origin = args.from.as_deref().map(Checkpoint::read).transpose()?;
        if let Some(origin) = &origin {
            recipe.from = Some(Box::new(origin.origin(&recipe)?));
        }
        let path = args.out.join(CHECKPOINT);
        let own = path.is_file().then(|| Checkpoint::read(&path)).transpose()?;
        if let Some(own) = &own {
            own.ensure_is_of(&recipe)?;
            recipe.shards = own.recipe.shards;
        }
        let plan = Plan::new(&args.collection, &collection, &mut recipe)?;
        let dims = Dims::new(device.config());
        let mut reader = WeightReader::new()?;
        let vocabulary = plan.frequent_tokens(recipe.vocabulary, device.config().vocab_size)?;
        let loss = Loss {
            weights: LossWeights::of(args.drafter),
            norm: FinalNorm {
                weight: reader.read(&device, "model.norm.weight", None)?,
                eps: dims.eps,
            },
            head: reader.read(&device, head_name(&device), Some(&vocabulary))?,
            frequent: recipe.frequent,
            drawn: recipe.drawn,
            seed: recipe.seed,
        };
        let kind = args.drafter;
        let step = own.as_ref().map_or(0, |own| own.step);
        let (params, optimiser) = match own.or(origin) {
            Some(checkpoint) => checkpoint.restore(kind, &dims)?,
            None => {
                let (layer, scale) = (args.split_layer, plan.shallow_scale()?);
                let mut params = Params::from_model(kind, &dims, &[&device, &cloud], layer, scale)?;
                ridge::start_outputs(&mut params, &dims, &plan, &loss)?;
                (params, AdamW::new(kind, &dims))
            }
        };
        Ok(Self { args, recipe, dims, plan, loss, params, optimiser, step, vocabulary, collection })
    }

    fn run(mut self) -> anyhow::Result<()> {
        let steps = self.plan.steps();
        note!(
            "{} drafter, {} numbers; {} positions in {} shards, {steps} steps{}",
            self.args.drafter.name(),
            self.params.len(),
            self.plan.positions(),
            self.recipe.shards,
            if self.step > 0 {
                format!(", going on after step {}", self.step)
            } else {
                String::new()
            }
        );
        let schedule =
            Schedule { highest: self.recipe.learning_rate, warmup: self.recipe.warmup, steps };
        let (start, mut seen, mut recent) = (Instant::now(), 0, Vec::new());
        while self.step < steps {
            let (batch, target) = self.plan.batch(self.step, &self.loss.norm)?;
            let unroll = Unroll::forward(&self.params, &self.dims, &batch, self.recipe.unroll);
            let (losses, dy) = self.loss.of(&unroll, &batch.spans, &target, self.step);
            let mut grads = Params::zeros(self.params.kind, &self.dims);
            unroll.backward(dy, &mut grads);
            drop(unroll);
            let rate = schedule.rate(self.step);
            self.optimiser.update(&mut self.params, &mut grads, rate, self.recipe.decay);
            self.step += 1;
            seen += target.nrows();
            recent.push(losses);
            if self.step.is_multiple_of(20) || self.step == steps {
                let speed = seen as f64 / start.elapsed().as_secs_f64();
                note!("step {}/{steps}: {}, {speed:.0} positions/s", self.step, mean(&recent));
                recent.clear();
            }
            if self.step.is_multiple_of(self.args.checkpoint) || self.step == steps {
                self.write_checkpoint()?;
            }
        }
        let path = self.args.out.join("adapter.safetensors");
        let half = self.args.f16;
        self.adapter().write(&path, half)?;
        note!("{} is trained", path.display());
        Ok(())
    }

    fn adapter(self) -> Adapter {
        let training = TrainingFacts {
            positions: self.plan.positions(),
            sequences: self.plan.sequences(),
            sources: self.plan.sources(),
            steps: self.step,
            recipe: serde_json::to_value(&self.recipe).expect("numbers and texts"),
            prompts: self.collection.prompts.clone(),
        };
        Adapter {
            params: self.params,
            model_id: self.recipe.model_id,
            split_layer: self.recipe.split_layer,
            vocabulary: self.vocabulary,
            training,
        }
    }

    fn write_checkpoint(&self) -> anyhow::Result<()> {
        let path = self.args.out.join(CHECKPOINT);
        checkpoint::write(&path, &self.params, &self.optimiser, self.step, &self.recipe)
    }
}

fn recipe_of(args: &FitArgs, model_id: String) -> Recipe {
    Recipe {
        drafter: args.drafter.name().to_owned(),
        model_id,
        split_layer: args.split_layer,
        epochs: args.epochs,
        shards: args.shards.unwrap_or(usize::MAX),
        unroll: args.unroll,
        batch: args.batch,
        prompt_tail: args.prompt_tail,
        vocabulary: args.vocabulary,
        frequent: args.frequent,
        drawn: args.drawn,
        learning_rate: args.learning_rate,
        decay: args.decay,
        warmup: args.warmup,
        seed: args.seed,
        from: None,
    }
}

/// The name of the LM head's matrix.
pub(crate) fn head_name(device: &Bundle) -> &'static str {
    let tied = device.config().tie_word_embeddings;
    if tied { "model.embed_tokens.weight" } else { "lm_head.weight" }
}

/// The mean of some steps' losses, as a text.
fn mean(recent: &[Vec<StepLoss>]) -> String {
    let steps = recent.first().map_or(0, Vec::len);
    let of = |step: usize, field: fn(&StepLoss) -> f64| {
        recent.iter().map(|losses| field(&losses[step])).sum::<f64>() / recent.len() as f64
    };
    let parts = (0..steps).map(|step| {
        format!(
            "KL {:.3} L1 {:.3} top-1 {:.3}",
            of(step, |loss| loss.divergence),
            of(step, |loss| loss.smooth),
            of(step, |loss| loss.agreement)
        )
    });
    parts.collect::<Vec<_>>().join(" | ")
}
