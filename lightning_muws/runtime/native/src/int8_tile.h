// The innermost loops of 8 bits: a few outputs times a few vectors of positions, or one sample.
#pragma once
#include "int8_pack.h"

namespace {

template <int ROWS> constexpr int max_vectors8() {
#if defined(__AVX512VNNI__)
  return ROWS >= 4 ? 6 : 4;
#elif MUWS_LANES == 16
  return 4;
#else
  return ROWS >= 4 ? 2 : 4;
#endif
}

// `count` lanes from `lane` on are outputs that lie side by side from y + output * pitch + to on.
struct Run8 {
  int64_t to;
  int32_t lane, count;
};

struct Tile8 {
  int64_t at;  // the first position
  int64_t vectors, lanes;  // lanes: of all vectors, those that are positions
  bool whole;  // every vector is one run of all its lanes
  int start[9];
  Run8 runs[8 * V];
};

struct Work8 {
  const Int8Plan* plan;
  const Packed8* packed;
  Output8 to;  // from the item's first sample on, if the layer is a Linear
  int64_t first, last;  // block rows
};

template <int ROWS, int N>
MUWS_INLINE void scale_sums(const vi (&sum)[ROWS][N], const Tile8& tile, const Work8& work, int64_t b,
                            vf (&y)[ROWS][N]) {
  const MuwsInt8& l = *work.plan->layer;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    const int64_t row = b * ROWS + r;
    const vf bias = splat(l.bias ? l.bias[row] : 0.0f);
    if (!work.packed->scales) {
      const vi shift = splat_int(work.plan->rounding.zero * l.sums[row]);
      const vf scale = splat(l.scales[row] * work.plan->scale);
#pragma GCC unroll 8
      for (int t = 0; t < N; t++) y[r][t] = __builtin_convertvector(sum[r][t] - shift, vf) * scale + bias;
      continue;
    }
#pragma GCC unroll 8
    for (int t = 0; t < N; t++) {
      const vi shift = load_int(work.packed->zeros + tile.at + t * V) * splat_int(l.sums[row]);
      const vf scale = load(work.packed->scales + tile.at + t * V) * splat(l.scales[row]);
      y[r][t] = __builtin_convertvector(sum[r][t] - shift, vf) * scale + bias;
    }
  }
}

// Add and store one row of a tile whose vectors are cut into runs of neighbouring outputs.
static __attribute__((noinline)) void put_runs(const float* sums, const Tile8& tile, const Work8& work, int64_t row) {
  vi sizes = vi{};
  for (int64_t t = 0; t < tile.vectors; t++)
    for (int i = tile.start[t]; i < tile.start[t + 1]; i++) {
      const Run8& run = tile.runs[i];
      put_line(sums + t * V + run.lane, work.to, row + run.to, run.count, work.plan->layer->relu != 0, sizes);
    }
  watch(work.to, sizes);
}

// Store outputs of a convolution.
template <int ROWS, int N>
MUWS_INLINE void put_planes(vf (&sum)[ROWS][N], const Tile8& tile, const Work8& work, int64_t b) {
  const MuwsInt8& l = *work.plan->layer;
  const int64_t pitch = l.oh * l.ow;
  const int rows = (int)least<int64_t>(ROWS, l.o - b * ROWS);
  vi sizes = vi{};
  if (!tile.whole) {
    float values[ROWS][N * V];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int t = 0; t < N; t++) store(values[r] + t * V, sum[r][t]);
    for (int r = 0; r < rows; r++) put_runs(values[r], tile, work, (b * ROWS + r) * pitch);
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    if (r >= rows) break;
    const int64_t row = (b * ROWS + r) * pitch;
#pragma GCC unroll 8
    for (int t = 0; t < N; t++) {
      const int64_t to = row + tile.runs[t].to;
      vf v = sum[r][t];
      if (work.to.onto) v += load(work.to.onto + to);
      if (l.relu) v = relu(v);
      if (work.to.y) store(work.to.y + to, v);
      if (!work.to.q) continue;
      sizes = most_of(sizes, sizes_of(v));
      store_bytes(work.to.q + to, nearest(v, work.to.next));
    }
  }
  watch(work.to, sizes);
}

// Outputs of a Linear that are computed before they are stored: a cache line of each sample, so that each is written once. The
// samples are far apart, often by a power of two, and then few of their lines fit into the first-level cache together.
constexpr int GROUP8 = 16;

