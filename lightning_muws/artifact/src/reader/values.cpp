#include "values.h"

#include <math.h>

namespace muws {

namespace {

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T>
T load(const uint8_t *from, uint64_t i) {
  T found;
  memcpy(&found, from + i * sizeof found, sizeof found);
  return found;
}

template <typename T>
void store(uint8_t *to, uint64_t i, T value) { memcpy(to + i * sizeof value, &value, sizeof value); }

// A small floating number: its sign, `exponents` bits of exponent and `fractions` bits of fraction.
float small_float(uint32_t u, int exponents, int fractions, int bias, bool has_infinity) {
  const uint32_t exponent = u >> fractions & ((1u << exponents) - 1), fraction = u & ((1u << fractions) - 1);
  const uint32_t sign = (u >> (exponents + fractions) & 1) << 31;
  if (has_infinity && exponent == (1u << exponents) - 1)  // a NaN keeps its bits and becomes a quiet one
    return same_bits<float>(sign | 0x7f800000u | fraction << (23 - fractions) | (fraction ? 0x400000u : 0u));
  const float size = exponent ? ldexpf(float(fraction | 1u << fractions), int(exponent) - bias - fractions)
                              : ldexpf(float(fraction), 1 - bias - fractions);
  return same_bits<float>(sign | same_bits<uint32_t>(size));
}

float from_half(uint16_t u) {
  const uint32_t bits = uint32_t(u & 0x7fff) << 13, sign = uint32_t(u & 0x8000) << 16;
  if ((u & 0x7c00) == 0 || (u & 0x7c00) == 0x7c00) return small_float(u, 5, 10, 15, true);
  return same_bits<float>(sign | (bits + (112u << 23)));
}

float from_brain(uint16_t u) { return same_bits<float>(uint32_t(u) << 16); }

uint16_t to_half(float x) {
  const uint32_t u = same_bits<uint32_t>(x), sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // half a step above the largest
  if (size < 0x38800000) {                                 // below the smallest normal one: whole steps of 2**-24
    const float steps = same_bits<float>(size) * 16777216.0f;
    return uint16_t(sign | uint32_t(nearbyintf(steps)));
  }
  return uint16_t(sign | ((size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13));
}

uint16_t to_brain(float x) {
  const uint32_t u = same_bits<uint32_t>(x);
  if (x != x) return 0x7fc0;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float from_float8(Form form, uint8_t u) {
  const float nan = same_bits<float>(0x7fc00000u);
  switch (form) {
    case E5M2: return small_float(u, 5, 2, 15, true);
    case E4M3FN: return (u & 127) == 127 ? nan : small_float(u, 4, 3, 7, false);
    case E4M3FNUZ: return u == 128 ? nan : small_float(u, 4, 3, 8, false);
    case E5M2FNUZ: return u == 128 ? nan : small_float(u, 5, 2, 16, false);
    default: return u == 255 ? nan : ldexpf(1.0f, int(u) - 127);  // float8_e8m0fnu
  }
}

// Calls what it is given with a function that returns value i of a floating form.
template <typename Do>
void with_reader(Form form, const uint8_t *from, Do what) {
  switch (form) {
    case FLOAT16: return what([=](uint64_t i) { return from_half(load<uint16_t>(from, i)); });
    case BFLOAT16: return what([=](uint64_t i) { return from_brain(load<uint16_t>(from, i)); });
    case FLOAT32: return what([=](uint64_t i) { return load<float>(from, i); });
    default: return what([=](uint64_t i) { return load<double>(from, i); });
  }
}

// Writes n values to a floating dtype.
template <typename Read>
void write(Form dtype, Read read, uint64_t n, uint8_t *out) {
  switch (dtype) {
    case FLOAT16:
      for (uint64_t i = 0; i < n; i++) store(out, i, to_half(float(read(i))));
      return;
    case BFLOAT16:
      for (uint64_t i = 0; i < n; i++) store(out, i, to_brain(float(read(i))));
      return;
    case FLOAT32:
      for (uint64_t i = 0; i < n; i++) store(out, i, float(read(i)));
      return;
    default:
      for (uint64_t i = 0; i < n; i++) store(out, i, double(read(i)));
  }
}

template <typename Real>
void from_grid(Form dtype, const uint8_t *patterns, Real step, uint64_t n, uint8_t *out) {
  write(dtype, [=](uint64_t i) {
    const uint16_t u = load<uint16_t>(patterns, i);
    const Real size = Real(u & 32767) * step;
    return u >> 15 ? -size : size;
  }, n, out);
}

template <typename T>
void from_palette(const uint64_t *magnitudes, uint64_t n_magnitudes, const uint8_t *patterns, uint64_t n, uint8_t *out) {
  for (uint64_t i = 0; i < n; i++) {
    const uint16_t u = load<uint16_t>(patterns, i);
    if ((u & 32767) >= n_magnitudes)
      REFUSE("a value has index %d of a palette of %llu magnitudes", u & 32767, (unsigned long long)n_magnitudes - 1);
    store(out, i, T(T(magnitudes[u & 32767]) | T(u >> 15) << (8 * sizeof(T) - 1)));
  }
}

template <typename T>
void from_numbers(const uint8_t *values, uint64_t n, uint8_t *out) {
  for (uint64_t i = 0; i < n; i++) store(out, i, float(load<T>(values, i)));
}

}  // namespace

void to_values(const Manifest &manifest, const Entry &entry, const uint8_t *patterns, uint64_t n, uint8_t *out) {
  const uint64_t *magnitudes = manifest.magnitudes.data() + entry.palette;
  if (is_plain(entry)) {
    memcpy(out, patterns, n * width_of(entry.dtype));
  } else if (entry.stored == INT8 || entry.stored == UINT8) {
    const uint8_t zero = entry.stored == UINT8 ? 128 : 0;
    for (uint64_t i = 0; i < n; i++) {
      const uint8_t u = patterns[i];
      out[i] = uint8_t((u > 128 ? 128 - u : u) ^ zero);
    }
  } else if (entry.stored == PALETTE) {
    switch (width_of(entry.dtype)) {
      case 2: return from_palette<uint16_t>(magnitudes, entry.n_palette, patterns, n, out);
      case 4: return from_palette<uint32_t>(magnitudes, entry.n_palette, patterns, n, out);
      default: return from_palette<uint64_t>(magnitudes, entry.n_palette, patterns, n, out);
    }
  } else if (entry.stored == GRID) {
    if (entry.dtype == FLOAT64) from_grid<double>(entry.dtype, patterns, entry.step, n, out);
    else from_grid<float>(entry.dtype, patterns, float(entry.step), n, out);
  } else {
    with_reader(entry.stored, patterns, [&](auto read) { write(entry.dtype, read, n, out); });
  }
}

void to_float32(Form dtype, const uint8_t *values, uint64_t n, uint8_t *out) {
  switch (dtype) {
    case BOOL: case UINT8: return from_numbers<uint8_t>(values, n, out);
    case INT8: return from_numbers<int8_t>(values, n, out);
    case UINT16: return from_numbers<uint16_t>(values, n, out);
    case INT16: return from_numbers<int16_t>(values, n, out);
    case UINT32: return from_numbers<uint32_t>(values, n, out);
    case INT32: return from_numbers<int32_t>(values, n, out);
    case UINT64: return from_numbers<uint64_t>(values, n, out);
    case INT64: return from_numbers<int64_t>(values, n, out);
    default: break;
  }
  if (is_floating(dtype)) with_reader(dtype, values, [&](auto read) { write(FLOAT32, read, n, out); });
  else for (uint64_t i = 0; i < n; i++) store(out, i, from_float8(dtype, values[i]));
}

}  // namespace muws
