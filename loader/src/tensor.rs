//! A borrowed tensor: a type, a shape, a layout, and bytes that somebody else keeps alive.

use std::ops::{Deref, Range};
use std::sync::Arc;

use crate::map::FileMap;

/// Number format of a tensor. Block types have the GGUF meaning of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// 32 weights: f16 scale, 32 signed bytes. `w = d * q`.
    Q8_0,
    /// 32 weights: f16 scale, 32 nibbles. `w = d * (q - 8)`.
    Q4_0,
    /// 32 weights: f16 scale, f16 minimum, 32 nibbles. `w = d * q + m`.
    Q4_1,
    /// 256 weights: 6-bit values, 16 signed 8-bit scales, f16 super-scale.
    /// `w = d * sc[i / 16] * (q - 32)`.
    Q6K,
}

impl DType {
    /// Weights in one block; 1 for the float types.
    #[must_use]
    pub const fn block_weights(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q6K => 256,
        }
    }

    /// Bytes of one block in row order (as in GGUF).
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q6K => 210,
        }
    }

    /// Bits that one weight takes, scales included.
    #[must_use]
    pub fn bits(self) -> f64 {
        (self.block_bytes() * 8) as f64 / self.block_weights() as f64
    }

    /// The name used in `bundle.json` and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q6K => "q6_k",
        }
    }

    /// The inverse of [`DType::name`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4_1, Self::Q6K]
            .into_iter()
            .find(|dtype| dtype.name() == name)
    }

    /// Bytes of one row of `k` weights in row order; `None` if `k` is no whole number of blocks
    /// or the product overflows.
    #[must_use]
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        if !k.is_multiple_of(self.block_weights()) {
            return None;
        }
        (k / self.block_weights()).checked_mul(self.block_bytes())
    }
}

/// Order of a tensor's bytes. The model id is taken over [`Layout::Rows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Layout {
    /// Row after row, as in safetensors and GGUF.
    Rows,
    /// Panels of 16 output columns, K in sequence within a panel: see [`crate::layout`].
    Panel16,
}

impl Layout {
    /// The name used in `bundle.json`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Panel16 => "panel16",
        }
    }

    /// The inverse of [`Layout::name`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Rows, Self::Panel16].into_iter().find(|layout| layout.name() == name)
    }
}

/// Owner of a tensor's bytes: a memory map, or memory of our own.
pub type Owner = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Bytes inside something that outlives them.
#[derive(Clone)]
pub struct TensorBytes {
    owner: Owner,
    range: Range<usize>,
    is_mapped: bool,
}

impl TensorBytes {
    /// The bytes `range` of `owner`.
    ///
    /// # Panics
    /// If `range` is not inside `owner`.
    #[must_use]
    pub fn new(owner: Owner, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= (*owner).as_ref().len());
        Self { owner, range, is_mapped: false }
    }

    /// The bytes `range` of a mapped file.
    pub(crate) fn mapped(map: Arc<FileMap>, range: Range<usize>) -> Self {
        Self { is_mapped: true, ..Self::new(map, range) }
    }

    /// The whole map that these bytes are in, and where in it they are; `None` if they are in no
    /// map. A map has its pages for itself, and no byte of it changes.
    #[must_use]
    pub fn map(&self) -> Option<(&Owner, Range<usize>)> {
        self.is_mapped.then(|| (&self.owner, self.range.clone()))
    }

    /// Bytes that this tensor owns by itself (tests, generated models).
    #[must_use]
    pub fn owned(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self::new(Arc::new(bytes), range)
    }
}

impl Deref for TensorBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

/// A named tensor. A matrix has shape `[n, k]`: `n` outputs, each over `k` inputs.
#[derive(Clone)]
pub struct Tensor {
    /// The checkpoint name, for example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Number format of the elements.
    pub dtype: DType,
    /// Order of the elements.
    pub layout: Layout,
    /// `[n]` or `[n, k]`.
    pub shape: Vec<usize>,
    /// The stored bytes; with [`Layout::Panel16`] padded to whole panels.
    pub bytes: TensorBytes,
}
