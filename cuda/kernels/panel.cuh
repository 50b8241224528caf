// Weights in panels of 16 columns, as the loader writes them: the same block of K of 16 columns
// stands together. Of a block type, a *word* is 4 consecutive bytes of one column; then the 16
// scales follow, and for q4_1 the 16 minima. Low nibbles are weights 0..16, high ones 16..32.
// A block of q6_k is 16 scales and 8 units of 32 weights: nibbles as in q4_0; words of high bits of
// weights 0..16 and 16..32 of each column, two bits a weight; 16 scales of each of these halves.
#pragma once
#include "abi.h"
#include "dev.cuh"

/// Words of quantised numbers of one column of a block.
template <int DTYPE> constexpr int BLOCK_WORDS = DTYPE == HAT_Q8_0 ? 8 : 4;
/// Bytes of one block of 16 columns.
template <int DTYPE>
constexpr int PANEL_BLOCK_BYTES = HAT_PANEL * (BLOCK_WORDS<DTYPE> * 4 + (DTYPE == HAT_Q4_1 ? 4 : 2));
/// Bytes of a unit of q6_k, and of a block of them.
#define Q6_K_UNIT_BYTES (HAT_PANEL * (16 + 8 + 2))
#define Q6_K_BYTES (HAT_PANEL * 2 + 8 * Q6_K_UNIT_BYTES)

/// Word `j` of a column.
DEVICE uint32_t panel_word(const uint8_t *block, int j, int column) {
  return *(const uint32_t *)(block + (j * 2 + column / 8) * 32 + column % 8 * 4);
}
/// The scale of a column.
template <int DTYPE> DEVICE float panel_scale(const uint8_t *block, int column) {
  return from_half(*(const uint16_t *)(block + BLOCK_WORDS<DTYPE> * 64 + column * 2));
}
/// The minimum of a column; q4_1 alone.
DEVICE float panel_minimum(const uint8_t *block, int column) {
  return from_half(*(const uint16_t *)(block + 4 * 64 + 32 + column * 2));
}

/// Weight `i` of 32 of a column: `d q`, `d (q - 8)` or `d q + m`.
template <int DTYPE> DEVICE float panel_weight(const uint8_t *block, int column, int i) {
  const float d = panel_scale<DTYPE>(block, column);
  if (DTYPE == HAT_Q8_0) {
    return d * (float)(int8_t)(panel_word(block, i / 4, column) >> i % 4 * 8);
  }
  const int q = panel_word(block, i % 16 / 4, column) >> (i % 4 * 8 + i / 16 * 4) & 15;
  if (DTYPE == HAT_Q4_0) return d * (float)(q - 8);
  return d * (float)q + panel_minimum(block, column);
}

/// Weight `i` of 256 of a column of q6_k: `d sc (q - 32)`.
DEVICE float q6_k_weight(const uint8_t *block, int column, int i) {
  const uint8_t *unit = block + HAT_PANEL * 2 + i / HAT_BLOCK * Q6_K_UNIT_BYTES;
  const int half = i % HAT_BLOCK / 16, l = i % 16;
  const uint32_t low = panel_word(unit, l / 4, column) >> (l % 4 * 8 + half * 4) & 15;
  const uint32_t high = panel_word(unit + HAT_PANEL * 16, half, column) >> (l % 4 * 8 + l / 4 * 2) & 3;
  const int8_t scale = (int8_t)unit[HAT_PANEL * (24 + half) + column];
  const float d = from_half(*(const uint16_t *)(block + column * 2));
  return d * (float)scale * (float)((int)(low | high << 4) - 32);
}
