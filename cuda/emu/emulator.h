// CUDA C++ as host C++: the words, the built-ins and the operations of dev.cuh, on the CPU.
//
// mma and ldmatrix work on fragments as the PTX ISA lays them out over the lanes; the bytes of a
// cp.async arrive when its group is waited for and are NaN before. What this can't show: races in
// the memory model, the rounding inside a tensor core, limits and speed of a GPU (docs/KERNELS.md).
#pragma once
#include "fiber.h"
#include <algorithm>
#include <cmath>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define DEVICE static inline
#define MEMBER static inline
#define KERNEL(threads) static void
#define KERNEL_TOGETHER(threads, blocks) static void
// One section, so that it can be poisoned before each block. Not inside a template.
#define __shared__ static __attribute__((section("hat_emu_shared")))
extern "C" char __start_hat_emu_shared[] __attribute__((visibility("hidden")));
extern "C" char __stop_hat_emu_shared[] __attribute__((visibility("hidden")));

#define threadIdx (emulator::Dim{emulator::machine.current->thread, 0, 0})
#define blockIdx (emulator::machine.block_index)
#define blockDim (emulator::machine.block)
#define gridDim (emulator::machine.grid)

// ---- Built-in types and functions --------------------------------------------------------------

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
using std::max;
using std::min;

static inline uint32_t __float_as_uint(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float __uint_as_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
static inline int64_t __double_as_longlong(double x) { int64_t i; memcpy(&i, &x, 8); return i; }
static inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
static inline int __popc(uint32_t x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
/// Sum of the products of four signed bytes, and `sum`.
static inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += (int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i);
  return sum;
}

static inline void __syncthreads() {
  emulator::machine.current->state = emulator::State::AtBarrier;
  emulator::give_way();
}
static inline void nothing(emulator::Meeting &) {}
static inline void all_lanes(uint32_t mask) {
  if (mask != 0xffffffffu) emulator::fail("the emulator knows whole warps only");
}
static inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  all_lanes(mask);
  emulator::meet("__syncwarp", &mask, 4, nothing);
}
template <class T> static inline T shuffle(const char *name, T value, uint32_t from) {
  static_assert(sizeof(T) <= 8, "at most 8 bytes a lane");
  T result;
  memcpy(&result, emulator::meet(name, &value, sizeof value, nothing).brought[from % 32], sizeof result);
  return result;
}
template <class T> static inline T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  all_lanes(mask);
  return shuffle("__shfl_xor_sync", value, emulator::machine.current->thread % 32 ^ (uint32_t)lanes);
}
template <class T> static inline T __shfl_sync(uint32_t mask, T value, int lane) {
  all_lanes(mask);
  return shuffle("__shfl_sync", value, (uint32_t)lane);
}
static inline uint32_t __ballot_sync(uint32_t mask, bool vote) {
  all_lanes(mask);
  const uint32_t word = vote;
  const emulator::Meeting &meeting = emulator::meet("__ballot_sync", &word, 4, nothing);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= meeting.brought[lane][0] << lane;
  return votes;
}
static inline int __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
static inline int __all_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }

// ---- What dev.cuh writes in PTX ----------------------------------------------------------------

