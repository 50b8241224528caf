//! A weight matrix in panels, and the loop over it that every level shares.
//!
//! The loop cuts rows into tiles of 8, 4, 2 and 1 and hands each tile with one panel to the level's
//! kernel, which gives back 16 sums a row. Everything that has an order (blocks of K, then bias,
//! then the old content) is the same for each tile, so the cut can't change a bit.

use std::ops::Range;

use hat_loader::layout::{PANEL, panel_block_bytes};
use hat_loader::{DType, Tensor, TensorBytes};

use super::super::{BackendError, Write, unsupported, weight_shape};
use super::formats::{Format, has_kernel};
use super::math::{self, Block};
use super::simd::Simd;
use super::threads::Part;

/// Rows whose activations stay in L2 while all panels pass by.
const ROWS_IN_CACHE: usize = 128;

/// A weight: a view of bytes that somebody maps, or has.
pub struct CpuWeight {
    pub(super) bytes: TensorBytes,
    pub(super) dtype: DType,
    /// Outputs of a matrix; numbers of a vector.
    pub(super) n: usize,
    /// Inputs of a matrix; 0 for a vector.
    pub(super) k: usize,
    /// The checkpoint name, for messages.
    pub(super) name: String,
}

impl CpuWeight {
    /// Takes a tensor if there is a kernel for it; copies none of its bytes.
    pub(super) fn new(backend: &'static str, tensor: &Tensor) -> Result<Self, BackendError> {
        let [n, k, _] = weight_shape(backend, tensor)?;
        let Tensor { bytes, dtype, name, .. } = tensor.clone();
        if !has_kernel(dtype) {
            let reason = format!("there is no kernel for {}", dtype.name());
            return Err(unsupported(backend, tensor, reason));
        }
        Ok(Self { bytes, dtype, n, k, name })
    }

    /// Bytes of one panel.
    fn panel_bytes(&self) -> usize {
        self.k / self.dtype.block_weights() * panel_block_bytes(self.dtype)
    }

    /// The bytes of a vector's numbers.
    ///
    /// # Panics
    /// If this is no vector of `n` numbers.
    pub(super) fn vector(&self, n: usize) -> &[u8] {
        assert_eq!((self.n, self.k), (n, 0), "{}: a vector of {n} is needed", self.name);
        &self.bytes[..n * 4]
    }
}

/// Operation on a finished sum.
#[derive(Clone, Copy)]
pub(super) enum Finish {
    /// Overwrites the old content.
    Store,
    /// Is added to it.
    Add,
    /// Is multiplied with its SiLU.
    Gate,
}

impl From<Write> for Finish {
    fn from(write: Write) -> Self {
        match write {
            Write::Store => Self::Store,
            Write::Add => Self::Add,
        }
    }
}

/// One `linear`, as every thread sees it.
pub(super) struct Linear<'a> {
    pub(super) weight: &'a CpuWeight,
    pub(super) rows: usize,
    /// `[rows][k]`, for the float types.
    pub(super) x: &'a [f32],
    /// `[rows][k / 32]`, for the block types.
    pub(super) blocks: &'a [Block],
    /// f32 bytes `[n]`.
    pub(super) bias: Option<&'a [u8]>,
    pub(super) finish: Finish,
}

/// The sums of a tile: 16 columns a row.
pub(super) type Sums<const R: usize> = [[f32; PANEL]; R];

/// Goes over the panels of `columns` over all rows.
#[inline(always)]
pub(super) fn for_each_panel<S: Simd, F: Format>(
    s: S,
    linear: &Linear<'_>,
    columns: Range<usize>,
    out: &mut Part<'_, f32>,
) {
    let panel_bytes = linear.weight.panel_bytes();
    let weight: &[u8] = &linear.weight.bytes;
    for first in (0..linear.rows).step_by(ROWS_IN_CACHE) {
        let rows = first..linear.rows.min(first + ROWS_IN_CACHE);
        for column in columns.clone().step_by(PANEL) {
            let panel = &weight[column / PANEL * panel_bytes..][..panel_bytes];
            let at = (column, column - columns.start);
            for_each_tile::<S, F>(s, linear, rows.clone(), panel, at, out);
        }
    }
}

/// One panel over some rows, in tiles of 8, 4, 2 and 1.
#[inline(always)]
fn for_each_tile<S: Simd, F: Format>(
    s: S,
    linear: &Linear<'_>,
    rows: Range<usize>,
    panel: &[u8],
    at: (usize, usize),
    out: &mut Part<'_, f32>,
) {
    let x = F::input(linear);
    let width = x.len() / linear.rows;
    let mut row = rows.start;
    macro_rules! tile {
        ($rows:literal) => {{
            let of = |r: usize| &x[(row + r) * width..][..width];
            let sums = F::tile::<S, $rows>(s, panel, std::array::from_fn(of));
            finish(linear, &sums, row, at, out);
            row += $rows;
        }};
    }
    while row < rows.end {
        match rows.end - row {
            8.. if S::ROWS >= 8 => tile!(8),
            4.. => tile!(4),
            2.. => tile!(2),
            _ => tile!(1),
        }
    }
}

/// Finishes the sums of a tile, and stores those that are inside the matrix.
#[inline(always)]
fn finish<const R: usize>(
    linear: &Linear<'_>,
    sums: &Sums<R>,
    row: usize,
    (column, at): (usize, usize),
    out: &mut Part<'_, f32>,
) {
    let bias = linear.bias.map(|bias| bias[column * 4..].as_chunks::<4>().0);
    for (r, sums) in sums.iter().enumerate() {
        let out = &mut out.row(row + r)[at..];
        if let Some(out) = out.first_chunk_mut() {
            finish_row(linear.finish, bias, sums, out);
        } else {
            let mut padded = [0.0; PANEL];
            padded[..out.len()].copy_from_slice(out);
            finish_row(linear.finish, bias, sums, &mut padded);
            out.copy_from_slice(&padded[..out.len()]);
        }
    }
}

/// Adds the bias, then does what `finish` says, each with one rounding.
#[inline(always)]
fn finish_row(
    finish: Finish,
    bias: Option<&[[u8; 4]]>,
    sums: &[f32; PANEL],
    out: &mut [f32; PANEL],
) {
    let mut sums = *sums;
    for (sum, bias) in sums.iter_mut().zip(bias.unwrap_or_default()) {
        *sum += f32::from_le_bytes(*bias);
    }
    match finish {
        Finish::Store => *out = sums,
        Finish::Add => {
            for (out, sum) in out.iter_mut().zip(&sums) {
                *out += sum;
            }
        }
        Finish::Gate => math::silu_mul(out, &sums),
    }
}
