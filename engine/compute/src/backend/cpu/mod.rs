//! The CPU backend: one arithmetic (id 1), several instruction sets.
//!
//! Every number is computed by one chain of IEEE operations whose order is fixed by the model
//! alone. Vector lanes run along outputs (columns, keys, dimensions); where they run along a sum
//! (norms, weights of attention), the lanes and the order of adding them up are fixed too. So the
//! level of the instruction set, the number of threads, the rows of a batch and the pages of a
//! sequence can't change a bit. `docs/ARITHMETIC.md` writes the arithmetic down.

mod attend;
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions, behind a check of the CPU")]
mod avx2;
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions, behind a check of the CPU")]
mod avx512;
mod batch;
mod buffer;
mod formats;
mod kernels;
mod kv;
mod math;
mod matrix;
#[cfg(target_arch = "aarch64")]
#[expect(unsafe_code, reason = "vector instructions, behind a check of the CPU")]
mod neon;
mod portable;
mod simd;
#[expect(unsafe_code, reason = "threads write disjoint parts of one matrix")]
mod threads;
mod top_logits;

use hat_loader::{Tensor, layout};

use self::attend::AttendScratch;
use self::batch::{Batch, sequence_of};
pub use self::buffer::CpuBuffer;
use self::kernels::Kernels;
pub use self::kv::CpuKv;
use self::math::{BLOCK, Block};
pub use self::matrix::CpuWeight;
use self::matrix::{Finish, Linear};
pub use self::threads::compute_priority;
use self::threads::{PerThread, Threads};
use self::top_logits::TopScratch;
use super::{
    AttendArgs, AttendBatch, AttendShape, Backend, BackendError, Computes, KvShape, LinearArgs,
    PAGE_SIZE, RopeArgs, RowMove, TokenId, TopLogit, Write,
};

const NAME: &str = "cpu";
/// Multiplications (or numbers, where there is little to do with each) below which waking the
/// other threads costs more than it saves.
const MULTIPLICATIONS_MIN: usize = 100_000;
const NUMBERS_MIN: usize = 16_384;
/// Columns of a gate that wait in the cache for the other factor.
const COLUMNS_IN_CACHE: usize = 4 * layout::PANEL;

/// Instruction set that the kernels use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Level {
    /// The best that this CPU has.
    #[default]
    Auto,
    /// Plain Rust; slow where the CPU has no fused multiply-add.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 with VNNI (`avx512f`, `bw`, `vl`, `dq`, `vnni`).
    Avx512,
    /// NEON with the dot product instruction.
    Neon,
}

/// Settings of the CPU backend. No field changes a result.
#[derive(Clone, Copy, Debug)]
pub struct CpuConfig {
    /// Compute threads, the caller's among them; at least 1.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub level: Level,
}

impl Default for CpuConfig {
    /// A thread for each core, the best instructions.
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads, level: Level::Auto }
    }
}

/// The operations in whose output a test can plant a fault (feature `testkit`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as the methods of the backend")]
pub enum Op {
    Embed,
    RmsNorm,
    Linear,
    RopeAngles,
    RopeAppend,
    Attend,
    SiluMul,
}

/// A fault that a test plants.
#[derive(Clone, Copy)]
struct Fault {
    op: Op,
    element: usize,
    every_time: bool,
}

/// The quantised rows of the input of the last `linear`: q, k and v share theirs, gate and up too.
#[derive(Default)]
struct Quantised {
    /// `[rows][columns / 32]`
    blocks: Vec<Block>,
    /// Stamp and rows of the buffer that `blocks` comes from.
    of: Option<(u64, usize)>,
}

/// Kernels, threads, and the scratch that steps reuse.
pub struct CpuBackend {
    kernels: &'static dyn Kernels,
    threads: Threads,
    attend_scratch: PerThread<AttendScratch>,
    top_scratch: PerThread<TopScratch>,
    quantised: Quantised,
    /// Some weight is of a block type, so that inputs are quantised.
    has_blocks: bool,
    /// One row of an embedding table, in row order.
    row: Vec<u8>,
    fault: Option<Fault>,
}

