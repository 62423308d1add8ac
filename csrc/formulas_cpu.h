// Losses in closed form, from the statistics of a pass: value and slopes. The twin of python/flashpair/formulas.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace flashpair {

// In the order of flashpair.formulas.FORMULAS and flashpair.formulas.Average; tests compare them.
enum class Formula {
  mean_gap,
  mean_gap_of_both,
  sup_con,
  multi_similarity,
  circle,
  mean_of_pairs,
  means_of_pairs,
  triplet
};
enum class Average { sum, mean, above_zero };

// Statistics (slots, owners) of one side and, of the same shape, the derivative of the loss in them.
template <class T>
struct SlopedSide {
  const T* statistics;
  T* slopes;
  int64_t slots, owners;

  void clear() const { memset(slopes, 0, slots * owners * sizeof(T)); }
};

template <class T>
struct Softplus {
  explicit Softplus(T z) : e(std::exp(-std::abs(z))) {  // of a NaN: NaN
    value = (z > 0 ? z : T(0)) + std::log1p(e);
    slope = (z < 0 ? e : T(1)) / (T(1) + e);
  }
  T e, value, slope;
};

// Mean of softplus(log-sum - own) of rows (log-sum, own, ...) and, for both directions, as many columns (log-sum, ...).
template <class T>
T mean_gap_slopes(const SlopedSide<T>& rows, const SlopedSide<T>& columns, bool both) {
  rows.clear(), columns.clear();
  const T* own = rows.statistics + rows.owners;
  T* of_own = rows.slopes + rows.owners;
  const int sides = both ? 2 : 1;
  const double count = double(sides) * double(rows.owners);
  double total = 0;
  for (int side = 0; side < sides; ++side) {
    const T* log_sum = side ? columns.statistics : rows.statistics;
    T* slope = side ? columns.slopes : rows.slopes;
    for (int64_t i = 0; i < rows.owners; ++i) {
      const Softplus<T> gap(log_sum[i] - own[i]);
      total += double(gap.value);
      slope[i] = T(double(gap.slope) / count);
      of_own[i] -= slope[i];
    }
  }
  return T(total / (count > 0 ? count : 1));
}

// The loss of one anchor and its slopes in two statistics.
template <class T>
struct Anchor {
  T loss, first, second;
};

// Average of the losses of anchors, `anchor(i)` each, and its slopes in the first two statistics of rows.
template <class T, class Of>
T anchor_slopes(const SlopedSide<T>& rows, const SlopedSide<T>& columns, Average average, Of&& anchor) {
  rows.clear(), columns.clear();
  T *first = rows.slopes, *second = rows.slopes + rows.owners;
  double total = 0;
  int64_t number = 0;
  for (int64_t i = 0; i < rows.owners; ++i) {
    const Anchor<T> of = anchor(i);
    if (average == Average::above_zero && of.loss <= 0) continue;
    first[i] = of.first, second[i] = of.second;
    total += double(of.loss);
    ++number;
  }
  if (average == Average::sum || !number) return T(total);
  for (int64_t i = 0; i < 2 * rows.owners; ++i) first[i] = T(double(first[i]) / double(number));
  return T(total / double(number));
}

// `alone`: whether anchors count where none of them has others than positives.
template <class T>
T sup_con_slopes(const SlopedSide<T>& rows, const SlopedSide<T>& columns, const T* counts, Average average,
                 bool alone) {
  const T *log_sum = rows.statistics, *attraction = log_sum + rows.owners;
  const T *positives = counts, *others = counts + rows.owners;
  for (int64_t i = 0; i < rows.owners; ++i) alone = alone || others[i] > 0;
  return anchor_slopes(rows, columns, average, [&](int64_t i) {
    if (!(positives[i] > 0 && alone)) return Anchor<T>{0, 0, 0};
    return Anchor<T>{log_sum[i] - attraction[i] / positives[i], 1, T(-1) / positives[i]};
  });
}

