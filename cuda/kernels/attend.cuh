// Attention of some rows of one sequence over paged K and V, by matrix products in f16 with f32
// sums. attend_verify.cu and attend_prefill.cu are its two launches.
//
// A row's result is a function of the row and of its keys by logical position, and of nothing else:
// - Keys are walked in tiles of 32 positions, tiles in splits of 8, each at a multiple of its size.
//   A split starts anew; splits are merged in order, by one formula, whoever does it.
// - Where all rows see a tile at the slots of its positions it is loaded once (a *plain* tile). A
//   tile with keys of a draft tree is gathered for each row by itself, in logical order.
// - Rows are rows of A in mma, each by itself; keys that a row does not see have weight 0 there.
#pragma once
#include "abi.h"
#include "dev.cuh"

#define ATTEND_WARPS 4
/// Queries of a warp: rows of an mma.
#define ATTEND_QUERIES 16

/// Halves between the rows of a tile in shared memory: 16 bytes more than a row, so that the eight
/// rows of a matrix stand in different banks.
template <int D> constexpr int TILE_STRIDE = D + 8;

template <int D> struct AttendTile {
  alignas(16) uint16_t k[HAT_PAGE_SIZE * TILE_STRIDE<D>];
  alignas(16) uint16_t v[HAT_PAGE_SIZE * TILE_STRIDE<D>];
};

/// A tile and whose it is: all rows' (row < 0), or that of one row of the task.
struct AttendStep {
  uint32_t tile;
  int row;
};

/// One of the two queries of which a thread holds parts.
struct AttendQuery {
  /// Row of the task; -2 for none.
  int row;
  /// Index in q, and first and last position that it sees.
  uint32_t query, first, last;
};

/// Running softmax: the largest score (times log2 e) and the sum of weights.
struct AttendState {
  float largest, sum;
};

DEVICE float finite_or_zero(float largest) { return largest == MINUS_INFINITY ? 0.0f : largest; }

/// Adds a split's state to that of the splits before; `fade` and `weight` are the factors for
/// their sums of V.
DEVICE void merge_states(AttendState &before, AttendState split, float &fade, float &weight) {
  const float largest = fmaxf(before.largest, split.largest), base = finite_or_zero(largest);
  fade = exp2_fast(before.largest - base);
  weight = exp2_fast(split.largest - base);
  before.sum = fmaf(before.sum, fade, split.sum * weight);
  before.largest = largest;
}

/// The next step of tiles `..end` after `step`: plain tiles once, others for each row that sees them.
DEVICE bool next_step(const hat_attend &p, const hat_attend_task &task, uint32_t end, AttendStep &step) {
  if (step.row < 0) {
    ++step.tile;
    if (step.tile < task.plain_end) return step.tile < end;
  } else {
    ++step.row;
  }
  for (; step.tile < end; ++step.tile, step.row = 0) {
    for (step.row = max(step.row, 0); step.row < (int)task.rows; ++step.row) {
      if (p.positions[task.first_row + step.row] >= step.tile * HAT_PAGE_SIZE) return true;
    }
  }
  return false;
}

/// Queues the copies of a step's keys and values. All threads.
template <int D>
DEVICE void load_tile(const hat_attend &p, const hat_attend_task &task, AttendStep step, AttendTile<D> &to) {
  constexpr int CHUNKS = D / 8, ALL = HAT_PAGE_SIZE * CHUNKS, THREADS = ATTEND_WARPS * WARP;
  static_assert(ALL % THREADS == 0, "every thread copies as many");
  const uint32_t row = task.first_row + max(step.row, 0);
  const uint32_t end = step.row < 0 ? task.end : p.positions[row] + 1;
  const uint32_t prefix = step.row < 0 ? 0xffffffffu : p.prefix_len[row];
#pragma unroll
  for (int i = 0; i < ALL / THREADS; ++i) {
    const int index = i * THREADS + threadIdx.x, key = index / CHUNKS, chunk = index % CHUNKS;
    const uint32_t position = step.tile * HAT_PAGE_SIZE + key;
    // What nobody wrote yet is never read: it may be NaN, which a weight of 0 would not hide.
    const bool real = position < end;
    uint32_t slot = real ? position : 0;
    if (real && position >= prefix) slot = p.tail_slots[p.tail_indptr[row] + position - prefix];
    const uint32_t page = p.page_indices[task.first_page + slot / HAT_PAGE_SIZE];
    const size_t at = (((size_t)page * p.kv_heads + blockIdx.y) * HAT_PAGE_SIZE + slot % HAT_PAGE_SIZE) * D;
    const int place = key * TILE_STRIDE<D> + chunk * 8;
    copy_async(to.k + place, p.k_pages + at + chunk * 8, real);
    copy_async(to.v + place, p.v_pages + at + chunk * 8, real);
  }
}

