//! Shards as batches: which sequences go into which optimiser step, and their rows.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use half::f16;
use hat_engine::sample::noise::philox;

use super::Recipe;
use crate::drafter::{Batch, Rows, Span, rms_norm};
use crate::shard::{self, Collection, Recording, SequenceFacts, Shard};

/// Shards whose sequences are mixed.
const POOL_SHARDS: usize = 8;
/// One job in so many is never trained on; a prime, so that each kind of prompt has its share.
const HELD_OUT_EVERY: u64 = 53;

/// True if a job is kept for `eval`.
pub(crate) const fn is_held_out(job: u64) -> bool {
    job % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
}

/// A sequence by shard and number in it.
type Place = (usize, usize);

/// Sequences of each step. Made from the shards' headers and the seed alone.
pub(super) struct Plan {
    paths: Vec<PathBuf>,
    collection: Collection,
    facts: Vec<Vec<SequenceFacts>>,
    batches: Vec<Vec<Place>>,
    split_layer: usize,
    prompt_tail: usize,
    epochs: u32,
    /// Shards in memory.
    loaded: RefCell<HashMap<usize, Vec<Recording>>>,
}

impl Plan {
    /// Lists the shards, at most `recipe.shards`; puts the real number there.
    pub(super) fn new(
        directory: &Path,
        collection: &Collection,
        recipe: &mut Recipe,
    ) -> anyhow::Result<Self> {
        let mut paths = shard::list(directory)?;
        paths.truncate(recipe.shards);
        ensure!(!paths.is_empty(), "{}: no shards in it", directory.display());
        recipe.shards = paths.len();
        let mut facts = Vec::with_capacity(paths.len());
        for path in &paths {
            facts.push(Shard::open(path, collection)?.facts);
        }
        let mut plan = Self {
            paths,
            collection: collection.clone(),
            facts,
            batches: Vec::new(),
            split_layer: recipe.split_layer,
            prompt_tail: recipe.prompt_tail,
            epochs: recipe.epochs,
            loaded: RefCell::new(HashMap::new()),
        };
        for epoch in 0..recipe.epochs {
            plan.deal(recipe.batch, recipe.seed, epoch);
        }
        Ok(plan)
    }

    /// One epoch: shards in random order, sequences in random order within some shards.
    fn deal(&mut self, batch: usize, seed: u64, epoch: u32) {
        let mut shards: Vec<usize> = (0..self.facts.len()).collect();
        shuffle(&mut shards, seed, [epoch, 0]);
        for (pool, shards) in (1..).zip(shards.chunks(POOL_SHARDS)) {
            let places = shards.iter().flat_map(|shard| {
                let trained = |(_, facts): &(usize, &SequenceFacts)| !is_held_out(facts.job);
                let places = self.facts[*shard].iter().enumerate().filter(trained);
                places.map(|(index, _)| (*shard, index))
            });
            let mut places: Vec<Place> = places.collect();
            shuffle(&mut places, seed, [epoch, pool]);
            let (mut current, mut queries) = (Vec::new(), 0);
            for place in places {
                current.push(place);
                queries += self.queries(place);
                if queries >= batch {
                    self.batches.push(std::mem::take(&mut current));
                    queries = 0;
                }
            }
            if queries > batch / 2 {
                self.batches.push(current);
            }
        }
    }

    /// Positions of a sequence that are drafted from.
    fn queries(&self, (shard, index): Place) -> usize {
        let facts = &self.facts[shard][index];
        facts.tokens - 1 - first_query(facts, self.prompt_tail)
    }

    pub(super) fn steps(&self) -> usize {
        self.batches.len()
    }

    /// Positions of one epoch that are drafted from.
    pub(super) fn positions(&self) -> usize {
        let all = self.batches.iter().flatten().map(|place| self.queries(*place)).sum::<usize>();
        all / self.epochs as usize
    }

    pub(super) fn sequences(&self) -> usize {
        self.batches.iter().map(Vec::len).sum::<usize>() / self.epochs as usize
    }

    /// Sequences of each source.
    pub(super) fn sources(&self) -> BTreeMap<String, usize> {
        let mut sources = BTreeMap::new();
        for (shard, index) in self.batches.iter().flatten() {
            *sources.entry(self.facts[*shard][*index].source.clone()).or_insert(0) += 1;
        }
        sources.values_mut().for_each(|count| *count /= self.epochs as usize);
        sources
    }

    /// The `count` most frequent tokens of the answers that are trained on, of `vocab_size`.
    /// Where these are equally frequent: those more frequent in prompts, then the lower ids,
    /// which byte pair encoding found first and so more often.
    pub(super) fn frequent_tokens(
        &self,
        count: usize,
        vocab_size: usize,
    ) -> anyhow::Result<Vec<u32>> {
        ensure!(count <= vocab_size, "--vocabulary {count}: the model has {vocab_size} tokens");
        let mut seen = vec![(0u64, 0u64); vocab_size]; // in answers, in prompts
        for (path, facts) in self.paths.iter().zip(&self.facts) {
            let tokens = Shard::open(path, &self.collection)?.tokens()?;
            let mut tokens = tokens.iter();
            for facts in facts {
                for (position, token) in tokens.by_ref().take(facts.tokens).enumerate() {
                    let seen = seen.get_mut(*token as usize);
                    let seen = seen.with_context(|| {
                        format!("{}: token {token} of {vocab_size}", path.display())
                    })?;
                    if is_held_out(facts.job) {
                        continue;
                    }
                    if position >= facts.prompt {
                        seen.0 += 1;
                    } else {
                        seen.1 += 1;
                    }
                }
            }
        }
        let mut order: Vec<u32> = (0..u32::try_from(vocab_size)?).collect();
        order.sort_by_key(|token| (std::cmp::Reverse(seen[*token as usize]), *token));
        order.truncate(count);
        Ok(order)
    }

