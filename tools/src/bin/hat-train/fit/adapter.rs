//! The file of a trained drafter, `adapter.safetensors`: written here, read by the loader.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context as _, ensure};
use candle_core::{DType, Device, Tensor};
use hat_loader::DType as Stored;
use hat_loader::bundle::DRAFTER_FORMAT_VERSION;
use hat_loader::layout::quantise_q8_0;
use serde::Serialize;

use super::drafter::Drafter;
use crate::shard::write_tensors;

/// Facts of a drafter's training, for its card.
#[derive(Clone, Debug, Serialize)]
pub(super) struct TrainingFacts {
    pub(super) positions: usize,
    pub(super) sequences: usize,
    pub(super) sources: BTreeMap<String, usize>,
    pub(super) steps: usize,
    pub(super) recipe: serde_json::Value,
    /// Name and BLAKE3 of each prompt file.
    pub(super) prompts: Vec<(String, String)>,
}

/// Writes a drafter of the model and the split layer `of`, which may draft the tokens of
/// `vocabulary`, most frequent first; matrices as f16 if `half`, as q8_0 otherwise.
pub(super) fn write(
    path: &Path,
    drafter: &Drafter,
    of: (&str, usize),
    vocabulary: &[u32],
    training: &TrainingFacts,
    half: bool,
) -> anyhow::Result<()> {
    let mut tensors = Vec::new();
    for (name, value) in &drafter.params {
        let numbers = value.flatten_all()?.to_vec1::<f32>()?;
        let is_sound = numbers.iter().all(|v| v.is_finite());
        ensure!(is_sound, "{name} holds a number that is not finite");
        let stored = match *value.dims() {
            [n, k] if !half => {
                let row = Stored::Q8_0.row_bytes(k);
                let row = row.with_context(|| format!("{name}: rows of {k} numbers"))?;
                let mut bytes = vec![0; n * row];
                for (from, to) in numbers.chunks_exact(k).zip(bytes.chunks_exact_mut(row)) {
                    quantise_q8_0(from, to);
                }
                Tensor::from_vec(bytes, (n, row), &Device::Cpu)?
            }
            [_, _] => value.to_dtype(DType::F16)?,
            _ => value.as_tensor().clone(),
        };
        tensors.push(((*name).to_owned(), stored));
    }
    tensors.push(("vocabulary".to_owned(), Tensor::new(vocabulary, &Device::Cpu)?));
    let texts = [
        ("format_version", DRAFTER_FORMAT_VERSION.to_string()),
        ("kind", drafter.kind.name().to_owned()),
        ("model_id", of.0.to_owned()),
        ("split_layer", of.1.to_string()),
        ("training", serde_json::to_string(training)?),
    ];
    let texts = texts.map(|(name, text)| (name.to_owned(), text));
    write_tensors(path, tensors, HashMap::from(texts))
}

#[cfg(test)]
pub(super) mod tests {
    use half::f16;
    use hat_compute::backend::cpu::CpuBackend;
    use hat_compute::{DraftModel, open};
    use hat_core::sample::noise::philox;
    use hat_core::sequence::Sequence;
    use hat_engine::options::Processor;
    use hat_loader::tiny_bundle;
    use hat_loader::{Bundle, DrafterArchitecture};
    use hat_plan::{BatchBuffers, DraftForward as _};

    use super::super::data::FinalNorm;
    use super::super::drafter::{Example, linear, log_softmax, rms_norm, weight};
    use super::*;
    use crate::eval::proposals::Proposer;
    use crate::shard::{Recording, SequenceFacts};

    /// Numbers that look random, of about the size that weights have.
    pub(in crate::fit) fn noise(shape: &[usize], stream: u32, size: f32) -> Tensor {
        let count = u32::try_from(shape.iter().product::<usize>()).unwrap();
        let number =
            |at| size * (philox([at, stream, 0, 9], [3, 4])[0] as f32 / 2_147_483_648.0 - 1.0);
        let numbers = Tensor::from_iter((0..count).map(number), &Device::Cpu).unwrap();
        numbers.reshape(shape).unwrap()
    }

