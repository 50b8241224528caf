//! A drafter that computes, plugged into the engine: a stand-in that knows the answer, guesses
//! right and wrong, and checks what the device promises it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use hat_engine::draft::Source;
use hat_engine::draft::trained::{Decided, Drafted, SessionId, Trained};
use hat_engine::draft::tree::Guess;
use hat_engine::internal::{DeviceModel, pages_for, processor};
use hat_engine::options::{Codec, DraftMode, Processor};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Metrics, Request};
use hat_loader::layout::quantise_q8_0;
use hat_loader::{AdapterKind, DType, add_adapter};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};

use super::drafts::{few, request, whole};
use super::support::{Bundles, collect_with, long_prompt};
use super::{assert_same, support::hand::HIDDEN};

/// What the stand-in was given in its sessions.
#[derive(Default)]
pub(super) struct Seen {
    /// Token and shallow row of each committed position, of the session at hand.
    path: Vec<(u32, Vec<f32>)>,
    /// Shallow rows of the tree at hand, by its nodes.
    tree: Vec<Vec<f32>>,
    /// Rows of decided tokens that came with the deep row before them.
    deep: usize,
    sessions: usize,
    closed: usize,
    /// Committed rows that had been in a tree, bit for bit the same.
    pub(super) kept: usize,
    /// The shallow rows of the last tree, by the tokens below its root.
    drafted: HashMap<Vec<u32>, Vec<f32>>,
    /// Position of its root.
    root: u32,
}

/// Knows what will be said.
struct StandIn {
    script: Vec<u32>, // prompt and answer
    seen: Arc<Mutex<Seen>>,
}

impl Trained for StandIn {
    fn describe(&self) -> String {
        "a stand-in".into()
    }

    fn open(&mut self, _: u32) -> Option<SessionId> {
        let mut seen = self.seen.lock().unwrap();
        seen.path.clear();
        seen.sessions += 1;
        Some(7)
    }

    fn close(&mut self, session: SessionId) {
        assert_eq!(session, 7);
        self.seen.lock().unwrap().closed += 1;
    }

    fn commit(&mut self, _: SessionId, rows: &Decided<'_>) {
        let seen = &mut *self.seen.lock().unwrap();
        assert_eq!(rows.first as usize, seen.path.len(), "positions come once, in order");
        assert!(seen.tree.is_empty(), "a tree is rolled back before anything is committed");
        let shallow = rows.shallow.chunks_exact(HIDDEN);
        assert_eq!(shallow.len(), rows.tokens.len());
        for (index, (token, row)) in rows.tokens.iter().zip(shallow).enumerate() {
            assert_eq!(self.script[seen.path.len()], *token, "position {}", seen.path.len());
            let below_root = (rows.first == seen.root + 1).then(|| &rows.tokens[..=index]);
            if let Some(drafted) = below_root.and_then(|path| seen.drafted.get(path)) {
                assert!(drafted == row, "not the row that was drafted");
                seen.kept += 1;
            }
            seen.path.push((*token, row.to_vec()));
        }
        if let Some(deep) = rows.deep_before {
            assert_eq!(deep.len(), rows.shallow.len());
            assert!(deep.iter().any(|number| *number != 0.0));
            seen.deep += rows.tokens.len();
        }
    }

