//! Row codecs: how fast, and what they do to the text.
//!
//!     cargo bench -p hat-benches --bench codec -- [PROMPTS.jsonl [COUNT]]
//!
//! Speed: the bound of packing is one pass over the numbers and one over the bytes at the measured
//! bandwidth of a copy. Error, if prompts are given (one JSON object a line, with `turns` or
//! `prompt`): the default model answers each greedily with f32 rows, 64 tokens; then the same rows
//! go through each codec, and at each position of that answer the distribution is compared with
//! the one of f32. A codec changes the greedy text if and only if the likeliest token differs
//! somewhere along it, so no second answer is needed. `up` is the way to the cloud alone, `both`
//! what a session does. Two controls: f32 itself, where nothing may change, and `ulp`, rows whose
//! numbers are moved by one part in 2^23, which shows how much of a change is the arithmetic's own:
//! activations are rounded to 8 bits in each layer, and the least nudge moves some of them.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use hat_benches::halves::Halves;
use hat_benches::{seconds, spread};
use hat_engine::options::{Codec, Message, Role, TokenId};
use hat_plan::DeviceForward as _;
use hat_text::{ChatOptions, Tokenizer};

const ANSWER_TOKENS: usize = 64;
const ROWS_MAX: usize = 512;
const PROMPTS: usize = 100;
/// Numbers of one measured pass: more than a second-level cache, less than a third.
const NUMBERS: usize = 1 << 20;

fn main() {
    speed();
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    let Some(prompts) = args.next() else {
        println!("error: not measured; give a file of prompts after --");
        return;
    };
    let count = args.next().map_or(PROMPTS, |count| count.parse().expect("COUNT is a number"));
    errors(Path::new(&prompts), count);
}

fn speed() {
    for hidden in [576, 4096] {
        let rows = NUMBERS / hidden;
        let numbers: Vec<f32> = (0..rows * hidden)
            .map(|index| (index as f32 * 0.37).sin() + if index % 500 == 0 { 300.0 } else { 0.0 })
            .collect();
        let mut copy = vec![0.0f32; numbers.len()];
        let copied_s = fastest(|| black_box(&mut copy).copy_from_slice(black_box(&numbers)));
        println!(
            "== {rows} rows of {hidden}; a copy: {:.1} ns a row",
            copied_s * 1e9 / rows as f64
        );
        for codec in Codec::ALL {
            let mut bytes = vec![0; rows * codec.row_bytes(hidden)];
            let packed_s = fastest(|| {
                codec.encode(black_box(&numbers), hidden, &mut bytes).expect("finite");
            });
            let unpacked_s = fastest(|| {
                codec.decode(black_box(&bytes), hidden, &mut copy).expect("its own bytes");
            });
            let share = (4.0 + codec.row_bytes(hidden) as f64 / hidden as f64) / 8.0;
            println!(
                "{:<5} {:5} bytes a row; pack {:7.1} ns a row, {:4.0} % of the bound; unpack \
                 {:7.1} ns, {:4.0} %",
                codec.name(),
                codec.row_bytes(hidden),
                packed_s * 1e9 / rows as f64,
                100.0 * copied_s * share / packed_s,
                unpacked_s * 1e9 / rows as f64,
                100.0 * copied_s * share / unpacked_s,
            );
        }
    }
}

/// Seconds of the fastest of some runs.
fn fastest(mut run: impl FnMut()) -> f64 {
    spread((0..30).map(|_| seconds(&mut run))).least
}

/// The default model, both halves, and its text.
struct Model {
    halves: Halves,
    tokenizer: Tokenizer,
    hidden: usize,
    vocab: usize,
}

impl Model {
    fn open() -> Self {
        let halves = Halves::open(hat_benches::cores(), ROWS_MAX, 1, ROWS_MAX);
        let (bundle, config) = (&halves.bundle, halves.bundle.config());
        Self {
            tokenizer: Tokenizer::of_bundle(bundle).expect("a tokenizer"),
            hidden: config.hidden_size,
            vocab: config.vocab_size,
            halves,
        }
    }

    /// The shallow rows of `tokens`, which stand at the positions from `first` on; the plan stays
    /// for [`Model::deep`].
    fn shallow(&mut self, first: usize, tokens: &[TokenId]) -> Vec<f32> {
        self.halves.shallow(first, tokens);
        self.halves.step.hidden.clone()
    }

    /// The deep rows of shallow ones.
    fn deep(&mut self, shallow: &[f32]) -> &[f32] {
        self.halves.step.hidden.copy_from_slice(shallow);
        self.halves.deep();
        &self.halves.step.hidden
    }

    fn logits(&mut self, deep: &[f32]) -> Vec<f32> {
        let mut logits = vec![0.0; self.vocab];
        self.halves.device.head(deep, &mut logits);
        logits
    }
}

/// Damage that a codec did to one kind of crossing.
#[derive(Clone, Default)]
struct Damage {
    kl: Vec<f64>,
    agreed: usize,
    changed: usize,
}

