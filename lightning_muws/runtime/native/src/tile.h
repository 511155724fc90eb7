// The innermost loop: a few output rows times a few vectors of positions, held in registers.
#pragma once
#include "pieces.h"

namespace {

template <int ROWS> constexpr int max_vectors() {
#if MUWS_LANES == 16 || defined(__aarch64__)
  return ROWS >= 8 ? 3 : ROWS >= 4 ? 6 : 8;
#else
  return ROWS >= 8 ? 1 : ROWS >= 4 ? 2 : 4;  // sixteen registers: 4 rows by 3 vectors spill
#endif
}

// The barrier keeps p in its own register, so that a load is one instruction with base and index.
#define MUWS_OWN(p) __asm__("" : "+r"(p))

// How many blocks ahead to prefetch columns; 0 if a block is too short to pay for the instructions.
constexpr int columns_ahead(int rows, int vectors, int cols) {
  return MUWS_LANES < 16 ? 0 : cols > 1 ? (rows * vectors >= 12 ? 2 : 0) : rows * vectors >= 16 ? 8 : 0;
}

// Columns are scattered over the input, which the second-level cache holds: prefetch every line their vectors touch.
template <int N, int COLS>
MUWS_INLINE void fetch_columns(const float* x, const int32_t* offset, const int64_t (&from)[N]) {
#pragma GCC unroll 2
  for (int c = 0; c < COLS; c += COLS > 1 ? COLS - 1 : 1) {
    const float* p = x + offset[c];
#pragma GCC unroll 8
    for (int t = 0; t < N; t++) __builtin_prefetch(p + from[t]);
    __builtin_prefetch(p + from[N - 1] + V - 1);
  }
}

template <int COLS> MUWS_INLINE void fetch_even(const float* p, int64_t spacing) {
#pragma GCC unroll 4
  for (int c = 0; c < COLS; c++) __builtin_prefetch(p + c * spacing);
}

// The weights of a column, each broadcast to all lanes of a vector. If load slots are short, one load fetches four, and
// permutations spread them, for which the multiplications leave room.
template <int ROWS, int N, int COLS> struct Column {
  const float* w;
#if MUWS_LANES == 16
  static constexpr int LOADED = ROWS != 4 ? ROWS : COLS == 1 ? 0 : N <= 2 ? 1 : ROWS;
  __m512 four;
  inline __attribute__((always_inline)) Column(const float* w)
      : w(w), four(LOADED < ROWS ? _mm512_broadcast_f32x4(_mm_loadu_ps(w)) : __m512{}) {}
  inline __attribute__((always_inline)) vf operator[](int r) const {
    if (r < LOADED) return splat(w[r]);
    return (vf)(r == 0   ? _mm512_permute_ps(four, 0x00)
                : r == 1 ? _mm512_permute_ps(four, 0x55)
                : r == 2 ? _mm512_permute_ps(four, 0xaa)
                         : _mm512_permute_ps(four, 0xff));
  }
#else
  inline __attribute__((always_inline)) Column(const float* w) : w(w) {}
  inline __attribute__((always_inline)) vf operator[](int r) const { return splat(w[r]); }
#endif
};

template <int ROWS, int N, int COLS, bool EVEN = false>
static void tile_of(const float* __restrict x, const Tile& tile, const Work& work) {
  const MuwsLayer& l = *work.layer;
  const int32_t* offsets = work.offsets;
  int64_t from[N];
#pragma GCC unroll 8
  for (int t = 0; t < N; t++) from[t] = tile.from[t];
  constexpr int AHEAD = EVEN ? 3 : columns_ahead(ROWS, N, COLS);
  const uint16_t* column = l.columns + l.starts[work.first];
  const uint16_t* last = l.columns + most<int64_t>(0, l.starts[work.last] - 1);
  const float* w = l.weights + (int64_t)l.starts[work.first] * COLS * ROWS;
  for (int64_t b = work.first; b < work.last; b++) {
    float* y = work.y + b * ROWS * work.pitch;
    const uint16_t* end = l.columns + l.starts[b + 1];
    vf sum[ROWS][N];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int t = 0; t < N; t++) sum[r][t] = splat(l.bias ? l.bias[b * ROWS + r] : 0.0f);
    // With few sums, one addition would wait for the last: every second column has separate sums.
    constexpr bool TWICE = COLS > 1 && ROWS * N <= 4;
    vf other[TWICE ? ROWS : 1][N] = {};
    if (work.far) expect<ROWS, N>(tile, y, work.pitch);
    for (; column != end; column++, w += COLS * ROWS) {
      const int32_t* offset = offsets + *column;
      const float* even = x + *column * work.spacing;
      // once per line if columns are narrow; if load slots are short, the hardware prefetcher does it
      if constexpr (COLS > 1 || ROWS * N < 24)
        if (((size_t)w & 63) < 4 * COLS * ROWS) fetch<COLS * ROWS>(w);
      if constexpr (EVEN)
        fetch_even<COLS>(x + *least(column + AHEAD, last) * work.spacing + from[0], work.spacing);
      else if constexpr (AHEAD > 0)
        fetch_columns<N, COLS>(x, offsets + *least(column + AHEAD, last), from);
#pragma GCC unroll 4
      for (int c = 0; c < COLS; c++) {
        const float* p = EVEN ? even + c * work.spacing : x + offset[c];
        MUWS_OWN(p);
        vf in[N];
#pragma GCC unroll 8
        for (int t = 0; t < N; t++) in[t] = load(p + from[t]);
        const Column<ROWS, N, COLS> weights(w + c * ROWS);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          const vf weight = weights[r];
#pragma GCC unroll 8
          for (int t = 0; t < N; t++) (TWICE && c % 2 ? other[TWICE ? r : 0] : sum[r])[t] += weight * in[t];
        }
      }
    }
    if constexpr (TWICE)
      for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < N; t++) sum[r][t] += other[r][t];
    put<ROWS, N>(sum, tile, work, b);
  }
}

