// Made by hat-kernels of cuda/kernels/abi.h; not to be edited.

pub const HAT_PAGE_SIZE: u32 = 32;
pub const HAT_SPLIT_TILES: u32 = 8;
pub const HAT_PANEL: u32 = 16;
pub const HAT_BLOCK: u32 = 32;
pub const HAT_TOP_SLICE: u32 = 2048;
pub const HAT_F32: u32 = 0;
pub const HAT_F16: u32 = 1;
pub const HAT_BF16: u32 = 2;
pub const HAT_Q8_0: u32 = 3;
pub const HAT_Q4_0: u32 = 4;
pub const HAT_Q4_1: u32 = 5;
pub const HAT_Q6_K: u32 = 6;
/// rms_norm: `out = x / sqrt(mean(x^2) + eps) * weight`.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_rms_norm {
    /// f32 `[rows][columns]`
    pub x: *const f32,
    /// f32 `[columns]`
    pub weight: *const f32,
    /// f32 `[rows][columns]`
    pub out: *mut f32,
    /// A multiple of 4.
    pub columns: u32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_rms_norm"][::core::mem::size_of::<hat_rms_norm>() - 32usize];
    ["Alignment of hat_rms_norm"][::core::mem::align_of::<hat_rms_norm>() - 8usize];
    [
        "Offset of field: hat_rms_norm::x",
    ][::core::mem::offset_of!(hat_rms_norm, x) - 0usize];
    [
        "Offset of field: hat_rms_norm::weight",
    ][::core::mem::offset_of!(hat_rms_norm, weight) - 8usize];
    [
        "Offset of field: hat_rms_norm::out",
    ][::core::mem::offset_of!(hat_rms_norm, out) - 16usize];
    [
        "Offset of field: hat_rms_norm::columns",
    ][::core::mem::offset_of!(hat_rms_norm, columns) - 24usize];
    [
        "Offset of field: hat_rms_norm::eps",
    ][::core::mem::offset_of!(hat_rms_norm, eps) - 28usize];
};
/// embed: `out[r] = table[tokens[r]]`.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_embed {
    /// `[rows]`
    pub tokens: *const u32,
    /// `[vocabulary][columns]` in panels.
    pub table: *const u8,
    /// f32 `[rows][columns]`
    pub out: *mut f32,
    /// A multiple of 32 for block types.
    pub columns: u32,
    /// HAT_F32 ...
    pub dtype: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_embed"][::core::mem::size_of::<hat_embed>() - 32usize];
    ["Alignment of hat_embed"][::core::mem::align_of::<hat_embed>() - 8usize];
    [
        "Offset of field: hat_embed::tokens",
    ][::core::mem::offset_of!(hat_embed, tokens) - 0usize];
    [
        "Offset of field: hat_embed::table",
    ][::core::mem::offset_of!(hat_embed, table) - 8usize];
    [
        "Offset of field: hat_embed::out",
    ][::core::mem::offset_of!(hat_embed, out) - 16usize];
    [
        "Offset of field: hat_embed::columns",
    ][::core::mem::offset_of!(hat_embed, columns) - 24usize];
    [
        "Offset of field: hat_embed::dtype",
    ][::core::mem::offset_of!(hat_embed, dtype) - 28usize];
};
/// silu_mul: `out = gate / (1 + exp(-gate)) * up`.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_silu_mul {
    /// f32 `[count]`
    pub gate: *const f32,
    /// f32 `[count]`
    pub up: *const f32,
    /// f32 `[count]`; may be `gate` or `up`.
    pub out: *mut f32,
    /// A multiple of 4.
    pub count: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_silu_mul"][::core::mem::size_of::<hat_silu_mul>() - 32usize];
    ["Alignment of hat_silu_mul"][::core::mem::align_of::<hat_silu_mul>() - 8usize];
    [
        "Offset of field: hat_silu_mul::gate",
    ][::core::mem::offset_of!(hat_silu_mul, gate) - 0usize];
    [
        "Offset of field: hat_silu_mul::up",
    ][::core::mem::offset_of!(hat_silu_mul, up) - 8usize];
    [
        "Offset of field: hat_silu_mul::out",
    ][::core::mem::offset_of!(hat_silu_mul, out) - 16usize];
    [
        "Offset of field: hat_silu_mul::count",
    ][::core::mem::offset_of!(hat_silu_mul, count) - 24usize];
};
/// quantise_q8: rows in blocks of 32, `x = d q`.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_q8 {
    /// f32 `[rows][columns]`
    pub x: *const f32,
    /// `[rows][columns]`
    pub q: *mut i8,
    /// f32 `[rows][columns / 32]`
    pub d: *mut f32,
    /// f32 `[rows][columns / 32]`: d times the sum of the block's q.
    pub s: *mut f32,
    /// `rows * columns / 32`
    pub blocks: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_q8"][::core::mem::size_of::<hat_q8>() - 40usize];
    ["Alignment of hat_q8"][::core::mem::align_of::<hat_q8>() - 8usize];
    ["Offset of field: hat_q8::x"][::core::mem::offset_of!(hat_q8, x) - 0usize];
    ["Offset of field: hat_q8::q"][::core::mem::offset_of!(hat_q8, q) - 8usize];
    ["Offset of field: hat_q8::d"][::core::mem::offset_of!(hat_q8, d) - 16usize];
    ["Offset of field: hat_q8::s"][::core::mem::offset_of!(hat_q8, s) - 24usize];
    [
        "Offset of field: hat_q8::blocks",
    ][::core::mem::offset_of!(hat_q8, blocks) - 32usize];
};
/// rope_angles: cosines and sines of `positions[r] * inv_freq[i]`.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_rope_angles {
    /// `[rows]`
    pub positions: *const u32,
    /// f32 `[half]`
    pub inv_freq: *const f32,
    /// f32 `[rows][2 half]`: cosines, then sines.
    pub angles: *mut f32,
    pub rows: u32,
    pub half: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_rope_angles"][::core::mem::size_of::<hat_rope_angles>() - 32usize];
    [
        "Alignment of hat_rope_angles",
    ][::core::mem::align_of::<hat_rope_angles>() - 8usize];
    [
        "Offset of field: hat_rope_angles::positions",
    ][::core::mem::offset_of!(hat_rope_angles, positions) - 0usize];
    [
        "Offset of field: hat_rope_angles::inv_freq",
    ][::core::mem::offset_of!(hat_rope_angles, inv_freq) - 8usize];
    [
        "Offset of field: hat_rope_angles::angles",
    ][::core::mem::offset_of!(hat_rope_angles, angles) - 16usize];
    [
        "Offset of field: hat_rope_angles::rows",
    ][::core::mem::offset_of!(hat_rope_angles, rows) - 24usize];
    [
        "Offset of field: hat_rope_angles::half",
    ][::core::mem::offset_of!(hat_rope_angles, half) - 28usize];
};
/// rope_append: rotates q and k by pairs `(i, i + head_dim / 2)`, puts k and v to their places.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_rope_append {
    /// f32 `[rows][heads][head_dim]`, in place.
    pub q: *mut f32,
    /// f32 `[rows][kv_heads][head_dim]`
    pub k: *const f32,
    /// f32 `[rows][kv_heads][head_dim]`
    pub v: *const f32,
    /// f32 `[rows][head_dim]`: cosines, then sines.
    pub angles: *const f32,
    /// `[rows]`: page times HAT_PAGE_SIZE plus row of the page.
    pub places: *const u32,
    /// f16 `[pages][kv_heads][HAT_PAGE_SIZE][head_dim]` of one layer.
    pub k_pages: *mut u16,
    /// As k_pages.
    pub v_pages: *mut u16,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_rope_append"][::core::mem::size_of::<hat_rope_append>() - 72usize];
    [
        "Alignment of hat_rope_append",
    ][::core::mem::align_of::<hat_rope_append>() - 8usize];
    [
        "Offset of field: hat_rope_append::q",
    ][::core::mem::offset_of!(hat_rope_append, q) - 0usize];
    [
        "Offset of field: hat_rope_append::k",
    ][::core::mem::offset_of!(hat_rope_append, k) - 8usize];
    [
        "Offset of field: hat_rope_append::v",
    ][::core::mem::offset_of!(hat_rope_append, v) - 16usize];
    [
        "Offset of field: hat_rope_append::angles",
    ][::core::mem::offset_of!(hat_rope_append, angles) - 24usize];
    [
        "Offset of field: hat_rope_append::places",
    ][::core::mem::offset_of!(hat_rope_append, places) - 32usize];
    [
        "Offset of field: hat_rope_append::k_pages",
    ][::core::mem::offset_of!(hat_rope_append, k_pages) - 40usize];
    [
        "Offset of field: hat_rope_append::v_pages",
    ][::core::mem::offset_of!(hat_rope_append, v_pages) - 48usize];
    [
        "Offset of field: hat_rope_append::heads",
    ][::core::mem::offset_of!(hat_rope_append, heads) - 56usize];
    [
        "Offset of field: hat_rope_append::kv_heads",
    ][::core::mem::offset_of!(hat_rope_append, kv_heads) - 60usize];
    [
        "Offset of field: hat_rope_append::head_dim",
    ][::core::mem::offset_of!(hat_rope_append, head_dim) - 64usize];
    [
        "Offset of field: hat_rope_append::reserved",
    ][::core::mem::offset_of!(hat_rope_append, reserved) - 68usize];
};
/// Rows of one sequence that attend together: at most 4 * (16 / group) of them.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_attend_task {
    /// Of the batch.
    pub first_row: u32,
    pub rows: u32,
    /// Index of the sequence's first page in `page_indices`.
    pub first_page: u32,
    /// First tile that a row sees.
    pub first_tile: u32,
    /// Tiles below it stand in pages in order, for all rows.
    pub plain_end: u32,
    /// One more than the last position that a row sees.
    pub end: u32,
    pub reserved: [u32; 2usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_attend_task"][::core::mem::size_of::<hat_attend_task>() - 32usize];
    [
        "Alignment of hat_attend_task",
    ][::core::mem::align_of::<hat_attend_task>() - 4usize];
    [
        "Offset of field: hat_attend_task::first_row",
    ][::core::mem::offset_of!(hat_attend_task, first_row) - 0usize];
    [
        "Offset of field: hat_attend_task::rows",
    ][::core::mem::offset_of!(hat_attend_task, rows) - 4usize];
    [
        "Offset of field: hat_attend_task::first_page",
    ][::core::mem::offset_of!(hat_attend_task, first_page) - 8usize];
    [
        "Offset of field: hat_attend_task::first_tile",
    ][::core::mem::offset_of!(hat_attend_task, first_tile) - 12usize];
    [
        "Offset of field: hat_attend_task::plain_end",
    ][::core::mem::offset_of!(hat_attend_task, plain_end) - 16usize];
    [
        "Offset of field: hat_attend_task::end",
    ][::core::mem::offset_of!(hat_attend_task, end) - 20usize];
    [
        "Offset of field: hat_attend_task::reserved",
    ][::core::mem::offset_of!(hat_attend_task, reserved) - 24usize];
};
/// attend_verify, attend_prefill: `out[r] = softmax(q[r] K^T / sqrt(head_dim)) V`.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_attend {
    /// f32 `[rows][kv_heads * group][head_dim]`
    pub q: *const f32,
    /// f16 `[pages][kv_heads][HAT_PAGE_SIZE][head_dim]` of one layer.
    pub k_pages: *const u16,
    /// As k_pages.
    pub v_pages: *const u16,
    /// f32, as q.
    pub out: *mut f32,
    /// f32 `[rows][kv_heads * group][splits][head_dim]`: sums of each split.
    pub split_sums: *mut f32,
    /// f32 `[rows][kv_heads * group][splits][2]`: largest score and sum of weights of each split.
    pub split_weights: *mut f32,
    pub tasks: *const hat_attend_task,
    pub page_indices: *const u32,
    /// `[rows]`
    pub positions: *const u32,
    /// `[rows]`: positions that stand at the slot of the same number.
    pub prefix_len: *const u32,
    /// `[rows + 1]`
    pub tail_indptr: *const u32,
    /// Slots of the positions from `prefix_len`.
    pub tail_slots: *const u32,
    /// log2(e) / sqrt(head_dim)
    pub scale: f32,
    pub kv_heads: u32,
    /// Query heads of a key/value head; at most 16.
    pub group: u32,
    /// A row at p sees p - window + 1 ..= p; 0xffffffff for all.
    pub window: u32,
    /// Splits of the longest sequence.
    pub splits: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_attend"][::core::mem::size_of::<hat_attend>() - 120usize];
    ["Alignment of hat_attend"][::core::mem::align_of::<hat_attend>() - 8usize];
    ["Offset of field: hat_attend::q"][::core::mem::offset_of!(hat_attend, q) - 0usize];
    [
        "Offset of field: hat_attend::k_pages",
    ][::core::mem::offset_of!(hat_attend, k_pages) - 8usize];
    [
        "Offset of field: hat_attend::v_pages",
    ][::core::mem::offset_of!(hat_attend, v_pages) - 16usize];
    [
        "Offset of field: hat_attend::out",
    ][::core::mem::offset_of!(hat_attend, out) - 24usize];
    [
        "Offset of field: hat_attend::split_sums",
    ][::core::mem::offset_of!(hat_attend, split_sums) - 32usize];
    [
        "Offset of field: hat_attend::split_weights",
    ][::core::mem::offset_of!(hat_attend, split_weights) - 40usize];
    [
        "Offset of field: hat_attend::tasks",
    ][::core::mem::offset_of!(hat_attend, tasks) - 48usize];
    [
        "Offset of field: hat_attend::page_indices",
    ][::core::mem::offset_of!(hat_attend, page_indices) - 56usize];
    [
        "Offset of field: hat_attend::positions",
    ][::core::mem::offset_of!(hat_attend, positions) - 64usize];
    [
        "Offset of field: hat_attend::prefix_len",
    ][::core::mem::offset_of!(hat_attend, prefix_len) - 72usize];
    [
        "Offset of field: hat_attend::tail_indptr",
    ][::core::mem::offset_of!(hat_attend, tail_indptr) - 80usize];
    [
        "Offset of field: hat_attend::tail_slots",
    ][::core::mem::offset_of!(hat_attend, tail_slots) - 88usize];
    [
        "Offset of field: hat_attend::scale",
    ][::core::mem::offset_of!(hat_attend, scale) - 96usize];
    [
        "Offset of field: hat_attend::kv_heads",
    ][::core::mem::offset_of!(hat_attend, kv_heads) - 100usize];
    [
        "Offset of field: hat_attend::group",
    ][::core::mem::offset_of!(hat_attend, group) - 104usize];
    [
        "Offset of field: hat_attend::window",
    ][::core::mem::offset_of!(hat_attend, window) - 108usize];
    [
        "Offset of field: hat_attend::splits",
    ][::core::mem::offset_of!(hat_attend, splits) - 112usize];
    [
        "Offset of field: hat_attend::reserved",
    ][::core::mem::offset_of!(hat_attend, reserved) - 116usize];
};
/// compact: K/V rows move, for all layers.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_compact {
    /// f16 `[layers][pages][kv_heads][HAT_PAGE_SIZE][head_dim]`
    pub k_pages: *mut u16,
    /// As k_pages.
    pub v_pages: *mut u16,
    /// Pairs of places, from and to.
    pub moves: *const u32,
    /// `[groups + 1]`: moves of one group are done in order; groups touch different rows.
    pub indptr: *const u32,
    /// `pages * kv_heads * HAT_PAGE_SIZE * head_dim`
    pub layer_numbers: u64,
    pub kv_heads: u32,
    /// A multiple of 8.
    pub head_dim: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_compact"][::core::mem::size_of::<hat_compact>() - 48usize];
    ["Alignment of hat_compact"][::core::mem::align_of::<hat_compact>() - 8usize];
    [
        "Offset of field: hat_compact::k_pages",
    ][::core::mem::offset_of!(hat_compact, k_pages) - 0usize];
    [
        "Offset of field: hat_compact::v_pages",
    ][::core::mem::offset_of!(hat_compact, v_pages) - 8usize];
    [
        "Offset of field: hat_compact::moves",
    ][::core::mem::offset_of!(hat_compact, moves) - 16usize];
    [
        "Offset of field: hat_compact::indptr",
    ][::core::mem::offset_of!(hat_compact, indptr) - 24usize];
    [
        "Offset of field: hat_compact::layer_numbers",
    ][::core::mem::offset_of!(hat_compact, layer_numbers) - 32usize];
    [
        "Offset of field: hat_compact::kv_heads",
    ][::core::mem::offset_of!(hat_compact, kv_heads) - 40usize];
    [
        "Offset of field: hat_compact::head_dim",
    ][::core::mem::offset_of!(hat_compact, head_dim) - 44usize];
};
/** top_k_slices, top_k_merge: the k largest of each row, the largest first; equal ones in the
 order of their columns.*/
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_top_k {
    /// f32 `[rows][columns]`
    pub x: *const f32,
    /// f32 `[rows][slices][k]`
    pub slice_values: *mut f32,
    /// `[rows][slices][k]`
    pub slice_columns: *mut u32,
    /// f32 `[rows][k]`
    pub values: *mut f32,
    /// `[rows][k]`
    pub out_columns: *mut u32,
    /// `[rows]`, zeroed before: set to 1 if a number is not finite.
    pub not_finite: *mut u32,
    pub columns: u32,
    pub k: u32,
    pub slices: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_top_k"][::core::mem::size_of::<hat_top_k>() - 64usize];
    ["Alignment of hat_top_k"][::core::mem::align_of::<hat_top_k>() - 8usize];
    ["Offset of field: hat_top_k::x"][::core::mem::offset_of!(hat_top_k, x) - 0usize];
    [
        "Offset of field: hat_top_k::slice_values",
    ][::core::mem::offset_of!(hat_top_k, slice_values) - 8usize];
    [
        "Offset of field: hat_top_k::slice_columns",
    ][::core::mem::offset_of!(hat_top_k, slice_columns) - 16usize];
    [
        "Offset of field: hat_top_k::values",
    ][::core::mem::offset_of!(hat_top_k, values) - 24usize];
    [
        "Offset of field: hat_top_k::out_columns",
    ][::core::mem::offset_of!(hat_top_k, out_columns) - 32usize];
    [
        "Offset of field: hat_top_k::not_finite",
    ][::core::mem::offset_of!(hat_top_k, not_finite) - 40usize];
    [
        "Offset of field: hat_top_k::columns",
    ][::core::mem::offset_of!(hat_top_k, columns) - 48usize];
    ["Offset of field: hat_top_k::k"][::core::mem::offset_of!(hat_top_k, k) - 52usize];
    [
        "Offset of field: hat_top_k::slices",
    ][::core::mem::offset_of!(hat_top_k, slices) - 56usize];
    [
        "Offset of field: hat_top_k::reserved",
    ][::core::mem::offset_of!(hat_top_k, reserved) - 60usize];
};
/// gemv, linear: `out[r][n] = sum_k x[r][k] w[n][k]`, with x in blocks of q8.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_gemv {
    /// `[rows][columns]`
    pub q: *const i8,
    /// f32 `[rows][columns / 32]`
    pub d: *const f32,
    /// f32 `[rows][columns / 32]`
    pub s: *const f32,
    /// `[outputs][columns]` in panels.
    pub weight: *const u8,
    /// f32 `[outputs]`, or null.
    pub bias: *const f32,
    /// f32 `[rows][outputs]`
    pub out: *mut f32,
    pub rows: u32,
    /// A multiple of 32, for q6_k of 256.
    pub columns: u32,
    pub outputs: u32,
    /// 0: `out` is overwritten. 1: it is added to.
    pub add: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_gemv"][::core::mem::size_of::<hat_gemv>() - 64usize];
    ["Alignment of hat_gemv"][::core::mem::align_of::<hat_gemv>() - 8usize];
    ["Offset of field: hat_gemv::q"][::core::mem::offset_of!(hat_gemv, q) - 0usize];
    ["Offset of field: hat_gemv::d"][::core::mem::offset_of!(hat_gemv, d) - 8usize];
    ["Offset of field: hat_gemv::s"][::core::mem::offset_of!(hat_gemv, s) - 16usize];
    [
        "Offset of field: hat_gemv::weight",
    ][::core::mem::offset_of!(hat_gemv, weight) - 24usize];
    [
        "Offset of field: hat_gemv::bias",
    ][::core::mem::offset_of!(hat_gemv, bias) - 32usize];
    ["Offset of field: hat_gemv::out"][::core::mem::offset_of!(hat_gemv, out) - 40usize];
    [
        "Offset of field: hat_gemv::rows",
    ][::core::mem::offset_of!(hat_gemv, rows) - 48usize];
    [
        "Offset of field: hat_gemv::columns",
    ][::core::mem::offset_of!(hat_gemv, columns) - 52usize];
    [
        "Offset of field: hat_gemv::outputs",
    ][::core::mem::offset_of!(hat_gemv, outputs) - 56usize];
    ["Offset of field: hat_gemv::add"][::core::mem::offset_of!(hat_gemv, add) - 60usize];
};
/** round_f16, round_bf16: numbers to the nearest of 16 bits, ties to even; what is too large is
 infinite.*/
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_round {
    /// f32 `[count]`
    pub x: *const f32,
    /// `[count]`
    pub out: *mut u16,
    /// A multiple of 2.
    pub count: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_round"][::core::mem::size_of::<hat_round>() - 24usize];
    ["Alignment of hat_round"][::core::mem::align_of::<hat_round>() - 8usize];
    ["Offset of field: hat_round::x"][::core::mem::offset_of!(hat_round, x) - 0usize];
    [
        "Offset of field: hat_round::out",
    ][::core::mem::offset_of!(hat_round, out) - 8usize];
    [
        "Offset of field: hat_round::count",
    ][::core::mem::offset_of!(hat_round, count) - 16usize];
};
/// linear_f16, linear_bf16: `out[r][n] = sum_k x[r][k] w[n][k]`, both of one type.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_linear_float {
    /// `[rows][columns]`
    pub x: *const u16,
    /// `[outputs][columns]` in panels.
    pub weight: *const u16,
    /// f32 `[outputs]`, or null.
    pub bias: *const f32,
    /// f32 `[rows][outputs]`
    pub out: *mut f32,
    pub rows: u32,
    /// A multiple of 8.
    pub columns: u32,
    pub outputs: u32,
    /// 0: `out` is overwritten. 1: it is added to.
    pub add: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_linear_float"][::core::mem::size_of::<hat_linear_float>() - 48usize];
    [
        "Alignment of hat_linear_float",
    ][::core::mem::align_of::<hat_linear_float>() - 8usize];
    [
        "Offset of field: hat_linear_float::x",
    ][::core::mem::offset_of!(hat_linear_float, x) - 0usize];
    [
        "Offset of field: hat_linear_float::weight",
    ][::core::mem::offset_of!(hat_linear_float, weight) - 8usize];
    [
        "Offset of field: hat_linear_float::bias",
    ][::core::mem::offset_of!(hat_linear_float, bias) - 16usize];
    [
        "Offset of field: hat_linear_float::out",
    ][::core::mem::offset_of!(hat_linear_float, out) - 24usize];
    [
        "Offset of field: hat_linear_float::rows",
    ][::core::mem::offset_of!(hat_linear_float, rows) - 32usize];
    [
        "Offset of field: hat_linear_float::columns",
    ][::core::mem::offset_of!(hat_linear_float, columns) - 36usize];
    [
        "Offset of field: hat_linear_float::outputs",
    ][::core::mem::offset_of!(hat_linear_float, outputs) - 40usize];
    [
        "Offset of field: hat_linear_float::add",
    ][::core::mem::offset_of!(hat_linear_float, add) - 44usize];
};
/// fragment_load and others of fragments.cu: one operation of one warp, its registers written out.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_fragments {
    /// The kernel says what stands there.
    pub from: *const u32,
    /// `[32][4]`
    pub out: *mut u32,
    /// `[32]`, or null for fragment_multiply.
    pub lanes: *const u32,
    /// Products of fragment_multiply, one after the other into the same sums.
    pub steps: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_fragments"][::core::mem::size_of::<hat_fragments>() - 32usize];
    ["Alignment of hat_fragments"][::core::mem::align_of::<hat_fragments>() - 8usize];
    [
        "Offset of field: hat_fragments::from",
    ][::core::mem::offset_of!(hat_fragments, from) - 0usize];
    [
        "Offset of field: hat_fragments::out",
    ][::core::mem::offset_of!(hat_fragments, out) - 8usize];
    [
        "Offset of field: hat_fragments::lanes",
    ][::core::mem::offset_of!(hat_fragments, lanes) - 16usize];
    [
        "Offset of field: hat_fragments::steps",
    ][::core::mem::offset_of!(hat_fragments, steps) - 24usize];
    [
        "Offset of field: hat_fragments::reserved",
    ][::core::mem::offset_of!(hat_fragments, reserved) - 28usize];
};
/// peak_copy and peak_multiply: what a GPU can do at most.
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_peak {
    /// `[vectors][4]`; for peak_multiply `[32][4]`, a fragment of A.
    pub from: *const u32,
    /// `[vectors][4]`; for peak_multiply f32 `[grid][256]`.
    pub out: *mut u32,
    /// Copies of 16 bytes.
    pub vectors: u64,
    /// Rounds of products.
    pub steps: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of hat_peak"][::core::mem::size_of::<hat_peak>() - 32usize];
    ["Alignment of hat_peak"][::core::mem::align_of::<hat_peak>() - 8usize];
    [
        "Offset of field: hat_peak::from",
    ][::core::mem::offset_of!(hat_peak, from) - 0usize];
    ["Offset of field: hat_peak::out"][::core::mem::offset_of!(hat_peak, out) - 8usize];
    [
        "Offset of field: hat_peak::vectors",
    ][::core::mem::offset_of!(hat_peak, vectors) - 16usize];
    [
        "Offset of field: hat_peak::steps",
    ][::core::mem::offset_of!(hat_peak, steps) - 24usize];
    [
        "Offset of field: hat_peak::reserved",
    ][::core::mem::offset_of!(hat_peak, reserved) - 28usize];
};
