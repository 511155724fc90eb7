// Knows the innermost loop: a few output rows times a few vectors of positions, held in registers.
#pragma once
#include "api.h"
#include "vectors.h"

namespace {

// Vector t of the tile reads at x + from[t] + offset of the column, and goes to y + row * pitch + to[t].
struct Tile {
  int count;
  int32_t from[8];
  int64_t to[8];
};

struct Blocks {
  const int32_t* columns;
  const float* weights;
  const int32_t* offsets;  // of every logical column, from the tile's corner
  const float* bias;
  int64_t cols;
  bool relu;
};

template <int ROWS> constexpr int max_vectors() {
  if (MUWS_LANES == 8) return ROWS >= 8 ? 1 : ROWS >= 4 ? 3 : 4;  // sixteen registers
  return ROWS >= 8 ? 3 : ROWS >= 4 ? 6 : 8;
}

template <int ROWS, int N>
static void tile_of(const float* __restrict x, const Tile& tile, const Blocks& b, int32_t first, int32_t last,
                    float* __restrict y, int64_t pitch, int rows) {
  vf sum[ROWS][N];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int t = 0; t < N; t++) sum[r][t] = splat(b.bias ? b.bias[r] : 0.0f);
  int64_t from[N];
#pragma GCC unroll 8
  for (int t = 0; t < N; t++) from[t] = tile.from[t];
  const int64_t cols = b.cols;
  const float* w = b.weights + (int64_t)first * cols * ROWS;
  for (int32_t i = first; i < last; i++) {
    const int32_t* offset = b.offsets + (int64_t)b.columns[i] * cols;
    for (int64_t c = 0; c < cols; c++, w += ROWS) {
      const float* p = x + offset[c];
      vf in[N];
#pragma GCC unroll 8
      for (int t = 0; t < N; t++) in[t] = load(p + from[t]);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const vf weight = splat(w[r]);
#pragma GCC unroll 8
        for (int t = 0; t < N; t++) sum[r][t] += weight * in[t];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    if (r >= rows) break;
#pragma GCC unroll 8
    for (int t = 0; t < N; t++) store(y + r * pitch + tile.to[t], b.relu ? relu(sum[r][t]) : sum[r][t]);
  }
}

#if defined(__AVX512BF16__)
// x holds every number twice, as the two halves of a 32-bit lane: a pair of any two columns is one blend of two loads.
template <int ROWS, int N>
static void pair_tile_of(const float* __restrict x, const Tile& tile, const Blocks& b, int32_t first, int32_t last,
                         float* __restrict y, int64_t pitch, int rows) {
  __m512 sum[ROWS][N];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int t = 0; t < N; t++) sum[r][t] = _mm512_set1_ps(b.bias ? b.bias[r] : 0.0f);
  int64_t from[N];
#pragma GCC unroll 8
  for (int t = 0; t < N; t++) from[t] = tile.from[t];
  const int64_t cols = b.cols;
  const int32_t* w = (const int32_t*)b.weights + (int64_t)first * (cols / 2) * ROWS;
  for (int32_t i = first; i < last; i++) {
    const int32_t* offset = b.offsets + (int64_t)b.columns[i] * cols;
    for (int64_t c = 0; c < cols; c += 2, w += ROWS) {
      const float *p = x + offset[c], *q = x + offset[c + 1];
      __m512i in[N];
#pragma GCC unroll 8
      for (int t = 0; t < N; t++)
        in[t] = _mm512_mask_loadu_epi16(_mm512_loadu_si512(p + from[t]), 0xAAAAAAAAu, q + from[t]);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const __m512i weight = _mm512_set1_epi32(w[r]);
#pragma GCC unroll 8
        for (int t = 0; t < N; t++) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], (__m512bh)weight, (__m512bh)in[t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    if (r >= rows) break;
#pragma GCC unroll 8
    for (int t = 0; t < N; t++) store(y + r * pitch + tile.to[t], b.relu ? relu((vf)sum[r][t]) : (vf)sum[r][t]);
  }
}
#endif

typedef void (*TileFn)(const float*, const Tile&, const Blocks&, int32_t, int32_t, float*, int64_t, int);

template <int ROWS> struct Tiles {
  static constexpr int most_vectors = max_vectors<ROWS>();
  template <int N> static TileFn at(int n, bool pairs) {
    if constexpr (N > 1)
      if (n < N) return at<N - 1>(n, pairs);
#if defined(__AVX512BF16__)
    if (pairs) return pair_tile_of<ROWS, N>;
#endif
    return pairs ? nullptr : tile_of<ROWS, N>;
  }
  static TileFn choose(int n, bool pairs) { return at<most_vectors>(n, pairs); }
};

static int most_vectors(int64_t rows) {
  return rows == 8 ? Tiles<8>::most_vectors : rows == 4 ? Tiles<4>::most_vectors : Tiles<2>::most_vectors;
}
static TileFn choose_tile(int64_t rows, int n, bool pairs) {
  return rows == 8 ? Tiles<8>::choose(n, pairs) : rows == 4 ? Tiles<4>::choose(n, pairs)
       : rows == 2 ? Tiles<2>::choose(n, pairs) : Tiles<1>::choose(n, pairs);
}

}  // namespace
