//! End to end on the default model: decoding by the whole model beside its memory bound, and the
//! split engine over loopback beside the whole model.
//!
//! Bound of one decoded token: every weight is read once, so bytes of all weights / measured read
//! bandwidth. The split engine's bound is the whole model's time: both roles compute on this
//! machine, and the link adds to it. Rounds are run in turn; medians with min and max.

use hat_benches::{Spread, answer, read_bandwidth, spread};
use hat_compute::open;
use hat_engine::options::{Codec, LinkKind, Processor};
use hat_engine::reference_run::ReferenceRun;
use hat_engine::{Engine, EngineConfig, Request};
use hat_loader::Bundle;

const ROUNDS: usize = 5;
const TOKENS: u32 = 96;

fn request() -> Request {
    Request::chat("Tell me about the sea, its tides and its ships.").max_tokens(TOKENS).ignore_eos()
}

fn line(name: &str, unit: &str, values: Vec<f64>) {
    let Spread { median, least, most } = spread(values);
    println!("{name:<44} {median:9.2} {unit:<6} ({least:.2} - {most:.2})");
}

fn main() {
    let bundle = hat_benches::default_bundle();
    let bytes: u64 = ["device", "cloud"]
        .map(|role| Bundle::open(&bundle.join(role)).expect("a bundle").weights_bytes())
        .iter()
        .sum();
    for threads in [1, 2] {
        decode(&bundle, bytes, threads);
    }
}

fn decode(bundle: &std::path::Path, bytes: u64, threads: usize) {
    println!("== {threads} threads, {TOKENS} tokens, {bytes} bytes of weights");
    let backend = open::cpu(Processor::Auto, threads).expect("a backend");
    let mut whole = ReferenceRun::open(backend, bundle, None, Codec::default(), 1024)
        .expect("both halves are there");
    let engines = [LinkKind::Mio, LinkKind::IoUring].map(|link| {
        let config =
            EngineConfig::new(bundle.join("device")).link(link).threads(threads).prefix(false);
        (link, Engine::open(config).expect("the engine opens"))
    });
    let (mut bounds, mut shares, mut wholes) = (vec![], vec![], vec![]);
    let mut splits = [const { (vec![], vec![], vec![]) }; 2];
    for _ in 0..ROUNDS {
        let bound_ms = bytes as f64 / read_bandwidth(threads) * 1e3;
        let whole_ms =
            1e3 / whole.generate(request(), |_| {}).expect("an answer").1.timings.tokens_per_second;
        bounds.push(bound_ms);
        wholes.push(whole_ms);
        shares.push(100.0 * bound_ms / whole_ms);
        for ((_, engine), (ttft, tbt, ratio)) in engines.iter().zip(&mut splits) {
            let timings = answer(engine, request(), |_| {}).timings;
            ttft.push(timings.ttft_ms);
            tbt.push(1e3 / timings.tokens_per_second);
            ratio.push(1e3 / timings.tokens_per_second / whole_ms);
        }
    }
    line("bound: weights / read bandwidth", "ms", bounds);
    line("whole model, a token", "ms", wholes);
    line("whole model, share of the bound reached", "%", shares);
    for ((link, _), (ttft, tbt, ratio)) in engines.iter().zip(splits) {
        line(&format!("split over {link}, TTFT"), "ms", ttft);
        line(&format!("split over {link}, a token"), "ms", tbt);
        line(&format!("split over {link}, a token / whole model's"), "x", ratio);
    }
}
