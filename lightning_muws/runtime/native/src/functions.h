// The exponential function and GELU of vectors; NaN stays NaN.
#pragma once
#include "int8.h"

namespace {

typedef uint32_t vu __attribute__((vector_size(4 * V)));

// e ** x for x up to 88, within 2 units in the last place; 0 below -87. x = n log(2) + r, and e ** r is a polynomial.
MUWS_INLINE vf exp_of(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2 ** 23 leaves no bits below the unit: that rounds to the nearest
  const vf low = x < splat(-87.0f) ? splat(-87.0f) : x, clamped = low > splat(88.0f) ? splat(88.0f) : low;
  const vf shifted = clamped * splat(1.44269504f) + magic;
  const vf n = shifted - magic;
  const vf r = (clamped - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  vf p = splat(0.0013933000f) * r + splat(0.0083631733f);
  p = p * r + splat(0.041666452f);
  p = p * r + splat(0.16666578f);
  p = p * r + splat(0.5f);
  p = (p * r) * r + r + splat(1.0f);
  const vf power = (vf)(((vu)shifted << 23) + ((vu)splat(1.0f)));
  return x < splat(-87.0f) ? vf{} : p * power;
}

// x Phi(x) within 3 * 2 ** -23 |x|; Phi is the normal distribution. (Phi(x) - 1/2) / x is a polynomial in x ** 2, the
// interpolation of degree 16 at the Chebyshev points of |x| <= 5.6; beyond, Phi is 0 or 1 in float32.
MUWS_INLINE vf gelu(vf x) {
  const float coefficients[] = {-0.00040118131f, 0.00023534535f, -0.00038221315f, 0.0017042285f, -0.0032064570f, 0.0046450347f,
                                -0.0073018377f,  0.011268571f,   -0.015843373f,   0.020879425f,  -0.026295070f,  0.031976435f,
                                -0.038346894f,   0.046980627f,   -0.063051254f,   0.12625960f};
  const vf most_x = splat(5.6f);
  const vf low = x < -most_x ? -most_x : x, clamped = low > most_x ? most_x : low;
  const vf s = (clamped * clamped) * splat(0.0637755096f) - splat(1.0f);
  vf p = splat(0.00016473194f);
#pragma GCC unroll 16
  for (float c : coefficients) p = p * s + splat(c);
  const vf inside = clamped * p + splat(0.5f);
  const vf phi = x >= most_x ? splat(1.0f) : x <= -most_x ? vf{} : inside;
  return x * phi;
}

// x / (1 + e ** -2u) with u = sqrt(2 / pi) (x + 0.044715 x ** 3): the form of GELU with tanh u.
MUWS_INLINE vf gelu_tanh(vf x) {
  const vf u2 = (x * splat(1.595769122f)) * (splat(1.0f) + splat(0.044715f) * (x * x));
  const vf share = splat(1.0f) / (splat(1.0f) + exp_of(-u2));
  return x * (u2 < splat(-87.0f) ? vf{} : share);
}

// The sum of all lanes.
MUWS_INLINE float total(vf v) {
  float lanes[V];
  store(lanes, v);
  for (int half = V / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}
// The largest lane.
MUWS_INLINE float greatest(vf v) {
  float lanes[V];
  store(lanes, v);
  for (int half = V / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = most(lanes[i], lanes[i + half]);
  return lanes[0];
}

// v with zeros from lane n on.
MUWS_INLINE vf first_lanes(vf v, int64_t n) {
#if MUWS_LANES == 16
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif MUWS_LANES == 8
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
#else
  const vi lane = {0, 1, 2, 3};
#endif
  return lane < splat_int((int32_t)n) ? v : vf{};
}

MUWS_INLINE vf load_part(const float* from, int64_t n) { return n >= V ? load(from) : load_some(from, n); }

// Store up to V outputs from place `at` on; `sizes` grows to the largest size of each lane.
MUWS_INLINE void put(const Output8& to, int64_t at, vf v, int64_t n, vi& sizes) {
  if (to.y && n >= V) store(to.y + at, v);
  if (to.y && n < V) store_some(to.y + at, v, n);
  if (!to.q) return;
  sizes = most_of(sizes, sizes_of(n >= V ? v : first_lanes(v, n)));
  const vi bytes = nearest(v, to.next);
  n >= V ? store_bytes(to.q + at, bytes) : store_some_bytes(to.q + at, bytes, n);
}

}  // namespace