impl CpuBackend {
    /// Starts the threads and chooses the kernels.
    ///
    /// # Errors
    /// [`BackendError::Config`] if there are no threads, the system gives none, or this CPU lacks
    /// instructions of the level.
    pub fn new(config: CpuConfig) -> Result<Self, BackendError> {
        Self::niced(config, 0)
    }

    /// As [`CpuBackend::new`], with threads that are so much nicer than the process.
    ///
    /// # Errors
    /// As [`CpuBackend::new`].
    pub fn niced(config: CpuConfig, nice: u8) -> Result<Self, BackendError> {
        let error = |field, reason| BackendError::Config { backend: NAME, field, reason };
        if config.threads == 0 {
            return Err(error("threads", "0, but at least 1 is needed".to_owned()));
        }
        let kernels = kernels_of(config.level).map_err(|reason| error("level", reason))?;
        let threads = Threads::new(config.threads, nice)
            .map_err(|e| error("threads", format!("{} can't be started: {e}", config.threads)))?;
        Ok(Self {
            kernels,
            attend_scratch: PerThread::new(threads.count(), AttendScratch::default),
            top_scratch: PerThread::new(threads.count(), TopScratch::default),
            threads,
            quantised: Quantised::default(),
            has_blocks: false,
            row: Vec::new(),
            fault: None,
        })
    }

    /// For tests that have to fail: flips the last bit of number `element` (modulo their count)
    /// of the output of `op`, in its next call or every time.
    #[cfg(feature = "testkit")]
    pub fn plant_ulp(&mut self, op: Op, element: usize, every_time: bool) {
        self.fault = Some(Fault { op, element, every_time });
    }

    /// Plants the fault in what `op` has written, if there is one; returns true if it did.
    fn strike(&mut self, op: Op, written: &mut [f32]) -> bool {
        let Some(fault) = self.fault.filter(|fault| fault.op == op && !written.is_empty()) else {
            return false;
        };
        let number = &mut written[fault.element % written.len()];
        *number = f32::from_bits(number.to_bits() ^ 1);
        if !fault.every_time {
            self.fault = None;
        }
        true
    }

    /// Quantises the first rows of `x` if one of the weights needs it, unless that was done last.
    fn quantise_for<const N: usize>(
        &mut self,
        rows: usize,
        x: &CpuBuffer,
        weights: [&CpuWeight; N],
    ) {
        let needed = weights.iter().any(|weight| weight.dtype.block_weights() > 1);
        if !needed || self.quantised.of == Some((x.stamp, rows)) {
            return;
        }
        self.quantised.of = Some((x.stamp, rows));
        let width = x.columns / BLOCK;
        let (from, kernels) = (x.rows(rows), self.kernels);
        let (out, none) = ((self.quantised.room(rows * width), width), (&mut [(); 0][..], 0));
        by_rows(&mut self.threads, out, none, rows, |row, out, _| {
            kernels.quantise_row(&from[row * x.columns..][..x.columns], out);
        });
    }

    /// Several products of the same rows.
    fn products<const N: usize>(
        &mut self,
        rows: usize,
        x: &CpuBuffer,
        finish: Finish,
        each: [LinearArgs<'_, Self>; N],
    ) {
        let weights = each.each_ref().map(|one| one.weight);
        self.quantise_for(rows, x, weights);
        let jobs = each.each_ref().map(|LinearArgs { weight, bias, out }| {
            self.quantised.linear(rows, x, weight, *bias, finish, out.columns)
        });
        let kernels = self.kernels;
        let mut outs = each.map(|one| (one.out.rows_mut(rows), one.weight.n));
        let parts = outs.each_mut().map(|(out, width)| (&mut **out, *width));
        self.threads.columns_each(parts, rows, grain(rows, weights), |i, columns, part| {
            kernels.linear(&jobs[i], columns, part);
        });
        for (out, _) in outs {
            self.strike(Op::Linear, out);
        }
    }
}

impl Quantised {
    /// Room for so many blocks.
    fn room(&mut self, blocks: usize) -> &mut [Block] {
        if self.blocks.len() < blocks {
            self.blocks.resize(blocks, Block::default());
        }
        &mut self.blocks[..blocks]
    }

