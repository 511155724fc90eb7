// Runs the native kernels over random layers under the sanitizers and against plain loops. See tests/runtime/sanitize.sh.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../lightning_muws/runtime/native/src/api.h"

static std::mt19937 generator(0);
static int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
static float normal() { return std::normal_distribution<float>()(generator); }

static void* library;
template <class F> static F function(const char* name) { return (F)dlsym(library, name); }

// Memory of exactly the size asked for, so that one number too far is seen.
struct Exact {
  float* data;
  explicit Exact(int64_t n) : data((float*)malloc(sizeof(float) * (size_t)n)) {
    for (int64_t i = 0; i < n; i++) data[i] = normal();
  }
  ~Exact() { free(data); }
};

static float rounded(float f) {  // to bfloat16, ties to even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  memcpy(&f, &bits, 4);
  return f;
}
static uint16_t half(float f) {
  uint32_t bits;
  f = rounded(f);
  memcpy(&bits, &f, 4);
  return (uint16_t)(bits >> 16);
}

struct Case {
  MuwsLayer l{};
  std::vector<double> matrix;
  std::vector<int32_t> starts, logical;
  std::vector<uint16_t> columns;
  std::vector<float> weights, bias;
};

static Case random_case(bool bfloat16, bool linear) {
  Case c;
  MuwsLayer& l = c.l;
  const int64_t rows[] = {1, 2, 4, 8};
  l.n = any(0, 3) ? any(1, 5) : any(6, 40);
  l.groups = linear || any(0, 3) ? 1 : 2;
  l.rows = rows[any(0, 3)];
  l.c = l.groups * any(1, 9), l.o = l.groups == 1 ? any(1, 37) : 2 * l.rows * any(1, 3);
  l.kh = l.kw = l.sh = l.sw = l.h = l.w = 1;
  if (!linear) {
    l.kh = any(1, 4), l.kw = any(1, 4), l.sh = any(1, 3), l.sw = any(1, 3), l.ph = any(0, l.kh + 1), l.pw = any(0, l.kw + 1);
    l.h = any(l.kh, 12), l.w = any(l.kw, any(0, 4) ? 12 : 80);
  } else {
    l.c = any(1, 70);
  }
  l.oh = (l.h + 2 * l.ph - l.kh) / l.sh + 1, l.ow = (l.w + 2 * l.pw - l.kw) / l.sw + 1;
  const int64_t n_in = l.c / l.groups * l.kh * l.kw;
  l.cols = bfloat16 ? 2 : n_in % 4 == 0 && any(0, 1) ? 4 : 1;
  l.row_blocks = (l.o + l.rows - 1) / l.rows;
  l.relu = any(0, 1), l.bfloat16 = bfloat16, l.batch_lanes = any(0, 2), l.threads = any(1, 3);
  if (l.batch_lanes == 1 && l.n > 1) l.batch_last_in = any(0, 1), l.batch_last_out = any(0, 1);
  c.matrix.assign((size_t)(l.row_blocks * l.rows * n_in), 0.0);
  c.starts.push_back(0);
  for (int64_t b = 0; b < l.row_blocks; b++) {
    const int64_t share = any(0, 4);  // 0: an empty row, 4: a full one
    std::vector<int32_t> kept;
    for (int64_t k = 0; k < n_in; k += bfloat16 ? 1 : l.cols)
      if (any(0, 3) < share) kept.push_back((int32_t)k);
    auto weight = [&](int64_t k, int64_t r) {
      const float w = bfloat16 ? rounded(normal()) : normal();
      c.matrix[(size_t)((b * l.rows + r) * n_in + k)] = w;
      return w;
    };
    if (!bfloat16) {
      for (int32_t k : kept) {
        c.columns.push_back((uint16_t)k);
        for (int64_t i = 0; i < l.cols; i++)
          for (int64_t r = 0; r < l.rows; r++) c.weights.push_back(weight(k + i, r));
      }
    }
    for (size_t i = 0; bfloat16 && i < kept.size(); i += 2) {
      const bool two = i + 1 < kept.size();
      c.columns.push_back(0);
      c.logical.push_back(kept[i]);
      c.logical.push_back(kept[two ? i + 1 : i]);
      for (int64_t r = 0; r < l.rows; r++) {
        const uint16_t pair[2] = {half(weight(kept[i], r)), two ? half(weight(kept[i + 1], r)) : (uint16_t)0};
        float both;
        memcpy(&both, pair, 4);
        c.weights.push_back(both);
      }
    }
    c.starts.push_back((int32_t)c.columns.size());
  }
  for (int64_t i = 0; i < l.row_blocks * l.rows; i++) c.bias.push_back(normal());
  l.starts = c.starts.data(), l.columns = c.columns.data(), l.weights = c.weights.data();
  l.bias = any(0, 1) ? c.bias.data() : nullptr;
  l.logical = bfloat16 ? c.logical.data() : nullptr, l.n_logical = (int64_t)c.logical.size();
  return c;
}

