// Attention of one head after another: softmax(scale * q k') v, four queries at a time.
#pragma once
#include "elements.h"

namespace {

constexpr int QUERIES = 4;                   // together: they share what is loaded of keys and values
constexpr int KEY_VECTORS = V == 16 ? 4 : 2;  // of sums that stay in registers, for each query

struct Attending {
  const MuwsStep* step;
  const float *q, *k, *v;
  Output8 to;
  int64_t splits;  // of the queries of a head, between threads
};

// sum[r][t] = sum of a[r][i] * b[i * pitch + t] over i, for N vectors of t.
template <int N>
MUWS_INLINE void products(const float* const (&a)[QUERIES], int64_t depth, const float* b, int64_t pitch, float (*out)[4 * V]) {
  vf sum[QUERIES][N] = {};
  for (int64_t i = 0; i < depth; i++, b += pitch) {
    vf in[N];
#pragma GCC unroll 4
    for (int t = 0; t < N; t++) in[t] = load(b + t * V);
#pragma GCC unroll 4
    for (int r = 0; r < QUERIES; r++) {
      const vf factor = splat(a[r][i]);
#pragma GCC unroll 4
      for (int t = 0; t < N; t++) sum[r][t] += factor * in[t];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < QUERIES; r++)
#pragma GCC unroll 4
    for (int t = 0; t < N; t++) store(out[r] + t * V, sum[r][t]);
}

// The same for up to KEY_VECTORS vectors.
static void products_of(int64_t vectors, const float* const (&a)[QUERIES], int64_t depth, const float* b, int64_t pitch,
                        float (*out)[4 * V]) {
  if (vectors == 1) return products<1>(a, depth, b, pitch, out);
  if (vectors == 2) return products<2>(a, depth, b, pitch, out);
  if (vectors == 3) return products<3>(a, depth, b, pitch, out);
  products<4>(a, depth, b, pitch, out);
}

// Turn n scores into e ** (score - largest); return 1 over their sum. Numbers up to a whole vector are written too.
static float soften(float* scores, int64_t n) {
  const int64_t padded = ceil_div(n, V) * V;
  for (int64_t i = n; i < padded; i++) scores[i] = -__builtin_inff();
  vf top = load(scores);
  for (int64_t i = V; i < padded; i += V) top = larger(top, load(scores + i));
  const vf largest = splat(greatest(top));
  vf sum = vf{};
  for (int64_t i = 0; i < padded; i += V) {
    const vf p = exp_of(load(scores + i) - largest);
    sum += p;
    store(scores + i, p);
  }
  return 1.0f / total(sum);
}

static void run_attention(void* context, int64_t item) {
  const Attending& work = *(const Attending*)context;
  const MuwsAttention& a = *(const MuwsAttention*)work.step->layer;
  const int64_t head = item / work.splits, split = item % work.splits, groups = ceil_div(a.queries, QUERIES);
  const int64_t n = head / a.heads, h = head % a.heads;
  const float* q = work.q + a.q_at + n * a.q_batch + h * a.q_head;
  const float* k = work.k + a.k_at + n * a.k_batch + h * a.k_head;
  const float* v = work.v + a.v_at + n * a.v_batch + h * a.v_head;
  const int64_t lines = ceil_div(a.keys, V), wide = ceil_div(a.width, V);
  const int64_t pitch = V * (lines < 16 ? lines : lines | 1);  // an odd number of cache lines, as in plan.h
  const bool copies = a.width % V != 0;  // values whose rows are no whole vectors
  float* turned = muws_scratch(0, (size_t)(a.depth * pitch + QUERIES * pitch + (copies ? a.keys * wide * V : 0)));
  float *scores = turned + a.depth * pitch, *padded = scores + QUERIES * pitch;
  for (int64_t s = 0; s < a.keys; s += V)
    for (int64_t d = 0; d < a.depth; d += V)
      transpose_block(k + s * a.k_row + d, a.k_row, (int)least<int64_t>(V, a.keys - s), (int)least<int64_t>(V, a.depth - d),
                      turned + d * pitch + s, pitch, (int)least<int64_t>(V, a.depth - d), V);
  for (int64_t s = 0; s < a.keys && copies; s++) {
    clear(padded + s * wide * V, wide * V);
    copy(padded + s * wide * V, v + s * a.v_row, a.width);
  }
  const float* values = copies ? padded : v;
  const int64_t values_pitch = copies ? wide * V : a.v_row;
  const vf scale = splat((float)work.step->number);
  vi sizes = vi{};
  float out[QUERIES][4 * V];
  for (int64_t g = split * groups / work.splits; g < (split + 1) * groups / work.splits; g++) {
    const float *rows[QUERIES], *shares[QUERIES];
    float inverse[QUERIES];
    for (int r = 0; r < QUERIES; r++) {
      rows[r] = q + least(g * QUERIES + r, a.queries - 1) * a.q_row;  // the last may be computed twice
      shares[r] = scores + r * pitch;
    }
    for (int64_t t = 0; t < lines; t += KEY_VECTORS) {
      const int64_t vectors = least<int64_t>(KEY_VECTORS, lines - t);
      products_of(vectors, rows, a.depth, turned + t * V, pitch, out);
      for (int r = 0; r < QUERIES; r++)
        for (int64_t i = 0; i < vectors; i++) store(scores + r * pitch + (t + i) * V, load(out[r] + i * V) * scale);
    }
    for (int r = 0; r < QUERIES; r++) inverse[r] = soften(scores + r * pitch, a.keys);
    for (int64_t t = 0; t < wide; t += KEY_VECTORS) {
      const int64_t vectors = least<int64_t>(KEY_VECTORS, wide - t);
      products_of(vectors, shares, a.keys, values + t * V, values_pitch, out);
      for (int r = 0; r < QUERIES && g * QUERIES + r < a.queries; r++) {
        const int64_t at = n * a.y_batch + h * a.y_head + (g * QUERIES + r) * a.y_row;
        for (int64_t i = 0; i < vectors; i++)
          put(work.to, at + (t + i) * V, load(out[r] + i * V) * splat(inverse[r]), a.width - (t + i) * V, sizes);
      }
    }
  }
  watch(work.to, sizes);
}

static void attend(Attending work, int64_t threads) {
  const MuwsAttention& a = *(const MuwsAttention*)work.step->layer;
  const int64_t heads = a.batch * a.heads;
  work.splits = heads < threads ? least(ceil_div(a.queries, QUERIES), ceil_div(threads, heads)) : 1;
  muws_parallel(threads, heads * work.splits, run_attention, &work);
}

}  // namespace
