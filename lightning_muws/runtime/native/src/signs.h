// A Linear for one sample whose weights are one bit each. The bits of a block are stored in chunks of 8 columns
// (4x4: one chunk of 4), row by row: a byte per row of 8, half a byte per row of 4, the lowest bit first.
#pragma once
#include "gemv.h"

namespace {

struct Signs {
  const MuwsSigns* layer;
  const float* x;
  float* y;
};

typedef int32_t vi4 __attribute__((vector_size(16)));
typedef float vf8 __attribute__((vector_size(32)));
typedef int32_t vi8 __attribute__((vector_size(32)));

#if MUWS_LANES == 16
// y = total - 2 * (sum of the inputs with a minus): one masked addition for 16 weights.
template <int ROWS> static void signed_row_block(const Signs& s, int32_t first, int32_t last, float* y) {
  const MuwsSigns& l = *s.layer;
  __m512 sum[ROWS / 2], total = _mm512_setzero_ps();
  for (int r = 0; r < ROWS / 2; r++) sum[r] = _mm512_setzero_ps();
  const int64_t chunks = l.cols / 8;
  const uint8_t* minus = l.minus + first * chunks * ROWS;
  for (int32_t i = first; i < last; i++) {
    const __m512 magnitude = _mm512_set1_ps(l.magnitudes[i]);
    const float* x = s.x + l.columns[i];
    for (int64_t c = 0; c < chunks; c++, minus += ROWS) {
      const __m512 in = _mm512_mul_ps(magnitude, _mm512_broadcast_f32x8(_mm256_loadu_ps(x + 8 * c)));
      total = _mm512_add_ps(total, in);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS / 2; r++) {
        uint16_t mask;
        __builtin_memcpy(&mask, minus + 2 * r, 2);
        sum[r] = _mm512_mask_add_ps(sum[r], mask, sum[r], in);
      }
    }
  }
  const float all = _mm512_mask_reduce_add_ps(0xff, total);
  for (int r = 0; r < ROWS / 2; r++) {
    y[2 * r] = all - 2.0f * _mm512_mask_reduce_add_ps(0xff, sum[r]);
    y[2 * r + 1] = all - 2.0f * _mm512_mask_reduce_add_ps(0xff00, sum[r]);
  }
}

static void signed_4x4(const Signs& s, int32_t first, int32_t last, float* y) {
  const MuwsSigns& l = *s.layer;
  __m512 sum[4], total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int j = 0; j < 4; j++) sum[j] = _mm512_setzero_ps();
  int32_t i = first;
#define MUWS_STEP(j)                                                                                            \
  {                                                                                                             \
    const __m512 in = _mm512_mul_ps(_mm512_set1_ps(l.magnitudes[i + (j)]),                                      \
                                    _mm512_broadcast_f32x4(_mm_loadu_ps(s.x + l.columns[i + (j)]))); \
    uint16_t mask;                                                                                              \
    __builtin_memcpy(&mask, l.minus + 2 * (i + (j)), 2);                                                        \
    total[(j) & 1] = _mm512_add_ps(total[(j) & 1], in);                                                         \
    sum[j] = _mm512_mask_add_ps(sum[j], mask, sum[j], in);                                                      \
  }
  for (; i + 4 <= last; i += 4) {
    MUWS_STEP(0) MUWS_STEP(1) MUWS_STEP(2) MUWS_STEP(3)
  }
  for (; i < last; i++) MUWS_STEP(0)
#undef MUWS_STEP
  const vf all = (vf)total[0] + (vf)total[1];
  const vf under = (vf)sum[0] + (vf)sum[1] + (vf)sum[2] + (vf)sum[3];
  const vf value = all - 2.0f * under;
  for (int r = 0; r < 4; r++)
    y[r] = (value[4 * r] + value[4 * r + 1]) + (value[4 * r + 2] + value[4 * r + 3]);
}
#else
// The sign masks of every byte: applying a sign is one exclusive or.
struct Flips {
  vi8 of[256];
};
static const Flips& flips() {
  static Flips table;
  static bool ready = false;  // if two threads fill it, they write the same values
  if (!ready) {
    for (int byte = 0; byte < 256; byte++)
      for (int j = 0; j < 8; j++) table.of[byte][j] = (byte >> j & 1) ? (int32_t)0x80000000 : 0;
    __atomic_store_n(&ready, true, __ATOMIC_RELEASE);
  }
  return table;
}

template <int ROWS> static void signed_row_block(const Signs& s, int32_t first, int32_t last, float* y) {
  const MuwsSigns& l = *s.layer;
  const Flips& table = flips();
  vf8 sum[ROWS] = {};
  const int64_t chunks = l.cols / 8;
  const uint8_t* minus = l.minus + first * chunks * ROWS;
  for (int32_t i = first; i < last; i++)
    for (int64_t c = 0; c < chunks; c++, minus += ROWS) {
      vf8 in;
      __builtin_memcpy(&in, s.x + l.columns[i] + 8 * c, sizeof in);
      in = in * l.magnitudes[i];
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++) sum[r] += (vf8)((vi8)in ^ table.of[minus[r]]);
    }
  for (int r = 0; r < ROWS; r++) {
    y[r] = 0.0f;
    for (int j = 0; j < 8; j++) y[r] += sum[r][j];
  }
}

static void signed_4x4(const Signs& s, int32_t first, int32_t last, float* y) {
  const MuwsSigns& l = *s.layer;
  const Flips& table = flips();
  vf8 sum[2] = {};
  for (int32_t i = first; i < last; i++) {
    vf4 in;
    __builtin_memcpy(&in, s.x + l.columns[i], sizeof in);
    in = in * l.magnitudes[i];
    const vf8 twice = {in[0], in[1], in[2], in[3], in[0], in[1], in[2], in[3]};
    for (int r = 0; r < 2; r++) sum[r] += (vf8)((vi8)twice ^ table.of[l.minus[2 * i + r]]);
  }
  for (int r = 0; r < 4; r++) {
    const vf8 v = sum[r / 2];
    const int at = r % 2 * 4;
    y[r] = (v[at] + v[at + 1]) + (v[at + 2] + v[at + 3]);
  }
}
#endif

static void signs_task(void* context, int64_t item) {
  const Signs& s = *(const Signs*)context;
  const MuwsSigns& l = *s.layer;
  const int64_t step = TASK_ROWS / l.rows, stop = least(l.row_blocks, (item + 1) * step);
  for (int64_t b = item * step; b < stop; b++) {
    float y[16];
    const int32_t first = l.starts[b], last = l.starts[b + 1];
    if (l.cols == 4) signed_4x4(s, first, last, y);
    else if (l.rows == 4) signed_row_block<4>(s, first, last, y);
    else if (l.rows == 8) signed_row_block<8>(s, first, last, y);
    else signed_row_block<16>(s, first, last, y);
    for (int64_t r = 0; r < l.rows && b * l.rows + r < l.o; r++) {
      float* to = s.y + b * l.rows + r;
      const float value = y[r] + *to;
      *to = l.relu && value < 0.0f ? 0.0f : value;
    }
  }
}

static void run_signs(const MuwsSigns* l, const float* x, float* y, int64_t threads) {
  Signs s{l, x, y};
  muws_parallel(threads, ceil_div(l->row_blocks, TASK_ROWS / l->rows), signs_task, &s);
}

}  // namespace