    fn propose(
        &mut self,
        _: SessionId,
        rows: &Drafted<'_>,
        width: usize,
        guesses: &mut Vec<(usize, Guess)>,
    ) {
        let seen = &mut *self.seen.lock().unwrap();
        assert_eq!(rows.root_position as usize + 1, seen.path.len(), "the root is committed");
        assert_eq!(rows.first, seen.tree.len(), "nodes come in order");
        if rows.first == 0 {
            assert!(seen.path.last().unwrap().1 == rows.shallow[..HIDDEN], "the root's own row");
            // What was drafted on the way to this root has the same rows below it.
            let below_old_root = seen.path.get(seen.root as usize + 1..).unwrap_or_default();
            let path: Vec<u32> = below_old_root.iter().map(|row| row.0).collect();
            let old = std::mem::take(&mut seen.drafted);
            let kept = old
                .into_iter()
                .filter_map(|(tokens, row)| Some((tokens.strip_prefix(&path[..])?.to_vec(), row)));
            seen.drafted = kept.collect();
            seen.root = rows.root_position;
        }
        for (node, row) in rows.new_nodes().zip(rows.shallow.chunks_exact(HIDDEN)) {
            seen.tree.push(row.to_vec());
            let position = rows.root_position + rows.nodes[node].depth;
            let mut path = Vec::new();
            let mut at = node;
            while at != 0 {
                path.insert(0, rows.nodes[at].token);
                at = rows.nodes[at].parent;
            }
            if let Some(old) = seen.drafted.insert(path, row.to_vec()) {
                assert!(old == row, "node {node} has another row than before");
            }
            let right = self.script.get(position as usize + 1).copied().unwrap_or(3);
            // Every fourth position the best guess is wrong; the second is right.
            let first = if position.is_multiple_of(4) { 1 + right } else { right };
            let tokens = [first % 512, right, 5, 6];
            let likely = tokens.into_iter().zip([0.6, 0.25, 0.1, 0.05]).take(width);
            for (rank, (token, probability)) in likely.enumerate() {
                let source = Source::adapter(rank, probability);
                guesses.push((node, Guess { token, probability, source }));
            }
        }
    }

    fn rollback(&mut self, _: SessionId) {
        self.seen.lock().unwrap().tree.clear();
    }
}

/// An engine whose trained drafter knows `answer`.
pub(super) fn engine(
    bundles: &Bundles,
    cloud: &str,
    answer: &Metrics,
) -> (Engine, Arc<Mutex<Seen>>) {
    let config = EngineConfig::new(bundles.path.join("device")).cloud(cloud);
    let half = hat_loader::Bundle::open(&config.bundle).unwrap();
    let pages = pages_for(config.limits.kv_rows_max as usize + 64);
    let backend = processor::cpu(Processor::Auto, 1).unwrap();
    let model = DeviceModel::load(backend, &half, 1, 512, pages).unwrap();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let script = [long_prompt(75), answer.token_ids.clone()].concat();
    let stand_in = StandIn { script, seen: seen.clone() };
    let trained: Box<dyn Trained> = Box::new(stand_in);
    (Engine::serve_drafting(config, &half, Box::new(model), Some(trained)).unwrap(), seen)
}

#[test]
fn a_computing_drafter_changes_nothing_but_rounds() {
    for tail_layers in [0, 1] {
        let bundles = Bundles::generated(1, tail_layers);
        let requests: Vec<Request> = vec![
            request(Default::default()),
            request(few(
                4,
                hat_engine::options::SamplerConfig { temperature: 0.9, ..Default::default() },
            )),
        ];
        let answers = whole(&bundles, 1, Codec::F16, &requests);
        for (request, answer) in requests.iter().zip(&answers) {
            let modes = DraftMode::ALL.into_iter().filter(|mode| mode.asks_trained());
            for mode in modes {
                for restarts in [false, true] {
                    let config = || CloudConfig::new(bundles.path.join("cloud"));
                    let mut cloud = Some(Cloud::start(config()).unwrap());
                    let address = cloud.as_ref().unwrap().address();
                    let (engine, seen) = engine(&bundles, &address.to_string(), answer);
                    let mut tokens = 0;
                    let split = collect_with(&engine, request.clone().draft(mode), |_| {
                        tokens += 1;
                        if restarts && [3, 20].contains(&tokens) {
                            drop(cloud.take());
                            cloud = Some(Cloud::start(config().listen(address)).unwrap());
                        }
                    });
                    let case = format!("tail {tail_layers}, {}, {restarts}", mode.name());
                    assert_same(&case, answer, &split);
                    drop(engine);
                    let seen = seen.lock().unwrap();
                    assert_eq!(seen.sessions, 1, "{case}");
                    assert!(seen.deep > 10, "{case}: {} with deep rows", seen.deep);
                    if mode != DraftMode::Auto {
                        let accept_len = split.timings.accept_len;
                        let least = if mode == DraftMode::Chain { 1.9 } else { 3.0 };
                        assert!(restarts || accept_len > least, "{case}: {accept_len}");
                        assert!(seen.kept > 10, "{case}: {} rows kept", seen.kept);
                        let hits = split.timings.predraft_hits;
                        let streams = mode.streams();
                        assert!(streams || hits == 0, "{case}: {hits} hits");
                        assert!(mode != DraftMode::All || hits > 0, "{case}: no row met another");
                        let drafters = &split.timings.drafters;
                        assert!(drafters["adapter"].accepted > 0, "{case}: {drafters:?}");
                    }
                }
            }
        }
    }
}

