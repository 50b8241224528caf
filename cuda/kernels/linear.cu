// What gemv.cu computes, to the bit, for many rows: a sum in one thread walks all K in sequence.
// q int8 [rows][columns], d, s f32 [rows][columns / 32], weight [outputs][columns], out f32.
// Bytes: the weights once for each 64 rows, q, d and s once for each 128 outputs.
// Launch: grid (ceil(rows / 64), ceil(outputs / 128)), block 256, a tile of 128 outputs and 64 rows;
// blocks with the same weights are neighbours, so that the L2 has them. A warp has 32 outputs (2
// panels) and 32 rows. Two units of 32 weights are staged at a time, three stages go round.
#include "product.cuh"

#define TILE_PANELS 8
#define TILE_ROWS 64
#define STAGES 3
#define STAGE_UNITS 2

/// Weights and rows of some units.
template <class FORMAT> struct LinearStage {
  alignas(16) uint8_t weight[TILE_PANELS][STAGE_UNITS][FORMAT::STAGED_BYTES];
  /// Groups of 16 bytes of a row change places by row: see `row_chunk`.
  alignas(16) int8_t q[TILE_ROWS][STAGE_UNITS * HAT_BLOCK];
  /// d, then s for types with minima.
  alignas(16) float scales[FORMAT::MINIMA ? 2 : 1][STAGE_UNITS][TILE_ROWS];
};

/// Where a stage keeps 16 bytes `chunk` of a row: the 8 rows that a matrix is loaded of are in
/// different banks.
DEVICE uint32_t row_chunk(uint32_t row, uint32_t chunk) { return (chunk ^ row / 4 % 4) * 16; }

/// What a thread copies for each stage: some 16 bytes of weights, 16 of a row, a scale.
template <class FORMAT> struct LinearCopy {
  static constexpr uint32_t CHUNKS = FORMAT::STAGED_BYTES / 16;
  static constexpr uint32_t COPIES = (STAGE_UNITS * CHUNKS + WARP - 1) / WARP;
  const uint8_t *panel;
  const int8_t *q;
  const float *scale;
  /// Units that there are for the panel, the row, the scale.
  uint32_t panel_units, row_units, scale_units;
};

template <class FORMAT> DEVICE LinearCopy<FORMAT> linear_copy(const hat_product &p) {
  const uint32_t blocks = p.columns / HAT_BLOCK, panel = blockIdx.y * TILE_PANELS + threadIdx.x / WARP;
  const uint32_t row = blockIdx.x * TILE_ROWS + threadIdx.x / 4, of = blockIdx.x * TILE_ROWS + threadIdx.x % TILE_ROWS;
  // The first half of the threads copies d, the other one s.
  const bool second = threadIdx.x >= STAGE_UNITS * TILE_ROWS, scaled = !second || FORMAT::MINIMA;
  const uint32_t unit = threadIdx.x / TILE_ROWS % STAGE_UNITS;
  LinearCopy<FORMAT> copy;
  copy.panel_units = panel * HAT_PANEL < p.outputs ? blocks : 0;
  copy.row_units = row < p.rows ? blocks : 0;
  copy.scale_units = scaled && of < p.rows ? blocks : 0;
  copy.panel = (const uint8_t *)p.weight + panel * panel_bytes<FORMAT>(blocks);
  copy.q = (const int8_t *)p.x + row * (size_t)p.columns + threadIdx.x % 4 * 16;
  copy.scale = (second ? p.s : p.d) + of * (size_t)blocks + unit;
  return copy;
}

/// Begins to copy the units from `first` on; of what is not there no address is read.
template <class FORMAT>
DEVICE void load_stage(const LinearCopy<FORMAT> &copy, uint32_t first, LinearStage<FORMAT> &to) {
  constexpr uint32_t CHUNKS = LinearCopy<FORMAT>::CHUNKS;
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (uint32_t i = 0; i < LinearCopy<FORMAT>::COPIES; ++i) {
    const uint32_t at = lane + i * WARP, unit = at / CHUNKS, chunk = at % CHUNKS;
    if (at >= STAGE_UNITS * CHUNKS) break;
    const uint8_t *from = FORMAT::HEAD != 0 ? unit_byte<FORMAT>(copy.panel, first + unit, chunk * 16)
                                            : copy.panel + (size_t)first * FORMAT::STAGED_BYTES + at * 16;
    copy_async(&to.weight[warp][unit][staged_chunk<FORMAT>(chunk) * 16], from, first + unit < copy.panel_units);
  }
  const uint32_t row = threadIdx.x / 4, chunk = threadIdx.x % 4;
  copy_async(&to.q[row][row_chunk(row, chunk)], copy.q + first * HAT_BLOCK, first + chunk / 2 < copy.row_units);
  if (!FORMAT::MINIMA && threadIdx.x >= STAGE_UNITS * TILE_ROWS) return;
  const uint32_t unit = threadIdx.x / TILE_ROWS;
  copy_async_word(&to.scales[unit / STAGE_UNITS][unit % STAGE_UNITS][threadIdx.x % TILE_ROWS],
                  copy.scale + first, first + unit % STAGE_UNITS < copy.scale_units);
}

