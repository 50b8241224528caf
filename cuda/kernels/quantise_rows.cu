// Rows to fewer bytes: blocks of 32 as int8 (x = d q), and numbers of 16 bits.
// x f32 [rows][columns]; q int8 [rows][columns], d and s f32 [rows][columns / 32]; out 16 bits a number.
// Bytes: 4 columns read, 1.25 (q8) or 2 columns written for each row, each once.
// Launch: quantise_q8 grid ceil(blocks / 8), block 256, a warp for each block of 32; round_* grid
// ceil(count / 512), block 256. A block, or a number, depends on its own numbers alone.
#include "abi.h"
#include "dev.cuh"

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

template <bool BF16> DEVICE void round_pair(const hat_round &p) {
  const uint64_t pair = (uint64_t)blockIdx.x * 256 + threadIdx.x;
  if (pair >= p.count / 2) return;
  const float2 x = ((const float2 *)p.x)[pair];
  ((uint32_t *)p.out)[pair] = BF16 ? pack_bf16(x.x, x.y) : pack_half(x.x, x.y);
}
KERNEL(256) round_f16(const hat_round p) { round_pair<false>(p); }
KERNEL(256) round_bf16(const hat_round p) { round_pair<true>(p); }
