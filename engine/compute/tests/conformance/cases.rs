//! Inputs at the edges, and one way to run each operation on any backend.

use half::f16;
use hat_compute::backend::{AttendArgs, Backend, LinearArgs, RopeArgs, TopLogit, Write};
use hat_loader::{DType, Layout, Tensor, TensorBytes, layout};
use hat_plan::{AttendBatch, AttendShape, KvShape, PAGE_SIZE, RowMove, TokenId};

pub(crate) const DTYPES: [DType; 7] =
    [DType::F32, DType::F16, DType::Bf16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q6K];

/// A seeded source of numbers.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.bits() as usize % end
    }

    /// Between -1 and 1.
    pub(crate) fn number(&mut self) -> f32 {
        self.bits().cast_signed() as f32 / 2_147_483_648.0
    }

    pub(crate) fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }
}

/// A matrix `[n, k]` of the dtype: ordinary numbers, some rows at the ends of the range, scales of
/// either sign, zero and subnormal.
pub(crate) fn matrix(dtype: DType, n: usize, k: usize, random: &mut Random) -> Tensor {
    let block = dtype.block_bytes();
    let mut rows: Vec<u8> =
        (0..n * dtype.row_bytes(k).expect("whole blocks")).map(|_| random.bits() as u8).collect();
    for (i, bytes) in rows.chunks_exact_mut(block).enumerate() {
        let x = random.number() / (k as f32).sqrt();
        let scale = match i % 11 {
            9 => f16::from_bits(random.bits() as u16 & 0x83ff), // zero or subnormal
            10 => f16::ZERO,
            _ => f16::from_f32(x / 8.0),
        }
        .to_le_bytes();
        match dtype {
            DType::F32 => bytes.copy_from_slice(&x.to_le_bytes()),
            DType::F16 if i % 7 == 0 => bytes.copy_from_slice(&scale),
            DType::F16 => bytes.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
            DType::Bf16 => bytes.copy_from_slice(&x.to_le_bytes()[2..]),
            DType::Q6K => bytes[208..].copy_from_slice(&scale),
            _ => bytes[..2].copy_from_slice(&scale),
        }
        if dtype == DType::Q4_1 {
            bytes[2..4].copy_from_slice(&f16::from_f32(random.number() / 8.0).to_le_bytes());
        }
        // Saturate some blocks: all weights at the ends of the range.
        match (dtype, i % 5) {
            (DType::Q8_0, 0) => bytes[2..].fill(0x80),
            (DType::Q8_0, 1) => bytes[2..].fill(0x7f),
            (DType::Q4_0, 0) => bytes[2..].fill(0),
            (DType::Q4_0 | DType::Q4_1, 1) => bytes[4..].fill(0xff),
            (DType::Q6K, 0) => bytes[..192].fill(0xff),
            (DType::Q6K, 1) => bytes[..192].fill(0),
            _ => {}
        }
        match (dtype, i % 3) {
            (DType::Q6K, 0) => bytes[192..208].fill(0x80),
            (DType::Q6K, 1) => bytes[192..208].fill(0x7f),
            _ => {}
        }
    }
    packed(dtype, n, k, &rows)
}

/// A matrix from bytes in row order.
pub(crate) fn packed(dtype: DType, n: usize, k: usize, rows: &[u8]) -> Tensor {
    let mut bytes = vec![0; layout::packed_bytes(dtype, n, k).expect("whole blocks")];
    layout::pack(dtype, n, k, rows, &mut bytes);
    bytes.resize(bytes.len().next_multiple_of(64), 0xEE); // as in a file
    Tensor {
        name: format!("{} [{n}, {k}]", dtype.name()),
        dtype,
        layout: Layout::Panel16,
        shape: vec![n, k],
        bytes: TensorBytes::owned(bytes),
    }
}

pub(crate) fn vector(numbers: &[f32]) -> Tensor {
    Tensor {
        name: format!("vector [{}]", numbers.len()),
        dtype: DType::F32,
        layout: Layout::Rows,
        shape: vec![numbers.len()],
        bytes: TensorBytes::owned(numbers.iter().flat_map(|x| x.to_le_bytes()).collect()),
    }
}

