//! The CPU kernels: time, rate, and percent of what this machine can do, measured in the same run.
//!
//! Weights go round over more copies than the caches hold, as in decoding. One thread unless the
//! line says otherwise. Arguments: `--threads N` (default 1), `--level L`, and a word that the
//! lines must hold. Times on a shared machine are noise; quote ratios of lines of one run.

use std::time::Duration;

use clap::Parser;
use hat_benches::{Limits, Timing, time};
use hat_compute::backend::cpu::{CpuBackend, CpuConfig, CpuWeight, Level};
use hat_compute::backend::{AttendArgs, Backend, LinearArgs, RopeArgs, Write};
use hat_loader::{DType, Layout, Tensor, TensorBytes, layout};
use hat_plan::{AttendBatch, AttendShape, Computes as _, KvShape, PAGE_SIZE};

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

    fn line(&self, what: &str, timing: Timing, bound: Bound) {
        let (count, unit, limit) = match bound {
            Bound::Bytes(bytes) => (bytes, "GB/s", Some(self.limits.read_bytes)),
            Bound::Whole(count) => (count, "GMAC/s", self.limits.whole),
            Bound::Fused(count) => (count, "GFMA/s", self.limits.fused),
        };
        let rate = count as f64 / timing.seconds;
        let percent = |seconds: f64| match limit {
            Some(limit) => format!("{:.0} %", count as f64 / seconds / limit * 100.0),
            None => "-".to_owned(),
        };
        let (percent, best) = (percent(timing.seconds), percent(timing.min));
        let [median, min, max] = [timing.seconds, timing.min, timing.max].map(|s| s * 1e3);
        let rate = rate / 1e9;
        print!("{what:<42} {median:8.3} ms ({min:.3}-{max:.3}) ");
        println!("{rate:6.2} {unit:<6} {percent:>5} (best {best})");
    }
}

fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    std::iter::repeat_with(next).take(count.div_ceil(8)).flat_map(u64::to_le_bytes).collect()
}

/// A matrix of noise, without infinite or subnormal scales.
fn matrix(b: &mut CpuBackend, dtype: DType, n: usize, k: usize) -> CpuWeight {
    let mut bytes = noise(layout::packed_bytes(dtype, n, k).expect("whole blocks"));
    let panel_block = layout::panel_block_bytes(dtype);
    for block in bytes.chunks_exact_mut(panel_block) {
        let scales = match dtype {
            DType::Q4_0 | DType::Q4_1 => 256..block.len(),
            DType::Q8_0 => 512..block.len(),
            DType::Q6K => 0..32,
            _ => 0..block.len(),
        };
        if dtype == DType::F32 {
            block.as_chunks_mut::<4>().0.iter_mut().for_each(|b| b[3] = b[3] & 0x80 | 0x3c);
        } else {
            block[scales].as_chunks_mut::<2>().0.iter_mut().for_each(|b| b[1] = b[1] & 0x80 | 0x2c);
        }
    }
    let bytes = TensorBytes::owned(bytes);
    let (name, shape) = ("noise".to_owned(), vec![n, k]);
    let tensor = Tensor { name, dtype, layout: Layout::Panel16, shape, bytes };
    b.weight(&tensor).expect("a matrix")
}

fn ones(b: &mut CpuBackend, n: usize) -> CpuWeight {
    let bytes = TensorBytes::owned(1f32.to_le_bytes().repeat(n));
    let (name, shape) = ("ones".to_owned(), vec![n]);
    let tensor = Tensor { name, dtype: DType::F32, layout: Layout::Rows, shape, bytes };
    b.weight(&tensor).expect("a vector")
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
struct Sequence {
    positions: Vec<u32>,
    prefix_len: Vec<u32>,
    tail_indptr: Vec<u32>,
    q_indptr: [u32; 2],
    page_indptr: [u32; 2],
    pages: Vec<u32>,
}

impl Sequence {
    fn new(rows: usize, length: usize) -> Self {
        let positions: Vec<u32> = (length - rows..length).map(|p| p as u32).collect();
        let pages: Vec<u32> = (0..length.div_ceil(PAGE_SIZE) as u32).collect();
        Self {
            prefix_len: positions.iter().map(|p| p + 1).collect(),
            positions,
            tail_indptr: vec![0; rows + 1],
            q_indptr: [0, rows as u32],
            page_indptr: [0, pages.len() as u32],
            pages,
        }
    }

    fn plan(&self) -> AttendBatch<'_> {
        AttendBatch {
            positions: &self.positions,
            slots: &self.positions,
            prefix_len: &self.prefix_len,
            tail_indptr: &self.tail_indptr,
            tail_slots: &[],
            q_indptr: &self.q_indptr,
            page_indptr: &self.page_indptr,
            page_indices: &self.pages,
        }
    }
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
            let all = Sequence::new(length, length);
            let (mut q, mut k) =
                (buffer(b, length, heads * head_dim), buffer(b, length, kv_heads * head_dim));
            let (v, angles) = (buffer(b, length, kv_heads * head_dim), buffer(b, length, head_dim));
            let (plan, layer) = (b.begin(all.plan(), &shape, &kv), 0);
            let (angles, v) = (&angles, &v);
            b.rope_append(plan, RopeArgs { layer, angles, q: &mut q, k: &mut k, v, kv: &mut kv });
            let (some, mut out) = (Sequence::new(rows, length), buffer(b, rows, heads * head_dim));
            let plan = b.begin(some.plan(), &shape, &kv);
            let timing = time(BUDGET, || {
                b.attend(plan, AttendArgs { layer, q: &q, kv: &kv, out: &mut out });
            });
            let keys: usize = some.positions.iter().map(|p| *p as usize + 1).sum();
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
    let (weight, mut out) = (ones(b, columns), buffer(b, rows, columns));
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
        let seconds = timing.seconds - upload.seconds;
        let timing = Timing { seconds, min: seconds, max: seconds };
        report.line(
            &format!("quantise (and one panel) {rows} x {columns}"),
            timing,
            Bound::Bytes(rows * columns * 4),
        );
    }
}

