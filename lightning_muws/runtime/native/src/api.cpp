// Knows which levels this CPU has, and hands each call to one. Compiled for any CPU.
#include "api.h"

#include <string.h>

extern "C" {

extern const MuwsLevel muws_level_portable;
extern const MuwsLevel muws_level_avx2, muws_level_avx512, muws_level_avx512_bf16;  // where they were compiled

#define MUWS_PUBLIC __attribute__((visibility("default")))

// The level of this name, the best of this CPU where the name is empty; null where this CPU or this build has it not.
static const MuwsLevel* find(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool any = !*name;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  (void)any, (void)avx512;
#if defined(MUWS_HAVE_AVX512_BF16)
  if (avx512 && __builtin_cpu_supports("avx512bf16") && (any || !strcmp(name, "avx512_bf16")))
    return &muws_level_avx512_bf16;
#endif
#if defined(MUWS_HAVE_AVX512)
  if (avx512 && (any || !strcmp(name, "avx512"))) return &muws_level_avx512;
#endif
#if defined(MUWS_HAVE_AVX2)
  if (avx2 && (any || !strcmp(name, "avx2"))) return &muws_level_avx2;
#endif
#endif
  return !*name || !strcmp(name, "portable") ? &muws_level_portable : nullptr;
}

// Two numbers that must be those of the Python side: a library left over from another version is not used.
MUWS_PUBLIC int64_t muws_layout(int64_t which) { return which ? sizeof(MuwsSigns) : sizeof(MuwsLayer); }

MUWS_PUBLIC const void* muws_level(const char* name) { return find(name); }
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
}
