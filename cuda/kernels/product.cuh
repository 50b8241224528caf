// Products of int8 activations and quantised weights on tensor cores, for gemv.cu (few rows) and
// linear.cu (many). Both make the same terms and add them in one order, so they give the same bits:
// those of docs/ARITHMETIC.md, id 1.
//
// A of an mma is a *unit*: 32 weights of the 16 columns of a panel. Its row g is column 2 g, its
// row g + 8 column 2 g + 1, so that a thread finds its two columns side by side. B is 8 rows of
// activations. The sums of whole numbers are exact; they begin at SUM_BASE, whose bits are those of
// the float 1.5 * 2^23. A sum below 2^22 in magnitude then is a float after one subtraction.
#pragma once
#include "panel.cuh"

#define SUM_BASE 0x4b400000
#define SUM_BASE_FLOAT 12582912.0f

/// Bytes of a unit where it is staged: for q6_k with the scales of its block behind it.
template <int DTYPE>
constexpr int UNIT_BYTES = DTYPE == HAT_Q6_K ? Q6_K_UNIT_BYTES + HAT_PANEL * 2 : PANEL_BLOCK_BYTES<DTYPE>;
/// Where its scales stand.
template <int DTYPE>
constexpr int UNIT_SCALES = DTYPE == HAT_Q6_K ? Q6_K_UNIT_BYTES : BLOCK_WORDS<DTYPE> * 64;
/// Bytes of a panel for each unit.
template <int DTYPE> DEVICE size_t panel_bytes(uint32_t units) {
  if (DTYPE == HAT_Q6_K) return (size_t)(units / 8) * Q6_K_BYTES;
  return (size_t)units * PANEL_BLOCK_BYTES<DTYPE>;
}
/// Byte `at` of a unit of a panel, in the order of UNIT_BYTES.
template <int DTYPE> DEVICE const uint8_t *unit_byte(const uint8_t *panel, uint32_t unit, uint32_t at) {
  if (DTYPE != HAT_Q6_K) return panel + (size_t)unit * PANEL_BLOCK_BYTES<DTYPE> + at;
  const uint8_t *block = panel + (size_t)(unit / 8) * Q6_K_BYTES;
  if (at >= Q6_K_UNIT_BYTES) return block + (at - Q6_K_UNIT_BYTES);
  return block + HAT_PANEL * 2 + unit % 8 * Q6_K_UNIT_BYTES + at;
}
/// Where 16 bytes `chunk` of a unit are staged: words 2, 3, 6, 7 with their halves swapped, so that
/// half a warp reads words 0..4 of 8 columns from all banks.
template <int DTYPE> DEVICE uint32_t staged_chunk(uint32_t chunk) {
  return chunk < BLOCK_WORDS<DTYPE> * 4 ? chunk ^ chunk / 8 % 2 * 2 : chunk;
}

/// A thread's part of a unit as it stands in memory.
template <int DTYPE> struct PackedUnit {
  /// Of two columns: words `lane % 4` (and + 4); for q6_k, the high bits of both halves.
  uint2 words[DTYPE == HAT_Q8_0 ? 2 : DTYPE == HAT_Q6_K ? 3 : 1];
  /// Two f16.
  uint32_t scales;
  /// q4_1: two f16 minima. q6_k: the scales of weights 0..16 of two columns, then of 16..32.
  uint32_t more;
};

/// Where a thread's part of a unit stands: bytes from the unit's begin, and from its scales'.
struct UnitPlaces {
  uint32_t words, scales, high, subscales;
};
template <bool STAGED> DEVICE UnitPlaces unit_places() {
  const uint32_t lane = threadIdx.x % WARP, column = lane / 4 * 2, word = lane % 4;
  const uint32_t at = STAGED ? column ^ word / 2 * 8 : column;
  return {kept((word * HAT_PANEL + at) * 4), kept(column * 2), HAT_PANEL * 16 + column * 4, HAT_PANEL * 24 + column};
}

/// Loads of global or of staged memory.
template <bool STAGED, class T> DEVICE T load_weights(const uint8_t *at) {
  return STAGED ? load_shared((const T *)at) : load_streamed((const T *)at);
}
template <int DTYPE, bool STAGED>
DEVICE PackedUnit<DTYPE> read_unit(const uint8_t *unit, const uint8_t *scales, const UnitPlaces &places) {
  PackedUnit<DTYPE> packed = {};
  packed.words[0] = load_weights<STAGED, uint2>(unit + places.words);
  if (DTYPE == HAT_Q8_0) packed.words[1] = load_weights<STAGED, uint2>(unit + places.words + 4 * HAT_PANEL * 4);
  packed.scales = load_weights<STAGED, uint32_t>(scales + places.scales);
  if (DTYPE == HAT_Q4_1) packed.more = load_weights<STAGED, uint32_t>(scales + HAT_PANEL * 2 + places.scales);
  if (DTYPE == HAT_Q6_K) {
    packed.words[1] = load_weights<STAGED, uint2>(unit + places.high);
    packed.words[2] = load_weights<STAGED, uint2>(unit + places.high + HAT_PANEL * 4);
    const uint8_t *subscales = unit + places.subscales;
    packed.more = *(const uint16_t *)subscales | (uint32_t)*(const uint16_t *)(subscales + HAT_PANEL) << 16;
  }
  return packed;
}

