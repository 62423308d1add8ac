// R_p = Σ_j step(scale (sign · s_j - point_p)) over some columns of each row, and what cotangents of R say of s and the
// points. The columns stand together and are taken a block at a time, so that they stay in the nearest cache while
// all points pass. The twin of soft_ranks in losses/ranks.py. Included per instruction set.

template <class T, Step step>
FP_INLINE Vec<T> step_of(Vec<T> z) {
  if constexpr (step == Step::hinge) return VectorMath<T>::positive_part(z);
  if constexpr (step == Step::softplus) return VectorMath<T>::softplus_logistic(z).value;
  const Vec<T> u = exp_lanes<T>(z < 0 ? z : -z), inverse = T(1) / (u + T(1));
  return z < 0 ? u * inverse : inverse;
}

template <class T, Step step>
FP_INLINE Vec<T> step_slope(Vec<T> z) {
  if constexpr (step == Step::hinge) return VectorMath<T>::positive_step(z);
  const Vec<T> u = exp_lanes<T>(z < 0 ? z : -z), inverse = T(1) / (u + T(1));
  if constexpr (step == Step::softplus) return z < 0 ? u * inverse : inverse;
  return u * inverse * inverse;
}

template <class T>
class SoftRanks {
 public:
  explicit SoftRanks(const SoftRanksPanel<T>& p) : p_(p) {}

  void run() {
    if (p_.step == Step::sigmoid) rows<Step::sigmoid>();
    if (p_.step == Step::softplus) rows<Step::softplus>();
    if (p_.step == Step::hinge) rows<Step::hinge>();
  }

 private:
  static constexpr int64_t kBlock = 32 * kWidth<T>;  // summed in T; the sums of blocks are added in double

  struct Scratch {
    explicit Scratch(const SoftRanksPanel<T>& p)
        : values(round_up(p.panel.columns, kWidth<T>)), slopes(round_up(p.panel.columns, kWidth<T>)), sums(p.places) {}
    Buffer<T> values, slopes;
    Buffer<double> sums;
  };

  template <Step step>
  void rows() {
    const int64_t rows = p_.panel.rows, tasks = std::min<int64_t>(rows, p_.threads);
    if (tasks == 0) return;
    parallel_tasks(p_.parallel, tasks, [&](int64_t task) {
      Scratch at(p_);
      for (int64_t i = task * rows / tasks; i < (task + 1) * rows / tasks; ++i) row<step>(i, at);
    });
  }

  template <Step step>
  void row(int64_t i, Scratch& at) const {
    const T *s = p_.panel.row(i), *points = p_.points + i * p_.places;
    const T* cotangent = p_.cotangent ? p_.cotangent + i * p_.places : nullptr;
    const Ranges ranges = p_.panel.of(p_.mask, i);
    int64_t count = 0;
    for (const Range& range : ranges)
      for (int64_t j = range.first; j < range.end; ++j) at.values[count++] = p_.sign * s[j];
    const int64_t padded = round_up(count, kWidth<T>);
    for (int64_t k = count; k < padded; ++k) at.values[k] = -INFINITY;  // whose step is 0
    for (int64_t k = 0; k < p_.places; ++k) at.sums[k] = 0;
    if (cotangent) at.slopes.zero(padded);
    for (int64_t first = 0; first < padded; first += kBlock) {
      const int64_t end = std::min(padded, first + kBlock);
      for (int64_t k = 0; k < p_.places; ++k) {
        Vec<T> sum{};
        for (int64_t j = first; j < end; j += kWidth<T>) {
          const Vec<T> z = (load(at.values.get() + j) - points[k]) * p_.scale;
          if (cotangent) {
            const Vec<T> slope = step_slope<T, step>(z);
            store(at.slopes.get() + j, load(at.slopes.get() + j) + slope * cotangent[k]), sum += slope;
          } else {
            sum += step_of<T, step>(z);
          }
        }
        at.sums[k] += double(sum_lanes<T>(sum));
      }
    }
    for (int64_t k = 0; k < p_.places; ++k) {
      if (cotangent)
        p_.of_points[i * p_.places + k] = T(-double(p_.scale) * at.sums[k] * double(cotangent[k]));
      else
        p_.ranks[i * p_.places + k] = T(at.sums[k]);
    }
    if (!cotangent) return;
    T* of_s = p_.of_s + i * p_.panel.columns;
    memset(of_s, 0, p_.panel.columns * sizeof(T));
    int64_t k = 0;
    for (const Range& range : ranges)
      for (int64_t j = range.first; j < range.end; ++j) of_s[j] = p_.sign * p_.scale * at.slopes[k++];
  }

  SoftRanksPanel<T> p_;
};