#if defined(__AVX512BF16__)
// x holds every number twice, in both halves of a 32-bit lane: one blend of two loads pairs any two columns.
template <int ROWS, int N> static void pair_tile_of(const float* __restrict x, const Tile& tile, const Work& work) {
  const MuwsLayer& l = *work.layer;
  int64_t from[N];
#pragma GCC unroll 8
  for (int t = 0; t < N; t++) from[t] = tile.from[t];
  const int32_t* offset = work.offsets + 2 * (int64_t)l.starts[work.first];
  const int32_t* w = (const int32_t*)l.weights + (int64_t)l.starts[work.first] * ROWS;
  for (int64_t b = work.first; b < work.last; b++) {
    float* y = work.y + b * ROWS * work.pitch;
    const int32_t* end = work.offsets + 2 * (int64_t)l.starts[b + 1];
    vf sum[ROWS][N];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int t = 0; t < N; t++) sum[r][t] = splat(l.bias ? l.bias[b * ROWS + r] : 0.0f);
    if (work.far) expect<ROWS, N>(tile, y, work.pitch);
    for (; offset != end; offset += 2, w += ROWS) {
      fetch<ROWS>(w);
      const float *p = x + offset[0], *q = x + offset[1];
      MUWS_OWN(p);
      MUWS_OWN(q);
      __m512i in[N];
#pragma GCC unroll 8
      for (int t = 0; t < N; t++)
        in[t] = _mm512_mask_loadu_epi16(_mm512_loadu_si512(p + from[t]), 0xAAAAAAAAu, q + from[t]);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(w[r]);
#pragma GCC unroll 8
        for (int t = 0; t < N; t++) sum[r][t] = (vf)_mm512_dpbf16_ps((__m512)sum[r][t], weight, (__m512bh)in[t]);
      }
    }
    put<ROWS, N>(sum, tile, work, b);
  }
}
#endif

typedef void (*TileFn)(const float*, const Tile&, const Work&);

template <int ROWS, int N> static TileFn pick(int64_t n, int64_t cols, bool pairs, bool even) {
  if constexpr (N > 1)
    if (n < N) return pick<ROWS, N - 1>(n, cols, pairs, even);
#if defined(__AVX512BF16__)
  if (pairs) return pair_tile_of<ROWS, N>;
#endif
  if (pairs) return nullptr;
  if constexpr (N <= 2)  // saves the offset look-up, which matters only here
    if (cols == 4 && even) return tile_of<ROWS, N, 4, true>;
  return cols == 4 ? tile_of<ROWS, N, 4> : tile_of<ROWS, N, 1>;
}

static int most_vectors(int64_t rows) {
  return rows == 8 ? max_vectors<8>() : rows == 4 ? max_vectors<4>() : rows == 2 ? max_vectors<2>() : max_vectors<1>();
}
static TileFn choose_tile(int64_t rows, int64_t cols, int n, bool pairs, bool even) {
  return rows == 8   ? pick<8, max_vectors<8>()>(n, cols, pairs, even)
         : rows == 4 ? pick<4, max_vectors<4>()>(n, cols, pairs, even)
         : rows == 2 ? pick<2, max_vectors<2>()>(n, cols, pairs, even)
                     : pick<1, max_vectors<1>()>(n, cols, pairs, even);
}

}  // namespace
