// Formulas over whole rows of a panel of S, as plain data: what python/flashpair/rows.py hands to C++ on a CPU.
#pragma once

#include <cstdint>

#include "problem.h"
#include "row_columns.h"

namespace flashpair {

template <class T>
struct SPanel {
  const T* s;               // (rows, columns)
  const int64_t* left_out;  // (rows,) column that a row never meets, -1: none
  int64_t rows, columns;
  T* of_s;  // (rows, columns) slopes of the total, or nullptr
  int threads;
  Parallel parallel;
};

// Columns in the order of their distance |own - target|.
template <class T>
struct OrderedPanel {
  SPanel<T> panel;
  T scale;
  const void *own, *targets;  // (rows,), (columns,) ascending; float where they are narrow, else double
  bool narrow;
  const int64_t* order;  // (columns,) which column each target belongs to
};

// A function known by its values and slopes at even knots over [-1, 1] and `margin` more on either side.
template <class T>
struct TabulatedPanel {
  SPanel<T> panel;
  const T *values, *slopes;  // (knots,)
  int64_t knots, margin;
  T *of_values, *of_slopes;  // (knots,)
};

// The positive of each row, its `left_out`, among its `kept` largest others.
template <class T>
struct HardestPanel {
  SPanel<T> panel;
  int64_t kept;  // 1 or more, and there are as many others
  T scale;
  bool mean;      // weight · mean of the kept - positive, instead of the log-sum
  double weight;  // of that mean
};

// The function of a difference that soft ranks sum.
enum class Step { sigmoid, softplus, hinge };

// Σ_j step(scale (sign · s_j - point)) over the columns under a mask; with cotangents the slopes instead.
template <class T>
struct SoftRanksPanel {
  RowColumns<T> panel;
  Mask mask;
  T sign;
  const T* points;  // (rows, places)
  int64_t places;
  T scale;
  Step step;
  T* ranks;             // (rows, places)
  const T* cotangent;   // (rows, places) of the ranks, or nullptr
  T *of_s, *of_points;  // (rows, columns), (rows, places)
  int threads;
  Parallel parallel;
};

// Σ_h v_h tanh(p_hi + q_hj); with cotangents the slopes instead.
template <class T>
struct PairGatePanel {
  const T *p, *q, *v;  // (units, rows), (units, columns), (units,)
  int64_t units, rows, columns;
  T* values;           // (rows, columns)
  const T* cotangent;  // (rows, columns) of the values, or nullptr
  T *of_p, *of_q, *of_v;
  int threads;
  Parallel parallel;
};

struct PanelTotal {
  double value, of_scale;
};

}  // namespace flashpair
