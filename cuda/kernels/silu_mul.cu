// out = gate / (1 + exp(-gate)) * up, with the exp of docs/ARITHMETIC.md: the same bits everywhere.
// gate, up, out f32 [count]; count % 4 == 0, 16-byte aligned.
// Bytes: 12 count, each once.
// Launch: grid ceil(count / 1024), block 256: four numbers a thread.
#include "abi.h"
#include "dev.cuh"

/// e^x within 1.1 units in the last place; 0 below the normal numbers, never NaN.
DEVICE float exp_exact(float x) {
  const float SMALLEST = -87.33654f, LARGEST = 89.0f, ROUND = 12582912.0f; // 1.5 * 2^23
  const float SERIES[8] = {1.0f / 5040.0f, 1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
  float inside = x > SMALLEST ? x : SMALLEST;
  inside = inside < LARGEST ? inside : LARGEST;
  const float shifted = fmaf(inside, 1.44269504f, ROUND), whole = shifted - ROUND;
  // ln 2 in two parts.
  const float r = fmaf(whole, 1.9046543e-9f, fmaf(whole, -0.693147181f, inside));
  float sum = SERIES[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) sum = fmaf(sum, r, SERIES[i]);
  // 2^whole in two factors: 2^128 is no f32.
  const int n = (int)__float_as_uint(shifted) - (int)__float_as_uint(ROUND);
  const float low = __uint_as_float((uint32_t)((n >> 1) + 127) << 23);
  const float high = __uint_as_float((uint32_t)(n - (n >> 1) + 127) << 23);
  return x >= SMALLEST ? sum * low * high : 0.0f;
}

DEVICE float silu_mul_one(float gate, float up) { return gate / (1.0f + exp_exact(-gate)) * up; }

KERNEL(256) silu_mul(const hat_silu_mul p) {
  const uint64_t quad = (uint64_t)blockIdx.x * 256 + threadIdx.x;
  if (quad >= p.count / 4) return;
  const float4 gate = ((const float4 *)p.gate)[quad], up = ((const float4 *)p.up)[quad];
  ((float4 *)p.out)[quad] =
      make_float4(silu_mul_one(gate.x, up.x), silu_mul_one(gate.y, up.y),
                  silu_mul_one(gate.z, up.z), silu_mul_one(gate.w, up.w));
}
