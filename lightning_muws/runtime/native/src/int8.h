// Whole numbers of 8 bits: products of four inputs with four weights, and the rounding of inputs.
#pragma once
#include "api.h"
#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

typedef int32_t vi4 __attribute__((vector_size(16)));
typedef uint8_t vb __attribute__((vector_size(V)));

MUWS_INLINE vi load_int(const void* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
MUWS_INLINE vi4 load_int4(const void* p) {
  vi4 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
MUWS_INLINE int32_t load_word(const void* p) {
  int32_t i;
  __builtin_memcpy(&i, p, sizeof i);
  return i;
}
MUWS_INLINE vi splat_int(int32_t i) {
  float same_bits;
  __builtin_memcpy(&same_bits, &i, sizeof i);
  return (vi)splat(same_bits);
}

// sum + the products of each lane's four inputs (unsigned) with its four weights (signed). It is exact on every level: the
// instruction of AVX2 that multiplies bytes saturates, so bytes are widened there.
#if defined(__AVX2__)
#define MUWS_WIDENED(bits, P)                                                                                  \
  const auto even = _mm##bits##_and_si##P(in, _mm##bits##_set1_epi16(255)), odd = _mm##bits##_srli_epi16(in, 8); \
  const auto low = _mm##bits##_srai_epi16(_mm##bits##_slli_epi16(w, 8), 8), high = _mm##bits##_srai_epi16(w, 8); \
  return _mm##bits##_add_epi32(_mm##bits##_madd_epi16(even, low), _mm##bits##_madd_epi16(odd, high))
#endif

#if MUWS_LANES == 16
#if defined(__AVX512VNNI__)
MUWS_INLINE vi dot4(vi sum, vi in, vi weight) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)in, (__m512i)weight);
}
#else
MUWS_INLINE __m512i widened(__m512i in, __m512i w) { MUWS_WIDENED(512, 512); }
MUWS_INLINE vi dot4(vi sum, vi in, vi weight) { return sum + (vi)widened((__m512i)in, (__m512i)weight); }
#endif
#elif MUWS_LANES == 8
#if defined(__AVXVNNI__)
MUWS_INLINE vi dot4(vi sum, vi in, vi weight) {
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)in, (__m256i)weight);
}
#else
MUWS_INLINE __m256i widened(__m256i in, __m256i w) { MUWS_WIDENED(256, 256); }
MUWS_INLINE vi dot4(vi sum, vi in, vi weight) { return sum + (vi)widened((__m256i)in, (__m256i)weight); }
#endif
#endif

#if defined(__AVX512VNNI__)
MUWS_INLINE vi4 dot4_short(vi4 sum, vi4 in, vi4 weight) {
  return (vi4)_mm_dpbusd_epi32((__m128i)sum, (__m128i)in, (__m128i)weight);
}
#elif defined(__AVXVNNI__)
MUWS_INLINE vi4 dot4_short(vi4 sum, vi4 in, vi4 weight) {
  return (vi4)_mm_dpbusd_avx_epi32((__m128i)sum, (__m128i)in, (__m128i)weight);
}
#elif defined(__SSE2__)
MUWS_INLINE vi4 dot4_short(vi4 sum, vi4 in4, vi4 weight) {
  const __m128i in = (__m128i)in4, w = (__m128i)weight;
  const __m128i even = _mm_and_si128(in, _mm_set1_epi16(255)), odd = _mm_srli_epi16(in, 8);
  const __m128i low = _mm_srai_epi16(_mm_slli_epi16(w, 8), 8), high = _mm_srai_epi16(w, 8);
  return sum + (vi4)_mm_add_epi32(_mm_madd_epi16(even, low), _mm_madd_epi16(odd, high));
}
#else
MUWS_INLINE vi4 dot4_short(vi4 sum, vi4 in, vi4 weight) {
  typedef uint32_t vu4 __attribute__((vector_size(16)));
  const vu4 u = (vu4)in, w = (vu4)weight;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) sum += (vi4)(u >> (8 * i) & 255) * ((vi4)(w << (24 - 8 * i)) >> 24);
  return sum;
}
#endif
#if MUWS_LANES == 4
MUWS_INLINE vi dot4(vi sum, vi in, vi weight) { return (vi)dot4_short((vi4)sum, (vi4)in, (vi4)weight); }
#endif

// How one input is rounded: q = clamp(nearest(x * inverse) + zero, 0, 255), ties to even.
struct Rounding {
  float inverse;
  int32_t zero;
};

MUWS_INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }
MUWS_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }  // b if a is NaN

// The numbers 0 .. 255 in lanes of 32 bits. Adding 1.5 * 2 ** 23 leaves no bits below the unit: that rounds to the nearest.
MUWS_INLINE vi nearest(vf x, Rounding to) {
  const vf scaled = larger(x * splat(to.inverse), splat((float)-to.zero));
  const vf shifted = smaller(scaled, splat((float)(255 - to.zero))) + splat(12582912.0f);
  return (vi)shifted - splat_int(0x4b400000 - to.zero);
}

// Watches for NaN and infinity: as whole numbers, their bits are the largest.
MUWS_INLINE vi sizes_of(vf x) { return (vi)x & splat_int(0x7fffffff); }
MUWS_INLINE vi most_of(vi a, vi b) { return a > b ? a : b; }
MUWS_INLINE bool is_finite(vi sizes) {
  int32_t most_size = 0;
  for (int i = 0; i < V; i++) most_size = most(most_size, (int32_t)sizes[i]);
  return most_size < 0x7f800000;
}

