//! `collect`: the target answers prompts, many at once, and its rows go into shards.

mod prompts;
mod slot;

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::ensure;
use clap::Args;
use hat_program::note;
use indicatif::{ProgressBar, ProgressStyle};

#[cfg(feature = "train")]
pub(crate) use self::prompts::shuffle;
use self::prompts::{Mode, Prompts};
use self::slot::{Limits, Slot, Template};
use crate::shard::{self, Collection, FORMAT_VERSION, Recording, Shard};
use crate::target::{StepRows, Target, TargetConfig, Work, bundle_or_default};

/// Flags of `hat-train collect`.
#[derive(Args)]
pub(crate) struct CollectArgs {
    /// Files of prompts: JSON lines with `question` (GSM8K) or `instruction` (self-instruct), or
    /// an array of dialogues (Taskmaster).
    prompts: Vec<PathBuf>,
    /// Folder for shards. Shards that are there already are kept and not gathered again.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Directory with device/ and cloud/; the default model's otherwise.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Layers whose input rows are recorded.
    #[arg(long, value_delimiter = ',', default_value = "2,4,8")]
    split_layers: Vec<usize>,
    /// Answer tokens after which to stop, those of earlier runs included.
    #[arg(long, default_value_t = 1_000_000)]
    positions: u64,
    /// Longest answer.
    #[arg(long, default_value_t = 192)]
    max_tokens: usize,
    /// Take prompts from the files alone, none written by the model.
    #[arg(long)]
    no_written: bool,
    /// The files are evaluation sets (`turns`, `category`): answer each prompt's first turn once,
    /// greedily, for `eval`.
    #[arg(long)]
    evaluation: bool,
    /// Most tokens of a prompt; longer ones are skipped.
    #[arg(long, default_value_t = 560)]
    prompt_max: usize,
    /// Tokens at the end of the prompt whose deep rows are recorded, too.
    #[arg(long, default_value_t = 128)]
    prompt_tail: usize,
    /// Number of sequences at once.
    #[arg(long, default_value_t = 48)]
    sequences: usize,
    /// Rows of one step.
    #[arg(long, default_value_t = 128)]
    rows: usize,
    /// Sequences in one shard.
    #[arg(long, default_value_t = 48)]
    shard_sequences: usize,
    /// Compute threads.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Seed of the order of prompts and of all sampling.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Gathers until there are enough positions.
pub(crate) fn run(args: &CollectArgs) -> anyhow::Result<()> {
    ensure!(args.sequences > 0 && args.rows >= args.sequences, "--rows: at least --sequences");
    ensure!(args.max_tokens > 1 && args.prompt_max > 1, "--max-tokens, --prompt-max: at least 2");
    ensure!(args.shard_sequences > 0, "--shard-sequences: at least 1");
    let mode = match args.evaluation {
        true => Mode::Evaluation,
        false => Mode::Training { written: !args.no_written },
    };
    let (prompts, files) = Prompts::read(&args.prompts, mode, args.seed)?;
    let bundle = bundle_or_default(args.bundle.as_deref())?;
    let target = Target::open(&TargetConfig {
        bundle: &bundle,
        taps: &args.split_layers,
        threads: args.threads,
        slots: args.sequences,
        context: args.prompt_max + args.max_tokens,
        rows: args.rows,
    })?;
    let collection = Collection {
        format_version: FORMAT_VERSION,
        model_id: target.model_id.to_string(),
        hidden_size: target.hidden_size,
        split_layers: args.split_layers.clone(),
        seed: args.seed,
        max_tokens: args.max_tokens,
        prompts: files,
        evaluation: args.evaluation,
    };
    collection.begin(&args.out)?;
    note!("{}", prompts.describe());
    Collector::new(args, target, prompts, collection)?.run()
}

struct Collector<'a> {
    args: &'a CollectArgs,
    target: Target,
    prompts: Prompts,
    collection: Collection,
    template: Template,
    limits: Limits,
    slots: Vec<Option<Slot>>,
    /// Jobs that are in shards.
    done: HashSet<u64>,
    next_job: u64,
    finished: Vec<Recording>,
    shards: usize,
    /// Answer tokens, those of earlier runs included.
    positions: u64,
    bar: ProgressBar,
    first_slot: usize,
}

impl<'a> Collector<'a> {
    fn new(
        args: &'a CollectArgs,
        target: Target,
        prompts: Prompts,
        collection: Collection,
    ) -> anyhow::Result<Self> {
        let (mut done, mut positions) = (HashSet::new(), 0);
        let paths = shard::list(&args.out)?;
        for path in &paths {
            for facts in Shard::open(path, &collection)?.facts {
                done.insert(facts.job);
                positions += (facts.tokens - facts.prompt) as u64;
            }
        }
        let style = "{bar:30} {human_pos} of {human_len} answer tokens, {msg}";
        let bar = ProgressBar::new(args.positions)
            .with_style(ProgressStyle::with_template(style).expect("a constant template"))
            .with_position(positions);
        Ok(Self {
            template: Template::new(&target.tokenizer)?,
            limits: Limits {
                prompt_max: args.prompt_max,
                tokens_max: args.max_tokens,
                cut_loops: !args.evaluation,
            },
            slots: (0..args.sequences).map(|_| None).collect(),
            next_job: 0,
            finished: Vec::new(),
            shards: paths.len(),
            first_slot: 0,
            args,
            target,
            prompts,
            collection,
            done,
            positions,
            bar,
        })
    }

