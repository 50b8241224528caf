//! The panel layout: one interleaved order that serves one row and many rows alike.
//!
//! A matrix `[n, k]` stands in *panels* of [`PANEL`] output columns. Within a panel the blocks of K
//! follow each other, and the panels follow each other without a gap, so a kernel reads one
//! straight stream. `n` is padded to whole panels with zero bytes. Packing keeps every bit of the
//! row order (it only moves bits), so the packed tensor has the size of the padded rows, and
//! [`unpack`] gives the row order back; the model id is taken over that.
//!
//! One panel-block holds the same block of K of 16 columns. Column `c = 8 h + i` sits in *half*
//! `h`, lane `i`; a *word* is the 4 consecutive bytes of one lane, 32 bytes are one half:
//!
//! | dtype | weights of K | bytes | content |
//! |---|---|---|---|
//! | f32, f16, bf16 | 1 | 64, 32, 32 | 16 numbers |
//! | q8_0 | 32 | 544 | for word `j` in 0..8, half: weights `4j..4j+4` of each lane; 16 f16 `d` |
//! | q4_0 | 32 | 288 | for word `j` in 0..4, half: low nibbles `4j..`, high `16+4j..`; 16 f16 `d` |
//! | q4_1 | 32 | 320 | as q4_0; then 16 f16 `m` |
//! | q6_k | 256 | 3360 | 16 f16 `d`; 8 units of 416 bytes, each 32 weights |
//!
//! A unit of q6_k: 256 bytes of low nibbles as in q4_0; 128 bytes of high bits (for group `g` in
//! 0..2, half: bits `2s..2s+2` of a byte belong to weight `16g + 4s + byte % 4` of the lane); 16
//! scales of weights 0..16; 16 scales of weights 16..32.

use half::{bf16, f16};

use crate::DType;

/// Output columns of a panel.
pub const PANEL: usize = 16;
/// Weights of K that share a scale in the 32-weight types, and bytes of one half of a word row.
const UNIT: usize = 32;
/// Bytes of one unit of a q6_k panel-block.
pub const Q6K_UNIT_BYTES: usize = PANEL * (16 + 8 + 2);

/// Bytes of one panel-block: [`PANEL`] columns of one block of K.
#[must_use]
pub const fn panel_block_bytes(dtype: DType) -> usize {
    PANEL * dtype.block_bytes()
}

/// Bytes of an `[n, k]` matrix in panels; `None` if `k` is no whole number of blocks or the
/// product overflows.
#[must_use]
pub fn packed_bytes(dtype: DType, n: usize, k: usize) -> Option<usize> {
    let row = dtype.row_bytes(k)?;
    n.div_ceil(PANEL).checked_mul(PANEL)?.checked_mul(row)
}

/// Packs an `[n, k]` matrix: `rows` in row order, `out` of [`packed_bytes`].
///
/// # Panics
/// If `k` is no whole number of blocks, or a length is not the one that the shape gives.
pub fn pack(dtype: DType, n: usize, k: usize, rows: &[u8], out: &mut [u8]) {
    let shape = Shape::new(dtype, n, k, rows.len(), out.len());
    out.fill(0);
    for column in 0..n {
        for block in 0..shape.blocks {
            let from = &rows[shape.row_block(column, block)..][..shape.block];
            let to = &mut out[shape.panel_block(column, block)..][..shape.block * PANEL];
            match dtype {
                DType::F32 | DType::F16 | DType::Bf16 => {
                    to[column % PANEL * shape.block..][..shape.block].copy_from_slice(from);
                }
                DType::Q6K => pack_q6k(from, to, column % PANEL),
                _ => moves(dtype, column % PANEL, |row, panel| to[panel] = from[row]),
            }
        }
    }
}

/// The inverse of [`pack`]: `out` gets the `n` rows in row order. `packed` may be longer than
/// [`packed_bytes`] (files pad tensors).
///
/// # Panics
/// If `k` is no whole number of blocks, or a length is not the one that the shape gives.
pub fn unpack(dtype: DType, n: usize, k: usize, packed: &[u8], out: &mut [u8]) {
    let bytes = packed_bytes(dtype, n, k).unwrap_or(usize::MAX).min(packed.len());
    let shape = Shape::new(dtype, n, k, out.len(), bytes);
    for column in 0..n {
        let row = &mut out[shape.row_block(column, 0)..][..shape.blocks * shape.block];
        shape.unpack_column(dtype, packed, column, row);
    }
}

/// Row `n` alone of what [`unpack`] gives, for one look-up in an embedding table. `out` is one
/// row in row order.
///
/// # Panics
/// If `k` is no whole number of blocks, a length does not fit it, or the row is beyond `packed`.
pub fn unpack_row(dtype: DType, k: usize, packed: &[u8], n: usize, out: &mut [u8]) {
    assert_eq!(dtype.row_bytes(k), Some(out.len()), "{} [{k}]: bytes of a row", dtype.name());
    let shape = Shape { blocks: k / dtype.block_weights(), block: dtype.block_bytes() };
    shape.unpack_column(dtype, packed, n, out);
}

