// A strip of S in the registers of one warp: R rows by 128 columns, of which a lane holds four neighbours in every row.
#pragma once

#include "masks.h"
#include "program_cuda.h"

namespace flashpair {

using common::Coverage;
using common::mask_coverage;
using common::mask_keeps;
using common::mask_uses_labels;
using common::mask_uses_pairs;

constexpr int kVector = 4;                      // columns of a lane
constexpr int kTileColumns = kLanes * kVector;  // of a tile of S: one strip wide
#define FP_EACH_PAIR(R)                   \
  FP_UNROLL                               \
  for (int r = 0; r < (R); ++r) FP_UNROLL \
  for (int v = 0; v < kVector; ++v)
constexpr int kSharedRow = kTileColumns + 8;  // row of a tile in shared memory, without bank conflicts

// Bit `r * kVector + v` of a mask is the pair in row r, column v.
template <class T, int R>
struct Strip {
  T s[R][kVector];
  int row, column;  // of S, first
};

template <int R>
FP_DEVICE constexpr unsigned all_bits() {
  return R * kVector == 32 ? 0xffffffffu : (1u << (R * kVector)) - 1;
}
FP_DEVICE bool has_bit(unsigned bits, int r, int v) { return (bits >> (r * kVector + v)) & 1u; }

// Values along one side: all rows of the strip (the same in every lane), or the columns of the lane.
template <class T, int R>
FP_DEVICE void along_rows(const T* data, int row, T (&out)[R]) {
  FP_UNROLL
  for (int r = 0; r < R; ++r) out[r] = data[row + r];
}
template <class T>
FP_DEVICE void along_columns(const T* data, int column, T (&out)[kVector]) {
  load4(out, data + column);
}

// Dot products → similarities.
template <class T, int R>
FP_DEVICE void similarities(const Pass<T>& pass, Strip<T, R>& strip) {
  if (pass.scaled) {
    T x[R], y[kVector];
    along_rows(pass.x_norms, strip.row, x);
    along_columns(pass.y_norms, strip.column, y);
    FP_EACH_PAIR(R) strip.s[r][v] = strip.s[r][v] * x[r] * y[v];
  }
  if (pass.similarity == Similarity::dot) return;
  T x[R], y[kVector];
  along_rows(pass.x_norms + pass.padded_b, strip.row, x);
  along_columns(pass.y_norms + pass.padded_n, strip.column, y);
  FP_EACH_PAIR(R) {
    T squared = x[r] + y[v] - T(2) * strip.s[r][v];
    // A row is at distance 0 of itself, also after rounding; NaN stays.
    if (pass.symmetric && strip.row + r == strip.column + v) squared -= squared;
    squared = squared < 0 ? T(0) : squared;
    strip.s[r][v] = pass.similarity == Similarity::euclidean ? sqrt_of(squared) : squared;
  }
}

// ds / d<x, y>.
template <class T, int R>
FP_DEVICE T similarity_slope(const Pass<T>& pass, const Strip<T, R>& strip, int r, int v) {
  if (pass.similarity == Similarity::dot) return T(1);
  if (pass.symmetric && strip.row + r == strip.column + v) return T(0);
  if (pass.similarity == Similarity::squared_euclidean) return T(-2);
  const T s = strip.s[r][v];
  return s == 0 ? T(0) : T(-1) / s;
}

// Are all pairs of a strip inside the panel, off the diagonal where that matters, and not excluded one by one? The same
// in every lane.
template <class T, int R>
FP_DEVICE bool plain_strip(const Pass<T>& pass, const Strip<T, R>& strip) {
  const int last_row = strip.row + R - 1, column = strip.column - lane_index() * kVector;
  const int last_column = column + kTileColumns - 1;
  if (pass.exclude || last_row >= pass.end_b || last_column >= pass.end_n) return false;
  if (pass.triangle) return last_row < column;
  return !pass.exclude_self || last_row < column || last_column < strip.row;
}

// Pairs that a mask keeps. `mirrored`: the strip stands for its mirror image, of a self-similarity.
template <class T, int R>
FP_DEVICE unsigned mask_bits(const Pass<T>& pass, const Strip<T, R>& strip, Mask mask, bool mirrored) {
  const bool labelled = mask_uses_labels(mask), listed = mask_uses_pairs(mask), plain = plain_strip(pass, strip);
  if (plain && mask == Mask::all) return all_bits<R>();
  const bool if_true = mask_keeps(mask, true, true), if_false = mask_keeps(mask, false, false);
  int32_t y_label[kVector] = {};
  if (labelled) along_columns(pass.y_labels, strip.column, y_label);
  unsigned bits = 0;
  if (plain && labelled) {
    int32_t x_label[R];
    along_rows(pass.x_labels, strip.row, x_label);
    FP_EACH_PAIR(R) bits |= unsigned(x_label[r] == y_label[v]) << (r * kVector + v);
    return if_true ? bits : bits ^ all_bits<R>();
  }
  int32_t y_exclude[kVector] = {};
  if (pass.exclude && mirrored) along_columns(pass.exclude, strip.column, y_exclude);
  FP_UNROLL
  for (int r = 0; r < R; ++r) {
    const int i = strip.row + r;
    if (i >= pass.end_b) continue;
    const int32_t x_label = labelled ? pass.x_labels[i] : 0;
    const int32_t x_exclude = pass.exclude && !mirrored ? pass.exclude[i] : -1;
    FP_UNROLL
    for (int v = 0; v < kVector; ++v) {
      const int j = strip.column + v;
      bool keep = j < pass.end_n;
      if (pass.triangle) keep = keep && (mirrored ? i < j : i <= j);
      if (pass.exclude_self) keep = keep && i != j;
      if (pass.exclude) keep = keep && (mirrored ? y_exclude[v] != i : x_exclude != j);
      bool hit = x_label == y_label[v];
      if (listed && keep)
        hit = pass.pair_mask[mirrored ? int64_t(j) * pass.columns + i : int64_t(i) * pass.columns + j];
      keep = keep && (hit ? if_true : if_false);
      bits |= unsigned(keep) << (r * kVector + v);
    }
  }
  return bits;
}

// Do the rows and columns of a tile hold a pair of equal labels? By ranges: both sides are sorted by label.
template <class T>
FP_DEVICE bool labels_meet(const Pass<T>& pass, int row, int rows, int column, int columns) {
  const int last_row = row + rows < pass.end_b ? row + rows - 1 : pass.end_b - 1;
  const int last_column = column + columns < pass.end_n ? column + columns - 1 : pass.end_n - 1;
  return mask_coverage(Mask::same, pass.x_labels[row], pass.x_labels[last_row], pass.y_labels[column],
                       pass.y_labels[last_column]) != Coverage::empty;
}

// Does a tile hold pairs of the pass?
template <class T>
FP_DEVICE bool tile_wanted(const Pass<T>& pass, int row, int rows, int column, int columns) {
  if (pass.triangle && column + columns <= row) return false;
  return !pass.same_only || labels_meet(pass, row, rows, column, columns);
}

// Neighbouring blocks walk kGroup row tiles together, so that the operands of both sides stay in the L2 cache.
constexpr int kGroup = 8;
FP_DEVICE void tile_of_block(int block, int tiles_b, int tiles_n, int& tile_b, int& tile_n) {
  const int width = kGroup * tiles_n, first = block / width * kGroup, place = block % width;
  const int size = tiles_b - first < kGroup ? tiles_b - first : kGroup;
  tile_b = first + place % size;
  tile_n = place / size;
}

}  // namespace flashpair
