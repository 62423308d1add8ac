#include "ranks_cpu.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "engine.h"

namespace flashpair::ranks {
namespace {

template <class T>
bool is_less(T a, T b) {
  return a < b || (b != b && a == a);  // NaN comes last
}

// Numbers of a row in ascending order, with where they came from.
template <class T>
class Sorted {
 public:
  void clear() { numbers_.clear(); }
  void add(T value, int64_t place) { numbers_.push_back({value, place}); }
  void sort() {
    std::sort(numbers_.begin(), numbers_.end(), [](const Number& a, const Number& b) {
      return is_less(a.value, b.value) || (!is_less(b.value, a.value) && a.place < b.place);
    });
    values_.resize(numbers_.size());
    for (size_t k = 0; k < numbers_.size(); ++k) values_[k] = numbers_[k].value;
  }
  void set(const T* numbers, int64_t count) {
    clear();
    for (int64_t k = 0; k < count; ++k) add(numbers[k], k);
    sort();
  }

  int64_t size() const { return int64_t(values_.size()); }
  const T* values() const { return values_.data(); }
  T operator[](int64_t k) const { return values_[k]; }
  int64_t place(int64_t k) const { return numbers_[k].place; }

 private:
  struct Number {
    T value;
    int64_t place;
  };
  std::vector<Number> numbers_;
  std::vector<T> values_;
};

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T>
void clear_row(T* of_s, int64_t columns, int64_t i) {
  if (of_s) memset(of_s + i * columns, 0, columns * sizeof(T));
}

}  // namespace

template <class T>
void triplet_sums(const EnginePasses<T>& engine, const TripletSums<T>& p, int64_t first, int64_t end) {
  const RowColumns<T>& panel = p.panel;
  Sorted<T> near;
  std::vector<int32_t> from(panel.columns), to(panel.columns);
  std::vector<int64_t> met_by;
  for (int64_t i = first; i < end; ++i) {
    const T* s = panel.row(i);
    T* of_s = p.of_s ? p.of_s + i * panel.columns : nullptr;
    clear_row(p.of_s, panel.columns, i);
    near.clear();
    for (const Range& range : panel.of(Mask::same, i))
      for (int64_t j = range.first; j < range.end; ++j) near.add(p.sign * s[j], j);
    near.sort();
    const int32_t count = int32_t(near.size());
    met_by.assign(count + 1, 0);
    double far_sums[4] = {};  // each waits for itself only
    int64_t triplets = 0;
    for (const Range& range : panel.of(Mask::different, i)) {
      const int64_t columns = range.end - range.first;
      const T* far = s + range.first;
      // far - near < high: near > far - high; closed: near >= far - high.
      if (p.high < kInfinity<T>)
        engine.places(near.values(), count, far, columns, p.sign, p.high, p.closed, from.data());
      else
        std::fill(from.begin(), from.begin() + columns, 0);
      if (p.low > -kInfinity<T>)
        engine.places(near.values(), count, far, columns, p.sign, p.low, true, to.data());
      else
        std::fill(to.begin(), to.begin() + columns, count);
      const bool bounded_low = p.low > -kInfinity<T>;
      for (int64_t j = 0; j < columns; ++j) {
        const int32_t met = to[j] - from[j];
        if (met <= 0) continue;
        triplets += met, ++met_by[from[j]];
        if (bounded_low) --met_by[to[j]];  // else the end, which nobody reads
        far_sums[j % 4] += double(met) * double(far[j]);
        if (of_s) of_s[range.first + j] = -p.sign * T(met);
      }
    }
    double sum = -double(p.sign) * ((far_sums[0] + far_sums[1]) + (far_sums[2] + far_sums[3]));
    int64_t met = 0;
    for (int64_t k = 0; k < count; ++k) {
      met += met_by[k], sum += double(met) * double(met ? near[k] : T(0));
      if (of_s) of_s[near.place(k)] = p.sign * T(met);
    }
    p.counts[i] = T(triplets), p.sums[i] = T(sum);
  }
}

template <class T>
void sums_below(const EnginePasses<T>& engine, const SumsBelow<T>& p, int64_t first, int64_t end) {
  const RowColumns<T>& panel = p.panel;
  Sorted<T> limits;
  std::vector<int32_t> place(panel.columns);
  std::vector<int64_t> counts;
  std::vector<double> sums;
  for (int64_t i = first; i < end; ++i) {
    const T* s = panel.row(i);
    T* of_s = p.of_s ? p.of_s + i * panel.columns : nullptr;
    clear_row(p.of_s, panel.columns, i);
    limits.set(p.limits + i * p.places, p.places);
    counts.assign(p.places + 1, 0), sums.assign(p.places + 1, 0);
    if (p.cotangent)
      for (int64_t k = p.places - 1; k >= 0; --k)
        sums[k] = sums[k + 1] + double(p.cotangent[i * p.places + limits.place(k)]);
    for (const Range& range : panel.of(p.mask, i)) {
      const int64_t columns = range.end - range.first;
      const T* values = s + range.first;
      // The limits that a column is not below.
      engine.places(limits.values(), p.places, values, columns, p.sign, T(0), p.closed, place.data());
      for (int64_t j = 0; j < columns; ++j)
        if (values[j] != values[j]) place[j] = int32_t(p.places);  // a NaN is below nothing
      if (p.cotangent) {
        for (int64_t j = 0; j < columns; ++j) of_s[range.first + j] = T(sums[place[j]]);
      } else if (p.sums) {
        for (int64_t j = 0; j < columns; ++j) ++counts[place[j]], sums[place[j]] += double(values[j]);
      } else {
        for (int64_t j = 0; j < columns; ++j) ++counts[place[j]];
      }
    }
    if (p.cotangent) continue;
    int64_t count = 0;
    double sum = 0;
    for (int64_t k = 0; k < p.places; ++k) {
      const int64_t at = i * p.places + limits.place(k);
      count += counts[k], sum += sums[k];
      const bool never = limits[k] != limits[k];
      p.counts[at] = never ? 0 : count;
      if (p.sums) p.sums[at] = never ? T(0) : T(sum);
    }
  }
}

template <class T>
void next_above(const EnginePasses<T>& engine, const NextAbove<T>& p, int64_t first, int64_t end) {
  const RowColumns<T>& panel = p.panel;
  Sorted<T> points;
  std::vector<int32_t> place(panel.columns);
  std::vector<int64_t> best;
  for (int64_t i = first; i < end; ++i) {
    const T* s = panel.row(i);
    points.set(p.points + i * p.places, p.places);
    best.assign(p.places + 1, -1);  // the smallest of those above so many points
    int64_t largest = -1;
    for (const Range& range : panel.of(Mask::different, i)) {
      engine.places(points.values(), p.places, s + range.first, range.end - range.first, p.sign, T(0), true,
                    place.data());
      for (int64_t j = range.first; j < range.end; ++j) {
        if (largest < 0 || is_less(p.sign * s[largest], p.sign * s[j])) largest = j;
        int64_t& smallest = best[place[j - range.first]];
        if (smallest < 0 || is_less(p.sign * s[j], p.sign * s[smallest])) smallest = j;
      }
    }
    int64_t next = -1;
    for (int64_t k = p.places - 1; k >= 0; --k) {
      const int64_t above = best[k + 1];
      if (above >= 0 && (next < 0 || !is_less(p.sign * s[next], p.sign * s[above]))) next = above;
      p.found[i * p.places + points.place(k)] = next >= 0 ? next : largest >= 0 ? largest : 0;
    }
  }
}

template <class T>
void soft_histogram(const SoftHistogram<T>& p, int64_t first, int64_t end) {
  const RowColumns<T>& panel = p.panel;
  const T per_step = T(p.bins / (double(p.high) - double(p.low)));
  std::vector<double> sums;
  for (int64_t i = first; i < end; ++i) {
    const T* s = panel.row(i);
    const T* cotangent = p.cotangent ? p.cotangent + i * (p.bins + 1) : nullptr;
    T* of_s = p.of_s ? p.of_s + i * panel.columns : nullptr;
    clear_row(p.of_s, panel.columns, i);
    sums.assign(p.bins + 1, 0);
    for (const Range& range : panel.of(p.mask, i)) {
      for (int64_t j = range.first; j < range.end; ++j) {
        const T value = s[j] < p.low ? p.low : s[j] > p.high ? p.high : s[j], weight = p.weights ? p.weights[j] : T(1);
        const T at = (value - p.low) * per_step;
        const int64_t left = at >= 1 ? std::min(int64_t(at), p.bins - 1) : 0;  // NaN: 0
        if (!cotangent) {
          const T right = (at - T(left)) * weight;
          sums[left] += double(weight - right), sums[left + 1] += double(right);
        } else if (s[j] == value) {
          of_s[j] = (cotangent[left + 1] - cotangent[left]) * weight * per_step;
        }
      }
    }
    if (cotangent) continue;
    for (int64_t k = 0; k <= p.bins; ++k) p.nodes[i * (p.bins + 1) + k] = T(sums[k]);
  }
}

#define FP_OF(T)                                                                                  \
  template void triplet_sums<T>(const EnginePasses<T>&, const TripletSums<T>&, int64_t, int64_t); \
  template void sums_below<T>(const EnginePasses<T>&, const SumsBelow<T>&, int64_t, int64_t);     \
  template void next_above<T>(const EnginePasses<T>&, const NextAbove<T>&, int64_t, int64_t);     \
  template void soft_histogram<T>(const SoftHistogram<T>&, int64_t, int64_t);
FP_OF(float)
FP_OF(double)
#undef FP_OF

}  // namespace flashpair::ranks
