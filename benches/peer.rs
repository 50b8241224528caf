//! Our side of `peers.py`: the whole default model in one process, a request a line on stdin.
//!
//! The script keeps this process beside the other engine and asks both in turn, so that the two
//! halves of a pair run within the same seconds. Requests, each answered by a line of JSON:
//!
//! | request | does |
//! |---|---|
//! | `tokens ID...` | sets the ids that all other requests read |
//! | `prefill ROWS` | rows in one step, logits of the last |
//! | `decode PROMPT COUNT` | `PROMPT` rows, then `COUNT` greedy tokens, by the whole model |
//! | `roles PROMPT COUNT` | the same by the device's and the cloud's submodel |
//! | `verify ROWS CONTEXT REPEATS` | rows after `CONTEXT` others in one step, logits of all |
//! | `limits` | read bandwidth and arithmetic of this machine, now |
//!
//! `ms` holds the times: one step each, or one token each. Only the work is timed, and neither
//! the prompt of a decode nor the context of a verify.

use std::fmt::Write as _;
use std::io::{BufRead as _, Write as _};
use std::time::Instant;

use hat_benches::Limits;
use hat_benches::halves::Halves;
use hat_compute::backend::cpu::CpuBackend;
use hat_compute::{WholeModel, open};
use hat_core::sample::Sampler;
use hat_engine::options::{Codec, Processor, SamplerConfig, TokenId};
use hat_engine::reference_run::through_codec;
use hat_plan::{Computes as _, DeviceForward as _};

/// Rows of one step at most: a prefill.
const STEP_ROWS_MAX: usize = 512;
/// Rows whose logits a step returns at most: a verify.
const VERIFY_ROWS_MAX: usize = 64;
/// Positions at most.
const CONTEXT_MAX: usize = 1024;

/// Both submodels, the whole model as one, and what they work in.
struct Peer {
    threads: usize,
    halves: Halves,
    whole: WholeModel<CpuBackend>,
    tokens: Vec<TokenId>,
    held: usize, // leading tokens whose K and V the submodels have
    hidden_size: usize,
    vocab_size: usize,
    logits: Vec<f32>, // [VERIFY_ROWS_MAX, vocab_size]
    sampler: Sampler,
}

impl Peer {
    fn open(threads: usize) -> Self {
        let halves = Halves::open(threads, STEP_ROWS_MAX, VERIFY_ROWS_MAX, CONTEXT_MAX);
        let (device, cloud, config) = (&halves.bundle, &halves.cloud, halves.bundle.config());
        let crossings = device.manifest().split_layer..config.num_hidden_layers;
        let backend = open::cpu(Processor::Auto, threads).expect("a backend");
        let cross = through_codec(Codec::F32);
        let (hidden_size, vocab_size) = (config.hidden_size, config.vocab_size);
        Self {
            threads,
            whole: WholeModel::load(backend, device, cloud, crossings, cross, CONTEXT_MAX)
                .expect("all layers"),
            halves,
            tokens: Vec::new(),
            held: 0,
            logits: vec![0.0; VERIFY_ROWS_MAX * vocab_size],
            sampler: Sampler::new(SamplerConfig::default(), vocab_size, 0).expect("greedy"),
            hidden_size,
            vocab_size,
        }
    }

    /// All layers for `tokens` at the positions from `first` on, in one step.
    fn layers(&mut self, first: usize, tokens: &[TokenId]) {
        self.halves.shallow(first, tokens);
        self.halves.deep();
    }

    /// Logits of the last row of the last step.
    fn last_logits(&mut self) {
        let Halves { device, step, .. } = &mut self.halves;
        let last = &step.hidden[step.hidden.len() - self.hidden_size..];
        device.head(last, &mut self.logits[..self.vocab_size]);
    }

    /// The greedy token after the logits of one row.
    fn choose(&mut self, position: usize) -> TokenId {
        let position = u32::try_from(position).expect("at most CONTEXT_MAX");
        let logits = &self.logits[..self.vocab_size];
        self.sampler.choose(logits, position).expect("finite logits").token
    }

    fn prefill(&mut self, rows: usize) -> Answer {
        let tokens = self.tokens[..rows].to_vec();
        let start = Instant::now();
        self.layers(0, &tokens);
        self.last_logits();
        self.held = rows;
        Answer { ms: vec![ms(start)], ids: vec![self.choose(rows)] }
    }

    /// Greedy tokens after a prompt; `next` runs one token and fills the logits.
    fn decode(
        &mut self,
        prompt: usize,
        count: usize,
        next: fn(&mut Self, usize, TokenId),
    ) -> Answer {
        let mut answer = Answer { ms: Vec::with_capacity(count), ids: Vec::with_capacity(count) };
        let tokens = self.tokens[..prompt].to_vec();
        self.whole.reset();
        self.held = 0;
        for (position, token) in tokens.into_iter().enumerate() {
            next(self, position, token);
        }
        let mut token = self.choose(prompt);
        for position in prompt..prompt + count {
            let start = Instant::now();
            next(self, position, token);
            token = self.choose(position + 1);
            answer.ms.push(ms(start));
            answer.ids.push(token);
        }
        answer
    }

