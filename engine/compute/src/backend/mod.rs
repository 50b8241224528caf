//! The seam under the model: one method for each kernel, in place, nothing allocated per step.
//!
//! Activations are f32 rows. Which rows attend to what is an [`AttendBatch`]; where K and V live is
//! the backend's [`Backend::Kv`], in pages of [`PAGE_SIZE`] rows. The arithmetic that every CPU
//! backend reproduces to the bit is written in `docs/ARITHMETIC.md` under its arithmetic id.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "testkit")]
pub mod reference;

use hat_loader::layout::packed_bytes;
use hat_loader::{DType, Layout, Tensor};
pub use hat_plan::Write;
use hat_plan::{
    ARITHMETIC_CPU, AttendBatch, AttendShape, BackendError, Computes, KvShape, PAGE_SIZE, RowMove,
    SharedRows, TokenId,
};

/// One of the largest numbers of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopLogit {
    /// The number: a logit.
    pub value: f32,
    /// Its column: a token.
    pub column: u32,
}

impl TopLogit {
    /// Below every finite number.
    pub const NONE: Self = Self { value: f32::NEG_INFINITY, column: u32::MAX };

    /// True if it comes before another.
    #[must_use]
    pub fn outranks(&self, other: &Self) -> bool {
        self.value > other.value || (self.value == other.value && self.column < other.column)
    }

    /// Puts it in its place of a list that falls, whose last number gives way; if it has one.
    pub fn insert(self, list: &mut [Self]) {
        let mut at = list.len();
        while at > 0 && self.outranks(&list[at - 1]) {
            at -= 1;
        }
        if at < list.len() {
            list[at..].rotate_right(1);
            list[at] = self;
        }
    }
}

/// A tensor that a backend can't take as a weight.
fn unsupported(backend: &'static str, tensor: &Tensor, reason: String) -> BackendError {
    BackendError::Unsupported { backend, tensor: tensor.name.clone(), reason }
}

/// Outputs, inputs (0 of a vector) and bytes of a tensor that has a form [`Backend::weight`] takes.
fn weight_shape(backend: &'static str, tensor: &Tensor) -> Result<[usize; 3], BackendError> {
    let Tensor { shape, layout, dtype, bytes, .. } = tensor;
    let (dtype_name, layout_name) = (dtype.name(), layout.name());
    let refuse = |reason| Err(unsupported(backend, tensor, reason));
    let (n, k, needed) = match (&shape[..], layout, *dtype) {
        (&[n], Layout::Rows, DType::F32) => (n, 0, n.checked_mul(4)),
        (&[_], ..) => {
            let got = format!("{dtype_name} in {layout_name}");
            return refuse(format!("a vector must be f32 in rows, not {got}"));
        }
        (&[n, k], Layout::Panel16, dtype) if k > 0 => (n, k, packed_bytes(dtype, n, k)),
        _ => {
            let got = format!("shape {shape:?} in {layout_name}");
            return refuse(format!("{got}; [n, k] in panel16 or [n] in rows"));
        }
    };
    match needed {
        None => refuse(format!("shape {shape:?} is no whole number of {dtype_name} blocks")),
        Some(needed) if bytes.len() < needed => {
            refuse(format!("{} bytes, but its shape takes {needed}", bytes.len()))
        }
        Some(needed) => Ok([n, k, needed]),
    }
}

/// A `linear`: its matrix, its bias, and where its rows go.
pub struct LinearArgs<'a, B: Backend + ?Sized> {
    /// `[n, k]`
    pub weight: &'a B::Weight,
    /// f32 `[n]`, if there is one.
    pub bias: Option<&'a B::Weight>,
    /// `[rows, n]`
    pub out: &'a mut B::Buffer,
}

impl<'a, B: Backend + ?Sized> LinearArgs<'a, B> {
    /// A `linear` without a bias.
    pub fn of(weight: &'a B::Weight, out: &'a mut B::Buffer) -> Self {
        Self { weight, bias: None, out }
    }
}

