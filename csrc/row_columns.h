// Rows of a panel of S whose columns stand in the order of their labels: the positives of a row are neighbours. The twin
// of RowPanel in python/flashpair/rows.py.
#pragma once

#include <cstdint>

#include "options.h"

namespace flashpair {

struct Range {
  int64_t first, end;
};

// At most three ranges of columns.
struct Ranges {
  Range at[3];
  int count = 0;

  void add(int64_t first, int64_t end, int64_t left_out) {
    if (left_out >= first && left_out < end) {
      add(first, left_out), add(left_out + 1, end);
    } else {
      add(first, end);
    }
  }
  void add(int64_t first, int64_t end) {
    if (first < end) at[count++] = {first, end};
  }
  const Range* begin() const { return at; }
  const Range* end() const { return at + count; }
  int64_t size() const {
    int64_t columns = 0;
    for (const Range& range : *this) columns += range.end - range.first;
    return columns;
  }
};

template <class T>
struct RowColumns {
  const T* s;  // (rows, columns)
  const int64_t *start, *length,
      *own;  // (rows,) where the row's class begins, how long it is, the excluded column or -1
  int64_t rows, columns;
  bool with_own;  // the excluded column is one like others

  const T* row(int64_t i) const { return s + i * columns; }
  Ranges of(Mask mask, int64_t i) const {
    Ranges ranges;
    const int64_t left_out = with_own ? -1 : own[i], first = start[i], end = start[i] + length[i];
    if (mask == Mask::same) {
      ranges.add(first, end, left_out);
    } else if (mask == Mask::different) {
      ranges.add(0, first, left_out), ranges.add(end, columns, left_out);
    } else {
      ranges.add(0, columns, left_out);
    }
    return ranges;
  }
};

}  // namespace flashpair
