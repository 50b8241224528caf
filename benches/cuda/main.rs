//! The CUDA kernels on a GPU: time, rate, and percent of what this GPU can do.
//!
//!     cargo bench -p hat-benches --bench cuda -- [--gpu N] [WORD]
//!         [--models 7b,13b] [--weights q4_1,q8_0,f16] [--layers N] [--quick|--full]
//!         [--tflops N] [--json FILE] [--cost-file FILE] [--small]
//!
//! First the peaks: copies (by the driver and by kernels), and products from registers of f16 and
//! of bytes. Percents are of these, or of `--tflops` (the data sheet's dense f16 peak). Then the
//! kernels, those whose line holds WORD, by the GPU's own clock: weights and KV go round over more
//! copies than the L2 holds, and a sample is at least 5 ms long. Then, for each of `--models`, the
//! steps of a cloud: sessions with rows to verify in chains and as trees, chunks of a prompt,
//! through the engine's own layers with made-up weights; the bound of a step is the sum of its
//! launches', each the longer of bytes over the copies' rate and operations over the products'.
//! `--layers` loads fewer layers than the model has (as it happens by itself where memory is
//! short); times are for all of them, since the time of a layer and what stands outside of the
//! layers are told apart. `--quick` has a few shapes of each, draft trees among them, and `--full`
//! all combinations. `--json` appends a line for each number; `--cost-file` writes what `hat-sim`
//! opens, of the first model and type. `--small` is for a made-up driver that runs the emulator;
//! with no argument at all, as `cargo test` starts it, the bench tries itself there. Without a GPU
//! it says why and ends.

mod cost;
mod model;
mod step;
mod tried;

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use hat_cuda::attend::{Cut, Parts, attend};
use hat_cuda::bound::{self, Work};
use hat_cuda::driver::{Cuda, CudaMemory};
use hat_cuda::gpu::{Gpu as _, GpuError, Memory as _};
use hat_cuda::kv::{Kv, KvShape};
use hat_cuda::plan::{AttendShape, PAGE_SIZE, PlanOnGpu};
use hat_cuda::product::{Product, Write, linear};
use hat_cuda::quantise_rows::{BLOCK, Q8};
use hat_cuda::silu_mul::silu_mul;
use hat_cuda::table::{Table, WeightDType};
use hat_cuda::testkit::peak;

use crate::model::{Load, Model};
use crate::step::Wanted;

/// Timed runs of each line; the median counts.
const RUNS: usize = 7;
/// Bytes of a copy, more than the L2 of any GPU that the kernels are for.
const COLD_BYTES: usize = 128 << 20;
/// Most rounds of a sample, where a GPU's clock says that a round takes no time.
const ROUNDS_MAX: usize = 1000;
/// Shortest sample that is timed: what stands around the launches is small beside it.
const SAMPLE_SECONDS: f64 = 5e-3;

/// Measured peaks of the GPU.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// Bytes a second, read and written, of a large copy.
    pub copy: f64,
    /// Operations a second of f16 products.
    pub multiply: f64,
    /// The same of signed bytes.
    pub bytes: f64,
}

/// State shared by all lines of the table.
pub struct Bench {
    /// Shapes that the emulator runs.
    pub small: bool,
    /// Few shapes of each kind.
    pub quick: bool,
    /// Timed runs.
    pub runs: usize,
    /// Peaks that percents refer to.
    pub peaks: Peaks,
    only: Option<String>,
    lines: Option<File>,
}

impl Bench {
    /// A line for programs, if there is a file for them.
    pub fn json(&mut self, line: serde_json::Value) {
        if let Some(file) = &mut self.lines
            && let Err(error) = writeln!(file, "{line}")
        {
            println!("--json: {error}");
            self.lines = None;
        }
    }
}

/// The kernels by themselves.
struct Kernels<'a> {
    gpu: Cuda,
    bench: &'a mut Bench,
}

/// Arguments of the command line.
#[derive(clap::Parser)]
struct Arguments {
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    #[arg(long)]
    tflops: Option<f64>,
    #[arg(long)]
    small: bool,
    #[arg(value_name = "WORD")]
    only: Option<String>,
    #[arg(long)]
    json: Option<PathBuf>,
    #[arg(long)]
    cost_file: Option<PathBuf>,
    #[command(flatten)]
    wanted: Wanted,
}