/// Adds a tile to the softmax and the sums of the warp's queries.
template <int D>
DEVICE void add_tile(const AttendTile<D> &tile, AttendStep step, float scale, const uint32_t (&q)[D / 16][4],
                     const AttendQuery (&queries)[2], AttendState (&states)[2], float (&sums)[D / 8][4]) {
  const int lane = threadIdx.x % WARP;
  float scores[HAT_PAGE_SIZE / 8][4] = {};
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
#pragma unroll
    for (int n = 0; n < HAT_PAGE_SIZE / 16; ++n) {
      const int key = n * 16 + lane % 8 + lane / 16 * 8, column = d * 16 + lane / 8 % 2 * 8;
      uint32_t k[4];
      load_matrices(k, tile.k + key * TILE_STRIDE<D> + column);
      multiply_add(scores[2 * n], q[d], k[0], k[1]);
      multiply_add(scores[2 * n + 1], q[d], k[2], k[3]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool mine = step.row < 0 || step.row == queries[h].row;
    float largest = states[h].largest;
#pragma unroll
    for (int i = 0; i < HAT_PAGE_SIZE / 4; ++i) {
      const uint32_t position = step.tile * HAT_PAGE_SIZE + i / 2 * 8 + lane % 4 * 2 + i % 2;
      const bool seen = mine && position >= queries[h].first && position <= queries[h].last;
      float &score = scores[i / 2][h * 2 + i % 2];
      score = seen ? score * scale : MINUS_INFINITY;
      largest = fmaxf(largest, score);
    }
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
    const float base = finite_or_zero(largest), fade = exp2_fast(states[h].largest - base);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HAT_PAGE_SIZE / 4; ++i) {
      float &weight = scores[i / 2][h * 2 + i % 2];
      weight = exp2_fast(weight - base);
      sum += weight;
    }
    states[h].sum = fmaf(states[h].sum, fade, sum);
    states[h].largest = largest;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      sums[n][h * 2] *= fade;
      sums[n][h * 2 + 1] *= fade;
    }
  }
#pragma unroll
  for (int n = 0; n < HAT_PAGE_SIZE / 16; ++n) {
    // What is C of the first product is laid out as A of the second.
    const uint32_t weights[4] = {
        pack_half(scores[2 * n][0], scores[2 * n][1]), pack_half(scores[2 * n][2], scores[2 * n][3]),
        pack_half(scores[2 * n + 1][0], scores[2 * n + 1][1]),
        pack_half(scores[2 * n + 1][2], scores[2 * n + 1][3])};
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t v[4];
      load_matrices_transposed(v, tile.v + (n * 16 + lane % 16) * TILE_STRIDE<D> + d * 16 + lane / 16 * 8);
      multiply_add(sums[2 * d], weights, v[0], v[1]);
      multiply_add(sums[2 * d + 1], weights, v[2], v[3]);
    }
  }
}

/// The queries of which this thread holds parts: of rows `lane / 4` and `lane / 4 + 8` of the mma.
DEVICE AttendQuery thread_query(const hat_attend &p, const hat_attend_task &task, int h) {
  const uint32_t rows_of_warp = ATTEND_QUERIES / p.group;
  const uint32_t index = threadIdx.x % WARP / 4 + h * 8, row = threadIdx.x / WARP * rows_of_warp + index / p.group;
  if (index / p.group >= rows_of_warp || row >= task.rows) return {-2, 0, 1, 0};
  const uint32_t last = p.positions[task.first_row + row];
  const uint32_t query = ((task.first_row + row) * p.kv_heads + blockIdx.y) * p.group + index % p.group;
  return {(int)row, query, last >= p.window ? last - p.window + 1 : 0, last};
}

/// The thread's part of q as A of an mma.
template <int D>
DEVICE void load_queries(const hat_attend &p, const AttendQuery (&queries)[2], uint32_t (&q)[D / 16][4]) {
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const AttendQuery &query = queries[i % 2];
      const int column = d * 16 + threadIdx.x % 4 * 2 + i / 2 * 8;
      float2 pair = make_float2(0.0f, 0.0f);
      if (query.row >= 0) pair = *(const float2 *)(p.q + (size_t)query.query * D + column);
      q[d][i] = pack_half(pair.x, pair.y);
    }
  }
}

