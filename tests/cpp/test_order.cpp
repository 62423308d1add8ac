// order_cpu.h and panel_cache_cpu.h.

#define FP_TEST_MAIN
#include <algorithm>
#include <numeric>

#include "check.h"
#include "order_cpu.h"
#include "panel_cache_cpu.h"

namespace {

using namespace flashpair;

std::vector<int64_t> random_labels(check::Random& random, size_t count, uint64_t classes) {
  std::vector<int64_t> labels(count);
  labels.reserve(1);  // a null pointer stands for no labels at all
  for (int64_t& label : labels) label = (int64_t(random.below(classes)) - 2) * 4'000'000'007;
  return labels;
}

void check_side(const Order& order, const std::vector<int64_t>& labels) {
  CHECK(order.index.size() == labels.size());
  CHECK(order.label.size() == labels.size());
  std::vector<int64_t> rows = order.index;
  std::sort(rows.begin(), rows.end());
  for (size_t p = 0; p < rows.size(); ++p) CHECK(rows[p] == int64_t(p));
  for (size_t p = 1; p < labels.size(); ++p) {
    const int64_t a = order.index[p - 1], b = order.index[p];
    CHECK(labels[a] < labels[b] || (labels[a] == labels[b] && a < b));
  }
}

TEST(orders_are_sorted_and_comparable) {
  check::Random random(1);
  for (size_t rows : {0, 1, 2, 7, 40})
    for (size_t columns : {0, 1, 3, 40})
      for (uint64_t classes : {1, 3, 100}) {
        const auto labels = random_labels(random, rows, classes), others = random_labels(random, columns, classes);
        Order row_order, column_order;
        make_orders(labels.data(), rows, others.data(), columns, false, row_order, column_order);
        check_side(row_order, labels), check_side(column_order, others);
        for (size_t p = 0; p < rows; ++p)
          for (size_t q = 0; q < columns; ++q) {
            const int64_t a = labels[row_order.index[p]], b = others[column_order.index[q]];
            CHECK((a == b) == (row_order.label[p] == column_order.label[q]));
            CHECK((a < b) == (row_order.label[p] < column_order.label[q]));
          }
      }
}

TEST(a_self_similarity_has_one_order) {
  check::Random random(2);
  const auto labels = random_labels(random, 30, 4);
  Order row_order, column_order;
  make_orders(labels.data(), 30, nullptr, 30, true, row_order, column_order);
  check_side(row_order, labels);
  CHECK(column_order.index.empty());
}

TEST(without_labels_the_order_is_that_of_the_input) {
  Order row_order, column_order;
  make_orders(nullptr, 5, nullptr, 3, false, row_order, column_order);
  for (int64_t p = 0; p < 5; ++p) CHECK(row_order.index[p] == p);
  CHECK(column_order.index.size() == 3);
  CHECK(row_order.label.empty() && column_order.label.empty());
}

TEST(hashes_tell_orders_apart) {
  const int64_t labels[] = {3, 1, 2}, others[] = {1, 3, 2}, like[] = {30, 10, 20};
  Order first, second, third, none;
  make_orders(labels, 3, nullptr, 3, true, first, none);
  make_orders(others, 3, nullptr, 3, true, second, none);
  make_orders(like, 3, nullptr, 3, true, third, none);
  CHECK(first.hash != second.hash);
  CHECK(first.hash == third.hash);
}

TEST(the_cache_holds_what_was_prepared) {
  PanelCache& cache = panel_cache();
  PanelKey key, other;
  key.rows_hash = 1, other.rows_hash = 2;
  CHECK(cache.try_lock());
  CHECK(!cache.holds(key));
  CHECK(cache.prepare(key, 1000, 3));
  CHECK(cache.holds(key) && !cache.holds(other));
  CHECK(cache.bytes() >= 1000);
  std::memset(cache.data(), 1, size_t(cache.bytes()));
  for (int t = 0; t < 3; ++t) CHECK(!cache.tiles()[t].present);
  const void* kept = cache.data();
  CHECK(cache.prepare(other, 500, 1));
  CHECK(cache.data() == kept);  // the memory stays
  CHECK(cache.holds(other) && !cache.holds(key));
  cache.release();
  CHECK(!cache.holds(other) && cache.bytes() == 0);
  cache.unlock();
}

}  // namespace
