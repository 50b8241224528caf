// Products of int8 activations and quantised weights on tensor cores, for gemv.cu (few rows) and
// linear.cu (many). Both make the same terms and add them in one order, so they give the same bits:
// those of docs/ARITHMETIC.md, id 1. B of an mma is 8 rows of activations; A is a unit (panel.cuh).
#pragma once
#include "panel.cuh"

/// Bytes of a panel of so many units.
template <class FORMAT> DEVICE size_t panel_bytes(uint32_t units) {
  return (size_t)(units / FORMAT::UNITS) * FORMAT::BLOCK_BYTES;
}
/// Byte `at` of a unit of a panel, in the order in which it is staged.
template <class FORMAT> DEVICE const uint8_t *unit_byte(const uint8_t *panel, uint32_t unit, uint32_t at) {
  const uint8_t *block = panel + (size_t)(unit / FORMAT::UNITS) * FORMAT::BLOCK_BYTES;
  if (FORMAT::HEAD != 0 && at >= FORMAT::UNIT_BYTES) return block + (at - FORMAT::UNIT_BYTES);
  return block + FORMAT::HEAD + unit % FORMAT::UNITS * FORMAT::UNIT_BYTES + at;
}
/// Where 16 bytes `chunk` of a unit are staged: words 2, 3, 6, 7 with their halves swapped, so that
/// half a warp reads words 0..4 of 8 columns from all banks.
template <class FORMAT> DEVICE uint32_t staged_chunk(uint32_t chunk) {
  return chunk < FORMAT::WORDS * 4 ? chunk ^ chunk / 8 % 2 * 2 : chunk;
}