fn errors(prompts: &Path, count: usize) {
    let mut model = Model::open();
    let prompts = read(prompts, &model.tokenizer, count);
    let codecs = [Some(Codec::F32), None, Some(Codec::F16), Some(Codec::Int8), Some(Codec::Int4)];
    let mut damages = vec![[Damage::default(), Damage::default()]; codecs.len()];
    let began = Instant::now();
    for (index, prompt) in prompts.iter().enumerate() {
        measure(&mut model, prompt, &codecs, &mut damages);
        if (index + 1) % 10 == 0 {
            eprintln!("{} prompts, {:.0} s", index + 1, began.elapsed().as_secs_f64());
        }
    }
    println!("== {} prompts, answers of {ANSWER_TOKENS} tokens, against f32 rows", prompts.len());
    println!("codec  way    KL mean   KL p99    top-1 agreement   greedy texts changed");
    for (codec, damages) in codecs.iter().zip(&mut damages) {
        for (way, damage) in ["up", "both"].iter().zip(damages) {
            damage.kl.sort_by(f64::total_cmp);
            let positions = damage.kl.len();
            println!(
                "{:<6} {way:<5} {:9.2e} {:9.2e}  {:8.2} %        {:4} of {}",
                codec.map_or("ulp", Codec::name),
                damage.kl.iter().sum::<f64>() / positions as f64,
                damage.kl[positions * 99 / 100],
                100.0 * damage.agreed as f64 / positions as f64,
                damage.changed,
                prompts.len(),
            );
        }
    }
}

/// One prompt: answered with f32 rows, then compared.
fn measure(
    model: &mut Model,
    prompt: &[TokenId],
    codecs: &[Option<Codec>],
    damages: &mut [[Damage; 2]],
) {
    let mut tokens = prompt.to_vec();
    let (mut wanted, mut fresh) = (vec![], 0);
    while wanted.len() < ANSWER_TOKENS {
        let shallow = model.shallow(fresh, &tokens[fresh..]);
        fresh = tokens.len();
        let hidden = model.hidden;
        let deep = model.deep(&shallow);
        let last = deep[deep.len() - hidden..].to_vec();
        let logits = model.logits(&last);
        let token = argmax(&logits);
        wanted.push(logits);
        if model.tokenizer.is_end(token) {
            break;
        }
        tokens.push(token);
    }
    // The last decision's token has no row.
    tokens.truncate(prompt.len() + wanted.len() - 1);
    let hidden = model.hidden;
    let shallow = model.shallow(0, &tokens);
    let first = prompt.len() - 1;
    for (codec, damages) in codecs.iter().zip(damages) {
        let deep = model.deep(&crossed(*codec, &shallow, hidden))[first * hidden..].to_vec();
        let back = crossed(codec.map(Codec::down), &deep, hidden);
        for (damage, rows) in damages.iter_mut().zip([deep, back]) {
            let mut same = true;
            for (row, wanted) in rows.chunks_exact(hidden).zip(&wanted) {
                let logits = model.logits(row);
                let agrees = argmax(&logits) == argmax(wanted);
                damage.kl.push(divergence(wanted, &logits));
                damage.agreed += usize::from(agrees);
                same &= agrees;
            }
            damage.changed += usize::from(!same);
        }
    }
}

/// Rows through a codec; through none, nudged by an ulp.
fn crossed(codec: Option<Codec>, rows: &[f32], hidden: usize) -> Vec<f32> {
    let Some(codec) = codec else {
        return rows.iter().map(|number| number * (1.0 + f32::EPSILON)).collect();
    };
    let mut bytes = vec![0; rows.len() / hidden * codec.row_bytes(hidden)];
    let mut back = vec![0.0; rows.len()];
    codec.encode(rows, hidden, &mut bytes).expect("a good model's rows are finite");
    codec.decode(&bytes, hidden, &mut back).expect("its own bytes");
    back
}

fn argmax(logits: &[f32]) -> TokenId {
    let first = logits.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
    first.expect("a vocabulary").0 as TokenId
}

/// Kullback-Leibler divergence of `got` from `wanted`, in nats.
fn divergence(wanted: &[f32], got: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
        f64::from(most) + sum.ln()
    };
    let (wanted_sum, got_sum) = (log_sum(wanted), log_sum(got));
    let terms = wanted.iter().zip(got).map(|(&wanted, &got)| {
        let log = f64::from(wanted) - wanted_sum;
        log.exp() * (log - (f64::from(got) - got_sum))
    });
    terms.sum::<f64>().max(0.0)
}

/// `count` prompts, spread over the file; those that are too long are left out.
fn read(path: &Path, tokenizer: &Tokenizer, count: usize) -> Vec<Vec<TokenId>> {
    let text = std::fs::read_to_string(path).expect("the file of prompts can be read");
    let prompts: Vec<_> = text
        .lines()
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).expect("JSON in each line");
            let prompt = value["turns"][0].as_str().or(value["prompt"].as_str());
            let message = Message::new(Role::User, prompt.expect("turns or prompt in each line"));
            tokenizer.encode_chat(&[message], &ChatOptions::at(0)).expect("a prompt")
        })
        .filter(|tokens| tokens.len() + ANSWER_TOKENS <= ROWS_MAX)
        .collect();
    let count = count.min(prompts.len());
    (0..count).map(|index| prompts[index * prompts.len() / count].clone()).collect()
}
