// The most extreme entries: which of two is ahead, and lists of the k best, kept by a warp in registers.
#pragma once

#include "collect_cuda.h"

namespace flashpair {

constexpr int kMostBest = 2 * kLanes;  // largest k

// A similarity and where it is; place -1: none. A NaN counts as infinity and stays a NaN.
template <class T>
struct Entry {
  T value;
  int32_t place;
};

template <class T>
FP_DEVICE Entry<T> no_entry(bool largest) {
  return {largest ? -infinity<T>() : infinity<T>(), -1};
}

// More extreme, or as extreme in an earlier place.
template <class T>
FP_DEVICE bool ahead(const Entry<T>& a, const Entry<T>& b, bool largest) {
  if (a.place < 0 || b.place < 0) return a.place >= 0;
  const T x = is_nan(a.value) ? infinity<T>() : largest ? a.value : -a.value;
  const T y = is_nan(b.value) ? infinity<T>() : largest ? b.value : -b.value;
  return x > y || (x == y && a.place < b.place);
}

template <class T>
FP_DEVICE Entry<T> shuffle_xor(Entry<T> entry, int lanes) {
  return {shuffle_xor(entry.value, lanes), shuffle_xor(entry.place, lanes)};
}
template <class T>
FP_DEVICE Entry<T> shuffle_from(Entry<T> entry, int lane) {
  return {shuffle_from(entry.value, lane), shuffle_from(entry.place, lane)};
}
template <class T>
FP_DEVICE Entry<T> shuffle_up(Entry<T> entry, int lanes) {
  return {shuffle_up(entry.value, lanes), shuffle_up(entry.place, lanes)};
}

struct MoreExtreme {
  bool largest;
  template <class T>
  FP_DEVICE Entry<T> operator()(const Entry<T>& a, const Entry<T>& b) const {
    return ahead(b, a, largest) ? b : a;
  }
};

// The k best so far, best first: lane l holds those of rank l and l + 32.
template <class T>
struct BestList {
  Entry<T> low, high;
  Entry<T> last;  // of rank k - 1, in every lane
  int k;
  bool largest;

  FP_DEVICE BestList(int k, bool largest) : low(no_entry<T>(largest)), high(low), last(low), k(k), largest(largest) {}

  // Inserts one entry, the same in every lane.
  FP_DEVICE void insert(const Entry<T>& entry) {
    if (!ahead(entry, last, largest)) return;
    const int rank = count_bits(ballot(ahead(low, entry, largest))) + count_bits(ballot(ahead(high, entry, largest)));
    const int lane = lane_index();
    Entry<T> before_low = shuffle_up(low, 1), before_high = shuffle_up(high, 1);
    const Entry<T> end_of_low = shuffle_from(low, kLanes - 1);
    if (lane == 0) before_high = end_of_low;
    if (lane + kLanes >= rank) high = lane + kLanes == rank ? entry : before_high;
    if (lane >= rank) low = lane == rank ? entry : before_low;
    last = k > kLanes ? shuffle_from(high, k - 1 - kLanes) : shuffle_from(low, k - 1);
  }
  // Offers one entry a lane.
  FP_DEVICE void offer(const Entry<T>& entry) {
    unsigned candidates = ballot(entry.place >= 0 && ahead(entry, last, largest));
    while (candidates) {
      insert(shuffle_from(entry, first_bit(candidates)));
      candidates &= candidates - 1;
    }
  }
  FP_DEVICE void store(T* values, int32_t* places) const {
    const int lane = lane_index();
    if (lane < k) values[lane] = low.value, places[lane] = low.place;
    if (lane + kLanes < k) values[lane + kLanes] = high.value, places[lane + kLanes] = high.place;
  }
};

}  // namespace flashpair
