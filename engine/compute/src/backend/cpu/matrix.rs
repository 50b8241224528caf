//! A weight matrix in panels, and the loop over it that every level shares.
//!
//! The loop cuts rows into tiles of 8, 4, 2 and 1 and hands each tile with one panel to the level's
//! kernel, which gives back 16 sums a row. Everything that has an order (blocks of K, then bias,
//! then the old content) is the same for each tile, so the cut can't change a bit.

use std::ops::Range;

use hat_loader::layout::{PANEL, packed_bytes, panel_block_bytes};
use hat_loader::{DType, Layout, Tensor, TensorBytes};

use super::super::{BackendError, Write};
use super::math::{self, Block};
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

/// One level's kernel for one type of weight. `T` is what a row of input consists of.
pub(super) trait Tiles<T>: Copy {
    /// Rows of the largest tile: 4 or 8.
    const ROWS: usize;

    /// The sums of 16 columns for `R` rows: `panel` holds the columns' weights.
    fn tile<const R: usize>(self, panel: &[u8], rows: [&[T]; R]) -> Sums<R>;
}

/// Makes a level's kernels usable: a [`Tiles`] for each type of weight, and `linear`, which chooses
/// among them. `$call!` wraps each call of a kernel; `$rows` is [`Tiles::ROWS`].
macro_rules! weight_types {
    ($call:ident, $rows:literal) => {
        $crate::backend::cpu::matrix::weight_types! { @types $call, $rows,
            Q4_0: Block, q4_0;
            Q4_1: Block, q4_1;
            Q8_0: Block, q8_0;
            Q6K: Block, q6_k;
            F32: f32, f32_numbers;
            F16: f32, f16_numbers;
            Bf16: f32, bf16_numbers;
        }

        /// The columns of a matrix, by its type.
        #[inline(always)]
        fn linear_of_type(
            job: &Linear<'_>,
            columns: std::ops::Range<usize>,
            out: &mut Part<'_, f32>,
        ) {
            use $crate::backend::cpu::matrix::for_each_panel;
            match job.weight.dtype {
                DType::Q4_0 => for_each_panel(job, job.blocks, columns, out, Q4_0),
                DType::Q4_1 => for_each_panel(job, job.blocks, columns, out, Q4_1),
                DType::Q8_0 => for_each_panel(job, job.blocks, columns, out, Q8_0),
                DType::Q6K => for_each_panel(job, job.blocks, columns, out, Q6K),
                DType::F32 => for_each_panel(job, job.x, columns, out, F32),
                DType::F16 => for_each_panel(job, job.x, columns, out, F16),
                DType::Bf16 => for_each_panel(job, job.x, columns, out, Bf16),
                other => unreachable!("{} is refused when the weight is taken", other.name()),
            }
        }
    };
    (@types $call:ident, $rows:literal, $($name:ident: $input:ty, $kernel:ident;)*) => {$(
        #[derive(Clone, Copy)]
        struct $name;

        impl $crate::backend::cpu::matrix::Tiles<$input> for $name {
            const ROWS: usize = $rows;

            #[inline(always)]
            fn tile<const R: usize>(self, panel: &[u8], rows: [&[$input]; R]) -> Sums<R> {
                $call!($kernel::<R>(panel, rows))
            }
        }
    )*};
}
pub(super) use weight_types;

/// Goes over the panels of `columns` over all rows. `x` is `[rows][width]`.
#[inline(always)]
pub(super) fn for_each_panel<T>(
    linear: &Linear<'_>,
    x: &[T],
    columns: Range<usize>,
    out: &mut Part<'_, f32>,
    tiles: impl Tiles<T>,
) {
    let panel_bytes = linear.weight.panel_bytes();
    let weight: &[u8] = &linear.weight.bytes;
    for first in (0..linear.rows).step_by(ROWS_IN_CACHE) {
        let end = linear.rows.min(first + ROWS_IN_CACHE);
        for column in columns.clone().step_by(PANEL) {
            let panel = &weight[column / PANEL * panel_bytes..][..panel_bytes];
            for_each_tile(
                linear,
                x,
                first..end,
                panel,
                (column, column - columns.start),
                out,
                tiles,
            );
        }
    }
}

/// One panel over some rows, in tiles of 8, 4, 2 and 1.
#[inline(always)]
fn for_each_tile<T, K: Tiles<T>>(
    linear: &Linear<'_>,
    x: &[T],
    rows: Range<usize>,
    panel: &[u8],
    at: (usize, usize),
    out: &mut Part<'_, f32>,
    tiles: K,
) {
    let width = x.len() / linear.rows;
    macro_rules! tile {
        ($row:expr, $rows:literal) => {{
            let of = |r: usize| &x[($row + r) * width..][..width];
            let sums = tiles.tile::<$rows>(panel, std::array::from_fn(of));
            finish(linear, &sums, $row, at, out);
        }};
    }
    let mut row = rows.start;
    while row < rows.end {
        row += match rows.end - row {
            8.. if K::ROWS >= 8 => {
                tile!(row, 8);
                8
            }
            4.. => {
                tile!(row, 4);
                4
            }
            2.. => {
                tile!(row, 2);
                2
            }
            _ => {
                tile!(row, 1);
                1
            }
        };
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
