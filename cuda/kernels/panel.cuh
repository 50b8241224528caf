// Weights in panels of 16 columns, as the loader writes them: the same block of K of 16 columns
// stands together. Of a block type, a *word* is 4 consecutive bytes of one column; then the 16
// scales follow, and for q4_1 the 16 minima. Low nibbles are weights 0..16, high ones 16..32.
// A block of q6_k is 16 scales and 8 units of 32 weights: nibbles as in q4_0; words of high bits of
// weights 0..16 and 16..32 of each column, two bits a weight; 16 scales of each of these halves.
//
// All that depends on a block type is one struct: a new type is a struct, its kernels' rows in gemv.cu
// and linear.cu, and a case in embed.cu. Products take a *unit*, 32 weights of the 16 columns, as A of
// an mma: its row g is column 2 g, its row g + 8 column 2 g + 1, so that a thread finds its two columns
// side by side. The sums of whole numbers are exact; they begin at SUM_BASE, whose bits are those of
// the float 1.5 * 2^23. A sum below 2^22 in magnitude then is a float after one subtraction.
#pragma once
#include "abi.h"
#include "dev.cuh"

#define SUM_BASE 0x4b400000
#define SUM_BASE_FLOAT 12582912.0f

/// Word `j` of a column.
DEVICE uint32_t panel_word(const uint8_t *words, int j, int column) {
  return *(const uint32_t *)(words + (j * 2 + column / 8) * 32 + column % 8 * 4);
}
/// f16 number of a column.
DEVICE float panel_half(const uint8_t *halves, int column) {
  return from_half(*(const uint16_t *)(halves + column * 2));
}
/// Nibble `i` of 32 of a column.
DEVICE int panel_nibble(const uint8_t *words, int column, int i) {
  return panel_word(words, i % 16 / 4, column) >> (i % 4 * 8 + i / 16 * 4) & 15;
}

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

/// A thread's part of a unit as it stands in memory, of two columns.
struct Packed {
  /// Words `lane % 4` (and + 4); for q6_k, then the high bits of both halves.
  uint2 words[3];
  /// Two f16.
  uint32_t scales;
  /// q4_1: two f16 minima. q6_k: the scales of weights 0..16 of two columns, then of 16..32.
  uint32_t more;
};
/// The same, ready to be multiplied.
struct Unit {
  /// A of the mma: the weights times TIMES.
  uint32_t a[4];
  /// Of two columns, as the next.
  float scale[2];
  /// Of types with minima.
  float minimum[2];
  /// q6_k: a quarter of the scale of weights 0..16, what that makes of SUM_BASE, the scale of 16..32.
  float low[2], base[2], high[2];
};
DEVICE Unit unpack_scales(const Packed &packed) {
  Unit unit = {};
  unit.scale[0] = from_half((uint16_t)packed.scales);
  unit.scale[1] = from_half((uint16_t)(packed.scales >> 16));
  return unit;
}

/// A type whose blocks are a unit each.
template <int WORDS_OF_UNIT, bool HAS_MINIMA, int TIMES> struct OneUnit {
  enum : bool { MINIMA = HAS_MINIMA };
  // Numbers of an enum: as members they would be in each compiled file.
  enum : int {
    /// Words of numbers of one column of a unit.
    WORDS = WORDS_OF_UNIT,
    /// Units of a block, and the bytes before the first.
    UNITS = 1,
    HEAD = 0,
    UNIT_BYTES = HAT_PANEL * (WORDS * 4 + (HAS_MINIMA ? 4 : 2)),
    BLOCK_BYTES = UNIT_BYTES,
    /// Bytes of a unit where it is staged, and where its scales are there: a block's head is behind it.
    STAGED_BYTES = UNIT_BYTES,
    STAGED_SCALES = WORDS * 64
  };

  template <bool STAGED> MEMBER Packed read(const uint8_t *unit, const uint8_t *scales, const UnitPlaces &places) {
    Packed packed = {};
    packed.words[0] = load_weights<STAGED, uint2>(unit + places.words);
    if (WORDS == 8) packed.words[1] = load_weights<STAGED, uint2>(unit + places.words + 4 * HAT_PANEL * 4);
    packed.scales = load_weights<STAGED, uint32_t>(scales + places.scales);
    if (MINIMA) packed.more = load_weights<STAGED, uint32_t>(scales + HAT_PANEL * 2 + places.scales);
    return packed;
  }
  /// The sums over a unit as floats, each exact: of column `i / 2` and row `lane % 4 * 2 + i % 2`.
  MEMBER void multiply(float (&sums)[4], const Unit &unit, uint32_t b0, uint32_t b1, const int (&base)[4]) {
    int whole[4];
    multiply_bytes(whole, unit.a, b0, b1, base);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float sum = __uint_as_float(whole[i]);
      sums[i] = TIMES == 1 ? sum - SUM_BASE_FLOAT : fmaf(sum, 1.0f / TIMES, -1.0f / TIMES * SUM_BASE_FLOAT);
    }
  }
};

/// `d q`, signed bytes.
struct Q8_0 : OneUnit<8, false, 1> {
  MEMBER Unit unpack(const Packed &packed) {
    Unit unit = unpack_scales(packed);
#pragma unroll
    for (int i = 0; i < 4; ++i) unit.a[i] = i % 2 ? packed.words[i / 2].y : packed.words[i / 2].x;
    return unit;
  }
  /// Weight `i` of a block of a column.
  MEMBER float weight(const uint8_t *block, int column, int i) {
    return panel_half(block + 8 * 64, column) * (float)(int8_t)(panel_word(block, i / 4, column) >> i % 4 * 8);
  }
};

