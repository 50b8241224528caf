//! Shared by the benches: measuring, and the bounds of this machine beside every number.

pub mod halves;
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions, behind a check of the CPU")]
mod peak;

use std::hint::black_box;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hat_emulator::{Calibration, Emulator, EmulatorConfig};
use hat_engine::options::Codec;
use hat_engine::{Engine, Event, Metrics, Request};
use hat_loader::{DType, Layout, Tensor, TensorBytes, layout};
use hat_program::pull;

/// The command line of a bench, without the flag that cargo adds.
#[must_use]
pub fn arguments<P: clap::Parser>() -> P {
    P::parse_from(std::env::args_os().filter(|argument| argument != "--bench"))
}

/// Two numbers with a comma between them.
///
/// # Errors
/// The text that is there instead.
pub fn pair(text: &str) -> Result<(f64, f64), String> {
    let both = text.split_once(',').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    both.ok_or_else(|| format!("{text} is no pair of numbers"))
}

/// A time in milliseconds.
///
/// # Errors
/// The text that is there instead.
pub fn millis(text: &str) -> Result<Duration, String> {
    let time = text.parse::<f64>().ok().map(|ms| Duration::try_from_secs_f64(ms / 1e3));
    time.and_then(Result::ok).ok_or_else(|| format!("{text} is no time"))
}

/// A codec by its name.
///
/// # Errors
/// The text that is there instead.
pub fn codec(name: &str) -> Result<Codec, String> {
    Codec::from_name(name).ok_or_else(|| format!("{name} is no codec"))
}

/// The bundle of the default model, which is fetched if it is not there.
///
/// # Panics
/// If it cannot be had.
#[must_use]
pub fn default_bundle() -> PathBuf {
    let cache = pull::cache_dir().expect("a cache directory");
    pull::default_bundle(&cache, pull::SPLIT_LAYER_DEFAULT, 0).expect("the default model")
}

/// Number of cores.
#[must_use]
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get())
}

/// Runs a request to its end; `see` is shown each event.
///
/// # Panics
/// If it ends in an error.
pub fn answer(engine: &Engine, request: Request, mut see: impl FnMut(&Event)) -> Metrics {
    for event in engine.generate(request).expect("a good request") {
        let event = event.expect("an answer");
        see(&event);
        if let Event::Done { metrics, .. } = event {
            return *metrics;
        }
    }
    unreachable!("an answer ends with Done")
}

/// A prompt of `rows` tokens that no other is like, and one token of an answer.
#[must_use]
pub fn prompt(rows: usize) -> Request {
    // Ids that each vocabulary has.
    let tokens = (0..rows).map(|index| (index * 7919 % 200 + 10) as u32).collect();
    Request::tokens(tokens).max_tokens(1).ignore_eos()
}

/// A link to `to` with this round trip and these rates up and down, in Mbit/s.
///
/// # Panics
/// If loopback does not work.
#[must_use]
pub fn start_link(to: SocketAddr, rtt: Duration, mbit: (f64, f64)) -> Emulator {
    let mut config = EmulatorConfig::new(to).rtt(rtt).mbit(mbit.0, mbit.1);
    config.calibration = Some(Calibration::measure(&config).expect("loopback works"));
    Emulator::start(config).expect("a free port")
}

/// Bytes at random, always the same.
pub fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    std::iter::repeat_with(next).take(count.div_ceil(8)).flat_map(u64::to_le_bytes).collect()
}

/// A vector of ones, or a matrix of noise as it lies in a bundle: exponents of its numbers, or of
/// the scales of its blocks, come from a narrow range, so that none is infinite or subnormal.
///
/// # Panics
/// If its rows are no whole blocks.
#[must_use]
pub fn made_up(name: &str, dtype: DType, shape: &[usize]) -> Tensor {
    let (name, shape) = (name.to_owned(), shape.to_vec());
    let &[n, k] = &shape[..] else {
        let bytes = TensorBytes::owned(1f32.to_le_bytes().repeat(shape[0]));
        return Tensor { name, dtype: DType::F32, layout: Layout::Rows, shape, bytes };
    };
    let mut bytes = noise(layout::packed_bytes(dtype, n, k).expect("whole blocks"));
    for block in bytes.chunks_exact_mut(layout::panel_block_bytes(dtype)) {
        let (scales, width, high) = match dtype {
            DType::F32 => (0..block.len(), 4, 0x3a),
            DType::Bf16 => (0..block.len(), 2, 0x3a),
            DType::Q4_0 | DType::Q4_1 => (256..block.len(), 2, 0x14),
            DType::Q8_0 => (512..block.len(), 2, 0x14),
            DType::Q6K => (0..32, 2, 0x14),
            _ => (0..block.len(), 2, 0x14),
        };
        for number in block[scales].chunks_exact_mut(width) {
            number[width - 1] = number[width - 1] & 0x80 | high;
        }
    }
    let bytes = TensorBytes::owned(bytes);
    Tensor { name, dtype, layout: Layout::Panel16, shape, bytes }
}

