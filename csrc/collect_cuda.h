// From the registers of the lanes to one partial per row and column of a tile, always in the same order.
#pragma once

#include "reductions.h"
#include "strip_cuda.h"

namespace flashpair {

struct Add {
  template <class V>
  FP_DEVICE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <class V>
  FP_DEVICE V operator()(V a, V b) const {
    return larger(a, b);
  }
};
struct Smaller {
  template <class V>
  FP_DEVICE V operator()(V a, V b) const {
    return smaller(a, b);
  }
};

// One number of all lanes, in every lane.
template <class T, class Op>
FP_DEVICE T over_lanes(T value, Op op) {
  FP_UNROLL
  for (int step = kLanes / 2; step; step /= 2) value = op(value, shuffle_xor(value, step));
  return value;
}

// Reduces R numbers over the lanes; afterwards lane l has that of row l / (32 / R). Halves are exchanged, so that R rows
// take R + log2(32 / R) - 1 shuffles and not 5 R.
template <int R>
FP_DEVICE int row_of_lane() {
  return lane_index() / (kLanes / R);
}
template <int HALF, int STEP, int R, class V, class Op>
FP_DEVICE void exchange_halves(V (&values)[R], Op op) {
  if constexpr (HALF >= 1) {
    const bool upper = lane_index() & STEP;
    FP_UNROLL
    for (int k = 0; k < HALF; ++k) {
      const V sent = upper ? values[k] : values[k + HALF], kept = upper ? values[k + HALF] : values[k];
      values[k] = op(kept, shuffle_xor(sent, STEP));
    }
    exchange_halves<HALF / 2, STEP / 2>(values, op);
  }
}
template <int R, class V, class Op>
FP_DEVICE V over_columns(V (&values)[R], Op op) {
  exchange_halves<R / 2, kLanes / 2>(values, op);
  FP_UNROLL
  for (int step = kLanes / R / 2; step; step /= 2) values[0] = op(values[0], shuffle_xor(values[0], step));
  return values[0];
}

// Where a tile's partials go. A warp writes its rows by itself, since it has all columns of the tile; columns are merged
// over the warps through shared memory, one strip of each at a time.
template <class T, class V = T>
struct Collector {
  const Pass<T>& pass;
  Partials<V> partials;
  int tile_b, tile_n;
  V* shared;        // (components, kWarps, kTileColumns)
  int tile_column;  // of S, first of the tile

  // One number of each row, from the lane that `over_columns` left it in.
  template <int R>
  FP_DEVICE void row(int slot, int first_row, V value) const {
    const int i = first_row + row_of_lane<R>();
    if (lane_index() % (kLanes / R) || i >= pass.end_b) return;
    row_partial(slot, i, value);
  }
  FP_DEVICE void row_partial(int slot, int i, V value) const {
    partials.rows[(int64_t(slot) * pass.tiles_n + tile_n) * (pass.end_b - pass.first_b) + (i - pass.first_b)] = value;
  }
  FP_DEVICE void column_partial(int slot, int j, V value) const {
    partials.columns[(int64_t(slot) * pass.tiles_b + tile_b) * (pass.end_n - pass.first_n) + (j - pass.first_n)] =
        value;
  }
  // One number of each column of this warp's strip; after a barrier `of_warp` reads it.
  FP_DEVICE void column(int component, const V (&value)[kVector]) const {
    store4(shared + (component * kWarps + warp_index()) * kTileColumns + lane_index() * kVector, value);
  }
  FP_DEVICE V of_warp(int component, int warp, int column) const {
    return shared[(component * kWarps + warp) * kTileColumns + column];
  }
  // Partials of a tile without pairs: what stands for none.
  FP_DEVICE void neutral(int row_slots, int column_slots, int tile_row, int tile_rows, V nothing = V(0)) const {
    for (int k = thread_index(); k < tile_rows && tile_row + k < pass.end_b; k += kThreads)
      for (int slot = 0; slot < row_slots; ++slot) row_partial(slot, tile_row + k, nothing);
    for (int k = thread_index(); k < kTileColumns && tile_column + k < pass.end_n; k += kThreads)
      for (int slot = 0; slot < column_slots; ++slot) column_partial(slot, tile_column + k, nothing);
  }
};

}  // namespace flashpair
