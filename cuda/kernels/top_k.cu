// The k largest of each row, the largest first; equal ones in the order of their columns.
// x f32 [rows][columns]; slice_* [rows][slices][k]; values, out_columns [rows][k].
// Bytes: 4 columns for each row, once; then 16 slices k.
// Launch: top_k_slices grid (slices, rows), top_k_merge grid (rows); block 256.
// Each pass takes the best number that comes after the last one taken, so nothing is marked.
#include "abi.h"
#include "dev.cuh"

#define NO_COLUMN 0xffffffffu

struct Top {
  float value;
  uint32_t column;
};

DEVICE bool is_before(Top a, Top b) {
  return a.value > b.value || (a.value == b.value && a.column < b.column);
}

/// The best of a block's candidates, in every thread.
DEVICE Top block_best(Top best, Top *partial) {
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) {
    const Top other = {__shfl_xor_sync(ALL_LANES, best.value, lane),
                       __shfl_xor_sync(ALL_LANES, best.column, lane)};
    if (is_before(other, best)) best = other;
  }
  __syncthreads(); // the last pass has read `partial`
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = best;
  __syncthreads();
  best = partial[0];
#pragma unroll
  for (int warp = 1; warp < 256 / WARP; ++warp) {
    if (is_before(partial[warp], best)) best = partial[warp];
  }
  return best;
}

/// Writes the k best of `count` candidates, which `at` gives.
template <class At>
DEVICE void take_best(uint32_t count, uint32_t k, At at, Top *partial, float *values, uint32_t *columns) {
  Top last = {-MINUS_INFINITY, 0};
#pragma unroll 1
  for (uint32_t rank = 0; rank < k; ++rank) {
    Top best = {MINUS_INFINITY, NO_COLUMN};
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < count; i += 256) {
      const Top candidate = at(i);
      if (is_before(candidate, best) && is_before(last, candidate)) best = candidate;
    }
    last = block_best(best, partial);
    if (threadIdx.x == 0) {
      values[rank] = last.value;
      columns[rank] = last.column;
    }
  }
}

KERNEL(256) top_k_slices(const hat_top_k p) {
  __shared__ float slice[HAT_TOP_SLICE];
  __shared__ Top partial[256 / WARP];
  const uint32_t first = blockIdx.x * HAT_TOP_SLICE, row = blockIdx.y;
  const uint32_t count = min((uint32_t)HAT_TOP_SLICE, p.columns - first);
  const float *x = p.x + (size_t)row * p.columns + first;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < count; i += 256) {
    slice[i] = x[i];
    if (!is_finite(slice[i])) p.not_finite[row] = 1;
  }
  __syncthreads();
  const size_t out = ((size_t)row * p.slices + blockIdx.x) * p.k;
  take_best(count, p.k, [&](uint32_t i) { return Top{slice[i], first + i}; }, partial,
            p.slice_values + out, p.slice_columns + out);
}

KERNEL(256) top_k_merge(const hat_top_k p) {
  __shared__ Top partial[256 / WARP];
  const size_t first = (size_t)blockIdx.x * p.slices * p.k, out = (size_t)blockIdx.x * p.k;
  auto at = [&](uint32_t i) { return Top{p.slice_values[first + i], p.slice_columns[first + i]}; };
  take_best(p.slices * p.k, p.k, at, partial, p.values + out, p.out_columns + out);
}