static double reference(const Case& c, const float* x, float onto, int64_t n, int64_t o, int64_t i, int64_t j) {
  const MuwsLayer& l = c.l;
  const int64_t per_group = l.c / l.groups, n_in = per_group * l.kh * l.kw;
  double sum = onto + (l.bias ? l.bias[o] : 0.0);
  for (int64_t k = 0; k < n_in; k++) {
    const int64_t ch = o / (l.o / l.groups) * per_group + k / (l.kh * l.kw);
    const int64_t h = i * l.sh + k / l.kw % l.kh - l.ph, w = j * l.sw + k % l.kw - l.pw;
    if (h < 0 || h >= l.h || w < 0 || w >= l.w) continue;
    const float in = l.batch_last_in ? x[((ch * l.h + h) * l.w + w) * l.n + n] : x[((n * l.c + ch) * l.h + h) * l.w + w];
    sum += c.matrix[(size_t)(o * n_in + k)] * (l.bfloat16 ? rounded(in) : in);
  }
  return l.relu && sum < 0 ? 0.0 : sum;
}

static void compare(const Case& c, const float* x, const float* onto, const float* y, const char* what) {
  const MuwsLayer& l = c.l;
  for (int64_t n = 0; n < l.n; n++)
    for (int64_t o = 0; o < l.o; o++)
      for (int64_t i = 0; i < l.oh; i++)
        for (int64_t j = 0; j < l.ow; j++) {
          const int64_t at = l.batch_last_out ? ((o * l.oh + i) * l.ow + j) * l.n + n : ((n * l.o + o) * l.oh + i) * l.ow + j;
          const double want = reference(c, x, onto ? onto[at] : 0.0f, n, o, i, j), got = y[at];
          if (std::fabs(got - want) > 1e-4 * (1 + std::fabs(want))) {
            std::printf("%s: got %g, not %g\n", what, got, want);
            std::exit(1);
          }
        }
}

static void run_signs(const void* level) {
  const int64_t rows[] = {4, 4, 8, 16}, which = any(0, 3);
  MuwsSigns l{};
  l.rows = rows[which], l.cols = which ? 8 * any(1, 2) : 4, l.row_blocks = any(1, 9), l.o = l.row_blocks * l.rows;
  const int64_t across = any(1, 9);
  Exact x(across * l.cols), y(l.o);
  std::vector<int32_t> starts{0};
  std::vector<uint16_t> columns;
  std::vector<float> magnitudes;
  std::vector<uint8_t> minus;
  std::vector<double> want(y.data, y.data + l.o);
  for (int64_t b = 0; b < l.row_blocks; b++) {
    for (int64_t k = 0; k < across; k++) {
      if (any(0, 1)) continue;
      columns.push_back((uint16_t)(k * l.cols));
      magnitudes.push_back(std::fabs(normal()));
      const size_t first = minus.size();
      minus.resize(first + (size_t)(l.rows * l.cols / 8), 0);
      for (int64_t r = 0; r < l.rows; r++)
        for (int64_t c = 0; c < l.cols; c++) {
          const bool below = any(0, 1);
          const int64_t bit = l.cols == 4 ? r * 4 + c : (c / 8 * l.rows + r) * 8 + c % 8;
          if (below) minus[first + (size_t)bit / 8] |= (uint8_t)(1 << bit % 8);
          want[(size_t)(b * l.rows + r)] += (below ? -1.0 : 1.0) * magnitudes.back() * x.data[k * l.cols + c];
        }
    }
    starts.push_back((int32_t)columns.size());
  }
  l.starts = starts.data(), l.columns = columns.data(), l.magnitudes = magnitudes.data(), l.minus = minus.data();
  function<void (*)(const void*, const MuwsSigns*, const float*, float*, int64_t)>("muws_signs")(level, &l, x.data, y.data, any(1, 2));
  for (int64_t i = 0; i < l.o; i++)
    if (std::fabs(y.data[i] - want[(size_t)i]) > 1e-4 * (1 + std::fabs(want[(size_t)i]))) {
      std::printf("signs: got %g, not %g\n", y.data[i], want[(size_t)i]);
      std::exit(1);
    }
}

