// What the engines compute, as a double loop over pairs in long double. Straight from the definition in
// python/flashpair/reference.py; nothing of the engines is used but their plain data.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace oracle {

using namespace flashpair;
using Wide = long double;
using Values = std::vector<Wide>;

inline int slots(Reduction reduction) {
  return reduction == Reduction::softmax_mean ? 2 : reduction == Reduction::moments ? 5 : 1;
}

template <class T>
int64_t owners(const Problem<T>& p, const Term<T>& term) {
  return term.axis == Axis::rows ? p.rows : p.columns;
}
template <class T>
int64_t others(const Problem<T>& p, const Term<T>& term) {
  return term.axis == Axis::rows ? p.columns : p.rows;
}

// The embeddings after normalisation and their similarities.
template <class T>
struct Pairs {
  const Problem<T>& problem;
  Values x, y, norm_x, norm_y, s;  // (B, D), (N, D), (B,), (N,), (B, N)

  explicit Pairs(const Problem<T>& p);
  bool keeps(Mask mask, int64_t i, int64_t j) const;

 private:
  void prepare(const T* input, int64_t count, Values& out, Values& norms) const;
  Wide similarity(int64_t i, int64_t j) const;
};

// Statistics of a term: (slots, owners).
template <class T>
Values statistics(const Pairs<T>& pairs, const Term<T>& term);

struct Gradients {
  Values dx, dy;                                         // (B, D), (N, D); of a self-similarity dx has both
  std::vector<Values> dscale, doffset, dother, dweight;  // per term, (owners,) or (others,)
  Wide total = 0;
};

// `known`: the statistics of each term; `cotangents`: per term, (owners,), of its first slot.
template <class T>
Gradients gradients(const Pairs<T>& pairs, const std::vector<Values>& known, const std::vector<Values>& cotangents);

struct Found {
  Values values;                 // (B, k)
  std::vector<int64_t> indices;  // (B, k), -1 where there is none
};

// Ties go to the lower column.
template <class T>
Found extremes(const Pairs<T>& pairs, const Extreme<T>& extreme);

}  // namespace oracle
