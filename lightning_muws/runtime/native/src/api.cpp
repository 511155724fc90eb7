// Knows the levels that are compiled in and those this CPU can run, and passes each call to one. Compiled for any CPU.
#include "api.h"

extern "C" {
extern const MuwsLevel muws_level_portable;
// if they were compiled
extern const MuwsLevel muws_level_avx2, muws_level_avx_vnni, muws_level_avx512, muws_level_avx512_vnni;
extern const MuwsLevel muws_level_avx512_bf16;
}

namespace {

struct Candidate {
  const MuwsLevel* level;
  bool (*runs_here)();
};

[[maybe_unused]] bool any_cpu() { return true; }
#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#if defined(MUWS_HAVE_AVX_VNNI)
bool has_avx_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
#endif
[[maybe_unused]] bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#if defined(MUWS_HAVE_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

// The best first. setup.py names the levels and defines MUWS_HAVE_* for those that the compiler could build.
const Candidate candidates[] = {
#if defined(MUWS_HAVE_AVX512_BF16)
    {&muws_level_avx512_bf16, has_avx512_bf16},
#endif
#if defined(MUWS_HAVE_AVX512_VNNI)
    {&muws_level_avx512_vnni, has_avx512_vnni},
#endif
#if defined(MUWS_HAVE_AVX512)
    {&muws_level_avx512, has_avx512},
#endif
#if defined(MUWS_HAVE_AVX_VNNI)
    {&muws_level_avx_vnni, has_avx_vnni},
#endif
#if defined(MUWS_HAVE_AVX2)
    {&muws_level_avx2, has_avx2},
#endif
    {&muws_level_portable, any_cpu},
};

}  // namespace

#define MUWS_PUBLIC __attribute__((visibility("default")))

extern "C" {

// The sizes of MuwsLayer (0), MuwsSigns (1), MuwsInt8 (2) and MuwsStep (3). Python compares them with its own and ignores a
// library that differs.
MUWS_PUBLIC int64_t muws_layout(int64_t which) {
  const size_t sizes[] = {sizeof(MuwsLayer), sizeof(MuwsSigns), sizeof(MuwsInt8), sizeof(MuwsStep)};
  return (int64_t)sizes[which];
}

// Level number n of those that this CPU can run, the best first; null past the last.
MUWS_PUBLIC const void* muws_nth_level(int64_t n) {
  for (const Candidate& candidate : candidates)
    if (candidate.runs_here() && n-- == 0) return candidate.level;
  return nullptr;
}
MUWS_PUBLIC const char* muws_level_name(const void* level) { return ((const MuwsLevel*)level)->name; }

MUWS_PUBLIC void* muws_plan(const void* level, const MuwsLayer* layer) {
  return ((const MuwsLevel*)level)->plan(layer);
}
MUWS_PUBLIC int muws_run(const void* level, void* plan, const float* x, const float* onto, float* y, int64_t threads) {
  return ((const MuwsLevel*)level)->run(plan, x, onto, y, threads);
}
MUWS_PUBLIC void muws_free_plan(const void* level, void* plan) { ((const MuwsLevel*)level)->free_plan(plan); }
MUWS_PUBLIC void muws_gemv(const void* level, const MuwsLayer* layer, const float* x, float* y, int64_t threads) {
  ((const MuwsLevel*)level)->gemv(layer, x, y, threads);
}
MUWS_PUBLIC void muws_signs(const void* level, const MuwsSigns* layer, const float* x, float* y, int64_t threads) {
  ((const MuwsLevel*)level)->signs(layer, x, y, threads);
}
MUWS_PUBLIC void muws_int8(const void* level, const MuwsInt8* layer, const float* x, const float* onto, float* y,
                           int64_t threads) {
  ((const MuwsLevel*)level)->int8(layer, x, onto, y, threads);
}
MUWS_PUBLIC int muws_program(const void* level, const MuwsStep* steps, int64_t n_steps, char* arena,
                             void* const* outside, int64_t threads) {
  return ((const MuwsLevel*)level)->program(steps, n_steps, arena, outside, threads);
}
}
