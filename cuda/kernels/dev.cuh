// What kernels use beyond C++: the only place with PTX. On the CPU the emulator supplies the same
// names (cuda/emu/emulator.h), so a kernel file has no line for either.
//
// All files are compiled without contraction of `a * b + c`; a fused one is written `fmaf`.
#pragma once

#ifdef HAT_EMULATOR
#include "emulator.h"
#else
#define DEVICE __device__ __forceinline__
/// A function of a struct, without an object.
#define MEMBER static __device__ __forceinline__

/// A kernel of `threads` threads a block, entered from Rust by its name.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
/// The same, with registers for so many blocks at a time on one multiprocessor.
#define KERNEL_TOGETHER(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

/// f16 to f32, exact.
DEVICE float from_half(uint16_t half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}
/// f32 to f16, to nearest, ties to even.
DEVICE uint16_t to_half(float x) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
}
/// Two of them in a word, `low` in the low half.
DEVICE uint32_t pack_half(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
/// Two bf16 in a word, to nearest, ties to even.
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
/// 2^x to about 2 units in the last place; exact for 0 and minus infinity.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The same number; the compiler keeps it and does not compute it anew where it is used.
DEVICE uint32_t kept(uint32_t x) {
  uint32_t y;
  asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
/// Memory is not touched across this line by the compiler.
DEVICE void compiler_barrier() { asm volatile("" ::: "memory"); }

DEVICE uint32_t shared_address(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }

/// Four 8x8 matrices of 16-bit numbers; lane `8 m + i` names row `i` of matrix `m`.
DEVICE void load_matrices(uint32_t (&to)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
/// The same, each matrix transposed.
DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
/// `sum += a b`, m16n8k16, f16 with f32 sums.
DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// The same of bf16.
DEVICE void multiply_add_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// `a b + base` of signed bytes, m16n8k32, exact.
DEVICE void multiply_bytes(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           const int (&base)[4]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
               : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(base[0]),
                 "r"(base[1]), "r"(base[2]), "r"(base[3]));
}
/// The same of half as many, m16n8k16.
DEVICE void multiply_bytes(int (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, const int (&base)[4]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
               "{%4, %5}, {%6}, {%7, %8, %9, %10};"
               : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
               : "r"(a0), "r"(a1), "r"(b), "r"(base[0]), "r"(base[1]), "r"(base[2]), "r"(base[3]));
}

/// A word, or two, of global memory that nothing writes, past the L1.
DEVICE uint32_t load_streamed(const uint32_t *from) {
  uint32_t word;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(from));
  return word;
}
DEVICE uint2 load_streamed(const uint2 *from) {
  uint2 words;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from));
  return words;
}
/// Loads and stores of shared memory whose conflicts of banks the emulator counts.
template <class T> DEVICE T load_shared(const T *from) { return *from; }
template <class T> DEVICE void store_shared(T *to, T value) { *to = value; }

/// 16 bytes of global memory to shared memory, or zeros; there after a wait and a barrier.
DEVICE void copy_async(void *to, const void *from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(real ? 16 : 0)
               : "memory");
}
/// The same of 4 bytes.
DEVICE void copy_async_word(void *to, const void *from, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(real ? 4 : 0)
               : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until at most `PENDING` of this thread's groups are under way.
template <int PENDING> DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif

/// Lanes of a warp.
#define WARP 32
#define ALL_LANES 0xffffffffu

/// Smaller than every finite number.
#define MINUS_INFINITY __uint_as_float(0xff800000u)

DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

/// The sum over a warp, in every lane; the order is fixed.
template <class T> DEVICE T warp_sum(T x) {
#pragma unroll
  for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
  return x;
}
