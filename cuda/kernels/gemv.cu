// out[r][n] = sum_k x[r][k] w[n][k] (+ bias[n]) for few rows, x in int8 blocks (quantise_q8), w in
// q8_0, q4_0 or q4_1 panels. Products of bytes are summed exactly; a block adds
// fma(isum, d_w d, acc), for q4_1 then fma(m, s, acc).
// q int8 [rows][columns], d, s f32 [rows][columns / 32], weight [outputs][columns], out f32.
// Bytes: the weights once for each ROWS rows, and for each panel the rows' q, d and s.
// Launch: grid (ceil(outputs / 16), ceil(rows / ROWS)), block 256 for a panel of 16 outputs. Block b
// of K goes to half-warp b % 16; the 16 sums are added in order, for every ROWS alike.
#include "panel.cuh"

#define GEMV_WARPS 8

template <int DTYPE, int ROWS> DEVICE void gemv(const hat_gemv &p, float (*partial)[8][HAT_PANEL]) {
  const uint32_t lane = threadIdx.x % WARP, column = lane % HAT_PANEL, blocks = p.columns / HAT_BLOCK;
  const uint32_t first_row = blockIdx.y * ROWS;
  const uint8_t *panel = p.weight + (size_t)blockIdx.x * blocks * PANEL_BLOCK_BYTES<DTYPE>;
  float sums[ROWS] = {};
#pragma unroll 1
  for (uint32_t b = threadIdx.x / HAT_PANEL; b < blocks; b += 2 * GEMV_WARPS) {
    const uint8_t *block = panel + (size_t)b * PANEL_BLOCK_BYTES<DTYPE>;
    uint32_t words[BLOCK_WORDS<DTYPE>];
#pragma unroll
    for (int j = 0; j < BLOCK_WORDS<DTYPE>; ++j) words[j] = panel_word(block, j, column);
    const float scale = panel_scale<DTYPE>(block, column);
    const float minimum = DTYPE == HAT_Q4_1 ? panel_minimum(block, column) : 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const uint32_t row = first_row + r;
      if (ROWS > 1 && row >= p.rows) break;
      const size_t at = (size_t)row * blocks + b;
      const uint4 *x = (const uint4 *)(p.q + at * HAT_BLOCK);
      const uint4 low = x[0], high = x[1];
      const uint32_t q[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      int sum = 0;
#pragma unroll
      for (int j = 0; j < BLOCK_WORDS<DTYPE>; ++j) {
        if (DTYPE == HAT_Q8_0) {
          sum = __dp4a((int)words[j], (int)q[j], sum);
        } else {
          sum = __dp4a((int)(words[j] & 0x0f0f0f0f), (int)q[j], sum);
          sum = __dp4a((int)(words[j] >> 4 & 0x0f0f0f0f), (int)q[j + 4], sum);
        }
        // (w - 8) q: 8 for each weight, without touching the packed ones.
        if (DTYPE == HAT_Q4_0) sum -= __dp4a(0x08080808, (int)q[j], __dp4a(0x08080808, (int)q[j + 4], 0));
      }
      sums[r] = fmaf((float)sum, scale * p.d[at], sums[r]);
      if (DTYPE == HAT_Q4_1) sums[r] = fmaf(minimum, p.s[at], sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    // The two halves of a warp, then the warps.
    const float other = __shfl_xor_sync(ALL_LANES, sums[r], HAT_PANEL);
    if (lane < HAT_PANEL) partial[threadIdx.x / WARP][r][column] = sums[r] + other;
  }
  __syncthreads();
  const uint32_t row = threadIdx.x / HAT_PANEL, output = blockIdx.x * HAT_PANEL + column;
  if (row >= ROWS || first_row + row >= p.rows || output >= p.outputs) return;
  float sum = partial[0][row][column];
#pragma unroll
  for (int warp = 1; warp < GEMV_WARPS; ++warp) sum += partial[warp][row][column];
  if (p.bias) sum += p.bias[output];
  float *out = p.out + (size_t)(first_row + row) * p.outputs + output;
  *out = p.add ? *out + sum : sum;
}

#define GEMV(name, DTYPE, ROWS)                                                                    \
  KERNEL(256) name(const hat_gemv p) {                                                             \
    __shared__ float partial[GEMV_WARPS][8][HAT_PANEL];                                            \
    gemv<DTYPE, ROWS>(p, partial);                                                                 \
  }

GEMV(gemv_q8_0_1, HAT_Q8_0, 1)
GEMV(gemv_q8_0_8, HAT_Q8_0, 8)
GEMV(gemv_q4_0_1, HAT_Q4_0, 1)
GEMV(gemv_q4_0_8, HAT_Q4_0, 8)
GEMV(gemv_q4_1_1, HAT_Q4_1, 1)
GEMV(gemv_q4_1_8, HAT_Q4_1, 8)