// Store outputs row .. row + count of the samples of a tile. sums: (count, vectors * V).
static __attribute__((noinline)) void put_samples(const float* sums, const Tile8& tile, const Work8& work, int64_t row,
                                                  int count) {
  const MuwsInt8& l = *work.plan->layer;
  const int64_t pitch = tile.vectors * V;
  const bool plain = work.to.y && !work.to.q && !work.to.onto && !l.relu;
  float lines[V * GROUP8];
  vi sizes = vi{};
  for (int64_t t = 0; t < tile.vectors; t++) {
    const int lanes = (int)least<int64_t>(V, tile.lanes - t * V);
    const int64_t at = (tile.at + t * V) * l.o + row;
    float* to = plain ? work.to.y + at : lines;
    for (int r = 0; r < count; r += V)
      transpose_block(sums + r * pitch + t * V, pitch, (int)least<int64_t>(V, count - r), V, to + r,
                      plain ? l.o : GROUP8, lanes, (int)least<int64_t>(V, count - r));
    for (int64_t i = 0; i < lanes && !plain; i++)
      put_line(lines + i * GROUP8, work.to, at + i * l.o, count, l.relu != 0, sizes);
  }
  watch(work.to, sizes);
}

template <int ROWS, int N, bool LOOSE> static void tile8_of(const Tile8& tile, const Work8& work) {
  const Int8Plan& p = *work.plan;
  const MuwsInt8& l = *p.layer;
  constexpr int NAMED = LOOSE ? 4 : 1, BYTES = LOOSE ? 1 : 4, AHEAD = LOOSE ? 0 : 3;
  const int64_t per_group = ceil_div(l.row_blocks, l.groups);
  const uint16_t* last = l.columns + NAMED * most<int64_t>(0, l.starts[work.last] - 1);
  float group[GROUP8 * N * V];
  int n_group = 0;
  for (int64_t b = work.first; b < work.last; b++) {
    const uint8_t* x = work.packed->planes + b / per_group * (p.planes / l.groups) * p.pitch + BYTES * tile.at;
    const uint16_t* column = l.columns + NAMED * (int64_t)l.starts[b];
    const uint16_t* end = l.columns + NAMED * (int64_t)l.starts[b + 1];
    const int8_t* w = l.weights + (int64_t)l.starts[b] * ROWS * 4;
    vi sum[ROWS][N] = {};
    // With few sums, one addition would wait for the last: every second block has separate sums.
    constexpr bool TWICE = ROWS * N <= 8;
    vi other[TWICE ? ROWS : 1][N] = {};
    for (int odd = 0; column != end; column += NAMED, w += 4 * ROWS, odd ^= 1) {
      if (((size_t)w & 63) < 4 * ROWS) fetch<ROWS>(w);
      vi in[N];
      if constexpr (LOOSE) {
        const uint8_t* from[4];
        for (int i = 0; i < 4; i++) from[i] = x + column[i] * p.pitch;
#pragma GCC unroll 8
        for (int t = 0; t < N; t++)
          in[t] = interleaved(from[0] + t * V, from[1] + t * V, from[2] + t * V, from[3] + t * V);
      } else {
        const uint8_t* from = x + *column * p.pitch;
        if constexpr (AHEAD > 0 && N * ROWS >= 4) {
          const uint8_t* next = x + *least(column + AHEAD, last) * p.pitch;
#pragma GCC unroll 8
          for (int t = 0; t < N; t++) __builtin_prefetch(next + t * 4 * V);
        }
#pragma GCC unroll 8
        for (int t = 0; t < N; t++) in[t] = load_int(from + t * 4 * V);
      }
      if constexpr (TWICE) {
        if (odd) {
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; r++) {
            const vi weight = splat_int(load_word(w + 4 * r));
#pragma GCC unroll 8
            for (int t = 0; t < N; t++) other[r][t] = dot4(other[r][t], in[t], weight);
          }
          continue;
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const vi weight = splat_int(load_word(w + 4 * r));
#pragma GCC unroll 8
        for (int t = 0; t < N; t++) sum[r][t] = dot4(sum[r][t], in[t], weight);
      }
    }
    if constexpr (TWICE)
      for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < N; t++) sum[r][t] += other[r][t];
    vf y[ROWS][N];
    scale_sums<ROWS, N>(sum, tile, work, b, y);
    if (!l.linear) {
      put_planes<ROWS, N>(y, tile, work, b);
      continue;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int t = 0; t < N; t++) store(group + ((n_group + r) * N + t) * V, y[r][t]);
    n_group += ROWS;
    if (n_group < GROUP8 && b + 1 < work.last) continue;
    const int64_t row = (b + 1) * ROWS - n_group;
    put_samples(group, tile, work, row, (int)least<int64_t>(n_group, l.o - row));
    n_group = 0;
  }
}

