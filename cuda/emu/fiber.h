// One fiber for each thread of a block, and who runs next.
//
// Fibers give way only where threads wait for each other: at barriers and warp-wide operations.
// A block is done when all fibers are; if none can run before that, the block is deadlocked and
// the launch fails with a list of who waits where.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <vector>

namespace emulator {

// ---- Switching stacks -------------------------------------------------------------------------
// hat_emu_switch(&save, load): keeps the callee-saved registers on this stack, puts the stack
// pointer to *save and goes on where `load` stands.

extern "C" void hat_emu_switch(void **save, void *load) __attribute__((visibility("hidden")));

#if defined(__x86_64__)
constexpr size_t SAVED_BYTES = 6 * 8;
__asm__(".text\n.globl hat_emu_switch\n.hidden hat_emu_switch\n"
        ".type hat_emu_switch, @function\nhat_emu_switch:\n"
        "  push %rbx\n  push %rbp\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
        "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
        "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbp\n  pop %rbx\n  ret\n");

inline void *first_frame(char *top, void (*entry)()) {
  // As after a call: the return address at 8 modulo 16.
  void **at = (void **)(top - 16);
  *at = (void *)entry;
  memset((char *)at - SAVED_BYTES, 0, SAVED_BYTES);
  return (char *)at - SAVED_BYTES;
}
#elif defined(__aarch64__)
constexpr size_t SAVED_BYTES = 20 * 8;
__asm__(".text\n.globl hat_emu_switch\n.hidden hat_emu_switch\n"
        ".type hat_emu_switch, %function\nhat_emu_switch:\n"
        "  stp x29, x30, [sp, #-160]!\n  stp x19, x20, [sp, #16]\n  stp x21, x22, [sp, #32]\n"
        "  stp x23, x24, [sp, #48]\n  stp x25, x26, [sp, #64]\n  stp x27, x28, [sp, #80]\n"
        "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n"
        "  stp d14, d15, [sp, #144]\n  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
        "  ldp x19, x20, [sp, #16]\n  ldp x21, x22, [sp, #32]\n  ldp x23, x24, [sp, #48]\n"
        "  ldp x25, x26, [sp, #64]\n  ldp x27, x28, [sp, #80]\n  ldp d8, d9, [sp, #96]\n"
        "  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
        "  ldp x29, x30, [sp], #160\n  ret\n");

inline void *first_frame(char *top, void (*entry)()) {
  char *frame = top - SAVED_BYTES;
  memset(frame, 0, SAVED_BYTES);
  ((void **)frame)[1] = (void *)entry;
  return frame;
}
#else
#error "the emulator switches stacks on x86-64 and AArch64 only"
#endif

// ---- Threads, warps, a block -------------------------------------------------------------------

enum class State : uint8_t { Ready, AtBarrier, AtWarp, Done };

/// A cp.async that is under way: its bytes arrive when its group is waited for.
struct AsyncCopy {
  void *to;
  const void *from; // null: zeros
  uint32_t bytes;
};

struct Fiber {
  void *stack_pointer;
  State state;
  uint32_t thread; // in the block
  uint32_t warp_operations, shared_accesses;
  const char *waits_in;
  std::vector<AsyncCopy> open;
  std::vector<std::vector<AsyncCopy>> groups;
};

/// A warp-wide operation: what each lane brings, and what the last one makes of it. Two in turn,
/// so that a lane may still read the last one while another brings its part of the next.
struct Meeting {
  const char *operation;
  uint32_t arrived;
  alignas(16) uint32_t brought[32][8];
  float product[16][8]; // of mma
  int32_t whole[16][8]; // of mma of bytes
};

/// A load or a store of shared memory by a warp: its lanes need not come together.
struct SharedAccess {
  uint32_t lanes, bytes;
  uintptr_t at[32];
};

struct Warp {
  Meeting meetings[2];
  std::vector<SharedAccess> accesses; // from `accesses_done` on: those that not all lanes have done
  uint32_t accesses_done;
};

/// Counted over all blocks of a launch; in the order that Rust reads.
struct Counts {
  uint64_t blocks, switches, ldmatrix, mma, async_copies, bank_conflicts;
};

struct Dim {
  uint32_t x, y, z;
};

constexpr uint32_t THREADS_MAX = 1024;
constexpr size_t STACK_BYTES = 128 << 10, GUARD_BYTES = 16 << 10;

struct Machine {
  Fiber *current = nullptr;
  void *scheduler = nullptr; // its stack pointer while a fiber runs
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char *> stacks;
  Dim block_index{}, grid{}, block{};
  Counts counts{};
  void (*body)(const void *) = nullptr;
  const void *params = nullptr;
  char failure[1024] = {}; // empty: none
};

inline Machine machine;

// ---- Giving way --------------------------------------------------------------------------------

inline void give_way() {
  ++machine.counts.switches;
  hat_emu_switch(&machine.current->stack_pointer, machine.scheduler);
}

/// Ends the launch with a message. Does not return: the fiber is never run again.
[[noreturn]] inline void fail(const char *what) {
  if (!machine.failure[0]) {
    snprintf(machine.failure, sizeof machine.failure, "%s, block (%u, %u, %u), thread %u", what,
             machine.block_index.x, machine.block_index.y, machine.block_index.z,
             machine.current ? machine.current->thread : 0);
  }
  for (;;) give_way();
}

inline void enter_fiber() {
  machine.body(machine.params);
  machine.current->state = State::Done;
  for (;;) give_way();
}

inline char *stack(uint32_t thread) {
  while (machine.stacks.size() <= thread) {
    void *at = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    mprotect(at, GUARD_BYTES, PROT_NONE);
    machine.stacks.push_back((char *)at);
  }
  return machine.stacks[thread] + STACK_BYTES;
}

// ---- Who runs next -----------------------------------------------------------------------------

/// The orders in which a block's threads may run. A kernel whose result depends on it is wrong.
enum class Schedule : uint32_t {
  InOrder = 0,      // all threads in turn
  WarpsAhead = 1,   // the first warp runs as far as barriers allow, then the next
  WarpsBehind = 2,  // the same from the last warp
  Shuffled = 3,     // threads, warps and blocks in random order; also all greater numbers, as seeds
};

struct Random {
  uint64_t state;
  uint32_t below(uint32_t limit) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)((state >> 33) % limit);
  }
  void shuffle(std::vector<uint32_t> &list) {
    for (uint32_t i = (uint32_t)list.size(); i > 1; --i) std::swap(list[i - 1], list[below(i)]);
  }
};

