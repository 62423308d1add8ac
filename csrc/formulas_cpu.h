// Losses in closed form, from the statistics of a pass: value and slopes. The twin of python/flashpair/formulas.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace flashpair {

// Statistics (slots, owners) of one side and, of the same shape, the derivative of the loss in them.
template <class T>
struct SlopedSide {
  const T* statistics;
  T* slopes;
  int64_t slots, owners;
};

// Mean of softplus(log-sum - own) of rows (log-sum, own, ...) and, for both directions, as many columns (log-sum, ...).
template <class T>
T mean_gap_slopes(const SlopedSide<T>& rows, const SlopedSide<T>& columns, bool both) {
  memset(rows.slopes, 0, rows.slots * rows.owners * sizeof(T));
  memset(columns.slopes, 0, columns.slots * columns.owners * sizeof(T));
  const T* own = rows.statistics + rows.owners;
  T* of_own = rows.slopes + rows.owners;
  const int sides = both ? 2 : 1;
  const double count = double(sides) * double(rows.owners);
  double total = 0;
  for (int side = 0; side < sides; ++side) {
    const T* log_sum = side ? columns.statistics : rows.statistics;
    T* slope = side ? columns.slopes : rows.slopes;
    for (int64_t i = 0; i < rows.owners; ++i) {
      const T gap = log_sum[i] - own[i];
      const T e = std::exp(-std::abs(gap));  // of a NaN: NaN
      total += double((gap > 0 ? gap : T(0)) + std::log1p(e));
      slope[i] = T((gap < 0 ? e : T(1)) / ((T(1) + e) * count));
      of_own[i] -= slope[i];
    }
  }
  return T(total / (count > 0 ? count : 1));
}

}  // namespace flashpair