/// Adds the terms of a unit to a warp's sums: `sums[panel][row / 16][row / 2 % 2]`, in which row
/// 16 i + 4 (lane % 4) + 2 j + k of the warp's 32 is column `lane % 4 * 2 + k` of an mma's C.
template <class FORMAT>
DEVICE void add_unit(const LinearStage<FORMAT> &stage, const int unit, const UnitPlaces &places,
                     const int (&base)[4], float (&sums)[2][2][2][4]) {
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  Unit units[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const uint8_t *weight = stage.weight[warp % 4 * 2 + m][unit];
    units[m] = FORMAT::unpack(FORMAT::template read<true>(weight, weight + FORMAT::STAGED_SCALES, places));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t first = warp / 4 * 32 + i * 16;
    // Matrices: both halves of K of the rows of j = 0, then of j = 1.
    const uint32_t row = first + lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2;
    uint32_t b[4];
    load_matrices(b, &stage.q[row][row_chunk(row, unit * 2 + lane / 8 % 2)]);
    const float4 d = load_shared((const float4 *)&stage.scales[0][unit][first + lane % 4 * 4]);
    const float scales[4] = {d.x, d.y, d.z, d.w};
    float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (FORMAT::MINIMA) {
      all = load_shared((const float4 *)&stage.scales[FORMAT::MINIMA][unit][first + lane % 4 * 4]);
    }
    const float s[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float terms[4];
        FORMAT::multiply(terms, units[m], b[2 * j], b[2 * j + 1], base);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float &sum = sums[m][i][j][c];
          sum = fmaf(terms[c], units[m].scale[c / 2] * scales[2 * j + c % 2], sum);
          if (FORMAT::MINIMA) sum = fmaf(units[m].minimum[c / 2], s[2 * j + c % 2], sum);
        }
      }
    }
  }
}

/// The sums of a warp to their places.
DEVICE void write_sums(const hat_product &p, const float (&sums)[2][2][2][4]) {
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint32_t output = (blockIdx.y * TILE_PANELS + warp % 4 * 2 + m) * HAT_PANEL + lane / 4 * 2 + c;
      if (output >= p.outputs) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i / 4, j = i / 2 % 2, k = i % 2;
        const uint32_t row = blockIdx.x * TILE_ROWS + warp / 4 * 32 + half * 16 + lane % 4 * 4 + j * 2 + k;
        if (row >= p.rows) break;
        const float sum = p.bias ? sums[m][half][j][c * 2 + k] + p.bias[output] : sums[m][half][j][c * 2 + k];
        float *out = p.out + (size_t)row * p.outputs + output;
        *out = p.add ? *out + sum : sum;
        // One at a time: all at once take more registers than the sums themselves.
        compiler_barrier();
      }
    }
  }
}

template <class FORMAT> DEVICE void linear(const hat_product &p, LinearStage<FORMAT> (&stages)[STAGES]) {
  const uint32_t blocks = p.columns / HAT_BLOCK, warp = threadIdx.x / WARP;
  const bool concerned = blockIdx.x * TILE_ROWS + warp / 4 * 32 < p.rows &&
                         (blockIdx.y * TILE_PANELS + warp % 4 * 2) * HAT_PANEL < p.outputs;
  const LinearCopy<FORMAT> copy = linear_copy<FORMAT>(p);
#pragma unroll
  for (uint32_t i = 0; i < STAGES - 1; ++i) {
    if (i * STAGE_UNITS < blocks) load_stage<FORMAT>(copy, i * STAGE_UNITS, stages[i]);
    copy_async_commit();
  }
  // Columns are a multiple of 32. As constants these would be put into registers for each product.
  int base[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) base[i] = SUM_BASE + (int)(p.columns & 1u << i);
  const UnitPlaces places = unit_places<true>();
  float sums[2][2][2][4] = {};
  int full = 0, empty = STAGES - 1;
#pragma unroll 1
  for (uint32_t first = 0; first < blocks; first += STAGE_UNITS) {
    copy_async_wait<STAGES - 2>();
    // All have copied what is read now, and have read what is written over now.
    __syncthreads();
    const uint32_t next = first + (STAGES - 1) * STAGE_UNITS;
    if (next < blocks) load_stage<FORMAT>(copy, next, stages[empty]);
    copy_async_commit();
    if (concerned) {
      add_unit<FORMAT>(stages[full], 0, places, base, sums);
      if (first + 1 < blocks) add_unit<FORMAT>(stages[full], 1, places, base, sums);
    }
    full = full + 1 == STAGES ? 0 : full + 1;
    empty = empty + 1 == STAGES ? 0 : empty + 1;
  }
  if (concerned) write_sums(p, sums);
}

#define LINEAR(name, FORMAT)                                                                       \
  KERNEL_TOGETHER(256, 2) name(const hat_product p) {                                              \
    __shared__ LinearStage<FORMAT> stages[STAGES];                                                 \
    linear<FORMAT>(p, stages);                                                                     \
  }

LINEAR(linear_q8_0, Q8_0)
LINEAR(linear_q4_0, Q4_0)
LINEAR(linear_q4_1, Q4_1)
LINEAR(linear_q6_k, Q6K)
