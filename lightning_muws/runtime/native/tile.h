// Knows the innermost loop: a few output rows times a few vectors of positions, held in registers.
#pragma once
#include "api.h"
#include "vectors.h"

namespace {

// The lanes of `mask`, `count` of them, are outputs: they go to y + row * pitch + to, side by side.
struct Piece {
  int64_t to;
  uint32_t mask;
  int count;
};
constexpr uint32_t ALL_LANES = (1u << V) - 1;

// Vector t reads at x + from[t] + the column's offset; its pieces are pieces[start[t]] .. pieces[start[t + 1]].
struct Tile {
  int count;
  bool whole;  // every vector is one piece of all its lanes
  bool joined;  // every vector is one piece, which goes on where the one before ended, none but the last near the end
  int32_t from[8];
  int start[9];
  Piece pieces[8 * V];
};

// Block rows first .. last of a layer; output r of block row b goes to y + (b * rows + r) * pitch.
struct Work {
  const MuwsLayer* layer;
  const int32_t* offsets;  // of every column of the matrix, or of each block's two, from the tile's corner
  int64_t first, last;
  float* y;
  const float* onto;  // laid as y: added to the sums; or null
  int64_t pitch;
  bool far;  // y is the output itself, not scratch
};

template <int ROWS> constexpr int max_vectors() {
#if MUWS_LANES == 16 || defined(__aarch64__)
  return ROWS >= 8 ? 3 : ROWS >= 4 ? 6 : 8;
#else
  return ROWS >= 8 ? 1 : ROWS >= 4 ? 2 : 4;  // sixteen registers: 4 rows by 3 vectors spill
#endif
}

#if MUWS_LANES == 16
MUWS_INLINE vf packed(vf v, const Piece& piece) {
  return (vf)_mm512_maskz_compress_ps((__mmask16)piece.mask, (__m512)v);
}
#endif

MUWS_INLINE void store_piece(float* to, vf v, const Piece& piece) {
#if MUWS_LANES == 16
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << piece.count) - 1), (__m512)packed(v, piece));
#else
  float lanes[V];
  store(lanes, v);
  for (uint32_t left = piece.mask; left; left &= left - 1) *to++ = lanes[__builtin_ctz(left)];
#endif
}

MUWS_INLINE vf load_piece(const float* from, const Piece& piece) {
#if MUWS_LANES == 16
  const __m512 packed = _mm512_maskz_loadu_ps((__mmask16)((1u << piece.count) - 1), from);
  return (vf)_mm512_maskz_expand_ps((__mmask16)piece.mask, packed);
#else
  float lanes[V] = {};
  for (uint32_t left = piece.mask; left; left &= left - 1) lanes[__builtin_ctz(left)] = *from++;
  return load(lanes);
#endif
}

// Ask for the lines of the output early, so that no store waits for them. Asking past the end does no harm.
template <int ROWS, int N> MUWS_INLINE void expect(const Tile& tile, const float* y, int64_t pitch) {
#pragma GCC unroll 8
  for (int t = 0; t < N; t++) {
    const float* to = y + tile.pieces[tile.start[t]].to;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) __builtin_prefetch(to + r * pitch, 1);
  }
}

template <int ROWS, int N>
MUWS_INLINE void add_onto(vf (&sum)[ROWS][N], const Tile& tile, const float* onto, int64_t pitch, int rows) {
#pragma GCC unroll 8
  for (int t = 0; t < N; t++)
    for (int i = tile.start[t]; i < tile.start[t + 1]; i++) {
      const Piece& piece = tile.pieces[i];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
        if (r < rows) {
          const float* from = onto + r * pitch + piece.to;
          sum[r][t] += tile.whole ? load(from) : load_piece(from, piece);
        }
    }
}

template <int ROWS, int N>
MUWS_INLINE void put(vf (&sum)[ROWS][N], const Tile& tile, const Work& work, int64_t b) {
  const MuwsLayer& l = *work.layer;
  const int64_t pitch = work.pitch;
  const int rows = (int)least<int64_t>(ROWS, l.o - b * ROWS);
  float* y = work.y + b * ROWS * pitch;
  if (work.onto) add_onto<ROWS, N>(sum, tile, work.onto + b * ROWS * pitch, pitch, rows);
  const bool with_relu = l.relu != 0;
  if (with_relu) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int t = 0; t < N; t++) sum[r][t] = relu(sum[r][t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < N; t++) {
    if (tile.whole) {
      float* to = y + tile.pieces[tile.start[t]].to;
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
        if (r < rows) store(to + r * pitch, sum[r][t]);
      continue;
    }
#if MUWS_LANES == 16
    if (tile.joined && t + 1 < N) {  // what this writes too much the next vectors write over
      const Piece& piece = tile.pieces[t];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
        if (r < rows) store(y + r * pitch + piece.to, packed(sum[r][t], piece));
      continue;
    }
#endif
    for (int i = tile.start[t]; i < tile.start[t + 1]; i++) {
      const Piece& piece = tile.pieces[i];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
        if (r < rows) store_piece(y + r * pitch + piece.to, sum[r][t], piece);
    }
  }
}

