// What formulas over whole rows ask of C++, without torch: ranks_cpu.h and the functions of an engine behind it, against
// loops over the definition.

#include <algorithm>
#include <limits>

#include "check.h"
#include "distances_cpu.h"
#include "ranks_cpu.h"
#include "tested.h"

namespace {

using namespace flashpair;
using tested::parallel;
using tested::passes;

// Rows of multiples of 1/2, with ties, and classes anywhere; memory ends where the panel does.
template <class T>
struct Panel {
  std::vector<T> s, points;
  std::vector<int64_t> start, length, own;
  RowColumns<T> rows;
  int64_t places;

  Panel(int64_t count, int64_t columns, int64_t most, bool with_own = false)
      : s(count * columns), points(count * most), start(count), length(count), own(count), places(most) {
    check::Random random{uint64_t(columns)};
    for (T& v : s) v = T(int64_t(random.below(17)) - 8) / 2;
    for (T& v : points) v = T(int64_t(random.below(17)) - 8) / 2;
    for (int64_t i = 0; i < count; ++i) {
      length[i] = i == 0 ? 0 : i == 1 ? columns : int64_t(random.below(columns + 1));
      start[i] = int64_t(random.below(columns - length[i] + 1));
      own[i] = int64_t(random.below(columns + 1)) - 1;
    }
    rows = {s.data(), start.data(), length.data(), own.data(), count, columns, with_own};
  }

  bool met(Mask mask, int64_t i, int64_t j) const {
    const bool member = j >= start[i] && j < start[i] + length[i];
    if (j == own[i] && !rows.with_own) return false;
    return mask == Mask::all || member == (mask == Mask::same);
  }
};

constexpr int64_t kColumns[] = {1, 5, 40, 150};
constexpr Mask kMasks[] = {Mask::all, Mask::same, Mask::different};

template <class T>
void triplets(int64_t columns, T sign, T low, T high, bool closed) {
  Panel<T> panel(6, columns, 1);
  std::vector<T> counts(6), sums(6), of_s(6 * columns, T(NAN));
  const ranks::TripletSums<T> p{panel.rows, sign, low, high, closed, counts.data(), sums.data(), of_s.data()};
  ranks::triplet_sums(passes<T>(), p, 0, 6);
  for (int64_t i = 0; i < 6; ++i) {
    double sum = 0;
    int64_t count = 0;
    std::vector<double> slopes(columns);
    for (int64_t a = 0; a < columns; ++a)
      for (int64_t b = 0; b < columns; ++b) {
        if (!panel.met(Mask::same, i, a) || !panel.met(Mask::different, i, b)) continue;
        const T gap = sign * (panel.s[i * columns + b] - panel.s[i * columns + a]);
        if (!(gap > low && (gap < high || (closed && gap == high)))) continue;
        ++count, sum -= double(gap), slopes[a] += double(sign), slopes[b] -= double(sign);
      }
    CHECK(double(counts[i]) == double(count));
    CHECK_CLOSE(double(sums[i]), sum, 1e-4);
    for (int64_t j = 0; j < columns; ++j) CHECK(double(of_s[i * columns + j]) == slopes[j]);
  }
}

TEST(triplets_are_counted_and_summed) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t columns : kColumns)
    for (float sign : {1.0f, -1.0f})
      for (bool closed : {false, true}) {
        triplets<float>(columns, sign, -infinity, 1.5f, closed), triplets<float>(columns, sign, 0.5f, infinity, closed);
        triplets<double>(columns, sign, -1.0, 2.0, closed), triplets<double>(columns, sign, 0.5, 0.5, closed);
      }
}

template <class T>
void below(int64_t columns, int64_t places, Mask mask, bool closed) {
  Panel<T> panel(6, columns, places);
  std::vector<int64_t> counts(6 * places);
  std::vector<T> sums(6 * places), of_s(6 * columns, T(NAN));
  ranks::SumsBelow<T> p{panel.rows,  mask,    T(-1),  panel.points.data(), places, closed, counts.data(),
                        sums.data(), nullptr, nullptr};
  ranks::sums_below(passes<T>(), p, 0, 6);
  p.cotangent = panel.points.data(), p.of_s = of_s.data();
  ranks::sums_below(passes<T>(), p, 0, 6);
  for (int64_t i = 0; i < 6; ++i) {
    std::vector<double> slopes(columns);
    for (int64_t k = 0; k < places; ++k) {
      const T limit = panel.points[i * places + k];
      int64_t count = 0;
      double sum = 0;
      for (int64_t j = 0; j < columns; ++j) {
        const T v = panel.s[i * columns + j];
        if (!panel.met(mask, i, j) || !(-v < limit || (closed && -v == limit))) continue;
        ++count, sum += double(v), slopes[j] += double(limit);
      }
      CHECK(counts[i * places + k] == count);
      CHECK_CLOSE(double(sums[i * places + k]), sum, 1e-4);
    }
    for (int64_t j = 0; j < columns; ++j) CHECK_CLOSE(double(of_s[i * columns + j]), slopes[j], 1e-4);
  }
}

