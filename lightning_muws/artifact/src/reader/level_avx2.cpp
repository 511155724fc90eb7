// Kernels for CPUs with AVX2. Only GCC can set the instructions of a whole file from within.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define MUWS_LEVEL avx2
#include "level.h"
#endif
