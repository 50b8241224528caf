//! Sequences in pages: what a batch attends to, and the same by plain arithmetic.

use half::f16;
use hat_cuda::attend::{Cut, Parts, attend};
use hat_cuda::gpu::{Gpu as _, Memory as _};
use hat_cuda::kv::{Kv, KvShape};
use hat_cuda::plan::{AttendBatch, AttendShape, PAGE_SIZE, PlanOnGpu};
use hat_cuda::testkit::test_gpu::{TestGpu, TestMemory};

use crate::stand::{Random, memory, numbers, room};

/// One row: where its own K and V stand, and the slots of the positions that it sees.
#[derive(Clone)]
pub struct Row {
    pub slot: u32,
    /// Slot of each position up to its own.
    pub keys: Vec<u32>,
    /// Number of leading `keys` that the plan names by `prefix_len`.
    pub prefix_len: u32,
}

/// The rows of one sequence in a batch, and its pages.
#[derive(Clone, Default)]
pub struct Sequence {
    pub rows: Vec<Row>,
    pub pages: Vec<u32>,
}

/// A batch as the launchers take it.
#[derive(Default)]
pub struct Batch {
    pub positions: Vec<u32>,
    pub slots: Vec<u32>,
    pub prefix_len: Vec<u32>,
    pub tail_indptr: Vec<u32>,
    pub tail_slots: Vec<u32>,
    pub q_indptr: Vec<u32>,
    pub page_indptr: Vec<u32>,
    pub page_indices: Vec<u32>,
}

impl Row {
    /// Row at `position` of a chain: every position at the slot of its number.
    pub fn plain(position: u32) -> Self {
        Self { slot: position, keys: (0..=position).collect(), prefix_len: position + 1 }
    }
}

/// Rows `from..to` of a chain.
pub fn chunk(from: u32, to: u32) -> Vec<Row> {
    (from..to).map(Row::plain).collect()
}

/// A tree of `nodes` rows behind `context` positions; node `i` stands at slot `context + i`.
pub fn tree(context: u32, nodes: u32, random: &mut Random) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for node in 0..nodes {
        let mut keys = match node {
            0 => (0..context).collect(),
            _ => rows[random.next() as usize % node as usize].keys.clone(),
        };
        keys.push(context + node);
        rows.push(Row { slot: context + node, keys, prefix_len: context });
    }
    rows
}

impl Sequence {
    /// Rows, in pages that are free.
    pub fn new(rows: Vec<Row>, free: &mut Vec<u32>) -> Self {
        let slots = rows.iter().flat_map(|row| row.keys.iter().chain([&row.slot])).max();
        let pages = (*slots.unwrap() as usize + 1).div_ceil(PAGE_SIZE);
        let pages = free.split_off(free.len() - pages);
        Self { rows, pages }
    }
}

impl Batch {
    pub fn new(sequences: &[Sequence]) -> Self {
        let mut batch = Self::default();
        for ends in [&mut batch.tail_indptr, &mut batch.q_indptr, &mut batch.page_indptr] {
            ends.push(0);
        }
        for sequence in sequences {
            for row in &sequence.rows {
                batch.positions.push(row.keys.len() as u32 - 1);
                batch.slots.push(row.slot);
                batch.prefix_len.push(row.prefix_len);
                batch.tail_slots.extend(&row.keys[row.prefix_len as usize..]);
                batch.tail_indptr.push(batch.tail_slots.len() as u32);
            }
            batch.q_indptr.push(batch.positions.len() as u32);
            batch.page_indices.extend(&sequence.pages);
            batch.page_indptr.push(batch.page_indices.len() as u32);
        }
        batch
    }

    pub fn plan(&self) -> AttendBatch<'_> {
        AttendBatch {
            positions: &self.positions,
            slots: &self.slots,
            prefix_len: &self.prefix_len,
            tail_indptr: &self.tail_indptr,
            tail_slots: &self.tail_slots,
            q_indptr: &self.q_indptr,
            page_indptr: &self.page_indptr,
            page_indices: &self.page_indices,
        }
    }

    pub fn on_gpu(
        &self,
        gpu: &mut TestGpu,
        heads: &AttendShape,
        pages: usize,
    ) -> PlanOnGpu<TestMemory> {
        let (rows, tails) = (self.positions.len(), self.tail_slots.len());
        let mut plan = PlanOnGpu::new(gpu, rows, tails, self.page_indices.len()).unwrap();
        plan.write(gpu, &self.plan(), heads, pages).unwrap();
        plan
    }
}

