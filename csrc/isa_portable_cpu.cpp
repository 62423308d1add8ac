// The CPU backend for any processor.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine.h"
#include "memory_cpu.h"
#include "order_cpu.h"
#include "panel_cache_cpu.h"
#include "subnormals_cpu.h"

#define FP_NAMESPACE portable
#define FP_ENGINE portable_engine
#define FP_ENGINE_NAME "portable"
#define FP_VECTOR_BYTES 16
#define FP_MR 4  // rows of a register block
#define FP_NV 2  // vectors of a register block

#include "masks.h"
#include "reductions.h"
#include "scores.h"

#include "engine_cpu.h"