/// Rows of activations: ordinary ones, then rows of all +-the same number (every activation
/// saturates), zeros, one outlier, and numbers near nothing.
pub(crate) fn activations(rows: usize, k: usize, random: &mut Random) -> Vec<f32> {
    let mut x = random.numbers(rows * k);
    for (i, row) in x.chunks_exact_mut(k).enumerate() {
        match i % 8 {
            1 => row.fill(2.5),
            2 => row.fill(-2.5),
            3 => row.fill(0.0),
            4 => row[k / 2] = 300.0,
            5 => row.iter_mut().for_each(|x| *x *= 1e-37),
            _ => {}
        }
    }
    x
}

pub(crate) fn buffer<B: Backend>(
    b: &mut B,
    rows: usize,
    columns: usize,
    from: &[f32],
) -> B::Buffer {
    let mut buffer = b.alloc(rows, columns).expect("a small buffer");
    b.upload(from, &mut buffer);
    buffer
}

pub(crate) fn read<B: Backend>(
    b: &mut B,
    buffer: &B::Buffer,
    rows: usize,
    columns: usize,
) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows * columns];
    b.download(buffer, 0, &mut out);
    out
}

/// `linear` over `rows` rows of `x`; `old` is what the output holds before.
pub(crate) fn linear<B: Backend>(
    b: &mut B,
    weight: &Tensor,
    bias: Option<&Tensor>,
    x: &[f32],
    old: Option<&[f32]>,
) -> Vec<f32> {
    let (n, k) = (weight.shape[0], weight.shape[1]);
    let rows = x.len() / k;
    let weight = b.weight(weight).expect("a matrix");
    let bias = bias.map(|bias| b.weight(bias).expect("a vector"));
    let x = buffer(b, rows, k, x);
    let mut out = match old {
        Some(old) => buffer(b, rows, n, old),
        None => buffer(b, rows, n, &vec![f32::NAN; rows * n]),
    };
    let write = if old.is_some() { Write::Add } else { Write::Store };
    b.linear(rows, &x, write, LinearArgs { weight: &weight, bias: bias.as_ref(), out: &mut out });
    read(b, &out, rows, n)
}

pub(crate) fn embed<B: Backend>(b: &mut B, table: &Tensor, tokens: &[TokenId]) -> Vec<f32> {
    let k = table.shape[1];
    let table = b.weight(table).expect("a matrix");
    let mut x = b.alloc(tokens.len(), k).expect("a small buffer");
    b.embed(tokens, &table, &mut x);
    read(b, &x, tokens.len(), k)
}

pub(crate) fn rms_norm<B: Backend>(b: &mut B, x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let columns = weight.len();
    let rows = x.len() / columns;
    let weight = b.weight(&vector(weight)).expect("a vector");
    let x = buffer(b, rows, columns, x);
    let mut out = b.alloc(rows, columns).expect("a small buffer");
    b.rms_norm(rows, &x, &weight, eps, &mut out);
    read(b, &out, rows, columns)
}

pub(crate) fn rope_angles<B: Backend>(b: &mut B, positions: &[u32], inv_freq: &[f32]) -> Vec<f32> {
    let columns = inv_freq.len() * 2;
    let mut angles = b.alloc(positions.len(), columns).expect("a small buffer");
    b.rope_angles(positions, inv_freq, &mut angles);
    read(b, &angles, positions.len(), columns)
}

pub(crate) fn linear_each<B: Backend, const N: usize>(
    b: &mut B,
    weights: [&Tensor; N],
    x: &[f32],
) -> [Vec<f32>; N] {
    let k = weights[0].shape[1];
    let rows = x.len() / k;
    let x = buffer(b, rows, k, x);
    let taken = weights.map(|weight| b.weight(weight).expect("a matrix"));
    let mut outs = weights.map(|weight| b.alloc(rows, weight.shape[0]).expect("a small buffer"));
    let mut pairs = taken.iter().zip(&mut outs);
    let each = [(); N].map(|()| {
        let (weight, out) = pairs.next().expect("N of them");
        LinearArgs::of(weight, out)
    });
    b.linear_each(rows, &x, each);
    let mut widths = weights.iter().map(|weight| weight.shape[0]);
    outs.map(|out| read(b, &out, rows, widths.next().expect("N of them")))
}