inline void deadlock() {
  uint32_t at_barrier = 0, in_warp = 0, done = 0, first = THREADS_MAX;
  const char *where = "";
  for (const Fiber &fiber : machine.fibers) {
    at_barrier += fiber.state == State::AtBarrier;
    done += fiber.state == State::Done;
    if (fiber.state == State::AtWarp && in_warp++ == 0) {
      first = fiber.thread;
      where = fiber.waits_in;
    }
  }
  snprintf(machine.failure, sizeof machine.failure,
           "deadlock, block (%u, %u, %u): %u threads at __syncthreads, %u in warp-wide operations "
           "(thread %u in %s), %u done",
           machine.block_index.x, machine.block_index.y, machine.block_index.z, at_barrier, in_warp,
           first, where, done);
}

inline void run(uint32_t thread) {
  machine.current = &machine.fibers[thread];
  hat_emu_switch(&machine.scheduler, machine.current->stack_pointer);
  machine.current = nullptr;
}

/// Runs a block to its end; false if it failed.
inline bool run_block(uint32_t threads, uint32_t schedule, Random &random) {
  const uint32_t warps = threads / 32;
  machine.fibers.resize(threads);
  machine.warps.assign(warps, Warp{});
  std::vector<uint32_t> order(threads), warp_order(warps);
  for (uint32_t i = 0; i < threads; ++i) {
    char *top = stack(i);
    if (!top) return snprintf(machine.failure, sizeof machine.failure, "no memory for stacks"), false;
    machine.fibers[i] = Fiber{first_frame(top, enter_fiber), State::Ready, i, 0, 0, "", {}, {}};
    order[i] = i;
  }
  for (uint32_t i = 0; i < warps; ++i) {
    warp_order[i] = schedule == (uint32_t)Schedule::WarpsBehind ? warps - 1 - i : i;
  }
  ++machine.counts.blocks;
  const bool shuffled = schedule >= (uint32_t)Schedule::Shuffled;
  const bool by_warp = schedule != (uint32_t)Schedule::InOrder && (!shuffled || schedule % 2 == 0);
  for (;;) {
    if (shuffled) random.shuffle(order), random.shuffle(warp_order);
    bool any = false;
    auto turn = [&](uint32_t warp, bool all) {
      bool ran = false;
      for (uint32_t i : order) {
        if ((all || i / 32 == warp) && machine.fibers[i].state == State::Ready) {
          run(i);
          if (machine.failure[0]) return false;
          ran = any = true;
        }
      }
      return ran;
    };
    if (by_warp) {
      for (uint32_t warp : warp_order) while (turn(warp, false)) {}
    } else {
      turn(0, true);
    }
    if (machine.failure[0]) return false;
    uint32_t done = 0, waiting = 0;
    for (const Fiber &fiber : machine.fibers) {
      done += fiber.state == State::Done;
      waiting += fiber.state == State::AtBarrier;
    }
    if (done == threads) return true;
    if (waiting > 0 && done + waiting == threads) {
      for (Fiber &fiber : machine.fibers) {
        if (fiber.state == State::AtBarrier) fiber.state = State::Ready;
      }
    } else if (!any) {
      return deadlock(), false;
    }
  }
}

// ---- Warp-wide operations ----------------------------------------------------------------------

/// Brings `words` words to the warp's next operation and waits until all lanes have come; the last
/// one runs `finish`. Returns the meeting, to read from.
template <class Finish>
Meeting &meet(const char *operation, const void *words, size_t bytes, Finish finish) {
  Fiber &fiber = *machine.current;
  Warp &warp = machine.warps[fiber.thread / 32];
  Meeting &meeting = warp.meetings[fiber.warp_operations++ % 2];
  const uint32_t lane = fiber.thread % 32;
  if (meeting.arrived == 0) meeting.operation = operation;
  if (strcmp(meeting.operation, operation) != 0) fail("lanes of a warp in different operations");
  memcpy(meeting.brought[lane], words, bytes);
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == 0xffffffffu) {
    meeting.arrived = 0;
    finish(meeting);
    Fiber *first = &machine.fibers[fiber.thread - lane];
    for (Fiber *other = first; other < first + 32; ++other) other->state = State::Ready;
  } else {
    fiber.state = State::AtWarp;
    fiber.waits_in = operation;
    give_way();
  }
  return meeting;
}

} // namespace emulator
