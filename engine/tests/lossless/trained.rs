//! A drafter that computes, plugged into the engine: a stand-in that knows the answer, guesses
//! right and wrong, and checks what the device promises it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use hat_compute::DeviceModel;
use hat_compute::open as processor;
use hat_core::draft::Source;
use hat_core::draft::drafter::{Decided, Drafted, Drafter, SessionId};
use hat_core::draft::tree::Proposal;
use hat_core::page::pages_for;
use hat_engine::options::{Codec, DraftMode, Processor};
use hat_engine::{Cloud, CloudConfig, Engine, EngineConfig, Metrics, Request};
use hat_loader::DrafterArchitecture;
use hat_plan::BackendFault;

use super::drafts::{few, request, whole};
use super::support::drafter::add_noise;
use super::support::{Bundles, collect, collect_with, long_prompt};
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
    asked: usize,
    forgotten: usize,
    /// The shallow rows of the last tree, by the tokens below its root.
    drafted: HashMap<Vec<u32>, Vec<f32>>,
    /// Position of its root.
    root: u32,
}

/// Knows what will be said.
struct StandIn {
    script: Vec<u32>, // prompt and answer
    seen: Arc<Mutex<Seen>>,
    /// Which question its backend does not survive, and whether it is lost then.
    fails: Option<(usize, bool)>,
}

impl Drafter for StandIn {
    fn describe(&self) -> String {
        "a stand-in".into()
    }

    fn fault(&mut self) -> Option<BackendFault> {
        let asked = self.seen.lock().unwrap().asked;
        let (_, lasts) = self.fails.filter(|(at, _)| *at == asked)?;
        self.fails = self.fails.filter(|(_, lasts)| *lasts);
        Some(BackendFault { backend: "planted", reason: "no more guesses".into(), lasts })
    }

    fn forget(&mut self) {
        let seen = &mut *self.seen.lock().unwrap();
        seen.forgotten += 1;
        seen.tree.clear();
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
        guesses: &mut Vec<(usize, Proposal)>,
    ) {
        let seen = &mut *self.seen.lock().unwrap();
        seen.asked += 1;
        if self.fails.is_some_and(|(at, _)| at == seen.asked) {
            // What a lost backend says is no number.
            let guess =
                Proposal { token: 1, probability: f32::NAN, source: Source::of_model(0, 0.5) };
            guesses.extend(rows.new_nodes().map(|node| (node, guess)));
            return;
        }
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
                let source = Source::of_model(rank, probability);
                guesses.push((node, Proposal { token, probability, source }));
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
    engine_failing(bundles, cloud, answer, None)
}

fn engine_failing(
    bundles: &Bundles,
    cloud: &str,
    answer: &Metrics,
    fails: Option<(usize, bool)>,
) -> (Engine, Arc<Mutex<Seen>>) {
    let config = EngineConfig::new(bundles.path.join("device")).cloud(cloud);
    let half = hat_loader::Bundle::open(&config.bundle).unwrap();
    let pages = pages_for(config.limits.kv_rows_max as usize + 64);
    let backend = processor::cpu(Processor::Auto, 1).unwrap();
    let model = DeviceModel::load(backend, &half, 1, 512, pages).unwrap();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let script = [long_prompt(75), answer.token_ids.clone()].concat();
    let stand_in = StandIn { script, seen: seen.clone(), fails };
    let trained: Box<dyn Drafter> = Box::new(stand_in);
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
        let answers = whole(&bundles, 1, Codec::default(), &requests);
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

/// A drafter whose backend fails says nothing more in the requests that run: they go on without
/// it, and the next ones have it again unless it is lost.
#[test]
fn a_drafter_that_fails_changes_nothing() {
    let bundles = Bundles::generated(1, 0);
    let requests = [request(Default::default())];
    let answers = whole(&bundles, 1, Codec::default(), &requests);
    let cloud = Cloud::start(CloudConfig::new(bundles.path.join("cloud"))).unwrap();
    let address = cloud.address().to_string();
    for mode in DraftMode::ALL.into_iter().filter(|mode| mode.asks_trained()) {
        if mode == DraftMode::Auto {
            continue; // asks when it likes
        }
        for (at, lasts) in [(1, false), (1, true), (4, false), (4, true)] {
            let (engine, seen) = engine_failing(&bundles, &address, &answers[0], Some((at, lasts)));
            let case = format!("{}, question {at}, lasts: {lasts}", mode.name());
            assert_same(&case, &answers[0], &collect(&engine, requests[0].clone().draft(mode)));
            {
                let seen = seen.lock().unwrap();
                assert_eq!((seen.asked, seen.closed, seen.forgotten), (at, 1, 1), "{case}");
            }
            assert_eq!(engine.describe_drafter().is_none(), lasts, "{case}");
            assert_same(&case, &answers[0], &collect(&engine, requests[0].clone().draft(mode)));
            drop(engine);
            let seen = seen.lock().unwrap();
            assert_eq!(seen.asked > at, !lasts, "{case}: {} questions", seen.asked);
            assert_eq!(seen.sessions, if lasts { 1 } else { 2 }, "{case}");
        }
    }
}

/// The drafter of the bundle, as `Engine::open` loads it; here it is hopeless.
#[test]
fn a_bundles_drafter_changes_nothing() {
    for kind in DrafterArchitecture::ALL {
        let bundles = Bundles::generated(1, 0);
        let requests = [request(Default::default())];
        let answers = whole(&bundles, 1, Codec::default(), &requests);
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
