// Whole numbers in bytes of seven bits, the lowest first; docs/format.md.
#pragma once
#include <stdint.h>

// Reads one by `source.byte()`, as often as it is needed. One of more than four bytes ends after the fourth.
template <class Source>
uint32_t read_varint(Source &source) {
  uint32_t value = 0;
  for (int shift = 0;; shift += 7) {
    const uint32_t one = source.byte();
    if (one < 128 || shift == 21) return value | one << shift;
    value |= (one & 127) << shift;
  }
}
