//! The seam under the model: one method for each kernel, in place, nothing allocated per step.
//!
//! Activations are f32 rows. Which rows attend to what is an [`AttendPlan`]; where K and V live is
//! the backend's [`Backend::Kv`], in pages of [`PAGE_SIZE`] rows. The arithmetic that every CPU
//! backend reproduces to the bit is written in `docs/ARITHMETIC.md` under its arithmetic id.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod fault;
mod lent;
pub mod reference;

use hat_loader::Tensor;

pub use self::fault::BackendFault;
pub use self::lent::Lent;

/// An index into the vocabulary.
pub type TokenId = u32;

/// The arithmetic of the CPU backends, as specified in `docs/ARITHMETIC.md`.
pub const ARITHMETIC_CPU: u32 = 1;
/// The arithmetic of the CUDA kernels, which stands in their sources (`docs/KERNELS.md`).
pub const ARITHMETIC_CUDA: u32 = 2;

/// Rows of one KV page, and keys of one attention tile.
pub const PAGE_SIZE: usize = 32;

/// What can go wrong below the model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// A tensor has a type, layout or shape that this backend has no kernel for.
    #[error("{backend}: no kernel for tensor {tensor}: {reason}")]
    Unsupported {
        /// Which backend.
        backend: &'static str,
        /// The tensor's name.
        tensor: String,
        /// What does not fit.
        reason: String,
    },
    /// The backend can't be started as configured.
    #[error("{backend}: {field}: {reason}")]
    Config {
        /// Which backend.
        backend: &'static str,
        /// The field of its configuration.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Memory could not be had.
    #[error("{backend}: {bytes} bytes for {purpose} could not be allocated")]
    OutOfMemory {
        /// Which backend.
        backend: &'static str,
        /// How many bytes were asked for.
        bytes: usize,
        /// What for.
        purpose: &'static str,
    },
    /// It did not compute what it was asked to.
    #[error(transparent)]
    Fault(#[from] BackendFault),
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
    /// Bytes of K and V together.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layers * self.pages * self.kv_heads * self.head_dim * PAGE_SIZE * 2 * 2
    }
}

/// Which rows attend to what. Ragged, sequence after sequence, in the order of the batch.
///
/// A *slot* counts rows of KV within one sequence: slot `s` is row `s % PAGE_SIZE` of page
/// `page_indices[page_indptr[i] + s / PAGE_SIZE]`. The first `prefix_len[r]` logical positions of
/// row `r` stand at the slots of the same number; the rest (ancestors in a draft tree, and the
/// row itself if it is not at its own position's slot) are named one by one in `tail_slots`, in
/// logical order. So row `r` sees `prefix_len[r] + tail` keys, and `positions[r]` is one less.
#[derive(Clone, Copy, Debug)]
pub struct AttendPlan<'a> {
    /// Logical position of each row. `[rows]`
    pub positions: &'a [u32],
    /// Slot that each row's own K and V go to. `[rows]`
    pub slots: &'a [u32],
    /// Logical positions of each row that stand at the slot of the same number. `[rows]`
    pub prefix_len: &'a [u32],
    /// Where each row's part of `tail_slots` begins and ends. `[rows + 1]`
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

impl AttendPlan<'_> {
    /// Rows in the batch.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.positions.len()
    }
}

/// How one model attends; the same for every layer.
#[derive(Clone, Copy, Debug, PartialEq)]
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

/// What happens to the old content of a `linear`'s output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Overwritten.
    Store,
    /// Added to (the residual stream): `out = out + result`, one rounding after the sum over K.
    Add,
}

/// One of the largest numbers of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Top {
    /// The number: a logit.
    pub value: f32,
    /// Its column: a token.
    pub column: u32,
}

impl Top {
    /// Below every finite number.
    pub const NONE: Self = Self { value: f32::NEG_INFINITY, column: u32::MAX };

    /// Whether it comes before another.
    #[must_use]
    pub fn is_before(&self, other: &Self) -> bool {
        self.value > other.value || (self.value == other.value && self.column < other.column)
    }

    /// Puts it in its place of a list that falls, whose last number gives way; if it has one.
    pub fn insert(self, list: &mut [Self]) {
        let mut at = list.len();
        while at > 0 && self.is_before(&list[at - 1]) {
            at -= 1;
        }
        if at < list.len() {
            list[at..].rotate_right(1);
            list[at] = self;
        }
    }
}

/// One of several `linear`s of the same input: its matrix, its bias, and where its rows go.
pub struct LinearInto<'a, B: Backend + ?Sized> {
    /// `[n, k]`
    pub weight: &'a B::Weight,
    /// f32 `[n]`, if there is one.
    pub bias: Option<&'a B::Weight>,
    /// `[rows, n]`, overwritten.
    pub out: &'a mut B::Buffer,
}

/// One K/V row moves within the KV store, for all layers: `(page, row)` to `(page, row)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowMove {
    /// Page and row within it that is read.
    pub from: (u32, u32),
    /// Page and row within it that is written.
    pub to: (u32, u32),
}

