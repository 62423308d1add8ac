// Σ_k log( Σ_{j as far as k or farther} e^{l_j} ) - l_k of each row, l = -scale s, and its slopes: running sums over the
// columns from the farthest to the nearest. Sorted targets lie on both sides of a row's own one, so that its order is a
// merge of two sorted lists, not a sort. The twin of OrderedLogSums in losses/contrast/rank_n_contrast.py.
// Included per instruction set.

// Sum of log v, v normal: exponents and mantissas apart, a logarithm only where the product of these grows large.
FP_INLINE double sum_of_logs(const double* v, int64_t count) {
  using C = ExpConstants<double>;
  constexpr int kFactors = 512;  // below 2 each
  constexpr int64_t mantissa = (int64_t(1) << C::mantissa) - 1, one = int64_t(C::bias) << C::mantissa;
  double total = 0;
  int64_t exponents = 0;
  for (int64_t first = 0; first < count; first += kFactors * kWidth<double>) {
    const int64_t end = std::min(count, first + kFactors * kWidth<double>);
    Vec<double> product = broadcast(1.0);
    MaskVec<double> powers{};
    int64_t k = first;
    for (; k + kWidth<double> <= end; k += kWidth<double>) {
      const MaskVec<double> bits = vec_to_bits<double>(load(v + k));
      powers += (bits >> C::mantissa) - C::bias;
      product *= bits_to_vec<double>((bits & mantissa) | one);
    }
    for (int l = 0; l < kWidth<double>; ++l) total += std::log(product[l]), exponents += powers[l];
    for (; k < end; ++k) total += std::log(v[k]);
  }
  return total + double(exponents) * 0.693147180559945309417;
}

inline double log_add_exp(double a, double b) {
  if (a == b) return a + 0.693147180559945309417;  // infinities too
  return std::max(a, b) + std::log1p(std::exp(-std::abs(a - b)));
}

template <class T, class Target>
class OrderedLogSums {
 public:
  explicit OrderedLogSums(const OrderedPanel<T>& p)
      : panel_(p.panel),
        scale_(p.scale),
        own_(static_cast<const Target*>(p.own)),
        targets_(static_cast<const Target*>(p.targets)),
        order_(p.panel.columns),
        row_totals_(2 * p.panel.rows) {
    for (int64_t k = 0; k < panel_.columns; ++k) order_[k] = int32_t(p.order[k]);
  }

  PanelTotal run() {
    const int64_t tasks = std::min<int64_t>(panel_.rows, panel_.threads);
    if (tasks == 0) return {0, 0};
    parallel_tasks(panel_.parallel, tasks, [&](int64_t task) {
      Scratch scratch(round_up(panel_.columns, kWidth<float>));
      for (int64_t i = task * panel_.rows / tasks; i < (task + 1) * panel_.rows / tasks; ++i) row(i, scratch);
    });
    PanelTotal total{0, 0};
    for (int64_t i = 0; i < panel_.rows; ++i)
      total.value += row_totals_[2 * i], total.of_scale += row_totals_[2 * i + 1];
    return total;
  }

 private:
  // By column: e; by place in the order: index, distance, sums, shares.
  struct Scratch {
    explicit Scratch(int64_t n) : index(n), distance(n), e(n), sums(n), shares(n) {}
    Buffer<int32_t> index;
    Buffer<Target> distance;
    Buffer<T> e;
    Buffer<double> sums, shares;
  };

  // How far the logarithms of a row may lie apart, so that no sum of exponentials vanishes.
  static constexpr double kSpread = sizeof(T) == 4 ? 80 : 700;

  void row(int64_t i, Scratch& at) {
    const T* s = panel_.s + i * panel_.columns;
    T* of_s = panel_.of_s ? panel_.of_s + i * panel_.columns : nullptr;
    const int64_t out = panel_.left_out[i], count = merge(i, at);
    double *total = &row_totals_[2 * i], *of_scale = total + 1, logits = 0;
    *total = *of_scale = 0;
    T low = INFINITY, top = -INFINITY;
    // Rounded once, so that the same numbers are summed everywhere.
    for (int64_t j = 0; j < panel_.columns; j += kWidth<T>)
      store(at.e.get() + j, -scale_ * load_part(s + j, panel_.columns - j));
    for (int64_t k = 0; k < count; ++k) {
      const T l = at.e[at.index[k]];
      logits += double(l), low = l < low ? l : low, top = l > top ? l : top;
    }
    if (of_s && out >= 0) of_s[out] = 0;
    if (count == 0) return;
    if (std::isfinite(logits) && double(top) - double(low) <= kSpread)
      *total = sums(top, count, at) + double(count) * double(top) - logits;
    else
      *total = log_sums(count, at) - logits;
    if (!of_s) return;
    for (int64_t k = 0; k < count; ++k) {
      const int32_t j = at.index[k];
      const double slope = double(at.e[j]) * at.shares[k] - 1;
      of_s[j] = T(-double(scale_) * slope), *of_scale -= slope * double(s[j]);
    }
  }

