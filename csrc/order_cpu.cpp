#include "order_cpu.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace flashpair {

Order::Order() = default;
Order::~Order() = default;

namespace {

using Labelled = std::vector<std::pair<int64_t, int64_t>>;  // (label, row), ascending

Labelled sorted(const int64_t* labels, int64_t count) {
  Labelled pairs(count);
  for (int64_t i = 0; i < count; ++i) pairs[i] = {labels[i], i};
  if (!std::is_sorted(pairs.begin(), pairs.end())) std::sort(pairs.begin(), pairs.end());
  return pairs;
}

void order_of(const Labelled& pairs, const std::vector<int64_t>& distinct, Order& order) {
  order.index.resize(pairs.size());
  order.label.resize(pairs.size());
  order.hash = 0x9e3779b97f4a7c15u;
  size_t at = 0;
  for (size_t p = 0; p < pairs.size(); ++p) {
    while (distinct[at] != pairs[p].first) ++at;
    order.index[p] = pairs[p].second;
    order.label[p] = int32_t(at);
    order.hash = (order.hash ^ uint64_t(pairs[p].second)) * 0x100000001b3u;
  }
}

void input_order(int64_t count, Order& order) {
  order.index.resize(count);
  std::iota(order.index.begin(), order.index.end(), int64_t(0));
}

}  // namespace

void make_orders(const int64_t* labels, int64_t rows, const int64_t* ref_labels, int64_t columns, bool symmetric,
                 Order& row_order, Order& column_order) {
  if (labels == nullptr) {
    input_order(rows, row_order);
    if (!symmetric) input_order(columns, column_order);
    return;
  }
  const Labelled row_pairs = sorted(labels, rows);
  const Labelled column_pairs = symmetric ? Labelled() : sorted(ref_labels, columns);
  std::vector<int64_t> distinct;
  distinct.reserve(rows + column_pairs.size());
  auto row = row_pairs.begin();
  auto column = column_pairs.begin();
  while (row != row_pairs.end() || column != column_pairs.end()) {
    const bool of_column = row == row_pairs.end() || (column != column_pairs.end() && column->first < row->first);
    const int64_t label = of_column ? (column++)->first : (row++)->first;
    if (distinct.empty() || distinct.back() != label) distinct.push_back(label);
  }
  order_of(row_pairs, distinct, row_order);
  if (!symmetric) order_of(column_pairs, distinct, column_order);
}

std::vector<int64_t> matches(const int64_t* labels, int64_t rows, const int64_t* ref_labels, int64_t columns) {
  std::vector<int64_t> sorted(ref_labels, ref_labels + columns), found(rows);
  if (!std::is_sorted(sorted.begin(), sorted.end())) std::sort(sorted.begin(), sorted.end());
  auto range = std::make_pair(sorted.begin(), sorted.begin());
  for (int64_t i = 0; i < rows; ++i) {
    // Rows often come class by class.
    if (i == 0 || labels[i] != labels[i - 1]) range = std::equal_range(sorted.begin(), sorted.end(), labels[i]);
    found[i] = range.second - range.first;
  }
  return found;
}

}  // namespace flashpair
