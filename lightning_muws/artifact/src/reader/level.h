// The kernels of runtime/native/src that the library runs. Included by one file for each instruction set, with its name.
#include "../../../runtime/native/src/gemv.h"
#include "../../../runtime/native/src/layer.h"
#include "../../../runtime/native/src/signs.h"

#define MUWS_JOIN(a, b) a##b
#define MUWS_EXPORT(name) MUWS_JOIN(muws_level_, name)
#define MUWS_STRING(name) #name
#define MUWS_NAME(name) MUWS_STRING(name)

extern "C" const MuwsLevel MUWS_EXPORT(MUWS_LEVEL);
const MuwsLevel MUWS_EXPORT(MUWS_LEVEL) = {MUWS_NAME(MUWS_LEVEL), make_plan, run_plan, free_plan, run_gemv, run_signs, nullptr, nullptr};