TEST(columns_below_limits) {
  for (int64_t columns : kColumns)
    for (int64_t places : {0, 1, 31, 70, 140})
      for (Mask mask : kMasks) below<float>(columns, places, mask, true), below<double>(columns, places, mask, false);
}

template <class T>
void above(int64_t columns, int64_t places) {
  Panel<T> panel(6, columns, places);
  std::vector<int64_t> found(6 * places);
  const ranks::NextAbove<T> p{panel.rows, T(-1), panel.points.data(), places, found.data()};
  ranks::next_above(passes<T>(), p, 0, 6);
  for (int64_t i = 0; i < 6; ++i)
    for (int64_t k = 0; k < places; ++k) {
      const T point = panel.points[i * places + k], infinity = std::numeric_limits<T>::infinity();
      T next = infinity, largest = -infinity;
      for (int64_t j = 0; j < columns; ++j) {
        if (!panel.met(Mask::different, i, j)) continue;
        const T v = -panel.s[i * columns + j];
        largest = std::max(largest, v);
        if (v > point) next = std::min(next, v);
      }
      const int64_t j = found[i * places + k];
      CHECK(j >= 0 && j < columns);
      if (largest == -infinity) continue;
      CHECK(panel.met(Mask::different, i, j));
      CHECK(-panel.s[i * columns + j] == (next < infinity ? next : largest));
    }
}

TEST(the_next_above_a_point) {
  for (int64_t columns : kColumns)
    for (int64_t places : {0, 3, 45}) above<float>(columns, places), above<double>(columns, places);
}

template <class T>
void soft(int64_t columns, int64_t places, Mask mask, Step step, bool with_own, int threads) {
  Panel<T> panel(6, columns, places, with_own);
  std::vector<T> found(6 * places), of_s(6 * columns, T(NAN)), of_points(6 * places);
  SoftRanksPanel<T> p{
      panel.rows, mask,    T(-1),   panel.points.data(), places, T(0.5), step, found.data(), nullptr, nullptr,
      nullptr,    threads, parallel};
  passes<T>().soft_ranks(p);
  p.cotangent = panel.points.data(), p.of_s = of_s.data(), p.of_points = of_points.data();
  passes<T>().soft_ranks(p);
  for (int64_t i = 0; i < 6; ++i) {
    std::vector<double> slopes(columns);
    for (int64_t k = 0; k < places; ++k) {
      const double point = double(panel.points[i * places + k]);
      double rank = 0, slope_of_point = 0;
      for (int64_t j = 0; j < columns; ++j) {
        if (!panel.met(mask, i, j)) continue;
        const double z = (-double(panel.s[i * columns + j]) - point) / 2, share = 1 / (1 + std::exp(-z));
        rank += step == Step::hinge ? std::max(z, 0.0) : step == Step::softplus ? std::log1p(std::exp(z)) : share;
        const double slope = step == Step::hinge ? double(z > 0) : step == Step::softplus ? share : share * (1 - share);
        slopes[j] -= slope * point / 2, slope_of_point -= slope * point / 2;
      }
      CHECK_CLOSE(double(found[i * places + k]), rank, 1e-4);
      CHECK_CLOSE(double(of_points[i * places + k]), slope_of_point, 1e-4);
    }
    for (int64_t j = 0; j < columns; ++j) CHECK_CLOSE(double(of_s[i * columns + j]), slopes[j], 1e-4);
  }
}

TEST(soft_ranks_and_their_slopes) {
  for (int64_t columns : kColumns)
    for (Mask mask : kMasks)
      for (Step step : {Step::sigmoid, Step::softplus, Step::hinge})
        soft<float>(columns, 9, mask, step, false, 2), soft<double>(columns, 2, mask, step, true, 1);
}

