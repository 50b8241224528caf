//! A tensor of a source: rows as they stand in its file, or made of what stands there.

use std::borrow::Cow;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::tensor::{DType, TensorBytes};

/// A tensor of the source, and what is to be done when it is asked for.
pub(crate) struct SourceTensor {
    pub(crate) path: PathBuf,
    /// Type in which its rows are given; their numbers are those of the file, bit for bit.
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) rows: Rows,
    pub(crate) origin: Origin,
    /// Heads whose rows stand in the interleaved order of GGUF's llama, if they do.
    pub(crate) interleaved_heads: Option<usize>,
}

/// Rows of a tensor.
pub(crate) enum Rows {
    /// As they stand in the file.
    Stored(TensorBytes),
    /// Made when they are asked for.
    Made(Arc<dyn MakeRows>),
}

/// Rows that stand in no file.
pub(crate) trait MakeRows: Send + Sync {
    /// Makes one row of `k` weights.
    fn make(&self, row: usize, k: usize, out: &mut [u8]);
}

/// Form of a tensor in its file, and in a bundle that keeps it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Origin {
    /// Name of the type in the file.
    pub(crate) name: Cow<'static, str>,
    /// Bits a weight in the file.
    pub(crate) bits: f64,
    /// Type that a bundle keeps it in; its numbers are rounded there unless its rows are given in
    /// this type.
    pub(crate) kept: DType,
}

impl Origin {
    /// A tensor in a type of ours.
    pub(crate) fn of(dtype: DType) -> Self {
        Self { name: Cow::Borrowed(dtype.name()), bits: dtype.bits(), kept: dtype }
    }
}

impl SourceTensor {
    /// A tensor that stands in a file as it is given.
    pub(crate) fn stored(
        path: PathBuf,
        dtype: DType,
        shape: Vec<usize>,
        bytes: TensorBytes,
    ) -> Self {
        let (rows, origin) = (Rows::Stored(bytes), Origin::of(dtype));
        Self { path, dtype, shape, rows, origin, interleaved_heads: None }
    }

    /// Number of its rows and of weights in one; a vector is one row.
    pub(crate) fn size(&self) -> (usize, usize) {
        let k = self.shape.last().copied().unwrap_or(0);
        (if self.shape.len() == 1 { 1 } else { self.shape[0] }, k)
    }

    /// True if `stored` holds the same numbers as f32.
    pub(crate) fn is_exact_as(&self, stored: DType) -> bool {
        stored == self.dtype || stored == DType::F32
    }

    /// The bytes of some rows; they may be put into `buffer`.
    pub(crate) fn rows<'a>(&'a self, rows: Range<usize>, buffer: &'a mut Vec<u8>) -> &'a [u8] {
        let (count, k) = self.size();
        assert!(rows.end <= count, "rows {rows:?} of {count}");
        let row_bytes = self.dtype.row_bytes(k).expect("checked when it was opened");
        if let (Rows::Stored(bytes), None) = (&self.rows, self.interleaved_heads) {
            return &bytes[rows.start * row_bytes..rows.end * row_bytes];
        }
        buffer.clear();
        buffer.resize(rows.len() * row_bytes, 0);
        for (row, out) in rows.zip(buffer.chunks_exact_mut(row_bytes)) {
            let from = self.interleaved_heads.map_or(row, |heads| interleaved(row, count, heads));
            match &self.rows {
                Rows::Stored(bytes) => {
                    out.copy_from_slice(&bytes[from * row_bytes..][..row_bytes]);
                }
                Rows::Made(made) => made.make(from, k, out),
            }
        }
        buffer
    }

    /// All rows.
    pub(crate) fn bytes(&self) -> TensorBytes {
        if let (Rows::Stored(bytes), None) = (&self.rows, self.interleaved_heads) {
            return bytes.clone();
        }
        let mut buffer = Vec::new();
        self.rows(0..self.size().0, &mut buffer);
        TensorBytes::owned(buffer)
    }
}

/// Place of a row in GGUF's interleaved order (pair `i` of a head at rows `2i` and `2i + 1`) by its
/// place in the half-split order (rows `i` and `i + head_dim / 2`).
fn interleaved(row: usize, rows: usize, heads: usize) -> usize {
    let head_dim = rows / heads;
    let (head, in_head) = (row / head_dim, row % head_dim);
    let (half, pair) = (in_head / (head_dim / 2), in_head % (head_dim / 2));
    head * head_dim + 2 * pair + half
}