template <class T>
T multi_similarity_slopes(const SlopedSide<T>& rows, const SlopedSide<T>& columns, Average average, T alpha, T beta) {
  const T *positive = rows.statistics, *negative = positive + rows.owners;
  return anchor_slopes(rows, columns, average, [&](int64_t i) {
    const Softplus<T> pull(positive[i]), push(negative[i]);
    return Anchor<T>{pull.value / alpha + push.value / beta, pull.slope / alpha, push.slope / beta};
  });
}

template <class T>
T circle_slopes(const SlopedSide<T>& rows, const SlopedSide<T>& columns, const T* counts, Average average) {
  const T *positive = rows.statistics, *negative = positive + rows.owners;
  const T *positives = counts, *others = counts + rows.owners;
  return anchor_slopes(rows, columns, average, [&](int64_t i) {
    if (!(positives[i] > 0 && others[i] > 0)) return Anchor<T>{0, 0, 0};
    const Softplus<T> both(positive[i] + negative[i]);
    return Anchor<T>{both.value, both.slope, both.slope};
  });
}

// Of rows (near, far): [sign (far - near) + margin]_+, or its softplus; `exist` is 0 where there is no triplet.
template <class T>
T triplet_slopes(const SlopedSide<T>& rows, const SlopedSide<T>& columns, const T* exist, Average average, T sign,
                 T margin, bool smooth) {
  const T *near = rows.statistics, *far = near + rows.owners;
  return anchor_slopes(rows, columns, average, [&](int64_t i) {
    const T violation = sign * (far[i] - near[i]) + margin;
    if (!(exist[i] > 0) || (!smooth && violation <= 0)) return Anchor<T>{0, 0, 0};
    if (!smooth) return Anchor<T>{violation, -sign, sign};
    const Softplus<T> soft(violation);
    return Anchor<T>{soft.value, -sign * soft.slope, sign * soft.slope};
  });
}

// Sum of the means over pairs of the first `parts` statistics of rows, which are sums; counts (parts, owners) of pairs.
template <class T>
T means_of_pairs_slopes(const SlopedSide<T>& rows, const SlopedSide<T>& columns, const T* counts, int parts) {
  rows.clear(), columns.clear();
  double loss = 0;
  for (int64_t part = 0; part < parts; ++part) {
    double total = 0, number = 0;
    for (int64_t i = part * rows.owners; i < (part + 1) * rows.owners; ++i)
      total += double(rows.statistics[i]), number += double(counts[i]);
    const double of_one = 1 / (number > 1 ? number : 1);
    for (int64_t i = part * rows.owners; i < (part + 1) * rows.owners; ++i) rows.slopes[i] = T(of_one);
    loss += total * of_one;
  }
  return T(loss);
}

// `counts`: those that the formula reads; `constants`: the average and what follows it.
template <class T>
T formula_slopes(Formula formula, const SlopedSide<T>& rows, const SlopedSide<T>& columns, const T* counts,
                 const double* constants) {
  switch (formula) {
    case Formula::mean_gap: return mean_gap_slopes(rows, columns, false);
    case Formula::mean_gap_of_both: return mean_gap_slopes(rows, columns, true);
    case Formula::sup_con: return sup_con_slopes(rows, columns, counts, Average(int(constants[0])), constants[1] != 0);
    case Formula::multi_similarity:
      return multi_similarity_slopes(rows, columns, Average(int(constants[0])), T(constants[1]), T(constants[2]));
    case Formula::circle: return circle_slopes(rows, columns, counts, Average(int(constants[0])));
    case Formula::mean_of_pairs: return means_of_pairs_slopes(rows, columns, counts, 1);
    case Formula::means_of_pairs: return means_of_pairs_slopes(rows, columns, counts, 2);
    case Formula::triplet:
      return triplet_slopes(rows, columns, counts, Average(int(constants[0])), T(constants[1]), T(constants[2]),
                            constants[3] != 0);
  }
  return T(NAN);
}

}  // namespace flashpair
