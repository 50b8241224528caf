//! Small generated models, for what a ledger can't see: numbers, tails, the loss of codecs. The
//! whole model is the yardstick.

use std::path::{Path, PathBuf};

use hat_compute::open::{self, ComputeConfig, GpuWeights, Processor};
use hat_compute::{LoadError, WholeModel};
use hat_engine::reference_run::through_codec;
use hat_loader::{Bundle, BundleOptions, TinyModel, Weights, generated, write_bundles};
use hat_plan::{DeviceForward, MiddleForward, TokenId};
use tempfile::TempDir;

use super::ledger::LAYERS;
use super::setting::{Asked, DeviceSetting};

/// Pages of each KV store, and rows of a step at most: as many as any seed has.
const PAGES: usize = 64;
const ROWS: usize = 512;
/// Layers before the cloud's.
pub const SPLIT: usize = 1;

/// The two halves of a model, without tail layers and with one.
pub struct Real {
    halves: [(Bundle, Bundle); 2],
    _directory: TempDir,
}

impl Real {
    /// Writes the models into a directory of their own.
    pub fn new() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let model = generated(&TinyModel::default());
        let halves = |tail_layers| -> anyhow::Result<(Bundle, Bundle)> {
            let out: PathBuf = directory.path().join(format!("tail-{tail_layers}"));
            let options = BundleOptions { split_layer: SPLIT, tail_layers, weights: Weights::Keep };
            write_bundles(&model, options, &out, &mut |_| {})?;
            let open = |half: &str| Bundle::open(Path::new(&out.join(half)));
            Ok((open("device")?, open("cloud")?))
        };
        Ok(Self { halves: [halves(0)?, halves(1)?], _directory: directory })
    }

    fn place() -> ComputeConfig {
        let (processor, weights) = (Processor::Auto, GpuWeights::InPlace);
        ComputeConfig { processor, weights, threads: 1, nice: 0 }
    }

    /// The layers of a device.
    pub fn device(&self, has_tail: bool) -> Result<Box<dyn DeviceForward>, LoadError> {
        let (device, _) = &self.halves[usize::from(has_tail)];
        open::device(&Self::place(), device, SPLIT, ROWS, PAGES)
    }

    /// The stages of a cloud.
    pub fn cloud(
        &self,
        stages: &[std::ops::Range<usize>],
    ) -> Result<Vec<Box<dyn MiddleForward>>, LoadError> {
        open::middle(&Self::place(), &[], &self.halves[0].1, stages, ROWS, PAGES, 4)
    }

    /// The answer of the whole model, if rows go through the device's codec where they cross.
    pub fn answer(&self, asked: &Asked, device: &DeviceSetting) -> anyhow::Result<Vec<TokenId>> {
        let (half, cloud) = &self.halves[usize::from(device.has_tail)];
        let exit = LAYERS - usize::from(device.has_tail);
        let context = asked.prompt.len() + asked.tokens as usize;
        let backend = open::cpu(Processor::Auto, 1)?;
        let cross = through_codec(device.codec);
        let mut whole = WholeModel::load(backend, half, cloud, SPLIT..exit, cross, context)?;
        let mut logits = vec![0.0_f32; half.config().vocab_size];
        let (last, before) = asked.prompt.split_last().expect("a prompt has tokens");
        before.iter().try_for_each(|token| whole.step(*token, None))?;
        let (mut token, mut said) = (*last, Vec::new());
        while said.len() < asked.tokens as usize {
            whole.step(token, Some(&mut logits))?;
            let above = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
            token = TokenId::try_from((0..logits.len()).fold(0, above))?;
            said.push(token);
        }
        Ok(said)
    }
}