template <class T>
void histogram(int64_t columns, Mask mask, bool weighted) {
  constexpr int64_t kBins = 6;
  Panel<T> panel(6, columns, kBins + 1);
  std::vector<T> weights(columns), nodes(6 * (kBins + 1)), of_s(6 * columns, T(NAN));
  for (int64_t j = 0; j < columns; ++j) weights[j] = T(1) + T(j % 3);
  ranks::SoftHistogram<T> p{
      panel.rows, mask, weighted ? weights.data() : nullptr, T(-2.25), T(3), kBins, nodes.data(), nullptr, nullptr};
  ranks::soft_histogram(p, 0, 6);
  p.cotangent = panel.points.data(), p.of_s = of_s.data();
  ranks::soft_histogram(p, 0, 6);
  const double step = 5.25 / kBins;
  for (int64_t i = 0; i < 6; ++i) {
    std::vector<double> wanted(kBins + 1), slopes(columns);
    for (int64_t j = 0; j < columns; ++j) {
      if (!panel.met(mask, i, j)) continue;
      const double v = double(panel.s[i * columns + j]), at = (std::min(std::max(v, -2.25), 3.0) + 2.25) / step;
      const double weight = weighted ? double(weights[j]) : 1;
      for (int64_t k = 0; k <= kBins; ++k) wanted[k] += weight * std::max(0.0, 1 - std::abs(at - double(k)));
      const int64_t left = std::min(int64_t(at), kBins - 1);
      const T* cotangent = panel.points.data() + i * (kBins + 1);
      if (v >= -2.25 && v <= 3) slopes[j] = weight * double(cotangent[left + 1] - cotangent[left]) / step;
    }
    for (int64_t k = 0; k <= kBins; ++k) CHECK_CLOSE(double(nodes[i * (kBins + 1) + k]), wanted[k], 1e-4);
    for (int64_t j = 0; j < columns; ++j) CHECK_CLOSE(double(of_s[i * columns + j]), slopes[j], 1e-4);
  }
}

TEST(soft_histograms_and_their_slopes) {
  for (int64_t columns : kColumns)
    for (Mask mask : kMasks) histogram<float>(columns, mask, true), histogram<double>(columns, mask, false);
}

template <class T>
void ordered(int64_t columns, T scale, bool narrow) {
  Panel<T> panel(6, columns, 1);
  check::Random random{3};
  std::vector<double> wide(columns), wide_own(6), sorted(columns);
  std::vector<int64_t> order(columns);
  for (int64_t j = 0; j < columns; ++j) wide[j] = double(random.below(9)), order[j] = j;
  for (double& v : wide_own) v = wide[random.below(uint64_t(columns))];
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return wide[a] < wide[b]; });
  for (int64_t k = 0; k < columns; ++k) sorted[k] = wide[order[k]];
  const std::vector<float> few(sorted.begin(), sorted.end()), few_own(wide_own.begin(), wide_own.end());
  std::vector<T> of_s(6 * columns, T(NAN));
  const PanelTotal found =
      passes<T>().ordered({{panel.s.data(), panel.own.data(), 6, columns, of_s.data(), 2, parallel},
                           scale,
                           narrow ? static_cast<const void*>(few_own.data()) : wide_own.data(),
                           narrow ? static_cast<const void*>(few.data()) : sorted.data(),
                           narrow,
                           order.data()});
  long double total = 0, of_scale = 0;
  for (int64_t i = 0; i < 6; ++i) {
    std::vector<long double> slopes(columns);
    for (int64_t k = 0; k < columns; ++k) {
      if (k == panel.own[i]) continue;
      long double top = -INFINITY, sum = 0;
      auto logit = [&](int64_t j) { return -(long double)(scale) * (long double)(panel.s[i * columns + j]); };
      auto in_set = [&](int64_t j) {
        return j != panel.own[i] && std::abs(wide_own[i] - wide[j]) >= std::abs(wide_own[i] - wide[k]);
      };
      for (int64_t j = 0; j < columns; ++j)
        if (in_set(j)) top = std::max(top, logit(j));
      for (int64_t j = 0; j < columns; ++j)
        if (in_set(j)) sum += std::exp(logit(j) - top);
      total += top + std::log(sum) - logit(k), slopes[k] -= 1;
      for (int64_t j = 0; j < columns; ++j)
        if (in_set(j)) slopes[j] += std::exp(logit(j) - top) / sum;
    }
    for (int64_t j = 0; j < columns; ++j) {
      of_scale -= slopes[j] * (long double)(panel.s[i * columns + j]);
      CHECK_CLOSE(double(of_s[i * columns + j]), double(-(long double)(scale)*slopes[j]), 2e-4 * double(scale));
    }
  }
  CHECK_CLOSE(found.value, double(total), 1e-4 * double(scale));
  CHECK_CLOSE(found.of_scale, double(of_scale), 1e-3);
}

TEST(running_log_sums_in_the_order_of_distances) {
  for (int64_t columns : kColumns)
    for (double scale : {0.5, 30.0, 1000.0}) {  // the last ones beyond what exponentials hold
      ordered<float>(columns, float(scale), true), ordered<double>(columns, scale, false);
    }
}

