// Kernels for CPUs with AVX-512. Only GCC can set the instructions of a whole file from within.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#define MUWS_LEVEL avx512
#include "level.h"
#endif
