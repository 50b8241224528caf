// out = x / sqrt(mean(x^2) + eps) * weight.
// x, out f32 [rows][columns], weight f32 [columns]; columns % 4 == 0, rows 16-byte aligned.
// Bytes: 8 rows columns + 4 columns; a row is read twice, the second time from L1.
// Launch: grid rows, block 256. To the bit what docs/ARITHMETIC.md says: 16 chains of squares, number
// i in chain i % 16, so a row takes columns / 16 fused additions one after another, some 4 cycles each.
#include "abi.h"
#include "dev.cuh"

#define RMS_CHAINS 16
/// Numbers of a row that stand in shared memory at a time.
#define RMS_PART 4096

KERNEL(256) rms_norm(const hat_rms_norm p) {
  __shared__ float4 part[RMS_PART / 4];
  __shared__ float squares;
  const size_t row = (size_t)blockIdx.x * p.columns;
  const float4 *x = (const float4 *)(p.x + row);
  const float4 *weight = (const float4 *)p.weight;
  float4 *out = (float4 *)(p.out + row);

  float sum = 0.0f;
#pragma unroll 1
  for (uint32_t first = 0; first < p.columns; first += RMS_PART) {
    const uint32_t numbers = min(p.columns - first, (uint32_t)RMS_PART);
    for (uint32_t i = threadIdx.x; i < numbers / 4; i += 256) part[i] = x[first / 4 + i];
    __syncthreads();
    if (threadIdx.x < WARP) {
      // The upper half of the warp does the same again.
#pragma unroll 8
      for (uint32_t i = threadIdx.x % RMS_CHAINS; i < numbers; i += RMS_CHAINS) {
        const float v = ((const float *)part)[i];
        sum = fmaf(v, v, sum);
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < WARP) {
#pragma unroll
    for (int chain = RMS_CHAINS / 2; chain > 0; chain /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, chain);
    if (threadIdx.x == 0) squares = sum;
  }
  __syncthreads();

  const float scale = 1.0f / sqrtf(squares / (float)p.columns + p.eps);
  for (uint32_t i = threadIdx.x; i < p.columns / 4; i += 256) {
    const float4 v = x[i], w = weight[i];
    out[i] = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
  }
}
