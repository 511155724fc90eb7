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

constexpr int BIAS = 2;        // the slot of a padded bias
constexpr uint64_t FEW = 3;    // samples that are computed one by one

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

void Packed::run(const float *x, float *y, uint64_t n, const float *bias, bool relu) const {
  MuwsLayer layer = {};
  layer.n = int64_t(n), layer.c = int64_t(inputs), layer.o = int64_t(outputs);
  layer.h = layer.w = layer.oh = layer.ow = layer.kh = layer.kw = layer.sh = layer.sw = layer.groups = 1;
  layer.rows = values.rows, layer.cols = values.cols, layer.row_blocks = values.row_blocks;
  layer.starts = values.first(), layer.columns = values.column(), layer.weights = weight();
  layer.bias = bias, layer.relu = relu, layer.batch_lanes = 1, layer.threads = 1;
  if (n <= FEW) return kernels.kernels->gemv(&layer, x, y, 1);
  const auto release = kernels.kernels->free_plan;
  const std::unique_ptr<void, decltype(release)> plan(kernels.kernels->plan(&layer), release);
  if (!plan) throw std::bad_alloc();
  kernels.kernels->run(plan.get(), x, nullptr, y, 1);
}

void Packed::linear(const float *x, float *y, uint64_t n, const float *bias, bool relu) const {
  if (!n || !outputs) return;
  Work work(work_bytes);
  if (!values.n) {
    for (uint64_t i = 0; i < n; i++)
      for (uint64_t o = 0; o < outputs; o++) y[i * outputs + o] = bias ? bias[o] : 0;
  } else {
    if (bias && outputs % uint64_t(values.rows)) {  // the kernels read whole rows of blocks
      float *padded = work.floats(BIAS, uint64_t(values.row_blocks * values.rows));
      memset(std::copy(bias, bias + outputs, padded), 0, (uint64_t(values.row_blocks * values.rows) - outputs) * 4);
      bias = padded;
    }
    const uint64_t parts = (n + BATCH - 1) / BATCH;
    for (uint64_t i = 0; i < parts; i++) {
      const uint64_t first = n / parts * i + std::min(i, n % parts), some = n / parts + (i < n % parts);
      run(x + first * inputs, y + first * outputs, some, bias, relu && !signs.n);
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

}  // namespace muws

// What the kernels call: one thread, and memory of the call.
extern "C" void muws_parallel(int64_t, int64_t items, MuwsTask task, void *context) {
  for (int64_t item = 0; item < items; item++) task(context, item);
}

extern "C" float *muws_scratch(int slot, size_t n_floats) { return muws::Work::current->floats(slot, n_floats); }