/// A split's sums and state of one query, to the workspace. `at` is where its sums begin.
template <int D>
DEVICE void write_split(const hat_attend &p, AttendQuery query, AttendState state, uint32_t split,
                        const float (&sums)[D / 8][4], const int at) {
  if (query.row < 0) return;
  const size_t part = (size_t)query.query * p.splits + split;
  if (threadIdx.x % 4 == 0) *(float2 *)(p.split_weights + part * 2) = make_float2(state.largest, state.sum);
  float *to = p.split_sums + part * D + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) *(float2 *)(to + n * 8) = make_float2(sums[n][at], sums[n][at + 1]);
}

/// A split merged into what `out` holds of those before; the last one divides by
/// the sum of weights.
template <int D>
DEVICE AttendState merge_split(const hat_attend &p, AttendQuery query, AttendState total, AttendState state,
                               bool first, bool last, const float (&sums)[D / 8][4], const int at) {
  float fade, weight;
  merge_states(total, state, fade, weight);
  if (query.row < 0) return total;
  const float norm = last ? 1.0f / total.sum : 1.0f;
  float *out = p.out + (size_t)query.query * D + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    float2 *to = (float2 *)(out + n * 8);
    const float2 old = first ? make_float2(0.0f, 0.0f) : *to;
    *to = make_float2(fmaf(old.x, fade, sums[n][at] * weight) * norm,
                      fmaf(old.y, fade, sums[n][at + 1] * weight) * norm);
    // One pair at a time: loads of all at once take more registers than there are.
    compiler_barrier();
  }
  return total;
}

/// One task of one key/value head over the splits `first_split..end_split`. With `PARTS` each
/// split's sums go to the workspace; without, they are merged into `out`.
template <int D, bool PARTS>
DEVICE void attend(const hat_attend &p, AttendTile<D> (&tiles)[2], uint32_t first_split, uint32_t end_split) {
  const hat_attend_task task = p.tasks[blockIdx.x];
  const uint32_t end_tile = (task.end + HAT_PAGE_SIZE - 1) / HAT_PAGE_SIZE;
  const AttendQuery queries[2] = {thread_query(p, task, 0), thread_query(p, task, 1)};
  // Whether the warp has a row at all, and which rows are its own.
  const uint32_t rows_of_warp = ATTEND_QUERIES / p.group, first_of_warp = threadIdx.x / WARP * rows_of_warp;
  uint32_t q[D / 16][4];
  load_queries<D>(p, queries, q);
  AttendState total[2] = {{MINUS_INFINITY, 0.0f}, {MINUS_INFINITY, 0.0f}};

#pragma unroll 1
  for (uint32_t split = first_split; split < end_split; ++split) {
    const uint32_t begin = max(split * HAT_SPLIT_TILES, task.first_tile);
    const uint32_t end = min((split + 1) * HAT_SPLIT_TILES, end_tile);
    AttendState states[2] = {{MINUS_INFINITY, 0.0f}, {MINUS_INFINITY, 0.0f}};
    float sums[D / 8][4] = {};
    AttendStep step = {begin - 1, -1};
    bool more = begin < end && next_step(p, task, end, step);
    if (more) load_tile<D>(p, task, step, tiles[0]);
    copy_async_commit();
#pragma unroll 1
    for (int turn = 0; more; turn ^= 1) {
      AttendStep next = step;
      more = next_step(p, task, end, next);
      if (more) load_tile<D>(p, task, next, tiles[turn ^ 1]);
      copy_async_commit();
      copy_async_wait<1>();
      __syncthreads();
      const bool concerned =
          step.row < 0 ? first_of_warp < task.rows : (uint32_t)step.row - first_of_warp < rows_of_warp;
      if (concerned) add_tile<D>(tiles[turn], step, p.scale, q, queries, states, sums);
      __syncthreads();
      step = next;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      states[h].sum += __shfl_xor_sync(ALL_LANES, states[h].sum, 1);
      states[h].sum += __shfl_xor_sync(ALL_LANES, states[h].sum, 2);
    }
    if (PARTS) {
      write_split<D>(p, queries[0], states[0], split, sums, 0);
      write_split<D>(p, queries[1], states[1], split, sums, 2);
    } else {
      const bool first = split == first_split, last = split + 1 == end_split;
      total[0] = merge_split<D>(p, queries[0], total[0], states[0], first, last, sums, 0);
      total[1] = merge_split<D>(p, queries[1], total[1], states[1], first, last, sums, 2);
    }
  }
}
