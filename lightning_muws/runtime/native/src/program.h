// Runs a program: layers and the small steps between them, one after another over one arena.
#pragma once
#include "gemv.h"
#include "int8_run.h"
#include "layer.h"

namespace {

struct Elements {
  const MuwsStep* step;
  const float *x, *onto;
  float* y;
};

constexpr int64_t ELEMENTS = 1 << 14;  // of a task

static void run_elements(void* context, int64_t item) {
  const Elements& e = *(const Elements*)context;
  const bool ends_in_relu = e.step->relu || e.step->kind == STEP_RELU;
  const int64_t first = item * ELEMENTS, last = least(e.step->rows * e.step->width, first + ELEMENTS);
  for (int64_t i = first; i < last; i += V) {
    const int64_t n = least<int64_t>(V, last - i);
    vf v = n == V ? load(e.x + i) : load_some(e.x + i, n);
    if (e.onto) v += n == V ? load(e.onto + i) : load_some(e.onto + i, n);
    store_some(e.y + i, ends_in_relu ? relu(v) : v, n);
  }
}

// The means of rows, summed in vectors and pairs.
static void run_mean(void* context, int64_t row) {
  const Elements& e = *(const Elements*)context;
  const int64_t width = e.step->width;
  const float* x = e.x + row * width;
  vf sum = vf{};
  for (int64_t i = 0; i < width; i += V) sum += i + V <= width ? load(x + i) : load_some(x + i, width - i);
  float lanes[V];
  store(lanes, sum);
  for (int half = V / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  e.y[row] = lanes[0] / (float)width;
}

struct Places {
  char* arena;
  void* const* outside;
  void* operator[](int64_t place) const {
    return place < 0 ? nullptr : place >= PLACE_OUTSIDE ? outside[place - PLACE_OUTSIDE] : arena + place;
  }
};

// Returns 1 as soon as a step makes bytes of NaN or infinity.
static int run_program(const MuwsStep* steps, int64_t n_steps, char* arena, void* const* outside, int64_t threads) {
  const Places places{arena, outside};
  for (const MuwsStep* step = steps; step < steps + n_steps; step++) {
    const float *x = (const float*)places[step->x], *onto = (const float*)places[step->onto];
    float* y = (float*)places[step->y];
    Elements elements{step, x, onto, y};
    switch (step->kind) {
      case STEP_INT8:
        if (run_layer8((const MuwsInt8*)step->layer, x, onto, y, (uint8_t*)places[step->q], threads)) return 1;
        break;
      case STEP_PLAN:
        run_plan((void*)step->layer, x, onto, y, threads);
        break;
      case STEP_GEMV:
        run_gemv((const MuwsLayer*)step->layer, x, y, threads);
        break;
      case STEP_MEAN:
        muws_parallel(threads, step->rows, run_mean, &elements);
        break;
      default:
        muws_parallel(threads, ceil_div(step->rows * step->width, ELEMENTS), run_elements, &elements);
    }
  }
  return 0;
}

}  // namespace
