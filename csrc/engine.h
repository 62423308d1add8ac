// The CPU backend's entry points: one table per instruction set, chosen at run time.
#pragma once

#include "panel_formulas.h"
#include "problem.h"

namespace flashpair {

template <class T>
struct EnginePasses {
  void (*stats)(const Problem<T>&, T* rows, T* columns);
  void (*weights)(const Problem<T>&, const Gradients<T>&);
  void (*extremes)(const Problem<T>&, T* const* values, int64_t* const* indices);
  PanelTotal (*ordered)(const OrderedPanel<T>&);
  double (*tabulated)(const TabulatedPanel<T>&);
  PanelTotal (*hardest)(const HardestPanel<T>&);
  void (*soft_ranks)(const SoftRanksPanel<T>&);
  void (*pair_gate)(const PairGatePanel<T>&);
  // How many of `count` sorted numbers are below sign · values[j] - shift, without `below` those level with it too.
  void (*places)(const T* sorted, int64_t count, const T* values, int64_t columns, T sign, T shift, bool below,
                 int32_t* places);
};

struct Engine {
  const char* name;
  int vector_bytes;
  EnginePasses<float> f32;
  EnginePasses<double> f64;
};

// The best engine that this processor runs; FLASHPAIR_CPU_ISA=portable|avx2|avx512 asks for another.
const Engine& engine();

}  // namespace flashpair
