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
mod batch;
mod buffer;
mod kernels;
mod kv;
mod math;
mod matrix;
#[cfg(target_arch = "aarch64")]
#[expect(unsafe_code, reason = "vector instructions, behind a check of the CPU")]
#[expect(clippy::needless_range_loop, reason = "constant indices keep tiles in registers")]
mod neon;
mod portable;
#[expect(unsafe_code, reason = "threads write disjoint parts of one matrix")]
mod threads;

use hat_loader::{Tensor, layout};

use self::attend::AttendScratch;
use self::batch::{Batch, sequence_of};
pub use self::buffer::CpuBuffer;
use self::kernels::Kernels;
pub use self::kv::CpuKv;
use self::math::{BLOCK, Block};
pub use self::matrix::CpuWeight;
use self::matrix::Linear;
pub use self::threads::lower_priority;
use self::threads::{PerThread, Threads};
use super::{
    AttendPlan, AttendShape, Backend, BackendError, KvShape, PAGE_SIZE, RowMove, TokenId, Write,
};

const NAME: &str = "cpu";
/// Multiplications (or numbers, where there is little to do with each) below which waking the
/// other threads costs more than it saves.
const MULTIPLICATIONS_MIN: usize = 100_000;
const NUMBERS_MIN: usize = 16_384;

/// Which instructions the kernels use.
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
    /// NEON with the dot product instruction.
    Neon,
}

/// How the CPU backend runs. No field changes a result.
#[derive(Clone, Copy, Debug)]
pub struct CpuConfig {
    /// Compute threads, the caller's among them; at least 1.
    pub threads: usize,
    /// Which instructions.
    pub level: Level,
}

impl Default for CpuConfig {
    /// A thread for each core, the best instructions.
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads, level: Level::Auto }
    }
}

/// The operations in whose output [`CpuBackend::plant_ulp`] can plant a fault.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    kernels: &'static Kernels,
    threads: Threads,
    attend_scratch: PerThread<AttendScratch>,
    quantised: Quantised,
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
        let error = |field, reason| BackendError::Config { backend: NAME, field, reason };
        if config.threads == 0 {
            return Err(error("threads", "0, but at least 1 is needed".to_owned()));
        }
        let kernels = kernels_of(config.level).map_err(|reason| error("level", reason))?;
        let threads = Threads::new(config.threads)
            .map_err(|e| error("threads", format!("{} can't be started: {e}", config.threads)))?;
        Ok(Self {
            kernels,
            attend_scratch: PerThread::new(threads.count(), AttendScratch::default),
            threads,
            quantised: Quantised::default(),
            row: Vec::new(),
            fault: None,
        })
    }

    /// For tests that have to fail: flips the last bit of number `element` (modulo their count)
    /// of the output of `op`, in its next call or every time.
    #[doc(hidden)]
    pub fn plant_ulp(&mut self, op: Op, element: usize, every_time: bool) {
        self.fault = Some(Fault { op, element, every_time });
    }

    /// Plants the fault in what `op` has written, if there is one.
    fn strike(&mut self, op: Op, written: &mut [f32]) {
        let Some(fault) = self.fault.filter(|fault| fault.op == op) else {
            return;
        };
        if written.is_empty() {
            return;
        }
        let number = &mut written[fault.element % written.len()];
        *number = f32::from_bits(number.to_bits() ^ 1);
        if !fault.every_time {
            self.fault = None;
        }
    }

    /// Quantises the first rows of `x`, unless that was done last.
    fn quantise(&mut self, rows: usize, x: &CpuBuffer) {
        if self.quantised.of == Some((x.stamp, rows)) {
            return;
        }
        self.quantised.of = Some((x.stamp, rows));
        let width = x.columns / BLOCK;
        let blocks = &mut self.quantised.blocks;
        if blocks.len() < rows * width {
            blocks.resize(rows * width, Block::default());
        }
        let (from, quantise_row) = (x.rows(rows), self.kernels.quantise_row);
        by_rows(&mut self.threads, blocks, width, rows, |row, out| {
            quantise_row(&from[row * x.columns..][..x.columns], out);
        });
    }
}

