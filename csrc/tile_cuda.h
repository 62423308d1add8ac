// The tile of S that a block works on, strip by strip: read from a panel in the workspace, or multiplied by the block
// itself and kept in shared memory.
#pragma once

#include "mma_cuda.h"
#include "strip_cuda.h"

namespace flashpair {

template <class T, int R, class Source>
class Tile;

// From the workspace: one strip a warp, in registers.
template <class T, int R>
class Tile<T, R, PanelSource<T>> {
 public:
  static constexpr int kStrips = 1;  // of a warp
  static constexpr int kRows = kWarps * R;
  static constexpr int kSharedBytes = 0;

  FP_DEVICE void load(const Pass<T>& pass, const PanelSource<T>& source, int row, int column, char*) {
    strip_.row = row + warp_index() * R, strip_.column = column + lane_index() * kVector;
    const int from = strip_.column - pass.first_n;
    FP_UNROLL
    for (int r = 0; r < R; ++r) {
      const int i = strip_.row + r < pass.end_b ? strip_.row + r : pass.end_b - 1;
      if (from < source.stride)
        load_vector(strip_.s[r], source.s + int64_t(i - pass.first_b) * source.stride + from);
      else
        FP_UNROLL
      for (int v = 0; v < kVector; ++v) strip_.s[r][v] = 0;
    }
    similarities(pass, strip_);
  }
  FP_DEVICE const Strip<T, R>& strip(const Pass<T>&, int) { return strip_; }

 private:
  Strip<T, R> strip_;
};

// From the embeddings: several strips a warp, read again for every item.
template <int R, class Input>
class Tile<float, R, EmbeddingSource<Input>> {
 public:
  static constexpr int kRows = kMmaRows;
  static constexpr int kStrips = kRows / (kWarps * R);
  static constexpr int kSharedBytes = kMmaSharedBytes;

  FP_DEVICE void load(const Pass<float>& pass, const EmbeddingSource<Input>& source, int row, int column,
                      char* shared) {
    row_ = row, column_ = column, dots_ = reinterpret_cast<const float*>(shared);
    multiply_tile(source, row, pass.end_b, column, pass.end_n, shared);
  }
  FP_DEVICE const Strip<float, R>& strip(const Pass<float>& pass, int k) {
    const int first = (warp_index() * kStrips + k) * R;
    strip_.row = row_ + first, strip_.column = column_ + lane_index() * kVector;
    FP_UNROLL
    for (int r = 0; r < R; ++r) load_vector(strip_.s[r], dots_ + (first + r) * kSharedRow + lane_index() * kVector);
    similarities(pass, strip_);
    return strip_;
  }

 private:
  Strip<float, R> strip_;
  const float* dots_;
  int row_, column_;
};

}  // namespace flashpair
