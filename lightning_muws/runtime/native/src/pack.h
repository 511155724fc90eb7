// Packs an input into the padded scratch, and unpacks finished positions into the output.
#pragma once
#include "taps.h"

namespace {

template <bool HALF> MUWS_INLINE float rounded_one(float f) { return rounded<HALF>(splat(f))[0]; }

template <bool HALF> MUWS_INLINE void copy_rounded(float* to, const float* from, int64_t n) {
  if (n >= V) {
    for (int64_t i = 0; i + V <= n; i += V) store(to + i, rounded<HALF>(load(from + i)));
    store(to + n - V, rounded<HALF>(load(from + n - V)));
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = rounded_one<HALF>(from[i]);
  }
}

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

// Lanes over positions: copy rows, gather strided rows.
template <bool HALF> static void pack_rows(const Plan& p, const float* x, float* scratch, Span s, Rows rows) {
  const MuwsLayer& l = p.layer;
  if (pack_short_rows<HALF>(p, x, scratch, s, rows)) return;
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

// Lanes over images: transpose V positions of V images at a time, and store them at their places.
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
        if (c + 1 < l.c && plane > V)  // the next channel is far from this one
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

// Lanes over images, back to the output: done holds (output, unit, position) times V for outputs first .. last.
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
