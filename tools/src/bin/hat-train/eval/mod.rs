//! `eval`: how well a drafter drafts, and how many tokens a round trip that is worth.

mod curves;
mod play;
pub(crate) mod proposals;
mod table;
mod time;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::Args;
use hat_core::draft::DraftPolicy;
use hat_loader::{Bundle, DrafterFile};
use hat_program::outln;
use hat_tools::plot::{self, Captions};
use indicatif::ProgressBar;

use self::curves::Curves;
use self::play::Trial;
use self::proposals::{DEPTH_MAX, PROPOSALS_MAX, Proposer};
use self::table::Table;
use crate::shard::{self, Collection, Recording, Shard};
use crate::target::bundle_or_default;

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
    /// Use at most this many answers of each directory.
    #[arg(long)]
    answers: Option<usize>,
    /// Draw tokens a round against the node budget, of all answers together, as SVG.
    #[arg(long, value_name = "FILE", requires = "adapter")]
    plot: Option<PathBuf>,
    /// Drafts of the drafter for each node of a tree; the device's own number otherwise.
    #[arg(long, value_name = "N", default_value_t = DraftPolicy::DEFAULT.width)]
    width: usize,
    /// Nodes of a tree that are computed together; the device's own number otherwise.
    #[arg(long, value_name = "N", default_value_t = DraftPolicy::DEFAULT.level_nodes)]
    level: usize,
    /// Divide the drafter's logits by so much: below 1 it is surer of its first drafts.
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Write the table as JSON too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Prints a table for each directory.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    ensure!(args.every > 0, "--every: at least 1");
    ensure!((1..=PROPOSALS_MAX).contains(&args.width), "--width: 1 to {PROPOSALS_MAX}");
    ensure!(args.level > 0, "--level: at least 1");
    ensure!(args.temperature > 0.0, "--temperature: above 0");
    let shape = DraftPolicy { width: args.width, level_nodes: args.level, ..DraftPolicy::DEFAULT };
    let device = Bundle::open(&bundle_or_default(args.bundle.as_deref())?.join("device"))?;
    let vocab_size = device.config().vocab_size;
    let adapter =
        args.adapter.as_deref().map(|path| DrafterFile::read(path, &device)).transpose()?;
    if let (Some(adapter), Some(threads)) = (&adapter, args.time) {
        time::print(adapter, &device, threads)?;
    }
    let mut curves = args.plot.as_ref().map(|_| Curves::new(shape, vocab_size));
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
        let layer = adapter.as_ref().map_or(collection.split_layers[0], DrafterFile::split_layer);
        let recordings = answers(directory, &collection, layer, args)?;
        ensure!(!recordings.is_empty(), "{}: no answers to measure with", directory.display());
        let rows = recordings.iter().map(|recording| recording.tokens.len()).max().unwrap_or(0);
        let proposer = adapter.as_ref().map(|adapter| Proposer::new(adapter, &device, rows));
        let mut proposer = proposer.transpose()?;
        let bar = ProgressBar::new(recordings.len() as u64);
        let mut table = Table::new(&recordings, adapter.is_some(), shape, vocab_size);
        for recording in &recordings {
            let proposals = proposer.as_mut().map(|it| it.proposal(recording, args.temperature));
            let trial = Trial::new(recording, proposals.transpose()?);
            table.take(&trial)?;
            if let Some(curves) = &mut curves {
                curves.take(&trial)?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        outln!("## {} answers of {}\n\n{table}", recordings.len(), directory.display())?;
        tables.push(table.json(&directory.display().to_string()));
    }
    if let (Some(path), Some(curves)) = (&args.plot, &curves) {
        outln!("{curves}")?;
        let captions = Captions {
            title: "Tokens a round trip against the node budget".to_owned(),
            x: "nodes of a draft tree at most",
            y: "tokens a round trip",
            left: false,
        };
        plot::curves(path, &captions, &curves.curves())?;
    }
    if let Some(path) = &args.json {
        let file = args.adapter.as_ref().map(|path| path.display().to_string());
        let training = adapter.as_ref().map(|adapter| serde_json::from_str(adapter.training()));
        let training: Option<serde_json::Value> = training.transpose().context("training")?;
        let all = serde_json::json!({
            "adapter": file,
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
    layer: usize,
    args: &EvalArgs,
) -> anyhow::Result<Vec<Recording>> {
    let mut found = Vec::new();
    let mut jobs = HashSet::new();
    for path in shard::list(directory)? {
        let mut shard = Shard::open(&path, collection)?;
        let wanted = |facts: &shard::SequenceFacts| {
            !facts.sampled && (collection.evaluation || facts.is_held_out())
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
