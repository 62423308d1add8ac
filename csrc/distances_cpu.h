// Distances of a panel from its products, and back: one pass over memory where PyTorch makes six.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace flashpair {

// Products of a row → squared distances, or their roots. Equal rows, but for rounding, are at 0: relative to both
// squares, of which unit vectors have none above 1.
template <class T>
void to_distances(T* s, int64_t columns, T row_square, const T* column_squares, bool unit, bool root) {
  const T share = 4 * std::numeric_limits<T>::epsilon();
  for (int64_t j = 0; j < columns; ++j) {
    const T squared = (column_squares[j] - 2 * s[j]) + row_square;
    const T size = (row_square + (unit ? T(1) : column_squares[j])) * share;
    s[j] = squared <= size ? T(0) : squared;
  }
  if (!root) return;
  for (int64_t j = 0; j < columns; ++j) s[j] = std::sqrt(s[j]);
}

// Slopes in distances → slopes in their squares, 0 where they are 0.
template <class T>
void slopes_of_squares(const T* slopes, const T* distances, int64_t count, T* of_squares) {
  for (int64_t k = 0; k < count; ++k) {
    const T slope = T(0.5) * slopes[k] / distances[k];
    of_squares[k] = distances[k] == 0 ? T(0) : slope;
  }
}

}  // namespace flashpair