typedef void (*Tile8Fn)(const Tile8&, const Work8&);

template <int ROWS, int N> static Tile8Fn pick8(int64_t n, bool loose) {
  if constexpr (N > 1)
    if (n < N) return pick8<ROWS, N - 1>(n, loose);
  return loose ? tile8_of<ROWS, N, true> : tile8_of<ROWS, N, false>;
}
static int most_vectors8(int64_t rows) {
  return rows == 4 ? max_vectors8<4>() : rows == 2 ? max_vectors8<2>() : max_vectors8<1>();
}
static Tile8Fn choose_tile8(int64_t rows, int64_t n, bool loose) {
  return rows == 4   ? pick8<4, max_vectors8<4>()>(n, loose)
         : rows == 2 ? pick8<2, max_vectors8<2>()>(n, loose)
                     : pick8<1, max_vectors8<1>()>(n, loose);
}

// The sums of a block row for one sample, whose rounded inputs are x: lanes run over the rows.
template <int ROWS, bool LOOSE>
static void dot8_of(const MuwsInt8& l, const uint8_t* x, int64_t b, int32_t (&sums)[4]) {
  const int8_t* w = l.weights + (int64_t)l.starts[b] * ROWS * 4;
  const uint16_t* column = l.columns + (LOOSE ? 4 : 1) * (int64_t)l.starts[b];
  const int64_t n = l.starts[b + 1] - l.starts[b];
  const auto word = [&](int64_t i) {
    if constexpr (!LOOSE) return load_word(x + 4 * (int64_t)column[i]);
    const uint16_t* c = column + 4 * i;
    return (int32_t)((uint32_t)x[c[0]] | (uint32_t)x[c[1]] << 8 | (uint32_t)x[c[2]] << 16 | (uint32_t)x[c[3]] << 24);
  };
  const auto splat4 = [](int32_t i) { return vi4{i, i, i, i}; };
  vi4 sum[4] = {};
  if constexpr (ROWS == 4) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      fetch<16>(w + 16 * i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) sum[j] = dot4_short(sum[j], splat4(word(i + j)), load_int4(w + 16 * (i + j)));
    }
    for (; i < n; i++) sum[0] = dot4_short(sum[0], splat4(word(i)), load_int4(w + 16 * i));
    const vi4 total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    __builtin_memcpy(sums, &total, sizeof total);
  } else {  // lanes run over the rows of neighbouring blocks
    constexpr int BLOCKS = 4 / ROWS;
    int64_t i = 0;
    for (; i + BLOCKS <= n; i += BLOCKS) {
      int32_t in[4];
      for (int j = 0; j < 4; j++) in[j] = word(i + j / ROWS);
      sum[0] = dot4_short(sum[0], load_int4(in), load_int4(w + 4 * ROWS * i));
    }
    int32_t in[4] = {}, left[4] = {};
    for (int64_t j = 0; j < (n - i) * ROWS; j++) {
      in[j] = word(i + j / ROWS);
      left[j] = load_word(w + 4 * (ROWS * i + j));
    }
    sum[0] = dot4_short(sum[0], load_int4(in), load_int4(left));
    for (int r = 0; r < ROWS; r++) {
      sums[r] = 0;
      for (int j = r; j < 4; j += ROWS) sums[r] += sum[0][j];
    }
  }
}

typedef void (*Dot8Fn)(const MuwsInt8&, const uint8_t*, int64_t, int32_t (&)[4]);

static Dot8Fn choose_dot8(const MuwsInt8& l) {
  if (l.loose) return l.rows == 4 ? dot8_of<4, true> : l.rows == 2 ? dot8_of<2, true> : dot8_of<1, true>;
  return l.rows == 4 ? dot8_of<4, false> : l.rows == 2 ? dot8_of<2, false> : dot8_of<1, false>;
}

}  // namespace
