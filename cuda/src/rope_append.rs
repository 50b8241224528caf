//! Launcher of `rope_append.cu`.

use crate::abi;
use crate::gpu::{Gpu, GpuError, Launch, Slice, SliceMut, count};
use crate::kernel::Kernel;
use crate::kv::Kv;
use crate::plan::{AttendShape, PlanOnGpu};

/// Operands of [`rope_append`].
#[derive(Debug)]
pub struct RopeAppend<'a> {
    /// f32 `[rows][head_dim]`: cosines of the row's angles, then sines.
    pub angles: Slice<'a, f32>,
    /// f32 `[rows][heads][head_dim]`, in place.
    pub q: SliceMut<'a, f32>,
    /// f32 `[rows][kv_heads][head_dim]`
    pub k: Slice<'a, f32>,
    /// f32 `[rows][kv_heads][head_dim]`
    pub v: Slice<'a, f32>,
}

/// Rotates q and k by pairs `(i, i + head_dim / 2)`, and puts k and v as f16 to each row's slot.
///
/// # Errors
/// If the GPU fails.
///
/// # Panics
/// If a length does not fit.
pub fn rope_append<G: Gpu>(
    gpu: &mut G,
    plan: &PlanOnGpu<G::Memory>,
    heads: &AttendShape,
    layer: usize,
    mut to: RopeAppend<'_>,
    kv: &mut Kv<G::Memory>,
) -> Result<(), GpuError> {
    let (rows, head_dim) = (plan.rows(), heads.head_dim);
    if rows == 0 {
        return Ok(());
    }
    let shape = *kv.shape();
    assert_eq!((shape.kv_heads, shape.head_dim), (heads.kv_heads, head_dim), "heads of the store");
    let (q, k) = (rows * heads.heads * head_dim, rows * heads.kv_heads * head_dim);
    assert!(to.angles.len() >= rows * head_dim, "angles of {rows} rows");
    assert!(to.q.len() >= q && to.k.len() >= k && to.v.len() >= k, "q, k, v of {rows} rows");
    let [k_pages, v_pages] = kv.pages_mut(layer);
    let params = abi::hat_rope_append {
        q: to.q.pointer(),
        k: to.k.pointer(),
        v: to.v.pointer(),
        angles: to.angles.pointer(),
        places: plan.places(),
        k_pages,
        v_pages,
        heads: count(heads.heads),
        kv_heads: count(heads.kv_heads),
        head_dim: count(head_dim),
        reserved: 0,
    };
    // SAFETY: one block a row; the plan's places were checked against the store's pages, and the
    // lengths above.
    unsafe { gpu.launch(Launch { kernel: Kernel::RopeAppend, grid: [count(rows), 1, 1] }, &params) }
}
