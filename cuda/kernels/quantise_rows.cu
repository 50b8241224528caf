// Rows to fewer bytes and back: blocks of 32 as int8 (x = d q), and f16 as on the wire.
// x f32 [rows][columns]; q int8 [rows][columns], d and s f32 [rows][columns / 32]; half f16.
// Bytes: 4 columns read, 1.25 (q8) or 2 (f16) columns written for each row, each once.
// Launch: q8 kernels grid ceil(blocks / 8), block 256, a warp for each block of 32;
// f16 kernels grid rows, block 256; round_* grid ceil(count / 512), block 256. A block, or a row, depends on its own numbers alone.
#include "abi.h"
#include "dev.cuh"

/// The largest finite f16; greater numbers are cut to it.
#define HALF_MAX 65504.0f

KERNEL(256) quantise_q8(const hat_q8 p) {
  const uint64_t block = (uint64_t)blockIdx.x * 8 + threadIdx.x / WARP;
  if (block >= p.blocks) return;
  const uint32_t lane = threadIdx.x % WARP;
  const float x = p.x[block * HAT_BLOCK + lane];
  float largest = fabsf(x);
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, i));
  const bool zero = largest < 1e-30f;
  const float d = zero ? 0.0f : largest / 127.0f;
  int q = zero ? 0 : __float2int_rn(x * (127.0f / largest));
  q = max(-127, min(127, q));
  const int sum = warp_sum(q);
  p.q[block * HAT_BLOCK + lane] = (int8_t)q;
  if (lane == 0) {
    p.d[block] = d;
    p.s[block] = d * (float)sum;
  }
}

KERNEL(256) dequantise_q8(const hat_q8 p) {
  const uint64_t block = (uint64_t)blockIdx.x * 8 + threadIdx.x / WARP;
  if (block >= p.blocks) return;
  const uint64_t at = block * HAT_BLOCK + threadIdx.x % WARP;
  p.x[at] = p.d[block] * (float)p.q[at];
}

KERNEL(256) narrow_f16(const hat_f16_rows p) {
  __shared__ uint32_t partial[256 / WARP];
  const float2 *x = (const float2 *)(p.x + (size_t)blockIdx.x * p.columns);
  uint32_t *half = (uint32_t *)(p.half + (size_t)blockIdx.x * p.columns);
  // Cut numbers in the low half, those that are not finite in the high one.
  uint32_t seen = 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < p.columns / 2; i += 256) {
    const float2 v = x[i];
    seen += (fabsf(v.x) > HALF_MAX) + (fabsf(v.y) > HALF_MAX);
    seen += (uint32_t)(!is_finite(v.x) || !is_finite(v.y)) << 16;
    half[i] = pack_half(fmaxf(-HALF_MAX, fminf(HALF_MAX, v.x)), fmaxf(-HALF_MAX, fminf(HALF_MAX, v.y)));
  }
  const uint32_t cut = block_sum<256 / WARP>(seen & 0xffff, partial);
  __syncthreads();
  const uint32_t bad = block_sum<256 / WARP>(seen >> 16, partial);
  if (threadIdx.x == 0) p.report[blockIdx.x] = bad ? HAT_NOT_FINITE : cut;
}

KERNEL(256) widen_f16(const hat_f16_rows p) {
  __shared__ uint32_t partial[256 / WARP];
  const uint32_t *half = (const uint32_t *)(p.half + (size_t)blockIdx.x * p.columns);
  float2 *x = (float2 *)(p.x + (size_t)blockIdx.x * p.columns);
  uint32_t seen = 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < p.columns / 2; i += 256) {
    const uint32_t word = half[i];
    const float2 v = make_float2(from_half((uint16_t)word), from_half((uint16_t)(word >> 16)));
    seen += !is_finite(v.x) || !is_finite(v.y);
    x[i] = v;
  }
  const uint32_t bad = block_sum<256 / WARP>(seen, partial);
  if (threadIdx.x == 0) p.report[blockIdx.x] = bad ? HAT_NOT_FINITE : 0;
}

template <bool BF16> DEVICE void round_pair(const hat_round &p) {
  const uint64_t pair = (uint64_t)blockIdx.x * 256 + threadIdx.x;
  if (pair >= p.count / 2) return;
  const float2 x = ((const float2 *)p.x)[pair];
  ((uint32_t *)p.out)[pair] = BF16 ? pack_bf16(x.x, x.y) : pack_half(x.x, x.y);
}
KERNEL(256) round_f16(const hat_round p) { round_pair<false>(p); }
KERNEL(256) round_bf16(const hat_round p) { round_pair<true>(p); }
