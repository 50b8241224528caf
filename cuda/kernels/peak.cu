// What a GPU can do at most, for percents of it: copies of memory, and products of matrices from
// registers. Nothing but benches launches them.
// peak_copy: out[i] = from[i], 16 bytes a thread. Bytes: 32 for each. Launch: grid ceil(vectors / 256).
// peak_multiply: each warp adds PEAK_SUMS independent products m16n8k16 of f16, `steps` times.
// peak_multiply_bytes: the same of signed bytes, m16n8k32.
// Operations: 4,096 for each product, 8,192 of bytes. Launch: any grid; block 256. out f32 [grid][256].
#include "abi.h"
#include "dev.cuh"

/// Sums of a warp that do not wait for each other.
#define PEAK_SUMS 8

KERNEL(256) peak_copy(const hat_peak p) {
  const uint64_t at = (uint64_t)blockIdx.x * 256 + threadIdx.x;
  if (at < p.vectors) ((uint4 *)p.out)[at] = ((const uint4 *)p.from)[at];
}

KERNEL(256) peak_multiply(const hat_peak p) {
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = p.from[threadIdx.x % WARP * 4 + i];
  float sums[PEAK_SUMS][4] = {};
#pragma unroll 1
  for (uint32_t step = 0; step < p.steps; ++step) {
#pragma unroll
    for (int i = 0; i < PEAK_SUMS; ++i) multiply_add(sums[i], a, a[i % 4], a[(i + 1) % 4]);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PEAK_SUMS; ++i) {
    sum += (sums[i][0] + sums[i][1]) + (sums[i][2] + sums[i][3]);
  }
  p.out[blockIdx.x * 256 + threadIdx.x] = __float_as_uint(sum);
}

KERNEL(256) peak_multiply_bytes(const hat_peak p) {
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = p.from[threadIdx.x % WARP * 4 + i];
  int sums[PEAK_SUMS][4] = {};
#pragma unroll 1
  for (uint32_t step = 0; step < p.steps; ++step) {
#pragma unroll
    for (int i = 0; i < PEAK_SUMS; ++i) multiply_bytes(sums[i], a, a[i % 4], a[(i + 1) % 4], sums[i]);
  }
  int sum = 0;
#pragma unroll
  for (int i = 0; i < PEAK_SUMS; ++i) sum ^= sums[i][0] ^ sums[i][1] ^ sums[i][2] ^ sums[i][3];
  p.out[blockIdx.x * 256 + threadIdx.x] = (uint32_t)sum;
}
