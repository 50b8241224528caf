//! The CPU kernels: time, rate, and percent of what this machine can do, measured in the same run.
//!
//! Weights go round over more copies than the caches hold, as in decoding. One thread unless the
//! line says otherwise. Arguments: `--threads N` (default 1), `--level L`, and a word that the
//! lines must hold. Times on a shared machine are noise; quote ratios of lines of one run.

use std::time::Duration;

use clap::Parser;
use hat_benches::{Limits, Spread, made_up, noise, time};
use hat_compute::backend::cpu::{CpuBackend, CpuConfig, CpuWeight, Level};
use hat_compute::backend::{AttendArgs, Backend, LinearArgs, RopeArgs, Write};
use hat_loader::{DType, layout};
use hat_plan::{AttendShape, BatchBuffers, Computes as _, KvShape, PAGE_SIZE};

const BUDGET: Duration = Duration::from_millis(250);
/// Bytes of weights, more than the last cache of most machines.
const COLD_BYTES: usize = 96 << 20;

type Buffer = <CpuBackend as Backend>::Buffer;

/// Limit that a line is measured against.
#[derive(Clone, Copy)]
enum Bound {
    Bytes(usize),
    Whole(usize),
    Fused(usize),
}

struct Report {
    limits: Limits,
    only: Option<String>,
}

impl Report {
    fn wants(&self, what: &str) -> bool {
        self.only.as_ref().is_none_or(|only| what.contains(only.as_str()))
    }

    fn line(&self, what: &str, timing: Spread, bound: Bound) {
        let (count, unit, limit) = match bound {
            Bound::Bytes(bytes) => (bytes, "GB/s", Some(self.limits.read_bytes)),
            Bound::Whole(count) => (count, "GMAC/s", self.limits.whole),
            Bound::Fused(count) => (count, "GFMA/s", self.limits.fused),
        };
        let rate = count as f64 / timing.median;
        let percent = |seconds: f64| match limit {
            Some(limit) => format!("{:.0} %", count as f64 / seconds / limit * 100.0),
            None => "-".to_owned(),
        };
        let (percent, best) = (percent(timing.median), percent(timing.least));
        let [median, min, max] = [timing.median, timing.least, timing.most].map(|s| s * 1e3);
        let rate = rate / 1e9;
        print!("{what:<42} {median:8.3} ms ({min:.3}-{max:.3}) ");
        println!("{rate:6.2} {unit:<6} {percent:>5} (best {best})");
    }
}

/// A matrix of noise.
fn matrix(b: &mut CpuBackend, dtype: DType, n: usize, k: usize) -> CpuWeight {
    b.weight(&made_up("noise", dtype, &[n, k])).expect("a matrix")
}

fn buffer(b: &mut CpuBackend, rows: usize, columns: usize) -> Buffer {
    let mut buffer = b.alloc(rows, columns).expect("memory");
    let numbers: Vec<f32> =
        noise(rows * columns).iter().map(|x| f32::from(*x) / 128.0 - 1.0).collect();
    b.upload(&numbers[..rows * columns], &mut buffer);
    buffer
}

fn linear(b: &mut CpuBackend, report: &Report) {
    let (n, k) = (1536, 1536);
    for dtype in
        [DType::Q4_1, DType::Q8_0, DType::Q4_0, DType::Q6K, DType::F16, DType::Bf16, DType::F32]
    {
        if !report.wants(&format!("linear {}", dtype.name())) {
            continue;
        }
        let bytes = layout::packed_bytes(dtype, n, k).expect("whole blocks");
        let weights: Vec<_> = (0..COLD_BYTES / bytes + 1).map(|_| matrix(b, dtype, n, k)).collect();
        for rows in [1, 2, 4, 8, 32, 256] {
            let (x, mut out) = (buffer(b, rows, k), buffer(b, rows, n));
            let mut turn = 0;
            let timing = time(BUDGET, || {
                b.linear(
                    rows,
                    &x,
                    Write::Store,
                    LinearArgs::of(&weights[turn % weights.len()], &mut out),
                );
                turn += 1;
            });
            let macs = rows * n * k;
            let bound = match (rows, dtype) {
                (1 | 2, _) => Bound::Bytes(bytes),
                (_, DType::F16 | DType::Bf16 | DType::F32) => Bound::Fused(macs),
                _ => Bound::Whole(macs),
            };
            report.line(&format!("linear {} {rows} x {n} x {k}", dtype.name()), timing, bound);
        }
    }
}