// Bytes exactly as many as asked for.
struct ExactBytes {
  uint8_t* data;
  explicit ExactBytes(int64_t n) : data((uint8_t*)std::malloc((size_t)n)) {}
  ~ExactBytes() { std::free(data); }
};

// A layer of 8 bits against sums of whole numbers; from float32 to float32, or from bytes to both as a step of a program.
static void run_int8(const void* level, const char* name) {
  const int64_t rows[] = {1, 2, 4};
  MuwsInt8 l{};
  l.linear = any(0, 2) == 0, l.loose = any(0, 1), l.rows = rows[any(0, 2)], l.relu = any(0, 1);
  l.n = any(0, 3) ? any(1, 5) : any(6, 40), l.groups = l.linear || any(0, 3) ? 1 : 2;
  l.c = l.linear ? any(1, 70) : l.groups * any(1, 9), l.o = l.groups == 1 ? any(1, 37) : 2 * l.rows * any(1, 3);
  l.kh = l.kw = l.sh = l.sw = l.h = l.w = 1;
  if (!l.linear) {
    l.kh = any(1, 4), l.kw = any(1, 4), l.sh = any(1, 3), l.sw = any(1, 3), l.ph = any(0, l.kh + 1), l.pw = any(0, l.kw + 1);
    l.h = any(l.kh, 12), l.w = any(l.kw, any(0, 4) ? 12 : 80);
  }
  l.oh = (l.h + 2 * l.ph - l.kh) / l.sh + 1, l.ow = (l.w + 2 * l.pw - l.kw) / l.sw + 1;
  const int64_t zero = any(0, 255), next_zero = any(0, 255);
  const float activation[] = {0.25f, (float)zero}, next[] = {0.5f, (float)next_zero};
  l.activation = activation, l.row_blocks = (l.o + l.rows - 1) / l.rows;
  const int64_t per_group = l.c / l.groups, n_in = per_group * l.kh * l.kw, quads = (n_in + 3) / 4;
  std::vector<int64_t> matrix((size_t)(l.row_blocks * l.rows * n_in), 0);
  std::vector<int32_t> starts{0}, sums;
  std::vector<uint16_t> columns;
  std::vector<int8_t> weights;
  std::vector<float> scales, bias;
  for (int64_t b = 0; b < l.row_blocks; b++) {
    const int64_t share = any(0, 4);
    for (int64_t q = 0; q < quads; q++) {
      if (any(0, 3) >= share) continue;
      int64_t named[4];
      for (int64_t i = 0; i < 4; i++) named[i] = l.loose ? any(0, n_in - 1) : 4 * q + i;
      if (!l.loose) columns.push_back((uint16_t)q);
      for (int64_t i = 0; i < 4 && l.loose; i++) columns.push_back((uint16_t)named[i]);
      for (int64_t r = 0; r < l.rows; r++)
        for (int64_t i = 0; i < 4; i++) {
          const int64_t w = named[i] < n_in ? any(-127, 127) : 0;
          weights.push_back((int8_t)w);
          if (named[i] < n_in) matrix[(size_t)((b * l.rows + r) * n_in + named[i])] += w;
        }
    }
    starts.push_back((int32_t)(columns.size() / (l.loose ? 4 : 1)));
  }
  for (int64_t o = 0; o < l.row_blocks * l.rows; o++) {
    int64_t sum = 0;
    for (int64_t k = 0; k < n_in; k++) sum += matrix[(size_t)(o * n_in + k)];
    sums.push_back((int32_t)sum), scales.push_back(0.5f), bias.push_back((float)any(-9, 9));
  }
  // copies of exactly the size, so that one number too far is seen
  columns.shrink_to_fit(), weights.shrink_to_fit(), starts.shrink_to_fit();
  l.starts = starts.data(), l.columns = columns.data(), l.weights = weights.data(), l.sums = sums.data();
  l.scales = scales.data(), l.bias = any(0, 1) ? bias.data() : nullptr;
  Exact x(l.n * l.c * l.h * l.w), y(l.n * l.o * l.oh * l.ow), other(l.n * l.o * l.oh * l.ow);
  for (int64_t i = 0; i < l.n * l.c * l.h * l.w; i++) x.data[i] = 0.25f * (float)any(-300, 300);
  const float* onto = any(0, 1) ? other.data : nullptr;
  const int64_t n_in_all = l.n * l.c * l.h * l.w;
  const auto byte_of = [](float v, float inverse, int64_t z) {
    return (uint8_t)(z + (int64_t)std::nearbyint(std::fmin(std::fmax(v * inverse, (float)-z), (float)(255 - z))));
  };
  ExactBytes given(n_in_all), made(l.n * l.o * l.oh * l.ow);
  for (int64_t i = 0; i < n_in_all; i++) given.data[i] = byte_of(x.data[i], 4.0f, zero);
  const bool in_program = any(0, 1), with_numbers = !in_program || any(0, 1);
  if (in_program) {
    l.bytes_in = 1, l.next = next;
    void* outside[] = {given.data, (void*)onto, y.data, made.data};
    MuwsStep step{STEP_INT8, &l, PLACE_OUTSIDE, PLACE_OUTSIDE + 1, with_numbers ? PLACE_OUTSIDE + 2 : -1, PLACE_OUTSIDE + 3, 0, 0, 0};
    if (function<int (*)(const void*, const MuwsStep*, int64_t, char*, void* const*, int64_t)>("muws_program")(
            level, &step, 1, nullptr, outside, any(1, 3))) {
      std::printf("%s int8: finite outputs are reported as NaN\n", name);
      std::exit(1);
    }
  } else {
    function<void (*)(const void*, const MuwsInt8*, const float*, const float*, float*, int64_t)>("muws_int8")(
        level, &l, x.data, onto, y.data, any(1, 3));
  }
  for (int64_t n = 0; n < l.n; n++)
    for (int64_t o = 0; o < l.o; o++)
      for (int64_t i = 0; i < l.oh * l.ow; i++) {
        int64_t sum = 0;
        for (int64_t k = 0; k < n_in; k++) {
          const int64_t ch = o / (l.o / l.groups) * per_group + k / (l.kh * l.kw);
          const int64_t h = i / l.ow * l.sh + k / l.kw % l.kh - l.ph, w = i % l.ow * l.sw + k % l.kw - l.pw;
          if (h < 0 || h >= l.h || w < 0 || w >= l.w) continue;
          int64_t q = (int64_t)(4.0f * x.data[((n * l.c + ch) * l.h + h) * l.w + w]) + zero;
          q = q < 0 ? 0 : q > 255 ? 255 : q;
          sum += matrix[(size_t)(o * n_in + k)] * (q - zero);
        }
        const int64_t at = (n * l.o + o) * l.oh * l.ow + i;
        const float exact = (float)sum * 0.125f + (l.bias ? l.bias[o] : 0.0f) + (onto ? onto[at] : 0.0f);
        const float want = l.relu && exact < 0 ? 0.0f : exact;
        if (in_program && made.data[at] != byte_of(want, 2.0f, next_zero)) {
          std::printf("%s int8: got byte %d, not %d\n", name, made.data[at], byte_of(want, 2.0f, next_zero));
          std::exit(1);
        }
        if (with_numbers && y.data[at] != want) {
          std::printf("%s int8: got %.9g, not %.9g\n", name, y.data[at], want);
          std::exit(1);
        }
      }
}