/// IEEE binary16 to binary32, exact.
static inline float from_half(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, rest = half & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | rest << 13);
  const float magnitude = exponent == 0 ? ldexpf((float)rest, -24)
                                        : ldexpf((float)(1024 + rest), (int)exponent - 25);
  return __uint_as_float(__float_as_uint(magnitude) | sign);
}
/// binary32 to binary16, to nearest, ties to even.
static inline uint16_t to_half(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (magnitude < 0x38800000) { // below 2^-14: whole multiples of 2^-24
    return (uint16_t)(sign | (uint32_t)nearbyintf(ldexpf(__uint_as_float(magnitude), 24)));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return (uint16_t)(sign | (rounded - 0x38000000) >> 13);
}
static inline uint32_t pack_half(float low, float high) { return to_half(low) | (uint32_t)to_half(high) << 16; }
/// binary32 to bf16, to nearest, ties to even.
static inline uint16_t to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline uint32_t pack_bf16(float low, float high) { return to_bf16(low) | (uint32_t)to_bf16(high) << 16; }
static inline float exp2_fast(float x) { return exp2f(x); }

/// Counts the lanes of each group of eight whose 16 bytes stand in banks that another one reads.
static inline void count_conflicts(emulator::Meeting &meeting) {
  ++emulator::machine.counts.ldmatrix;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t seen = 0;
    for (int row = 0; row < 8; ++row) {
      const uint32_t bit = 1u << (meeting.brought[matrix * 8 + row][0] >> 4 & 7);
      emulator::machine.counts.bank_conflicts += (seen & bit) != 0;
      seen |= bit;
    }
  }
}
static inline const uint16_t *matrix_row(const emulator::Meeting &meeting, int row) {
  const uint16_t *at;
  memcpy(&at, meeting.brought[row], sizeof at);
  return at;
}
static inline const emulator::Meeting &meet_matrices(const void *row) {
  if ((uintptr_t)row % 16) emulator::fail("ldmatrix: a row that is not 16-byte aligned");
  return emulator::meet("ldmatrix", &row, sizeof row, count_conflicts);
}
/// Four 8x8 matrices of 16-bit numbers; lane `8 m + i` names row `i` of matrix `m`.
static inline void load_matrices(uint32_t (&to)[4], const void *row) {
  const emulator::Meeting &meeting = meet_matrices(row);
  const int lane = emulator::machine.current->thread % 32;
  for (int m = 0; m < 4; ++m) {
    const uint16_t *pair = matrix_row(meeting, m * 8 + lane / 4) + lane % 4 * 2;
    to[m] = pair[0] | (uint32_t)pair[1] << 16;
  }
}
/// The same, each matrix transposed.
static inline void load_matrices_transposed(uint32_t (&to)[4], const void *row) {
  const emulator::Meeting &meeting = meet_matrices(row);
  const int lane = emulator::machine.current->thread % 32;
  for (int m = 0; m < 4; ++m) {
    const int column = lane / 4, first = m * 8 + lane % 4 * 2;
    to[m] = matrix_row(meeting, first)[column] | (uint32_t)matrix_row(meeting, first + 1)[column] << 16;
  }
}
static inline float half_of(uint32_t word, int index) { return from_half((uint16_t)(word >> 16 * index)); }
static inline float bf16_of(uint32_t word, int index) { return __uint_as_float(word >> 16 * index << 16); }
template <float (&NUMBER)(uint32_t, int)> static inline void multiply_fragments(emulator::Meeting &meeting) {
  ++emulator::machine.counts.mma;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t *word = meeting.brought[lane];
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][pair + i + r / 2 * 8] = NUMBER(word[r], i);
      for (int r = 0; r < 2; ++r) b[pair + i + r * 8][group] = NUMBER(word[4 + r], i);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      meeting.product[row][column] = sum;
    }
  }
}
static inline void add_product(float (&sum)[4], const emulator::Meeting &meeting) {
  const int lane = emulator::machine.current->thread % 32, row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) sum[i] += meeting.product[row + i / 2 * 8][column + i % 2];
}
/// `sum += a b`, m16n8k16, f16 with f32 sums.
static inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  add_product(sum, emulator::meet("mma", words, sizeof words, multiply_fragments<half_of>));
}
/// The same of bf16.
static inline void multiply_add_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  add_product(sum, emulator::meet("mma of bf16", words, sizeof words, multiply_fragments<bf16_of>));
}

