// out[r] = table[tokens[r]], each number the exact value of the table rounded once.
// table [vocabulary][columns] in panels of any dtype, out f32 [rows][columns].
// Bytes: a row of the table and 4 columns for each row; a row's sectors hold its neighbours' too.
// Launch: grid (rows, ceil(columns / 256)), block 256: one number a thread.
#include "panel.cuh"

template <class FORMAT> DEVICE float block_number(const hat_embed &p, uint32_t token, uint32_t column) {
  constexpr uint32_t WEIGHTS = FORMAT::UNITS * HAT_BLOCK;
  const size_t block = (size_t)(token / HAT_PANEL) * (p.columns / WEIGHTS) + column / WEIGHTS;
  return FORMAT::weight(p.table + block * FORMAT::BLOCK_BYTES, token % HAT_PANEL, column % WEIGHTS);
}

KERNEL(256) embed(const hat_embed p) {
  const uint32_t column = blockIdx.y * 256 + threadIdx.x;
  if (column >= p.columns) return;
  const uint32_t token = p.tokens[blockIdx.x];
  // Types without blocks: 16 numbers of one k stand together.
  const size_t single = ((size_t)(token / HAT_PANEL) * p.columns + column) * HAT_PANEL + token % HAT_PANEL;
  float x;
  switch (p.dtype) {
  case HAT_F32: x = ((const float *)p.table)[single]; break;
  case HAT_F16: x = from_half(((const uint16_t *)p.table)[single]); break;
  case HAT_BF16: x = __uint_as_float((uint32_t)((const uint16_t *)p.table)[single] << 16); break;
  case HAT_Q8_0: x = block_number<Q8_0>(p, token, column); break;
  case HAT_Q4_0: x = block_number<Q4_0>(p, token, column); break;
  case HAT_Q6_K: x = block_number<Q6K>(p, token, column); break;
  default: x = block_number<Q4_1>(p, token, column); break;
  }
  p.out[(size_t)blockIdx.x * p.columns + column] = x;
}
