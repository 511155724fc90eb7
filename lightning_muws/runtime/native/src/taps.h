// Unfolds small images: one plane for every tap of the kernel.
#pragma once
#include "rows.h"

namespace {

#if MUWS_LANES == 16
// The sources of V outputs of a tap: lane l reads number lane[l] from `from` on in an image's plane.
struct Window {
  int32_t lane[V];
  int32_t from;
  __mmask16 there[4];  // of each vector from there on, which numbers are inside the plane
  __mmask16 filled, upper;  // lanes that have a source; lanes whose source is in the third or fourth vector
  int16_t vectors;  // 1, 2 or 4
};

// The windows of all taps and vectors, or null if one spans more than four vectors.
static Window* make_windows(const MuwsLayer& l) {
  const int64_t vectors = ceil_div(l.oh * l.ow, V);
  Window* windows = (Window*)malloc(sizeof(Window) * (size_t)(l.kh * l.kw * vectors));
  for (int64_t i = 0; windows && i < l.kh * l.kw * vectors; i++) {
    const int64_t a = i / vectors / l.kw, b = i / vectors % l.kw, start = i % vectors * V;
    int64_t place[V], first = l.h * l.w, last = 0;
    for (int64_t t = 0; t < V; t++) {
      const int64_t at = start + t, row = at / l.ow * l.sh + a - l.ph, column = at % l.ow * l.sw + b - l.pw;
      const bool inside = at < l.oh * l.ow && row >= 0 && row < l.h && column >= 0 && column < l.w;
      place[t] = inside ? row * l.w + column : -1;
      if (inside) first = least(first, place[t]), last = most(last, place[t]);
    }
    Window& w = windows[i];
    w = Window{};
    w.from = (int32_t)least(first, last);
    w.vectors = last - w.from < V ? 1 : last - w.from < 2 * V ? 2 : 4;
    if (last - w.from >= 4 * V) {
      free(windows);
      return nullptr;
    }
    for (int64_t k = 0; k < w.vectors; k++) w.there[k] = below(l.h * l.w - w.from - k * V);
    for (int64_t t = 0; t < V; t++) {
      if (place[t] < 0) continue;
      w.lane[t] = (int32_t)(place[t] - w.from);
      w.filled |= (__mmask16)(1 << t);
      if (w.lane[t] >= 2 * V) w.upper |= (__mmask16)(1 << t);
    }
  }
  return windows;
}

// Packs one window of every channel.
template <int VECTORS>
static void pack_window(const Window& w, const MuwsLayer& l, const float* x, float* to, int64_t stride) {
  const __m512i lane = _mm512_loadu_si512(w.lane);
  const float* from = x + w.from;
  for (int64_t c = 0; c < l.c; c++, from += l.h * l.w, to += stride) {
    __m512 v[4];
#pragma GCC unroll 4
    for (int k = 0; k < VECTORS; k++) v[k] = _mm512_maskz_loadu_ps(w.there[k], from + k * V);
    if constexpr (VECTORS == 1) v[0] = _mm512_maskz_permutexvar_ps(w.filled, lane, v[0]);
    if constexpr (VECTORS > 1) v[0] = _mm512_maskz_permutex2var_ps(w.filled, v[0], lane, v[1]);
    if constexpr (VECTORS > 2) v[0] = _mm512_mask_mov_ps(v[0], w.upper, _mm512_permutex2var_ps(v[2], lane, v[3]));
    store(to, (vf)v[0]);
  }
}

static void pack_windows(const Plan& p, const float* x, float* scratch, Span s) {
  const MuwsLayer& l = p.source;
  const int64_t vectors = ceil_div(l.oh * l.ow, V), taps = l.kh * l.kw;
  const float* images = x + s.unit * l.c * l.h * l.w;
  for (int64_t i = 0; i < taps * vectors; i++) {
    const Window& w = ((const Window*)p.windows)[i];
    float* to = scratch + i / vectors * p.channel_stride + i % vectors * V;
    const auto pack = w.vectors == 1 ? pack_window<1> : w.vectors == 2 ? pack_window<2> : pack_window<4>;
    pack(w, l, images, to, taps * p.channel_stride);
  }
}
#endif

// Packs every tap of the kernel as a plane of the output's size: what the outputs read through that tap. Rows are
// stored in whole vectors; the next row overwrites what is too much.
static void pack_taps(const Plan& p, const float* x, float* scratch, Span s) {
#if MUWS_LANES == 16
  if (p.windows) return pack_windows(p, x, scratch, s);
#endif
  const MuwsLayer& l = p.source;
  const int64_t pitch = ceil_div(l.w + 2 * l.pw, l.sw), phase = (l.h + 2 * l.ph) * pitch;
  float* padded = muws_scratch(1, (size_t)(l.sw * phase + 2 * V));
  clear(padded, l.sw * phase + 2 * V);
  for (int64_t c = 0; c < l.c; c++) {
    const float* image = x + (s.unit * l.c + c) * l.h * l.w;
    for (int64_t i = 0; i < l.h; i++) {
      const float* from = image + i * l.w;
      float* to = padded + (i + l.ph) * pitch;
      if (l.sw == 1) {
        copy(to + l.pw, from, l.w);
        continue;
      }
      for (int64_t b = 0; b < l.sw; b++) {
        const int64_t first = (b + l.sw - l.pw % l.sw) % l.sw, count = ceil_div(l.w - first, l.sw);
        float* there = to + b * phase + (first + l.pw) / l.sw;
        if (l.sw == 2)
          copy_every_second(there, from + first, count);
        else
          for (int64_t j = 0; j < count; j++) there[j] = from[first + l.sw * j];
      }
    }
    for (int64_t a = 0; a < l.kh; a++)
      for (int64_t b = 0; b < l.kw; b++) {
        float* to = scratch + ((c * l.kh + a) * l.kw + b) * p.channel_stride;
        const float* from = padded + b % l.sw * phase + a * pitch + b / l.sw;
        for (int64_t i = 0; i < l.oh; i++, to += l.ow, from += l.sh * pitch)
          for (int64_t j = 0; j < l.ow; j += V) store(to + j, load(from + j));
      }
  }
}

}  // namespace