/// K and V on the host; what nobody wrote is NaN.
#[derive(Clone)]
pub struct Store {
    pub shape: KvShape,
    pub k: Vec<f16>,
    pub v: Vec<f16>,
}

impl Store {
    pub fn new(layers: usize, pages: usize, heads: &AttendShape) -> Self {
        let shape = KvShape { layers, pages, kv_heads: heads.kv_heads, head_dim: heads.head_dim };
        let count = layers * pages * heads.kv_heads * PAGE_SIZE * heads.head_dim;
        Self { shape, k: vec![f16::NAN; count], v: vec![f16::NAN; count] }
    }

    pub fn at(&self, layer: usize, page: u32, row: usize, head: usize) -> usize {
        let KvShape { pages, kv_heads, head_dim, .. } = self.shape;
        (((layer * pages + page as usize) * kv_heads + head) * PAGE_SIZE + row) * head_dim
    }

    /// Place of a sequence's slot.
    pub fn slot(&self, layer: usize, sequence: &Sequence, slot: u32, head: usize) -> usize {
        let slot = slot as usize;
        self.at(layer, sequence.pages[slot / PAGE_SIZE], slot % PAGE_SIZE, head)
    }

    /// Random numbers at every slot that a row sees.
    pub fn fill(&mut self, layer: usize, sequence: &Sequence, random: &mut Random) {
        let slots: std::collections::BTreeSet<u32> =
            sequence.rows.iter().flat_map(|row| row.keys.iter().copied()).collect();
        for slot in slots {
            for head in 0..self.shape.kv_heads {
                let at = self.slot(layer, sequence, slot, head);
                for i in at..at + self.shape.head_dim {
                    self.k[i] = f16::from_f32(random.number());
                    self.v[i] = f16::from_f32(random.number());
                }
            }
        }
    }

    pub fn on_gpu(&self, gpu: &mut TestGpu) -> Kv<TestMemory> {
        let mut kv = Kv::new(gpu, self.shape).unwrap();
        for (memory, numbers) in kv.memory_mut().into_iter().zip([&self.k, &self.v]) {
            let bits: Vec<u16> = numbers.iter().map(|number| number.to_bits()).collect();
            gpu.upload(&bits, memory, 0).unwrap();
        }
        kv
    }
}

/// Attention by its definition, in f64, row by row: `[rows][heads][head_dim]`.
pub fn expected(
    store: &Store,
    layer: usize,
    heads: &AttendShape,
    sequences: &[Sequence],
    q: &[f32],
) -> Vec<f64> {
    let dim = heads.head_dim;
    let mut out = Vec::new();
    for sequence in sequences {
        for row in &sequence.rows {
            let window = heads.window.map_or(row.keys.len(), |window| window as usize);
            let seen = &row.keys[row.keys.len() - window.min(row.keys.len())..];
            for head in 0..heads.heads {
                let q = &q[out.len()..][..dim];
                let at = |slot: &u32| store.slot(layer, sequence, *slot, head / heads.group());
                let score = |slot: &u32| {
                    let k = &store.k[at(slot)..][..dim];
                    let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * k.to_f64()).sum();
                    dot / (dim as f64).sqrt()
                };
                let scores: Vec<f64> = seen.iter().map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let value = |slot: &u32| store.v[at(slot) + d].to_f64();
                    let sum: f64 = seen.iter().zip(&weights).map(|(s, w)| value(s) * w).sum();
                    out.push(sum / total);
                }
            }
        }
    }
    out
}

/// The kernels' result: `[rows][heads][head_dim]`.
pub fn attended(
    gpu: &mut TestGpu,
    store: &Store,
    layer: usize,
    heads: &AttendShape,
    sequences: &[Sequence],
    q: &[f32],
    cut: Cut,
) -> Vec<f32> {
    let batch = Batch::new(sequences);
    let plan = batch.on_gpu(gpu, heads, store.shape.pages);
    let kv = store.on_gpu(gpu);
    let longest = batch.positions.iter().max().unwrap() + 1;
    let splits = (longest as usize).div_ceil(256);
    let mut parts = Parts::new(gpu, heads, batch.positions.len(), splits).unwrap();
    let (q_memory, mut out) = (memory(gpu, q), room::<f32>(gpu, q.len()));
    let (from, to) = (q_memory.slice(), out.slice_mut());
    attend(gpu, &plan, heads, layer, cut, from, &kv, &mut parts, to).unwrap();
    numbers(gpu, &out, q.len())
}