// Runs one small step of a program, and compares n numbers with what they should be.
static void run_step(const void* level, const char* name, MuwsStep step, const std::vector<float*>& outside,
                     const std::vector<double>& want, double size) {
  step.x = PLACE_OUTSIDE, step.onto = PLACE_OUTSIDE + 1, step.more = PLACE_OUTSIDE + 2, step.y = PLACE_OUTSIDE + 3;
  const float* y = outside[3];
  ExactBytes bytes((int64_t)want.size());
  const float next[] = {0.5f, 128.0f};
  const bool rounds = step.kind != STEP_MEAN && step.kind != STEP_COPY && any(0, 1);
  std::vector<void*> places(outside.begin(), outside.end());
  places.push_back(bytes.data);
  step.q = rounds ? PLACE_OUTSIDE + 4 : -1, step.next = next;
  if (function<int (*)(const void*, const MuwsStep*, int64_t, char*, void* const*, int64_t)>("muws_program")(
          level, &step, 1, nullptr, places.data(), any(1, 3))) {
    std::printf("%s step %d: finite outputs are reported as NaN\n", name, (int)step.kind);
    std::exit(1);
  }
  for (size_t i = 0; i < want.size(); i++) {
    const double byte = std::nearbyint(std::fmin(std::fmax(y[i] / 0.5, -128.0), 127.0)) + 128.0;
    if (!(std::fabs(y[i] - want[i]) <= 1e-5 * size) || (rounds && bytes.data[i] != (uint8_t)byte)) {
      std::printf("%s step %d: got %.9g, not %.9g\n", name, (int)step.kind, y[i], want[i]);
      std::exit(1);
    }
  }
}

