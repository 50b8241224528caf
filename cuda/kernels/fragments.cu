// What the operations of dev.cuh on a warp's registers do, written out lane by lane: tests compare it
// with the tables of the PTX ISA, so that kernels and emulator can't share a misreading of them.
// load, load_transposed: from [32] rows of 16 bytes, lane i names row lanes[i]; out [32][4] registers.
// copy: row i goes to place lanes[i] % 32, or zeros if lanes[i] >= 32; out [32] places of 16 bytes.
// copy_words: the same, in four copies of 4 bytes.
// multiply: from [steps][32][6] registers, 4 of A and 2 of B; out [32][4], C before and D after.
// multiply_bf16: the same of bf16.
// multiply_bytes: the same of signed bytes, m16n8k32; multiply_bytes_16: m16n8k16 (words 0, 1 and 4).
// Bytes: a few hundred. Launch: grid 1, block 32.
#include "abi.h"
#include "dev.cuh"

/// A row of a tile: 8 numbers of 16 bits.
struct alignas(16) FragmentRow {
  uint32_t words[4];
};

DEVICE void take_row(FragmentRow &to, const uint32_t *from) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to.words[i] = from[i];
}

#define FRAGMENT_LOAD(name, load)                                                                  \
  KERNEL(32) name(const hat_fragments p) {                                                         \
    __shared__ FragmentRow rows[WARP];                                                             \
    take_row(rows[threadIdx.x], p.from + threadIdx.x * 4);                                           \
    __syncthreads();                                                                               \
    uint32_t registers[4];                                                                         \
    load(registers, &rows[p.lanes[threadIdx.x] % WARP]);                                           \
    for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 4 + i] = registers[i];                         \
  }

FRAGMENT_LOAD(fragment_load, load_matrices)
FRAGMENT_LOAD(fragment_load_transposed, load_matrices_transposed)

KERNEL(32) fragment_copy(const hat_fragments p) {
  __shared__ FragmentRow rows[WARP];
  const uint32_t lane = p.lanes[threadIdx.x];
  copy_async(&rows[lane % WARP], p.from + threadIdx.x * 4, lane < WARP);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 4 + i] = rows[threadIdx.x].words[i];
}

KERNEL(32) fragment_copy_words(const hat_fragments p) {
  __shared__ FragmentRow rows[WARP];
  const uint32_t lane = p.lanes[threadIdx.x];
  for (int i = 0; i < 4; ++i) {
    copy_async_word(&rows[lane % WARP].words[i], p.from + threadIdx.x * 4 + i, lane < WARP);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 4 + i] = rows[threadIdx.x].words[i];
}

template <bool HALF> DEVICE void fragment_bytes(const hat_fragments &p) {
  int sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = (int)p.out[threadIdx.x * 4 + i];
#pragma unroll 1
  for (uint32_t step = 0; step < p.steps; ++step) {
    const uint32_t *in = p.from + (step * WARP + threadIdx.x) * 6;
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    int next[4];
    if (HALF) multiply_bytes(next, a[0], a[1], in[4], sums);
    else multiply_bytes(next, a, in[4], in[5], sums);
    for (int i = 0; i < 4; ++i) sums[i] = next[i];
  }
  for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 4 + i] = (uint32_t)sums[i];
}

KERNEL(32) fragment_multiply_bytes(const hat_fragments p) { fragment_bytes<false>(p); }
KERNEL(32) fragment_multiply_bytes_16(const hat_fragments p) { fragment_bytes<true>(p); }

template <bool BF16> DEVICE void fragment_product(const hat_fragments &p) {
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = __uint_as_float(p.out[threadIdx.x * 4 + i]);
#pragma unroll 1
  for (uint32_t step = 0; step < p.steps; ++step) {
    const uint32_t *in = p.from + (step * WARP + threadIdx.x) * 6;
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    if (BF16) multiply_add_bf16(sums, a, in[4], in[5]);
    else multiply_add(sums, a, in[4], in[5]);
  }
  for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 4 + i] = __float_as_uint(sums[i]);
}

KERNEL(32) fragment_multiply(const hat_fragments p) { fragment_product<false>(p); }
KERNEL(32) fragment_multiply_bf16(const hat_fragments p) { fragment_product<true>(p); }
