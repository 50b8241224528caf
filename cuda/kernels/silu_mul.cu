// out = gate / (1 + exp(-gate)) * up.
// gate, up, out f32 [count]; count % 4 == 0, 16-byte aligned.
// Bytes: 12 count, each once.
// Launch: grid ceil(count / 1024), block 256: four numbers a thread.
#include "abi.h"
#include "dev.cuh"

DEVICE float silu_mul_one(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

KERNEL(256) silu_mul(const hat_silu_mul p) {
  const uint64_t quad = (uint64_t)blockIdx.x * 256 + threadIdx.x;
  if (quad >= p.count / 4) return;
  const float4 gate = ((const float4 *)p.gate)[quad], up = ((const float4 *)p.up)[quad];
  ((float4 *)p.out)[quad] =
      make_float4(silu_mul_one(gate.x, up.x), silu_mul_one(gate.y, up.y),
                  silu_mul_one(gate.z, up.z), silu_mul_one(gate.w, up.w));
}