/// `d (q - 8)`, nibbles.
struct Q4_0 : OneUnit<4, false, 16> {
  MEMBER Unit unpack(const Packed &packed) {
    const uint32_t words[2] = {packed.words[0].x, packed.words[0].y};
    Unit unit = unpack_scales(packed);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      unit.a[c] = (words[c] << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
      unit.a[c + 2] = (words[c] & 0xf0f0f0f0u) ^ 0x80808080u;
    }
    return unit;
  }
  MEMBER float weight(const uint8_t *block, int column, int i) {
    return panel_half(block + 4 * 64, column) * (float)(panel_nibble(block, column, i) - 8);
  }
};

/// `d q + m`, nibbles.
struct Q4_1 : OneUnit<4, true, 1> {
  MEMBER Unit unpack(const Packed &packed) {
    const uint32_t words[2] = {packed.words[0].x, packed.words[0].y};
    Unit unit = unpack_scales(packed);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      unit.a[c] = words[c] & 0x0f0f0f0fu;
      unit.a[c + 2] = words[c] >> 4 & 0x0f0f0f0fu;
      unit.minimum[c] = from_half((uint16_t)(packed.more >> 16 * c));
    }
    return unit;
  }
  MEMBER float weight(const uint8_t *block, int column, int i) {
    const float minimum = panel_half(block + 4 * 64 + 32, column);
    return panel_half(block + 4 * 64, column) * (float)panel_nibble(block, column, i) + minimum;
  }
};

/// `d sc (q - 32)`, nibbles and two high bits.
struct Q6K {
  enum : bool { MINIMA = false };
  enum : int {
    WORDS = 4,
    UNITS = 8,
    HEAD = HAT_PANEL * 2,
    UNIT_BYTES = HAT_PANEL * (16 + 8 + 2),
    BLOCK_BYTES = HEAD + UNITS * UNIT_BYTES,
    STAGED_BYTES = UNIT_BYTES + HEAD,
    STAGED_SCALES = UNIT_BYTES
  };

  template <bool STAGED> MEMBER Packed read(const uint8_t *unit, const uint8_t *scales, const UnitPlaces &places) {
    Packed packed = {};
    packed.words[0] = load_weights<STAGED, uint2>(unit + places.words);
    packed.scales = load_weights<STAGED, uint32_t>(scales + places.scales);
    packed.words[1] = load_weights<STAGED, uint2>(unit + places.high);
    packed.words[2] = load_weights<STAGED, uint2>(unit + places.high + HAT_PANEL * 4);
    const uint8_t *subscales = unit + places.subscales;
    packed.more = *(const uint16_t *)subscales | (uint32_t)*(const uint16_t *)(subscales + HAT_PANEL) << 16;
    return packed;
  }
  /// Nibbles of a word, at bits 2 to 6 of each byte, and their two high bits: 4 (w - 32) as a byte.
  MEMBER uint32_t join_bits(uint32_t nibbles, uint32_t high) {
    return (nibbles & 0x3c3c3c3cu) ^ 0x80808080u ^ (high & 0xc0c0c0c0u);
  }
  MEMBER Unit unpack(const Packed &packed) {
    const uint2 words = packed.words[0], low = packed.words[1], high = packed.words[2];
    Unit unit = unpack_scales(packed);
    // From bit 6 down to bit `2 word` of each byte.
    const uint32_t up = 6 - threadIdx.x % 4 * 2;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      unit.a[c] = join_bits((c ? words.y : words.x) << 2, (c ? low.y : low.x) << up);
      unit.a[c + 2] = join_bits((c ? words.y : words.x) >> 2, (c ? high.y : high.x) << up);
      unit.low[c] = (float)(int8_t)(packed.more >> 8 * c) * 0.25f;
      unit.base[c] = -SUM_BASE_FLOAT * unit.low[c];
      unit.high[c] = (float)(int8_t)(packed.more >> (16 + 8 * c));
    }
    return unit;
  }
  MEMBER void multiply(float (&sums)[4], const Unit &unit, uint32_t b0, uint32_t b1, const int (&base)[4]) {
    int whole[4], rest[4];
    multiply_bytes(whole, unit.a[0], unit.a[1], b0, base);
    multiply_bytes(rest, unit.a[2], unit.a[3], b1, base);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // sc0 sum0 below 2^23, and with sc1 sum1 below 2^24: nothing is rounded.
      const float first = fmaf(__uint_as_float(whole[i]), unit.low[i / 2], unit.base[i / 2]);
      const float second = fmaf(__uint_as_float(rest[i]), 0.25f, -0.25f * SUM_BASE_FLOAT);
      sums[i] = fmaf(second, unit.high[i / 2], first);
    }
  }
  MEMBER float weight(const uint8_t *block, int column, int i) {
    const uint8_t *unit = block + HEAD + i / HAT_BLOCK * UNIT_BYTES;
    const int half = i % HAT_BLOCK / 16, l = i % 16;
    const uint32_t low = panel_word(unit, l / 4, column) >> (l % 4 * 8 + half * 4) & 15;
    const uint32_t high = panel_word(unit + HAT_PANEL * 16, half, column) >> (l % 4 * 8 + l / 4 * 2) & 3;
    const int8_t scale = (int8_t)unit[HAT_PANEL * (24 + half) + column];
    return panel_half(block, column) * (float)scale * (float)((int)(low | high << 4) - 32);
  }
};
