// Lays out rounded inputs for products of four: quads, which are four columns of a position side by side.
#pragma once
#include "int8.h"

namespace {

// The columns of a group's matrix (channels times taps) are cut into quads; the last may be short. The scratch of an item
// holds (quad, position) words of four bytes, or (column, position) bytes if blocks choose their columns freely (loose).
struct Int8Plan {
  const MuwsInt8* layer;
  int64_t columns, quads;    // of a group
  int64_t planes;            // of all groups: quads, or 4 * quads if loose
  int64_t positions, pitch;  // of an item at most; bytes from one plane to the next
  int64_t rows_in, row_bytes;  // convolution: padded input rows that an item reads at most, bytes of one (without phases)
  float scale;               // of the input
  Rounding rounding;
};

// What is packed for one item.
struct Packed8 {
  uint8_t* planes;
  float* scales;     // of each position, or null: then the layer's hold
  int32_t* zeros;
};

constexpr int64_t INT8_SLACK = 64;  // bytes that vectors may read or write past the end

// The input: float32, or bytes if the layer says so.
struct Input8 {
  const void* data;
  const float* numbers(int64_t at) const { return (const float*)data + at; }
  const uint8_t* bytes(int64_t at) const { return (const uint8_t*)data + at; }
};

// to[b * pitch + j] = row[step * j + b] for the phases b < n_phases.
static void split_phases(const uint8_t* row, int64_t step, int64_t n_phases, int64_t pitch, uint8_t* to) {
  if (step == 2) {  // the compiler makes vectors of it
    for (int64_t j = 0; j < pitch; j++) to[j] = row[2 * j];
    for (int64_t j = 0; j < pitch && n_phases > 1; j++) to[pitch + j] = row[2 * j + 1];
    return;
  }
  for (int64_t b = 0; b < n_phases; b++)
    for (int64_t j = 0; j < pitch; j++) to[b * pitch + j] = row[step * j + b];
}

// Round the rows that output rows first .. last of an image read; return whether all their numbers are finite. `start`: of the
// image in the input. bytes: (channel, row, phase, column), the zeros of the padding included. Rows are written in order and in whole vectors: the
// next row overwrites what is too much.
static bool round_image(const Int8Plan& p, Input8 x, int64_t start, int64_t first, int64_t last, uint8_t* bytes,
                        uint8_t* line) {
  const MuwsInt8& l = *p.layer;
  const int zero = p.rounding.zero;
  const int64_t rows = (last - first - 1) * l.sh + l.kh, top = first * l.sh - l.ph, wide = l.sw * p.row_bytes;
  vi sizes = vi{};
  for (int64_t c = 0; c < l.c; c++)
    for (int64_t i = 0; i < rows; i++) {
      if (l.kh < l.sh && i % l.sh >= l.kh) continue;  // no output reads it
      uint8_t* to = bytes + (c * p.rows_in + i) * wide;
      const int64_t h = top + i, at = start + (c * l.h + h) * l.w;
      if (h < 0 || h >= l.h) {
        fill_bytes(to, zero, wide);
        continue;
      }
      uint8_t* row = l.sw == 1 ? to : line;
      fill_bytes(row, zero, l.pw);
      if (l.bytes_in)
        copy_bytes(row + l.pw, x.bytes(at), l.w);
      else
        round_row(x.numbers(at), l.w, p.rounding, row + l.pw, sizes);
      fill_bytes(row + l.pw + l.w, zero, wide - l.pw - l.w);
      if (l.sw > 1) split_phases(row, l.sw, least(l.sw, l.kw), p.row_bytes, to);
    }
  return is_finite(sizes);
}

// Whether an input row that output row r of an image reads has NaN or infinity.
static bool reads_broken(const MuwsInt8& l, const float* image, int64_t r) {
  vi sizes = vi{};
  for (int64_t h = most<int64_t>(0, r * l.sh - l.ph); h < least(l.h, r * l.sh - l.ph + l.kh); h++)
    for (int64_t c = 0; c < l.c; c++)
      for (int64_t j = 0; j < l.w; j++) sizes[0] = most(sizes[0], sizes_of(splat(image[(c * l.h + h) * l.w + j]))[0]);
  return !is_finite(sizes);
}

// Unfold the rounded rows of an image into the planes, from position `at` on.
static void unfold_image(const Int8Plan& p, const uint8_t* bytes, int64_t n_rows, int64_t at, uint8_t* planes) {
  const MuwsInt8& l = *p.layer;
  const int64_t per_group = l.c / l.groups, step = l.sh * l.sw * p.row_bytes;
  for (int64_t g = 0; g < l.groups; g++) {
    int64_t c = g * per_group, a = 0, b = 0;  // the next column
    const uint8_t* from[4] = {};
    for (int64_t q = 0; q < p.quads; q++) {
      for (int64_t i = 0; i < 4 && 4 * q + i < p.columns; i++) {
        from[i] = bytes + ((c * p.rows_in + a) * l.sw + (l.sw > 1 ? b % l.sw : 0)) * p.row_bytes + (l.sw > 1 ? b / l.sw : b);
        if (++b == l.kw) b = 0, a++;
        if (a == l.kh) a = 0, c++;
      }
      for (int64_t i = p.columns - 4 * q; i < 4; i++) from[i] = from[0];  // their weights are zero
      if (l.loose) {
        for (int64_t i = 0; i < 4; i++) {
          uint8_t* to = planes + ((g * p.quads + q) * 4 + i) * p.pitch + at;
          for (int64_t r = 0; r < n_rows; r++) copy_bytes(to + r * l.ow, from[i] + r * step, l.ow);
        }
        continue;
      }
      uint8_t* to = planes + (g * p.quads + q) * p.pitch + 4 * at;
      for (int64_t r = 0; r < n_rows; r++, to += 4 * l.ow)
        for (int64_t j = 0; j < l.ow; j += V) {
          const int64_t k = r * step + (l.ow >= V ? least(j, l.ow - V) : j);
          const vi quad = interleaved(from[0] + k, from[1] + k, from[2] + k, from[3] + k);
          store_words(to + 4 * (k - r * step), quad, l.ow);
        }
    }
  }
}

// Pack output rows first .. last, counted over the whole batch.
static void pack_convolution(const Int8Plan& p, Input8 x, int64_t first, int64_t last, Packed8& packed,
                             uint8_t* bytes) {
  const MuwsInt8& l = *p.layer;
  uint8_t* line = bytes + l.c * p.rows_in * l.sw * p.row_bytes + INT8_SLACK;
  const int64_t positions = (last - first) * l.ow;
  bool any_broken = false;
  for (int64_t row = first; row < last;) {
    const int64_t image = row / l.oh, start = row % l.oh, stop = least(l.oh, start + last - row);
    const int64_t at = image * l.c * l.h * l.w;
    const bool finite = round_image(p, x, at, start, stop, bytes, line);
    unfold_image(p, bytes, stop - start, (row - first) * l.ow, packed.planes);
    for (int64_t i = 0; i < positions && !finite && !any_broken; i++)
      packed.scales[i] = p.scale, packed.zeros[i] = p.rounding.zero;
    any_broken = any_broken || !finite;
    for (int64_t r = start; r < stop && !finite; r++)
      for (int64_t j = 0; j < l.ow && reads_broken(l, x.numbers(at), r); j++)
        packed.scales[(row - first + r - start) * l.ow + j] = __builtin_nanf("");
    row += stop - start;
  }
  if (!any_broken) packed.scales = nullptr;
}

// Choose the scale and the zero of a sample from its own range, which always includes 0.
static Rounding range_of(const float* x, int64_t n, float& scale) {
  vf low = vf{}, high = vf{};
  vi sizes = vi{};
  for (int64_t i = 0; i < n; i += V) {
    const vf v = i + V <= n ? load(x + i) : load_some(x + i, n - i);
    low = smaller(v, low), high = larger(v, high);
    sizes = most_of(sizes, sizes_of(v));
  }
  float least_x = 0.0f, most_x = 0.0f;
  for (int i = 0; i < V; i++) least_x = least(least_x, (float)low[i]), most_x = most(most_x, (float)high[i]);
  scale = most_x / 255.0f - least_x / 255.0f;
  if (!is_finite(sizes)) {
    scale = __builtin_nanf("");
    return Rounding{0.0f, 0};
  }
  if (scale < 1.17549435e-38f) {  // its inverse would overflow; so small a range counts as zero
    scale = 0.0f;
    return Rounding{0.0f, 0};
  }
  const float inverse = 1.0f / scale;
  return Rounding{inverse, (int32_t)__builtin_rintf(least(-least_x * inverse, 255.0f))};
}

// Round sample n of a Linear: bytes of its quads, side by side.
static void round_sample(const Int8Plan& p, Input8 x, int64_t n, uint8_t* to, float& scale, int32_t& zero) {
  const MuwsInt8& l = *p.layer;
  scale = p.scale;
  Rounding rounding = p.rounding;
  if (l.dynamic) rounding = range_of(x.numbers(n * l.c), l.c, scale);
  zero = rounding.zero;
  if (l.bytes_in) {
    copy_bytes(to, x.bytes(n * l.c), l.c);
  } else {
    vi sizes = vi{};
    round_row(x.numbers(n * l.c), l.c, rounding, to, sizes);
    if (!is_finite(sizes)) scale = __builtin_nanf("");
  }
  for (int64_t i = l.c; i < 4 * p.quads; i++) to[i] = 0;
}

// Pack samples first .. last of a Linear: positions are samples.
static void pack_samples(const Int8Plan& p, Input8 x, int64_t first, int64_t last, Packed8& packed,
                         uint8_t* bytes) {
  const MuwsInt8& l = *p.layer;
  const int64_t n = last - first, width = 4 * p.quads + INT8_SLACK;
  for (int64_t start = 0; start < n; start += V) {
    const int rows = (int)least<int64_t>(V, n - start);
    for (int r = 0; r < rows; r++)
      round_sample(p, x, first + start + r, bytes + r * width, packed.scales[start + r],
                   packed.zeros[start + r]);
    for (int64_t q = 0; q < p.quads; q += V) {
      const int count = (int)least<int64_t>(V, p.quads - q);
      if (!l.loose) {
        transpose_block((const float*)(bytes + 4 * q), width / 4, rows, count,
                        (float*)(packed.planes + q * p.pitch + 4 * start), p.pitch / 4, count, V);
        continue;
      }
      float words[V * V];
      transpose_block((const float*)(bytes + 4 * q), width / 4, rows, count, words, V, count, V);
      for (int i = 0; i < 4 * count; i++) {
        const vi word = load_int(words + i / 4 * V) >> (8 * (i % 4));
        store_bytes(packed.planes + (4 * q + i) * p.pitch + start, word & splat_int(255));
      }
    }
  }
}

}  // namespace
