//! The CUDA kernels on a GPU: time, rate, and percent of what this GPU can do.
//!
//! Arguments: `--gpu N` (default 0), `--tflops N` (the GPU's dense f16 peak, by its data sheet, for
//! percents of it), `--small` (shapes that the emulator runs, to try the bench itself), and a word
//! that the lines must hold. Weights and KV go round over more copies than the L2 holds. The
//! bandwidth that percents are of is what `silu_mul` reaches in the same run on large arrays.
//! Without a GPU it says why and ends.

use std::time::Instant;

use hat_cuda::attend::{Cut, Parts, attend};
use hat_cuda::bound::{self, Work};
use hat_cuda::driver::{Cuda, CudaMemory};
use hat_cuda::gemv::{Gemv, Write, gemv};
use hat_cuda::gpu::{Gpu as _, GpuError, Memory as _};
use hat_cuda::kv::{Kv, KvShape};
use hat_cuda::plan::{Heads, PAGE_SIZE, Plan, PlanOnGpu};
use hat_cuda::quantise_rows::{BLOCK, Q8};
use hat_cuda::silu_mul::silu_mul;
use hat_cuda::table::{Numbers, Table};

/// Timed runs of each line; the median counts.
const RUNS: usize = 7;
/// More than the L2 of any GPU that the kernels are for.
const COLD_BYTES: usize = 128 << 20;

struct Bench {
    gpu: Cuda,
    small: bool,
    tflops: Option<f64>,
    only: Option<String>,
    /// Bytes a second that a large copy reaches.
    stream: f64,
}

fn main() -> Result<(), GpuError> {
    let (mut ordinal, mut tflops, mut small, mut only) = (0, None, false, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|text| text.parse::<f64>().ok());
        match argument.as_str() {
            "--gpu" => ordinal = number().unwrap_or(0.0) as usize,
            "--tflops" => tflops = number(),
            "--small" => small = true,
            "--bench" => {}
            _ => only = Some(argument),
        }
    }
    let gpu = match Cuda::open(ordinal) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("nothing to measure: {error}");
            return Ok(());
        }
    };
    println!("{}", gpu.describe());
    let mut bench = Bench { gpu, small, tflops, only, stream: 0.0 };
    bench.stream()?;
    bench.products()?;
    bench.verify()?;
    bench.prefill()?;
    bench.launches()
}

impl Bench {
    fn wants(&self, what: &str) -> bool {
        self.only.as_ref().is_none_or(|only| what.contains(only.as_str()))
    }

    /// Median seconds of `work`, which is given the number of the run and queues `times` launches.
    fn time(
        &mut self,
        times: usize,
        mut work: impl FnMut(&mut Cuda, usize) -> Result<(), GpuError>,
    ) -> Result<f64, GpuError> {
        let (probe, mut byte) = (self.gpu.alloc(1, "a probe")?, [0u8]);
        let mut seconds = Vec::with_capacity(RUNS);
        // The first two are for clocks, caches and graphs.
        for run in 0..RUNS + 2 {
            let begin = Instant::now();
            for turn in 0..times {
                work(&mut self.gpu, turn)?;
            }
            self.gpu.download(&probe, 0, &mut byte)?;
            if run >= 2 {
                seconds.push(begin.elapsed().as_secs_f64() / times as f64);
            }
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[RUNS / 2])
    }

    fn line(&self, what: &str, seconds: f64, work: Work) {
        let (bytes, flops) = (work.bytes as f64 / seconds, work.flops as f64 / seconds);
        let peak = match self.tflops {
            Some(tflops) => format!(", {:.0} % of the peak", flops / tflops / 1e10),
            None => String::new(),
        };
        let (micros, percent) = (seconds * 1e6, bytes / self.stream * 100.0);
        let (giga, tera) = (bytes / 1e9, flops / 1e12);
        print!("{what:<36} {micros:10.1} us  {giga:8.1} GB/s {percent:4.0} % of stream");
        println!("  {tera:7.2} TFLOP/s{peak}");
    }

    fn room(&mut self, bytes: usize, number: u8) -> Result<CudaMemory, GpuError> {
        let mut memory = self.gpu.alloc(bytes, "a bench")?;
        self.gpu.upload(&vec![number; bytes], &mut memory, 0)?;
        Ok(memory)
    }

    fn copies(&self, bytes: usize) -> usize {
        if self.small { 2 } else { COLD_BYTES / bytes + 1 }
    }

    fn stream(&mut self) -> Result<(), GpuError> {
        let count = if self.small { 1 << 12 } else { 64 << 20 };
        let (mut gate, up) = (self.room(4 * count, 0)?, self.room(4 * count, 0)?);
        let seconds = self.time(4, |gpu, _| silu_mul(gpu, gate.slice_mut(), up.slice()))?;
        let work = bound::silu_mul(count);
        self.stream = work.bytes as f64 / seconds;
        self.line("stream (silu_mul of large arrays)", seconds, work);
        Ok(())
    }

