// A pass as the device sees it, handed to a kernel by value: operands, the place of the panel, terms with their parameters.
#pragma once

#include "device_cuda.h"

namespace flashpair {

constexpr int kMaxTerms = 16;  // of a pass; longer lists are cut by the caller

// A parameter along one side.
template <class T>
struct Value {
  const T* data;  // (owners padded,), or one number (stride 0), or nullptr: `number`
  T number;
  int stride;
};

// Reduction of one term and, in the backward pass, where its statistics lie and which sums its parameters want. Slots
// are positions among the partial vectors of a side, -1: not wanted.
template <class T>
struct TermCode {
  Value<T> scale, offset, above, below;  // owner side
  const T* other_offset;                 // (others padded,) or nullptr
  const T* weight;                       // (others padded,) or nullptr
  const T* cotangent;                    // (owners padded,) or nullptr: 1
  const T* lse;                          // (owners padded,)
  const T* mean;                         // (owners padded,)
  T constant;
  Reduction reduction;
  Score score;
  Mask mask;
  Guide guide;
  bool logaddexp, detach, has_above, has_below, largest;
  bool owns_columns;  // the columns of S; in a self-similarity this says how a mask that is not symmetric is read
  int16_t slot;       // first partial of the statistic
  int16_t scale_slot, offset_slot, other_slot, weight_slot, value_slot;
};

// Components of a statistic's partial: logsumexp (shift, mass), softmax_mean (shift, mass, sum of mass times s), moments
// (count, mean, sum of squared deviations, min, max).
FP_HD constexpr int partial_components(Reduction reduction) {
  switch (reduction) {
    case Reduction::sum:
    case Reduction::count:
    case Reduction::max: return 1;
    case Reduction::logsumexp: return 2;
    case Reduction::softmax_mean: return 3;
    case Reduction::moments: return 5;
  }
  return 0;
}

// One evaluation on a tile: rows as owners by one term, columns by another or (self-similarity) by the same; -1: none.
struct Item {
  int8_t row, column;
  bool shared;  // one z for both
};

template <class T>
struct Pass {
  const T* x_norms;          // (2, rows padded): inverse norm, squared norm
  const T* y_norms;          // (2, columns padded)
  const int32_t* x_labels;   // (rows padded,) ranks of labels
  const int32_t* y_labels;   // (columns padded,)
  const int32_t* exclude;    // (rows padded,) or nullptr
  const uint8_t* pair_mask;  // (B, N) or nullptr
  const T* guide;            // (end_b - first_b, guide_stride) second products of the panel, or nullptr
  int32_t guide_stride;      // a multiple of 4
  int64_t padded_b, padded_n, columns;
  int32_t first_b, end_b, first_n, end_n;  // the panel
  int32_t tiles_b, tiles_n;                // of the panel
  Similarity similarity;
  bool scaled;  // similarities are multiplied by inverse norms
  bool exclude_self, symmetric;
  bool triangle;     // of a self-similarity: (i, j) with i <= j only, which also stands for (j, i)
  bool mirror_sums;  // parameter sums count the column direction of a self-similarity
  bool same_only;    // only pairs of equal labels count
  int8_t item_count, term_count;
  Item items[kMaxTerms];
  TermCode<T> terms[kMaxTerms];
};

// Where the similarities of a panel come from: a matrix in the workspace, or the embeddings themselves.
template <class T>
struct PanelSource {
  const T* s;      // (end_b - first_b, stride)
  int32_t stride;  // a multiple of 4
};
template <class Input>
struct EmbeddingSource {
  const Input* x;  // (B, D), rows 16-byte aligned
  const Input* y;  // (N, D)
  int64_t stride_xb, stride_yn;
  int32_t features;  // D
};

// Partial vectors of a panel, one per tile and slot: rows (slots, tiles_n, end_b - first_b), columns (slots, tiles_b,
// end_n - first_n).
template <class T>
struct Partials {
  T* rows;
  T* columns;
};

}  // namespace flashpair