  // Index and distance of the columns of row i, farthest first; how many they are.
  int64_t merge(int64_t i, const Scratch& at) const {
    const Target own = own_[i];
    const int64_t out = panel_.left_out[i];
    int64_t low = 0, high = panel_.columns - 1, count = 0;
    if (high < 0) return 0;
    Target below = std::abs(own - targets_[low]), above = std::abs(targets_[high] - own);
    while (low < high) {
      // Both that may come next are read before it is known which one does.
      const Target next_below = std::abs(own - targets_[low + 1]), next_above = std::abs(targets_[high - 1] - own);
      const bool is_below = below >= above;
      const int32_t j = order_[is_below ? low : high];
      at.index[count] = j, at.distance[count] = is_below ? below : above;
      below = is_below ? next_below : below, above = is_below ? above : next_above;
      low += is_below, high -= !is_below, count += j != out;
    }
    at.index[count] = order_[low], at.distance[count] = below;
    return count + (order_[low] != out);
  }

  // Σ_k log C_k of the logarithms in `e`; leaves e = e^{l - top} by column and Σ_{k as near or nearer} 1 / C_k by place.
  double sums(T top, int64_t count, const Scratch& at) const {
    for (int64_t j = 0; j < panel_.columns; j += kWidth<T>)
      store(at.e.get() + j, exp_lanes<T>(load(at.e.get() + j) - top));
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) at.sums[k] = sum += double(at.e[at.index[k]]);
    const bool ties = share_from_the_end(at.sums.get(), count, at);
    const double total = sum_of_logs(at.sums.get(), count);
    if (!panel_.of_s) return total;
    for (int64_t k = 0; k < count; ++k) at.shares[k] = 1 / at.sums[k];
    sum = 0;
    for (int64_t k = count - 1; k >= 0; --k) at.shares[k] = sum += at.shares[k];
    if (ties) share_from_the_start(at.shares.get(), count, at);
    return total;
  }

  // The same of any logarithms, two libm calls each; here e = 1 and the shares are Σ e^l / C, per pair.
  double log_sums(int64_t count, const Scratch& at) const {
    double sum = -INFINITY, total = 0;
    for (int64_t k = 0; k < count; ++k) at.sums[k] = sum = log_add_exp(sum, double(at.e[at.index[k]]));
    share_from_the_end(at.sums.get(), count, at);
    for (int64_t k = 0; k < count; ++k) total += at.sums[k];
    if (!panel_.of_s) return total;
    sum = -INFINITY;
    for (int64_t k = count - 1; k >= 0; --k) at.shares[k] = sum = log_add_exp(sum, -at.sums[k]);
    share_from_the_start(at.shares.get(), count, at);
    for (int64_t k = 0; k < count; ++k) {
      const int32_t j = at.index[k];
      at.shares[k] = std::exp(double(at.e[j]) + at.shares[k]), at.e[j] = 1;
    }
    return total;
  }

  // Columns at one distance have the value of the last of them; whether there are any.
  static bool share_from_the_end(double* values, int64_t count, const Scratch& at) {
    bool ties = false;
    for (int64_t k = count - 2; k >= 0; --k)
      if (at.distance[k] == at.distance[k + 1]) values[k] = values[k + 1], ties = true;
    return ties;
  }

  static void share_from_the_start(double* values, int64_t count, const Scratch& at) {
    for (int64_t k = 1; k < count; ++k)
      if (at.distance[k] == at.distance[k - 1]) values[k] = values[k - 1];
  }

  SPanel<T> panel_;
  T scale_;
  const Target *own_, *targets_;
  Buffer<int32_t> order_;
  Buffer<double> row_totals_;
};
