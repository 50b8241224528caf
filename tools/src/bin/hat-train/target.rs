//! The target model, run over many sequences in one step, with its rows held out at some layers.
//!
//! It is the engine's own device and middle submodel, one after the other in one process. Rows
//! are rounded to f16 where they would cross the link, before the first tapped layer and at the
//! end, so the rows that are kept are those that a device has.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use half::f16;
use half::slice::HalfFloatSliceExt as _;
use hat_compute::backend::cpu::CpuBackend;
use hat_compute::{DeviceModel, MiddleModel, open};
use hat_core::sequence::Sequence;
use hat_engine::options::{Processor, TokenId};
use hat_loader::{Bundle, ModelId, check_same_model};
use hat_plan::{DeviceForward as _, MiddleForward as _, MiddleStep, PAGE_SIZE};
use hat_program::pull;
use hat_text::Tokenizer;

/// Settings of a [`Target`].
pub(crate) struct TargetConfig<'a> {
    /// Directory with `device/` and `cloud/`.
    pub(crate) bundle: &'a Path,
    /// Layers before which rows are kept, ascending.
    pub(crate) taps: &'a [usize],
    /// Compute threads.
    pub(crate) threads: usize,
    /// Sequences at once.
    pub(crate) slots: usize,
    /// Positions of one sequence.
    pub(crate) context: usize,
    /// Rows of one step.
    pub(crate) rows: usize,
}

/// Some rows of one sequence that run in the next step.
pub(crate) struct Work {
    /// Number of the slot.
    pub(crate) slot: usize,
    /// Their tokens, in order.
    pub(crate) tokens: Vec<TokenId>,
}

/// Rows that one step computes.
#[derive(Default)]
pub(crate) struct StepRows {
    /// The rows before each tapped layer. `[taps][rows * hidden_size]`
    pub(crate) taps: Vec<Vec<f16>>,
    /// The rows after the last layer, before the final norm. `[rows * hidden_size]`
    pub(crate) deep: Vec<f16>,
}

/// The model.
pub(crate) struct Target {
    pub(crate) hidden_size: usize,
    pub(crate) vocab_size: usize,
    pub(crate) model_id: ModelId,
    pub(crate) tokenizer: Tokenizer,
    device: DeviceModel<CpuBackend>,
    /// Runs of layers between taps, and the layers that each begins and ends with.
    middles: Vec<(MiddleModel<CpuBackend>, usize, u32)>,
    taps: Vec<usize>,
    sequences: Vec<Sequence>,
    slot_pages: usize,
    context: u32,
    step: MiddleStep,
}

impl Target {
    /// Opens both halves of a bundle.
    pub(crate) fn open(config: &TargetConfig<'_>) -> anyhow::Result<Self> {
        let device = Bundle::open(&config.bundle.join("device"))?;
        let cloud = Bundle::open(&config.bundle.join("cloud"))?;
        check_same_model(&device, &cloud)?;
        let layers = device.config().num_hidden_layers;
        let split = device.manifest().split_layer;
        if device.manifest().tail_layers != 0 {
            bail!("{}: a bundle with tail layers is not supported", config.bundle.display());
        }
        let taps = config.taps.to_vec();
        let first = *taps.first().context("--split-layers: none given")?;
        if !taps.is_sorted_by(|a, b| a < b) || first < split || taps.iter().any(|t| *t >= layers) {
            bail!("--split-layers: ascending numbers from {split} to {} are needed", layers - 1);
        }
        let backend = || open::cpu(Processor::Auto, config.threads);
        let slot_pages = config.context.div_ceil(PAGE_SIZE);
        let pages = slot_pages * config.slots;
        let mut cuts = vec![split];
        cuts.extend(taps.iter().filter(|tap| **tap > split));
        cuts.push(layers);
        let mut middles = Vec::new();
        for run in cuts.windows(2) {
            let range = run[0]..run[1];
            let model = MiddleModel::load(backend()?, &cloud, range, config.rows, pages)?;
            middles.push((model, run[0], u32::try_from(run[1])?));
        }
        let tokenizer = Tokenizer::of_bundle(&device).context("the bundle")?;
        let context = u32::try_from(config.context)?;
        let mut target = Self {
            hidden_size: device.config().hidden_size,
            vocab_size: device.config().vocab_size,
            model_id: device.model_id(),
            tokenizer,
            device: DeviceModel::load(backend()?, &device, split, config.rows, pages)?
                .with_head_rows(config.slots)?,
            middles,
            taps,
            sequences: Vec::new(),
            slot_pages,
            context,
            step: MiddleStep::default(),
        };
        target.sequences = (0..config.slots).map(|slot| target.empty(slot)).collect();
        Ok(target)
    }