// The barrier keeps p in a register of its own, so that a load is one instruction: base and index.
#define MUWS_OWN(p) __asm__("" : "+r"(p))

// How many blocks ahead to ask for their columns; 0 where a block is too quick for it to be worth its instructions.
constexpr int columns_ahead(int rows, int vectors, int cols) {
  return MUWS_LANES < 16 ? 0 : cols > 1 ? (rows * vectors >= 12 ? 2 : 0) : rows * vectors >= 20 ? 5 : 0;
}

// Columns lie all over the input, which the second-level cache holds: ask for every line that their vectors touch.
template <int N, int COLS> MUWS_INLINE void fetch_columns(const float* x, const int32_t* offset, const int64_t (&from)[N]) {
#pragma GCC unroll 2
  for (int c = 0; c < COLS; c += COLS > 1 ? COLS - 1 : 1) {
    const float* p = x + offset[c];
#pragma GCC unroll 8
    for (int t = 0; t < N; t++) __builtin_prefetch(p + from[t]);
    __builtin_prefetch(p + from[N - 1] + V - 1);
  }
}

// The weights of a column, one by one in all lanes of a vector.
template <int ROWS, int COLS> struct Column {
#if MUWS_LANES == 16
  static constexpr bool PERMUTED = ROWS == 4 && COLS == 1;  // loads are short there: one of four, and four permutations
  const float* w;
  __m512 four;
  MUWS_INLINE Column of(const float* w) {
    return {w, PERMUTED ? _mm512_broadcast_f32x4(_mm_loadu_ps(w)) : __m512{}};
  }
  inline __attribute__((always_inline)) vf operator[](int r) const {
    if (!PERMUTED) return splat(w[r]);
    return (vf)(r == 0   ? _mm512_permute_ps(four, 0x00)
                : r == 1 ? _mm512_permute_ps(four, 0x55)
                : r == 2 ? _mm512_permute_ps(four, 0xaa)
                         : _mm512_permute_ps(four, 0xff));
  }
#else
  const float* w;
  MUWS_INLINE Column of(const float* w) { return {w}; }
  inline __attribute__((always_inline)) vf operator[](int r) const { return splat(w[r]); }
#endif
};

template <int ROWS, int N, int COLS> static void tile_of(const float* __restrict x, const Tile& tile, const Work& work) {
  const MuwsLayer& l = *work.layer;
  const int32_t* offsets = work.offsets;
  int64_t from[N];
#pragma GCC unroll 8
  for (int t = 0; t < N; t++) from[t] = tile.from[t];
  constexpr int AHEAD = columns_ahead(ROWS, N, COLS);
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
    // Few sums would wait for each other: every other column gets sums of its own.
    constexpr bool TWICE = COLS > 1 && ROWS * N <= 4;
    vf other[TWICE ? ROWS : 1][N] = {};
    if (work.far) expect<ROWS, N>(tile, y, work.pitch);
    for (; column != end; column++, w += COLS * ROWS) {
      const int32_t* offset = offsets + *column;
      fetch<COLS * ROWS>(w);
      if constexpr (AHEAD > 0) fetch_columns<N, COLS>(x, offsets + *least(column + AHEAD, last), from);
#pragma GCC unroll 4
      for (int c = 0; c < COLS; c++) {
        const float* p = x + offset[c];
        MUWS_OWN(p);
        vf in[N];
#pragma GCC unroll 8
        for (int t = 0; t < N; t++) in[t] = load(p + from[t]);
        const Column<ROWS, COLS> weights = Column<ROWS, COLS>::of(w + c * ROWS);
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
// x holds every number twice, as the two halves of a 32-bit lane: a pair of any two columns is one blend of two loads.
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

template <int ROWS, int N> static TileFn pick(int64_t n, int64_t cols, bool pairs) {
  if constexpr (N > 1)
    if (n < N) return pick<ROWS, N - 1>(n, cols, pairs);
#if defined(__AVX512BF16__)
  if (pairs) return pair_tile_of<ROWS, N>;
#endif
  return pairs ? nullptr : cols == 4 ? tile_of<ROWS, N, 4> : tile_of<ROWS, N, 1>;
}

static int most_vectors(int64_t rows) {
  return rows == 8 ? max_vectors<8>() : rows == 4 ? max_vectors<4>() : rows == 2 ? max_vectors<2>() : max_vectors<1>();
}
static TileFn choose_tile(int64_t rows, int64_t cols, int n, bool pairs) {
  return rows == 8   ? pick<8, max_vectors<8>()>(n, cols, pairs)
         : rows == 4 ? pick<4, max_vectors<4>()>(n, cols, pairs)
         : rows == 2 ? pick<2, max_vectors<2>()>(n, cols, pairs)
                     : pick<1, max_vectors<1>()>(n, cols, pairs);
}

}  // namespace
