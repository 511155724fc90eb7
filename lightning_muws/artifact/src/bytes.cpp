// Counts of bytes, the CRC-32 of RFC 1952, and large pages.
#include <string.h>

#include "coder.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t COUNTED = 1 << 30;  // bytes that 32 bits count

// Four tables: a byte that follows an equal one need not wait for its count.
void add_counts(const uint8_t *data, int64_t n, int64_t *counts) {
  uint32_t tables[4][256] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight;
    memcpy(&eight, data + i, 8);
    for (int k = 0; k < 8; k++) tables[k & 3][eight >> 8 * k & 255]++;
  }
  for (; i < n; i++) tables[0][data[i]]++;
  for (int s = 0; s < 256; s++) counts[s] += int64_t(tables[0][s]) + tables[1][s] + tables[2][s] + tables[3][s];
}

}  // namespace

void muws_count(const uint8_t *data, int64_t n, int64_t stretch, int64_t *counts) {
  for (int64_t start = 0; start < n && stretch > 0; start += stretch, counts += 256) {
    const int64_t stop = stretch < n - start ? start + stretch : n;
    memset(counts, 0, 256 * sizeof *counts);
    for (int64_t i = start; i < stop; i += COUNTED) add_counts(data + i, stop - i < COUNTED ? stop - i : COUNTED, counts);
  }
}

// ---- CRC-32

namespace {

uint32_t crc_bytes(uint32_t crc, const uint8_t *data, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    crc ^= data[i];
    for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (0xedb88320u & -(crc & 1));
  }
  return crc;
}

// What a byte becomes that is followed by k zeros.
struct Tables {
  uint32_t of[16][256];
  Tables() {
    for (int s = 0; s < 256; s++) {
      const uint8_t bytes[16] = {uint8_t(s)};
      for (int k = 0; k < 16; k++) of[k][s] = crc_bytes(0, bytes, k + 1);
    }
  }
};

// Sixteen tables: 16 bytes at a time. Source: Kounavis and Berry 2005 (slicing).
uint32_t crc_sliced(uint32_t crc, const uint8_t *data, int64_t n) {
  static const Tables tables;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    uint32_t next = 0, first;
    memcpy(&first, data + i, 4);
    crc ^= first;
    for (int k = 0; k < 4; k++) next ^= tables.of[15 - k][crc >> 8 * k & 255];
    for (int k = 4; k < 16; k++) next ^= tables.of[15 - k][data[i + k]];
    crc = next;
  }
  return crc_bytes(crc, data + i, n - i);
}

#if defined(__x86_64__)
// Moves 16 bytes on by as many bits as the two constants stand for: x**n mod P of the distance.
__attribute__((target("pclmul,sse4.1"))) __m128i moved(__m128i x, __m128i constants, const uint8_t *onto) {
  const __m128i low = _mm_clmulepi64_si128(x, constants, 0x00), high = _mm_clmulepi64_si128(x, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), _mm_loadu_si128((const __m128i *)onto));
}

// Folds 64 bytes at a time with carry-less products; what is left, congruent to all before, is one message of 16 bytes
// and the rest. Source: Gopal et al. 2009, "Fast CRC computation for generic polynomials using PCLMULQDQ".
__attribute__((target("pclmul,sse4.1"))) uint32_t crc_folded(uint32_t crc, const uint8_t *data, int64_t n) {
  const __m128i by512 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by128 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
  __m128i x[4];
  for (int k = 0; k < 4; k++) x[k] = _mm_loadu_si128((const __m128i *)(data + 16 * k));
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
  int64_t i = 64;
  for (; i + 64 <= n; i += 64)
    for (int k = 0; k < 4; k++) x[k] = moved(x[k], by512, data + i + 16 * k);
  uint8_t last[16];
  for (int k = 1; k < 4; k++) {
    _mm_storeu_si128((__m128i *)last, x[k]);
    x[0] = moved(x[0], by128, last);
  }
  for (; i + 16 <= n; i += 16) x[0] = moved(x[0], by128, data + i);
  _mm_storeu_si128((__m128i *)last, x[0]);
  return crc_sliced(crc_bytes(0, last, 16), data + i, n - i);
}
#endif

}  // namespace

uint32_t muws_crc32(const uint8_t *data, int64_t n) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (n >= 64 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) return ~crc_folded(~0u, data, n);
#endif
  return ~crc_sliced(~0u, data, n);
}

// ---- memory

void muws_large_pages(void *memory, int64_t n) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, start = ((uintptr_t)memory + page - 1) & ~(page - 1);
  const uintptr_t stop = ((uintptr_t)memory + (uintptr_t)n) & ~(page - 1);
  if (n > 0 && start < stop) madvise((void *)start, stop - start, MADV_HUGEPAGE);
#else
  (void)memory, (void)n;
#endif
}