    /// The job of one `linear`, whose input is in `self` if it needs to be quantised.
    fn linear<'a>(
        &'a self,
        rows: usize,
        x: &'a CpuBuffer,
        weight: &'a CpuWeight,
        bias: Option<&'a CpuWeight>,
        finish: Finish,
        columns: usize,
    ) -> Linear<'a> {
        let CpuWeight { n, k, .. } = *weight;
        assert_eq!((k, n), (x.columns, columns), "{}: inputs and outputs", weight.name);
        let blocks = self.blocks.get(..rows * (k / BLOCK)).unwrap_or_default();
        let bias = bias.map(|bias| bias.vector(n));
        Linear { weight, rows, x: x.rows(rows), blocks, bias, finish }
    }
}

/// Multiple of columns at which threads may cut these matrices; `usize::MAX` if there is little to
/// do.
fn grain<const N: usize>(rows: usize, weights: [&CpuWeight; N]) -> usize {
    let all: usize = weights.iter().map(|weight| rows * weight.n * weight.k).sum();
    if all < MULTIPLICATIONS_MIN { usize::MAX } else { layout::PANEL }
}

/// Page and row within it of a row of the plan.
fn place(plan: &AttendBatch<'_>, row: usize) -> (usize, usize) {
    let sequence = sequence_of(plan, row);
    let slot = plan.slots[row] as usize;
    let page = plan.page_indptr[sequence] as usize + slot / PAGE_SIZE;
    assert!(page < plan.page_indptr[sequence + 1] as usize, "slot {slot} has no page");
    (plan.page_indices[page] as usize, slot % PAGE_SIZE)
}

/// The kernels of a level, or what this CPU lacks.
fn kernels_of(level: Level) -> Result<&'static dyn Kernels, String> {
    #[cfg(target_arch = "x86_64")]
    let (avx2, avx512) = (avx2::kernels(), avx512::kernels());
    #[cfg(not(target_arch = "x86_64"))]
    let (avx2, avx512) = (Err("x86-64"), Err("x86-64"));
    #[cfg(target_arch = "aarch64")]
    let neon = neon::kernels();
    #[cfg(not(target_arch = "aarch64"))]
    let neon = Err("aarch64");
    let lacks = |level| move |what| format!("{level}, but this CPU lacks {what}");
    match level {
        Level::Auto => Ok(avx512.or(avx2).or(neon).unwrap_or(&portable::Portable)),
        Level::Portable => Ok(&portable::Portable),
        Level::Avx2 => avx2.map_err(lacks("avx2")),
        Level::Avx512 => avx512.map_err(lacks("avx512")),
        Level::Neon => neon.map_err(lacks("neon")),
    }
}

/// Runs `job(row, out, other)` for each row of two matrices, given with their widths; on all
/// threads if there are enough numbers.
fn by_rows<T: Send, U: Send>(
    threads: &mut Threads,
    (out, width): (&mut [T], usize),
    (other, other_width): (&mut [U], usize),
    rows: usize,
    job: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    if rows * width * (size_of::<T>() / 4) < NUMBERS_MIN || rows == 1 {
        for row in 0..rows {
            let other = &mut other[row * other_width..][..other_width];
            job(row, &mut out[row * width..][..width], other);
        }
        return;
    }
    threads.rows_of_both(out, width, other, other_width, rows, |deal, part, other| {
        for i in 0..part.rows() {
            job(deal.first + i * deal.step, part.row(i), other.row(i));
        }
    });
}

