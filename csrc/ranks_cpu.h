// What formulas over whole rows are made of, without a sort of the row: each column finds its place among a few sorted
// numbers. The twin of python/flashpair/losses/ranks.py. Every function does the rows first .. end - 1; compared are
// sign · s.
#pragma once

#include <cstdint>

#include "row_columns.h"

namespace flashpair {

template <class T>
struct EnginePasses;

namespace ranks {

// Triplets (p, n) of each row, p of its class and n not, with low < sign (s_n - s_p) < high: their number and
// Σ sign (s_p - s_n).
template <class T>
struct TripletSums {
  RowColumns<T> panel;
  T sign, low, high;  // infinite: no bound
  bool closed;        // high itself is inside
  T *counts, *sums;   // (rows,)
  T* of_s;            // (rows, columns) slopes of the sums, or nullptr
};
template <class T>
void triplet_sums(const EnginePasses<T>&, const TripletSums<T>&, int64_t first, int64_t end);

// How many columns under a mask have sign · s below each limit (closed: or level with it), and the sum of these s.
template <class T>
struct SumsBelow {
  RowColumns<T> panel;
  Mask mask;
  T sign;
  const T* limits;  // (rows, places)
  int64_t places;
  bool closed;
  int64_t* counts;     // (rows, places)
  T* sums;             // (rows, places), or nullptr
  const T* cotangent;  // (rows, places) of the sums, or nullptr: then the slopes instead
  T* of_s;             // (rows, columns)
};
template <class T>
void sums_below(const EnginePasses<T>&, const SumsBelow<T>&, int64_t first, int64_t end);

// The column of another class with the smallest sign · s above each point, else with the largest; 0 where there is none.
template <class T>
struct NextAbove {
  RowColumns<T> panel;
  T sign;
  const T* points;  // (rows, places)
  int64_t places;
  int64_t* found;  // (rows, places)
};
template <class T>
void next_above(const EnginePasses<T>&, const NextAbove<T>&, int64_t first, int64_t end);

// Numbers of columns under a mask at the nodes low, low + step, ..., high: each gives its two neighbours a share by its
// nearness.
template <class T>
struct SoftHistogram {
  RowColumns<T> panel;
  Mask mask;
  const T* weights;  // (columns,) what each column counts, or nullptr
  T low, high;
  int64_t bins;
  T* nodes;            // (rows, bins + 1)
  const T* cotangent;  // (rows, bins + 1) of the nodes, or nullptr: then the slopes instead
  T* of_s;             // (rows, columns)
};
template <class T>
void soft_histogram(const SoftHistogram<T>&, int64_t first, int64_t end);

}  // namespace ranks
}  // namespace flashpair
