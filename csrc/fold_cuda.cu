// Merges the partials of a panel's tiles into the running statistics, in the order of the tiles.

#include "engine_cuda.h"
#include "reductions.h"

namespace flashpair {
namespace {

using common::state_merge;

constexpr int kMostComponents = 5;
constexpr int kOwners = kLanes;              // of a block
constexpr int kRanges = kThreads / kOwners;  // of tiles, each merged by one thread per owner

// A difference of two shifts of float32 exponents needs no exponential in double.
template <class T>
struct ExponentialOf {
  FP_DEVICE double operator()(double x) const { return double(exp_of(T(x))); }
};

struct State {
  double v[kMostComponents];

  FP_DEVICE void clear(Reduction reduction) {
    FP_UNROLL
    for (int k = 0; k < kMostComponents; ++k) v[k] = 0;
    if (reduction == Reduction::moments) v[3] = infinity<double>(), v[4] = -infinity<double>();
    if (reduction == Reduction::max) v[0] = -infinity<double>();
  }
  // The components of a partial or of the running statistic, `step` apart, as the state that `state_merge` takes.
  template <class V>
  FP_DEVICE void read(Reduction reduction, const V* from, int64_t step) {
    FP_UNROLL
    for (int k = 0; k < kMostComponents; ++k) v[k] = k < partial_components(reduction) ? double(from[k * step]) : 0;
    if (reduction != Reduction::moments) return;
    if (v[0] == 0) return clear(reduction);
    v[2] += v[0] * v[1] * v[1], v[1] *= v[0];
  }
  FP_DEVICE void write(Reduction reduction, double* to, int64_t step) {
    if (reduction == Reduction::moments && v[0] != 0) {
      v[1] /= v[0], v[2] -= v[0] * v[1] * v[1];
      if (v[2] < 0) v[2] = 0;
    }
    FP_UNROLL
    for (int k = 0; k < kMostComponents; ++k)
      if (k < partial_components(reduction)) to[k * step] = v[k];
  }
};

template <class T>
FP_KERNEL(2)
fold_kernel(const T* partials, double* state, int tiles, int length, int64_t first, int64_t owners,
            const FP_GRID_CONSTANT FoldEntries entries) {
  FP_SHARED double merged[kRanges][kMostComponents][kOwners];
  const int lane = lane_index(), range = warp_index();
  const int64_t at = int64_t(block_index()) * kOwners + lane;
  const int per_range = (tiles + kRanges - 1) / kRanges;
  const int begin = range * per_range, end = begin + per_range < tiles ? begin + per_range : tiles;
  for (int n = 0; n < entries.count; ++n) {
    const FoldEntry entry = entries.entries[n];
    const Reduction reduction = Reduction(entry.reduction);
    State mine;
    mine.clear(reduction);
    if (at < length)
      for (int tile = begin; tile < end; ++tile) {
        State next;
        next.read(reduction, partials + (int64_t(entry.partial) * tiles + tile) * length + at, int64_t(tiles) * length);
        state_merge(reduction, mine.v, next.v, ExponentialOf<T>{});
      }
    FP_UNROLL
    for (int k = 0; k < kMostComponents; ++k) merged[range][k][lane] = mine.v[k];
    sync_block();
    if (range == 0 && at < length) {
      double* into = state + int64_t(entry.state) * owners + first + at;
      mine.read(reduction, into, owners);
      for (int other = 0; other < kRanges; ++other) {
        State next;
        FP_UNROLL
        for (int k = 0; k < kMostComponents; ++k) next.v[k] = merged[other][k][lane];
        state_merge(reduction, mine.v, next.v, ExponentialOf<T>{});
      }
      mine.write(reduction, into, owners);
    }
    sync_block();
  }
}

}  // namespace

template <class T>
Status start_fold(const T* partials, double* state, int tiles, int length, int64_t first, int64_t owners,
                  const FoldEntries& entries, Stream stream) {
  if (entries.count == 0) return Status{};
  return launch(fold_kernel<T>, (int64_t(length) + kOwners - 1) / kOwners, 0, stream, partials, state, tiles, length,
                first, owners, entries);
}

#define FP_INSTANTIATE(T) \
  template Status start_fold(const T*, double*, int, int, int64_t, int64_t, const FoldEntries&, Stream);
FP_INSTANTIATE(float)
FP_INSTANTIATE(double)

}  // namespace flashpair
