// Runs a packed weight with the kernels of this CPU.
#include <algorithm>
#include <new>
#include <stdexcept>

#include "packed.h"

extern "C" {
extern const MuwsLevel muws_level_portable;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MUWS_LEVELS
extern const MuwsLevel muws_level_avx2, muws_level_avx512;
#endif
}

namespace muws {

namespace {

// The working memory of one call, which ends with it.
struct Work {
  explicit Work(uint64_t n_bytes) : left(n_bytes), outer(current) { current = this; }
  Work(const Work &) = delete;
  Work &operator=(const Work &) = delete;
  ~Work() {
    for (float *one : memory) free(one);
    current = outer;
  }

  float *floats(int slot, uint64_t n) {
#if defined(__SANITIZE_ADDRESS__)
    if (memory[slot] && sizes[slot] == n) return memory[slot];  // exactly, so that the sanitizer sees a read past the end
#else
    if (memory[slot] && sizes[slot] >= n) return memory[slot];
#endif
    free(memory[slot]);
    left += 4 * sizes[slot];
    memory[slot] = nullptr, sizes[slot] = 0;
    if (4 * n > left) throw std::logic_error("a layer takes more working memory than was counted");
    const uint64_t n_bytes = (4 * n + 63) / 64 * 64;
    memory[slot] = static_cast<float *>(aligned_alloc(64, n_bytes ? n_bytes : 64));
    if (!memory[slot]) throw std::bad_alloc();
    left -= 4 * n;
    sizes[slot] = n;
    return memory[slot];
  }

  static thread_local Work *current;

 private:
  float *memory[3] = {};
  uint64_t sizes[3] = {}, left;
  Work *outer;
};
thread_local Work *Work::current = nullptr;

void run(const MuwsLevel &kernels, const MuwsLayer &layer, const float *x, float *y) {
  const std::unique_ptr<void, decltype(kernels.free_plan)> plan(kernels.plan(&layer), kernels.free_plan);
  if (!plan) throw std::bad_alloc();
  kernels.run(plan.get(), x, nullptr, y, 1);
}

constexpr int BIAS = 2;        // the slot of a padded bias
constexpr uint64_t LANES = 16;
constexpr int64_t FEW = 3;     // samples that are computed one by one

}  // namespace

Level level() {
  const char *wanted = getenv("MUWS_LEVEL");
  const auto is_wanted = [&](const MuwsLevel &one) { return !wanted || !*wanted || !strcmp(wanted, one.name); };
#if defined(MUWS_LEVELS)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && is_wanted(muws_level_avx512)) return {&muws_level_avx512, 8};
  if (has_avx2 && is_wanted(muws_level_avx2)) return {&muws_level_avx2, 4};
#endif
  if (!is_wanted(muws_level_portable)) refuse_as(MUWS_ARGUMENT, "MUWS_LEVEL=%s is not allowed here", Shown(wanted, strlen(wanted)).text);
  return {&muws_level_portable, 4};
}

// A layer of one position, for any number of samples.
MuwsLayer Packed::layer(const float *bias, bool relu) const {
  MuwsLayer one = {};
  one.c = int64_t(inputs), one.o = int64_t(outputs);
  one.h = one.w = one.oh = one.ow = one.kh = one.kw = one.sh = one.sw = one.groups = 1;
  one.rows = values.rows, one.cols = values.cols, one.row_blocks = values.row_blocks;
  one.starts = values.first(), one.columns = values.column(), one.weights = weight();
  one.bias = bias, one.relu = relu, one.batch_lanes = 1, one.threads = 1;
  return one;
}

// The kernels read the bias of whole rows of blocks.
const float *Packed::padded(const float *bias) const {
  const uint64_t n = uint64_t(values.row_blocks * values.rows);
  if (!bias || n == outputs) return bias;
  float *found = Work::current->floats(BIAS, n);
  memset(std::copy(bias, bias + outputs, found), 0, (n - outputs) * 4);
  return found;
}

void Packed::linear(const float *x, float *y, uint64_t n, const float *bias, bool relu) const {
  if (!n || !outputs) return;
  Work work(work_bytes);
  if (!values.n) {
    for (uint64_t i = 0; i < n; i++)
      for (uint64_t o = 0; o < outputs; o++) y[i * outputs + o] = bias ? bias[o] : 0;
  } else {
    MuwsLayer all = layer(padded(bias), relu && !signs.n);
    const uint64_t parts = (n + BATCH - 1) / BATCH;
    for (uint64_t i = 0; i < parts; i++) {
      const uint64_t first = n / parts * i + std::min(i, n % parts);
      all.n = int64_t(n / parts + (i < n % parts));
      if (all.n <= FEW) kernels.kernels->gemv(&all, x + first * inputs, y + first * outputs, 1);
      else run(*kernels.kernels, all, x + first * inputs, y + first * outputs);
    }
  }
  if (signs.n) {
    MuwsSigns layer = {};
    layer.o = signs.row_blocks * signs.rows, layer.rows = signs.rows, layer.cols = signs.cols, layer.row_blocks = signs.row_blocks;
    layer.starts = signs.first(), layer.columns = signs.column(), layer.magnitudes = magnitude(), layer.minus = minus.data();
    for (uint64_t i = 0; i < n; i++) kernels.kernels->signs(&layer, x + i * inputs, y + i * outputs, 1);
  }
  if (relu && (signs.n || !values.n))
    for (uint64_t i = 0; i < n * outputs; i++) y[i] = y[i] < 0 ? 0 : y[i];
}

void Packed::conv2d(const MuwsConv2d &shape, const uint64_t out[2], const float *x, float *y, const float *bias, bool relu) const {
  const uint64_t plane = out[0] * out[1];
  if (!values.n) {
    for (uint64_t i = 0; i < shape.n * outputs; i++) {
      const float value = bias ? bias[i % outputs] : 0;
      std::fill(y + i * plane, y + (i + 1) * plane, relu && value < 0 ? 0 : value);
    }
    return;
  }
  Work work(UINT64_MAX / 8);
  MuwsLayer one = layer(padded(bias), relu);
  one.n = int64_t(shape.n), one.c = int64_t(shape.channels), one.h = int64_t(shape.height), one.w = int64_t(shape.width);
  one.oh = int64_t(out[0]), one.ow = int64_t(out[1]);
  one.kh = int64_t(shape.kernel[0]), one.kw = int64_t(shape.kernel[1]);
  one.sh = int64_t(shape.stride[0]), one.sw = int64_t(shape.stride[1]);
  one.ph = int64_t(shape.padding[0]), one.pw = int64_t(shape.padding[1]);
  // lanes over images where rows are shorter than a vector and there are as many images; else over unfolded positions, if they
  // fit the cache, or over those of the image
  one.batch_lanes = shape.n >= LANES && out[1] < LANES ? 1 : 2;
  run(*kernels.kernels, one, x, y);
}

}  // namespace muws

// What the kernels call: one thread, and memory of the call.
extern "C" void muws_parallel(int64_t, int64_t items, MuwsTask task, void *context) {
  for (int64_t item = 0; item < items; item++) task(context, item);
}

extern "C" float *muws_scratch(int slot, size_t n_floats) { return muws::Work::current->floats(slot, n_floats); }
