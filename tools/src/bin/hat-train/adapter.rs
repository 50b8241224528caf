//! The file of a trained drafter, `adapter.safetensors`: written here, read by the loader.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use clap::ValueEnum as _;
use half::f16;
use hat_loader::bundle::ADAPTER_FORMAT_VERSION;
use hat_loader::layout::{dequantise_row, quantise_q8_0};
use hat_loader::{Bundle, DType};
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::drafter::{Dims, Kind, NamedTensor, PARAMETERS, Params, Rows, write_tensors};

/// A drafter and what it is for.
pub(crate) struct Adapter {
    pub(crate) params: Params,
    pub(crate) model_id: String,
    pub(crate) split_layer: usize,
    /// Tokens that it may guess, most frequent first.
    pub(crate) vocabulary: Vec<u32>,
    pub(crate) training: TrainingFacts,
}

/// What the card of a drafter says of its training.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TrainingFacts {
    pub(crate) positions: usize,
    pub(crate) sequences: usize,
    pub(crate) sources: BTreeMap<String, usize>,
    pub(crate) steps: usize,
    pub(crate) recipe: serde_json::Value,
    /// Name and BLAKE3 of each prompt file.
    pub(crate) prompts: Vec<(String, String)>,
}

impl Adapter {
    /// Reads a file that is for the model of `device`.
    pub(crate) fn read(path: &Path, dims: &Dims, device: &Bundle) -> anyhow::Result<Self> {
        let file = hat_loader::Adapter::read(path, device)?;
        let kind = Kind::from_str(file.kind().name(), false).map_err(anyhow::Error::msg)?;
        let mut params = Params::zeros(kind, dims);
        for (parameter, name) in PARAMETERS.iter().enumerate() {
            if Params::has(kind, parameter) {
                let tensor = file.rows(name).map_err(anyhow::Error::msg)?;
                let (n, k) = dims.shape(parameter);
                let mut numbers = vec![0.0; n * k];
                let row_bytes = tensor.dtype.row_bytes(k).context("checked by the loader")?;
                let rows = tensor.bytes.chunks_exact(row_bytes);
                for (row, out) in rows.zip(numbers.chunks_exact_mut(k)) {
                    dequantise_row(tensor.dtype, k, row, out);
                }
                params.values[parameter] = Rows::from_shape_vec((n, k), numbers)?;
            }
        }
        Ok(Self {
            params,
            model_id: device.model_id().to_string(),
            split_layer: file.split_layer(),
            vocabulary: file.vocabulary().to_vec(),
            training: serde_json::from_str(file.training())
                .with_context(|| format!("{}: training", path.display()))?,
        })
    }

    /// Writes the file, matrices as q8_0, or as f16.
    pub(crate) fn write(&self, path: &Path, half: bool) -> anyhow::Result<()> {
        let mut tensors = Vec::new();
        for (name, values) in PARAMETERS.iter().zip(&self.params.values) {
            ensure!(
                values.iter().all(|v| v.is_finite()),
                "{name} holds a number that is not finite"
            );
            let (name, (n, k)) = ((*name).to_owned(), values.dim());
            let numbers = values.as_slice().expect("standard layout");
            match n {
                0 => {}
                1 => tensors.push(NamedTensor {
                    name,
                    shape: vec![k],
                    dtype: Dtype::F32,
                    bytes: bytemuck::cast_slice(numbers).to_vec(),
                }),
                _ if half => {
                    let bytes = numbers.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes());
                    let bytes = bytes.collect();
                    tensors.push(NamedTensor { name, shape: vec![n, k], dtype: Dtype::F16, bytes });
                }
                _ => {
                    let row = DType::Q8_0.row_bytes(k);
                    let row = row.with_context(|| format!("{name}: rows of {k} numbers"))?;
                    let mut bytes = vec![0; n * row];
                    for (from, to) in numbers.chunks_exact(k).zip(bytes.chunks_exact_mut(row)) {
                        quantise_q8_0(from, to);
                    }
                    tensors.push(NamedTensor {
                        name,
                        shape: vec![n, row],
                        dtype: Dtype::U8,
                        bytes,
                    });
                }
            }
        }
        tensors.push(NamedTensor {
            name: "vocabulary".to_owned(),
            shape: vec![self.vocabulary.len()],
            dtype: Dtype::U32,
            bytes: bytemuck::cast_slice(&self.vocabulary).to_vec(),
        });
        let texts = [
            ("format_version", ADAPTER_FORMAT_VERSION.to_string()),
            ("kind", self.params.kind.name().to_owned()),
            ("model_id", self.model_id.clone()),
            ("split_layer", self.split_layer.to_string()),
            ("training", serde_json::to_string(&self.training)?),
        ];
        let texts = texts.map(|(name, text)| (name.to_owned(), text));
        write_tensors(path, &tensors, texts.into())
    }
}

