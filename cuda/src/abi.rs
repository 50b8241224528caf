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
/** gemv, linear, linear_f16, linear_bf16: `out[r][n] = sum_k x[r][k] w[n][k]`, with x in blocks of q8
 or in numbers of w's type.*/
#[repr(C)]
#[derive(Copy, Clone)]
pub struct hat_product {
    /// int8, f16 or bf16 `[rows][columns]`
    pub x: *const ::core::ffi::c_void,
    /// f32 `[rows][columns / 32]` of q8, else null.
    pub d: *const f32,
    /// As d.
    pub s: *const f32,
    /// `[outputs][columns]` in panels.
    pub weight: *const ::core::ffi::c_void,
    /// f32 `[outputs]`, or null.
    pub bias: *const f32,
    /// f32 `[rows][outputs]`
    pub out: *mut f32,
    pub rows: u32,
    /// A multiple of 32 for q8, for q6_k of 256, else of 8.
    pub columns: u32,
    pub outputs: u32,
    /// 0: `out` is overwritten. 1: it is added to.
    pub add: u32,
}
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
