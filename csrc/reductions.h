// How a term reduces: the states that merge, and what of them is kept.
#pragma once

#include <math.h>

#include "host_device.h"
#include "options.h"

namespace flashpair {
namespace FP_NAMESPACE {

FP_HD inline int reduction_slots(Reduction reduction) {
  switch (reduction) {
    case Reduction::sum: return 1;
    case Reduction::count: return 1;
    case Reduction::logsumexp: return 1;
    case Reduction::softmax_mean: return 2;
    case Reduction::moments: return 5;
    case Reduction::max: return 1;
  }
  return 0;
}

// Doubles that one owner's state takes in the scratch memory.
FP_HD inline int reduction_state(Reduction reduction) {
  switch (reduction) {
    case Reduction::sum: return 1;
    case Reduction::count: return 1;
    case Reduction::logsumexp: return 2;
    case Reduction::softmax_mean: return 4;
    case Reduction::moments: return 5;
    case Reduction::max: return 1;
  }
  return 0;
}

// The larger of two numbers; a NaN stays, though comparisons with it are false.
template <class Real>
FP_HD inline Real larger_or_nan(Real a, Real b) {
  return (b > a || b != b) && a == a ? b : a;
}

struct Exponential {
  template <class Real>
  FP_HD Real operator()(Real x) const {
    return exp(x);
  }
};

// The states, as arrays of numbers that `Exp` raises e to:
//   sum, count    (total)
//   logsumexp     (shift, sum of exp(. - shift))                                  empty: (0, 0)
//   softmax_mean  (shift, sum of exp(. - shift), sum of exp(. - shift) (s - origin), origin)
//                 the origin is the s of the largest exponential, so that a softmax of one pair has its s exactly
//   moments       (count, sum, sum of squares, min, max)
//   max           (largest score)
template <class Real>
FP_HD inline void state_init(Reduction reduction, Real* state) {
  for (int k = 0; k < reduction_state(reduction); ++k) state[k] = 0;
  if (reduction == Reduction::moments) state[3] = INFINITY, state[4] = -INFINITY;
  if (reduction == Reduction::max) state[0] = -INFINITY;
}

template <class Real, class Exp = Exponential>
FP_HD inline void state_merge(Reduction reduction, Real* state, const Real* other, Exp exponential = {}) {
  switch (reduction) {
    case Reduction::sum:
    case Reduction::count: state[0] += other[0]; return;
    case Reduction::logsumexp:
    case Reduction::softmax_mean: {
      const bool mean = reduction == Reduction::softmax_mean;
      if (other[1] == 0) return;
      if (state[1] == 0) {
        state[0] = other[0], state[1] = other[1];
        if (mean) state[2] = other[2], state[3] = other[3];
        return;
      }
      const bool first = state[0] > other[0];
      const Real top = first ? state[0] : other[0];
      const Real mine = exponential(state[0] - top) * state[1], theirs = exponential(other[0] - top) * other[1];
      if (mean) {
        const Real origin = first ? state[3] : other[3];
        state[2] =
            mine * (state[2] / state[1] + (state[3] - origin)) + theirs * (other[2] / other[1] + (other[3] - origin));
        state[3] = origin;
      }
      state[0] = top;
      state[1] = mine + theirs;
      return;
    }
    case Reduction::moments:
      for (int k = 0; k < 3; ++k) state[k] += other[k];
      state[3] = -larger_or_nan(-state[3], -other[3]);
      state[4] = larger_or_nan(state[4], other[4]);
      return;
    case Reduction::max: state[0] = larger_or_nan(state[0], other[0]); return;
  }
}

// State → the statistics of the reduction, `stride` apart.
template <class T>
FP_HD inline void state_finish(Reduction reduction, const double* state, T* out, long long stride) {
  switch (reduction) {
    case Reduction::sum:
    case Reduction::count:
    case Reduction::max: out[0] = T(state[0]); return;
    case Reduction::logsumexp: out[0] = T(state[1] == 0 ? -INFINITY : state[0] + log(state[1])); return;
    case Reduction::softmax_mean:
      out[0] = T(state[1] == 0 ? 0.0 : state[3] + state[2] / state[1]);
      out[stride] = T(state[1] == 0 ? -INFINITY : state[0] + log(state[1]));
      return;
    case Reduction::moments: {
      const double n = state[0], mean = n == 0 ? 0 : state[1] / n;
      const double variance = n == 0 ? 0 : state[2] / n - mean * mean;
      out[0] = T(n), out[stride] = T(mean), out[2 * stride] = T(variance < 0 ? 0 : variance);
      out[3 * stride] = T(state[3]), out[4 * stride] = T(state[4]);
      return;
    }
  }
}

}  // namespace FP_NAMESPACE
}  // namespace flashpair