    fn next_whole(&mut self, _: usize, token: TokenId) {
        let logits = &mut self.logits[..self.vocab_size];
        self.whole.step(token, Some(logits)).expect("finite rows");
    }

    fn next_roles(&mut self, position: usize, token: TokenId) {
        self.layers(position, &[token]);
        self.last_logits();
    }

    fn verify(&mut self, rows: usize, context: usize, repeats: usize) -> Answer {
        let tokens = self.tokens[..context + rows].to_vec();
        let (before, verified) = tokens.split_at(context);
        if self.held < context {
            for (i, step) in before.chunks(STEP_ROWS_MAX).enumerate() {
                self.layers(i * STEP_ROWS_MAX, step);
            }
        }
        self.held = context;
        let times = (0..=repeats).map(|_| {
            let start = Instant::now();
            self.layers(context, verified);
            let Halves { device, step, .. } = &mut self.halves;
            device.head(&step.hidden, &mut self.logits[..rows * self.vocab_size]);
            ms(start)
        });
        // The first one only warms up.
        let ms = times.skip(1).collect();
        Answer { ms, ids: vec![self.choose(context + rows)] }
    }

    /// Runs a request; `Err` says what is wrong with it.
    fn serve(&mut self, line: &str) -> Result<String, String> {
        let mut words = line.split_ascii_whitespace();
        let what = words.next().unwrap_or_default();
        let numbers = words
            .map(|word| word.parse::<u32>().map_err(|e| format!("`{word}`: {e}")))
            .collect::<Result<Vec<_>, _>>()?;
        if what == "tokens" {
            let bad = numbers.iter().find(|id| **id as usize >= self.vocab_size);
            return match bad {
                Some(id) => Err(format!("token {id} of {}", self.vocab_size)),
                None => {
                    (self.tokens, self.held) = (numbers, 0);
                    Ok(format!("{{\"tokens\": {}}}", self.tokens.len()))
                }
            };
        }
        let numbers: Vec<usize> = numbers.iter().map(|number| *number as usize).collect();
        let has = |rows: usize| {
            let most = self.tokens.len().min(CONTEXT_MAX);
            if rows <= most { Ok(()) } else { Err(format!("{rows} rows, but {most} at most")) }
        };
        let answer = match (what, numbers.as_slice()) {
            ("prefill", &[rows @ 1..=STEP_ROWS_MAX]) => {
                has(rows)?;
                self.prefill(rows)
            }
            ("decode" | "roles", &[prompt @ 1..=CONTEXT_MAX, count @ 1..=CONTEXT_MAX]) => {
                has(prompt)?;
                if prompt + count > CONTEXT_MAX {
                    return Err(format!("{prompt} + {count} positions, {CONTEXT_MAX} at most"));
                }
                let whole = what == "decode";
                self.decode(prompt, count, if whole { Self::next_whole } else { Self::next_roles })
            }
            ("verify", &[rows @ 1..=VERIFY_ROWS_MAX, context, repeats @ 1..=1000]) => {
                has(context.saturating_add(rows))?;
                self.verify(rows, context, repeats)
            }
            ("limits", []) => return Ok(limits(self.threads)),
            _ => return Err(format!("`{line}` is no request")),
        };
        Ok(answer.json())
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Times of one request, and the tokens that came of it.
struct Answer {
    ms: Vec<f64>,
    ids: Vec<TokenId>,
}

impl Answer {
    fn json(&self) -> String {
        format!("{{\"ms\": {:?}, \"ids\": {:?}}}", self.ms, self.ids)
    }
}

fn limits(threads: usize) -> String {
    let limits = Limits::measure(threads);
    let mut json = format!("{{\"read_bytes\": {:.0}", limits.read_bytes);
    for (name, rate) in [("fused", limits.fused), ("whole", limits.whole)] {
        let rate = rate.map_or("null".to_owned(), |rate| format!("{rate:.0}"));
        write!(json, ", \"{name}\": {rate}").expect("a string takes all");
    }
    json + "}"
}

#[derive(clap::Parser)]
struct Args {
    #[arg(long)]
    serve: bool,
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

fn main() {
    let Args { serve, threads } = hat_benches::arguments();
    if !serve {
        println!("peer: peers.py starts this with --serve; benches/README.md says how");
        return;
    }
    let mut peer = Peer::open(threads);
    let Halves { bundle, cloud, device, .. } = &peer.halves;
    let (describe, bytes) = (device.describe(), bundle.weights_bytes() + cloud.weights_bytes());
    let mut out = std::io::stdout().lock();
    writeln!(out, "{{\"describe\": {describe:?}, \"weights_bytes\": {bytes}}}").expect("a reader");
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a line of text");
        let answer = peer.serve(&line).unwrap_or_else(|error| format!("{{\"error\": {error:?}}}"));
        writeln!(out, "{answer}").and_then(|()| out.flush()).expect("a reader");
    }
}
