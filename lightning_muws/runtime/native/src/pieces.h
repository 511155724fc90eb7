// Stores the sums of a tile: its vectors are cut into pieces of neighbouring outputs.
#pragma once
#include "api.h"
#include "vectors.h"

namespace {

// The `count` lanes of `mask` are outputs. They go to y + row * pitch + to, side by side.
struct Piece {
  int64_t to;
  uint32_t mask;
  int count;
};
constexpr uint32_t ALL_LANES = (1u << V) - 1;

// Vector t reads at x + from[t] + the column's offset; its pieces are pieces[start[t]] .. pieces[start[t + 1]].
struct Tile {
  int count;
  bool whole;   // every vector is one piece of all its lanes
  bool joined;  // every vector is one piece that continues the one before, and a whole vector fits before the end
  int32_t from[8];
  int start[9];
  Piece pieces[8 * V];
};

// Block rows first .. last of a layer; output r of block row b goes to y + (b * rows + r) * pitch.
struct Work {
  const MuwsLayer* layer;
  const int32_t* offsets;  // from the tile's corner, of every column of the matrix, or of the two of each block
  int64_t first, last;
  float* y;
  const float* onto;  // with the layout of y, added to the sums; or null
  int64_t pitch;
  bool far;  // y is the output, not scratch
  int64_t spacing;  // of evenly spaced columns; else 0
};

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

// Prefetch the lines of the output, so that no store waits for them. Prefetching past the end is harmless.
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
    if (tile.joined && t + 1 < N) {  // the next vectors overwrite what this writes too much
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

}  // namespace
