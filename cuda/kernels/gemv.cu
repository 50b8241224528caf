// out[r][n] = sum_k x[r][k] w[n][k] (+ bias[n]) for few rows, x in int8 blocks (quantise_q8), w in
// q8_0, q4_0, q4_1 or q6_k panels. Products of bytes are summed exactly; the blocks of K are added
// in sequence, each fma(isum, d_w d, acc), for q4_1 then fma(m, s, acc): the bits of linear.cu.
// q int8 [rows][columns], d, s f32 [rows][columns / 32], weight [outputs][columns], out f32.
// Bytes: the weights once for each ROWS rows, and for each panel the rows' q, d and s.
// Launch: grid (ceil(outputs / 16), ceil(rows / ROWS)), block 256 for a panel of 16 outputs. In a
// round each of 8 warps multiplies one unit of 32 weights; then a thread for each output adds the
// 8 terms to its sum. Each warp has loads of two rounds under way.
#include "product.cuh"

#define GEMV_WARPS 8

/// The terms of a round.
template <class FORMAT, int ROWS> struct GemvRound {
  /// Sum and scale. Two more columns than there are: rows stand in other banks.
  float2 terms[GEMV_WARPS][ROWS][HAT_PANEL + 2];
  /// Of types with minima.
  float minima[FORMAT::MINIMA ? GEMV_WARPS : 1][HAT_PANEL], s[FORMAT::MINIMA ? GEMV_WARPS : 1][ROWS];
};

/// What a thread has loaded of a unit and of the rows beside it.
template <int ROWS> struct GemvLoads {
  Packed unit;
  /// B of the mma: bytes of row `lane / 4` of each 8.
  uint32_t q[ROWS / 8][2];
  /// Of rows `lane % 4 * 2` and the next, of each 8.
  float d[ROWS / 8][2];
  float s;
};

/// Where a thread's loads of its first round are. Rows that there are not are the last one again:
/// nobody reads what becomes of them.
template <class FORMAT, int ROWS> struct GemvPlaces {
  UnitPlaces unit;
  const uint8_t *words, *scales;
  const int8_t *q[ROWS / 8];
  const float *d[ROWS / 8][2], *s;
};

template <class FORMAT, int ROWS> DEVICE GemvPlaces<FORMAT, ROWS> gemv_places(const hat_product &p) {
  const uint32_t blocks = p.columns / HAT_BLOCK, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const uint32_t first = blockIdx.y * ROWS, last = p.rows - 1;
  const uint8_t *panel = (const uint8_t *)p.weight + blockIdx.x * panel_bytes<FORMAT>(blocks);
  GemvPlaces<FORMAT, ROWS> places;
  places.unit = unit_places<false>();
  places.words = unit_byte<FORMAT>(panel, warp, 0);
  places.scales = unit_byte<FORMAT>(panel, warp, FORMAT::STAGED_SCALES);
#pragma unroll
  for (int n = 0; n < ROWS / 8; ++n) {
    places.q[n] = (const int8_t *)p.x + (size_t)min(first + n * 8 + lane / 4, last) * p.columns +
                  warp * HAT_BLOCK + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      places.d[n][i] = p.d + (size_t)min(first + n * 8 + lane % 4 * 2 + i, last) * blocks + warp;
    }
  }
  places.s = p.s + (size_t)min(first + lane % ROWS, last) * blocks + warp;
  return places;
}

template <class FORMAT, int ROWS>
DEVICE void load(const GemvPlaces<FORMAT, ROWS> &places, uint32_t round, GemvLoads<ROWS> &to) {
  constexpr uint32_t BYTES = GEMV_WARPS / FORMAT::UNITS * FORMAT::BLOCK_BYTES;
  const size_t at = (size_t)round * BYTES;
  to.unit = FORMAT::template read<false>(places.words + at, places.scales + at, places.unit);
#pragma unroll
  for (int n = 0; n < ROWS / 8; ++n) {
    const uint32_t *q = (const uint32_t *)(places.q[n] + round * (GEMV_WARPS * HAT_BLOCK));
    to.q[n][0] = q[0];
    to.q[n][1] = q[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) to.d[n][i] = places.d[n][i][round * GEMV_WARPS];
  }
  if (FORMAT::MINIMA) to.s = places.s[round * GEMV_WARPS];
}

