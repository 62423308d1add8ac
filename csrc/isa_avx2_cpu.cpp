// The CPU backend for x86-64 with AVX2.
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

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#define FP_NAMESPACE avx2
#define FP_ENGINE avx2_engine
#define FP_ENGINE_NAME "avx2"
#define FP_VECTOR_BYTES 32
#define FP_MR 6  // rows of a register block
#define FP_NV 2  // vectors of a register block

#include "masks.h"
#include "reductions.h"
#include "scores.h"

#include "engine_cpu.h"

#pragma GCC pop_options
#endif
