// scores.h against formulas in long double, on single numbers and on vectors.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <limits>

#include "check.h"

#define FP_NAMESPACE scores_test
#define FP_VECTOR_BYTES 16
#include "scores.h"

namespace flashpair {
namespace scores_test {
#include "simd.h"
}  // namespace scores_test
}  // namespace flashpair

namespace {

using namespace flashpair;
using namespace flashpair::scores_test;
using Wide = long double;

constexpr Score kScores[] = {Score::identity,      Score::hinge,  Score::softplus, Score::square,
                             Score::squared_hinge, Score::circle, Score::softcap,  Score::log_cosh};

Wide positive(Wide z) { return z < 0 ? Wide(0) : z; }

Wide log_cosh(Wide z) {
  if (std::fabs(z) < 1) return std::log1p(std::sinh(z) * std::sinh(z)) / 2;
  return std::fabs(z) + std::log1p(std::exp(-2 * std::fabs(z))) - std::log(Wide(2));
}

Wide value_of(Score score, Wide z, Wide c) {
  switch (score) {
    case Score::identity: return z;
    case Score::hinge: return positive(z);
    case Score::softplus: return positive(z) + std::log1p(std::exp(-std::fabs(z)));
    case Score::square: return z * z;
    case Score::squared_hinge: return positive(z) * positive(z);
    case Score::circle: return positive(z + c) * (z - c);
    case Score::softcap: return c * std::tanh(z / c);
    case Score::log_cosh: return log_cosh(z);
  }
  return NAN;
}

// Circle's first factor is detached.
Wide slope_of(Score score, Wide z, Wide c) {
  switch (score) {
    case Score::identity: return 1;
    case Score::hinge: return z > 0;
    case Score::softplus: return 1 / (1 + std::exp(-z));
    case Score::square: return 2 * z;
    case Score::squared_hinge: return 2 * positive(z);
    case Score::circle: return positive(z + c);
    case Score::softcap: return 1 / (std::cosh(z / c) * std::cosh(z / c));
    case Score::log_cosh: return std::tanh(z);
  }
  return NAN;
}

template <class T>
struct Vector {
  template <Score S>
  static ValueSlope<T> at(T z, T c) {
    const auto both = score_value_slope<S, VectorMath<T>>(broadcast(z), broadcast(c));
    for (int l = 1; l < kWidth<T>; ++l) CHECK_CLOSE(both.value[l], both.value[0], 0);
    return {both.value[0], both.slope[0]};
  }
};

template <class T, class Kind>
ValueSlope<T> evaluate(Score score, T z, T c) {
  switch (score) {
    case Score::identity: return Kind::template at<Score::identity>(z, c);
    case Score::hinge: return Kind::template at<Score::hinge>(z, c);
    case Score::softplus: return Kind::template at<Score::softplus>(z, c);
    case Score::square: return Kind::template at<Score::square>(z, c);
    case Score::squared_hinge: return Kind::template at<Score::squared_hinge>(z, c);
    case Score::circle: return Kind::template at<Score::circle>(z, c);
    case Score::softcap: return Kind::template at<Score::softcap>(z, c);
    case Score::log_cosh: return Kind::template at<Score::log_cosh>(z, c);
  }
  return {T(NAN), T(NAN)};
}

// Arguments: a grid through 0, tiny ones, large ones, random ones.
std::vector<double> arguments() {
  std::vector<double> z = {0, 1e-30, -1e-30, 1e-8, -1e-8, 20, -20, 87, -87, 88.5, -88.5, 700, -700, 1e4, -1e4};
  for (int k = -64; k <= 64; ++k) z.push_back(k / 8.0);
  for (int k = -40; k <= 40; ++k) z.push_back(k / 40.0), z.push_back(std::ldexp(k < 0 ? -1.3 : 1.3, -std::abs(k)));
  check::Random random(1);
  for (int k = 0; k < 2000; ++k) z.push_back(random.uniform(-60, 60));
  return z;
}

template <class T, class Kind>
void check_values() {
  const Wide eps = std::numeric_limits<T>::epsilon();
  for (Score score : kScores)
    for (double argument : arguments())
      for (double constant : {0.0, 0.25, -3.0, 50.0}) {
        if (score == Score::softcap && constant <= 0) continue;
        check::context() =
            "score " + std::to_string(int(score)) + ", z " + check::number(argument) + ", c " + check::number(constant);
        const T z = T(argument), c = T(constant);
        const auto got = evaluate<T, Kind>(score, z, c);
        const Wide value = value_of(score, z, c), slope = slope_of(score, z, c);
        // Circle rounds z + c and z - c before it multiplies, softcap z / c before the exponential of its slope.
        const Wide size = score == Score::circle ? (std::fabs(Wide(z)) + std::fabs(Wide(c))) * slope : 0;
        const Wide argument_size = score == Score::circle    ? std::fabs(Wide(z))
                                   : score == Score::softcap ? std::fabs(Wide(z) / c) * slope
                                                             : 0;
        CHECK_CLOSE(got.value, value, 4 * eps * (std::fabs(value) + size) + 1e-36L);
        CHECK_CLOSE(got.slope, slope, 4 * eps * (std::fabs(slope) + argument_size) + 1e-36L);
      }
}

TEST(vector_scores_are_their_formulas) {
  check_values<float, Vector<float>>();
  check_values<double, Vector<double>>();
}

TEST(slopes_are_derivatives) {
  const double h = 5e-4;
  for (Score score : kScores) {
    if (score == Score::circle) continue;  // detaches a factor
    for (double z : arguments()) {
      const bool kink = score == Score::hinge || score == Score::squared_hinge;
      if (std::fabs(z) > 100 || (kink && std::fabs(z) <= h)) continue;
      check::context() = "score " + std::to_string(int(score)) + ", z " + check::number(z);
      const auto at = [&](double v) { return evaluate<double, Vector<double>>(score, v, 4.0); };
      CHECK_CLOSE(at(z).slope, (at(z + h).value - at(z - h).value) / (2 * h), 1e-7);
    }
  }
}

TEST(circle_holds_its_first_factor) {
  for (double z : arguments()) {
    const double c = 0.25, h = 1e-3;
    const auto at = evaluate<double, Vector<double>>(Score::circle, z, c);
    const double factor = z > -c ? z + c : 0;
    CHECK_CLOSE(at.slope, (factor * (z + h - c) - factor * (z - h - c)) / (2 * h), 1e-7 * (1 + z * z));
  }
}

template <class T, class Kind>
void check_specials() {
  const T nan = std::numeric_limits<T>::quiet_NaN(), infinity = std::numeric_limits<T>::infinity();
  for (Score score : kScores) {
    check::context() = "score " + std::to_string(int(score));
    CHECK(std::isnan(evaluate<T, Kind>(score, nan, T(0.25)).value));
    CHECK(evaluate<T, Kind>(score, infinity, T(0.25)).value == (score == Score::softcap ? T(0.25) : infinity));
  }
  for (Score score : {Score::softcap, Score::log_cosh}) {
    const bool cap = score == Score::softcap;
    CHECK(evaluate<T, Kind>(score, -infinity, T(0.25)).value == (cap ? T(-0.25) : infinity));
    CHECK(evaluate<T, Kind>(score, infinity, T(0.25)).slope == (cap ? 0 : 1));
    CHECK(evaluate<T, Kind>(score, -infinity, T(0.25)).slope == (cap ? 0 : -1));
    CHECK(std::isnan(evaluate<T, Kind>(score, nan, T(0.25)).slope));
    CHECK(evaluate<T, Kind>(score, T(0), T(0.25)).value == 0);
    CHECK(evaluate<T, Kind>(score, T(0), T(0.25)).slope == (cap ? 1 : 0));
  }
  CHECK(std::isnan(evaluate<T, Kind>(Score::circle, T(1), nan).value));
  for (Score score : {Score::hinge, Score::softplus, Score::squared_hinge}) {
    CHECK(evaluate<T, Kind>(score, -infinity, T(0)).value == 0);
    CHECK(evaluate<T, Kind>(score, -infinity, T(0)).slope == 0);
  }
  CHECK(evaluate<T, Kind>(Score::softplus, T(1e4), T(0)).value == T(1e4));
  CHECK(evaluate<T, Kind>(Score::softplus, T(1e4), T(0)).slope == 1);
}

TEST(nan_and_infinities_pass_through) {
  check_specials<float, Vector<float>>();
  check_specials<double, Vector<double>>();
}

template <class T>
void check_bounds() {
  check::Random random(2);
  const Wide eps = std::numeric_limits<T>::epsilon();
  for (int trial = 0; trial < 20000; ++trial) {
    const Score score = kScores[random.below(std::size(kScores))];
    const double reach = std::pow(10.0, random.uniform(-2, 2));
    T low = T(random.uniform(-reach, reach)), high = T(random.uniform(-reach, reach));
    if (low > high) std::swap(low, high);
    if (random.below(8) == 0) high = low;
    const T c = T(random.uniform(score == Score::softcap ? reach / 100 : -reach, reach));
    const Wide upper = score_upper(score, c, low, high);
    check::context() = "score " + std::to_string(int(score)) + ", c " + check::number(c) + ", [" + check::number(low) +
                       ", " + check::number(high) + "]";
    const Wide rounding = 4 * eps * (1 + Wide(reach) * reach);
    Wide largest = std::max(value_of(score, low, c), value_of(score, high, c));
    for (int k = 0; k < 16; ++k) {
      const T z = std::min(high, std::max(low, T(random.uniform(double(low), double(high)))));
      largest = std::max(largest, value_of(score, z, c));
    }
    CHECK(upper >= largest - rounding);
    // The bound is what exponentials are shifted by, so it must not be loose either.
    CHECK(upper <= largest + 0.7L + rounding);
  }
}

TEST(score_upper_bounds_the_score) {
  check_bounds<float>();
  check_bounds<double>();
}

template <class T>
void check_functions() {
  const Wide eps = std::numeric_limits<T>::epsilon();
  check::Random random(3);
  for (int k = 0; k < 20000; ++k) {
    const T x = T(random.uniform(double(ExpConstants<T>::lowest), 80)), u = T(random.uniform(0, 1));
    check::context() = "x " + check::number(x) + ", u " + check::number(u);
    const Wide exact = std::exp(Wide(x));
    CHECK_CLOSE(exp_lanes<T>(broadcast(x))[0], exact, 3 * eps * exact);
    const Wide logarithm = std::log1p(Wide(u));
    CHECK_CLOSE(log1p_unit<T>(broadcast(u))[0], logarithm, 4 * eps * logarithm);
  }
  CHECK(exp_lanes<T>(broadcast(T(-INFINITY)))[0] == 0);
  CHECK(exp_lanes<T>(broadcast(T(-1e30)))[0] == 0);
  CHECK(std::isnan(exp_lanes<T>(broadcast(T(NAN)))[0]));
  CHECK(exp_lanes<T>(broadcast(T(0)))[0] == 1);
}

TEST(vector_functions_are_accurate) {
  check_functions<float>();
  check_functions<double>();
}

}  // namespace
