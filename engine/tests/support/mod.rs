//! Support for several test binaries: generated bundles, prompts, and answers read to the end.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod drafter;
pub mod hand;
pub mod proxy;
pub mod script;
pub mod steps;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use hat_engine::{Engine, Event, Metrics, Request};
use hat_loader::{BundleOptions, DType, TinyModel, Weights, generated, write_bundles};

/// Limit on a wait, longer than anything takes that works on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until something is so.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Standard error of a program, in which no line names a file or anything else twice.
#[track_caller]
pub fn said(output: &std::process::Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    text.lines().for_each(names_once);
    text
}

/// Panics if a line has the same words before two of its colons, or names a path twice.
#[track_caller]
pub fn names_once(line: &str) {
    let mut parts: Vec<&str> = line.split(": ").collect();
    parts.pop();
    let paths = line.split([' ', ',', ';']).map(|word| word.trim_end_matches([':', '.', '?']));
    for mut words in [parts, paths.filter(|word| word.starts_with('/')).collect()] {
        words.sort_unstable();
        let doubled = words.windows(2).find(|pair| pair[0] == pair[1]);
        assert!(doubled.is_none(), "{doubled:?} in: {line}");
    }
}

/// Both halves of a generated model, below a temporary directory.
pub struct Bundles {
    pub path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Bundles {
    /// A tiny model of a shape that the CUDA kernels know, split.
    pub fn with_kernels() -> Self {
        let model = TinyModel {
            head_dim: 64,
            hidden: 64,
            intermediate: 96,
            heads: 3,
            kv_heads: 1,
            layers: 3,
            vocab: 300,
            dtype: DType::Q4_1,
            ..TinyModel::default()
        };
        Self::of(&model, 1, 0)
    }

    /// The default tiny model, split.
    pub fn generated(split_layer: usize, tail_layers: usize) -> Self {
        Self::of(&TinyModel::default(), split_layer, tail_layers)
    }

    /// A tiny model whose matrices are of one type.
    pub fn of_dtype(dtype: DType) -> Self {
        let narrow = TinyModel::default();
        let (hidden, intermediate, head_dim) = match dtype {
            DType::Q6K => (256, 256, 64),
            _ => (narrow.hidden, narrow.intermediate, narrow.head_dim),
        };
        Self::of(&TinyModel { dtype, hidden, intermediate, head_dim, ..narrow }, 1, 0)
    }

    /// Any tiny model, split.
    pub fn of(model: &TinyModel, split_layer: usize, tail_layers: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bundle");
        let options = BundleOptions { split_layer, tail_layers, weights: Weights::Keep };
        write_bundles(&generated(model), options, &path, &mut |_| {}).unwrap();
        Self { path, _directory: directory }
    }
}

/// All types that a matrix may have.
pub fn dtypes() -> [DType; 7] {
    use DType::{Bf16, F16, F32, Q4_0, Q4_1, Q6K, Q8_0};
    [F32, F16, Bf16, Q8_0, Q4_0, Q4_1, Q6K]
}

/// A prompt of `count` token ids that crosses pages and attention tiles.
pub fn long_prompt(count: u32) -> Vec<u32> {
    (0..count).map(|index| (index * index * 7 + index * 13 + 5) % 250).collect()
}

/// The whole answer.
pub fn collect(engine: &Engine, request: Request) -> Metrics {
    collect_with(engine, request, |_| {})
}

/// The whole answer; `on_token` hears of each token.
pub fn collect_with(engine: &Engine, request: Request, mut on_token: impl FnMut(u32)) -> Metrics {
    for event in engine.generate(request).unwrap() {
        match event.unwrap() {
            Event::Token { token, .. } => on_token(token),
            Event::Done { metrics, .. } => return *metrics,
            _ => {}
        }
    }
    panic!("the answer ended without a last event")
}