    /// Root mean square of shallow rows.
    pub(super) fn shallow_scale(&self) -> anyhow::Result<f32> {
        let recordings =
            Shard::open(&self.paths[0], &self.collection)?.recordings(self.split_layer)?;
        let (mut sum, mut count) = (0.0, 0usize);
        // The first row of a text is far larger than the others in many models.
        for recording in &recordings {
            for row in recording.shallow[0].chunks_exact(self.collection.hidden_size).skip(8) {
                sum += row.iter().map(|v| f64::from(v.to_f32()).powi(2)).sum::<f64>().sqrt();
                count += 1;
            }
        }
        ensure!(count > 0, "{}: no rows", self.paths[0].display());
        Ok((sum / count as f64 / (self.collection.hidden_size as f64).sqrt()) as f32)
    }

    /// The rows of optimiser step `step`, and the deep rows that its queries should say.
    pub(super) fn batch(&self, step: usize, norm: &FinalNorm) -> anyhow::Result<(Batch, Rows)> {
        let places = &self.batches[step];
        self.load(places)?;
        let loaded = self.loaded.borrow();
        let recordings: Vec<&Recording> =
            places.iter().map(|(shard, index)| &loaded[shard][*index]).collect();
        Ok(batch_of(&recordings, self.collection.hidden_size, self.prompt_tail, norm))
    }

    /// Loads the shards of a batch, and forgets others when there are too many.
    fn load(&self, places: &[Place]) -> anyhow::Result<()> {
        let mut loaded = self.loaded.borrow_mut();
        for (shard, _) in places {
            if loaded.contains_key(shard) {
                continue;
            }
            if loaded.len() >= POOL_SHARDS {
                loaded.retain(|shard, _| places.iter().any(|(wanted, _)| wanted == shard));
            }
            let mut open = Shard::open(&self.paths[*shard], &self.collection)?;
            loaded.insert(*shard, open.recordings(self.split_layer)?);
        }
        Ok(())
    }
}

/// The first position that is drafted from: the deep row before it is there.
fn first_query(facts: &SequenceFacts, prompt_tail: usize) -> usize {
    facts.prompt.saturating_sub(prompt_tail).max(facts.deep_first + 1)
}

/// Sequences as a batch, and the deep rows that its queries should say, after the final norm.
pub(crate) fn batch_of(
    recordings: &[&Recording],
    hidden: usize,
    prompt_tail: usize,
    norm: &FinalNorm,
) -> (Batch, Rows) {
    let (mut shallow, mut before, mut target) = (Vec::new(), Vec::new(), Vec::new());
    let (mut spans, mut positions) = (Vec::new(), Vec::new());
    let (mut all, mut queries) = (0, 0);
    for recording in recordings {
        let facts = &recording.facts;
        let (rows, first) = (facts.tokens - 1, first_query(facts, prompt_tail));
        shallow.extend(recording.shallow[0].iter().map(|v| v.to_f32()));
        positions.extend(0..u32::try_from(rows).expect("a context fits u32"));
        let deep = |from: usize, to: usize| {
            &recording.deep[(from - facts.deep_first) * hidden..(to - facts.deep_first) * hidden]
        };
        before.extend_from_slice(deep(first - 1, rows - 1));
        target.extend_from_slice(deep(first, rows));
        spans.push(Span { all: all..all + rows, queries: queries..queries + rows - first });
        all += rows;
        queries += rows - first;
    }
    let shallow = Rows::from_shape_vec((all, hidden), shallow).expect("rows of one width");
    let batch = Batch { spans, shallow, positions, deep_before: norm.apply(&before, hidden) };
    (batch, norm.apply(&target, hidden))
}

/// The model's final norm.
pub(crate) struct FinalNorm {
    /// `[1, hidden]`
    pub(crate) weight: Rows,
    pub(crate) eps: f32,
}

impl FinalNorm {
    /// Deep rows after the norm.
    fn apply(&self, deep: &[f16], hidden: usize) -> Rows {
        let numbers = deep.iter().map(|v| v.to_f32()).collect();
        let rows = Rows::from_shape_vec((deep.len() / hidden, hidden), numbers);
        rms_norm(&rows.expect("whole rows"), Some(&self.weight), self.eps).0
    }
}

/// Fisher and Yates, seeded.
fn shuffle<T>(list: &mut [T], seed: u64, stream: [u32; 2]) {
    for last in (1..list.len()).rev() {
        let counter = [last as u32, stream[0], stream[1], 0xF1];
        let [word, ..] = philox(counter, [seed as u32, (seed >> 32) as u32]);
        list.swap(last, word as usize % (last + 1));
    }
}

/// `count` different numbers below `below`: one from each of as many equal parts.
pub(super) fn draw(
    below: usize,
    count: usize,
    seed: u64,
    batch: usize,
) -> impl Iterator<Item = usize> {
    (0..count).map(move |part| {
        let (start, end) = (below * part / count, below * (part + 1) / count);
        let counter = [part as u32, batch as u32, 0, 0xF2];
        let [word, ..] = philox(counter, [seed as u32, (seed >> 32) as u32]);
        start + word as usize % (end - start)
    })
}
