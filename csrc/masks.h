// Which pairs a term sees.
#pragma once

#include "host_device.h"
#include "options.h"

namespace flashpair {
namespace FP_NAMESPACE {

// What a mask does to a whole tile.
enum class Coverage : int { empty, partial, full };

FP_HD inline bool mask_uses_labels(Mask mask) { return mask == Mask::same || mask == Mask::different; }
FP_HD inline bool mask_uses_pairs(Mask mask) { return mask == Mask::given || mask == Mask::not_given; }

// Does the mask keep a pair, given whether its labels agree and whether the given mask holds it?
FP_HD inline bool mask_keeps(Mask mask, bool same_label, bool given) {
  switch (mask) {
    case Mask::all: return true;
    case Mask::same: return same_label;
    case Mask::different: return !same_label;
    case Mask::given: return given;
    case Mask::not_given: return !given;
  }
  return false;
}

// Coverage of a tile by a mask; rows and columns are sorted by label, so a range is its first and last label.
FP_HD inline Coverage mask_coverage(Mask mask, int row_low, int row_high, int column_low, int column_high) {
  if (mask == Mask::all) return Coverage::full;
  if (mask_uses_pairs(mask)) return Coverage::partial;
  const bool apart = row_high < column_low || column_high < row_low;
  const bool one = row_low == row_high && column_low == column_high && row_low == column_low;
  if (!apart && !one) return Coverage::partial;
  return (mask == Mask::same) == one ? Coverage::full : Coverage::empty;
}

}  // namespace FP_NAMESPACE
}  // namespace flashpair
