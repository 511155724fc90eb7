// Values <-> planes of bytes: each pattern is turned left by one bit, see docs/format.md.
#include <string.h>

#include "coder.h"

namespace {

constexpr int64_t AT_A_TIME = 1024;  // values: they stay in the nearest cache while their planes are written

template <typename T>
void split(const T *values, int64_t n, uint8_t *planes, int64_t stride) {
  constexpr int width = sizeof(T);
  T turned[AT_A_TIME];
  for (int64_t start = 0; start < n; start += AT_A_TIME, values += AT_A_TIME, planes += AT_A_TIME) {
    const int64_t some = n - start < AT_A_TIME ? n - start : AT_A_TIME;
    for (int64_t i = 0; i < some; i++) turned[i] = T(values[i] << 1 | values[i] >> (8 * width - 1));
    for (int k = 0; k < width; k++)
      for (int64_t i = 0; i < some; i++) planes[k * stride + i] = uint8_t(turned[i] >> 8 * k);
  }
}

// Value i of the planes, not turned back. All planes at once: compilers interleave them in registers.
template <typename T>
T value(const uint8_t *const *planes, int64_t i) {
  T found = planes[0][i];
  for (size_t k = 1; k < sizeof(T); k++) found |= T(T(planes[k][i]) << 8 * k);
  return found;
}

template <typename T>
void join(const uint8_t *const *planes, int64_t n, T *values) {
  const uint8_t *own[sizeof(T)];  // in the caller's list they might change with the values, for all that a compiler knows
  memcpy(own, planes, sizeof own);
  for (int64_t i = 0; i < n; i++) {
    const T turned = value<T>(own, i);
    values[i] = T(turned >> 1 | turned << (8 * sizeof(T) - 1));
  }
}

}  // namespace

int64_t muws_split_planes(int64_t width, const void *values, int64_t n, uint8_t *planes, int64_t stride) {
  switch (width) {
    case 1: return split((const uint8_t *)values, n, planes, stride), 0;
    case 2: return split((const uint16_t *)values, n, planes, stride), 0;
    case 4: return split((const uint32_t *)values, n, planes, stride), 0;
    case 8: return split((const uint64_t *)values, n, planes, stride), 0;
  }
  return MUWS_WRONG;
}

int64_t muws_join_planes(int64_t width, const uint8_t *const *planes, int64_t n, void *values) {
  switch (width) {
    case 1: return join(planes, n, (uint8_t *)values), 0;
    case 2: return join(planes, n, (uint16_t *)values), 0;
    case 4: return join(planes, n, (uint32_t *)values), 0;
    case 8: return join(planes, n, (uint64_t *)values), 0;
  }
  return MUWS_WRONG;
}
