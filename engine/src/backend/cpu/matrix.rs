//! A weight matrix in panels, and the walk over it that every level shares.
//!
//! The walk cuts rows into tiles of 4, 2 and 1 and hands each tile with one panel to the level's
//! kernel, which gives back 16 sums a row. Everything that has an order (blocks of K, then bias,
//! then the old content) is the same for each tile, so the cut can't change a bit.

use std::ops::Range;

use hat_loader::layout::{PANEL, packed_bytes, panel_block_bytes};
use hat_loader::{DType, Layout, Tensor, TensorBytes};

use super::super::{BackendError, Write};
use super::math::Block;
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
        let refuse = |reason: String| BackendError::Unsupported {
            backend,
            tensor: tensor.name.clone(),
            reason,
        };
        let (n, k, needed) = match (&tensor.shape[..], tensor.layout, tensor.dtype) {
            (&[n], Layout::Rows, DType::F32) => (n, 0, n.checked_mul(4)),
            (&[_], layout, dtype) => {
                let (dtype, layout) = (dtype.name(), layout.name());
                return Err(refuse(format!(
                    "a vector must be f32 in rows, not {dtype} in {layout}"
                )));
            }
            (&[n, k], Layout::Panel16, dtype) if k > 0 => (n, k, packed_bytes(dtype, n, k)),
            (shape, layout, _) => {
                let layout = layout.name();
                return Err(refuse(format!(
                    "shape {shape:?} in {layout}; [n, k] in panel16 or [n] in rows"
                )));
            }
        };
        let needed = needed.ok_or_else(|| {
            let (shape, dtype) = (&tensor.shape, tensor.dtype.name());
            refuse(format!("shape {shape:?} is no whole number of {dtype} blocks"))
        })?;
        if tensor.bytes.len() < needed {
            let bytes = tensor.bytes.len();
            return Err(refuse(format!("{bytes} bytes, but its shape takes {needed}")));
        }
        Ok(Self {
            bytes: tensor.bytes.clone(),
            dtype: tensor.dtype,
            n,
            k,
            name: tensor.name.clone(),
        })
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
    pub(super) write: Write,
}

/// The sums of a tile: 16 columns a row.
pub(super) type Sums<const R: usize> = [[f32; PANEL]; R];

/// Walks the panels of `columns` over all rows. `x` is `[rows][width]`, and `one`, `two`, `four`
/// compute a tile from a panel and its rows' inputs.
#[inline(always)]
pub(super) fn walk<T>(
    linear: &Linear<'_>,
    x: &[T],
    columns: Range<usize>,
    out: &mut Part<'_, f32>,
    one: impl Fn(&[u8], [&[T]; 1]) -> Sums<1>,
    two: impl Fn(&[u8], [&[T]; 2]) -> Sums<2>,
    four: impl Fn(&[u8], [&[T]; 4]) -> Sums<4>,
) {
    let panel_bytes = linear.weight.panel_bytes();
    let weight: &[u8] = &linear.weight.bytes;
    let width = x.len() / linear.rows.max(1);
    for first in (0..linear.rows).step_by(ROWS_IN_CACHE) {
        let end = linear.rows.min(first + ROWS_IN_CACHE);
        for column in columns.clone().step_by(PANEL) {
            let panel = &weight[column / PANEL * panel_bytes..][..panel_bytes];
            let of = |row: usize| &x[row * width..][..width];
            let at = column - columns.start;
            let mut row = first;
            while row < end {
                match end - row {
                    1 => {
                        let sums = one(panel, [of(row)]);
                        finish(linear, &sums, row, column, at, out);
                        row += 1;
                    }
                    2 | 3 => {
                        let sums = two(panel, [of(row), of(row + 1)]);
                        finish(linear, &sums, row, column, at, out);
                        row += 2;
                    }
                    _ => {
                        let sums = four(panel, [of(row), of(row + 1), of(row + 2), of(row + 3)]);
                        finish(linear, &sums, row, column, at, out);
                        row += 4;
                    }
                }
            }
        }
    }
}

/// Adds the bias, then the old content, each with one rounding; stores what is inside the matrix.
#[inline(always)]
fn finish<const R: usize>(
    linear: &Linear<'_>,
    sums: &Sums<R>,
    row: usize,
    column: usize,
    at: usize,
    out: &mut Part<'_, f32>,
) {
    for (r, sums) in sums.iter().enumerate() {
        let mut sums = *sums;
        let out = &mut out.row(row + r)[at..];
        let count = out.len().min(PANEL);
        let out = &mut out[..count];
        if let Some(bias) = linear.bias {
            for (sum, bias) in sums.iter_mut().zip(bias[column * 4..].as_chunks::<4>().0) {
                *sum += f32::from_le_bytes(*bias);
            }
        }
        match linear.write {
            Write::Store => out.copy_from_slice(&sums[..count]),
            Write::Add => {
                for (out, sum) in out.iter_mut().zip(&sums) {
                    *out += sum;
                }
            }
        }
    }
}