/// The kernels of a level, or what this CPU lacks.
fn kernels_of(level: Level) -> Result<&'static Kernels, String> {
    #[cfg(target_arch = "x86_64")]
    let avx2 = avx2::kernels();
    #[cfg(not(target_arch = "x86_64"))]
    let avx2 = Err("x86-64");
    #[cfg(target_arch = "aarch64")]
    let neon = neon::kernels();
    #[cfg(not(target_arch = "aarch64"))]
    let neon = Err("aarch64");
    let lacks = |level| move |what| format!("{level}, but this CPU lacks {what}");
    match level {
        Level::Auto => Ok(avx2.or(neon).unwrap_or(&portable::KERNELS)),
        Level::Portable => Ok(&portable::KERNELS),
        Level::Avx2 => avx2.map_err(lacks("avx2")),
        Level::Neon => neon.map_err(lacks("neon")),
    }
}

/// Runs `job(row, out)` for each row, on all threads if there are enough numbers.
fn by_rows<T: Send>(
    threads: &mut Threads,
    out: &mut [T],
    width: usize,
    rows: usize,
    job: impl Fn(usize, &mut [T]) + Sync,
) {
    if rows * width * (size_of::<T>() / 4) < NUMBERS_MIN || rows == 1 {
        for (row, out) in out.chunks_exact_mut(width.max(1)).take(rows).enumerate() {
            job(row, out);
        }
        return;
    }
    threads.rows(out, width, rows, |deal, part| {
        for i in 0..part.rows() {
            job(deal.first + i * deal.step, part.row(i));
        }
    });
}

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Weight = CpuWeight;
    type Kv = CpuKv;

    fn describe(&self) -> String {
        let threads = self.threads.count();
        format!("cpu: {} kernels, {threads} threads, arithmetic 1", self.kernels.name)
    }

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
        let (from, weight, norm) =
            (x.rows(rows), weight.vector(columns), self.kernels.rms_norm_row);
        by_rows(&mut self.threads, out.rows_mut(rows), columns, rows, |row, out| {
            norm(&from[row * columns..][..columns], weight, eps, out);
        });
        self.strike(Op::RmsNorm, out.rows_mut(rows));
    }

    fn linear(
        &mut self,
        rows: usize,
        x: &CpuBuffer,
        weight: &CpuWeight,
        bias: Option<&CpuWeight>,
        write: Write,
        out: &mut CpuBuffer,
    ) {
        let CpuWeight { n, k, .. } = *weight;
        assert_eq!((k, n), (x.columns, out.columns), "{}: inputs and outputs", weight.name);
        if weight.dtype.block_weights() > 1 {
            self.quantise(rows, x);
        }
        let job = Linear {
            weight,
            rows,
            x: x.rows(rows),
            blocks: self.quantised.blocks.get(..rows * (k / BLOCK)).unwrap_or_default(),
            bias: bias.map(|bias| bias.vector(n)),
            write,
        };
        let linear = self.kernels.linear;
        let grain = if rows * n * k < MULTIPLICATIONS_MIN { n.max(1) } else { layout::PANEL };
        self.threads.columns(out.rows_mut(rows), n, rows, grain, |columns, part| {
            linear(&job, columns, part);
        });
        self.strike(Op::Linear, out.rows_mut(rows));
    }

    fn rope_angles(&mut self, positions: &[u32], inv_freq: &[f32], angles: &mut CpuBuffer) {
        let columns = angles.columns;
        assert_eq!(columns, 2 * inv_freq.len(), "columns of angles");
        let (rows, angles_row) = (positions.len(), self.kernels.rope_angles_row);
        by_rows(&mut self.threads, angles.rows_mut(rows), columns, rows, |row, out| {
            angles_row(positions[row], inv_freq, out);
        });
        self.strike(Op::RopeAngles, angles.rows_mut(rows));
    }

    fn rope_append(
        &mut self,
        plan: &AttendPlan<'_>,
        shape: &AttendShape,
        layer: usize,
        angles: &CpuBuffer,
        q: &mut CpuBuffer,
        k: &mut CpuBuffer,
        v: &CpuBuffer,
        kv: &mut CpuKv,
    ) {
        let (rows, head_dim) = (plan.rows(), shape.head_dim);
        assert_eq!(angles.columns, head_dim, "columns of angles");
        assert_eq!(q.columns, shape.heads * head_dim, "columns of q");
        assert_eq!(k.columns, shape.kv_heads * head_dim, "columns of k");
        assert_eq!(v.columns, k.columns, "columns of v");
        assert_eq!(kv.shape().kv_heads, shape.kv_heads, "heads of the KV store");
        assert_eq!(kv.shape().head_dim, head_dim, "head_dim of the KV store");
        let (angles, rotate) = (angles.rows(rows), self.kernels.rotate);
        for buffer in [&mut *q, &mut *k] {
            let columns = buffer.columns;
            by_rows(&mut self.threads, buffer.rows_mut(rows), columns, rows, |row, heads| {
                for head in heads.chunks_exact_mut(head_dim) {
                    rotate(head, &angles[row * head_dim..][..head_dim]);
                }
            });
        }
        self.strike(Op::RopeAppend, q.rows_mut(rows));
        let pairs = k.rows(rows).chunks_exact(k.columns).zip(v.rows(rows).chunks_exact(v.columns));
        for (row, (k, v)) in pairs.enumerate() {
            let sequence = sequence_of(plan, row);
            let slot = plan.slots[row] as usize;
            let page = plan.page_indptr[sequence] as usize + slot / PAGE_SIZE;
            assert!(page < plan.page_indptr[sequence + 1] as usize, "slot {slot} has no page");
            let place = (plan.page_indices[page], (slot % PAGE_SIZE) as u32);
            kv.put(layer, place, k, v);
        }
    }

    fn attend(
        &mut self,
        plan: &AttendPlan<'_>,
        shape: &AttendShape,
        layer: usize,
        q: &CpuBuffer,
        kv: &CpuKv,
        out: &mut CpuBuffer,
    ) {
        let (rows, head_dim) = (plan.rows(), shape.head_dim);
        let columns = shape.heads * head_dim;
        assert_eq!((q.columns, out.columns), (columns, columns), "columns of q and out");
        assert_eq!(kv.shape().kv_heads, shape.kv_heads, "heads of the KV store");
        assert_eq!(kv.shape().head_dim, head_dim, "head_dim of the KV store");
        assert!(shape.heads.is_multiple_of(shape.kv_heads), "{shape:?}");
        assert!(head_dim.is_multiple_of(2), "{shape:?}");
        let group = shape.heads / shape.kv_heads;
        self.attend_scratch.each(|scratch| scratch.fit(head_dim, group));
        let (attend, scratch) = (self.kernels.attend, &self.attend_scratch);
        let batch = Batch { plan, shape, layer, q: q.rows(rows), kv };
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
                                attend(task, scratch, part, (first, head * group * head_dim));
                            },
                        );
                    }
                    first = together;
                }
            });
        });
        self.strike(Op::Attend, out.rows_mut(rows));
    }

    fn silu_mul(&mut self, rows: usize, gate: &mut CpuBuffer, up: &CpuBuffer) {
        let columns = gate.columns;
        assert_eq!(columns, up.columns, "columns of gate and up");
        let (up, silu_mul) = (up.rows(rows), self.kernels.silu_mul);
        by_rows(&mut self.threads, gate.rows_mut(rows), columns, rows, |row, gate| {
            silu_mul(gate, &up[row * columns..][..columns]);
        });
        self.strike(Op::SiluMul, gate.rows_mut(rows));
    }

    fn compact(&mut self, moves: &[RowMove], kv: &mut CpuKv) {
        for one in moves {
            kv.shift(*one);
        }
    }
}