/// Geometry of a matrix's blocks in both orders.
struct Shape {
    /// Blocks of one row.
    blocks: usize,
    /// Bytes of one block of one row.
    block: usize,
}

impl Shape {
    fn new(dtype: DType, n: usize, k: usize, rows_len: usize, packed_len: usize) -> Self {
        let name = dtype.name();
        let packed = packed_bytes(dtype, n, k);
        assert_eq!(packed, Some(packed_len), "{name} [{n}, {k}]: packed bytes");
        let blocks = k / dtype.block_weights();
        let block = dtype.block_bytes();
        assert_eq!(n * blocks * block, rows_len, "{name} [{n}, {k}]: bytes in row order");
        Self { blocks, block }
    }

    fn unpack_column(&self, dtype: DType, packed: &[u8], column: usize, row: &mut [u8]) {
        for (block, to) in row.chunks_exact_mut(self.block).enumerate() {
            let from = &packed[self.panel_block(column, block)..][..self.block * PANEL];
            match dtype {
                DType::F32 | DType::F16 | DType::Bf16 => {
                    to.copy_from_slice(&from[column % PANEL * self.block..][..self.block]);
                }
                DType::Q6K => unpack_q6k(from, to, column % PANEL),
                _ => moves(dtype, column % PANEL, |row, panel| to[row] = from[panel]),
            }
        }
    }

    fn row_block(&self, column: usize, block: usize) -> usize {
        (column * self.blocks + block) * self.block
    }

    fn panel_block(&self, column: usize, block: usize) -> usize {
        (column / PANEL * self.blocks + block) * self.block * PANEL
    }
}

/// Byte pairs (offset in the row's block, offset in the panel-block) of the 32-weight types.
#[inline(always)]
fn moves(dtype: DType, column: usize, mut byte: impl FnMut(usize, usize)) {
    let (words, head) = match dtype {
        DType::Q8_0 => (8, 2),
        DType::Q4_0 => (4, 2),
        _ => (4, 4),
    };
    for j in 0..words {
        for t in 0..4 {
            byte(head + j * 4 + t, word(j, column) + t);
        }
    }
    for t in 0..head {
        byte(t, words * 2 * UNIT + t / 2 * 2 * PANEL + column * 2 + t % 2);
    }
}

/// Offset of word `j` of a column in a plane of words.
const fn word(j: usize, column: usize) -> usize {
    (j * 2 + column / 8) * UNIT + column % 8 * 4
}

// q6_k in row order: ql[128], qh[64], scales[16], d.
const Q6K_QH: usize = 128;
const Q6K_SCALES: usize = 192;
const Q6K_D: usize = 208;

/// Place of weight `i` of a q6_k block in row order: byte and shift of its low nibble, byte and
/// shift of its high bits.
const fn q6k_place(i: usize) -> (usize, usize, usize, usize) {
    let (part, quarter, l) = (i / 128, i % 128 / 32, i % 32);
    let low = part * 64 + quarter % 2 * 32 + l;
    (low, quarter / 2 * 4, Q6K_QH + part * 32 + l, quarter * 2)
}

/// Puts the code of weight `i`, 0..64, into a q6_k block in row order; it must be zero there.
pub(crate) fn put_q6k(block: &mut [u8], i: usize, code: u8) {
    let (low, low_shift, high, high_shift) = q6k_place(i);
    block[low] |= (code & 15) << low_shift;
    block[high] |= code >> 4 << high_shift;
}

/// Place of weight `i` in a q6_k panel-block, in the terms of [`q6k_place`].
const fn q6k_panel_place(i: usize, column: usize) -> (usize, usize, usize, usize) {
    let unit = 2 * PANEL + i / UNIT * Q6K_UNIT_BYTES;
    let (group, l) = (i % UNIT / 16, i % 16);
    let low = unit + word(l / 4, column) + l % 4;
    (low, group * 4, unit + 16 * PANEL + word(group, column) + l % 4, l / 4 * 2)
}

/// Byte of scale `s` (of weights `16 s..`) in a q6_k panel-block.
const fn q6k_panel_scale(s: usize, column: usize) -> usize {
    2 * PANEL + s / 2 * Q6K_UNIT_BYTES + 24 * PANEL + s % 2 * PANEL + column
}

fn pack_q6k(from: &[u8], to: &mut [u8], column: usize) {
    for i in 0..256 {
        let (low, low_shift, high, high_shift) = q6k_place(i);
        let (to_low, to_low_shift, to_high, to_high_shift) = q6k_panel_place(i, column);
        to[to_low] |= (from[low] >> low_shift & 15) << to_low_shift;
        to[to_high] |= (from[high] >> high_shift & 3) << to_high_shift;
    }
    for s in 0..16 {
        to[q6k_panel_scale(s, column)] = from[Q6K_SCALES + s];
    }
    to[column * 2..][..2].copy_from_slice(&from[Q6K_D..]);
}

