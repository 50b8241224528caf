//! Launchers of `attend_verify.cu` and `attend_prefill.cu`: two ways to the same bits.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Memory, Slice, SliceMut, count};
use crate::kernel::Kernel;
use crate::kv::Kv;
use crate::plan::{AttendShape, PlanOnGpu};

/// Blocks that keep a GPU busy without splitting the keys.
const BLOCKS_ENOUGH: usize = 256;

/// Way in which the work is cut into launches. The result is the same for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// By keys where there are too few rows to keep the GPU busy, and room for the parts.
    Auto,
    /// By keys too: a block for each 256 positions, put together by a second kernel.
    Verify,
    /// By rows alone.
    Prefill,
}

/// Room for the parts of split keys.
pub struct Parts<M> {
    sums: M,
    weights: M,
}

impl<M: Memory> Parts<M> {
    /// Room for `rows` rows over `splits` splits of 256 positions.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn new(
        gpu: &mut impl Gpu<Memory = M>,
        heads: &AttendShape,
        rows: usize,
        splits: usize,
    ) -> Result<Self, GpuError> {
        let parts = rows.saturating_mul(heads.heads).saturating_mul(splits);
        let sums = parts.saturating_mul(4 * heads.head_dim);
        Ok(Self {
            sums: gpu.alloc(sums, "parts of attention")?,
            weights: gpu.alloc(parts.saturating_mul(8), "parts of attention")?,
        })
    }

    fn fit(&self, parts: usize, head_dim: usize) -> bool {
        let sums = parts.saturating_mul(4 * head_dim);
        sums <= self.sums.bytes() && parts.saturating_mul(8) <= self.weights.bytes()
    }
}

/// `out[r] = softmax(q[r] K^T / sqrt(head_dim)) V` over the keys that the plan names; q and out f32
/// `[rows][heads][head_dim]`.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit.
#[expect(clippy::too_many_arguments, reason = "one kernel, its operands")]
pub fn attend<G: Gpu>(
    gpu: &mut G,
    plan: &PlanOnGpu<G::Memory>,
    heads: &AttendShape,
    layer: usize,
    cut: Cut,
    q: Slice<'_, f32>,
    kv: &Kv<G::Memory>,
    parts: &mut Parts<G::Memory>,
    mut out: SliceMut<'_, f32>,
) -> Result<(), GpuError> {
    let (rows, head_dim) = (plan.rows(), heads.head_dim);
    if rows == 0 {
        return Ok(());
    }
    let shape = kv.shape();
    assert_eq!((shape.kv_heads, shape.head_dim), (heads.kv_heads, head_dim), "heads of the store");
    let numbers = rows * heads.heads * head_dim;
    assert!(q.len() >= numbers && out.len() >= numbers, "q and out of {rows} rows");
    let [k_pages, v_pages] = kv.pages(layer);
    let (tasks, splits) = (plan.task_count(), plan.splits());
    let room = parts.fit(rows * heads.heads * splits, head_dim);
    let params = abi::hat_attend {
        q: q.vectors(),
        k_pages,
        v_pages,
        out: out.vectors(),
        split_sums: parts.sums.slice_mut().pointer(),
        split_weights: parts.weights.slice_mut().pointer(),
        tasks: plan.tasks(),
        page_indices: plan.page_indices(),
        positions: plan.positions(),
        prefix_len: plan.prefix_len(),
        tail_indptr: plan.tail_indptr(),
        tail_slots: plan.tail_slots(),
        scale: std::f32::consts::LOG2_E / (head_dim as f32).sqrt(),
        kv_heads: count(heads.kv_heads),
        group: count(heads.group()),
        window: heads.window.unwrap_or(u32::MAX),
        splits: count(splits),
        reserved: 0,
    };
    let split = match cut {
        Cut::Auto => room && splits > 1 && tasks * heads.kv_heads < BLOCKS_ENOUGH,
        Cut::Verify => true,
        Cut::Prefill => false,
    };
    assert!(room || !split, "room for {splits} splits of {rows} rows");
    let [verify, merge, prefill] = kernels(head_dim);
    let kernel = if split { verify } else { prefill };
    let blocks = if split { splits } else { 1 };
    let grid = [count(tasks), count(heads.kv_heads), count(blocks)];
    // SAFETY: the plan's rows, slots and pages were checked against each other and the store's
    // pages; q, out and the parts have room for all rows, as asserted.
    unsafe { gpu.launch(Launch { kernel, grid }, &params) }?;
    if !split {
        return Ok(());
    }
    let grid = [count(rows * heads.heads), 1, 1];
    // SAFETY: every part of every query was written above; `out` has room for all queries.
    unsafe { gpu.launch(Launch { kernel: merge, grid }, &params) }
}

/// In splits, their merge, and without splits.
fn kernels(head_dim: usize) -> [Kernel; 3] {
    use Kernel as K;
    match head_dim {
        32 => [K::AttendVerify32, K::AttendMerge32, K::AttendPrefill32],
        64 => [K::AttendVerify64, K::AttendMerge64, K::AttendPrefill64],
        96 => [K::AttendVerify96, K::AttendMerge96, K::AttendPrefill96],
        128 => [K::AttendVerify128, K::AttendMerge128, K::AttendPrefill128],
        other => panic!("no kernel for heads of {other}; the plan was checked"),
    }
}