    /// Rows `[first, last]` of a matrix.
    fn rows(of: &Tensor, first: usize, last: usize) -> Vec<f32> {
        let rows = of.narrow(0, first, last + 1 - first).unwrap();
        rows.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn close(got: &[f32], wanted: &[f32], share: f32, what: &str) {
        let size = (wanted.iter().map(|v| v * v).sum::<f32>() / wanted.len() as f32).sqrt();
        let off = got.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off <= share * size, "{what}: off by {off} where numbers are about {size}");
    }

    const VOCABULARY: [u32; 5] = [9, 2, 30, 4, 17];

    /// A device bundle with a random drafter of `kind`, and that drafter.
    fn bundle(directory: &Path, kind: DrafterArchitecture, half: bool) -> (Bundle, Drafter) {
        let device = Bundle::open(&tiny_bundle(directory).unwrap().join("device")).unwrap();
        let mut stream = 0;
        let drafter = Drafter::new(kind, device.config(), |_, shape| {
            stream += 1;
            let size = if let [_, k] = *shape { 2.0 / (k as f32).sqrt() } else { 1.0 };
            Ok(noise(shape, stream, size))
        });
        let drafter = drafter.unwrap();
        let training = TrainingFacts {
            positions: 0,
            sequences: 0,
            sources: BTreeMap::new(),
            steps: 0,
            recipe: serde_json::Value::Null,
            prompts: vec![],
        };
        let path = directory.join("adapter.safetensors");
        let of = (&*device.model_id().to_string(), 1);
        write(&path, &drafter, of, &VOCABULARY, &training, half).unwrap();
        hat_loader::add_drafter(device.directory(), &path).unwrap();
        (Bundle::open(device.directory()).unwrap(), drafter)
    }

