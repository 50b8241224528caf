//! Shards as batches: which sequences go into which optimiser step, and their rows.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use candle_core::{Device, Result, Tensor};
use half::f16;
use hat_core::sample::noise::philox;

use super::Recipe;
use super::drafter::{Example, rms_norm};
use crate::collect::shuffle;
use crate::shard::{self, Collection, Recording, SequenceFacts, Shard};

/// Shards whose sequences are mixed.
const POOL_SHARDS: usize = 8;

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
    norm: FinalNorm,
    /// Shards in memory.
    loaded: RefCell<HashMap<usize, Vec<Recording>>>,
}

impl Plan {
    /// Lists the shards, at most `recipe.shards`; puts the real number there.
    pub(super) fn new(
        directory: &Path,
        collection: &Collection,
        recipe: &mut Recipe,
        norm: FinalNorm,
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
            norm,
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
        shuffle(&mut shards, |last| word([last as u32, epoch, 0, 0xF1], seed));
        for (pool, shards) in (1..).zip(shards.chunks(POOL_SHARDS)) {
            let places = shards.iter().flat_map(|shard| {
                let trained = |(_, facts): &(usize, &SequenceFacts)| !facts.is_held_out();
                let places = self.facts[*shard].iter().enumerate().filter(trained);
                places.map(|(index, _)| (*shard, index))
            });
            let mut places: Vec<Place> = places.collect();
            shuffle(&mut places, |last| word([last as u32, epoch, pool, 0xF1], seed));
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
    /// Of equally frequent ones those come first that are more frequent in prompts, then the lower
    /// ids, which byte pair encoding found first and so more often.
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
                    if facts.is_held_out() {
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

    /// The sequences of optimiser step `step`.
    pub(super) fn batch(&self, step: usize) -> anyhow::Result<Vec<Example>> {
        let places = &self.batches[step];
        self.load(places)?;
        let loaded = self.loaded.borrow();
        let examples = places
            .iter()
            .map(|(shard, index)| self.norm.example(&loaded[shard][*index], self.prompt_tail));
        Ok(examples.collect::<Result<_>>()?)
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

/// The model's final norm.
pub(super) struct FinalNorm {
    /// `[hidden_size]`
    pub(super) weight: Tensor,
    pub(super) eps: f32,
}

impl FinalNorm {
    /// A recording as the drafter learns from it.
    pub(super) fn example(&self, recording: &Recording, prompt_tail: usize) -> Result<Example> {
        let (facts, hidden) = (&recording.facts, self.weight.elem_count());
        let (rows, first) = (facts.tokens - 1, first_query(facts, prompt_tail));
        let numbers = |rows: &[f16]| {
            Tensor::from_iter(rows.iter().map(|v| v.to_f32()), &Device::Cpu)?.reshape(((), hidden))
        };
        let deep = |from: usize, to: usize| {
            let range = (from - facts.deep_first) * hidden..(to - facts.deep_first) * hidden;
            rms_norm(&numbers(&recording.deep[range])?, Some(&self.weight), self.eps)
        };
        Ok(Example {
            shallow: numbers(&recording.shallow[0])?,
            deep_before: deep(first - 1, rows - 1)?,
            target: deep(first, rows)?,
        })
    }
}

/// A word of chance.
fn word(counter: [u32; 4], seed: u64) -> u32 {
    philox(counter, [seed as u32, (seed >> 32) as u32])[0]
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
        start + word([part as u32, batch as u32, 0, 0xF2], seed) as usize % (end - start)
    })
}
