// What kernels use beyond C++: the only place with PTX. On the CPU the emulator supplies the same
// names (cuda/emu/emulator.h), so a kernel file has no line for either.
//
// All files are compiled without contraction of `a * b + c`; a fused one is written `fmaf`.
#pragma once

#ifdef HAT_EMULATOR
#include "emulator.h"
#else
#define DEVICE __device__ __forceinline__

/// A kernel of `threads` threads a block, entered from Rust by its name.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

#endif

/// Lanes of a warp.
#define WARP 32
#define ALL_LANES 0xffffffffu

/// The sum over a warp, in every lane; the order is fixed.
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
  return x;
}

/// The sum over a block of `WARPS` warps, in every thread; the order is fixed. `partial` is shared
/// memory of `WARPS` numbers, free again after the next `__syncthreads`.
template <int WARPS> DEVICE float block_sum(float x, float *partial) {
  x = warp_sum(x);
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
  __syncthreads();
  float sum = partial[0];
#pragma unroll
  for (int warp = 1; warp < WARPS; ++warp) sum += partial[warp];
  return sum;
}
