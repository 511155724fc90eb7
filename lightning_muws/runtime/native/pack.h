// Knows how an input becomes padded scratch, and how finished positions become the output.
#pragma once
#include "plan.h"

namespace {

// bfloat16: the nearest (ties to even), in both halves of the lane. NaN stays NaN: the hidden bits could carry out.
template <bool HALF> MUWS_INLINE vf rounded(vf v) {
  if constexpr (!HALF) return v;
  const vi i = (vi)v;
  const vi half = ((i + 0x7fff + ((i >> 16) & 1)) >> 16) & 0xffff;
  const vi nan = v != v;
  const vi kept = (half & ~nan) | (nan & 0x7fc0);
  return bits(kept | (kept << 16));
}
template <bool HALF> MUWS_INLINE float rounded_one(float f) { return rounded<HALF>(splat(f))[0]; }

template <bool HALF> MUWS_INLINE void copy_rounded(float* to, const float* from, int64_t n) {
  if (n >= V) {
    for (int64_t i = 0; i + V <= n; i += V) store(to + i, rounded<HALF>(load(from + i)));
    store(to + n - V, rounded<HALF>(load(from + n - V)));
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = rounded_one<HALF>(from[i]);
  }
}

struct Span {
  int64_t unit, n_units, row, n_rows;  // units of the batch, output rows of the band
};
struct Rows {
  int64_t first, last;  // of the scratch
};

// First and one past the last column of a phase that lie inside the input.
MUWS_INLINE void inside(int64_t phase, int64_t stride, int64_t pad, int64_t size, int64_t pitch, int64_t& a, int64_t& b) {
  a = least(pitch, most<int64_t>(0, ceil_div(pad - phase, stride)));
  b = most(a, least(pitch, ceil_div(size + pad - phase, stride)));
}

// Write zeros where a unit's padded planes of one channel hold no input.
static void clear_border(const Plan& p, float* plane, int64_t row, Rows rows) {
  const MuwsLayer& l = p.layer;
  for (int64_t a = 0; a < p.phases_h; a++)
    for (int64_t b = 0; b < p.phases_w; b++) {
      int64_t first, last;
      inside(b, l.sw, l.pw, l.w, p.pitch, first, last);
      float* at = plane + ((a * p.phases_w + b) * p.phase_stride + rows.first * p.pitch) * p.lanes;
      for (int64_t i = rows.first; i < rows.last; i++, at += p.pitch * p.lanes) {
        const int64_t h = a + l.sh * (row + i) - l.ph;
        if (h < 0 || h >= l.h) {
          clear(at, p.pitch * p.lanes);
        } else {
          if (first > 0) clear(at, first * p.lanes);
          if (last < p.pitch) clear(at + last * p.lanes, (p.pitch - last) * p.lanes);
        }
      }
    }
}

// Rows of a channel lie far from those of the next: ask for them while earlier ones are copied.
constexpr int64_t FETCH_CHANNELS = 4;

#if MUWS_LANES == 16
MUWS_INLINE __mmask16 below(int64_t n) { return (__mmask16)(n <= 0 ? 0 : n >= V ? 0xffff : (1 << n) - 1); }

// Without a stride, rows of at most N vectors: each is loaded with the zeros around it, and stored whole.
template <bool HALF, int N> static void pack_short_rows(const Plan& p, const float* x, float* scratch, Span s, Rows rows) {
  const MuwsLayer& l = p.layer;
  const int64_t plane = l.h * l.w, pitch = p.pitch, width = l.w, top = s.row - l.ph;
  const int64_t first = most(rows.first, least(rows.last, -top)), last = most(first, least(rows.last, l.h - top));
  const int64_t tail = rows.last == p.rows ? p.phase_stride - s.n_units * p.unit_stride : 0;
  const __mmask16 out = below(pitch - (N - 1) * V);
  __mmask16 in[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; i++) in[i] = below(l.w + l.pw - i * V) & ~below(l.pw - i * V);
  for (int64_t c = 0; c < l.c; c++) {
    const float* image = x + (s.unit * l.c + c) * plane + (top + first) * width;
    if (s.n_units == 1 && c + FETCH_CHANNELS < l.c)
      for (int64_t i = 0; i < (last - first) * width; i += 16) __builtin_prefetch(image + FETCH_CHANNELS * plane + i);
    for (int64_t u = 0; u < s.n_units; u++) {
      float* unit = scratch + c * p.channel_stride + u * p.unit_stride;
      const float* from = image + u * l.c * plane - l.pw;
      clear(unit + rows.first * pitch, (first - rows.first) * pitch);
      float* to = unit + first * pitch;
      for (int64_t i = first; i < last; i++, to += pitch, from += width) {
#pragma GCC unroll 4
        for (int t = 0; t + 1 < N; t++) store(to + t * V, rounded<HALF>((vf)_mm512_maskz_loadu_ps(in[t], from + t * V)));
        const vf end = rounded<HALF>((vf)_mm512_maskz_loadu_ps(in[N - 1], from + (N - 1) * V));
        _mm512_mask_storeu_ps(to + (N - 1) * V, out, (__m512)end);
      }
      clear(to, (rows.last - last) * pitch);
    }
    if (tail > 0) clear(scratch + c * p.channel_stride + s.n_units * p.unit_stride, tail);
  }
}
#endif

// Lanes over positions: rows are copied, strided rows gathered.
template <bool HALF> static void pack_rows(const Plan& p, const float* x, float* scratch, Span s, Rows rows) {
  const MuwsLayer& l = p.layer;
#if MUWS_LANES == 16
  if (l.sh == 1 && l.sw == 1 && p.pitch <= 4 * V) {
    const int64_t vectors = ceil_div(p.pitch, V);
    const auto pack = vectors == 1   ? pack_short_rows<HALF, 1>
                      : vectors == 2 ? pack_short_rows<HALF, 2>
                      : vectors == 3 ? pack_short_rows<HALF, 3>
                                     : pack_short_rows<HALF, 4>;
    return pack(p, x, scratch, s, rows);
  }
#endif
  const int64_t tail = p.phase_stride - s.n_units * p.unit_stride;
  const int64_t top = most<int64_t>(0, (s.row + rows.first) * l.sh - l.ph), plane = l.h * l.w;
  const int64_t ahead = (least(l.h, (s.row + rows.last) * l.sh - l.ph) - top) * l.w;
  for (int64_t c = 0; c < l.c; c++) {
    if (s.n_units == 1 && c + FETCH_CHANNELS < l.c) {
      const float* next = x + (s.unit * l.c + c + FETCH_CHANNELS) * plane + top * l.w;
      for (int64_t i = 0; i < ahead; i += 16) __builtin_prefetch(next + i);
    }
    for (int64_t a = 0; a < p.phases_h; a++)
      for (int64_t b = 0; b < p.phases_w; b++) {
        float* phase = scratch + c * p.channel_stride + (a * p.phases_w + b) * p.phase_stride;
        int64_t first, last;
        inside(b, l.sw, l.pw, l.w, p.pitch, first, last);
        for (int64_t u = 0; u < s.n_units; u++) {
          const float* image = x + ((s.unit + u) * l.c + c) * l.h * l.w;
          for (int64_t i = rows.first; i < rows.last; i++) {
            float* to = phase + u * p.unit_stride + i * p.pitch;
            const int64_t h = a + l.sh * (s.row + i) - l.ph;
            if (h < 0 || h >= l.h) {
              clear(to, p.pitch);
              continue;
            }
            for (int64_t j = 0; j < first; j++) to[j] = 0.0f;
            const float* from = image + h * l.w + b - l.pw;
            if (l.sw == 1)
              copy_rounded<HALF>(to + first, from + first, last - first);
            else if (l.sw == 2 && !HALF)
              copy_every_second(to + first, from + 2 * first, last - first);
            else
              for (int64_t j = first; j < last; j++) to[j] = rounded_one<HALF>(from[l.sw * j]);
            for (int64_t j = last; j < p.pitch; j++) to[j] = 0.0f;
          }
        }
        if (tail > 0 && rows.last == p.rows) clear(phase + s.n_units * p.unit_stride, tail);
      }
  }
}

// Every tap of the kernel as a plane of the outputs' size: what the outputs read there. Rows are stored in whole vectors,
// and what they write too much the next row writes over.
static void pack_taps(const Plan& p, const float* x, float* scratch, Span s) {
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

// Lanes over images: V positions of V images are transposed at a time and put to their places.
template <bool HALF> static void pack_plane(const Plan& p, const float* image, float* to, int64_t shift, int64_t images,
                                            int64_t first, int64_t last) {
  const MuwsLayer& l = p.layer;
  const int64_t pitch = l.c * l.h * l.w;
  for (int64_t at = first; at < last; at += V) {
    const int64_t start = last - first >= V ? least(at, last - V) : at;
    const int count = (int)least<int64_t>(V, last - start);
    vf m[V];
    if (images == V && count == V) {
#pragma GCC unroll 16
      for (int i = 0; i < V; i++) m[i] = load(image + i * pitch + start);
    } else {
      for (int i = 0; i < V; i++) {
        float row[V] = {};
        if (i < images) __builtin_memcpy(row, image + i * pitch + start, 4 * (size_t)count);
        m[i] = load(row);
      }
    }
    transpose(m);
#pragma GCC unroll 16
    for (int i = 0; i < V; i++)
      if (i < count && p.places[start + i] >= 0) store(to + p.places[start + i] - shift, rounded<HALF>(m[i]));
  }
}

template <bool HALF> static void pack_images(const Plan& p, const float* x, float* scratch, Span s, Rows rows) {
  const MuwsLayer& l = p.layer;
  const int64_t plane = l.h * l.w, shift = s.row * p.pitch * V;
  const int64_t first = most<int64_t>(0, (s.row + rows.first) * l.sh - l.ph) * l.w;
  const int64_t last = most(first, least(l.h, (s.row + rows.last) * l.sh - l.ph) * l.w);
  const bool bordered = p.pitch != l.w || l.ph || l.pw || p.phases_h * p.phases_w > 1 || l.h < p.rows + s.row;
  for (int64_t u = 0; u < s.n_units; u++) {
    const int64_t start = (s.unit + u) * V, images = least<int64_t>(V, l.n - start);
    float* unit = scratch + u * p.unit_stride * V;
    if (plane == 1 && !l.batch_last_in && !bordered) {
      for (int64_t c = 0; c < l.c; c += V) {
        const int count = (int)least<int64_t>(V, l.c - c);
        float* to = unit + c * p.channel_stride;
        transpose_block(x + start * l.c + c, l.c, (int)images, count, to, p.channel_stride, count, V);
        if (HALF)
          for (int i = 0; i < count; i++) store(to + i * p.channel_stride, rounded<HALF>(load(to + i * p.channel_stride)));
      }
      continue;
    }
    for (int64_t c = 0; c < l.c; c++) {
      float* to = unit + c * p.channel_stride;
      if (bordered) clear_border(p, to, s.row, rows);
      if (!l.batch_last_in) {
        if (c + 1 < l.c && plane > V)  // the next channel lies far from this one
          for (int64_t i = 0; i < images; i++)
            for (int64_t j = first; j < last; j += 16) __builtin_prefetch(x + ((start + i) * l.c + c + 1) * plane + j);
        pack_plane<HALF>(p, x + (start * l.c + c) * plane, to, shift, images, first, last);
        continue;
      }
      for (int64_t i = first; i < last; i++) {
        if (p.places[i] < 0) continue;
        const float* from = x + (c * plane + i) * l.n + start;
        if (images == V) {
          store(to + p.places[i] - shift, rounded<HALF>(load(from)));
        } else {
          float row[V] = {};
          __builtin_memcpy(row, from, 4 * (size_t)images);
          store(to + p.places[i] - shift, rounded<HALF>(load(row)));
        }
      }
    }
  }
}

// Lanes over images, the other way: done holds (output, unit, position) times V for outputs first .. last.
static void unpack_images(const Plan& p, const float* done, float* y, Span s, int64_t first, int64_t last) {
  const MuwsLayer& l = p.layer;
  const int64_t plane = l.oh * l.ow, count = s.n_rows * l.ow, pitch = s.n_units * count * V;
  for (int64_t u = 0; u < s.n_units; u++) {
    const int64_t start = (s.unit + u) * V;
    const int images = (int)least<int64_t>(V, l.n - start);
    const float* unit = done + u * count * V;
    if (plane == 1 && !l.batch_last_out) {
      for (int64_t o = first; o < last; o += V) {
        const int rows = (int)least<int64_t>(V, last - o);
        transpose_block(unit + (o - first) * pitch, pitch, rows, V, y + start * l.o + o, l.o, images, rows);
      }
      continue;
    }
    for (int64_t o = first; o < last; o++) {
      const float* from = unit + (o - first) * pitch;
      if (l.batch_last_out) {
        float* to = y + (o * plane + s.row * l.ow) * l.n + start;
        for (int64_t i = 0; i < count; i++) copy(to + i * l.n, from + i * V, images);
        continue;
      }
      float* to = y + (start * l.o + o) * plane + s.row * l.ow;
      for (int64_t at = 0; at < count; at += V) {
        const int64_t i = count >= V ? least(at, count - V) : at;
        const int rows = (int)least<int64_t>(V, count - i);
        transpose_block(from + i * V, V, rows, V, to + i, l.o * plane, images, rows);
      }
    }
  }
}

}  // namespace
