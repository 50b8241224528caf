// Weights in panels of 16 columns, as the loader writes them: the same block of K of 16 columns
// stands together. Of a block type, a *word* is 4 consecutive bytes of one column; then the 16
// scales follow, and for q4_1 the 16 minima. Low nibbles are weights 0..16, high ones 16..32.
#pragma once
#include "abi.h"
#include "dev.cuh"

/// Words of quantised numbers of one column of a block.
template <int DTYPE> constexpr int BLOCK_WORDS = DTYPE == HAT_Q8_0 ? 8 : 4;
/// Bytes of one block of 16 columns.
template <int DTYPE>
constexpr int PANEL_BLOCK_BYTES = HAT_PANEL * (BLOCK_WORDS<DTYPE> * 4 + (DTYPE == HAT_Q4_1 ? 4 : 2));

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
