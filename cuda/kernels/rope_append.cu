// q, k rotated by pairs (x, y) at (i, i + head_dim / 2): (x cos - y sin, y cos + x sin);
// q in place, k and v as f16 to their places in the pages.
// q f32 [rows][heads][head_dim]; k, v f32 [rows][kv_heads][head_dim]; angles f32 [rows][head_dim].
// Bytes: 8 q + 6 (k + v) + 4 angles for each row, each once.
// Launch: grid rows, block 256. Rows have different places; each number is computed by itself.
#include "abi.h"
#include "dev.cuh"

KERNEL(256) rope_append(const hat_rope_append p) {
  const uint32_t row = blockIdx.x, half = p.head_dim / 2;
  const float *cosine = p.angles + (size_t)row * p.head_dim, *sine = cosine + half;
  const uint32_t place = p.places[row], page = place / HAT_PAGE_SIZE, at = place % HAT_PAGE_SIZE;
  float *q = p.q + (size_t)row * p.heads * p.head_dim;
  const float *k = p.k + (size_t)row * p.kv_heads * p.head_dim;
  const float *v = p.v + (size_t)row * p.kv_heads * p.head_dim;

#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < p.heads * half; i += 256) {
    float *head = q + i / half * p.head_dim + i % half;
    const float x = head[0], y = head[half], c = cosine[i % half], s = sine[i % half];
    head[0] = fmaf(x, c, -(y * s));
    head[half] = fmaf(y, c, x * s);
  }
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < p.kv_heads * half; i += 256) {
    const uint32_t head = i / half, d = i % half;
    const size_t from = (size_t)head * p.head_dim + d;
    const size_t to = (((size_t)page * p.kv_heads + head) * HAT_PAGE_SIZE + at) * p.head_dim + d;
    const float x = k[from], y = k[from + half], c = cosine[d], s = sine[d];
    p.k_pages[to] = to_half(fmaf(x, c, -(y * s)));
    p.k_pages[to + half] = to_half(fmaf(y, c, x * s));
    p.v_pages[to] = to_half(v[from]);
    p.v_pages[to + half] = to_half(v[from + half]);
  }
}
