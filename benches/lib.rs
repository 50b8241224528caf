//! Shared measuring of the benches: bounds of this machine beside every number.

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions, behind a check of the CPU")]
mod peak;

use std::hint::black_box;
use std::time::{Duration, Instant};

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

/// Median, least and largest.
///
/// # Panics
/// If there is no value.
#[must_use]
pub fn spread(values: impl IntoIterator<Item = f64>) -> (f64, f64, f64) {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
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
    let best = (0..5).map(|_| {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in numbers.chunks(part).skip(1) {
                scope.spawn(|| black_box(sum(part)));
            }
            black_box(sum(&numbers[..part.min(numbers.len())]));
        });
        start.elapsed().as_secs_f64()
    });
    READ_BYTES as f64 / best.fold(f64::INFINITY, f64::min)
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

/// Seconds of one run: the median of several, and their spread.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Median.
    pub seconds: f64,
    /// Fastest.
    pub min: f64,
    /// Slowest.
    pub max: f64,
}

/// Runs `op` once to warm up, then for about `budget`, at least five times.
pub fn time(budget: Duration, mut op: impl FnMut()) -> Timing {
    op();
    let (start, mut runs) = (Instant::now(), Vec::new());
    while runs.len() < 5 || start.elapsed() < budget {
        let start = Instant::now();
        op();
        runs.push(start.elapsed().as_secs_f64());
    }
    runs.sort_by(f64::total_cmp);
    Timing { seconds: runs[runs.len() / 2], min: runs[0], max: runs[runs.len() - 1] }
}
