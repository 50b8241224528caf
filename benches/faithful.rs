//! Our side of `faithful.py`: the logits of a whole model for given tokens.
//!
//!     cargo bench -p hat-benches --bench faithful -- CODEC OUT [BUNDLES] < TOKENS
//!
//! Each line of standard input is one passage as token ids. OUT gets the logits after each token,
//! `[tokens, vocab_size]` of all passages one after another, as f32 little-endian. CODEC is f32
//! (the model itself), f16, int8 or int4: rows go through it as those of a session do. BUNDLES is
//! the directory of the model's two halves; without it the default model runs.

use std::fs::File;
use std::io::{BufRead as _, BufWriter, Write as _};
use std::path::PathBuf;

use hat_compute::WholeModel;
use hat_compute::open;
use hat_engine::options::{Codec, Processor, TokenId};
use hat_engine::reference_run::through_codec;
use hat_loader::Bundle;

const USAGE: &str = "faithful CODEC OUT [BUNDLES] < TOKENS";
const CONTEXT_MAX: usize = 1024;

fn main() {
    // Cargo adds --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    // As part of `cargo bench` without words of its own it has nothing to do.
    let [codec, out, bundles @ ..] = args.as_slice() else {
        println!("{USAGE}");
        return;
    };
    let codec = Codec::from_name(codec).expect("f32, f16, int8 or int4");
    let path = bundles.first().map_or_else(hat_benches::default_bundle, PathBuf::from);
    let [device, cloud] =
        ["device", "cloud"].map(|role| Bundle::open(&path.join(role)).expect("a bundle"));
    let config = device.config();
    let crossings = device.manifest().split_layer..config.num_hidden_layers;
    let backend = open::cpu(Processor::Auto, 1).expect("a backend");
    let cross = through_codec(codec);
    let mut model = WholeModel::load(backend, &device, &cloud, crossings, cross, CONTEXT_MAX)
        .expect("all layers");
    let mut logits = vec![0.0f32; config.vocab_size];
    let mut out = BufWriter::new(File::create(out).expect("OUT can be written"));
    for line in std::io::stdin().lock().lines() {
        model.reset();
        for token in line.expect("text").split_whitespace() {
            let token: TokenId = token.parse().expect("token ids");
            model.step(token, Some(&mut logits)).expect("a good model");
            for logit in &logits {
                out.write_all(&logit.to_le_bytes()).expect("room for OUT");
            }
        }
    }
    out.flush().expect("room for OUT");
}
