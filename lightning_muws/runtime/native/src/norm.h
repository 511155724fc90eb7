// LayerNorm: rows, each with mean 0 and variance 1, times a weight, plus a bias.
#pragma once
#include "elements.h"

namespace {

constexpr int64_t NORM_NUMBERS = 1 << 12;  // of a task

// The mean is found twice: the second time of what is left after the first, so that a row of large equal numbers gives 0.
static void norm_row(const Elements& e, int64_t row, vi& sizes) {
  const int64_t width = e.step->width, whole = width / V * V, rest = width - whole;
  const float *x = e.x + row * width, *weight = (const float*)e.step->layer, *bias = e.step->bias;
  vf sum = rest ? load_some(x + whole, rest) : vf{};
  for (int64_t i = 0; i < whole; i += V) sum += load(x + i);
  const vf mean = splat(total(sum) / (float)width);
  const vf end = rest ? first_lanes(load_some(x + whole, rest) - mean, rest) : vf{};
  vf left = end, squares = end * end;
  for (int64_t i = 0; i < whole; i += V) {
    const vf v = load(x + i) - mean;
    left += v, squares += v * v;
  }
  const float shift = total(left) / (float)width, variance = total(squares) / (float)width - shift * shift;
  const vf scale = splat(1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + (float)e.step->number));
  for (int64_t i = 0; i < width; i += V) {
    const int64_t n = width - i;
    vf v = ((load_part(x + i, n) - mean) - splat(shift)) * scale;
    if (weight) v *= load_part(weight + i, n);
    if (bias) v += load_part(bias + i, n);
    put(e.to, row * width + i, v, n, sizes);
  }
}

static void run_norm(void* context, int64_t item) {
  const Elements& e = *(const Elements*)context;
  const int64_t rows = most<int64_t>(1, NORM_NUMBERS / e.step->width);
  vi sizes = vi{};
  for (int64_t row = item * rows; row < least(e.step->rows, (item + 1) * rows); row++) norm_row(e, row, sizes);
  watch(e.to, sizes);
}

}  // namespace
