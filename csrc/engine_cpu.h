// The CPU backend for one instruction set. Included by isa_*_cpu.cpp, each in its own namespace FP_NAMESPACE, compiled
// for its own target; the order of the includes below is the order of dependence.

namespace flashpair {
namespace FP_NAMESPACE {

// clang-format off
#include "simd.h"
#include "gemm_cpu.h"
#include "sides_cpu.h"
#include "walk_cpu.h"
#include "terms_cpu.h"
#include "stats_cpu.h"
#include "weights_cpu.h"
#include "extremes_cpu.h"
// clang-format on

template <class T>
void stats(const Problem<T>& problem, T* rows, T* columns) {
  Walk<T> walk(problem);
  walk.use_cache(problem.keep);
  Stats<T> pass(walk);
  pass.run(rows, columns);
}

template <class T>
void weights(const Problem<T>& problem, const Gradients<T>& gradients) {
  Walk<T> walk(problem);
  walk.use_cache(false);
  Weights<T> pass(walk, gradients);
  pass.run();
}

template <class T>
void extremes(const Problem<T>& problem, T* const* values, int64_t* const* indices) {
  Walk<T> walk(problem);
  walk.use_cache(problem.keep);
  Extremes<T> pass(walk);
  pass.run(values, indices);
}

}  // namespace FP_NAMESPACE

extern const Engine FP_ENGINE;
const Engine FP_ENGINE = {
    FP_ENGINE_NAME,
    FP_VECTOR_BYTES,
    {FP_NAMESPACE::stats<float>, FP_NAMESPACE::weights<float>, FP_NAMESPACE::extremes<float>},
    {FP_NAMESPACE::stats<double>, FP_NAMESPACE::weights<double>, FP_NAMESPACE::extremes<double>},
};

}  // namespace flashpair
