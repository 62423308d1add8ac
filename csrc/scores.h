// The scalar functions applied to z, value and slope side by side. The slope is stated, not derived: circle detaches a
// factor of its value. `Math` offers for V, a number or a vector: positive_part, positive_step, and pairs of a function
// and its slope, softplus_logistic, tanh_slope and log_cosh_tanh.
#pragma once

#include <math.h>

#include "host_device.h"
#include "options.h"

namespace flashpair {
namespace FP_NAMESPACE {

template <class V>
struct ValueSlope {
  V value, slope;
};

template <Score S, class Math, class V>
FP_HD inline ValueSlope<V> score_value_slope(V z, V c) {
  switch (S) {
    case Score::identity: return {z, V{} + 1};
    case Score::hinge: return {Math::positive_part(z), Math::positive_step(z)};
    case Score::softplus: return Math::softplus_logistic(z);
    case Score::square: return {z * z, z + z};
    case Score::squared_hinge: {
      const V p = Math::positive_part(z);
      return {p * p, p + p};
    }
    case Score::circle: {
      const V alpha = Math::positive_part(z + c);
      return {alpha * (z - c), alpha};
    }
    case Score::softcap: {
      const ValueSlope<V> t = Math::tanh_slope(z / c);
      return {c * t.value, t.slope};
    }
    case Score::log_cosh: return Math::log_cosh_tanh(z);
  }
  return {z, z};
}

// An upper bound of the score over z in [low, high].
template <class T>
FP_HD inline T score_upper(Score score, T c, T low, T high) {
  const T magnitude = high > -low ? high : -low;
  switch (score) {
    case Score::identity: return high;
    case Score::hinge: return high > 0 ? high : T(0);
    case Score::softplus: return (high > 0 ? high : T(0)) + T(0.7);
    case Score::square: return magnitude * magnitude;
    case Score::squared_hinge: return high > 0 ? high * high : T(0);
    case Score::circle: {
      // (z + c)+ (z - c) is 0 up to -c and z^2 - c^2 from there, convex: largest at an end of the range, or 0.
      const T at_high = high > -c ? high * high - c * c : T(0);
      const T at_low = low > -c ? low * low - c * c : T(0);
      return at_high > at_low ? at_high : at_low;
    }
    case Score::softcap: return c * T(tanh(double(high / c)));
    case Score::log_cosh: return magnitude;  // less than log 2 above
  }
  return high;
}

}  // namespace FP_NAMESPACE
}  // namespace flashpair