fn main() -> std::process::ExitCode {
    let tried = std::env::args().nth(1).is_none();
    let done = if tried { tried::over_made_up_driver() } else { run(hat_benches::arguments()) };
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<(), String> {
    let Arguments { gpu: ordinal, tflops, small, only, json, cost_file, mut wanted } = arguments;
    if small {
        wanted.models = vec!["small".to_owned()];
    }
    let gpu = match Cuda::open(ordinal) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("nothing to measure: {error}");
            return Ok(());
        }
    };
    let name = gpu.describe();
    println!("{name}");
    let open = |path: PathBuf| {
        let file = File::options().append(true).create(true).open(&path);
        file.map_err(|error| format!("{}: {error}", path.display()))
    };
    let lines = json.map(open).transpose()?;
    let (runs, peaks) =
        (if small { 3 } else { RUNS }, Peaks { copy: 1.0, multiply: 1.0, bytes: 1.0 });
    let mut bench = Bench { small, quick: wanted.quick, runs, peaks, only, lines };
    bench.json(serde_json::json!({ "kind": "gpu", "name": name }));
    usages(&mut bench, &gpu);
    let mut kernels = Kernels { gpu, bench: &mut bench };
    kernels.all(tflops).map_err(|error| error.to_string())?;
    drop(kernels);

    let mut cost_file = cost_file;
    for model in &wanted.models {
        let model = Model::named(model).ok_or_else(|| format!("{model}: 7b and 13b are known"))?;
        for dtype in &wanted.weights {
            let timed = step::measure(&mut bench, ordinal, &wanted, &model, *dtype);
            if let (Some(timed), Some(path)) = (timed, cost_file.take()) {
                cost::write(&path, &name, &model, *dtype, &bench.peaks, &timed)?;
            }
        }
    }
    Ok(())
}

/// Registers and memory of the kernels as the driver has loaded them.
fn usages(bench: &mut Bench, gpu: &Cuda) {
    let mut spilled = 0;
    for usage in gpu.usages() {
        spilled += usize::from(usage.local_bytes > 0);
        bench.json(serde_json::json!({
            "kind": "usage", "kernel": usage.kernel.name(), "registers": usage.registers,
            "shared_bytes": usage.shared_bytes, "local_bytes": usage.local_bytes,
        }));
    }
    println!("kernels with registers in memory, as loaded: {spilled}");
}

