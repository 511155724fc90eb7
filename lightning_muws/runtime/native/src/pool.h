// The largest number in each window of a plane; NaN counts as the largest, as in torch.
#pragma once
#include "elements.h"

namespace {

MUWS_INLINE vf larger_or_nan(vf a, vf b) {
  const vf most_of_two = a > b ? a : b;  // b if one is NaN
  return a == a ? most_of_two : a;
}

static void run_pool(void* context, int64_t plane) {
  const Elements& e = *(const Elements*)context;
  const MuwsPool& p = *(const MuwsPool*)e.step->layer;
  const float* x = e.x + plane * p.h * p.w;
  const vf nothing = splat(-__builtin_inff());
  // the largest of each column, with the border around it, and what a last vector reads past it
  const int64_t across = (ceil_div(p.ow, V) * V - 1) * p.sw + p.kw + 2 * V, wide = most(across, p.w + 2 * p.pw + V);
  float* columns = muws_scratch(0, (size_t)wide);
  for (int64_t i = 0; i < wide; i++) columns[i] = -__builtin_inff();
  vi sizes = vi{};
  for (int64_t i = 0; i < p.oh; i++) {
    const int64_t first = most<int64_t>(0, i * p.sh - p.ph), last = least(p.h, i * p.sh - p.ph + p.kh);
    for (int64_t j = 0; j < p.w; j += V) {
      vf v = nothing;
      for (int64_t row = first; row < last; row++) v = larger_or_nan(v, load_part(x + row * p.w + j, p.w - j));
      store_some(columns + p.pw + j, v, least<int64_t>(V, p.w - j));
    }
    for (int64_t j = 0; j < p.ow; j += V) {
      vf v = nothing;
      for (int64_t t = 0; t < p.kw; t++) {
        const float* from = columns + j * p.sw + t;
        if (p.sw == 1) {
          v = larger_or_nan(v, load(from));
        } else if (p.sw == 2) {
          v = larger_or_nan(v, every_second(from));
        } else {
          float lanes[V];
          for (int lane = 0; lane < V; lane++) lanes[lane] = from[lane * p.sw];
          v = larger_or_nan(v, load(lanes));
        }
      }
      put(e.to, (plane * p.oh + i) * p.ow + j, v, p.ow - j, sizes);
    }
  }
  watch(e.to, sizes);
}

}  // namespace