template <class FORMAT, int ROWS>
DEVICE void multiply(const GemvLoads<ROWS> &from, const int (&base)[4], GemvRound<FORMAT, ROWS> &round) {
  const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = lane / 4 * 2;
  const Unit unit = FORMAT::unpack(from.unit);
#pragma unroll
  for (int n = 0; n < ROWS / 8; ++n) {
    float sums[4];
    FORMAT::multiply(sums, unit, from.q[n][0], from.q[n][1], base);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float4 *to = (float4 *)&round.terms[warp][n * 8 + lane % 4 * 2 + i][column];
      store_shared(to, make_float4(sums[i], unit.scale[0] * from.d[n][i], sums[i + 2], unit.scale[1] * from.d[n][i]));
    }
  }
  if (FORMAT::MINIMA) {
    if (lane % 4 == 0) *(float2 *)&round.minima[warp][column] = make_float2(unit.minimum[0], unit.minimum[1]);
    if (lane < ROWS) round.s[warp][lane] = from.s;
  }
}

/// Adds the first `count` terms of a round to a thread's sum.
template <class FORMAT, int ROWS>
DEVICE float add_round(const GemvRound<FORMAT, ROWS> &round, uint32_t count, float sum) {
  const uint32_t row = threadIdx.x / HAT_PANEL, column = threadIdx.x % HAT_PANEL;
  float2 terms[GEMV_WARPS], minima[GEMV_WARPS];
#pragma unroll
  for (uint32_t i = 0; i < GEMV_WARPS; ++i) {
    terms[i] = load_shared(&round.terms[i][row][column]);
    if (FORMAT::MINIMA) minima[i] = make_float2(round.minima[i][column], round.s[i][row]);
  }
#pragma unroll
  for (uint32_t i = 0; i < GEMV_WARPS; ++i) {
    const float next = fmaf(terms[i].x, terms[i].y, sum);
    sum = i < count ? next : sum;
    if (FORMAT::MINIMA) sum = i < count ? fmaf(minima[i].x, minima[i].y, sum) : sum;
  }
  return sum;
}

template <class FORMAT, int ROWS> DEVICE void gemv(const hat_product &p, GemvRound<FORMAT, ROWS> (&rounds)[2]) {
  const uint32_t blocks = p.columns / HAT_BLOCK, warp = threadIdx.x / WARP, row = threadIdx.x / HAT_PANEL;
  const GemvPlaces<FORMAT, ROWS> places = gemv_places<FORMAT, ROWS>(p);
  GemvLoads<ROWS> loads[2] = {};
  if (warp < blocks) load<FORMAT, ROWS>(places, 0, loads[0]);
  if (warp + GEMV_WARPS < blocks) load<FORMAT, ROWS>(places, 1, loads[1]);
  const int base[4] = {SUM_BASE, SUM_BASE, SUM_BASE, SUM_BASE};
  float sum = 0.0f;
#pragma unroll 1
  for (uint32_t round = 0; round * GEMV_WARPS < blocks; round += 2) {
#pragma unroll
    for (uint32_t turn = 0; turn < 2; ++turn) {
      const uint32_t begin = (round + turn) * GEMV_WARPS;
      if (begin >= blocks) break;
      if (begin + warp < blocks) multiply<FORMAT, ROWS>(loads[turn], base, rounds[turn]);
      if (begin + 2 * GEMV_WARPS + warp < blocks) load<FORMAT, ROWS>(places, round + turn + 2, loads[turn]);
      // Who is a round ahead writes the other one of `rounds`.
      __syncthreads();
      if (row < ROWS) sum = add_round<FORMAT, ROWS>(rounds[turn], blocks - begin, sum);
    }
  }
  const uint32_t to = blockIdx.y * ROWS + row, output = blockIdx.x * HAT_PANEL + threadIdx.x % HAT_PANEL;
  if (row >= ROWS || to >= p.rows || output >= p.outputs) return;
  if (p.bias) sum += p.bias[output];
  float *out = p.out + (size_t)to * p.outputs + output;
  *out = p.add ? *out + sum : sum;
}

#define GEMV(name, FORMAT, ROWS, TOGETHER)                                                         \
  KERNEL_TOGETHER(256, TOGETHER) name(const hat_product p) {                                       \
    __shared__ GemvRound<FORMAT, ROWS> rounds[2];                                                  \
    gemv<FORMAT, ROWS>(p, rounds);                                                                 \
  }

GEMV(gemv_q8_0_8, Q8_0, 8, 4)
GEMV(gemv_q8_0_16, Q8_0, 16, 2)
GEMV(gemv_q4_0_8, Q4_0, 8, 4)
GEMV(gemv_q4_0_16, Q4_0, 16, 2)
GEMV(gemv_q4_1_8, Q4_1, 8, 3)
GEMV(gemv_q4_1_16, Q4_1, 16, 2)
GEMV(gemv_q6_k_8, Q6K, 8, 2)
GEMV(gemv_q6_k_16, Q6K, 16, 2)
