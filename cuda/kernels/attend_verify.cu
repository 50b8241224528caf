// out[r] = softmax(q[r] K^T / sqrt(head_dim)) V for few rows over many keys: each split of 256
// positions is a block of its own, and attend_merge puts them together.
// q, out f32 [rows][heads][D]; pages f16 [pages][kv_heads][32][D]; split_* as in abi.h; D 32, 64, 96 or 128.
// Bytes: 4 D for each key of each task and kv_head, then 8 (D + 2) for each query and split.
// Launch: attend_verify_D grid (tasks, kv_heads, splits), block 128; attend_merge_D grid
// rows * heads, block 32. Shared: two tiles of K and V, 256 (D + 8) bytes.
#include "attend.cuh"

#define ATTEND_VERIFY(D)                                                                           \
  KERNEL(128) attend_verify_##D(const hat_attend p) {                                              \
    __shared__ AttendTile<D> tiles[2];                                                             \
    attend<D, true>(p, tiles, blockIdx.z, blockIdx.z + 1);                                         \
  }                                                                                                \
  KERNEL(32) attend_merge_##D(const hat_attend p) { attend_merge<D>(p); }

/// Merges the splits of one query, in order, and divides by the sum of weights.
template <int D> DEVICE void attend_merge(const hat_attend &p) {
  const size_t first = (size_t)blockIdx.x * p.splits;
  const float2 *weights = (const float2 *)p.split_weights + first;
  const float *sums = p.split_sums + first * D + threadIdx.x;
  AttendState total = {MINUS_INFINITY, 0.0f};
  float out[D / WARP] = {};
#pragma unroll 1
  for (uint32_t split = 0; split < p.splits; ++split) {
    const float2 part = weights[split];
    float fade, weight;
    merge_states(total, {part.x, part.y}, fade, weight);
#pragma unroll
    for (int i = 0; i < D / WARP; ++i) out[i] = fmaf(out[i], fade, sums[split * D + i * WARP] * weight);
  }
  const float norm = 1.0f / total.sum;
#pragma unroll
  for (int i = 0; i < D / WARP; ++i) p.out[(size_t)blockIdx.x * D + i * WARP + threadIdx.x] = out[i] * norm;
}

ATTEND_VERIFY(32)
ATTEND_VERIFY(64)
ATTEND_VERIFY(96)
ATTEND_VERIFY(128)