    fn products(&mut self) -> Result<(), GpuError> {
        let (columns, outputs) = if self.small { (256, 64) } else { (4096, 4096) };
        for numbers in [Numbers::Q4_1, Numbers::Q4_0, Numbers::Q8_0] {
            let bytes = numbers.panel_bytes(outputs, columns).expect("whole blocks");
            let copies = self.copies(bytes);
            for rows in [1, 8, 64] {
                let what = format!("gemv {numbers:?} {columns}x{outputs}, {rows} rows");
                if !self.wants(&what) {
                    continue;
                }
                // Scales of 0x2222 are small and finite.
                let all = (0..copies).map(|_| self.room(bytes, 0x22));
                let weights = all.collect::<Result<Vec<_>, _>>()?;
                let q = self.room(rows * columns, 1)?;
                let scales = 4 * rows * columns / BLOCK;
                let (d, s) = (self.room(scales, 0x22)?, self.room(scales, 0x22)?);
                let mut out = self.room(4 * rows * outputs, 0)?;
                let seconds = self.time(copies, |gpu, turn| {
                    let to = Gemv {
                        x: Q8 { q: q.slice(), d: d.slice(), s: s.slice() },
                        weight: Table::new(weights[turn].slice(), numbers, outputs, columns),
                        bias: None,
                        write: Write::Store,
                        out: out.slice_mut(),
                    };
                    gemv(gpu, rows, to)
                })?;
                self.line(&what, seconds, bound::gemv(numbers, rows, columns, outputs));
            }
        }
        Ok(())
    }

    /// Rows that verify drafts: many sequences, few rows each, K and V from memory.
    fn verify(&mut self) -> Result<(), GpuError> {
        let (sequences, context, rows) = if self.small { (2, 40, 2) } else { (30, 1024, 8) };
        self.attention("verify", Cut::Auto, sequences, context, rows)
    }

    /// A chunk of one prompt: its products are the bound.
    fn prefill(&mut self) -> Result<(), GpuError> {
        let (context, rows) = if self.small { (0, 40) } else { (512, 512) };
        self.attention("prefill", Cut::Prefill, 1, context, rows)
    }

    fn attention(
        &mut self,
        kind: &str,
        cut: Cut,
        sequences: usize,
        context: usize,
        rows: usize,
    ) -> Result<(), GpuError> {
        for (heads, kv_heads, head_dim) in [(32, 32, 128), (32, 8, 128), (9, 3, 64)] {
            let what = format!("{kind} {heads}/{kv_heads}x{head_dim} {sequences}x{rows}@{context}");
            if !self.wants(&what) {
                continue;
            }
            let heads = Heads { heads, kv_heads, head_dim, window: None };
            let pages = (context + rows).div_ceil(PAGE_SIZE);
            let numbers = PlanArrays::new(sequences, context, rows, pages);
            let count = sequences * rows;
            let mut plan = PlanOnGpu::new(&mut self.gpu, count, 0, sequences * pages)?;
            plan.write(&mut self.gpu, &numbers.plan(), &heads, sequences * pages)?;
            let kv_bytes = 4 * sequences * pages * PAGE_SIZE * kv_heads * head_dim;
            let layers = self.copies(kv_bytes);
            let shape = KvShape { layers, pages: sequences * pages, kv_heads, head_dim };
            let mut kv = Kv::new(&mut self.gpu, shape)?;
            for memory in kv.memory_mut() {
                self.gpu.upload(&vec![0x22u8; memory.bytes()], memory, 0)?;
            }
            let splits = (context + rows).div_ceil(256);
            let mut parts = Parts::new(&mut self.gpu, &heads, count, splits)?;
            let bytes = 4 * count * heads.heads * head_dim;
            let (q, mut out) = (self.room(bytes, 0x22)?, self.room(bytes, 0)?);
            let seconds = self.time(layers, |gpu, layer| {
                let (q, out) = (q.slice(), out.slice_mut());
                attend(gpu, &plan, &heads, layer, cut, q, &kv, &mut parts, out)
            })?;
            let keys: Vec<usize> = (context + 1..=context + rows).collect();
            let work = (0..sequences).map(|_| bound::attend(&heads, &keys)).sum();
            self.line(&what, seconds, work);
        }
        Ok(())
    }

    /// What a launch costs beside its work: a run of small ones, one by one the
    /// first time and as a graph after that.
    fn launches(&mut self) -> Result<(), GpuError> {
        let mut gate = self.room(1024, 0)?;
        let up = self.room(1024, 0)?;
        let seconds = self.time(200, |gpu, _| silu_mul(gpu, gate.slice_mut(), up.slice()))?;
        println!("launch of a small kernel {:31.2} us", seconds * 1e6);
        println!("{:?}", self.gpu.launch_counts());
        Ok(())
    }
}

/// The arrays of a plan of `sequences` chains with `rows` rows each behind `context` others.
struct PlanArrays {
    positions: Vec<u32>,
    prefix_len: Vec<u32>,
    tail_indptr: Vec<u32>,
    q_indptr: Vec<u32>,
    page_indptr: Vec<u32>,
    page_indices: Vec<u32>,
}

impl PlanArrays {
    fn new(sequences: usize, context: usize, rows: usize, pages: usize) -> Self {
        let range = |range: std::ops::Range<usize>| range.map(|number| number as u32);
        let each = |step: usize| (0..=sequences).map(|i| (i * step) as u32).collect();
        let positions = (0..sequences).flat_map(|_| range(context..context + rows));
        let positions: Vec<u32> = positions.collect();
        Self {
            prefix_len: positions.iter().map(|position| position + 1).collect(),
            positions,
            tail_indptr: vec![0; sequences * rows + 1],
            q_indptr: each(rows),
            page_indptr: each(pages),
            page_indices: range(0..sequences * pages).collect(),
        }
    }

    fn plan(&self) -> Plan<'_> {
        Plan {
            positions: &self.positions,
            slots: &self.positions,
            prefix_len: &self.prefix_len,
            tail_indptr: &self.tail_indptr,
            tail_slots: &[],
            q_indptr: &self.q_indptr,
            page_indptr: &self.page_indptr,
            page_indices: &self.page_indices,
        }
    }
}
