//! `eval`: how well a drafter guesses, and how many tokens a round trip that is worth.

mod plot;
mod simulate;
mod table;
mod time;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::Args;
use hat_engine::draft::DraftPolicy;
use hat_engine::outln;
use hat_engine::pull;
use hat_loader::Bundle;
use indicatif::ProgressBar;

use self::plot::Curves;
use self::simulate::{Growth, Guess, Guesses, Trial};
use self::table::Table;
use crate::adapter::Adapter;
use crate::drafter::{Dims, Rows, Unroll, WeightReader, linear};
use crate::fit::{FinalNorm, batch_of, head_name, is_held_out};
use crate::shard::{self, Collection, Recording, Shard};

/// Flags of `hat-train eval`.
#[derive(Args)]
pub(crate) struct EvalArgs {
    /// The drafter: what `fit` wrote. Without one, prompt lookup alone is measured.
    #[arg(long, value_name = "FILE")]
    adapter: Option<PathBuf>,
    /// Time a draft step of the engine, with so many threads.
    #[arg(long, value_name = "THREADS", requires = "adapter")]
    time: Option<usize>,
    /// Directories that `collect` wrote. Of one to learn from, the answers that `fit` leaves out
    /// are used, greedy ones alone; of an evaluation set, all.
    #[arg(required_unless_present = "time")]
    recordings: Vec<PathBuf>,
    /// Directory with device/ and cloud/; the default model's otherwise.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Use every Nth answer of each directory alone.
    #[arg(long, value_name = "N", default_value_t = 1)]
    every: usize,
    /// Use at most so many answers of each directory.
    #[arg(long)]
    answers: Option<usize>,
    /// Draw tokens a round against the node budget, of all answers together, as SVG.
    #[arg(long, value_name = "FILE", requires = "adapter")]
    plot: Option<PathBuf>,
    /// Guesses of the drafter for each node of a tree; the device's own number otherwise.
    #[arg(long, value_name = "N", default_value_t = DraftPolicy::DEFAULT.width)]
    width: usize,
    /// Nodes of a tree that are computed together; the device's own number otherwise.
    #[arg(long, value_name = "N", default_value_t = DraftPolicy::DEFAULT.level_nodes)]
    level: usize,
    /// Divide the drafter's logits by so much: below 1 it is surer of its first guesses.
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Write the table as JSON too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Draft steps that are computed.
const DEPTH_MAX: usize = 8;
/// Guesses that are kept of each draft step.
const GUESSES_MAX: usize = 16;

/// Prints a table for each directory.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    ensure!(args.every > 0, "--every: at least 1");
    ensure!((1..=GUESSES_MAX).contains(&args.width), "--width: 1 to {GUESSES_MAX}");
    ensure!(args.level > 0, "--level: at least 1");
    ensure!(args.temperature > 0.0, "--temperature: above 0");
    let tree = Growth::Tree { width: args.width, level: args.level };
    let path = match &args.bundle {
        Some(bundle) => bundle.clone(),
        None => pull::default_bundle(&pull::cache_dir()?, pull::SPLIT_LAYER_DEFAULT, 0)?,
    };
    let device = Bundle::open(&path.join("device"))?;
    let drafter = args.adapter.as_deref().map(|adapter| Drafter::open(adapter, &device));
    let drafter = drafter.transpose()?;
    if let (Some(path), Some(threads)) = (&args.adapter, args.time) {
        time::print(path, &device, threads)?;
    }
    let mut curves = args.plot.as_ref().map(|_| Curves::new(tree));
    let mut tables = Vec::new();
    for directory in &args.recordings {
        let collection = Collection::read(directory)?;
        ensure!(
            collection.model_id == device.model_id().to_string(),
            "{}: of model {}, not {}",
            directory.display(),
            collection.model_id,
            device.model_id()
        );
        let recordings = answers(directory, &collection, drafter.as_ref(), args)?;
        ensure!(!recordings.is_empty(), "{}: no answers to measure with", directory.display());
        let bar = ProgressBar::new(recordings.len() as u64);
        let mut table = Table::new(&recordings, drafter.is_some(), tree);
        for recording in &recordings {
            let guesses =
                drafter.as_ref().map(|drafter| drafter.guesses(recording, args.temperature));
            let trial = Trial::new(recording, guesses);
            table.take(&trial);
            if let Some(curves) = &mut curves {
                curves.take(&trial);
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        outln!("## {} answers of {}\n\n{table}", recordings.len(), directory.display())?;
        tables.push(table.json(&directory.display().to_string()));
    }
    if let (Some(path), Some(curves)) = (&args.plot, &curves) {
        outln!("{curves}")?;
        curves.draw(path)?;
    }
    if let Some(path) = &args.json {
        let adapter = args.adapter.as_ref().map(|path| path.display().to_string());
        let training = drafter.as_ref().map(|drafter| drafter.adapter.training.clone());
        let all = serde_json::json!({
            "adapter": adapter,
            "training": training,
            "depth_max": DEPTH_MAX,
            "tables": tables,
            "budgets": curves.as_ref().map(Curves::json),
        });
        fs::write(path, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The recordings of a directory that are for measuring.
fn answers(
    directory: &Path,
    collection: &Collection,
    drafter: Option<&Drafter>,
    args: &EvalArgs,
) -> anyhow::Result<Vec<Recording>> {
    let layer = drafter.map_or(collection.split_layers[0], |drafter| drafter.adapter.split_layer);
    let mut found = Vec::new();
    let mut jobs = HashSet::new();
    for path in shard::list(directory)? {
        let mut shard = Shard::open(&path, collection)?;
        let wanted = |facts: &shard::SequenceFacts| {
            !facts.sampled && (collection.evaluation || is_held_out(facts.job))
        };
        if !shard.facts.iter().any(wanted) {
            continue;
        }
        for recording in shard.recordings(layer)? {
            let facts = &recording.facts;
            if wanted(facts) && facts.tokens > facts.prompt + 1 && jobs.insert(facts.job) {
                found.push(recording);
            }
        }
    }
    found.sort_by_key(|recording| recording.facts.job);
    let found = found.into_iter().step_by(args.every);
    Ok(found.take(args.answers.unwrap_or(usize::MAX)).collect())
}

/// A drafter and the parts of the model that it guesses with.
struct Drafter {
    adapter: Adapter,
    dims: Dims,
    norm: FinalNorm,
    head: Rows,
}

impl Drafter {
    fn open(path: &Path, device: &Bundle) -> anyhow::Result<Self> {
        let dims = Dims::new(device.config());
        let adapter = Adapter::read(path, &dims, device)?;
        let mut reader = WeightReader::new()?;
        let weight = reader.read(device, "model.norm.weight", None)?;
        Ok(Self {
            norm: FinalNorm { weight, eps: dims.eps },
            head: reader.read(device, head_name(device), Some(&adapter.vocabulary))?,
            adapter,
            dims,
        })
    }

    /// What the drafter guesses at each position and depth, on the way of the answer.
    fn guesses(&self, recording: &Recording, temperature: f32) -> Guesses {
        let (batch, _) = batch_of(&[recording], self.dims.hidden, 0, &self.norm);
        let unroll = Unroll::forward(&self.adapter.params, &self.dims, &batch, DEPTH_MAX);
        let mut steps = Vec::with_capacity(unroll.len());
        for step in 1..=unroll.len() {
            let logits = linear(unroll.y(step), &self.head) / temperature;
            steps.push(logits.rows().into_iter().map(|row| self.best(row)).collect());
        }
        Guesses { steps }
    }

    /// The most likely tokens, best first.
    fn best(&self, logits: ndarray::ArrayView1<'_, f32>) -> Vec<Guess> {
        let top = logits.fold(f32::NEG_INFINITY, |top, logit| top.max(*logit));
        let sum: f32 = logits.iter().map(|logit| (logit - top).exp()).sum();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        let by_logit = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        let most = GUESSES_MAX.min(order.len());
        order.select_nth_unstable_by(most - 1, by_logit);
        order.truncate(most);
        order.sort_unstable_by(by_logit);
        let guess = |index: usize| Guess {
            token: self.adapter.vocabulary[index],
            probability: (logits[index] - top).exp() / sum,
        };
        order.into_iter().map(guess).collect()
    }
}