static void run_rows(const void* level, const char* name) {
  const int64_t rows = any(1, 9), width = any(1, 90);
  Exact x(rows * width), other(rows * width), weight(width), bias(width), y(rows * width);
  std::vector<double> want((size_t)(rows * width));
  MuwsStep step{};
  step.rows = rows, step.width = width;
  switch (any(0, 3)) {
    case 0:
      step.kind = any(0, 1) ? STEP_GELU : STEP_GELU_TANH;
      for (size_t i = 0; i < want.size(); i++) {
        const double v = x.data[i], u = 0.7978845608028654 * (v + 0.044715 * v * v * v);
        want[i] = 0.5 * v * (1 + (step.kind == STEP_GELU ? std::erf(v / std::sqrt(2.0)) : std::tanh(u)));
      }
      break;
    case 1:
      step.kind = STEP_ADD;
      for (size_t i = 0; i < want.size(); i++) want[i] = (double)x.data[i] + other.data[i];
      break;
    default:
      step.kind = STEP_NORM, step.number = 1e-5;
      step.layer = any(0, 1) ? weight.data : nullptr, step.bias = any(0, 1) ? bias.data : nullptr;
      for (int64_t r = 0; r < rows; r++) {
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < width; i++) mean += x.data[r * width + i] / (double)width;
        for (int64_t i = 0; i < width; i++) variance += std::pow(x.data[r * width + i] - mean, 2) / (double)width;
        for (int64_t i = 0; i < width; i++)
          want[(size_t)(r * width + i)] = (x.data[r * width + i] - mean) / std::sqrt(variance + 1e-5) *
                                            (step.layer ? weight.data[i] : 1.0f) +
                                        (step.bias ? bias.data[i] : 0.0f);
      }
  }
  run_step(level, name, step, {x.data, step.kind == STEP_ADD ? other.data : nullptr, nullptr, y.data}, want, 20);
}

