// The path that the target takes through a draft tree: from the root to the child whose token is
// the target's choice, as long as there is one; of equal children the first.
// parents, tokens, choices, path [nodes] of all trees, path_len, next [sequences].
// Bytes: 16 for each node.
// Launch: grid sequences, block 32: a lane looks at two nodes.
#include "abi.h"
#include "dev.cuh"

KERNEL(32) accept_tree(const hat_accept_tree p) {
  const uint32_t first = p.indptr[blockIdx.x], nodes = p.indptr[blockIdx.x + 1] - first;
  const uint32_t lane = threadIdx.x;
  uint32_t parents[2], tokens[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t node = lane + i * WARP;
    // The root is nobody's child, and neither is what is not there.
    parents[i] = node > 0 && node < nodes ? p.parents[first + node] : 0xffffffffu;
    tokens[i] = node < nodes ? p.tokens[first + node] : 0;
  }
  uint32_t at = 0, length = 0, choice;
  for (;;) {
    if (lane == 0) p.path[first + length] = at;
    ++length;
    choice = p.choices[first + at];
    const uint32_t low = __ballot_sync(ALL_LANES, parents[0] == at && tokens[0] == choice);
    const uint32_t high = __ballot_sync(ALL_LANES, parents[1] == at && tokens[1] == choice);
    if (!(low | high)) break;
    at = low ? __ffs(low) - 1 : WARP + __ffs(high) - 1;
  }
  if (lane == 0) {
    p.path_len[blockIdx.x] = length;
    p.next[blockIdx.x] = choice;
  }
}
