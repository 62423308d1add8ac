// The engine under test, and threads for it.
#pragma once

#include <thread>
#include <vector>

#include "engine.h"

#if !defined(FP_TESTED_ENGINE)
#define FP_TESTED_ENGINE portable_engine
#endif

namespace flashpair {
extern const Engine FP_TESTED_ENGINE;
}

namespace tested {

template <class T>
const flashpair::EnginePasses<T>& passes() {
  if constexpr (sizeof(T) == 4)
    return flashpair::FP_TESTED_ENGINE.f32;
  else
    return flashpair::FP_TESTED_ENGINE.f64;
}

// Every task on a thread of its own.
inline void parallel(int64_t count, void (*task)(int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t k = 0; k < count; ++k) threads.emplace_back(task, k, context);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace tested
