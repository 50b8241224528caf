// x += add (if there is one); out = x / sqrt(mean(x^2) + eps) * weight.
// x, add, out f32 [rows][columns], weight f32 [columns]; columns % 4 == 0, rows 16-byte aligned.
// Bytes: 8 rows columns (16 with add) + 4 columns; a row is read twice, the second time from L1.
// Launch: grid rows, block 256. A row's sums are its own: thread, warp, block, in fixed order.
#include "abi.h"
#include "dev.cuh"

KERNEL(256) rms_norm(const hat_rms_norm p) {
  __shared__ float partial[256 / WARP];
  const size_t row = (size_t)blockIdx.x * p.columns;
  float4 *x = (float4 *)(p.x + row);
  const float4 *add = (const float4 *)(p.add + row);
  const float4 *weight = (const float4 *)p.weight;
  float4 *out = (float4 *)(p.out + row);
  const uint32_t quads = p.columns / 4;

  float sum = 0.0f;
  for (uint32_t i = threadIdx.x; i < quads; i += 256) {
    float4 v = x[i];
    if (p.add) {
      const float4 a = add[i];
      v = make_float4(v.x + a.x, v.y + a.y, v.z + a.z, v.w + a.w);
      x[i] = v;
    }
    sum = fmaf(v.x, v.x, sum);
    sum = fmaf(v.y, v.y, sum);
    sum = fmaf(v.z, v.z, sum);
    sum = fmaf(v.w, v.w, sum);
  }
  sum = block_sum<256 / WARP>(sum, partial);

  const float scale = 1.0f / sqrtf(sum / (float)p.columns + p.eps);
  for (uint32_t i = threadIdx.x; i < quads; i += 256) {
    const float4 v = x[i], w = weight[i];
    out[i] = make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
  }
}