/// Operands of [`Backend::rope_append`]: rows to rotate and keep, for one layer of the KV store.
pub struct RopeArgs<'a, B: Backend + ?Sized> {
    /// The layer's number in the KV store.
    pub layer: usize,
    /// Angles as [`Backend::rope_angles`] made them. `[rows, head_dim]`
    pub angles: &'a B::Buffer,
    /// Rotated in place. `[rows, heads * head_dim]`
    pub q: &'a mut B::Buffer,
    /// Rotated, maybe in place. `[rows, kv_heads * head_dim]`
    pub k: &'a mut B::Buffer,
    /// `[rows, kv_heads * head_dim]`
    pub v: &'a B::Buffer,
    /// Gets k and v.
    pub kv: &'a mut B::Kv,
}

/// Operands of [`Backend::attend`]: input and output, for one layer of the KV store.
pub struct AttendArgs<'a, B: Backend + ?Sized> {
    /// The layer's number in the KV store.
    pub layer: usize,
    /// Rotated. `[rows, heads * head_dim]`
    pub q: &'a B::Buffer,
    /// K and V.
    pub kv: &'a B::Kv,
    /// `[rows, heads * head_dim]`
    pub out: &'a mut B::Buffer,
}

/// One method for each kernel. All row counts are explicit; a buffer may be larger.
///
/// Shapes are the caller's promise: a violated one is a bug in this program and panics with both
/// numbers. What the outside world can get wrong (a tensor, a size) is a [`BackendError`], and
/// only the start-up methods return it.
pub trait Backend: Computes + Send + 'static {
    /// Activations: `capacity x columns` f32.
    type Buffer: Send;
    /// A weight in this backend's hands; on the CPU a view of the memory map.
    type Weight: Send;
    /// K and V of all layers.
    type Kv: Send;
    /// A plan that was begun: which rows attend to what, as the kernels take it.
    type Plan<'p>: Copy;

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
    fn linear(&mut self, rows: usize, x: &Self::Buffer, write: Write, args: LinearArgs<'_, Self>);
    /// The `k = top.len() / rows` largest of each row of `x W^T`, the largest first, without the
    /// rest in memory: `top[r * k + i]`. Equal ones stand in the order of their columns. Gives
    /// `false` if some number is not finite; `top` means nothing then.
    fn linear_top(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        weight: &Self::Weight,
        top: &mut [TopLogit],
    ) -> bool;
    /// Several `linear`s of the same rows (q, k and v) as one, [`Write::Store`] each: one wait for
    /// all threads, the input read once.
    fn linear_each<const N: usize>(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        each: [LinearArgs<'_, Self>; N],
    ) {
        for args in each {
            self.linear(rows, x, Write::Store, args);
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
    /// Takes a plan over a KV store, for all layers of a step. It holds until the next is begun.
    fn begin<'p>(
        &mut self,
        plan: AttendBatch<'p>,
        shape: &AttendShape,
        kv: &Self::Kv,
    ) -> Self::Plan<'p>;
    /// Rotates q (in place) and k by half-split pairs `(i, i + head_dim/2)`, and puts k and v
    /// as f16 into the KV store at each row's slot.
    fn rope_append(&mut self, plan: Self::Plan<'_>, args: RopeArgs<'_, Self>);
    /// `out[r] = softmax(q[r] K^T / sqrt(head_dim)) V` over the keys that the plan names.
    fn attend(&mut self, plan: Self::Plan<'_>, args: AttendArgs<'_, Self>);
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
    fn lend(&mut self, rows: usize, from: &Self::Buffer) -> Option<SharedRows> {
        let _ = (rows, from);
        None
    }
    /// Lent rows into the front of a buffer. They go back once the step's rows were waited for.
    fn borrow(&mut self, rows: usize, shared: SharedRows, to: &mut Self::Buffer) {
        let _ = (rows, shared, to);
        unreachable!("rows are lent to a backend that was linked");
    }
}
