//! The specification of meaning: each operation in plain scalar Rust over dequantised weights.
//!
//! f32 in and out, f64 in between, the mathematical functions of the standard library. Slow, and
//! not bitwise anything; the fast backends are held to it within tolerances. It shares no code
//! with them but the meaning of the weight blocks.

use half::f16;
use hat_loader::{DType, Tensor, TensorBytes, layout};

use super::{
    AttendArgs, AttendBatch, AttendShape, Backend, BackendError, Computes, KvShape, LinearArgs,
    PAGE_SIZE, RopeArgs, RowMove, TokenId, TopLogit, Write, weight_shape,
};

const NAME: &str = "reference";

/// The scalar backend.
#[derive(Default)]
pub struct Reference;

/// Activations.
pub struct Buffer {
    /// `[capacity][columns]`
    data: Vec<f32>,
    columns: usize,
}

/// A weight and its shape; `k` is 0 for a vector.
pub struct Weight {
    bytes: TensorBytes,
    dtype: DType,
    n: usize,
    k: usize,
}

/// K and V, `[layers][pages][PAGE_SIZE][kv_heads][head_dim]` each.
pub struct Kv {
    shape: KvShape,
    k: Vec<f16>,
    v: Vec<f16>,
}

impl Buffer {
    fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.columns..][..self.columns]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.columns..][..self.columns]
    }
}

impl Weight {
    /// Row `n` of a matrix, or a whole vector, as numbers.
    fn numbers(&self, n: usize) -> Vec<f32> {
        if self.k == 0 {
            let mut out = vec![0.0; self.n];
            layout::dequantise_row(DType::F32, self.n, &self.bytes[..self.n * 4], &mut out);
            return out;
        }
        assert!(n < self.n, "row {n} of {}", self.n);
        let mut row = vec![0; self.dtype.row_bytes(self.k).expect("checked when it was taken")];
        layout::unpack_row(self.dtype, self.k, &self.bytes, n, &mut row);
        let mut out = vec![0.0; self.k];
        layout::dequantise_row(self.dtype, self.k, &row, &mut out);
        out
    }
}

impl Kv {
    fn at(&self, layer: usize, (page, row): (u32, u32), head: usize) -> usize {
        let KvShape { layers, pages, kv_heads, head_dim } = self.shape;
        let (page, row) = (page as usize, row as usize);
        assert!(layer < layers && page < pages && row < PAGE_SIZE && head < kv_heads);
        (((layer * pages + page) * PAGE_SIZE + row) * kv_heads + head) * head_dim
    }
}

/// Place in the KV store of a slot of the sequence that `row` belongs to.
fn place(plan: &AttendBatch<'_>, row: usize, slot: u32) -> (u32, u32) {
    let ends = plan.q_indptr.iter().skip(1);
    let sequence = ends.take_while(|end| **end as usize <= row).count();
    let pages = plan.page_indptr[sequence] as usize..plan.page_indptr[sequence + 1] as usize;
    let slot = slot as usize;
    (plan.page_indices[pages][slot / PAGE_SIZE], (slot % PAGE_SIZE) as u32)
}

fn dot(a: &[f32], b: impl Iterator<Item = f64>) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum()
}

impl Computes for Reference {
    fn describe(&self) -> String {
        "reference: scalar, f64 sums".to_owned()
    }

    fn arithmetic_id(&self) -> u32 {
        0
    }
}

