// Similarities of listed pairs, and their gradients. Pairs are few beside a matrix and their rows lie anywhere, so that
// memory decides, not arithmetic.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "options.h"

namespace flashpair {

constexpr int kLanes = 16;

// Sum of `term(k)` in partial sums that a compiler keeps in vectors.
template <class T, class Term>
T lanes_sum(int64_t count, const Term& term) {
  T partial[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) partial[lane] += term(k + lane);
  for (int lane = 0; k < count; ++k, ++lane) partial[lane] += term(k);
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) partial[lane] += partial[lane + half];
  return partial[0];
}

// One side's rows and, where they are to be divided by them, their norms.
template <class T>
class ListedRows {
 public:
  ListedRows(const T* rows, int64_t count, int64_t features) : rows_(rows), count_(count), features_(features) {}

  int64_t count() const { return count_; }
  const T* row(int64_t i) const { return rows_ + i * features_; }
  T norm(int64_t i) const { return norms_.empty() ? T(1) : norms_[size_t(i)]; }

  // Of rows first ... end - 1; `prepare` comes first.
  void prepare() { norms_.resize(size_t(count_)); }
  void measure(int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      const T* x = row(i);
      const T norm = T(std::sqrt(lanes_sum<double>(features_, [=](int64_t k) { return double(x[k]) * double(x[k]); })));
      norms_[size_t(i)] = norm <= kFloor ? kFloor : norm;  // a NaN stays
    }
  }

  // Gradients of unit rows first ... end - 1 → of the rows, in place: (g - u <u, g>) / norm, g / norm at the floor.
  void through_norms(T* gradient, int64_t first, int64_t end) const {
    for (int64_t i = first; i < end; ++i) {
      T* g = gradient + i * features_;
      const T *x = row(i), norm = norms_[size_t(i)];
      const T along = norm <= kFloor ? T(0) : lanes_sum<T>(features_, [=](int64_t k) { return x[k] / norm * g[k]; });
      for (int64_t k = 0; k < features_; ++k) g[k] = (g[k] - x[k] / norm * along) / norm;
    }
  }

 private:
  static constexpr T kFloor = T(1e-12);  // as in flashpair.reference
  const T* rows_;
  int64_t count_, features_;
  std::vector<T> norms_;
};

// Quotients, not products with inverses: equal rows must have distance 0 even where products and sums are fused.
template <class T>
T listed_similarity(const T* a, T a_norm, const T* b, T b_norm, int64_t features, Similarity similarity) {
  if (similarity == Similarity::dot)
    return lanes_sum<T>(features, [=](int64_t k) { return a[k] / a_norm * (b[k] / b_norm); });
  const T squared = lanes_sum<T>(features, [=](int64_t k) {
    const T difference = a[k] / a_norm - b[k] / b_norm;
    return difference * difference;
  });
  return similarity == Similarity::euclidean ? std::sqrt(squared) : squared;
}

// Adds a pair's part to features first ... end - 1 of both gradients; `slope` in its similarity, whose value is `s`.
template <class T>
void add_listed_gradient(const T* a, T a_norm, const T* b, T b_norm, T* of_a, T* of_b, int64_t first, int64_t end,
                         Similarity similarity, T slope, T s) {
  if (similarity == Similarity::dot) {
    for (int64_t k = first; k < end; ++k) of_a[k] += slope * (b[k] / b_norm);
    for (int64_t k = first; k < end; ++k) of_b[k] += slope * (a[k] / a_norm);
    return;
  }
  const T factor = similarity == Similarity::squared_euclidean ? 2 * slope : s == 0 ? T(0) : slope / s;
  for (int64_t k = first; k < end; ++k) {
    const T part = factor * (a[k] / a_norm - b[k] / b_norm);
    of_a[k] += part, of_b[k] -= part;
  }
}

}  // namespace flashpair
