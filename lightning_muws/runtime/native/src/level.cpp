// Compiled once for every instruction set, whose name is MUWS_LEVEL.
#include "gemv.h"
#include "int8_run.h"
#include "layer.h"
#include "program.h"
#include "signs.h"

#define MUWS_JOIN(a, b) a##b
#define MUWS_EXPORT(name) MUWS_JOIN(muws_level_, name)
#define MUWS_STRING(name) #name
#define MUWS_NAME(name) MUWS_STRING(name)

extern "C" const MuwsLevel MUWS_EXPORT(MUWS_LEVEL);
const MuwsLevel MUWS_EXPORT(MUWS_LEVEL) = {MUWS_NAME(MUWS_LEVEL), make_plan, run_plan, free_plan,
                                           run_gemv,              run_signs, run_int8,  run_program};
