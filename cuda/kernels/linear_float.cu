// out[r][n] = sum_k x[r][k] w[n][k] (+ bias[n]) for any number of rows, x (round_f16, round_bf16) and
// w both in f16 or both in bf16. 32 of K are summed by tensor cores from zero, these sums are added in
// sequence in f32: one kernel for all row counts, so a row's bits depend on no other.
// x [rows][columns], weight [outputs][columns] in panels, out f32.
// Bytes: the weights once for each 64 rows, x once for each 128 outputs.
// Launch: grid (ceil(rows / 64), ceil(outputs / 128)), block 256, a tile of 128 outputs and 64 rows;
// a warp has 32 outputs (2 panels) and 32 rows. 32 of K are a stage, three stages go round.
#include "abi.h"
#include "dev.cuh"

#define TILE_PANELS 8
#define TILE_ROWS 64
#define STAGES 3
#define STAGE_K 32

/// Weights and rows of 32 of K. Groups of 16 bytes change places so that the 8 rows of a matrix are in
/// different banks.
struct FloatStage {
  alignas(16) uint16_t weight[TILE_PANELS][STAGE_K][HAT_PANEL];
  alignas(16) uint16_t x[TILE_ROWS][STAGE_K];
};
/// Where half `half` of the 16 columns of a k stands.
DEVICE uint32_t weight_place(uint32_t k, uint32_t half) { return (half ^ k / 4 % 2) * 8; }
/// Where numbers `8 chunk ..` of a row stand.
DEVICE uint32_t x_place(uint32_t row, uint32_t chunk) { return (chunk ^ row / 2 % 4) * 8; }

/// Begins to copy 32 of K from `first` on; of what is not there no address is read.
DEVICE void load_float_stage(const hat_product &p, uint32_t first, FloatStage &to) {
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, panel = blockIdx.y * TILE_PANELS + warp;
  const uint16_t *weight = (const uint16_t *)p.weight + ((size_t)panel * p.columns + first) * HAT_PANEL;
#pragma unroll
  for (uint32_t i = 0; i < STAGE_K * 2 / WARP; ++i) {
    const uint32_t k = lane / 2 + i * (WARP / 2), half = lane % 2;
    copy_async(&to.weight[warp][k][weight_place(k, half)], weight + k * HAT_PANEL + half * 8,
               panel * HAT_PANEL < p.outputs && first + k < p.columns);
  }
  const uint32_t row = threadIdx.x / 4, chunk = threadIdx.x % 4, from = blockIdx.x * TILE_ROWS + row;
  copy_async(&to.x[row][x_place(row, chunk)], (const uint16_t *)p.x + (size_t)from * p.columns + first + chunk * 8,
             from < p.rows && first + chunk * 8 < p.columns);
}

/// Adds the sums over a stage to a warp's: `sums[panel][row / 8]`, as C of the mma.
template <bool BF16> DEVICE void add_stage(const FloatStage &stage, float (&sums)[2][4][4]) {
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  uint32_t a[2][2][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Matrices: 8 of K and 8 columns; both halves of the columns, then the next 8 of K.
      const uint32_t k = half * 16 + lane / 16 * 8 + lane % 8;
      load_matrices_transposed(a[m][half], &stage.weight[warp % 4 * 2 + m][k][weight_place(k, lane / 8 % 2)]);
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const uint32_t row = warp / 4 * 32 + n * 8 + lane % 8;
    uint32_t b[4];
    load_matrices(b, &stage.x[row][x_place(row, lane / 8)]);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float sum[4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (BF16) multiply_add_bf16(sum, a[m][half], b[2 * half], b[2 * half + 1]);
        else multiply_add(sum, a[m][half], b[2 * half], b[2 * half + 1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] += sum[i];
    }
  }
}

template <bool BF16> DEVICE void linear_float(const hat_product &p, FloatStage (&stages)[STAGES]) {
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (uint32_t i = 0; i < STAGES - 1; ++i) {
    if (i * STAGE_K < p.columns) load_float_stage(p, i * STAGE_K, stages[i]);
    copy_async_commit();
  }
  float sums[2][4][4] = {};
  int full = 0, empty = STAGES - 1;
#pragma unroll 1
  for (uint32_t first = 0; first < p.columns; first += STAGE_K) {
    copy_async_wait<STAGES - 2>();
    // All have copied what is read now, and have read what is written over now.
    __syncthreads();
    const uint32_t next = first + (STAGES - 1) * STAGE_K;
    if (next < p.columns) load_float_stage(p, next, stages[empty]);
    copy_async_commit();
    add_stage<BF16>(stages[full], sums);
    full = full + 1 == STAGES ? 0 : full + 1;
    empty = empty + 1 == STAGES ? 0 : empty + 1;
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int n = i / 4, c = i % 4;
      const uint32_t output = (blockIdx.y * TILE_PANELS + warp % 4 * 2 + m) * HAT_PANEL + lane / 4 + c / 2 * 8;
      const uint32_t row = blockIdx.x * TILE_ROWS + warp / 4 * 32 + n * 8 + lane % 4 * 2 + c % 2;
      if (row >= p.rows || output >= p.outputs) continue;
      const float sum = p.bias ? sums[m][n][c] + p.bias[output] : sums[m][n][c];
      float *out = p.out + (size_t)row * p.outputs + output;
      *out = p.add ? *out + sum : sum;
      compiler_barrier();
    }
  }
}

KERNEL_TOGETHER(256, 2) linear_f16(const hat_product p) {
  __shared__ FloatStage stages[STAGES];
  linear_float<false>(p, stages);
}
KERNEL_TOGETHER(256, 2) linear_bf16(const hat_product p) {
  __shared__ FloatStage stages[STAGES];
  linear_float<true>(p, stages);
}