MUWS_INLINE vb bytes_of(vi v) {
#if MUWS_LANES == 16
  return (vb)_mm512_cvtepi32_epi8((__m512i)v);
#else
  return __builtin_convertvector(v, vb);
#endif
}
MUWS_INLINE void store_bytes(uint8_t* to, vi v) {
  const vb b = bytes_of(v);
  __builtin_memcpy(to, &b, sizeof b);
}

MUWS_INLINE void store_words(uint8_t* to, vi v, int64_t n) {
#if MUWS_LANES == 16
  _mm512_mask_storeu_epi32(to, (__mmask16)(n < V ? (1u << n) - 1 : 0xffff), (__m512i)v);
#else
  __builtin_memcpy(to, &v, 4 * (size_t)least<int64_t>(n, V));
#endif
}
MUWS_INLINE void copy_bytes(uint8_t* to, const uint8_t* from, int64_t n) {
#if MUWS_LANES == 16
  for (int64_t i = 0; i < n; i += V) {
    const __mmask16 there = (__mmask16)(n - i < V ? (1u << (n - i)) - 1 : 0xffff);
    _mm_mask_storeu_epi8(to + i, there, _mm_maskz_loadu_epi8(there, from + i));
  }
#else
  __builtin_memcpy(to, from, (size_t)n);
#endif
}

MUWS_INLINE vf load_some(const float* from, int64_t n) {
#if MUWS_LANES == 16
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), from);
#else
  float lanes[V] = {};
  __builtin_memcpy(lanes, from, 4 * (size_t)n);
  return load(lanes);
#endif
}

MUWS_INLINE void store_some(float* to, vf v, int64_t n) {
#if MUWS_LANES == 16
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  __builtin_memcpy(to, &v, 4 * (size_t)n);
#endif
}
MUWS_INLINE void store_some_bytes(uint8_t* to, vi v, int64_t n) {
#if MUWS_LANES == 16
  _mm512_mask_cvtepi32_storeu_epi8(to, (__mmask16)((1u << n) - 1), (__m512i)v);
#else
  const vb b = bytes_of(v);
  __builtin_memcpy(to, &b, (size_t)n);
#endif
}

// Where the outputs of a layer go: float32, bytes for the next layer, or both.
struct Output8 {
  const float* onto;  // is added first, or null
  float* y;
  uint8_t* q;
  Rounding next;
  int* broken;        // 1 after bytes were made of NaN or infinity

  Output8 from(int64_t at) const {
    return Output8{onto ? onto + at : onto, y ? y + at : y, q ? q + at : q, next, broken};
  }
};

MUWS_INLINE void watch(const Output8& to, vi sizes) {
  if (to.q && !is_finite(sizes)) __atomic_store_n(to.broken, 1, __ATOMIC_RELAXED);
}

// Add, apply ReLU, and store n neighbouring outputs from place `at` on.
MUWS_INLINE void put_line(const float* values, const Output8& to, int64_t at, int64_t n, bool ends_in_relu, vi& sizes) {
  for (int64_t i = 0; i < n; i += V) {
    const int64_t count = least<int64_t>(V, n - i);
    vf v = count == V ? load(values + i) : load_some(values + i, count);
    if (to.onto) v += count == V ? load(to.onto + at + i) : load_some(to.onto + at + i, count);
    if (ends_in_relu) v = relu(v);
    if (to.y) store_some(to.y + at + i, v, count);
    if (!to.q) continue;
    sizes = most_of(sizes, sizes_of(v));
    store_some_bytes(to.q + at + i, nearest(v, to.next), count);
  }
}

// Round n numbers; writes up to V - 1 bytes more. `sizes` grows to the largest size of each lane.
MUWS_INLINE void round_row(const float* x, int64_t n, Rounding rounding, uint8_t* to, vi& sizes) {
  for (int64_t i = 0; i < n; i += V) {
    const vf v = i + V <= n ? load(x + i) : load_some(x + i, n - i);
    sizes = most_of(sizes, sizes_of(v));
    store_bytes(to + i, nearest(v, rounding));
  }
}

// Write n equal bytes, and up to V - 1 more.
MUWS_INLINE void fill_bytes(uint8_t* to, int value, int64_t n) {
  const vi word = splat_int((int32_t)((uint32_t)value * 0x01010101u));
  for (int64_t i = 0; i < n; i += V) __builtin_memcpy(to + i, &word, V);
}

// The four bytes at the same place of four rows, for V places.
MUWS_INLINE vi interleaved(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
#if MUWS_LANES == 16
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)a));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)b), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)c), 2);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)d), 3);
  v = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (vi)_mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(turn));
#else
  vb row[4];
  __builtin_memcpy(&row[0], a, V);
  __builtin_memcpy(&row[1], b, V);
  __builtin_memcpy(&row[2], c, V);
  __builtin_memcpy(&row[3], d, V);
  vi v = __builtin_convertvector(row[0], vi);
  for (int i = 1; i < 4; i++) v |= __builtin_convertvector(row[i], vi) << (8 * i);
  return v;
#endif
}

}  // namespace