// Queries, keys and values in one tensor (batch, rows, 3, heads, depth), as after one Linear, or each in its own.
static void run_attention(const void* level, const char* name) {
  const bool together = any(0, 1);
  MuwsAttention a{};
  a.batch = any(1, 2), a.heads = any(1, 3), a.queries = any(1, 37), a.depth = any(1, 37);
  a.keys = together ? a.queries : any(1, 90), a.width = together ? a.depth : any(1, 70);
  const int64_t row = a.heads * a.depth;
  Exact all(together ? a.batch * a.queries * 3 * row : 1), q(a.batch * a.queries * row), k(a.batch * a.keys * row);
  Exact v(a.batch * a.keys * a.heads * a.width), y(a.batch * a.queries * a.heads * a.width);
  const auto place = [&](int64_t (&to)[4], int64_t at, int64_t batch, int64_t head, int64_t step) {
    to[0] = at, to[1] = batch, to[2] = head, to[3] = step;
  };
  int64_t places[3][4];
  if (together) {
    for (int i = 0; i < 3; i++) place(places[i], i * row, a.queries * 3 * row, a.depth, 3 * row);
  } else {  // (batch, heads, rows, depth)
    place(places[0], 0, a.queries * row, a.queries * a.depth, a.depth);
    place(places[1], 0, a.keys * row, a.keys * a.depth, a.depth);
    place(places[2], 0, a.keys * a.heads * a.width, a.keys * a.width, a.width);
  }
  memcpy(&a.q_at, places, sizeof places);
  a.y_batch = a.queries * a.heads * a.width, a.y_head = a.width, a.y_row = a.heads * a.width;
  float *xq = together ? all.data : q.data, *xk = together ? all.data : k.data, *xv = together ? all.data : v.data;
  std::vector<double> want((size_t)(a.batch * a.queries * a.heads * a.width));
  for (int64_t n = 0; n < a.batch; n++)
    for (int64_t h = 0; h < a.heads; h++)
      for (int64_t t = 0; t < a.queries; t++) {
        std::vector<double> share((size_t)a.keys);
        double most = -1e300, sum = 0;
        for (int64_t s = 0; s < a.keys; s++) {
          double score = 0;
          for (int64_t d = 0; d < a.depth; d++)
            score += (double)xq[a.q_at + n * a.q_batch + h * a.q_head + t * a.q_row + d] *
                     xk[a.k_at + n * a.k_batch + h * a.k_head + s * a.k_row + d];
          share[(size_t)s] = 0.2 * score, most = std::fmax(most, 0.2 * score);
        }
        for (double& p : share) sum += p = std::exp(p - most);
        for (int64_t w = 0; w < a.width; w++) {
          double& to = want[(size_t)(n * a.y_batch + h * a.y_head + t * a.y_row + w)];
          for (int64_t s = 0; s < a.keys; s++)
            to += share[(size_t)s] / sum * xv[a.v_at + n * a.v_batch + h * a.v_head + s * a.v_row + w];
        }
      }
  MuwsStep step{};
  step.kind = STEP_ATTENTION, step.layer = &a, step.number = 0.2;
  run_step(level, name, step, {xq, xk, xv, y.data}, want, 20);
}

static void run_planes(const void* level, const char* name) {
  const int64_t planes = any(1, 5);
  MuwsPool p{};
  p.kh = any(1, 4), p.kw = any(1, 4), p.sh = any(1, 4), p.sw = any(1, 4), p.ph = any(0, p.kh / 2), p.pw = any(0, p.kw / 2);
  p.h = any(p.kh, 20), p.w = any(p.kw, 70);
  p.oh = (p.h + 2 * p.ph - p.kh) / p.sh + 1, p.ow = (p.w + 2 * p.pw - p.kw) / p.sw + 1;
  Exact x(planes * p.h * p.w), y(planes * p.oh * p.ow);
  std::vector<double> want;
  for (int64_t n = 0; n < planes * p.oh * p.ow; n++) {
    const int64_t plane = n / (p.oh * p.ow), top = n / p.ow % p.oh * p.sh - p.ph, left = n % p.ow * p.sw - p.pw;
    double most = -1e300;
    for (int64_t i = std::max<int64_t>(0, top); i < std::min(p.h, top + p.kh); i++)
      for (int64_t j = std::max<int64_t>(0, left); j < std::min(p.w, left + p.kw); j++)
        most = std::fmax(most, x.data[(plane * p.h + i) * p.w + j]);
    want.push_back(most);
  }
  MuwsStep step{};
  step.kind = STEP_POOL, step.layer = &p, step.rows = planes, step.width = p.h * p.w;
  run_step(level, name, step, {x.data, nullptr, nullptr, y.data}, want, 0);
}