/// Puts a drafter of noise into the device's half: right by accident alone.
pub(super) fn add_noise(bundles: &Bundles, kind: AdapterKind) {
    let path = bundles.path.join("device");
    let half = hat_loader::Bundle::open(&path).unwrap();
    let mut state = 1u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut tensors = Vec::new();
    for (name, shape) in kind.tensors(half.config()) {
        let count = shape.iter().product();
        let numbers: Vec<f32> = (0..count).map(|_| noise()).collect();
        let tensor = match shape[..] {
            [n, k] => {
                let row = DType::Q8_0.row_bytes(k).unwrap();
                let mut bytes = vec![0; n * row];
                for (from, to) in numbers.chunks(k).zip(bytes.chunks_mut(row)) {
                    quantise_q8_0(from, to);
                }
                (Dtype::U8, vec![n, row], bytes)
            }
            _ => (Dtype::F32, shape, numbers.iter().flat_map(|n| n.to_le_bytes()).collect()),
        };
        tensors.push((name.to_owned(), tensor.0, tensor.1, tensor.2));
    }
    let tokens: Vec<u8> = (0..half.config().vocab_size as u32).flat_map(u32::to_le_bytes).collect();
    tensors.push(("vocabulary".into(), Dtype::U32, vec![tokens.len() / 4], tokens));
    let texts = [
        ("format_version", "1".to_owned()),
        ("kind", kind.name().to_owned()),
        ("model_id", half.model_id().to_string()),
        ("split_layer", "1".to_owned()),
    ];
    let texts = texts.map(|(name, text)| (name.to_owned(), text)).into_iter().collect();
    let file = bundles.path.join("drafter.safetensors");
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    serialize_to_file(views, Some(texts), &file).unwrap();
    add_adapter(&path, &file).unwrap();
}

/// The drafter of the bundle, as `Engine::open` loads it; here it is hopeless.
#[test]
fn a_bundles_drafter_changes_nothing() {
    for kind in AdapterKind::ALL {
        let bundles = Bundles::generated(1, 0);
        let requests = [request(Default::default())];
        let answers = whole(&bundles, 1, Codec::F16, &requests);
        add_noise(&bundles, kind);
        let modes = DraftMode::ALL.into_iter().filter(|mode| mode.asks_trained());
        for mode in modes {
            let mut cloud =
                Some(Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap());
            let address = cloud.as_ref().unwrap().address();
            let config = EngineConfig::new(bundles.path.join("device")).cloud(address.to_string());
            let engine = Engine::open(config).unwrap();
            for restarts in [false, true] {
                let mut tokens = 0;
                let split = collect_with(&engine, requests[0].clone().draft(mode), |_| {
                    tokens += 1;
                    if restarts && tokens == 9 {
                        drop(cloud.take());
                        let config = CloudConfig::new(bundles.path.join("cloud")).listen(address);
                        cloud = Some(Cloud::start(config).unwrap());
                    }
                });
                let case = format!("{}, {}, restart {restarts}", kind.name(), mode.name());
                assert_same(&case, &answers[0], &split);
                if mode != DraftMode::Auto {
                    assert!(split.timings.drafters["adapter"].drafted > 20, "{case}");
                }
            }
        }
    }
}
