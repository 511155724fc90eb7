// Runs a program: layers and the small steps between them, one after another over one arena.
#pragma once
#include "attention.h"
#include "gemv.h"
#include "int8_run.h"
#include "layer.h"
#include "norm.h"
#include "pool.h"

namespace {

struct Places {
  char* arena;
  void* const* outside;
  void* operator[](int64_t place) const {
    return place < 0 ? nullptr : place >= PLACE_OUTSIDE ? outside[place - PLACE_OUTSIDE] : arena + place;
  }
};

static void run_small(const MuwsStep& step, const float* x, const float* more, const Output8& to, int64_t threads) {
  const int64_t numbers = step.rows * step.width;
  Elements e{&step, x, to};
  switch (step.kind) {
    case STEP_MEAN:
      return muws_parallel(threads, step.rows, run_mean, &e);
    case STEP_NORM:
      return muws_parallel(threads, ceil_div(step.rows, most<int64_t>(1, NORM_NUMBERS / step.width)), run_norm, &e);
    case STEP_ATTENTION:
      return attend(Attending{&step, x, to.onto, more, to, 1}, threads);
    case STEP_POOL:
      return muws_parallel(threads, step.rows, run_pool, &e);
    case STEP_COPY:
      return muws_parallel(threads, ceil_div(step.rows, most<int64_t>(1, ELEMENTS / step.width)), run_copy, &e);
    default:
      muws_parallel(threads, ceil_div(numbers, ELEMENTS), run_elements, &e);
  }
}

// Returns 1 as soon as a step makes bytes of NaN or infinity.
static int run_program(const MuwsStep* steps, int64_t n_steps, char* arena, void* const* outside, int64_t threads) {
  const Places places{arena, outside};
  for (const MuwsStep* step = steps; step < steps + n_steps; step++) {
    const float *x = (const float*)places[step->x], *onto = (const float*)places[step->onto];
    float* y = (float*)places[step->y];
    uint8_t* q = (uint8_t*)places[step->q];
    int broken = 0;
    switch (step->kind) {
      case STEP_INT8:
        broken = run_layer8((const MuwsInt8*)step->layer, x, onto, y, q, threads);
        break;
      case STEP_PLAN:
        run_plan((void*)step->layer, x, onto, y, threads);
        break;
      case STEP_GEMV:
        run_gemv((const MuwsLayer*)step->layer, x, y, threads);
        break;
      default: {
        Output8 to{onto, y, q, {}, &broken};
        if (q) to.next = rounding_of(step->next);
        run_small(*step, x, (const float*)places[step->more], to, threads);
      }
    }
    if (broken) return 1;
  }
  return 0;
}

}  // namespace
