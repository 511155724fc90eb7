// Values <-> planes of bytes: each pattern is turned left by one bit, see docs/format.md.
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

template <typename T>
void join(const uint8_t *const *planes, int64_t n, T *values) {
  constexpr int width = sizeof(T);
  for (int64_t start = 0; start < n; start += AT_A_TIME, values += AT_A_TIME) {
    const int64_t some = n - start < AT_A_TIME ? n - start : AT_A_TIME;
    for (int64_t i = 0; i < some; i++) values[i] = planes[0][start + i];
    for (int k = 1; k < width; k++)
      for (int64_t i = 0; i < some; i++) values[i] |= T(T(planes[k][start + i]) << 8 * k);
    for (int64_t i = 0; i < some; i++) values[i] = T(values[i] >> 1 | values[i] << (8 * width - 1));
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
