// out[r] = softmax(q[r] K^T / sqrt(head_dim)) V for many rows: a block takes up to 64 queries over
// all their keys and merges the splits as it goes. The same bits as attend_verify.
// q, out f32 [rows][heads][D]; pages f16 [pages][kv_heads][32][D]; D 32, 64, 96 or 128.
// Operations: 4 D for each query and key. Bytes: 4 D for each key of each task and kv_head.
// Launch: grid (tasks, kv_heads), block 128. Shared: two tiles of K and V, 256 (D + 8) bytes.
#include "attend.cuh"

#define ATTEND_PREFILL(D)                                                                          \
  KERNEL(128) attend_prefill_##D(const hat_attend p) {                                             \
    __shared__ AttendTile<D> tiles[2];                                                             \
    const uint32_t split_keys = HAT_SPLIT_TILES * HAT_PAGE_SIZE;                                   \
    attend<D, false>(p, tiles, 0, (p.tasks[blockIdx.x].end + split_keys - 1) / split_keys);        \
  }

ATTEND_PREFILL(32)
ATTEND_PREFILL(64)
ATTEND_PREFILL(96)
ATTEND_PREFILL(128)
