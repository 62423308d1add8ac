// Rows sorted by label, so that a tile's labels are a range.
#pragma once

#include <cstdint>
#include <vector>

namespace flashpair {

struct Order {
  Order();
  ~Order();
  std::vector<int64_t> index;  // sorted position → row of the input
  std::vector<int32_t> label;  // sorted position → dense label, comparable between the two sides; empty without labels
  uint64_t hash = 0;           // of the order
};

// Orders of both sides; of a self-similarity only the rows'. Without labels the order is the input's.
void make_orders(const int64_t* labels, int64_t rows, const int64_t* ref_labels, int64_t columns, bool symmetric,
                 Order& row_order, Order& column_order);

// How many columns have the label of each row.
std::vector<int64_t> matches(const int64_t* labels, int64_t rows, const int64_t* ref_labels, int64_t columns);

}  // namespace flashpair