/// Median, least and largest of some values; of none, not a number.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Smallest.
    pub least: f64,
    /// Largest.
    pub most: f64,
}

/// The spread of some values.
#[must_use]
pub fn spread(values: impl IntoIterator<Item = f64>) -> Spread {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    Spread { median: at(values.len() / 2), least: at(0), most: at(values.len().saturating_sub(1)) }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self { median, least, most }, digits) = (self, f.precision().unwrap_or(3));
        let text = format!("{median:.digits$} ({least:.digits$} - {most:.digits$})");
        write!(f, "{text:<width$}", width = f.width().unwrap_or(0))
    }
}

/// Bytes of a copy, far more than any cache has.
const READ_BYTES: usize = 256 << 20;

/// Limits of this machine, measured now. Rates are a second, of all threads together.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Number of threads.
    pub threads: usize,
    /// Bytes read in sequence from memory.
    pub read_bytes: f64,
    /// Fused multiply-adds of f32; `None` where there is no measurement for this CPU.
    pub fused: Option<f64>,
    /// Multiply-adds of 8-bit whole numbers; `None` likewise.
    pub whole: Option<f64>,
}

impl Limits {
    /// Measures all of them; takes about half a second. The arithmetic of one thread counts for
    /// each.
    #[must_use]
    pub fn measure(threads: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        let (fused, whole) = (peak::fused(), peak::whole_numbers());
        #[cfg(not(target_arch = "x86_64"))]
        let (fused, whole): (Option<f64>, Option<f64>) = (None, None);
        let all = |rate: f64| rate * threads as f64;
        let (fused, whole) = (fused.map(all), whole.map(all));
        Self { threads, read_bytes: read_bandwidth(threads), fused, whole }
    }

    /// The larger of two measurements, each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        let larger = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| a.max(b));
        Self {
            threads: self.threads,
            read_bytes: self.read_bytes.max(other.read_bytes),
            fused: larger(self.fused, other.fused),
            whole: larger(self.whole, other.whole),
        }
    }
}

impl std::fmt::Display for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let giga = |rate: Option<f64>| {
            rate.map_or("not measured".to_owned(), |rate| format!("{:.1} G/s", rate / 1e9))
        };
        let read = giga(Some(self.read_bytes)).replace("G/s", "GB/s");
        let (fused, whole) = (giga(self.fused), giga(self.whole));
        write!(
            f,
            "limits of {} threads: read {read}, f32 fused multiply-add {fused}, ",
            self.threads
        )?;
        write!(f, "8-bit multiply-add {whole}")
    }
}

/// Bytes a second that `threads` threads read in sequence, the best of five passes.
#[must_use]
pub fn read_bandwidth(threads: usize) -> f64 {
    let numbers = vec![1u64; READ_BYTES / 8];
    let part = numbers.len().div_ceil(threads.max(1));
    let pass = || {
        std::thread::scope(|scope| {
            for part in numbers.chunks(part).skip(1) {
                scope.spawn(|| black_box(sum(part)));
            }
            black_box(sum(&numbers[..part.min(numbers.len())]));
        });
    };
    READ_BYTES as f64 / spread((0..5).map(|_| seconds(pass))).least
}

fn sum(numbers: &[u64]) -> u64 {
    let mut sums = [0u64; 16];
    for numbers in numbers.as_chunks::<16>().0 {
        for (sum, number) in sums.iter_mut().zip(numbers) {
            *sum |= number;
        }
    }
    sums.iter().fold(0, |a, b| a | b)
}

/// Seconds of one run of `op`.
pub fn seconds(op: impl FnOnce()) -> f64 {
    let start = Instant::now();
    op();
    start.elapsed().as_secs_f64()
}

/// Seconds of a run: `op` runs once to warm up, then for about `budget`, at least five times.
pub fn time(budget: Duration, mut op: impl FnMut()) -> Spread {
    op();
    let (start, mut runs) = (Instant::now(), Vec::new());
    while runs.len() < 5 || start.elapsed() < budget {
        runs.push(seconds(&mut op));
    }
    spread(runs)
}