#[cfg(test)]
mod tests {
    use hat_compute::DraftModel;
    use hat_compute::backend::cpu::CpuBackend;
    use hat_compute::open;
    use hat_engine::internal::{Sequence, tiny_bundle};
    use hat_engine::options::Processor;
    use hat_engine::sample::noise::philox;
    use hat_plan::{DraftForward as _, PlanBuffers};

    use super::*;
    use crate::drafter::{Batch, Span, Unroll, WeightReader, linear, rms_norm};

    /// Numbers that look random, of about the size that weights have.
    fn noise(rows: usize, columns: usize, stream: u32, size: f32) -> Rows {
        Rows::from_shape_fn((rows, columns), |(row, column)| {
            let at = [u32::try_from(row).unwrap(), u32::try_from(column).unwrap(), stream, 9];
            size * (philox(at, [3, 4])[0] as f32 / 2_147_483_648.0 - 1.0)
        })
    }

    /// The rows of `[first, last]` of a matrix as a slice.
    fn rows(of: &Rows, first: usize, last: usize) -> &[f32] {
        &of.as_slice().unwrap()[first * of.ncols()..(last + 1) * of.ncols()]
    }

    fn close(got: &[f32], wanted: &[f32], share: f32, what: &str) {
        let size = (wanted.iter().map(|v| v * v).sum::<f32>() / wanted.len() as f32).sqrt();
        let off = got.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off <= share * size, "{what}: off by {off} where numbers are about {size}");
    }

    /// A device bundle with a random drafter of `kind`, and the drafter as `eval` reads it.
    fn bundle(directory: &Path, kind: Kind, half: bool) -> (Bundle, Adapter) {
        let device = Bundle::open(&tiny_bundle(directory).unwrap().join("device")).unwrap();
        let dims = Dims::new(device.config());
        let mut params = Params::zeros(kind, &dims);
        for (stream, values) in (0..).zip(&mut params.values) {
            let (n, k) = values.dim();
            *values = noise(n, k, stream, if n == 1 { 1.0 } else { 2.0 / (k as f32).sqrt() });
        }
        let training = TrainingFacts {
            positions: 0,
            sequences: 0,
            sources: BTreeMap::new(),
            steps: 0,
            recipe: serde_json::Value::Null,
            prompts: vec![],
        };
        let (model_id, vocabulary) = (device.model_id().to_string(), vec![9, 2, 30, 4, 17]);
        let path = directory.join("adapter.safetensors");
        let written = Adapter { params, model_id, split_layer: 1, vocabulary, training };
        written.write(&path, half).unwrap();
        hat_loader::add_adapter(device.directory(), &path).unwrap();
        let adapter = Adapter::read(&path, &dims, &device).unwrap();
        (Bundle::open(device.directory()).unwrap(), adapter)
    }

    /// A session of the engine's drafter.
    struct Session {
        drafter: DraftModel<CpuBackend>,
        sequence: Sequence,
        plan: PlanBuffers,
    }

    impl Session {
        fn decided(&mut self, count: u32, shallow: &[f32], deep: &[f32], drafts: bool) -> Vec<f32> {
            let Self { drafter, sequence, plan } = self;
            let id = sequence.last_id() + 1;
            let place = sequence.append_committed(id, count, sequence.tip()).unwrap();
            plan.clear();
            plan.push_committed(place, count);
            plan.end_sequence(sequence.pages());
            let mut y = vec![0.0; shallow.len()];
            if drafts {
                drafter.decide(&plan.plan(), shallow, deep, &mut y);
            } else {
                drafter.remember(&plan.plan(), shallow, deep);
            }
            y
        }

        fn guess(&mut self, parent: u32, shallow: &[f32], y_before: &[f32]) -> (u32, Vec<f32>) {
            let Self { drafter, sequence, plan } = self;
            let id = sequence.last_id() + 1;
            sequence.append_pending(id, &[parent]).unwrap();
            plan.clear();
            assert!(sequence.push_row(id, plan));
            plan.end_sequence(sequence.pages());
            let mut y = vec![0.0; shallow.len()];
            drafter.guess(&plan.plan(), shallow, y_before, &mut y);
            (id, y)
        }
    }

    /// The engine's drafter against the one that is trained, over a decided path and a tree.
    fn same_forward(kind: Kind, half: bool, share: f32) {
        let directory = tempfile::tempdir().unwrap();
        let (device, adapter) = bundle(directory.path(), kind, half);
        let dims = Dims::new(device.config());
        // Nine tokens, of which four are the prompt; deep rows are there from the last of those.
        let (shallow, deep) = (noise(9, dims.hidden, 50, 3.0), noise(9, dims.hidden, 51, 40.0));
        let mut reader = WeightReader::new().unwrap();
        let weight = reader.read(&device, "model.norm.weight", None).unwrap();
        let (normed, _) = rms_norm(&deep, Some(&weight), dims.eps);
        let batch = Batch {
            spans: vec![Span { all: 0..9, queries: 0..5 }],
            shallow: shallow.clone(),
            positions: (0..9).collect(),
            deep_before: normed.slice(ndarray::s![3..8, ..]).to_owned(),
        };
        let unroll = Unroll::forward(&adapter.params, &dims, &batch, 3);

        let backend = open::cpu(Processor::Auto, 1).unwrap();
        let drafter = DraftModel::load(backend, &device, 16, 4).unwrap().unwrap();
        assert_eq!(drafter.split_layer(), 1);
        let sequence = Sequence::new(vec![2, 1], 60);
        let mut session = Session { drafter, sequence, plan: PlanBuffers::default() };
        let none = Rows::zeros((4, dims.hidden));
        session.decided(4, rows(&shallow, 0, 3), rows(&none, 0, 3), false);
        let y = session.decided(2, rows(&shallow, 4, 5), rows(&deep, 3, 4), true);
        close(&y, rows(unroll.y(1), 0, 1), share, "decided rows");

        // Below position 5: a wrong guess, the right one, and the right one below that.
        let (tip, root) = (session.sequence.tip(), &y[dims.hidden..]);
        session.guess(tip, rows(&deep, 0, 0), root);
        let (child, y2) = session.guess(tip, rows(&shallow, 6, 6), root);
        close(&y2, rows(unroll.y(2), 2, 2), share, "a child");
        let (_, y3) = session.guess(child, rows(&shallow, 7, 7), &y2);
        close(&y3, rows(unroll.y(3), 3, 3), share, "a grandchild");
        let name = crate::fit::head_name(&device);
        let head = reader.read(&device, name, Some(&adapter.vocabulary)).unwrap();
        check_likeliest(&mut session.drafter, &adapter.vocabulary, &head, y3);
    }

    /// What the drafter takes for likely, against the same rows of the head in f32.
    fn check_likeliest(
        drafter: &mut DraftModel<CpuBackend>,
        vocabulary: &[u32],
        head: &Rows,
        y: Vec<f32>,
    ) {
        let mut likely = Vec::new();
        drafter.likeliest(&y, 3, &mut likely);
        let logits = linear(&Rows::from_shape_vec((1, y.len()), y).unwrap(), head);
        let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
        let probabilities = logits.iter().map(|logit| logit.exp() / sum);
        let mut wanted: Vec<(u32, f32)> = vocabulary.iter().copied().zip(probabilities).collect();
        wanted.sort_by(|a, b| b.1.total_cmp(&a.1));
        assert_eq!(likely.len(), 3);
        for (likely, wanted) in likely.iter().zip(&wanted) {
            assert_eq!(likely.token, wanted.0);
            assert!((likely.probability - wanted.1).abs() < 0.05, "{likely:?} {wanted:?}");
        }
    }

    #[test]
    fn the_engine_drafts_what_was_trained() {
        for kind in [Kind::Deep, Kind::Layer, Kind::Paper] {
            same_forward(kind, true, 0.01);
            same_forward(kind, false, 0.12);
        }
    }
}
