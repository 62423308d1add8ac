// A function of similarities that is known at even knots, summed over a panel: the cubic through values and slopes
// (Hermite), whose slope is taken from the quintic through the slopes. The twin of Interpolated in
// losses/contrast/mann_whitney.py. Included per instruction set.

template <class T>
class Tabulated {
 public:
  explicit Tabulated(const TabulatedPanel<T>& p) : p_(p), step_(2.0 / double(p.knots - 2 * p.margin - 1)) {}

  double run() {
    const SPanel<T>& panel = p_.panel;
    // The moments of all tasks take no more memory than the panel.
    const int64_t most = panel.rows * panel.columns / (2 * kMoments * p_.knots);
    const int64_t tasks = std::max<int64_t>(1, std::min({panel.rows, int64_t(panel.threads), most}));
    if (panel.of_s) expand();
    moments_.allocate(tasks * kMoments * p_.knots);
    parallel_tasks(panel.parallel, tasks, [&](int64_t task) {
      double* moments = moments_.get() + task * kMoments * p_.knots;
      memset(moments, 0, kMoments * p_.knots * sizeof(double));
      for (int64_t i = task * panel.rows / tasks; i < (task + 1) * panel.rows / tasks; ++i) row(i, moments);
    });
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t k = 0; k < kMoments * p_.knots; ++k) moments_[k] += moments_[task * kMoments * p_.knots + k];
    return settle();
  }

 private:
  static constexpr int kMoments = 4, kPoints = 6, kStride = 8;  // a knot's polynomial is one cache line at most

  // Adds t^0 .. t^3 of every pair to its knot: value and both gradients are linear in these.
  void row(int64_t i, double* moments) const {
    const SPanel<T>& panel = p_.panel;
    const T* s = panel.s + i * panel.columns;
    T* of_s = panel.of_s ? panel.of_s + i * panel.columns : nullptr;
    const int64_t out = panel.left_out ? panel.left_out[i] : -1;
    if (out >= 0) {
      if (of_s) of_s[out] = 0;
      part(s, of_s, 0, out, moments), part(s, of_s, out + 1, panel.columns, moments);
    } else {
      part(s, of_s, 0, panel.columns, moments);
    }
  }

  FP_INLINE void part(const T* s, T* of_s, int64_t first, int64_t end, double* moments) const {
    const double low = double(p_.margin - 1), high = double(p_.knots - p_.margin - 1), per_step = 1 / step_;
    for (int64_t j = first; j < end; ++j) {
      const double position = (double(s[j]) + 1) * per_step + double(p_.margin);
      // NaN: the first knot, and a NaN for t.
      const int64_t left = int64_t(position > low ? (position < high ? position : high) : low);
      const double t = position - double(left), square = t * t;
      double* to = moments + kMoments * left;
      to[0] += 1, to[1] += t, to[2] += square, to[3] += square * t;
      if (!of_s) continue;
      const T* c = polynomials_.get() + kStride * left;
      const T u = T(t);
      of_s[j] = ((((c[5] * u + c[4]) * u + c[3]) * u + c[2]) * u + c[1]) * u + c[0];
    }
  }

  double settle() const {
    double total = 0;
    for (int64_t k = 0; k < p_.knots; ++k) p_.of_values[k] = p_.of_slopes[k] = 0;
    for (int64_t k = p_.margin - 1; k < p_.knots - p_.margin; ++k) {
      const double* m = moments_.get() + kMoments * k;
      const double right = 3 * m[2] - 2 * m[3], left = m[0] - right;
      const double out = step_ * (m[1] - 2 * m[2] + m[3]), in = step_ * (m[3] - m[2]);
      p_.of_values[k] += T(left), p_.of_values[k + 1] += T(right);
      p_.of_slopes[k] += T(out), p_.of_slopes[k + 1] += T(in);
      total += left * double(p_.values[k]) + right * double(p_.values[k + 1]);
      total += out * double(p_.slopes[k]) + in * double(p_.slopes[k + 1]);
    }
    return total;
  }

  // Coefficients in t of the quintic through the slopes at -2 .. 3 from each knot, by divided differences.
  void expand() {
    polynomials_.allocate(kStride * p_.knots);
    for (int64_t k = p_.margin - 1; k < p_.knots - p_.margin; ++k) {
      double newton[kPoints], c[kPoints] = {};
      for (int a = 0; a < kPoints; ++a) newton[a] = double(p_.slopes[k - 2 + a]);
      for (int order = 1; order < kPoints; ++order)
        for (int a = kPoints - 1; a >= order; --a) newton[a] = (newton[a] - newton[a - 1]) / order;
      // Horner over the nodes: c = c (t - node) + newton.
      for (int a = kPoints - 1; a >= 0; --a) {
        for (int power = kPoints - 1; power > 0; --power) c[power] = c[power - 1] - (a - 2) * c[power];
        c[0] = newton[a] - (a - 2) * c[0];
      }
      for (int power = 0; power < kPoints; ++power) polynomials_[kStride * k + power] = T(c[power]);
    }
  }

  TabulatedPanel<T> p_;
  double step_;
  Buffer<T> polynomials_;
  Buffer<double> moments_;
};