pub(crate) fn linear_top<B: Backend>(
    b: &mut B,
    weight: &Tensor,
    x: &[f32],
    k: usize,
) -> Option<Vec<TopLogit>> {
    let rows = x.len() / weight.shape[1];
    let x = buffer(b, rows, weight.shape[1], x);
    let weight = b.weight(weight).expect("a matrix");
    let mut top = vec![TopLogit { value: f32::NAN, column: 7 }; rows * k];
    b.linear_top(rows, &x, &weight, &mut top).then_some(top)
}

pub(crate) fn swiglu<B: Backend>(b: &mut B, gate: &Tensor, up: &Tensor, x: &[f32]) -> Vec<f32> {
    let (n, k) = (gate.shape[0], gate.shape[1]);
    let rows = x.len() / k;
    let (gate, up) = (b.weight(gate).expect("a matrix"), b.weight(up).expect("a matrix"));
    let x = buffer(b, rows, k, x);
    let mut out = b.alloc(rows, n).expect("a small buffer");
    b.swiglu(rows, &x, &gate, &up, &mut out);
    read(b, &out, rows, n)
}

/// The gate of [`swiglu`] over given factors: matrices that pick them out of `[gate, up]`.
pub(crate) fn silu_mul<B: Backend>(
    b: &mut B,
    gate: &[f32],
    up: &[f32],
    columns: usize,
) -> Vec<f32> {
    let pick = |from: usize| {
        let mut bytes = vec![0; columns * 2 * columns * 4];
        for n in 0..columns {
            bytes[(n * 2 * columns + from + n) * 4..][..4].copy_from_slice(&1f32.to_le_bytes());
        }
        packed(DType::F32, columns, 2 * columns, &bytes)
    };
    let pairs = gate.chunks_exact(columns).zip(up.chunks_exact(columns));
    let x: Vec<f32> = pairs.flat_map(|(gate, up)| [gate, up].concat()).collect();
    swiglu(b, &pick(0), &pick(columns), &x)
}

/// Falling frequencies from operations that every platform rounds alike.
pub(crate) fn inv_freq(head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 1.0 / (1 + i * i) as f32).collect()
}

/// The parts of an [`AttendBatch`], built row by row.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    pub(crate) positions: Vec<u32>,
    pub(crate) slots: Vec<u32>,
    pub(crate) prefix_len: Vec<u32>,
    pub(crate) tail_indptr: Vec<u32>,
    pub(crate) tail_slots: Vec<u32>,
    pub(crate) q_indptr: Vec<u32>,
    pub(crate) page_indptr: Vec<u32>,
    pub(crate) page_indices: Vec<u32>,
}

impl Plan {
    pub(crate) fn new() -> Self {
        Self { tail_indptr: vec![0], q_indptr: vec![0], page_indptr: vec![0], ..Self::default() }
    }

    /// Rows `positions` of a sequence whose logical positions stand at their own slots.
    pub(crate) fn straight(mut self, positions: std::ops::Range<u32>, pages: &[u32]) -> Self {
        for position in positions {
            self.row(position, position, position + 1, &[]);
        }
        self.end(pages);
        self
    }

    /// One row; `tail` are the slots of positions `prefix_len..=position`.
    pub(crate) fn row(&mut self, position: u32, slot: u32, prefix_len: u32, tail: &[u32]) {
        assert_eq!(prefix_len as usize + tail.len(), position as usize + 1);
        self.positions.push(position);
        self.slots.push(slot);
        self.prefix_len.push(prefix_len);
        self.tail_slots.extend(tail);
        self.tail_indptr.push(self.tail_slots.len() as u32);
    }

    /// Ends a sequence.
    pub(crate) fn end(&mut self, pages: &[u32]) {
        self.q_indptr.push(self.positions.len() as u32);
        self.page_indices.extend(pages);
        self.page_indptr.push(self.page_indices.len() as u32);
    }

    pub(crate) fn borrow(&self) -> AttendBatch<'_> {
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
}

