//! Attention of a batch's rows: the plan, and the sizes of heads and KV stores.

/// Rows of one KV page, and keys of one attention tile.
pub const PAGE_SIZE: usize = 32;

/// Most rows that may pend at once, and so the longest tail of a row.
pub const PENDING_ROWS_MAX: usize = 64;

/// Positions, slots and pages that each row attends to. Ragged, sequence after sequence, in the
/// order of the batch.
///
/// A *slot* counts rows of KV within one sequence: slot `s` is row `s % PAGE_SIZE` of page
/// `page_indices[page_indptr[i] + s / PAGE_SIZE]`. The first `prefix_len[r]` logical positions of
/// row `r` stand at the slots of the same number; the rest (ancestors in a draft tree, and the
/// row itself if it is not at its own position's slot) are named one by one in `tail_slots`, in
/// logical order. So row `r` sees `prefix_len[r] + tail` keys, and `positions[r]` is one less.
#[derive(Clone, Copy, Debug)]
pub struct AttendBatch<'a> {
    /// Logical position of each row. `[rows]`
    pub positions: &'a [u32],
    /// Slot that each row's own K and V go to. `[rows]`
    pub slots: &'a [u32],
    /// Logical positions of each row that stand at the slot of the same number. `[rows]`
    pub prefix_len: &'a [u32],
    /// Begin and end of each row's part of `tail_slots`. `[rows + 1]`
    pub tail_indptr: &'a [u32],
    /// Slots of the logical positions `prefix_len..=position`.
    pub tail_slots: &'a [u32],
    /// Rows of sequence `i` are `q_indptr[i]..q_indptr[i + 1]`. `[sequences + 1]`
    pub q_indptr: &'a [u32],
    /// Pages of sequence `i` are `page_indices[page_indptr[i]..page_indptr[i + 1]]`.
    /// `[sequences + 1]`
    pub page_indptr: &'a [u32],
    /// Page numbers in the KV store.
    pub page_indices: &'a [u32],
}

impl AttendBatch<'_> {
    /// Rows in the batch.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.positions.len()
    }
}

/// Heads of one model's attention; the same for every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttendShape {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Numbers in one head; even.
    pub head_dim: usize,
    /// Keys further back than this are not seen (Mistral): a row at position `p` sees positions
    /// `p - window + 1 ..= p`.
    pub window: Option<u32>,
}

impl AttendShape {
    /// Query heads of one key/value head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// Size of a KV store: `layers x pages x kv_heads x PAGE_SIZE x head_dim`, f16, K and V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers of this submodel.
    pub layers: usize,
    /// Pages of [`PAGE_SIZE`] rows, each for all layers.
    pub pages: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Numbers in one head.
    pub head_dim: usize,
}

impl KvShape {
    /// Numbers of K, or of V, in one layer; `None` if they overflow.
    #[must_use]
    pub fn layer_numbers(&self) -> Option<usize> {
        [self.pages, self.kv_heads, PAGE_SIZE, self.head_dim]
            .into_iter()
            .try_fold(1usize, usize::checked_mul)
    }

    /// Numbers of K, or of V, in all layers; `None` if they overflow.
    #[must_use]
    pub fn numbers(&self) -> Option<usize> {
        self.layer_numbers()?.checked_mul(self.layers)
    }

    /// Bytes of K and V together.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layers * self.pages * self.kv_heads * self.head_dim * PAGE_SIZE * 2 * 2
    }
}

/// One K/V row moves within the KV store, for all layers: `(page, row)` to `(page, row)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowMove {
    /// Page and row within it that is read.
    pub from: (u32, u32),
    /// Page and row within it that is written.
    pub to: (u32, u32),
}

/// Treatment of the old content of a matrix product's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// The output is overwritten.
    Store,
    /// The result is added to it (the residual stream): `out = out + result`, one rounding after
    /// the sum over K.
    Add,
}