template <class T>
void tabulated(int64_t columns, int threads) {
  constexpr int64_t kMargin = 4, kKnots = 30;
  std::vector<T> values(kKnots), slopes(kKnots), of_values(kKnots), of_slopes(kKnots);
  const double step = 2.0 / (kKnots - 2 * kMargin - 1);
  auto at = [&](int64_t k) { return -1 + double(k - kMargin) * step; };
  for (int64_t k = 0; k < kKnots; ++k) values[k] = T(std::exp(at(k))), slopes[k] = T(std::exp(at(k)));
  Panel<T> panel(6, columns, 1);
  for (T& v : panel.s) v /= 4;
  std::vector<T> of_s(6 * columns, T(NAN));
  const double total =
      passes<T>().tabulated({{panel.s.data(), panel.own.data(), 6, columns, of_s.data(), threads, parallel},
                             values.data(),
                             slopes.data(),
                             kKnots,
                             kMargin,
                             of_values.data(),
                             of_slopes.data()});
  double wanted = 0, met = 0, shares = 0;
  for (int64_t i = 0; i < 6; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const bool out = j == panel.own[i];
      const double v = std::exp(double(panel.s[i * columns + j]));
      if (!out) wanted += v, ++met;
      CHECK_CLOSE(double(of_s[i * columns + j]), out ? 0 : v, 1e-5);
    }
  CHECK_CLOSE(total, wanted, 1e-5 * double(6 * columns));
  for (T share : of_values) shares += double(share);
  CHECK_CLOSE(shares, met, 1e-3);
}

TEST(a_tabulated_function) {
  for (int64_t columns : kColumns) tabulated<float>(columns, 2), tabulated<double>(columns, 1);
}

template <class T>
void gate(int64_t units, int64_t count, int64_t columns, int threads) {
  check::Random random{1};
  std::vector<T> p(units * count), q(units * columns), v(units), cotangent(count * columns);
  for (std::vector<T>* numbers : {&p, &q, &v, &cotangent})
    for (T& number : *numbers) number = T(random.uniform(-2, 2));
  std::vector<T> values(count * columns), of_p(p.size()), of_q(q.size()), of_v(units);
  PairGatePanel<T> panel{};
  panel.p = p.data(), panel.q = q.data(), panel.v = v.data();
  panel.units = units, panel.rows = count, panel.columns = columns;
  panel.values = values.data(), panel.of_p = of_p.data(), panel.of_q = of_q.data(), panel.of_v = of_v.data();
  panel.threads = threads, panel.parallel = parallel;
  passes<T>().pair_gate(panel);
  panel.cotangent = cotangent.data();
  passes<T>().pair_gate(panel);
  std::vector<double> wanted_p(p.size()), wanted_q(q.size()), wanted_v(units);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t h = 0; h < units; ++h) {
        const double t = std::tanh(double(p[h * count + i]) + double(q[h * columns + j]));
        const double c = double(cotangent[i * columns + j]), slope = c * double(v[h]) * (1 - t * t);
        sum += double(v[h]) * t;
        wanted_p[h * count + i] += slope, wanted_q[h * columns + j] += slope, wanted_v[h] += c * t;
      }
      CHECK_CLOSE(double(values[i * columns + j]), sum, 1e-5);
    }
  for (size_t k = 0; k < p.size(); ++k) CHECK_CLOSE(double(of_p[k]), wanted_p[k], 1e-4);
  for (size_t k = 0; k < q.size(); ++k) CHECK_CLOSE(double(of_q[k]), wanted_q[k], 1e-4);
  for (int64_t h = 0; h < units; ++h) CHECK_CLOSE(double(of_v[h]), wanted_v[h], 1e-3);
}

TEST(the_gate_of_a_pair) {
  for (int64_t columns : kColumns) gate<float>(3, 5, columns, 2), gate<double>(2, 1, columns, 1);
}

TEST(distances_and_their_slopes) {
  const std::vector<float> squares{9, 9, 16, 16};
  for (bool root : {false, true}) {
    std::vector<float> s{std::nextafter(9.0f, 0.0f), 9, 12, 8};  // of a row of square 9: equal but for rounding, equal
    to_distances(s.data(), 4, 9.0f, squares.data(), false, root);
    CHECK(s[0] == 0 && s[1] == 0 && s[2] == 1 && s[3] == (root ? 3 : 9));
    std::vector<float> slopes{1, 1, 2, 3}, of_squares(4);
    slopes_of_squares(slopes.data(), s.data(), 4, of_squares.data());
    CHECK(of_squares[0] == 0 && of_squares[1] == 0 && of_squares[2] == 1 && of_squares[3] == (root ? 0.5f : 1.5f / 9));
  }
}

}  // namespace
