//! `fit`: trains a drafter on what `collect` gathered.

mod adapter;
mod checkpoint;
mod data;
mod drafter;
mod loss;
mod optimiser;
mod start;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use clap::Args;
use clap::builder::PossibleValuesParser;
use hat_loader::{Bundle, DrafterArchitecture};
use hat_program::note;
use serde::{Deserialize, Serialize};

use self::adapter::TrainingFacts;
use self::checkpoint::{Checkpoint, Origin};
use self::data::{FinalNorm, Plan};
use self::drafter::{Drafter, weight};
use self::loss::{Loss, STEP_WEIGHTS, StepLoss};
use self::optimiser::{AdamW, Schedule};
use crate::shard::Collection;
use crate::target::{bundle_or_default, head_name};

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
    #[command(flatten)]
    recipe: Recipe,
    /// Steps from one checkpoint to the next.
    #[arg(long, default_value_t = 50)]
    checkpoint: usize,
    /// Write matrices as f16 instead of q8_0.
    #[arg(long)]
    f16: bool,
    /// Start from this checkpoint of another run of the same drafter, not from the model's layer.
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
}

/// Everything that a run of `fit` depends on; a checkpoint of another one is refused.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Recipe {
    /// A decoder layer that reads shallow rows and the deep rows of tokens before, one that reads
    /// shallow rows alone, or the paper's attention and two norms.
    #[arg(
        long,
        default_value = DrafterArchitecture::Deep.name(),
        value_parser =
            PossibleValuesParser::new(DrafterArchitecture::ALL.map(DrafterArchitecture::name))
    )]
    drafter: String,
    #[arg(skip)]
    model_id: String,
    /// The device's layers; the drafter reads the rows after them.
    #[arg(long, default_value_t = 2)]
    split_layer: usize,
    /// Number of times that each answer is seen.
    #[arg(long, default_value_t = 1)]
    epochs: u32,
    /// Most shards to use. Later runs keep to those of the first.
    #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
    shards: usize,
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
    /// Seed of order and draws.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(skip)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    from: Option<Box<Origin>>,
}

impl Recipe {
    fn kind(&self) -> DrafterArchitecture {
        let named = DrafterArchitecture::ALL.into_iter().find(|kind| kind.name() == self.drafter);
        named.expect("one of the possible values")
    }

    /// Optimiser steps that the numbers have seen before this run.
    fn steps_before(&self) -> usize {
        self.from.as_ref().map_or(0, |origin| origin.steps())
    }
}

const CHECKPOINT: &str = "checkpoint.safetensors";

/// Trains to the end of the last epoch.
pub(crate) fn run(args: &FitArgs) -> anyhow::Result<()> {
    let recipe = &args.recipe;
    ensure!(
        (1..=STEP_WEIGHTS.len()).contains(&recipe.unroll),
        "--unroll: 1 to {}",
        STEP_WEIGHTS.len()
    );
    ensure!(recipe.batch > 0 && recipe.epochs > 0, "--batch, --epochs: at least 1");
    ensure!(
        recipe.frequent + recipe.drawn <= recipe.vocabulary,
        "--vocabulary: at least --frequent + --drawn"
    );
    let collection = Collection::read(&args.collection)?;
    ensure!(
        collection.split_layers.contains(&recipe.split_layer),
        "--split-layer {}: the collection has {:?}",
        recipe.split_layer,
        collection.split_layers
    );
    fs::create_dir_all(&args.out).with_context(|| format!("creating {}", args.out.display()))?;
    Trainer::new(args, collection)?.run()
}

struct Trainer<'a> {
    args: &'a FitArgs,
    recipe: Recipe,
    plan: Plan,
    loss: Loss,
    drafter: Drafter,
    optimiser: AdamW,
    /// Steps that are done.
    step: usize,
    vocabulary: Vec<u32>,
    /// The collection's own account of itself, for the drafter's file.
    collection: Collection,
}

impl<'a> Trainer<'a> {
    fn new(args: &'a FitArgs, collection: Collection) -> anyhow::Result<Self> {
        let path = bundle_or_default(args.bundle.as_deref())?;
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
        let mut recipe = Recipe { model_id, ..args.recipe.clone() };
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
        let norm = FinalNorm {
            weight: weight(&device, "model.norm.weight", None)?,
            eps: device.config().rms_norm_eps,
        };
        let plan = Plan::new(&args.collection, &collection, &mut recipe, norm)?;
        let vocabulary = plan.frequent_tokens(recipe.vocabulary, device.config().vocab_size)?;
        let loss = Loss {
            head: weight(&device, head_name(&device), Some(&vocabulary))?,
            frequent: recipe.frequent,
            drawn: recipe.drawn,
            seed: recipe.seed,
        };
        let step = own.as_ref().map_or(0, |own| own.step);
        let (drafter, optimiser) = match own.or(origin) {
            Some(checkpoint) => checkpoint.restore(recipe.kind(), device.config())?,
            None => {
                let (layer, scale) = (recipe.split_layer, plan.shallow_scale()?);
                let bundles = [&device, &cloud];
                let drafter = Drafter::of_model(recipe.kind(), &bundles, layer, scale)?;
                start::start_outputs(&drafter, &plan)?;
                let optimiser = AdamW::new(&drafter.params)?;
                (drafter, optimiser)
            }
        };
        Ok(Self { args, recipe, plan, loss, drafter, optimiser, step, vocabulary, collection })
    }

    fn run(mut self) -> anyhow::Result<()> {
        let steps = self.plan.steps();
        note!(
            "{} drafter, {} numbers; {} positions in {} shards, {steps} steps{}",
            self.recipe.drafter,
            self.drafter.params.values().map(|value| value.elem_count()).sum::<usize>(),
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
            let examples = self.plan.batch(self.step)?;
            let (losses, loss) =
                self.loss.of(&self.drafter, &examples, self.recipe.unroll, self.step)?;
            let rate = f64::from(schedule.rate(self.step));
            let (params, decay) = (&self.drafter.params, f64::from(self.recipe.decay));
            self.optimiser.update(params, &loss.backward()?, rate, decay)?;
            self.step += 1;
            for example in &examples {
                seen += example.target.dim(0)?;
            }
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
        let training = TrainingFacts {
            positions: self.plan.positions(),
            sequences: self.plan.sequences(),
            sources: self.plan.sources(),
            steps: self.step,
            recipe: serde_json::to_value(&self.recipe)?,
            prompts: self.collection.prompts,
        };
        let Recipe { model_id, split_layer, .. } = &self.recipe;
        let of = (model_id.as_str(), *split_layer);
        adapter::write(&path, &self.drafter, of, &self.vocabulary, &training, self.args.f16)?;
        note!("{} is trained", path.display());
        Ok(())
    }

    fn write_checkpoint(&self) -> anyhow::Result<()> {
        let path = self.args.out.join(CHECKPOINT);
        checkpoint::write(&path, &self.drafter, &self.optimiser, self.step, &self.recipe)
    }
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
