// All kernels as one library: hat_emu_launch runs one of them on the CPU.
#include "emulator.h"

#include "attend_prefill.cu"
#include "attend_verify.cu"
#include "compact.cu"
#include "embed.cu"
#include "fragments.cu"
#include "gemv.cu"
#include "linear.cu"
#include "linear_float.cu"
#include "peak.cu"
#include "quantise_rows.cu"
#include "rms_norm.cu"
#include "rope_angles.cu"
#include "rope_append.cu"
#include "silu_mul.cu"
#include "top_k.cu"

namespace {

template <class Params> void enter(void (*kernel)(Params), const void *params) {
  kernel(*(const Params *)params);
}
template <class Params> constexpr size_t params_bytes(void (*)(Params)) { return sizeof(Params); }

struct Entry {
  const char *name;
  size_t params_bytes;
  void (*body)(const void *);
};

#define ENTRY(kernel) {#kernel, params_bytes(kernel), [](const void *p) { enter(kernel, p); }}
const Entry ENTRIES[] = {
    ENTRY(attend_merge_128),
    ENTRY(attend_merge_32),
    ENTRY(attend_merge_64),
    ENTRY(attend_merge_96),
    ENTRY(attend_prefill_128),
    ENTRY(attend_prefill_32),
    ENTRY(attend_prefill_64),
    ENTRY(attend_prefill_96),
    ENTRY(attend_verify_128),
    ENTRY(attend_verify_32),
    ENTRY(attend_verify_64),
    ENTRY(attend_verify_96),
    ENTRY(compact),
    ENTRY(embed),
    ENTRY(fragment_copy),
    ENTRY(fragment_copy_words),
    ENTRY(fragment_load),
    ENTRY(fragment_load_transposed),
    ENTRY(fragment_multiply),
    ENTRY(fragment_multiply_bytes),
    ENTRY(fragment_multiply_bytes_16),
    ENTRY(fragment_multiply_bf16),
    ENTRY(gemv_q4_0_16),
    ENTRY(gemv_q4_0_8),
    ENTRY(gemv_q4_1_16),
    ENTRY(gemv_q4_1_8),
    ENTRY(gemv_q6_k_16),
    ENTRY(gemv_q6_k_8),
    ENTRY(gemv_q8_0_16),
    ENTRY(gemv_q8_0_8),
    ENTRY(linear_bf16),
    ENTRY(linear_f16),
    ENTRY(linear_q4_0),
    ENTRY(linear_q4_1),
    ENTRY(linear_q6_k),
    ENTRY(linear_q8_0),
    ENTRY(peak_copy),
    ENTRY(peak_multiply),
    ENTRY(peak_multiply_bytes),
    ENTRY(quantise_q8),
    ENTRY(rms_norm),
    ENTRY(rope_angles),
    ENTRY(rope_append),
    ENTRY(round_bf16),
    ENTRY(round_f16),
    ENTRY(silu_mul),
    ENTRY(top_k_merge),
    ENTRY(top_k_slices),
};

} // namespace

/// A launch; the same struct stands in cuda/src/emulator.rs.
struct hat_emu_launch_t {
  const char *kernel;
  const void *params;
  uint64_t params_bytes;
  uint32_t grid[3];
  uint32_t threads;
  uint32_t schedule;
};

#define EXPORT extern "C" __attribute__((visibility("default")))

/// Name of kernel `index`, and the size of its parameter block; null beyond the last.
EXPORT const char *hat_emu_kernel(uint32_t index, uint64_t *bytes) {
  if (index >= sizeof ENTRIES / sizeof *ENTRIES) return nullptr;
  *bytes = ENTRIES[index].params_bytes;
  return ENTRIES[index].name;
}

/// Runs a launch to its end. Null if it went well, else what went wrong; the text lives until the
/// next launch. One launch at a time in a process.
EXPORT const char *hat_emu_launch(const hat_emu_launch_t *launch, uint64_t counts[6]) {
  using emulator::machine;
  machine.failure[0] = 0;
  machine.counts = {};
  const Entry *entry = nullptr;
  for (const Entry &known : ENTRIES) {
    if (strcmp(known.name, launch->kernel) == 0) entry = &known;
  }
  if (!entry) return "no such kernel";
  if (entry->params_bytes != launch->params_bytes) return "another parameter block";
  const uint32_t *grid = launch->grid, threads = launch->threads;
  if (threads == 0 || threads % 32 || threads > emulator::THREADS_MAX) return "threads of a block";
  if (grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535) return "a grid that is too large";
  if (!grid[0] || !grid[1] || !grid[2]) return "an empty grid";

  machine.body = entry->body;
  machine.params = launch->params;
  machine.grid = {grid[0], grid[1], grid[2]};
  machine.block = {threads, 1, 1};
  const uint64_t total = (uint64_t)grid[0] * grid[1] * grid[2];
  std::vector<uint32_t> blocks(total);
  for (uint64_t i = 0; i < total; ++i) blocks[i] = (uint32_t)i;
  emulator::Random random{launch->schedule * 0x9e3779b97f4a7c15ull};
  if (launch->schedule == (uint32_t)emulator::Schedule::WarpsBehind) std::reverse(blocks.begin(), blocks.end());
  if (launch->schedule >= (uint32_t)emulator::Schedule::Shuffled) random.shuffle(blocks);
  for (uint32_t block : blocks) {
    machine.block_index = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
    // NaN in every number that a kernel reads before it writes it.
    memset(__start_hat_emu_shared, 0xff, (size_t)(__stop_hat_emu_shared - __start_hat_emu_shared));
    if (!emulator::run_block(threads, launch->schedule, random)) break;
  }
  memcpy(counts, &machine.counts, sizeof machine.counts);
  return machine.failure[0] ? machine.failure : nullptr;
}
