// angles[r] = [cos.., sin..] of positions[r] * inv_freq[i], the product rounded to f32.
// positions [rows], inv_freq f32 [half], angles f32 [rows][2 half].
// Bytes: 8 rows half, and 4 (rows + half) read.
// Launch: grid ceil(rows half / 256), block 256: one angle a thread. In f64, step by step as
// docs/ARITHMETIC.md says: no function of a library, the same bits everywhere.
#include "abi.h"
#include "dev.cuh"

KERNEL(256) rope_angles(const hat_rope_angles p) {
  const uint32_t at = blockIdx.x * 256 + threadIdx.x;
  if (at >= p.rows * p.half) return;
  const uint32_t row = at / p.half, i = at % p.half;
  const double ROUND = 6755399441055744.0; // 1.5 * 2^52
  const double x = (double)((float)p.positions[row] * p.inv_freq[i]);
  // Quarter turns, and what is left: pi/2 in two parts.
  const double shifted = fma(x, 0.63661977236758134308, ROUND), turns = shifted - ROUND;
  const double r = fma(turns, -6.123233995736766e-17, fma(turns, -1.57079632679489661923, x)), r2 = r * r;
  const double SIN[8] = {-1.0 / 1307674368000.0, 1.0 / 6227020800.0, -1.0 / 39916800.0, 1.0 / 362880.0,
                         -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0, 1.0};
  const double COS[9] = {1.0 / 20922789888000.0, -1.0 / 87178291200.0, 1.0 / 479001600.0, -1.0 / 3628800.0,
                         1.0 / 40320.0, -1.0 / 720.0, 1.0 / 24.0, -0.5, 1.0};
  double sine = SIN[0], cosine = COS[0];
#pragma unroll
  for (int n = 1; n < 8; ++n) sine = fma(sine, r2, SIN[n]);
#pragma unroll
  for (int n = 1; n < 9; ++n) cosine = fma(cosine, r2, COS[n]);
  const float s = (float)(sine * r), c = (float)cosine;
  const int quarter = (int)(__double_as_longlong(shifted) & 3);
  float *angles = p.angles + (size_t)row * 2 * p.half + i;
  angles[0] = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
  angles[p.half] = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
}