impl Computes for CpuBackend {
    fn describe(&self) -> String {
        let threads = self.threads.count();
        let s = if threads == 1 { "" } else { "s" };
        format!("cpu: {}, {threads} thread{s}", self.kernels.name())
    }

    fn arithmetic_id(&self) -> u32 {
        super::ARITHMETIC_CPU
    }
}

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Weight = CpuWeight;
    type Kv = CpuKv;
    type Plan<'p> = (AttendBatch<'p>, AttendShape);

    fn alloc(&mut self, capacity: usize, columns: usize) -> Result<CpuBuffer, BackendError> {
        let (buffer, numbers) = CpuBuffer::new(NAME, capacity, columns)?;
        // Any buffer may become the input of a `linear`.
        let blocks = (numbers / BLOCK).saturating_sub(self.quantised.blocks.len());
        self.quantised.blocks.try_reserve(blocks).map_err(|_| BackendError::OutOfMemory {
            backend: NAME,
            bytes: blocks * size_of::<Block>(),
            purpose: "quantised activations",
        })?;
        Ok(buffer)
    }

    fn weight(&mut self, tensor: &Tensor) -> Result<CpuWeight, BackendError> {
        let weight = CpuWeight::new(NAME, tensor)?;
        let row = weight.dtype.row_bytes(weight.k).unwrap_or(0);
        self.row.reserve(row.saturating_sub(self.row.len()));
        self.has_blocks |= weight.dtype.block_weights() > 1;
        Ok(weight)
    }

    fn kv(&mut self, shape: KvShape) -> Result<CpuKv, BackendError> {
        CpuKv::new(NAME, shape)
    }

    fn upload(&mut self, from: &[f32], to: &mut CpuBuffer) {
        let columns = to.columns;
        assert!(from.len().is_multiple_of(columns.max(1)), "{} in rows of {columns}", from.len());
        to.rows_mut(from.len() / columns.max(1)).copy_from_slice(from);
    }

    fn download(&mut self, from: &CpuBuffer, first_row: usize, to: &mut [f32]) {
        to.copy_from_slice(&from.data[first_row * from.columns..][..to.len()]);
    }

    fn embed(&mut self, tokens: &[TokenId], table: &CpuWeight, x: &mut CpuBuffer) {
        assert_eq!(table.k, x.columns, "{}: columns", table.name);
        let row_bytes = table.dtype.row_bytes(table.k).expect("checked when it was taken");
        self.row.resize(row_bytes, 0);
        let out = x.rows_mut(tokens.len());
        for (token, out) in tokens.iter().zip(out.chunks_exact_mut(table.k)) {
            let token = *token as usize;
            assert!(token < table.n, "{}: token {token} of {}", table.name, table.n);
            layout::unpack_row(table.dtype, table.k, &table.bytes, token, &mut self.row);
            layout::dequantise_row(table.dtype, table.k, &self.row, out);
        }
        self.strike(Op::Embed, x.rows_mut(tokens.len()));
    }

    fn rms_norm(
        &mut self,
        rows: usize,
        x: &CpuBuffer,
        weight: &CpuWeight,
        eps: f32,
        out: &mut CpuBuffer,
    ) {
        let columns = x.columns;
        assert_eq!(columns, out.columns, "columns of input and output");
        let (from, weight) = (x.rows(rows), weight.vector(columns));
        let kernels = self.kernels;
        // What is normed goes into a matrix next: it is quantised while it is in the cache.
        let width =
            if self.has_blocks && columns.is_multiple_of(BLOCK) { columns / BLOCK } else { 0 };
        let blocks = self.quantised.room(rows * width);
        let out_rows = out.rows_mut(rows);
        by_rows(
            &mut self.threads,
            (out_rows, columns),
            (blocks, width),
            rows,
            |row, out, blocks| {
                kernels.rms_norm_row(&from[row * columns..][..columns], weight, eps, out);
                if width > 0 {
                    kernels.quantise_row(out, blocks);
                }
            },
        );
        let as_computed = !self.strike(Op::RmsNorm, out_rows);
        self.quantised.of = (as_computed && width > 0).then_some((out.stamp, rows));
    }

    fn linear(&mut self, rows: usize, x: &CpuBuffer, write: Write, args: LinearArgs<'_, Self>) {
        self.products(rows, x, write.into(), [args]);
    }

    fn linear_top(
        &mut self,
        rows: usize,
        x: &CpuBuffer,
        weight: &CpuWeight,
        top: &mut [TopLogit],
    ) -> bool {
        if rows == 0 || top.is_empty() {
            return true;
        }
        let k = top.len() / rows;
        assert_eq!(top.len(), rows * k, "lists of {rows} rows");
        self.quantise_for(rows, x, [weight]);
        let job = self.quantised.linear(rows, x, weight, None, Finish::Store, weight.n);
        let (kernels, scratch) = (self.kernels, &mut self.top_scratch);
        scratch.each(|scratch| scratch.start(rows, k));
        let each = &*scratch;
        self.threads.ranges(weight.n, grain(rows, [weight]), |thread, columns| {
            each.with(thread, |scratch| scratch.add(kernels, &job, columns));
        });
        top.fill(TopLogit::NONE);
        let mut finite = true;
        scratch.each(|scratch| finite &= scratch.merge_into(top, k));
        finite
    }

    fn linear_each<const N: usize>(
        &mut self,
        rows: usize,
        x: &CpuBuffer,
        each: [LinearArgs<'_, Self>; N],
    ) {
        self.products(rows, x, Finish::Store, each);
    }

    fn swiglu(
        &mut self,
        rows: usize,
        x: &CpuBuffer,
        gate: &CpuWeight,
        up: &CpuWeight,
        out: &mut CpuBuffer,
    ) {
        self.quantise_for(rows, x, [gate, up]);
        let gate_job = self.quantised.linear(rows, x, gate, None, Finish::Store, out.columns);
        let up_job = self.quantised.linear(rows, x, up, None, Finish::Gate, out.columns);
        let kernels = self.kernels;
        let out_rows = out.rows_mut(rows);
        let grain = grain(rows, [gate, up]);
        self.threads.columns(out_rows, gate.n, rows, grain, |columns, part| {
            // The gate of some columns is in the cache when the rest comes.
            for first in columns.clone().step_by(COLUMNS_IN_CACHE) {
                let some = first..columns.end.min(first + COLUMNS_IN_CACHE);
                let part = &mut part.columns(first - columns.start..some.end - columns.start);
                kernels.linear(&gate_job, some.clone(), part);
                kernels.linear(&up_job, some, part);
            }
        });
        self.strike(Op::SiluMul, out_rows);
    }

    fn rope_angles(&mut self, positions: &[u32], inv_freq: &[f32], angles: &mut CpuBuffer) {
        let columns = angles.columns;
        assert_eq!(columns, 2 * inv_freq.len(), "columns of angles");
        let (rows, kernels) = (positions.len(), self.kernels);
        let (out, none) = ((angles.rows_mut(rows), columns), (&mut [(); 0][..], 0));
        by_rows(&mut self.threads, out, none, rows, |row, out, _| {
            kernels.rope_angles_row(positions[row], inv_freq, out);
        });
        self.strike(Op::RopeAngles, angles.rows_mut(rows));
    }

    fn begin<'p>(
        &mut self,
        plan: AttendBatch<'p>,
        shape: &AttendShape,
        kv: &CpuKv,
    ) -> Self::Plan<'p> {
        assert_eq!(kv.shape().kv_heads, shape.kv_heads, "heads of the KV store");
        assert_eq!(kv.shape().head_dim, shape.head_dim, "head_dim of the KV store");
        assert!(shape.heads.is_multiple_of(shape.kv_heads), "{shape:?}");
        assert!(shape.head_dim.is_multiple_of(2), "{shape:?}");
        (plan, *shape)
    }

    fn rope_append(&mut self, (plan, shape): Self::Plan<'_>, args: RopeArgs<'_, Self>) {
        let RopeArgs { layer, angles, q, k, v, kv } = args;
        let (rows, head_dim) = (plan.rows(), shape.head_dim);
        assert_eq!(angles.columns, head_dim, "columns of angles");
        assert_eq!(q.columns, shape.heads * head_dim, "columns of q");
        assert_eq!(k.columns, shape.kv_heads * head_dim, "columns of k");
        assert_eq!(v.columns, k.columns, "columns of v");
        let (angles, kernels) = (angles.rows(rows), self.kernels);
        for buffer in [&mut *q, &mut *k] {
            let columns = buffer.columns;
            let (out, none) = ((buffer.rows_mut(rows), columns), (&mut [(); 0][..], 0));
            by_rows(&mut self.threads, out, none, rows, |row, heads, _| {
                for head in heads.chunks_exact_mut(head_dim) {
                    kernels.rotate(head, &angles[row * head_dim..][..head_dim]);
                }
            });
        }
        self.strike(Op::RopeAppend, q.rows_mut(rows));
        let (pages, width, head) = (kv.shape().pages, kv.page_width(), kv.head_numbers());
        let grain = if rows * k.columns < NUMBERS_MIN { width } else { head };
        let from = [k.rows(rows), v.rows(rows)];
        let stores = kv.layer_mut(layer).map(|store| (store, width));
        self.threads.columns_each(stores, pages, grain, |i, columns, part| {
            let heads = columns.start / head..columns.end / head;
            for (row, heads_of_row) in from[i].chunks_exact(shape.kv_heads * head_dim).enumerate() {
                let (page, at) = place(&plan, row);
                for (to, head) in part.row(page).chunks_exact_mut(head).zip(heads.clone()) {
                    let from = &heads_of_row[head * head_dim..][..head_dim];
                    if i == 0 {
                        kv::put_key(from, at, to, kernels)
                    } else {
                        kv::put_value(from, at, to, kernels)
                    }
                }
            }
        });
    }

    fn attend(&mut self, (plan, shape): Self::Plan<'_>, args: AttendArgs<'_, Self>) {
        let AttendArgs { layer, q, kv, out } = args;
        let (rows, head_dim) = (plan.rows(), shape.head_dim);
        let columns = shape.heads * head_dim;
        assert_eq!((q.columns, out.columns), (columns, columns), "columns of q and out");
        let group = shape.heads / shape.kv_heads;
        self.attend_scratch.each(|scratch| scratch.fit(head_dim, group));
        let (kernels, scratch) = (self.kernels, &self.attend_scratch);
        let batch = Batch { plan: &plan, shape: &shape, layer, q: q.rows(rows), kv };
        // One row among several threads: they take key/value heads. Else each takes rows.
        let split = if rows < 2 * self.threads.count() { shape.kv_heads } else { 1 };
        let heads = shape.kv_heads / split;
        let out_rows = out.rows_mut(rows);
        self.threads.rows(out_rows, columns / split, rows * split, |deal, part| {
            scratch.with(deal.thread, |scratch| {
                let mut first = 0;
                while first < part.rows() {
                    let index = |i: usize| deal.first + i * deal.step;
                    let of = |i: usize| (index(i) / split, index(i) % split);
                    let together = batch.together(first..part.rows(), group, of);
                    for head in 0..heads {
                        let kv_head = of(first).1 + head;
                        batch.task(
                            first..together,
                            kv_head,
                            |i| of(i).0,
                            |task| {
                                kernels.attend(
                                    task,
                                    scratch,
                                    part,
                                    (first, head * group * head_dim),
                                );
                            },
                        );
                    }
                    first = together;
                }
            });
        });
        self.strike(Op::Attend, out.rows_mut(rows));
    }

    fn compact(&mut self, moves: &[RowMove], kv: &mut CpuKv) {
        for one in moves {
            kv.shift(*one);
        }
    }
}
