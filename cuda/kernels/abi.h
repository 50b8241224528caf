// What kernels and Rust agree on: the parameter block of each kernel and the constants.
//
// C11, CUDA C++ and NVRTC read it; `hat-kernels` makes cuda/src/abi.rs of it. Every kernel takes
// one block, by value. All blocks have explicit padding, so that size and offsets are the same in
// each language; all pointers are device addresses.
#ifndef HAT_ABI_H
#define HAT_ABI_H

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
#else
#include <stdint.h>
#endif

/// Rows of one KV page, and keys of one attention tile.
#define HAT_PAGE_SIZE 32
/// Tiles of a split: attention over more keys is done in parts, whose borders are at the same
/// positions whatever else is in the batch.
#define HAT_SPLIT_TILES 8
/// Output columns of a panel (the weights' layout).
#define HAT_PANEL 16
/// Weights, or activations, that share a scale.
#define HAT_BLOCK 32
/// Columns that one block of the first stage of top_k reads.
#define HAT_TOP_SLICE 2048

/// How the numbers of a table or a matrix are written.
#define HAT_F32 0
#define HAT_F16 1
#define HAT_BF16 2
#define HAT_Q8_0 3
#define HAT_Q4_0 4
#define HAT_Q4_1 5
#define HAT_Q6_K 6

/// rms_norm: `out = x / sqrt(mean(x^2) + eps) * weight`.
typedef struct hat_rms_norm {
  /// f32 `[rows][columns]`
  const float *x;
  /// f32 `[columns]`
  const float *weight;
  /// f32 `[rows][columns]`
  float *out;
  /// A multiple of 4.
  uint32_t columns;
  float eps;
} hat_rms_norm;

/// embed: `out[r] = table[tokens[r]]`.
typedef struct hat_embed {
  /// `[rows]`
  const uint32_t *tokens;
  /// `[vocabulary][columns]` in panels.
  const uint8_t *table;
  /// f32 `[rows][columns]`
  float *out;
  /// A multiple of 32 for block types.
  uint32_t columns;
  /// HAT_F32 ...
  uint32_t dtype;
} hat_embed;

/// silu_mul: `out = gate / (1 + exp(-gate)) * up`.
typedef struct hat_silu_mul {
  /// f32 `[count]`
  const float *gate;
  /// f32 `[count]`
  const float *up;
  /// f32 `[count]`; may be `gate` or `up`.
  float *out;
  /// A multiple of 4.
  uint64_t count;
} hat_silu_mul;

/// quantise_q8: rows in blocks of 32, `x = d q`.
typedef struct hat_q8 {
  /// f32 `[rows][columns]`
  const float *x;
  /// `[rows][columns]`
  int8_t *q;
  /// f32 `[rows][columns / 32]`
  float *d;
  /// f32 `[rows][columns / 32]`: d times the sum of the block's q.
  float *s;
  /// `rows * columns / 32`
  uint64_t blocks;
} hat_q8;

/// rope_angles: cosines and sines of `positions[r] * inv_freq[i]`.
typedef struct hat_rope_angles {
  /// `[rows]`
  const uint32_t *positions;
  /// f32 `[half]`
  const float *inv_freq;
  /// f32 `[rows][2 half]`: cosines, then sines.
  float *angles;
  uint32_t rows;
  uint32_t half;
} hat_rope_angles;

/// rope_append: rotates q and k by pairs `(i, i + head_dim / 2)`, puts k and v to their places.
typedef struct hat_rope_append {
  /// f32 `[rows][heads][head_dim]`, in place.
  float *q;
  /// f32 `[rows][kv_heads][head_dim]`
  const float *k;
  /// f32 `[rows][kv_heads][head_dim]`
  const float *v;
  /// f32 `[rows][head_dim]`: cosines, then sines.
  const float *angles;
  /// `[rows]`: page times HAT_PAGE_SIZE plus row of the page.
  const uint32_t *places;
  /// f16 `[pages][kv_heads][HAT_PAGE_SIZE][head_dim]` of one layer.
  uint16_t *k_pages;
  /// As k_pages.
  uint16_t *v_pages;
  uint32_t heads;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t reserved;
} hat_rope_append;

/// Rows of one sequence that attend together: at most 4 * (16 / group) of them.
typedef struct hat_attend_task {
  /// Of the batch.
  uint32_t first_row;
  uint32_t rows;
  /// Index of the sequence's first page in `page_indices`.
  uint32_t first_page;
  /// First tile that a row sees.
  uint32_t first_tile;
  /// Tiles below it stand in pages in order, for all rows.
  uint32_t plain_end;
  /// One more than the last position that a row sees.
  uint32_t end;
  uint32_t reserved[2];
} hat_attend_task;

