// What kernels and Rust agree on: the parameter block of each kernel and the constants.
//
// C11, CUDA C++ and NVRTC read it; `hat-kernels` makes cuda/src/abi.rs of it. Every kernel takes
// one block, by value. All blocks have explicit padding, so that size and offsets are the same in
// each language; all pointers are device addresses.
#ifndef HAT_ABI_H
#define HAT_ABI_H

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
#else
#include <stdint.h>
#endif

/// Rows of one KV page, and keys of one attention tile.
#define HAT_PAGE_SIZE 32

/// rms_norm: `x += add` (if there is one), then `out = x / sqrt(mean(x^2) + eps) * weight`.
typedef struct hat_rms_norm {
  /// f32 `[rows][columns]`; written only if `add` is not null.
  float *x;
  /// f32 `[rows][columns]`, or null.
  const float *add;
  /// f32 `[columns]`
  const float *weight;
  /// f32 `[rows][columns]`
  float *out;
  /// A multiple of 4.
  uint32_t columns;
  float eps;
} hat_rms_norm;

#endif