/// Byte `index` of a word.
static inline int byte_of(uint32_t word, int index) { return (int8_t)(word >> 8 * index); }
/// A and B of K = 16 `HALVES`, as m16n8k32 and m16n8k16 of bytes lay them out.
template <int HALVES> static inline void multiply_byte_fragments(emulator::Meeting &meeting) {
  ++emulator::machine.counts.mma;
  int a[16][32], b[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t *word = meeting.brought[lane];
    const int group = lane / 4, first = lane % 4 * 4;
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < 2 * HALVES; ++r) a[group + r % 2 * 8][first + i + r / 2 * 16] = byte_of(word[r], i);
      for (int r = 0; r < HALVES; ++r) b[first + i + r * 16][group] = byte_of(word[2 * HALVES + r], i);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      int32_t sum = 0;
      for (int k = 0; k < 16 * HALVES; ++k) sum += a[row][k] * b[k][column];
      meeting.whole[row][column] = sum;
    }
  }
}
static inline void take_whole(int (&sum)[4], const emulator::Meeting &meeting, const int (&base)[4]) {
  const int lane = emulator::machine.current->thread % 32, row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) sum[i] = base[i] + meeting.whole[row + i / 2 * 8][column + i % 2];
}
/// `a b + base` of signed bytes, m16n8k32.
static inline void multiply_bytes(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  const int (&base)[4]) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  take_whole(sum, emulator::meet("mma of bytes", words, sizeof words, multiply_byte_fragments<2>), base);
}
/// The same, m16n8k16.
static inline void multiply_bytes(int (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b, const int (&base)[4]) {
  const uint32_t words[3] = {a0, a1, b};
  take_whole(sum, emulator::meet("mma of 16 bytes", words, sizeof words, multiply_byte_fragments<1>), base);
}

template <class T> static inline T load_streamed(const T *from) {
  if ((uintptr_t)from % sizeof(T)) emulator::fail("a load that is not aligned");
  return *from;
}
/// Counts the words beyond the first of each bank: of a warp for 4 bytes a lane, of half a warp
/// for 8, of a quarter for 16.
static inline void count_bank_conflicts(const emulator::SharedAccess &access) {
  const uint32_t words = access.bytes / 4, lanes = 32 / words;
  for (uint32_t first = 0; first < 32; first += lanes) {
    uintptr_t seen[32][32];
    uint32_t counts[32] = {}, most = 1;
    for (uint32_t i = 0; i < 32; ++i) {
      const uintptr_t word = access.at[first + i / words] / 4 + i % words;
      uintptr_t *bank = seen[word % 32];
      uint32_t &count = counts[word % 32];
      if (std::find(bank, bank + count, word) == bank + count) bank[count++] = word;
      most = std::max(most, count);
    }
    emulator::machine.counts.bank_conflicts += most - 1;
  }
}
/// Notes a lane's part of an access; the last lane counts.
static inline void note_shared(const void *at, uint32_t bytes) {
  if ((uintptr_t)at % bytes) emulator::fail("an access that is not aligned");
  emulator::Fiber &fiber = *emulator::machine.current;
  emulator::Warp &warp = emulator::machine.warps[fiber.thread / 32];
  const size_t index = fiber.shared_accesses++ - warp.accesses_done;
  while (warp.accesses.size() <= index) warp.accesses.push_back({});
  emulator::SharedAccess &access = warp.accesses[index];
  if (access.lanes && access.bytes != bytes) emulator::fail("lanes of a warp in different accesses");
  access.bytes = bytes;
  access.at[fiber.thread % 32] = (uintptr_t)at;
  access.lanes |= 1u << fiber.thread % 32;
  if (access.lanes != 0xffffffffu) return;
  count_bank_conflicts(access);
  // Lanes go through accesses in one order, so the first is the first that all have done.
  warp.accesses.erase(warp.accesses.begin());
  ++warp.accesses_done;
}
template <class T> static inline T load_shared(const T *from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "whole words");
  note_shared(from, sizeof(T));
  return *from;
}
template <class T> static inline void store_shared(T *to, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "whole words");
  note_shared(to, sizeof(T));
  *to = value;
}

static inline void compiler_barrier() {}
static inline uint32_t kept(uint32_t x) { return x; }

/// `bytes` of global memory to shared memory, or zeros.
static inline void copy_async_bytes(void *to, const void *from, bool real, uint32_t bytes) {
  if ((uintptr_t)to % bytes || (uintptr_t)from % bytes) emulator::fail("cp.async: not aligned");
  ++emulator::machine.counts.async_copies;
  memset(to, 0xff, bytes);
  emulator::machine.current->open.push_back({to, real ? from : nullptr, bytes});
}
static inline void copy_async(void *to, const void *from, bool real) { copy_async_bytes(to, from, real, 16); }
static inline void copy_async_word(void *to, const void *from, bool real) { copy_async_bytes(to, from, real, 4); }
static inline void copy_async_commit() {
  emulator::Fiber &fiber = *emulator::machine.current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
/// Until at most `PENDING` of this thread's groups are under way.
template <int PENDING> static inline void copy_async_wait() {
  auto &groups = emulator::machine.current->groups;
  while (groups.size() > (size_t)PENDING) {
    for (const emulator::AsyncCopy &copy : groups.front()) {
      if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
      else memset(copy.to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}
