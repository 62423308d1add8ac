// What the CUDA kernels offer to the host: starting them on a stream.
#pragma once

#include "program_cuda.h"

namespace flashpair {

// Vectors along a side are padded to a multiple of this, and panels begin at one: a multiple of every tile's sides.
constexpr int kPad = 128;
// Rows of a strip. Pair weights keep more of every pair in registers.
template <class T>
constexpr int kStripRows = sizeof(T) == 4 ? 4 : 2;
template <class T>
constexpr int kWeightsRows = kStripRows<T> / 2;

// One statistic or sum: its first partial, and where its state begins.
struct FoldEntry {
  int8_t reduction;
  int16_t partial, state;
};
constexpr int kMaxEntries = 6 * kMaxTerms;
struct FoldEntries {
  int count;
  FoldEntry entries[kMaxEntries];
};

// Pair weights of a panel.
template <class Out>
struct WeightsOutput {
  Out* w;                             // (end_b - first_b, stride), or nullptr: sums only
  int64_t stride;                     // a multiple of 4
  const float* factor;                // (1,) or nullptr: multiplies the weights before rounding
  int row_sum_slot, column_sum_slot;  // sums of the stored weights, -1: not wanted
};

// The k best of each row within stripes of columns.
template <class T>
struct Best {
  T* values;        // (lists, rows, k), best first
  int32_t* places;  // columns of S, -1: none
};

template <class T, class Source>
Status start_stats(const Pass<T>& pass, const Source& source, const Partials<T>& partials, Stream stream);
// `row_slots`, `column_slots`: how many partial vectors each side has.
template <class T, class Source, class Out>
Status start_weights(const Pass<T>& pass, const Source& source, const Partials<T>& partials,
                     const WeightsOutput<Out>& output, int row_slots, int column_slots, Stream stream);
// k = 1: the best entry of every term (item_count of them) per tile, as its value and its place.
template <class T, class Source>
Status start_extremes(const Pass<T>& pass, const Source& source, const Partials<T>& values,
                      const Partials<int32_t>& places, Stream stream);
// Any k: the best of each row in each of `stripes` stripes of the panel, by the first term.
template <class T>
Status start_top_k(const Pass<T>& pass, const PanelSource<T>& source, const Best<T>& best, int k, int stripes,
                   Stream stream);

// Merges the partials (slots, tiles, length) of a panel into the state (slots, owners) from `first` on; both hold the
// components that `partial_components` names.
template <class T>
Status start_fold(const T* partials, double* state, int tiles, int length, int64_t first, int64_t owners,
                  const FoldEntries& entries, Stream stream);
// Merges `lists` lists of k best entries per row, one after the other, into the first `k` of `into`.
template <class T>
Status start_merge_best(const Best<T>& from, int lists, const Best<T>& into, int rows, int k, bool largest,
                        Stream stream);

}  // namespace flashpair
