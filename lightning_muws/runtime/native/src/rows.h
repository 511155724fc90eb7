// Packs short rows of one image into the padded scratch, in whole vectors.
#pragma once
#include "plan.h"

namespace {

// HALF: the nearest bfloat16 (ties to even), in both halves of the lane. NaN stays NaN: its low bits could carry out.
template <bool HALF> MUWS_INLINE vf rounded(vf v) {
  if constexpr (!HALF) return v;
  const vi i = (vi)v;
  const vi half = ((i + 0x7fff + ((i >> 16) & 1)) >> 16) & 0xffff;
  const vi nan = v != v;
  const vi kept = (half & ~nan) | (nan & 0x7fc0);
  return bits(kept | (kept << 16));
}

struct Span {
  int64_t unit, n_units, row, n_rows;  // units of the batch, output rows of the band
};
struct Rows {
  int64_t first, last;  // of the scratch
};

// The rows of the next channels are far away: prefetch them while earlier ones are copied.
constexpr int64_t FETCH_CHANNELS = 4;

#if MUWS_LANES == 16
MUWS_INLINE __mmask16 below(int64_t n) { return (__mmask16)(n <= 0 ? 0 : n >= V ? 0xffff : (1 << n) - 1); }

// Rows of at most N vectors, column stride 1 or 2: load a row with the zeros around it, split its phases, store.
template <bool HALF, int STRIDE, int N>
static void pack_rows_of(const Plan& p, const float* x, float* scratch, Span s, Rows rows) {
  const MuwsLayer& l = p.layer;
  const int64_t plane = l.h * l.w, pitch = p.pitch, step = l.sh * l.w, top = s.row * l.sh - l.ph;
  const int64_t tail = rows.last == p.rows ? p.phase_stride - s.n_units * p.unit_stride : 0;
  const __mmask16 out = below(pitch - (N - 1) * V);
  __mmask16 in[STRIDE * N];
#pragma GCC unroll 8
  for (int i = 0; i < STRIDE * N; i++) in[i] = below(l.w + l.pw - i * V) & ~below(l.pw - i * V);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  for (int64_t a = 0; a < p.phases_h; a++) {
    const int64_t above = ceil_div(most<int64_t>(0, -top - a), l.sh);
    const int64_t first = most(rows.first, least(rows.last, above));
    const int64_t last = most(first, least(rows.last, ceil_div(most<int64_t>(0, l.h - top - a), l.sh)));
    for (int64_t c = 0; c < l.c; c++) {
      const float* image = x + (s.unit * l.c + c) * plane + (top + a + first * l.sh) * l.w;
      if (s.n_units == 1 && c + FETCH_CHANNELS < l.c)
        for (int64_t i = 0; i < (last - first) * step; i += 16) __builtin_prefetch(image + FETCH_CHANNELS * plane + i);
      float* phase = scratch + c * p.channel_stride + a * p.phases_w * p.phase_stride;
      for (int64_t u = 0; u < s.n_units; u++) {
        const float* from = image + u * l.c * plane - l.pw;
        float* to = phase + u * p.unit_stride + first * pitch;
        for (int64_t i = first; i < last; i++, to += pitch, from += step) {
#pragma GCC unroll 4
          for (int t = 0; t < N; t++) {
            const __mmask16 there = t + 1 < N ? 0xffff : out;
            __m512 v = _mm512_maskz_loadu_ps(in[STRIDE * t], from + STRIDE * t * V);
            if constexpr (STRIDE == 2) {
              const __m512 next = _mm512_maskz_loadu_ps(in[2 * t + 1], from + (2 * t + 1) * V);
              const __m512 odd = _mm512_permutex2var_ps(v, _mm512_add_epi32(even, _mm512_set1_epi32(1)), next);
              v = _mm512_permutex2var_ps(v, even, next);
              if (p.phases_w > 1)
                _mm512_mask_storeu_ps(to + p.phase_stride + t * V, there, (__m512)rounded<HALF>((vf)odd));
            }
            _mm512_mask_storeu_ps(to + t * V, there, (__m512)rounded<HALF>((vf)v));
          }
        }
        for (int64_t b = 0; b < p.phases_w; b++) {
          float* unit = phase + b * p.phase_stride + u * p.unit_stride;
          clear(unit + rows.first * pitch, (first - rows.first) * pitch);
          clear(unit + last * pitch, (rows.last - last) * pitch);
        }
      }
      for (int64_t b = 0; b < p.phases_w && tail > 0; b++)
        clear(phase + b * p.phase_stride + s.n_units * p.unit_stride, tail);
    }
  }
}

template <bool HALF, int STRIDE>
static void pack_rows_by(const Plan& p, const float* x, float* scratch, Span s, Rows rows) {
  const int64_t vectors = ceil_div(p.pitch, V);
  const auto pack = vectors == 1   ? pack_rows_of<HALF, STRIDE, 1>
                    : vectors == 2 ? pack_rows_of<HALF, STRIDE, 2>
                    : vectors == 3 ? pack_rows_of<HALF, STRIDE, 3>
                                   : pack_rows_of<HALF, STRIDE, 4>;
  pack(p, x, scratch, s, rows);
}
#endif

// Pack the rows if they are short enough; return whether they were.
template <bool HALF> static bool pack_short_rows(const Plan& p, const float* x, float* scratch, Span s, Rows rows) {
#if MUWS_LANES == 16
  if (p.layer.sw > 2 || p.pitch > 4 * V) return false;
  (p.layer.sw == 1 ? pack_rows_by<HALF, 1> : pack_rows_by<HALF, 2>)(p, x, scratch, s, rows);
  return true;
#else
  return false;
#endif
}

}  // namespace