/// A thread's part of a unit, ready to be multiplied.
template <int DTYPE> struct Unit {
  /// A of the mma: q8_0 and q4_1 as they are, q4_0 times 16, q6_k times 4.
  uint32_t a[4];
  /// Of two columns.
  float scale[2];
  /// q4_1: the minima.
  float minimum[2];
  /// q6_k: a quarter of the scale of weights 0..16, what that makes of SUM_BASE, the scale of 16..32.
  float low[2], base[2], high[2];
};

/// Nibbles of a word, at bits 2 to 6 of each byte, and their two high bits: 4 (w - 32) as a byte.
DEVICE uint32_t join_bits(uint32_t nibbles, uint32_t high) {
  return (nibbles & 0x3c3c3c3cu) ^ 0x80808080u ^ (high & 0xc0c0c0c0u);
}
template <int DTYPE> DEVICE Unit<DTYPE> unpack_unit(const PackedUnit<DTYPE> &packed) {
  Unit<DTYPE> unit;
  const uint32_t words[2] = {packed.words[0].x, packed.words[0].y};
  unit.scale[0] = from_half((uint16_t)packed.scales);
  unit.scale[1] = from_half((uint16_t)(packed.scales >> 16));
  if (DTYPE == HAT_Q8_0) {
    unit.a[2] = packed.words[DTYPE == HAT_Q8_0].x;
    unit.a[3] = packed.words[DTYPE == HAT_Q8_0].y;
  }
  // From bit 6 down to bit `2 word` of each byte.
  const uint32_t up = 6 - threadIdx.x % 4 * 2;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    if (DTYPE == HAT_Q8_0) unit.a[c] = words[c];
    if (DTYPE == HAT_Q4_0) {
      unit.a[c] = (words[c] << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
      unit.a[c + 2] = (words[c] & 0xf0f0f0f0u) ^ 0x80808080u;
    }
    if (DTYPE == HAT_Q4_1) {
      unit.a[c] = words[c] & 0x0f0f0f0fu;
      unit.a[c + 2] = words[c] >> 4 & 0x0f0f0f0fu;
      unit.minimum[c] = from_half((uint16_t)(packed.more >> 16 * c));
    }
    if (DTYPE == HAT_Q6_K) {
      const uint2 low = packed.words[DTYPE == HAT_Q6_K ? 1 : 0], high = packed.words[DTYPE == HAT_Q6_K ? 2 : 0];
      unit.a[c] = join_bits(words[c] << 2, (c ? low.y : low.x) << up);
      unit.a[c + 2] = join_bits(words[c] >> 2, (c ? high.y : high.x) << up);
      unit.low[c] = (float)(int8_t)(packed.more >> 8 * c) * 0.25f;
      unit.base[c] = -SUM_BASE_FLOAT * unit.low[c];
      unit.high[c] = (float)(int8_t)(packed.more >> (16 + 8 * c));
    }
  }
  return unit;
}

/// The sums over a unit as floats, each exact: of column `i / 2` and row `lane % 4 * 2 + i % 2`.
template <int DTYPE>
DEVICE void multiply_unit(float (&sums)[4], const Unit<DTYPE> &unit, uint32_t b0, uint32_t b1,
                          const int (&base)[4]) {
  int whole[4];
  if (DTYPE == HAT_Q6_K) {
    int rest[4];
    multiply_bytes(whole, unit.a[0], unit.a[1], b0, base);
    multiply_bytes(rest, unit.a[2], unit.a[3], b1, base);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // sc0 sum0 below 2^23, and with sc1 sum1 below 2^24: nothing is rounded.
      const float first = fmaf(__uint_as_float(whole[i]), unit.low[i / 2], unit.base[i / 2]);
      const float second = fmaf(__uint_as_float(rest[i]), 0.25f, -0.25f * SUM_BASE_FLOAT);
      sums[i] = fmaf(second, unit.high[i / 2], first);
    }
    return;
  }
  multiply_bytes(whole, unit.a, b0, b1, base);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float sum = __uint_as_float(whole[i]);
    sums[i] = DTYPE == HAT_Q4_0 ? fmaf(sum, 0.0625f, -0.0625f * SUM_BASE_FLOAT) : sum - SUM_BASE_FLOAT;
  }
}
