// Kernels for any CPU of this kind; flags such as -march=native make them faster.
#define MUWS_LEVEL portable
#include "level.h"
