// masks.h against what its words say.

#include "check.h"
#include "masks.h"

namespace {

using namespace flashpair;
using namespace flashpair::common;

constexpr Mask kMasks[] = {Mask::all, Mask::same, Mask::different, Mask::given, Mask::not_given};

TEST(mask_keeps_its_pairs) {
  for (bool same : {false, true})
    for (bool given : {false, true}) {
      CHECK(mask_keeps(Mask::all, same, given));
      CHECK(mask_keeps(Mask::same, same, given) == same);
      CHECK(mask_keeps(Mask::different, same, given) == !same);
      CHECK(mask_keeps(Mask::given, same, given) == given);
      CHECK(mask_keeps(Mask::not_given, same, given) == !given);
    }
}

TEST(mask_says_what_it_reads) {
  for (Mask mask : kMasks) {
    bool by_label = false, by_pair = false;
    for (bool other : {false, true}) {
      by_label |= mask_keeps(mask, false, other) != mask_keeps(mask, true, other);
      by_pair |= mask_keeps(mask, other, false) != mask_keeps(mask, other, true);
    }
    CHECK(mask_uses_labels(mask) == by_label);
    CHECK(mask_uses_pairs(mask) == by_pair);
  }
}

// The sets of labels, as bits, that a sorted range from `low` to `high` may hold.
std::vector<unsigned> label_sets(int low, int high) {
  std::vector<unsigned> sets;
  const unsigned ends = 1u << low | 1u << high;
  for (unsigned set = 0; set < 1u << (high + 1); ++set)
    if ((set & ends) == ends && set >> low << low == set) sets.push_back(set);
  return sets;
}

// Full or empty exactly where every tile with these first and last labels is.
TEST(mask_coverage_is_exact) {
  constexpr int kLabels = 5;
  for (Mask mask : {Mask::all, Mask::same, Mask::different})
    for (int row_low = 0; row_low < kLabels; ++row_low)
      for (int row_high = row_low; row_high < kLabels; ++row_high)
        for (int column_low = 0; column_low < kLabels; ++column_low)
          for (int column_high = column_low; column_high < kLabels; ++column_high) {
            bool kept = false, dropped = false;
            for (unsigned rows : label_sets(row_low, row_high))
              for (unsigned columns : label_sets(column_low, column_high))
                for (int i = 0; i < kLabels; ++i)
                  for (int j = 0; j < kLabels; ++j)
                    if ((rows >> i & 1) && (columns >> j & 1))
                      (mask_keeps(mask, i == j, false) ? kept : dropped) = true;
            const Coverage want = !dropped ? Coverage::full : !kept ? Coverage::empty : Coverage::partial;
            CHECK(mask_coverage(mask, row_low, row_high, column_low, column_high) == want);
          }
}

TEST(mask_coverage_of_given_pairs_is_unknown) {
  CHECK(mask_coverage(Mask::given, 0, 0, 0, 0) == Coverage::partial);
  CHECK(mask_coverage(Mask::not_given, 0, 1, 2, 3) == Coverage::partial);
}

}  // namespace