    fn empty(&self, slot: usize) -> Sequence {
        let first = slot * self.slot_pages;
        let pages = (first..first + self.slot_pages)
            .map(|page| u32::try_from(page).expect("a KV store has fewer than 2^32 pages"));
        Sequence::new(pages.collect(), self.context)
    }

    /// Forgets the rows of a slot.
    pub(crate) fn clear(&mut self, slot: usize) {
        self.sequences[slot] = self.empty(slot);
    }

    /// Runs `works`, each of another slot; the rows come in their order.
    pub(crate) fn run(&mut self, works: &[Work], out: &mut StepRows) -> anyhow::Result<()> {
        let Self { step, sequences, hidden_size, .. } = self;
        step.plan.clear();
        step.entry_layers.clear();
        let mut tokens = Vec::new();
        for work in works {
            let sequence = &mut sequences[work.slot];
            let count = u32::try_from(work.tokens.len())?;
            let place = sequence.append_committed(sequence.last_id() + 1, count, sequence.tip())?;
            step.plan.push_committed(place, count);
            step.plan.end_sequence(sequence.pages());
            tokens.extend_from_slice(&work.tokens);
        }
        step.hidden.clear();
        step.hidden.resize(tokens.len() * *hidden_size, 0.0);
        self.device.input(&step.plan.batch(), &tokens, &mut step.hidden);
        out.taps.resize_with(self.taps.len(), Vec::new);
        for (model, first, last) in &mut self.middles {
            if let Some(tap) = self.taps.iter().position(|tap| tap == first) {
                to_f16(&step.hidden, &mut out.taps[tap]);
                if tap == 0 {
                    out.taps[tap].as_slice().convert_to_f32_slice(&mut step.hidden);
                }
            }
            step.exit_layer = *last;
            step.entry_layers.clear();
            step.entry_layers.resize(works.len(), u32::try_from(*first)?);
            model.forward(step);
        }
        to_f16(&step.hidden, &mut out.deep);
        Ok(())
    }

    /// The logits that follow deep rows, of each slot one at most. `[rows, vocab_size]`
    pub(crate) fn logits(&mut self, deep: &[f16]) -> Vec<f32> {
        let mut rows = vec![0.0; deep.len()];
        deep.convert_to_f32_slice(&mut rows);
        let mut logits = vec![0.0; deep.len() / self.hidden_size * self.vocab_size];
        if !rows.is_empty() {
            self.device.head(&rows, &mut logits);
        }
        logits
    }
}

/// The name of the LM head's matrix.
pub(crate) fn head_name(device: &Bundle) -> &'static str {
    let tied = device.config().tie_word_embeddings;
    if tied { "model.embed_tokens.weight" } else { "lm_head.weight" }
}

/// The directory with `device/` and `cloud/`: the default model's if none is named.
pub(crate) fn bundle_or_default(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    match named {
        Some(bundle) => Ok(bundle.to_owned()),
        None => pull::default_bundle(&pull::cache_dir()?, pull::SPLIT_LAYER_DEFAULT, 0),
    }
}

fn to_f16(rows: &[f32], out: &mut Vec<f16>) {
    out.resize(rows.len(), f16::ZERO);
    out.as_mut_slice().convert_from_f32_slice(rows);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_of_several_rows_are_those_of_each() {
        let directory = tempfile::tempdir().unwrap();
        let bundle = hat_loader::tiny_bundle(directory.path()).unwrap();
        let (bundle, taps) = (bundle.as_path(), &[1][..]);
        let config = TargetConfig { bundle, taps, threads: 1, slots: 3, context: 8, rows: 8 };
        let mut target = Target::open(&config).unwrap();
        let hidden = target.hidden_size;
        let rows: Vec<f16> =
            (0..3 * hidden).map(|i| f16::from_f32((i * i % 13) as f32 - 6.0)).collect();
        let each = rows.chunks_exact(hidden).map(|row| target.logits(row));
        let each: Vec<Vec<f32>> = each.collect();
        assert_eq!(target.logits(&rows), each.concat());
        assert_ne!(each[0], each[1]);
        assert!(target.logits(&[]).is_empty());
    }
}
