// Σ_h v_h tanh(p_hi + q_hj) of every pair, and what cotangents of it say of p, q and v: a hidden unit's tanh is made where
// it is used, twice, and stored nowhere. The twin of PairGate in losses/contrast/ada_meow.py. Included per instruction set.

template <class T>
class PairGate {
 public:
  explicit PairGate(const PairGatePanel<T>& p) : p_(p) {}

  void run() const { p_.cotangent ? slopes() : values(); }

 private:
  void values() const {
    by_rows([&](int64_t, int64_t i) {
      T* to = p_.values + i * p_.columns;
      for (int64_t j = 0; j < p_.columns; j += kWidth<T>) {
        Vec<T> sum{};
        for (int64_t h = 0; h < p_.units; ++h) sum += p_.v[h] * unit(h, i, j);
        store_part(to + j, sum, p_.columns - j);
      }
    });
  }

  void slopes() const {
    const int64_t tasks = count(), width = round_up(p_.columns, kWidth<T>);
    Buffer<T> of_q(tasks * p_.units * width);
    Buffer<double> of_v(tasks * p_.units);
    of_q.zero(tasks * p_.units * width), of_v.zero(tasks * p_.units);
    by_rows([&](int64_t task, int64_t i) {
      const T* cotangent = p_.cotangent + i * p_.columns;
      for (int64_t h = 0; h < p_.units; ++h) {
        T* columns = of_q.get() + (task * p_.units + h) * width;
        Vec<T> row{}, weight{};
        for (int64_t j = 0; j < p_.columns; j += kWidth<T>) {
          const Vec<T> t = unit(h, i, j), c = load_part(cotangent + j, p_.columns - j), slope = c * (T(1) - t * t);
          store(columns + j, load(columns + j) + slope);
          row += slope, weight += c * t;
        }
        p_.of_p[h * p_.rows + i] = p_.v[h] * sum_lanes<T>(row);
        of_v[task * p_.units + h] += double(sum_lanes<T>(weight));
      }
    });
    for (int64_t h = 0; h < p_.units; ++h) {
      double weight = 0;
      for (int64_t task = 0; task < tasks; ++task) weight += of_v[task * p_.units + h];
      p_.of_v[h] = T(weight);
      for (int64_t j = 0; j < p_.columns; ++j) {
        T sum = 0;
        for (int64_t task = 0; task < tasks; ++task) sum += of_q[(task * p_.units + h) * width + j];
        p_.of_q[h * p_.columns + j] = p_.v[h] * sum;
      }
    }
  }

  int64_t count() const { return std::min<int64_t>(p_.rows, p_.threads); }

  // work(task, i) of all rows.
  template <class Work>
  void by_rows(const Work& work) const {
    const int64_t tasks = count();
    if (tasks == 0) return;
    parallel_tasks(p_.parallel, tasks, [&](int64_t task) {
      for (int64_t i = task * p_.rows / tasks; i < (task + 1) * p_.rows / tasks; ++i) work(task, i);
    });
  }

  // tanh of unit h and row i for the columns from j on: (1 - e^{-2|x|}) / (1 + e^{-2|x|}), signed.
  FP_INLINE Vec<T> unit(int64_t h, int64_t i, int64_t j) const {
    const Vec<T> x = load_part(p_.q + h * p_.columns + j, p_.columns - j) + p_.p[h * p_.rows + i];
    const Vec<T> u = exp_lanes<T>(T(-2) * (x < 0 ? -x : x)), size = (T(1) - u) / (T(1) + u);
    return x < 0 ? -size : size;
  }

  PairGatePanel<T> p_;
};
