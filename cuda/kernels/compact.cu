// K and V rows move from place to place, in order within a group, for all layers.
// k_pages, v_pages f16 [layers][pages][kv_heads][HAT_PAGE_SIZE][head_dim]; moves [n][2] places.
// Bytes: 8 head_dim kv_heads layers for each move.
// Launch: grid (kv_heads, layers, groups), block 32. A thread moves its own 16 bytes of K or V,
// one move after the other, so a later move sees what an earlier one wrote.
#include "abi.h"
#include "dev.cuh"

KERNEL(32) compact(const hat_compact p) {
  const uint32_t head = blockIdx.x, chunks = p.head_dim / 8;
  for (uint32_t i = threadIdx.x; i < 2 * chunks; i += 32) {
    uint16_t *pages = (i < chunks ? p.k_pages : p.v_pages) + blockIdx.y * p.layer_numbers;
    auto chunk = [&](uint32_t place) {
      const size_t row = ((size_t)(place / HAT_PAGE_SIZE) * p.kv_heads + head) * HAT_PAGE_SIZE +
                         place % HAT_PAGE_SIZE;
      return (uint4 *)(pages + row * p.head_dim) + i % chunks;
    };
#pragma unroll 1
    for (uint32_t m = p.indptr[blockIdx.z]; m < p.indptr[blockIdx.z + 1]; ++m) {
      *chunk(p.moves[2 * m + 1]) = *chunk(p.moves[2 * m]);
    }
  }
}