    /// A session of the engine's drafter.
    struct Session {
        drafter: DraftModel<CpuBackend>,
        sequence: Sequence,
        plan: BatchBuffers,
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
                drafter.decide(&plan.batch(), shallow, deep, &mut y);
            } else {
                drafter.remember(&plan.batch(), shallow, deep);
            }
            y
        }

        fn proposal(&mut self, parent: u32, shallow: &[f32], y_before: &[f32]) -> (u32, Vec<f32>) {
            let Self { drafter, sequence, plan } = self;
            let id = sequence.last_id() + 1;
            sequence.append_pending(id, [parent]).unwrap();
            plan.clear();
            assert!(sequence.push_row(id, plan));
            plan.end_sequence(sequence.pages());
            let mut y = vec![0.0; shallow.len()];
            drafter.draft(&plan.batch(), shallow, y_before, &mut y);
            (id, y)
        }
    }

    /// The engine's drafter against the one that is trained, over a decided path and a tree.
    fn same_forward(kind: DrafterArchitecture, half: bool, share: f32) {
        let directory = tempfile::tempdir().unwrap();
        let (device, trained) = bundle(directory.path(), kind, half);
        let config = device.config();
        // Nine tokens, of which four are the prompt; deep rows are there from the last of those.
        let shape = [9, config.hidden_size];
        let (shallow, deep) = (noise(&shape, 50, 3.0), noise(&shape, 51, 40.0));
        let norm = weight(&device, "model.norm.weight", None).unwrap();
        let normed = rms_norm(&deep, Some(&norm), config.rms_norm_eps).unwrap();
        let (deep_before, target) = (normed.narrow(0, 3, 5), normed.narrow(0, 4, 5));
        let example = Example {
            shallow: shallow.clone(),
            deep_before: deep_before.unwrap(),
            target: target.unwrap(),
        };
        let steps = trained.unroll(&example, 3).unwrap();
        let y = |step: usize| &steps[step.min(steps.len()) - 1].y;

        let backend = open::cpu(Processor::Auto, 1).unwrap();
        let drafter = DraftModel::load(backend, &device, 16, 4).unwrap().unwrap();
        assert_eq!(drafter.split_layer(), 1);
        let sequence = Sequence::new(vec![2, 1], 60);
        let mut session = Session { drafter, sequence, plan: BatchBuffers::default() };
        let none = vec![0.0; 4 * config.hidden_size];
        session.decided(4, &rows(&shallow, 0, 3), &none, false);
        let y1 = session.decided(2, &rows(&shallow, 4, 5), &rows(&deep, 3, 4), true);
        close(&y1, &rows(y(1), 0, 1), share, "decided rows");

        // Below position 5: a wrong draft, the right one, and the right one below that.
        let (tip, root) = (session.sequence.tip(), &y1[config.hidden_size..]);
        session.proposal(tip, &rows(&deep, 0, 0), root);
        let (child, y2) = session.proposal(tip, &rows(&shallow, 6, 6), root);
        close(&y2, &rows(y(2), 2, 2), share, "a child");
        let (_, y3) = session.proposal(child, &rows(&shallow, 7, 7), &y2);
        close(&y3, &rows(y(3), 3, 3), share, "a grandchild");
        let head = weight(&device, crate::target::head_name(&device), Some(&VOCABULARY)).unwrap();
        check_likeliest(&mut session.drafter, &head, y3);
    }

    /// The drafter's likeliest tokens against the same rows of the head in f32.
    fn check_likeliest(drafter: &mut DraftModel<CpuBackend>, head: &Tensor, y: Vec<f32>) {
        let mut likely = Vec::new();
        drafter.likeliest(&y, 3, &mut likely);
        let y = Tensor::from_vec(y, (1, head.dim(1).unwrap()), &Device::Cpu).unwrap();
        let logits = rows(&linear(&y, head).unwrap(), 0, 0);
        let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
        let probabilities = logits.iter().map(|logit| logit.exp() / sum);
        let mut wanted: Vec<(u32, f32)> = VOCABULARY.into_iter().zip(probabilities).collect();
        wanted.sort_by(|a, b| b.1.total_cmp(&a.1));
        assert_eq!(likely.len(), 3);
        for (likely, wanted) in likely.iter().zip(&wanted) {
            assert_eq!(likely.token, wanted.0);
            assert!((likely.probability - wanted.1).abs() < 0.05, "{likely:?} {wanted:?}");
        }
    }

    #[test]
    fn the_engine_drafts_what_was_trained() {
        for kind in DrafterArchitecture::ALL {
            same_forward(kind, true, 0.01);
            same_forward(kind, false, 0.12);
        }
    }

    /// Drafts at each position and depth, as `eval` asks for them, against what is unrolled here.
    #[test]
    fn eval_asks_for_what_training_unrolls() {
        for kind in DrafterArchitecture::ALL {
            let directory = tempfile::tempdir().unwrap();
            let (device, trained) = bundle(directory.path(), kind, true);
            let config = device.config();
            let f16s = |count: usize, stream, size| -> Vec<f16> {
                let numbers =
                    rows(&noise(&[count, config.hidden_size], stream, size), 0, count - 1);
                numbers.into_iter().map(f16::from_f32).collect()
            };
            let (source, prompt, tokens, deep_first) = ("test".to_owned(), 4, 15, 2);
            let facts =
                SequenceFacts { job: 0, source, prompt, tokens, deep_first, sampled: false };
            let (shallow, deep) = (vec![f16s(14, 60, 3.0)], f16s(12, 61, 40.0));
            let recording = Recording { facts, tokens: (0..15).collect(), shallow, deep };
            let norm = weight(&device, "model.norm.weight", None).unwrap();
            let norm = FinalNorm { weight: norm, eps: config.rms_norm_eps };
            let steps = trained.unroll(&norm.example(&recording, 0).unwrap(), 8).unwrap();
            let head =
                weight(&device, crate::target::head_name(&device), Some(&VOCABULARY)).unwrap();
            let path = directory.path().join("adapter.safetensors");
            let adapter = hat_loader::DrafterFile::read(&path, &device).unwrap();
            let mut proposer = Proposer::new(&adapter, &device, 15).unwrap();
            for temperature in [1.0, 2.0] {
                let proposals = proposer.proposal(&recording, temperature).unwrap();
                assert_eq!(proposals.steps.len(), steps.len());
                for (step, (said, wanted)) in proposals.steps.iter().zip(&steps).enumerate() {
                    let logits =
                        (linear(&wanted.y, &head).unwrap() / f64::from(temperature)).unwrap();
                    let wanted = log_softmax(&logits).unwrap().exp().unwrap().to_vec2::<f32>();
                    for (said, wanted) in said.iter().zip(wanted.unwrap()).skip(step) {
                        assert_eq!(said.len(), VOCABULARY.len());
                        for proposal in said {
                            let at = VOCABULARY.iter().position(|token| *token == proposal.token);
                            let wanted = wanted[at.unwrap()];
                            assert!(
                                (proposal.probability - wanted).abs() < 0.03,
                                "{step}: {proposal:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}
