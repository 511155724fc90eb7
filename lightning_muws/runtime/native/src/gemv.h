// A Linear for one sample or a few: every weight is read once, and lanes run over the rows of a block.
#pragma once
#include "tile.h"

namespace {

constexpr int64_t TASK_ROWS = 64;  // outputs per task, if several threads share a Linear

struct Gemv {
  const MuwsLayer* layer;
  const float* x;
  float* y;
};

template <int ROWS> struct RowVector {
  typedef float type __attribute__((vector_size(4 * ROWS)));
};

template <int ROWS>
static void dot(const MuwsLayer& l, const float* x, int32_t first, int32_t last, float* y) {
  typedef typename RowVector<ROWS>::type vr;
  vr sum[4] = {};
  const float* w = l.weights + (int64_t)first * l.cols * ROWS;
  vr weight;
  if (l.cols % 4 == 0) {
    for (int32_t i = first; i < last; i++) {
      const float* p = x + l.columns[i];
      for (int64_t c = 0; c < l.cols; c += 4, w += 4 * ROWS) {
        fetch<4 * ROWS>(w);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          __builtin_memcpy(&weight, w + j * ROWS, sizeof weight);
          sum[j] += weight * p[c + j];
        }
      }
    }
  } else if (l.cols == 1) {
    int32_t i = first;
    for (; i + 4 <= last; i += 4, w += 4 * ROWS) {
      fetch<4 * ROWS>(w);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        __builtin_memcpy(&weight, w + j * ROWS, sizeof weight);
        sum[j] += weight * x[l.columns[i + j]];
      }
    }
    for (; i < last; i++, w += ROWS) {
      __builtin_memcpy(&weight, w, sizeof weight);
      sum[0] += weight * x[l.columns[i]];
    }
  } else {
    for (int32_t i = first; i < last; i++)
      for (int64_t c = 0; c < l.cols; c++, w += ROWS) {
        __builtin_memcpy(&weight, w, sizeof weight);
        sum[c & 3] += weight * x[l.columns[i] + c];
      }
  }
  const vr total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  __builtin_memcpy(y, &total, sizeof total);
}

#if MUWS_LANES == 16
// Four columns of four rows fill a register.
static void dot_4x4(const MuwsLayer& l, const float* x, int32_t first, int32_t last, float* y) {
  const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  const float* w = l.weights + (int64_t)first * 16;
  int32_t i = first;
  for (; i + 4 <= last; i += 4, w += 64) {
    fetch<64>(w);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512 in = _mm512_broadcast_f32x4(_mm_loadu_ps(x + l.columns[i + j]));
      sum[j] = _mm512_fmadd_ps(_mm512_loadu_ps(w + 16 * j), _mm512_permutevar_ps(in, spread), sum[j]);
    }
  }
  for (; i < last; i++, w += 16) {
    const __m512 in = _mm512_broadcast_f32x4(_mm_loadu_ps(x + l.columns[i]));
    sum[0] = _mm512_fmadd_ps(_mm512_loadu_ps(w), _mm512_permutevar_ps(in, spread), sum[0]);
  }
  const vf total = (vf)sum[0] + (vf)sum[1] + (vf)sum[2] + (vf)sum[3];
  for (int r = 0; r < 4; r++) y[r] = (total[r] + total[4 + r]) + (total[8 + r] + total[12 + r]);
}
#endif

template <int ROWS>
static void dot_scalar(const MuwsLayer& l, const float* x, int32_t first, int32_t last, float* y) {
  float sum[ROWS] = {};
  const float* w = l.weights + (int64_t)first * l.cols * ROWS;
  for (int32_t i = first; i < last; i++)
    for (int64_t c = 0; c < l.cols; c++, w += ROWS)
      for (int r = 0; r < ROWS; r++) sum[r] += w[r] * x[l.columns[i] + c];
  for (int r = 0; r < ROWS; r++) y[r] = sum[r];
}

// One row: lanes run over the columns of a block.
static void dot_row(const MuwsLayer& l, const float* x, int32_t first, int32_t last, float* y) {
  vf4 sum[2] = {};
  const float* w = l.weights + (int64_t)first * l.cols;
  for (int32_t i = first; i < last; i++) {
    const float* p = x + l.columns[i];
    for (int64_t c = 0; c < l.cols; c += 4, w += 4) {
      vf4 weight, in;
      __builtin_memcpy(&weight, w, sizeof weight);
      __builtin_memcpy(&in, p + c, sizeof in);
      sum[(i + c / 4) & 1] += weight * in;
    }
  }
  const vf4 total = sum[0] + sum[1];
  *y = (total[0] + total[1]) + (total[2] + total[3]);
}

typedef void (*DotFn)(const MuwsLayer&, const float*, int32_t, int32_t, float*);

static DotFn choose_dot(const MuwsLayer& l) {
#if MUWS_LANES == 16
  if (l.rows == 4 && l.cols == 4) return dot_4x4;
#endif
  if (l.rows == 1 && l.cols % 4 == 0) return dot_row;
  return l.rows == 8 ? dot<8> : l.rows == 4 ? dot<4> : l.rows == 2 ? dot_scalar<2> : dot_scalar<1>;
}

static void gemv_task(void* context, int64_t item) {
  const Gemv& g = *(const Gemv*)context;
  const MuwsLayer& l = *g.layer;
  const int64_t step = TASK_ROWS / l.rows, stop = least(l.row_blocks, (item + 1) * step);
  const DotFn fn = choose_dot(l);
  for (int64_t b = item * step; b < stop; b++)
    for (int64_t n = 0; n < l.n; n++) {  // the sample is the inner loop: the weights are in the cache by then
      float y[8];
      fn(l, g.x + n * l.c, l.starts[b], l.starts[b + 1], y);
      for (int64_t r = 0; r < l.rows && b * l.rows + r < l.o; r++) {
        const float value = y[r] + (l.bias ? l.bias[b * l.rows + r] : 0.0f);
        g.y[n * l.o + b * l.rows + r] = l.relu && value < 0.0f ? 0.0f : value;
      }
    }
}

static void run_gemv(const MuwsLayer* l, const float* x, float* y, int64_t threads) {
  Gemv g{l, x, y};
  muws_parallel(threads, ceil_div(l->row_blocks, TASK_ROWS / l->rows), gemv_task, &g);
}

}  // namespace
