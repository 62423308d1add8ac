// One pass over the pairs as plain data: no torch, no vector types. The decoded twin of python/flashpair/request.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "options.h"

namespace flashpair {

// A parameter of a term: one number, or one value per owner.
template <class T>
struct Parameter {
  const T* data = nullptr;  // (owners,), or nullptr: `number` everywhere
  T number = 0;
  bool uniform() const { return data == nullptr; }
  T at(int64_t i) const { return data ? data[i] : number; }
};

template <class T>
struct Term {
  Reduction reduction;
  Score score;
  Mask mask;
  Axis axis;
  Combine combine;
  bool detach_weights;
  Guide guide;
  T constant;
  Parameter<T> scale, offset;  // owner side
  const T* other_offset;       // (others,) or nullptr
  const T* weight;             // (others,) or nullptr
  Parameter<T> above, below;   // owner side
  bool has_above, has_below;
  int scale_index, offset_index, other_index, weight_index;  // positions in the list of parameters, -1: a number
  int slot;                                                  // first vector of this term in the statistics of its axis
};

template <class T>
struct Extreme {
  Mask mask;
  bool largest;
  int k;
  Parameter<T> above, below;  // per row
  bool has_above, has_below;
};

// Runs task(0), ..., task(count - 1), possibly at the same time.
using Parallel = void (*)(int64_t count, void (*task)(int64_t, void*), void* context);

template <class T>
struct Problem {
  const T* x;  // (B, D)
  const T* y;  // (N, D); unused in a self-similarity
  int64_t rows, columns, features;
  const int64_t* labels;      // (B,) or nullptr
  const int64_t* ref_labels;  // (N,) or nullptr
  const bool* pair_mask;      // (B, N) or nullptr
  const int64_t* exclude;     // (B,) or nullptr
  bool guided;                // there is a second product
  const T* guide_rows;        // (B, E)
  const T* guide_columns;     // (N, E); unused in a self-similarity
  int64_t guide_features;     // E
  Similarity similarity;
  bool self;  // the columns are the rows
  bool normalize, exclude_self, keep;
  int64_t workspace_bytes;
  std::vector<Term<T>> terms;
  std::vector<Extreme<T>> extremes;
  int threads;
  Parallel parallel;

  bool symmetric() const { return self; }
};

// What a backward pass reads and writes; null pointers are not wanted.
template <class T>
struct Gradients {
  const T* rows;          // (R, B) statistics
  const T* columns;       // (C, N)
  const T* grad_rows;     // (R, B) cotangents
  const T* grad_columns;  // (C, N)
  T* dx;                  // (B, D)
  T* dy;                  // (N, D)
  // Per term: gradients of its parameters, one value per owner or other, summed by the caller where the parameter is one
  // number; nullptr where not wanted.
  std::vector<T*> dscale, doffset, dother, dweight;
  double* total;  // with it: the sum of all terms is computed in the same pass, cotangents are 1
};

}  // namespace flashpair