/// attend_verify, attend_prefill: `out[r] = softmax(q[r] K^T / sqrt(head_dim)) V`.
typedef struct hat_attend {
  /// f32 `[rows][kv_heads * group][head_dim]`
  const float *q;
  /// f16 `[pages][kv_heads][HAT_PAGE_SIZE][head_dim]` of one layer.
  const uint16_t *k_pages;
  /// As k_pages.
  const uint16_t *v_pages;
  /// f32, as q.
  float *out;
  /// f32 `[rows][kv_heads * group][splits][head_dim]`: sums of each split.
  float *split_sums;
  /// f32 `[rows][kv_heads * group][splits][2]`: largest score and sum of weights of each split.
  float *split_weights;
  const hat_attend_task *tasks;
  const uint32_t *page_indices;
  /// `[rows]`
  const uint32_t *positions;
  /// `[rows]`: positions that stand at the slot of the same number.
  const uint32_t *prefix_len;
  /// `[rows + 1]`
  const uint32_t *tail_indptr;
  /// Slots of the positions from `prefix_len`.
  const uint32_t *tail_slots;
  /// log2(e) / sqrt(head_dim)
  float scale;
  uint32_t kv_heads;
  /// Query heads of a key/value head; at most 16.
  uint32_t group;
  /// A row at p sees p - window + 1 ..= p; 0xffffffff for all.
  uint32_t window;
  /// Splits of the longest sequence.
  uint32_t splits;
  uint32_t reserved;
} hat_attend;

/// compact: K/V rows move, for all layers.
typedef struct hat_compact {
  /// f16 `[layers][pages][kv_heads][HAT_PAGE_SIZE][head_dim]`
  uint16_t *k_pages;
  /// As k_pages.
  uint16_t *v_pages;
  /// Pairs of places, from and to.
  const uint32_t *moves;
  /// `[groups + 1]`: moves of one group are done in order; groups touch different rows.
  const uint32_t *indptr;
  /// `pages * kv_heads * HAT_PAGE_SIZE * head_dim`
  uint64_t layer_numbers;
  uint32_t kv_heads;
  /// A multiple of 8.
  uint32_t head_dim;
} hat_compact;

/// top_k_slices, top_k_merge: the k largest of each row, the largest first; equal ones in the
/// order of their columns.
typedef struct hat_top_k {
  /// f32 `[rows][columns]`
  const float *x;
  /// f32 `[rows][slices][k]`
  float *slice_values;
  /// `[rows][slices][k]`
  uint32_t *slice_columns;
  /// f32 `[rows][k]`
  float *values;
  /// `[rows][k]`
  uint32_t *out_columns;
  /// `[rows]`, zeroed before: set to 1 if a number is not finite.
  uint32_t *not_finite;
  uint32_t columns;
  uint32_t k;
  uint32_t slices;
  uint32_t reserved;
} hat_top_k;

/// gemv, linear, linear_f16, linear_bf16: `out[r][n] = sum_k x[r][k] w[n][k]`, with x in blocks of q8
/// or in numbers of w's type.
typedef struct hat_product {
  /// int8, f16 or bf16 `[rows][columns]`
  const void *x;
  /// f32 `[rows][columns / 32]` of q8, else null.
  const float *d;
  /// As d.
  const float *s;
  /// `[outputs][columns]` in panels.
  const void *weight;
  /// f32 `[outputs]`, or null.
  const float *bias;
  /// f32 `[rows][outputs]`
  float *out;
  uint32_t rows;
  /// A multiple of 32 for q8, for q6_k of 256, else of 8.
  uint32_t columns;
  uint32_t outputs;
  /// 0: `out` is overwritten. 1: it is added to.
  uint32_t add;
} hat_product;

/// round_f16, round_bf16: numbers to the nearest of 16 bits, ties to even; what is too large is
/// infinite.
typedef struct hat_round {
  /// f32 `[count]`
  const float *x;
  /// `[count]`
  uint16_t *out;
  /// A multiple of 2.
  uint64_t count;
} hat_round;

/// fragment_load and others of fragments.cu: one operation of one warp, its registers written out.
typedef struct hat_fragments {
  /// The kernel says what stands there.
  const uint32_t *from;
  /// `[32][4]`
  uint32_t *out;
  /// `[32]`, or null for fragment_multiply.
  const uint32_t *lanes;
  /// Products of fragment_multiply, one after the other into the same sums.
  uint32_t steps;
  uint32_t reserved;
} hat_fragments;

/// peak_copy and peak_multiply: what a GPU can do at most.
typedef struct hat_peak {
  /// `[vectors][4]`; for peak_multiply `[32][4]`, a fragment of A.
  const uint32_t *from;
  /// `[vectors][4]`; for peak_multiply f32 `[grid][256]`.
  uint32_t *out;
  /// Copies of 16 bytes.
  uint64_t vectors;
  /// Rounds of products.
  uint32_t steps;
  uint32_t reserved;
} hat_peak;

#endif
