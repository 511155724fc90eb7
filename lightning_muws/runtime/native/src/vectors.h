// Vectors of this level's width, by the vector extensions of GCC and clang.
// A level must not include a header of the C++ library: its inline functions would be compiled with this level's
// instructions, and the linker may keep that copy for all machines.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define MUWS_LANES 16
#elif defined(__AVX2__)
#define MUWS_LANES 8
#else
#define MUWS_LANES 4
#endif

namespace {

constexpr int V = MUWS_LANES;
typedef float vf __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));
typedef float vf4 __attribute__((vector_size(16)));

#define MUWS_INLINE static inline __attribute__((always_inline))

MUWS_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
MUWS_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
// Written out, because `vf{} + s` costs an addition.
#if MUWS_LANES == 16
MUWS_INLINE vf splat(float s) { return vf{s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s}; }
#elif MUWS_LANES == 8
MUWS_INLINE vf splat(float s) { return vf{s, s, s, s, s, s, s, s}; }
#else
MUWS_INLINE vf splat(float s) { return vf{s, s, s, s}; }
#endif
MUWS_INLINE vf bits(vi v) { return (vf)v; }
MUWS_INLINE vf relu(vf v) { return bits((vi)v & ~(v < 0.0f)); }  // keeps NaN, as torch does

// Prefetch the weights that are needed some microseconds later: they are read in order, from far away. Into all caches: with
// the hint that they are needed once, an Intel Xeon never kept them in its second-level cache.
constexpr int64_t FETCH_BYTES = 4096;
template <int WORDS> MUWS_INLINE void fetch(const void* weights) {
#pragma GCC unroll 8
  for (int i = 0; i < (WORDS + 15) / 16; i++)
    __builtin_prefetch((const char*)weights + FETCH_BYTES + 64 * i, 0, 3);
}

template <class T> MUWS_INLINE T least(T a, T b) { return a < b ? a : b; }
template <class T> MUWS_INLINE T most(T a, T b) { return a > b ? a : b; }
MUWS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__clang__) || __GNUC__ >= 12
#define MUWS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MUWS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// Interleave the lower or the upper halves of a and b.
#if MUWS_LANES == 16
MUWS_INLINE vf zip_low(vf a, vf b) { return MUWS_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
MUWS_INLINE vf zip_high(vf a, vf b) {
  return MUWS_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif MUWS_LANES == 8
MUWS_INLINE vf zip_low(vf a, vf b) { return MUWS_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
MUWS_INLINE vf zip_high(vf a, vf b) { return MUWS_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
MUWS_INLINE vf zip_low(vf a, vf b) { return MUWS_SHUFFLE(a, b, 0, 4, 1, 5); }
MUWS_INLINE vf zip_high(vf a, vf b) { return MUWS_SHUFFLE(a, b, 2, 6, 3, 7); }
#endif

// Every second of the 2 V - 1 numbers at p; reads nothing past the last.
#if MUWS_LANES == 16
MUWS_INLINE vf every_second(const float* p) {
  return MUWS_SHUFFLE(load(p), load(p + V - 1), 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
}
#elif MUWS_LANES == 8
MUWS_INLINE vf every_second(const float* p) {
  return MUWS_SHUFFLE(load(p), load(p + V - 1), 0, 2, 4, 6, 9, 11, 13, 15);
}
#else
MUWS_INLINE vf every_second(const float* p) { return MUWS_SHUFFLE(load(p), load(p + V - 1), 0, 2, 5, 7); }
#endif

// to[i] = from[2 * i] for n numbers.
MUWS_INLINE void copy_every_second(float* to, const float* from, int64_t n) {
  if (n >= V) {
    for (int64_t i = 0; i + V <= n; i += V) store(to + i, every_second(from + 2 * i));
    store(to + n - V, every_second(from + 2 * (n - V)));
  } else if (n >= 4) {
    for (int64_t at = 0; at < n; at += 4) {
      const int64_t i = least(at, n - 4);
      const float four[4] = {from[2 * i], from[2 * i + 2], from[2 * i + 4], from[2 * i + 6]};
      __builtin_memcpy(to + i, four, sizeof four);
    }
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = from[2 * i];
  }
}

// Transpose V vectors in place: log2(V) perfect shuffles.
MUWS_INLINE void transpose(vf (&m)[V]) {
#pragma GCC unroll 4
  for (int step = 1; step < V; step *= 2) {
    vf next[V];
#pragma GCC unroll 16
    for (int i = 0; i < V / 2; i++) {
      next[2 * i] = zip_low(m[i], m[i + V / 2]);
      next[2 * i + 1] = zip_high(m[i], m[i + V / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) m[i] = next[i];
  }
}

// Transpose a block of up to V x V numbers; missing rows and columns count as zero.
inline void transpose_block(const float* from, int64_t pitch, int rows, int cols, float* to, int64_t to_pitch,
                            int to_rows, int to_cols) {
  vf m[V];
  if (rows == V && cols == V) {
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) m[i] = load(from + i * pitch);
  } else {
    for (int i = 0; i < V; i++) {
      float row[V] = {};
      if (i < rows) __builtin_memcpy(row, from + i * pitch, 4 * (size_t)cols);
      m[i] = load(row);
    }
  }
  transpose(m);
  if (to_rows == V && to_cols == V) {
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) store(to + i * to_pitch, m[i]);
  } else {
    for (int i = 0; i < to_rows; i++) {
      float row[V];
      store(row, m[i]);
      __builtin_memcpy(to + i * to_pitch, row, 4 * (size_t)to_cols);
    }
  }
}

MUWS_INLINE void copy(float* to, const float* from, int64_t n) {
  if (n >= V) {
    for (int64_t i = 0; i + V <= n; i += V) store(to + i, load(from + i));
    store(to + n - V, load(from + n - V));
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = from[i];
  }
}
MUWS_INLINE void clear(float* to, int64_t n) {
  if (n >= V) {
    for (int64_t i = 0; i + V <= n; i += V) store(to + i, vf{});
    store(to + n - V, vf{});
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = 0.0f;
  }
}

}  // namespace