// A view with its dimensions in another order, from a place inside the tensor on.
static void run_copy(const void* level, const char* name) {
  MuwsCopy c{};
  c.dims = any(1, 4);
  int64_t sizes[4], strides[4], order[4] = {0, 1, 2, 3}, n = 1, size = 1;
  for (int64_t d = c.dims - 1; d >= 0; d--) {
    sizes[d] = any(1, 9), strides[d] = size * any(1, 2);
    size = sizes[d] * strides[d], n *= sizes[d];
  }
  std::shuffle(order, order + c.dims, generator);
  for (int64_t d = 0; d < c.dims; d++) c.sizes[d] = sizes[order[d]], c.strides[d] = strides[order[d]];
  c.at = any(0, 3);
  int64_t last = c.at;
  for (int64_t d = 0; d < c.dims; d++) last += (c.sizes[d] - 1) * c.strides[d];
  Exact x(last + 1), y(n);
  std::vector<double> want;
  for (int64_t i = 0; i < n; i++) {
    int64_t at = c.at, rest = i;
    for (int64_t d = c.dims - 1; d >= 0; d--) at += rest % c.sizes[d] * c.strides[d], rest /= c.sizes[d];
    want.push_back(x.data[at]);
  }
  MuwsStep step{};
  step.kind = STEP_COPY, step.layer = &c, step.width = c.sizes[c.dims - 1], step.rows = n / step.width;
  run_step(level, name, step, {x.data, nullptr, nullptr, y.data}, want, 0);
}

int main(int, char** arguments) {
  library = dlopen(arguments[1], RTLD_NOW);
  if (!library) {
    std::printf("%s\n", dlerror());
    return 1;
  }
  auto nth = function<const void* (*)(int64_t)>("muws_nth_level");
  auto name_of = function<const char* (*)(const void*)>("muws_level_name");
  auto make = function<void* (*)(const void*, const MuwsLayer*)>("muws_plan");
  auto run = function<int (*)(const void*, void*, const float*, const float*, float*, int64_t)>("muws_run");
  auto release = function<void (*)(const void*, void*)>("muws_free_plan");
  auto gemv = function<void (*)(const void*, const MuwsLayer*, const float*, float*, int64_t)>("muws_gemv");
  for (int64_t n = 0; const void* level = nth(n); n++) {
    const std::string name = name_of(level);
    const int cases = std::atoi(arguments[2]);
    for (int i = 0; i < cases; i++) {
      const bool linear = i % 4 == 0;
      Case c = random_case(name == "avx512_bf16" && i % 2, linear);
      Exact x(c.l.n * c.l.c * c.l.h * c.l.w), y(c.l.n * c.l.o * c.l.oh * c.l.ow), other(c.l.n * c.l.o * c.l.oh * c.l.ow);
      const bool adds = (c.l.batch_lanes != 1 || c.l.batch_last_out) && any(0, 1);
      const float* onto = adds ? other.data : nullptr;
      void* plan = make(level, &c.l);
      run(level, plan, x.data, onto, y.data, any(1, 3));
      release(level, plan);
      compare(c, x.data, onto, y.data, name.c_str());
      if (linear && !c.l.bfloat16 && !c.l.batch_last_in && !c.l.batch_last_out) {
        gemv(level, &c.l, x.data, y.data, any(1, 3));
        compare(c, x.data, nullptr, y.data, (name + " gemv").c_str());
      }
      run_signs(level);
      run_int8(level, name.c_str());
      run_rows(level, name.c_str());
      run_attention(level, name.c_str());
      run_planes(level, name.c_str());
      run_copy(level, name.c_str());
    }
    std::printf("%s: %d layers, no finding\n", name.c_str(), cases);
  }
  return 0;
}