/// A plan of the last `rows` rows of one sequence.
fn plan(rows: usize, length: usize) -> BatchBuffers {
    let number = |count: usize| u32::try_from(count).expect("few rows");
    let pages = (0..number(length.div_ceil(PAGE_SIZE))).collect::<Vec<u32>>();
    let position = number(length - rows);
    let mut plan = BatchBuffers::default();
    plan.clear();
    plan.push_committed(position, number(rows));
    plan.end_sequence(&pages);
    plan
}

fn attend(b: &mut CpuBackend, report: &Report) {
    for (heads, kv_heads, head_dim) in [(9, 3, 64), (32, 8, 128), (32, 32, 128)] {
        for (rows, length) in [(1, 1024usize), (256, 512)] {
            let what = format!("attend {heads}/{kv_heads} x {head_dim}, {rows} rows to {length}");
            if !report.wants(&what) {
                continue;
            }
            let shape = AttendShape { heads, kv_heads, head_dim, window: None };
            let pages = length.div_ceil(PAGE_SIZE);
            let mut kv = b.kv(KvShape { layers: 1, pages, kv_heads, head_dim }).expect("memory");
            let all = plan(length, length);
            let (mut q, mut k) =
                (buffer(b, length, heads * head_dim), buffer(b, length, kv_heads * head_dim));
            let (v, angles) = (buffer(b, length, kv_heads * head_dim), buffer(b, length, head_dim));
            let (begun, layer) = (b.begin(all.batch(), &shape, &kv), 0);
            let (angles, v) = (&angles, &v);
            b.rope_append(begun, RopeArgs { layer, angles, q: &mut q, k: &mut k, v, kv: &mut kv });
            let (some, mut out) = (plan(rows, length), buffer(b, rows, heads * head_dim));
            let begun = b.begin(some.batch(), &shape, &kv);
            let timing = time(BUDGET, || {
                b.attend(begun, AttendArgs { layer, q: &q, kv: &kv, out: &mut out });
            });
            let keys: usize = some.batch().positions.iter().map(|p| *p as usize + 1).sum();
            let bound = if rows == 1 {
                Bound::Bytes(length * kv_heads * head_dim * 4)
            } else {
                Bound::Fused(keys * heads * head_dim * 2)
            };
            report.line(&what, timing, bound);
        }
    }
}

fn elementwise(b: &mut CpuBackend, report: &Report) {
    let (rows, columns) = (512, 1536);
    let mut x = buffer(b, rows, columns);
    let weight = b.weight(&made_up("ones", DType::F32, &[columns])).expect("a vector");
    let mut out = buffer(b, rows, columns);
    if report.wants("rms_norm") {
        let timing = time(BUDGET, || b.rms_norm(rows, &x, &weight, 1e-5, &mut out));
        report.line(
            &format!("rms_norm {rows} x {columns}"),
            timing,
            Bound::Bytes(rows * columns * 8),
        );
    }
    if report.wants("quantise") {
        // A matrix of one panel: almost all of the time is the quantisation of its input.
        let weight = matrix(b, DType::Q4_1, 1, columns);
        let mut narrow = buffer(b, rows, 1);
        let numbers = vec![0.5; rows * columns];
        let upload = time(BUDGET, || b.upload(&numbers, &mut x));
        let timing = time(BUDGET, || {
            b.upload(&numbers, &mut x);
            b.linear(rows, &x, Write::Store, LinearArgs::of(&weight, &mut narrow));
        });
        let seconds = timing.median - upload.median;
        let timing = Spread { median: seconds, least: seconds, most: seconds };
        report.line(
            &format!("quantise (and one panel) {rows} x {columns}"),
            timing,
            Bound::Bytes(rows * columns * 4),
        );
    }
}

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 1)]
    threads: usize,
    #[arg(long, value_parser = level, default_value = "auto")]
    level: Level,
    only: Option<String>,
}

fn level(word: &str) -> Result<Level, &'static str> {
    [Level::Auto, Level::Portable, Level::Avx2, Level::Avx512, Level::Neon]
        .into_iter()
        .find(|level| format!("{level:?}").to_lowercase() == word)
        .ok_or("auto, portable, avx2, avx512 or neon")
}

fn main() {
    let Args { threads, level, only } = hat_benches::arguments();
    let limits = Limits::measure(threads);
    println!("{limits}");
    let config = CpuConfig { threads, level };
    let mut b = CpuBackend::new(config).expect("the best level");
    println!("{}", b.describe());
    let mut report = Report { limits, only };
    for section in [linear, attend, elementwise] {
        // A neighbour on the machine may have taken its share during the first measurement.
        report.limits = report.limits.max(Limits::measure(threads));
        section(&mut b, &report);
    }
    println!("at last: {}", report.limits);
}