fn unpack_q6k(from: &[u8], to: &mut [u8], column: usize) {
    to.fill(0);
    for i in 0..256 {
        let (low, low_shift, high, high_shift) = q6k_panel_place(i, column);
        let (to_low, to_low_shift, to_high, to_high_shift) = q6k_place(i);
        to[to_low] |= (from[low] >> low_shift & 15) << to_low_shift;
        to[to_high] |= (from[high] >> high_shift & 3) << to_high_shift;
    }
    for s in 0..16 {
        to[Q6K_SCALES + s] = from[q6k_panel_scale(s, column)];
    }
    to[Q6K_D..].copy_from_slice(&from[column * 2..][..2]);
}

/// The numbers of one row that stands in row order: what the bytes mean. `out` is `[k]`.
///
/// Every result is the exact value rounded once to f32.
///
/// # Panics
/// If `k` is no whole number of blocks, or a length is not the one that `k` gives.
pub fn dequantise_row(dtype: DType, k: usize, row: &[u8], out: &mut [f32]) {
    assert_eq!(dtype.row_bytes(k), Some(row.len()), "{} [{k}]: bytes of a row", dtype.name());
    assert_eq!(k, out.len(), "numbers of a row");
    let blocks = row.chunks_exact(dtype.block_bytes());
    for (block, out) in blocks.zip(out.chunks_exact_mut(dtype.block_weights())) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        match dtype {
            DType::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            DType::F16 => out[0] = half(0),
            DType::Bf16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            DType::Q8_0 => {
                for (x, &q) in out.iter_mut().zip(&block[2..]) {
                    *x = half(0) * f32::from(q.cast_signed());
                }
            }
            DType::Q4_0 => {
                for (i, x) in out.iter_mut().enumerate() {
                    *x = half(0) * (f32::from(nibble(&block[2..], i)) - 8.0);
                }
            }
            DType::Q4_1 => {
                for (i, x) in out.iter_mut().enumerate() {
                    *x = half(0) * f32::from(nibble(&block[4..], i)) + half(2);
                }
            }
            DType::Q6K => {
                for (i, x) in out.iter_mut().enumerate() {
                    let (low, low_shift, high, high_shift) = q6k_place(i);
                    let q = block[low] >> low_shift & 15 | (block[high] >> high_shift & 3) << 4;
                    let scale = half(Q6K_D) * f32::from(block[Q6K_SCALES + i / 16].cast_signed());
                    *x = scale * (f32::from(q) - 32.0);
                }
            }
        }
    }
}

/// Weight `i` of the 16 nibble bytes of a block: low nibbles are weights 0..16, high 16..32.
const fn nibble(bytes: &[u8], i: usize) -> u8 {
    bytes[i % 16] >> (i / 16 * 4) & 15
}

/// Quantises one row to q8_0: `d = max |x| / 127` as f16, `q` the nearest byte. `out` has
/// `DType::Q8_0.row_bytes(x.len())`.
///
/// Numbers must be finite; a block beyond f16's range saturates.
///
/// # Panics
/// If the length of `x` is no multiple of 32, or that of `out` does not fit it.
pub fn quantise_q8_0(x: &[f32], out: &mut [u8]) {
    assert_eq!(DType::Q8_0.row_bytes(x.len()), Some(out.len()), "q8_0 [{}]", x.len());
    for (x, out) in x.chunks_exact(UNIT).zip(out.chunks_exact_mut(34)) {
        let amax = x.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        let d = finite_f16(amax / 127.0);
        let inverse = if d == f16::ZERO { 0.0 } else { 1.0 / d.to_f32() };
        out[..2].copy_from_slice(&d.to_le_bytes());
        for (q, x) in out[2..].iter_mut().zip(x) {
            *q = ((x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8).cast_unsigned();
        }
    }
}

/// Quantises one row to q4_1: `m = min x`, `d = (max x - min x) / 15`, both as f16, `q` the
/// nearest nibble. `out` has `DType::Q4_1.row_bytes(x.len())`.
///
/// Numbers must be finite; a block beyond f16's range saturates.
///
/// # Panics
/// If the length of `x` is no multiple of 32, or that of `out` does not fit it.
pub fn quantise_q4_1(x: &[f32], out: &mut [u8]) {
    assert_eq!(DType::Q4_1.row_bytes(x.len()), Some(out.len()), "q4_1 [{}]", x.len());
    for (x, out) in x.chunks_exact(UNIT).zip(out.chunks_exact_mut(20)) {
        let min = x.iter().fold(f32::INFINITY, |min, &v| min.min(v));
        let max = x.iter().fold(f32::NEG_INFINITY, |max, &v| max.max(v));
        let m = finite_f16(min);
        let d = finite_f16((max - m.to_f32()) / 15.0);
        let inverse = if d == f16::ZERO { 0.0 } else { 1.0 / d.to_f32() };
        out[..2].copy_from_slice(&d.to_le_bytes());
        out[2..4].copy_from_slice(&m.to_le_bytes());
        let q = |x: f32| ((x - m.to_f32()) * inverse).round_ties_even().clamp(0.0, 15.0) as u8;
        for (i, byte) in out[4..].iter_mut().enumerate() {
            *byte = q(x[i]) | q(x[i + 16]) << 4;
        }
    }
}

fn finite_f16(x: f32) -> f16 {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}
