#include "engine.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define FP_HAS_X86 1
#else
#define FP_HAS_X86 0
#endif

namespace flashpair {

extern const Engine portable_engine;
#if FP_HAS_X86
extern const Engine avx2_engine, avx512_engine;
#endif

namespace {

const Engine& choose() {
  const char* asked = std::getenv("FLASHPAIR_CPU_ISA");
#if FP_HAS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (asked && std::strcmp(asked, "portable") == 0) return portable_engine;
  if (avx512 && !(asked && std::strcmp(asked, "avx2") == 0)) return avx512_engine;
  if (avx2) return avx2_engine;
#else
  (void)asked;
#endif
  return portable_engine;
}

}  // namespace

const Engine& engine() {
  static const Engine& chosen = choose();
  return chosen;
}

}  // namespace flashpair
