// The CPU backend's entry points: one table per instruction set, chosen at run time.
#pragma once

#include "problem.h"

namespace flashpair {

template <class T>
struct EnginePasses {
  void (*stats)(const Problem<T>&, T* rows, T* columns);
  void (*weights)(const Problem<T>&, const Gradients<T>&);
  void (*extremes)(const Problem<T>&, T* const* values, int64_t* const* indices);
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