/// One decoder layer of SmolLM2-135M.
struct DecoderLayer {
    q: CpuWeight,
    k: CpuWeight,
    v: CpuWeight,
    o: CpuWeight,
    gate: CpuWeight,
    up: CpuWeight,
    down: CpuWeight,
}

impl DecoderLayer {
    fn noise(b: &mut CpuBackend, hidden: usize, kv_width: usize, inner: usize) -> Self {
        let mut matrix = |n, k| matrix(b, DType::Q4_1, n, k);
        Self {
            q: matrix(hidden, hidden),
            k: matrix(kv_width, hidden),
            v: matrix(kv_width, hidden),
            o: matrix(hidden, hidden),
            gate: matrix(inner, hidden),
            up: matrix(inner, hidden),
            down: matrix(hidden, inner),
        }
    }
}

/// The forward pass of SmolLM2-135M, head included, over noise: all that a step does but sampling.
fn model(b: &mut CpuBackend, report: &Report) {
    if !report.wants("model") {
        return;
    }
    let (hidden, inner, vocab, layers) = (576, 1536, 49152, 30);
    let shape = AttendShape { heads: 9, kv_heads: 3, head_dim: 64, window: None };
    let kv_width = shape.kv_heads * shape.head_dim;
    let weights: Vec<_> =
        (0..layers).map(|_| DecoderLayer::noise(b, hidden, kv_width, inner)).collect();
    let (head, norm) = (matrix(b, DType::Q8_0, vocab, hidden), ones(b, hidden));
    let per_layer = 2 * hidden * hidden + 2 * kv_width * hidden + 3 * hidden * inner;
    let q4 = |macs: usize| macs / 32 * 20;
    let bytes = layers * q4(per_layer) + vocab * hidden / 32 * 34;
    let length = 512;
    let inv_freq: Vec<f32> = (0..32).map(|i| 1e4f32.powf(-(i as f32) / 32.0)).collect();
    for rows in [1, 2, 4, 8, 16, 256] {
        let sequence = Sequence::new(rows, length);
        let plan = sequence.plan();
        let mut kv =
            b.kv(KvShape { layers, pages: 16, kv_heads: 3, head_dim: 64 }).expect("memory");
        let [mut x, mut n, mut q, mut a] = [(); 4].map(|()| buffer(b, rows, hidden));
        let [mut k, mut v] = [(); 2].map(|()| buffer(b, rows, kv_width));
        let mut gated = buffer(b, rows, inner);
        let (mut angles, tokens) = (buffer(b, rows, 64), vec![7; rows]);
        // Prefill needs the logits of the last row alone.
        let head_rows = if rows > 16 { 1 } else { rows };
        let mut logits = b.alloc(head_rows, vocab).expect("memory");
        let timing = time(BUDGET * 2, || {
            b.embed(&tokens, &head, &mut x);
            b.rope_angles(plan.positions, &inv_freq, &mut angles);
            let begun = b.begin(plan, &shape, &kv);
            for (layer, w) in weights.iter().enumerate() {
                b.rms_norm(rows, &x, &norm, 1e-5, &mut n);
                let qkv = [(&w.q, &mut q), (&w.k, &mut k), (&w.v, &mut v)];
                let qkv = qkv.map(|(weight, out)| LinearArgs::of(weight, out));
                b.linear_each(rows, &n, qkv);
                let (q, k, kv) = (&mut q, &mut k, &mut kv);
                b.rope_append(begun, RopeArgs { layer, angles: &angles, q, k, v: &v, kv });
                b.attend(begun, AttendArgs { layer, q, kv, out: &mut a });
                b.linear(rows, &a, Write::Add, LinearArgs::of(&w.o, &mut x));
                b.rms_norm(rows, &x, &norm, 1e-5, &mut n);
                b.swiglu(rows, &n, &w.gate, &w.up, &mut gated);
                b.linear(rows, &gated, Write::Add, LinearArgs::of(&w.down, &mut x));
            }
            b.rms_norm(head_rows, &x, &norm, 1e-5, &mut n);
            b.linear(head_rows, &n, Write::Store, LinearArgs::of(&head, &mut logits));
        });
        let what = format!("model smollm2-135m q4_1, {rows} rows at {length}");
        let macs = rows * layers * per_layer + head_rows * vocab * hidden;
        let bound = if rows <= 2 { Bound::Bytes(bytes) } else { Bound::Whole(macs) };
        report.line(&what, timing, bound);
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
    for section in [model, linear, attend, elementwise] {
        // A neighbour on the machine may have taken its share during the first measurement.
        report.limits = report.limits.max(Limits::measure(threads));
        section(&mut b, &report);
    }
    println!("at last: {}", report.limits);
}
