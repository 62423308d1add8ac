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
#include "ordered_cpu.h"
#include "tabulated_cpu.h"
#include "hardest_cpu.h"
#include "soft_ranks_cpu.h"
#include "pair_gate_cpu.h"
#include "places_cpu.h"
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

template <class T>
PanelTotal ordered(const OrderedPanel<T>& panel) {
  return panel.narrow ? OrderedLogSums<T, float>(panel).run() : OrderedLogSums<T, double>(panel).run();
}

template <class T>
double tabulated(const TabulatedPanel<T>& panel) {
  return Tabulated<T>(panel).run();
}

template <class T>
PanelTotal hardest(const HardestPanel<T>& panel) {
  return Hardest<T>(panel).run();
}

template <class T>
void soft_ranks(const SoftRanksPanel<T>& panel) {
  SoftRanks<T>(panel).run();
}

template <class T>
void pair_gate(const PairGatePanel<T>& panel) {
  PairGate<T>(panel).run();
}

template <class T>
void places(const T* sorted, int64_t count, const T* values, int64_t columns, T sign, T shift, bool below,
            int32_t* found) {
  (below ? places_among<T, true> : places_among<T, false>)(sorted, count, values, columns, sign, shift, found);
}

template <class T>
constexpr EnginePasses<T> kPasses = {stats<T>,   weights<T>,    extremes<T>,  ordered<T>, tabulated<T>,
                                     hardest<T>, soft_ranks<T>, pair_gate<T>, places<T>};

}  // namespace FP_NAMESPACE

extern const Engine FP_ENGINE;
const Engine FP_ENGINE = {
    FP_ENGINE_NAME,
    FP_VECTOR_BYTES,
    FP_NAMESPACE::kPasses<float>,
    FP_NAMESPACE::kPasses<double>,
};

}  // namespace flashpair