impl Backend for Reference {
    type Buffer = Buffer;
    type Weight = Weight;
    type Kv = Kv;
    type Plan<'p> = (AttendBatch<'p>, AttendShape);

    fn alloc(&mut self, capacity: usize, columns: usize) -> Result<Buffer, BackendError> {
        Ok(Buffer { data: vec![0.0; capacity * columns], columns })
    }

    fn weight(&mut self, tensor: &Tensor) -> Result<Weight, BackendError> {
        let [n, k, _] = weight_shape(NAME, tensor)?;
        Ok(Weight { bytes: tensor.bytes.clone(), dtype: tensor.dtype, n, k })
    }

    fn kv(&mut self, shape: KvShape) -> Result<Kv, BackendError> {
        let numbers = shape.bytes() / 4;
        Ok(Kv { shape, k: vec![f16::ZERO; numbers], v: vec![f16::ZERO; numbers] })
    }

    fn upload(&mut self, from: &[f32], to: &mut Buffer) {
        to.data[..from.len()].copy_from_slice(from);
    }

    fn download(&mut self, from: &Buffer, first_row: usize, to: &mut [f32]) {
        to.copy_from_slice(&from.data[first_row * from.columns..][..to.len()]);
    }

    fn embed(&mut self, tokens: &[TokenId], table: &Weight, x: &mut Buffer) {
        for (row, token) in tokens.iter().enumerate() {
            x.row_mut(row).copy_from_slice(&table.numbers(*token as usize));
        }
    }

    fn rms_norm(&mut self, rows: usize, x: &Buffer, weight: &Weight, eps: f32, out: &mut Buffer) {
        let weight = weight.numbers(0);
        for row in 0..rows {
            let x = x.row(row);
            let mean = dot(x, x.iter().map(|x| f64::from(*x))) / x.len() as f64;
            let scale = 1.0 / (mean + f64::from(eps)).sqrt();
            for ((out, x), weight) in out.row_mut(row).iter_mut().zip(x).zip(&weight) {
                *out = (f64::from(*x) * scale * f64::from(*weight)) as f32;
            }
        }
    }

    fn linear(&mut self, rows: usize, x: &Buffer, write: Write, args: LinearArgs<'_, Self>) {
        let LinearArgs { weight, bias, out } = args;
        assert_eq!((weight.n, weight.k), (out.columns, x.columns), "outputs and inputs");
        let bias = bias.map(|bias| bias.numbers(0));
        for n in 0..weight.n {
            let numbers = weight.numbers(n);
            for row in 0..rows {
                let sum = dot(x.row(row), numbers.iter().map(|w| f64::from(*w)));
                let sum = sum + bias.as_ref().map_or(0.0, |bias| f64::from(bias[n]));
                let out = &mut out.row_mut(row)[n];
                *out = match write {
                    Write::Store => sum as f32,
                    Write::Add => (f64::from(*out) + sum) as f32,
                };
            }
        }
    }

    fn linear_top(
        &mut self,
        rows: usize,
        x: &Buffer,
        weight: &Weight,
        top: &mut [TopLogit],
    ) -> bool {
        let mut out = Buffer { data: vec![0.0; rows * weight.n], columns: weight.n };
        self.linear(rows, x, Write::Store, LinearArgs::of(weight, &mut out));
        top.fill(TopLogit::NONE);
        for (row, top) in top.chunks_exact_mut(top.len() / rows.max(1)).enumerate() {
            for (column, value) in (0..).zip(out.row(row)) {
                TopLogit { value: *value, column }.insert(top);
            }
        }
        out.data.iter().all(|value| value.is_finite())
    }

    fn swiglu(&mut self, rows: usize, x: &Buffer, gate: &Weight, up: &Weight, out: &mut Buffer) {
        let mut other = Buffer { data: vec![0.0; rows * up.n], columns: up.n };
        self.linear(rows, x, Write::Store, LinearArgs::of(gate, out));
        self.linear(rows, x, Write::Store, LinearArgs::of(up, &mut other));
        for row in 0..rows {
            for (out, up) in out.row_mut(row).iter_mut().zip(other.row(row)) {
                let x = f64::from(*out);
                *out = (x / (1.0 + (-x).exp()) * f64::from(*up)) as f32;
            }
        }
    }

    fn rope_angles(&mut self, positions: &[u32], inv_freq: &[f32], angles: &mut Buffer) {
        for (row, position) in positions.iter().enumerate() {
            let (cos, sin) = angles.row_mut(row).split_at_mut(inv_freq.len());
            for ((cos, sin), inv_freq) in cos.iter_mut().zip(sin).zip(inv_freq) {
                let angle = f64::from(*position as f32 * inv_freq);
                (*cos, *sin) = (angle.cos() as f32, angle.sin() as f32);
            }
        }
    }

    fn begin<'p>(&mut self, plan: AttendBatch<'p>, shape: &AttendShape, _: &Kv) -> Self::Plan<'p> {
        (plan, *shape)
    }

    fn rope_append(&mut self, (plan, shape): Self::Plan<'_>, args: RopeArgs<'_, Self>) {
        let RopeArgs { layer, angles, q, k, v, kv } = args;
        for row in 0..plan.rows() {
            let (cos, sin) = angles.row(row).split_at(shape.head_dim / 2);
            let heads = q.row_mut(row).chunks_exact_mut(shape.head_dim);
            for head in heads.chain(k.row_mut(row).chunks_exact_mut(shape.head_dim)) {
                let half = cos.len();
                for i in 0..half {
                    let (x, y) = (f64::from(head[i]), f64::from(head[i + half]));
                    let (cos, sin) = (f64::from(cos[i]), f64::from(sin[i]));
                    head[i] = (x * cos - y * sin) as f32;
                    head[i + half] = (y * cos + x * sin) as f32;
                }
            }
            let at = kv.at(layer, place(&plan, row, plan.slots[row]), 0);
            for (i, (k, v)) in k.row(row).iter().zip(v.row(row)).enumerate() {
                kv.k[at + i] = f16::from_f32(*k);
                kv.v[at + i] = f16::from_f32(*v);
            }
        }
    }

    fn attend(&mut self, (plan, shape): Self::Plan<'_>, args: AttendArgs<'_, Self>) {
        let AttendArgs { layer, q, kv, out } = args;
        let head_dim = shape.head_dim;
        for row in 0..plan.rows() {
            let prefix = 0..plan.prefix_len[row];
            let tail = plan.tail_indptr[row] as usize..plan.tail_indptr[row + 1] as usize;
            let slots: Vec<u32> = prefix.chain(plan.tail_slots[tail].iter().copied()).collect();
            assert_eq!(slots.len(), plan.positions[row] as usize + 1, "keys of row {row}");
            let window = shape.window.map_or(slots.len(), |window| window as usize);
            let seen = &slots[slots.len() - window.min(slots.len())..];
            for head in 0..shape.heads {
                let kv_head = head / (shape.heads / shape.kv_heads);
                let at = |slot: &u32| kv.at(layer, place(&plan, row, *slot), kv_head);
                let q = &q.row(row)[head * head_dim..][..head_dim];
                let key = |slot| kv.k[at(slot)..][..head_dim].iter().map(|k| k.to_f64());
                let score = |slot| dot(q, key(slot)) / (head_dim as f64).sqrt();
                let scores: Vec<f64> = seen.iter().map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let values = seen.iter().map(|slot| kv.v[at(slot) + d].to_f64());
                    let sum: f64 = values.zip(&weights).map(|(v, weight)| v * weight).sum();
                    out.row_mut(row)[head * head_dim + d] = (sum / total) as f32;
                }
            }
        }
    }

    fn compact(&mut self, moves: &[RowMove], kv: &mut Kv) {
        let row = kv.shape.kv_heads * kv.shape.head_dim;
        for RowMove { from, to } in moves {
            for layer in 0..kv.shape.layers {
                let (from, to) = (kv.at(layer, *from, 0), kv.at(layer, *to, 0));
                kv.k.copy_within(from..from + row, to);
                kv.v.copy_within(from..from + row, to);
            }
        }
    }
}
