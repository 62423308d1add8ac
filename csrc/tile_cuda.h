// The tile of S that a block works on, strip by strip: read from a panel in the workspace, or multiplied by the block
// itself and kept in shared memory. The strips of the warps lie below each other; then come the second ones of each.
#pragma once

#include "mma_cuda.h"
#include "strip_cuda.h"

namespace flashpair {

template <class T, int R, class Source>
class Tile;

// Strips of each warp that hold rows of the panel: the same for all.
template <class T>
FP_DEVICE int strips_inside(const Pass<T>& pass, int row, int strip_rows, int most) {
  const int step = kWarps * strip_rows, strips = (pass.end_b - row + step - 1) / step;
  return strips < most ? strips : most;
}

// From the workspace.
template <class T, int R>
class Tile<T, R, PanelSource<T>> {
 public:
  static constexpr int kStrips = 4;  // of a warp
  static constexpr int kRows = kWarps * R * kStrips;
  static constexpr int kSharedBytes = 0;

  FP_DEVICE void load(const Pass<T>&, const PanelSource<T>&, int row, int column, char*) {
    row_ = row + warp_index() * R, strip_.column = column + lane_index() * kVector;
  }
  FP_DEVICE const Strip<T, R>& strip(const Pass<T>& pass, const PanelSource<T>& source, int k) {
    strip_.row = row_ + k * kWarps * R;
    const int from = strip_.column - pass.first_n;
    FP_UNROLL
    for (int r = 0; r < R; ++r) {
      const int i = strip_.row + r < pass.end_b ? strip_.row + r : pass.end_b - 1;
      if (from < source.stride)
        load4(strip_.s[r], source.s + int64_t(i - pass.first_b) * source.stride + from);
      else
        FP_UNROLL
      for (int v = 0; v < kVector; ++v) strip_.s[r][v] = 0;
    }
    similarities(pass, strip_);
    return strip_;
  }

 private:
  Strip<T, R> strip_;
  int row_;
};

// From the embeddings.
template <int R, class Input>
class Tile<float, R, EmbeddingSource<Input>> {
 public:
  static constexpr int kRows = kMmaRows;
  static constexpr int kStrips = kRows / (kWarps * R);
  static constexpr int kSharedBytes = kMmaSharedBytes;

  FP_DEVICE void load(const Pass<float>& pass, const EmbeddingSource<Input>& source, int row, int column,
                      char* shared) {
    row_ = row, strip_.column = column + lane_index() * kVector, dots_ = reinterpret_cast<const float*>(shared);
    multiply_tile(source, row, pass.end_b, column, pass.end_n, shared);
  }
  FP_DEVICE const Strip<float, R>& strip(const Pass<float>& pass, const EmbeddingSource<Input>&, int k) {
    const int first = (k * kWarps + warp_index()) * R;
    strip_.row = row_ + first;
    FP_UNROLL
    for (int r = 0; r < R; ++r) load4(strip_.s[r], dots_ + (first + r) * kSharedRow + lane_index() * kVector);
    similarities(pass, strip_);
    return strip_;
  }

 private:
  Strip<float, R> strip_;
  const float* dots_;
  int row_;
};

}  // namespace flashpair
