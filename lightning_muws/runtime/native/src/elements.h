// Steps that look at a number at a time, rows that are averaged, and copies of what does not lie in order.
#pragma once
#include "functions.h"

namespace {

struct Elements {
  const MuwsStep* step;
  const float* x;
  Output8 to;
};

constexpr int64_t ELEMENTS = 1 << 14;  // of a task

template <class F> static void map(const Elements& e, int64_t item, F function) {
  const int64_t first = item * ELEMENTS, last = least(e.step->rows * e.step->width, first + ELEMENTS);
  vi sizes = vi{};
  for (int64_t i = first; i < last; i += V) {
    vf v = load_part(e.x + i, last - i);
    if (e.to.onto) v += load_part(e.to.onto + i, last - i);
    put(e.to, i, function(v), last - i, sizes);
  }
  watch(e.to, sizes);
}

static void run_elements(void* context, int64_t item) {
  const Elements& e = *(const Elements*)context;
  const int64_t kind = e.step->kind;
  if (kind == STEP_GELU) return map(e, item, [](vf v) { return gelu(v); });
  if (kind == STEP_GELU_TANH) return map(e, item, [](vf v) { return gelu_tanh(v); });
  if (e.step->relu || kind == STEP_RELU) return map(e, item, [](vf v) { return relu(v); });
  map(e, item, [](vf v) { return v; });
}

// The means of rows, summed in vectors and pairs.
static void run_mean(void* context, int64_t row) {
  const Elements& e = *(const Elements*)context;
  const int64_t width = e.step->width;
  const float* x = e.x + row * width;
  vf sum = vf{};
  for (int64_t i = 0; i < width; i += V) sum += load_part(x + i, width - i);
  e.to.y[row] = total(sum) / (float)width;
}

// The rows of all dimensions but the last, in order.
static void run_copy(void* context, int64_t item) {
  const Elements& e = *(const Elements*)context;
  const MuwsCopy& c = *(const MuwsCopy*)e.step->layer;
  const int64_t width = e.step->width, step = c.strides[c.dims - 1], rows = most<int64_t>(1, ELEMENTS / width);
  for (int64_t row = item * rows; row < least(e.step->rows, (item + 1) * rows); row++) {
    const float* from = e.x + c.at;
    int64_t rest = row;
    for (int64_t d = c.dims - 2; d >= 0; d--) from += rest % c.sizes[d] * c.strides[d], rest /= c.sizes[d];
    float* to = e.to.y + row * width;
    if (step == 1)
      copy(to, from, width);
    else
      for (int64_t i = 0; i < width; i++) to[i] = from[i * step];
  }
}

}  // namespace