impl Kernels<'_> {
    fn all(&mut self, tflops: Option<f64>) -> Result<(), GpuError> {
        self.peaks(tflops)?;
        self.products()?;
        self.verify()?;
        self.trees()?;
        self.prefill()?;
        self.launches()
    }

    fn wants(&self, what: &str) -> bool {
        self.bench.only.as_ref().is_none_or(|only| what.contains(only.as_str()))
    }

    /// Median seconds of `work` on the GPU. It is given the number of the turn, of which `times` go
    /// round, and queues one launch.
    fn time(
        &mut self,
        times: usize,
        mut work: impl FnMut(&mut Cuda, usize) -> Result<(), GpuError>,
    ) -> Result<f64, GpuError> {
        let runs = self.bench.runs;
        let mut seconds = Vec::with_capacity(runs);
        let mut rounds = 1;
        // The first two are for clocks, caches and graphs, and say how many rounds a sample needs.
        for run in 0..runs + 2 {
            let begin = self.gpu.mark()?;
            for turn in (0..rounds).flat_map(|_| 0..times) {
                work(&mut self.gpu, turn)?;
            }
            let end = self.gpu.mark()?;
            let sample = self.gpu.seconds_between(&begin, &end)?;
            match run {
                0 | 1 => rounds = (SAMPLE_SECONDS / sample * rounds as f64).ceil() as usize,
                _ => seconds.push(sample / (rounds * times) as f64),
            }
            rounds = rounds.clamp(1, ROUNDS_MAX);
        }
        Ok(hat_benches::spread(seconds).median)
    }

    fn line(&mut self, what: &str, seconds: f64, work: Work, peak: f64) {
        let (bytes, flops) = (work.bytes as f64 / seconds, work.flops as f64 / seconds);
        let copy = self.bench.peaks.copy;
        let percent = |rate: f64, peak: f64| rate / peak * 100.0;
        let (micros, giga, tera) = (seconds * 1e6, bytes / 1e9, flops / 1e12);
        println!(
            "{what:<36} {micros:10.1} us  {giga:8.1} GB/s {:4.0} % of copies  {tera:7.2} TFLOP/s \
             {:4.0} % of products",
            percent(bytes, copy),
            percent(flops, peak)
        );
        self.bench.json(serde_json::json!({
            "kind": "kernel", "what": what, "us": micros, "bytes": work.bytes,
            "flops": work.flops,
        }));
    }

    fn room(&mut self, bytes: usize, number: u8) -> Result<CudaMemory, GpuError> {
        let mut memory = self.gpu.alloc(bytes, "a bench")?;
        self.gpu.upload(&vec![number; bytes], &mut memory, 0)?;
        Ok(memory)
    }

    fn copies(&self, bytes: usize) -> usize {
        if self.bench.small { 2 } else { COLD_BYTES / bytes + 1 }
    }

    /// Measures the GPU's peaks: copies by two kernels, products by one.
    fn peaks(&mut self, tflops: Option<f64>) -> Result<(), GpuError> {
        let small = self.bench.small;
        let count: usize = if small { 1 << 12 } else { 64 << 20 };
        let (mut gate, up) = (self.room(4 * count, 0)?, self.room(4 * count, 0)?);
        let seconds = self.time(4, |gpu, _| silu_mul(gpu, gate.slice_mut(), up.slice()))?;
        let gated = bound::silu_mul(count).bytes as f64 / seconds;
        let mut copied = Work::default();
        let seconds = self.time(4, |gpu, _| {
            copied = peak::copy(gpu, up.slice(), gate.slice_mut())?;
            Ok(())
        })?;
        let copied = copied.bytes as f64 / seconds;
        let seconds = self.time(4, |gpu, _| gpu.copy(4 * count, &up, &mut gate))?;
        let copy = 8.0 * count as f64 / seconds;
        drop((gate, up));
        let (blocks, steps) = if small { (1, 2) } else { (2048, 2000) };
        // Numbers that are small and finite.
        let (from, mut out) = (self.room(512, 0x22)?, self.room(1024 * blocks, 0)?);
        let mut rate = |what| {
            let mut products = Work::default();
            let seconds = self.time(2, |gpu, _| {
                products = peak::multiply(gpu, what, blocks, steps, from.slice(), out.slice_mut())?;
                Ok(())
            })?;
            Ok(products.flops as f64 / seconds)
        };
        let (multiply, bytes) =
            (rate(peak::ProductDType::Halves)?, rate(peak::ProductDType::Bytes)?);
        println!(
            "peaks: copies {:.1} GB/s by the driver, {:.1} by a kernel, silu_mul of large arrays \
             {:.1} GB/s, f16 products {:.1} TFLOP/s, of bytes {:.1} TOP/s",
            copy / 1e9,
            copied / 1e9,
            gated / 1e9,
            multiply / 1e12,
            bytes / 1e12
        );
        self.bench.json(serde_json::json!({
            "kind": "peaks", "copy_gb_s": copy / 1e9, "copy_kernel_gb_s": copied / 1e9,
            "silu_mul_gb_s": gated / 1e9,
            "f16_tflop_s": multiply / 1e12, "bytes_top_s": bytes / 1e12,
        }));
        let multiply = tflops.map_or(multiply, |tflops| tflops * 1e12);
        self.bench.peaks = Peaks { copy: copy.max(copied).max(gated), multiply, bytes };
        Ok(())
    }

    fn products(&mut self) -> Result<(), GpuError> {
        let (columns, outputs) = if self.bench.small { (256, 64) } else { (4096, 4096) };
        for numbers in [WeightDType::Q4_1, WeightDType::Q4_0, WeightDType::Q8_0, WeightDType::Q6K] {
            let bytes = numbers.panel_bytes(outputs, columns).expect("whole blocks");
            let copies = self.copies(bytes);
            for rows in [1, 8, 16, 64, 512] {
                if self.bench.quick && !matches!((numbers, rows), (WeightDType::Q4_1, _) | (_, 1)) {
                    continue;
                }
                let what = format!("linear {numbers:?} {columns}x{outputs}, {rows} rows");
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
                    let to = Product {
                        x: Q8 { q: q.slice(), d: d.slice(), s: s.slice() },
                        weight: Table::new(weights[turn].slice(), numbers, outputs, columns),
                        bias: None,
                        write: Write::Store,
                        out: out.slice_mut(),
                    };
                    linear(gpu, rows, to)
                })?;
                let work = bound::gemv(numbers, rows, columns, outputs);
                self.line(&what, seconds, work, self.bench.peaks.bytes);
            }
        }
        Ok(())
    }

    /// Rows that verify drafts: many sequences, few rows each, K and V from memory.
    fn verify(&mut self) -> Result<(), GpuError> {
        let (sessions, context, rows) = if self.bench.small { (2, 40, 2) } else { (30, 1024, 8) };
        let load = Load { sessions, rows, tree: false, context, chunk: 0, before: 0 };
        let what = format!("{sessions}x{rows}@{context}");
        self.attention("verify", &what, Cut::Auto, load)
    }

    /// Rows that verify draft trees: each sees the nodes on its own path alone.
    fn trees(&mut self) -> Result<(), GpuError> {
        let (sessions, context) = if self.bench.small { (2, 40) } else { (30, 1024) };
        let nodes: &[usize] = if self.bench.small { &[5] } else { &[16, 64] };
        nodes.iter().try_for_each(|&rows| {
            let load = Load { sessions, rows, tree: true, context, chunk: 0, before: 0 };
            self.attention("tree", &format!("{sessions}x{rows}@{context}"), Cut::Auto, load)
        })
    }

    /// A chunk of one prompt: its products are the bound.
    fn prefill(&mut self) -> Result<(), GpuError> {
        let (before, chunk) = if self.bench.small { (0, 40) } else { (512, 512) };
        let load = Load { sessions: 0, rows: 0, tree: false, context: 0, chunk, before };
        self.attention("prefill", &format!("1x{chunk}@{before}"), Cut::Prefill, load)
    }

    fn attention(&mut self, kind: &str, rows: &str, cut: Cut, load: Load) -> Result<(), GpuError> {
        for (heads, kv_heads, head_dim) in [(32, 32, 128), (32, 8, 128), (9, 3, 64)] {
            let what = format!("{kind} {heads}/{kv_heads}x{head_dim} {rows}");
            if !self.wants(&what) {
                continue;
            }
            let heads = AttendShape { heads, kv_heads, head_dim, window: None };
            let (pages, keys, plan) = (load.pages(), load.keys(), load.plan(0));
            let (count, tails) = (load.all(), plan.batch().tail_slots.len());
            let mut on_gpu = PlanOnGpu::new(&mut self.gpu, count, tails, pages)?;
            on_gpu.write(&mut self.gpu, &plan.batch(), &heads, pages)?;
            let layers = self.copies(4 * pages * PAGE_SIZE * kv_heads * head_dim);
            let shape = KvShape { layers, pages, kv_heads, head_dim };
            let mut kv = Kv::new(&mut self.gpu, shape)?;
            for memory in kv.memory_mut() {
                self.gpu.upload(&vec![0x22u8; memory.bytes()], memory, 0)?;
            }
            let splits = keys.iter().flatten().max().map_or(0, |keys| keys.div_ceil(256));
            let mut parts = Parts::new(&mut self.gpu, &heads, count, splits)?;
            let bytes = 4 * count * heads.heads * head_dim;
            let (q, mut out) = (self.room(bytes, 0x22)?, self.room(bytes, 0)?);
            let seconds = self.time(layers, |gpu, layer| {
                let (q, out) = (q.slice(), out.slice_mut());
                attend(gpu, &on_gpu, &heads, layer, cut, q, &kv, &mut parts, out)
            })?;
            let work = keys.iter().map(|keys| bound::attend(&heads, keys)).sum();
            self.line(&what, seconds, work, self.bench.peaks.multiply);
        }
        Ok(())
    }

    /// Measures the cost of a launch beside its work: a run of small ones, one by one the first
    /// time and as a graph after that.
    fn launches(&mut self) -> Result<(), GpuError> {
        let mut gate = self.room(1024, 0)?;
        let up = self.room(1024, 0)?;
        let seconds = self.time(200, |gpu, _| silu_mul(gpu, gate.slice_mut(), up.slice()))?;
        println!("launch of a small kernel {:31.2} us", seconds * 1e6);
        self.bench.json(serde_json::json!({ "kind": "launch", "us": seconds * 1e6 }));
        println!("{:?}", self.gpu.launch_counts());
        Ok(())
    }
}