/// One method for each kernel. All row counts are explicit; a buffer may be larger.
///
/// Shapes are the caller's promise: a violated one is a bug in this program and panics with both
/// numbers. What the outside world can get wrong (a tensor, a size) is a [`BackendError`], and
/// only the start-up methods return it.
pub trait Backend: Send + 'static {
    /// Activations: `capacity x columns` f32.
    type Buffer: Send;
    /// A weight in this backend's hands; on the CPU a view of the memory map.
    type Weight: Send;
    /// K and V of all layers.
    type Kv: Send;

    /// One line for people: which kernels run, and why.
    fn describe(&self) -> String;
    /// The exact arithmetic of all methods. Equal ids give equal bits; 0 promises nothing.
    fn arithmetic_id(&self) -> u32;
    /// What went wrong since the last question. Then nothing was computed since, and what KV
    /// stores hold means nothing. A fault that lasts is the answer from then on.
    fn fault(&mut self) -> Option<BackendFault> {
        None
    }

    /// A zeroed buffer. Start-up only.
    fn alloc(&mut self, capacity: usize, columns: usize) -> Result<Self::Buffer, BackendError>;
    /// Takes a weight: a `[n, k]` matrix in [`hat_loader::Layout::Panel16`], or an f32 `[n]`
    /// vector in [`hat_loader::Layout::Rows`]. Start-up only; copies nothing on the CPU.
    fn weight(&mut self, tensor: &Tensor) -> Result<Self::Weight, BackendError>;
    /// A KV store. Its content is undefined until written. Start-up only.
    fn kv(&mut self, shape: KvShape) -> Result<Self::Kv, BackendError>;

    /// Host rows into the front of a buffer: `from.len()` is a whole number of rows.
    fn upload(&mut self, from: &[f32], to: &mut Self::Buffer);
    /// Rows `first_row..` of a buffer to the host; waits for the work that fills them.
    fn download(&mut self, from: &Self::Buffer, first_row: usize, to: &mut [f32]);

    /// `x[r] = table[tokens[r]]`, dequantised. `table` is `[vocab, hidden]`, `x` `[rows, hidden]`.
    fn embed(&mut self, tokens: &[TokenId], table: &Self::Weight, x: &mut Self::Buffer);
    /// `out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight`.
    fn rms_norm(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Weight,
        eps: f32,
        out: &mut Self::Buffer,
    );
    /// `out[r][n] = sum_k x[r][k] * weight[n][k] (+ bias[n])`. Bias is an f32 vector.
    fn linear(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
        write: Write,
        out: &mut Self::Buffer,
    );
    /// The `k = top.len() / rows` largest of each row of `x W^T`, the largest first, without the
    /// rest in memory: `top[r * k + i]`. Equal ones stand in the order of their columns. Gives
    /// `false` if some number is not finite; `top` means nothing then.
    fn linear_top(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Weight,
        top: &mut [Top],
    ) -> bool;
    /// Several `linear`s of the same rows (q, k and v) as one: one wait for all threads, the
    /// input read once.
    fn linear_each<const N: usize>(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        each: [LinearInto<'_, Self>; N],
    ) {
        for LinearInto { weight, bias, out } in each {
            self.linear(rows, x, weight, bias, Write::Store, out);
        }
    }
    /// The gate of a feed-forward part: `out = silu(x gate^T) * (x up^T)`, with
    /// `silu(x) = x / (1 + exp(-x))` (SwiGLU, arXiv 2002.05202). Both matrices have one shape.
    fn swiglu(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        gate: &Self::Weight,
        up: &Self::Weight,
        out: &mut Self::Buffer,
    );
    /// Angles of rotary position embedding for one step: `angles[r] = [cos.., sin..]` of
    /// `positions[r] * inv_freq[i]`, `head_dim / 2` each. The product is rounded to f32.
    fn rope_angles(&mut self, positions: &[u32], inv_freq: &[f32], angles: &mut Self::Buffer);
    /// Rotates q (in place) and k by half-split pairs `(i, i + head_dim/2)`, and puts k and v
    /// as f16 into the KV store at each row's slot.
    #[expect(clippy::too_many_arguments, reason = "one kernel, its operands")]
    fn rope_append(
        &mut self,
        plan: &AttendPlan<'_>,
        shape: &AttendShape,
        layer: usize,
        angles: &Self::Buffer,
        q: &mut Self::Buffer,
        k: &mut Self::Buffer,
        v: &Self::Buffer,
        kv: &mut Self::Kv,
    );
    /// `out[r] = softmax(q[r] K^T / sqrt(head_dim)) V` over the keys that the plan names.
    fn attend(
        &mut self,
        plan: &AttendPlan<'_>,
        shape: &AttendShape,
        layer: usize,
        q: &Self::Buffer,
        kv: &Self::Kv,
        out: &mut Self::Buffer,
    );
    /// Moves K/V rows, in order, for all layers: keeps the accepted path of a tree.
    fn compact(&mut self, moves: &[RowMove], kv: &mut Self::Kv);

    /// Makes room for `count` hand-overs of `capacity x columns` rows to `next`, which may then
    /// [`Backend::borrow`] what this one lends. How rows get there, in words; `None` where they
    /// have to go through the host. Start-up only.
    fn link(
        &mut self,
        next: &Self,
        capacity: usize,
        columns: usize,
        count: usize,
    ) -> Result<Option<String>, BackendError>
    where
        Self: Sized,
    {
        let _ = (next, capacity, columns, count);
        Ok(None)
    }
    /// Leaves the first rows of a buffer for the backend that this one is linked to, and waits for
    /// the work that fills them. `None` if something is wrong, or all room is lent.
    fn lend(&mut self, rows: usize, from: &Self::Buffer) -> Option<Lent> {
        let _ = (rows, from);
        None
    }
    /// Lent rows into the front of a buffer. They go back once the step's rows were waited for.
    fn borrow(&mut self, rows: usize, lent: Lent, to: &mut Self::Buffer) {
        let _ = (rows, lent, to);
        unreachable!("rows are lent to a backend that was linked");
    }
}