/// K and V of a model with two layers, of which the second is used.
pub(crate) const LAYERS: usize = 2;

/// `rope_append` and `attend` of steps after one another on one KV store. `q`, `k`, `v` are the
/// rows of all steps. Gives back the outputs of all steps (rotated q is in them by what it sees).
pub(crate) struct Attention<B: Backend> {
    pub(crate) shape: AttendShape,
    pub(crate) kv: B::Kv,
}

impl<B: Backend> Attention<B> {
    pub(crate) fn new(b: &mut B, shape: AttendShape, pages: usize) -> Self {
        let AttendShape { kv_heads, head_dim, .. } = shape;
        let shape_kv = KvShape { layers: LAYERS, pages, kv_heads, head_dim };
        Self { shape, kv: b.kv(shape_kv).expect("a small KV store") }
    }

    /// q after `rope_append` of a step.
    pub(crate) fn rotated(b: &mut B, shape: AttendShape, plan: &Plan, q: &[f32]) -> Vec<f32> {
        let AttendShape { heads, kv_heads, head_dim, .. } = shape;
        let rows = plan.positions.len();
        let mut attention = Self::new(b, shape, 1);
        let mut angles = b.alloc(rows, head_dim).expect("a small buffer");
        b.rope_angles(&plan.positions, &inv_freq(head_dim), &mut angles);
        let mut q = buffer(b, rows, heads * head_dim, q);
        let mut k = b.alloc(rows, kv_heads * head_dim).expect("a small buffer");
        let v = b.alloc(rows, kv_heads * head_dim).expect("a small buffer");
        let kv = &mut attention.kv;
        let plan = b.begin(plan.borrow(), &shape, kv);
        let (q_rows, k) = (&mut q, &mut k);
        b.rope_append(plan, RopeArgs { layer: 0, angles: &angles, q: q_rows, k, v: &v, kv });
        read(b, &q, rows, heads * head_dim)
    }

    /// One step: `q` `[rows][heads * head_dim]`, `k` and `v` `[rows][kv_heads * head_dim]`.
    pub(crate) fn step(
        &mut self,
        b: &mut B,
        plan: &Plan,
        q: &[f32],
        k: &[f32],
        v: &[f32],
    ) -> Vec<f32> {
        let (rows, layer) = (plan.positions.len(), LAYERS - 1);
        let AttendShape { heads, kv_heads, head_dim, .. } = self.shape;
        let mut angles = b.alloc(rows, head_dim).expect("a small buffer");
        b.rope_angles(&plan.positions, &inv_freq(head_dim), &mut angles);
        let mut q = buffer(b, rows, heads * head_dim, q);
        let mut k = buffer(b, rows, kv_heads * head_dim, k);
        let v = buffer(b, rows, kv_heads * head_dim, v);
        let kv = &mut self.kv;
        let plan = b.begin(plan.borrow(), &self.shape, kv);
        let (q_rows, k) = (&mut q, &mut k);
        b.rope_append(plan, RopeArgs { layer, angles: &angles, q: q_rows, k, v: &v, kv });
        let mut out = b.alloc(rows, heads * head_dim).expect("a small buffer");
        b.attend(plan, AttendArgs { layer, q: &q, kv: &self.kv, out: &mut out });
        read(b, &out, rows, heads * head_dim)
    }

    pub(crate) fn compact(&mut self, b: &mut B, moves: &[RowMove]) {
        b.compact(moves, &mut self.kv);
    }
}

/// q, k and v of rows that are told by their content alone, so that the same token at the same
/// position has the same numbers in every plan.
pub(crate) fn qkv(tokens: &[u32], shape: &AttendShape) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for token in tokens {
        let mut random = Random::new(u64::from(*token) + 77);
        q.extend(random.numbers(shape.heads * shape.head_dim).iter().map(|x| x * 3.0));
        k.extend(random.numbers(shape.kv_heads * shape.head_dim).iter().map(|x| x * 3.0));
        v.extend(random.numbers(shape.kv_heads * shape.head_dim));
    }
    (q, k, v)
}

pub(crate) fn pages_for(rows: usize) -> usize {
    rows.div_ceil(PAGE_SIZE)
}
