// The loss of each row's positive among its most similar negatives, with its slopes: the threshold is found by bisection,
// each step of which counts a row that lies in the nearest cache. The twin of HardContrastiveLoss in
// losses/contrast/hard_contrastive.py. Included per instruction set.

template <class T>
class Hardest {
 public:
  explicit Hardest(const HardestPanel<T>& p) : p_(p) {}

  PanelTotal run() {
    const SPanel<T>& panel = p_.panel;
    const int64_t tasks = std::min<int64_t>(panel.rows, panel.threads);
    if (tasks == 0) return {0, 0};
    Buffer<PanelTotal> totals(tasks);
    parallel_tasks(panel.parallel, tasks, [&](int64_t task) {
      PanelTotal total{0, 0};
      Buffer<T> others(round_up(panel.columns, kWidth<T>));
      for (int64_t i = task * panel.rows / tasks; i < (task + 1) * panel.rows / tasks; ++i) row(i, others.get(), total);
      totals[task] = total;
    });
    for (int64_t task = 1; task < tasks; ++task)
      totals[0].value += totals[task].value, totals[0].of_scale += totals[task].of_scale;
    return totals[0];
  }

 private:
  static constexpr int64_t kBlock = 32;  // vectors that are summed in T; the sums of blocks are added in double

  struct Range {
    T low, high;
    bool bad;  // holds a NaN
  };

  void row(int64_t i, T* others, PanelTotal& total) const {
    const SPanel<T>& panel = p_.panel;
    const int64_t columns = panel.columns, padded = round_up(columns, kWidth<T>), own = panel.left_out[i];
    const T* s = panel.s + i * columns;
    T* of_s = panel.of_s ? panel.of_s + i * columns : nullptr;
    memcpy(others, s, columns * sizeof(T));
    for (int64_t j = columns; j < padded; ++j) others[j] = T(-INFINITY);
    others[own] = T(-INFINITY);
    const Range range = range_of(others, padded);
    // As much as rounding may part equal numbers near 1.
    const T least = threshold(others, padded, range) - 8 * std::numeric_limits<T>::epsilon();
    const T positive = s[own], top = range.bad ? T(NAN) : range.high;
    if (p_.mean)
      mean(others, padded, least, positive, top, of_s, own, total);
    else
      log_sum(others, padded, least, positive, top, of_s, own, total);
  }

  // log(1 + Σ e^(scale (s_j - positive))) over the kept.
  void log_sum(const T* others, int64_t padded, T least, T positive, T top, T* of_s, int64_t own,
               PanelTotal& total) const {
    double sum = 0, by_s = 0;
    for_blocks(padded, [&](int64_t first, int64_t end) {
      Vec<T> part{}, part_by_s{};
      for (int64_t j = first; j < end; j += kWidth<T>) {
        const Vec<T> v = load(others + j), e = weight(v, least, top);
        part += e, part_by_s += v > least ? e * v : Vec<T>{};
      }
      sum += double(sum_lanes<T>(part)), by_s += double(sum_lanes<T>(part_by_s));
    });
    const double gap = std::log(sum) + double(p_.scale) * (double(top) - double(positive));
    const double e = std::exp(-std::abs(gap)), share = (gap < 0 ? e : 1) / (1 + e);  // of a NaN: NaN
    total.value += (gap > 0 ? gap : 0 * gap) + std::log1p(e);
    total.of_scale += share * (by_s / sum - double(positive));
    if (!of_s) return;
    const T factor = T(double(p_.scale) * share / sum);
    for (int64_t j = 0; j < p_.panel.columns; j += kWidth<T>)
      store_part(of_s + j, weight(load(others + j), least, top) * factor, p_.panel.columns - j);
    of_s[own] = T(-double(p_.scale) * share);
  }

  // weight · (mean of the kept) - positive.
  void mean(const T* others, int64_t padded, T least, T positive, T top, T* of_s, int64_t own,
            PanelTotal& total) const {
    double sum = 0, count = 0;
    for_blocks(padded, [&](int64_t first, int64_t end) {
      Vec<T> part{}, kept{};
      for (int64_t j = first; j < end; j += kWidth<T>) {
        const Vec<T> v = load(others + j);
        part += v > least ? v : Vec<T>{}, kept += v > least ? broadcast(T(1)) : Vec<T>{};
      }
      sum += double(sum_lanes<T>(part)), count += double(sum_lanes<T>(kept));
    });
    total.value += p_.weight * sum / count - double(positive) + 0 * double(top);
    if (!of_s) return;
    const Vec<T> share = broadcast(T(p_.weight / count));
    for (int64_t j = 0; j < p_.panel.columns; j += kWidth<T>)
      store_part(of_s + j, load(others + j) > least ? share : Vec<T>{}, p_.panel.columns - j);
    of_s[own] = T(-1);
  }

  FP_INLINE Vec<T> weight(Vec<T> v, T least, T top) const {
    return keep_lanes<T>(MaskVec<T>(v > least), exp_lanes<T>((v - top) * p_.scale));
  }

  template <class Work>
  static FP_INLINE void for_blocks(int64_t padded, const Work& work) {
    for (int64_t first = 0; first < padded; first += kBlock * kWidth<T>)
      work(first, std::min<int64_t>(padded, first + kBlock * kWidth<T>));
  }

  // Of what is above -inf.
  static Range range_of(const T* others, int64_t padded) {
    Vec<T> low = broadcast(T(INFINITY)), high = broadcast(T(-INFINITY));
    MaskVec<T> bad{};
    for (int64_t j = 0; j < padded; j += kWidth<T>) {
      const Vec<T> v = load(others + j);
      low = MaskVec<T>(v < low) & MaskVec<T>(v > T(-INFINITY)) ? v : low;
      high = v > high ? v : high;
      bad |= MaskVec<T>(v != v);
    }
    Range found{low[0], high[0], any_lane<T>(bad)};
    for (int l = 1; l < kWidth<T>; ++l)
      found.low = std::min(found.low, low[l]), found.high = std::max(found.high, high[l]);
    return found;
  }

  static int64_t count_from(const T* others, int64_t padded, T least) {
    MaskVec<T> count{};
    for (int64_t j = 0; j < padded; j += kWidth<T>) count -= MaskVec<T>(load(others + j) >= least);
    int64_t total = 0;
    for (int l = 0; l < kWidth<T>; ++l) total += count[l];
    return total;
  }

  // The kept-th largest: low has as many or more at or above it, high fewer.
  T threshold(const T* others, int64_t padded, const Range& range) const {
    T low = range.low, high = range.high;
    if (count_from(others, padded, high) >= p_.kept) return high;
    for (;;) {
      const T middle = low + (high - low) / 2;
      if (!(middle > low && middle < high)) break;
      const int64_t count = count_from(others, padded, middle);
      (count < p_.kept ? high : low) = middle;
      if (count == p_.kept) break;
    }
    Vec<T> least = broadcast(T(INFINITY));
    for (int64_t j = 0; j < padded; j += kWidth<T>) {
      const Vec<T> v = load(others + j);
      least = MaskVec<T>(v >= low) & MaskVec<T>(v < least) ? v : least;
    }
    T found = least[0];
    for (int l = 1; l < kWidth<T>; ++l) found = std::min(found, least[l]);
    return found;
  }

  HardestPanel<T> p_;
};