    fn run(mut self) -> anyhow::Result<()> {
        let mut out = StepRows::default();
        let (start, mut rows, mut answers) = (Instant::now(), 0, 0);
        let mut said = Instant::now();
        while self.positions < self.args.positions {
            let works = self.plan()?;
            if works.is_empty() {
                break; // an evaluation set is at its end
            }
            self.target.run(&works, &mut out)?;
            rows += works.iter().map(|work| work.tokens.len()).sum::<usize>();
            let before = self.positions;
            self.take(&works, &out)?;
            answers += self.positions - before;
            if self.finished.len() >= self.args.shard_sequences {
                self.write()?;
            }
            let seconds = start.elapsed().as_secs_f64();
            let rates = format!(
                "{:.0} rows/s, {:.0} answer tokens/s, {} shards",
                rows as f64 / seconds,
                answers as f64 / seconds,
                self.shards
            );
            self.bar.set_position(self.positions);
            self.bar.set_message(rates.clone());
            if self.bar.is_hidden() && said.elapsed().as_secs() >= 30 {
                note!("{} of {} answer tokens, {rates}", self.positions, self.args.positions);
                said = Instant::now();
            }
        }
        if !self.finished.is_empty() {
            self.write()?;
        }
        self.bar.finish();
        note!("{} answer tokens in {} shards", self.positions, self.shards);
        Ok(())
    }

    /// Fills free slots, and deals out the rows of a step: first a row to each that is answering,
    /// then prompts, beginning with another slot each time.
    fn plan(&mut self) -> anyhow::Result<Vec<Work>> {
        for index in 0..self.slots.len() {
            while self.slots[index].is_none() {
                while self.done.contains(&self.next_job) {
                    self.next_job += 1;
                }
                let Some(job) = self.prompts.job(self.next_job) else { break };
                self.next_job += 1;
                self.target.clear(index);
                self.slots[index] = Slot::begin(job, &self.target, &self.template, &self.limits)?;
            }
        }
        let count = self.slots.len();
        let mut left = self.args.rows;
        let mut works = Vec::new();
        let waiting = |slot: &Option<Slot>| slot.as_ref().map_or(0, Slot::waiting);
        for slot in (0..count).filter(|slot| waiting(&self.slots[*slot]) == 1) {
            works.push(Work { slot, tokens: self.slots[slot].as_ref().expect("filled").next(1) });
            left -= 1;
        }
        self.first_slot = (self.first_slot + 1) % count;
        for slot in (self.first_slot..count).chain(0..self.first_slot) {
            let rows = waiting(&self.slots[slot]);
            if rows > 1 && left > 0 {
                let tokens = self.slots[slot].as_ref().expect("filled").next(rows.min(left));
                left -= tokens.len();
                works.push(Work { slot, tokens });
            }
        }
        Ok(works)
    }

    /// Gives each slot its rows, and those that have run all they had their next token.
    fn take(&mut self, works: &[Work], out: &StepRows) -> anyhow::Result<()> {
        let hidden = self.target.hidden_size;
        let (mut row, mut last_rows, mut choosing) = (0, Vec::new(), Vec::new());
        for work in works {
            let rows = row * hidden..(row + work.tokens.len()) * hidden;
            let slot = self.slots[work.slot].as_mut().expect("only filled slots work");
            slot.take_rows(work.tokens.len(), rows.clone(), out);
            if slot.waiting() == 0 {
                last_rows.extend_from_slice(&out.deep[rows.end - hidden..rows.end]);
                choosing.push(work.slot);
            }
            row += work.tokens.len();
        }
        let vocab = self.target.vocab_size;
        let logits = self.target.logits(&last_rows);
        for (index, logits) in choosing.into_iter().zip(logits.chunks_exact(vocab)) {
            let slot = self.slots[index].as_mut().expect("only filled slots work");
            let is_over = slot.choose(logits, &self.target.tokenizer, &self.template)?;
            if is_over {
                let slot = self.slots[index].take().expect("it was there");
                if let Some(recording) = slot.finish(hidden, self.args.prompt_tail) {
                    self.positions += (recording.facts.tokens - recording.facts.prompt) as u64;
                    self.finished.push(recording);
                }
            }
        }
        Ok(())
    }

    fn write(&mut self) -> anyhow::Result<()> {
        let path = self.args.out.join(format!("shard-{:05}.safetensors", self.shards));
        ensure!(!path.exists(), "{} is there already", path.display());
        shard::write(&path, &self.collection, &self.finished)?;
        self.finished.clear();
        self.shards += 1;
        Ok(())
    }
}
