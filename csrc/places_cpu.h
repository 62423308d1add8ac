// Where numbers stand among a few sorted ones. Each vector of them is compared with every sorted number where these are
// few, else with some of them, and bisection does the rest. Included per instruction set.

// places[j]: how many of the sorted numbers are below sign · values[j] - shift, without `below` those level with it too.
template <class T, bool below>
void places_among(const T* sorted, int64_t count, const T* values, int64_t columns, T sign, T shift, int32_t* places) {
  constexpr int64_t kFew = 32;
  int64_t stride = 1;
  while (count / stride > kFew) stride *= 2;
  const int64_t pivots = count / stride;
  for (int64_t j = 0; j < columns; j += kWidth<T>) {
    const int64_t lanes = columns - j < kWidth<T> ? columns - j : kWidth<T>;
    const Vec<T> v = load_part(values + j, lanes) * sign - shift;
    MaskVec<T> found{};
    for (int64_t k = 0; k < pivots; ++k) {
      const T pivot = sorted[stride * (k + 1) - 1];
      found -= below ? MaskVec<T>(pivot < v) : MaskVec<T>(pivot <= v);
    }
    if (stride == 1) {
      for (int64_t l = 0; l < lanes; ++l) places[j + l] = int32_t(found[l]);
      continue;
    }
    for (int64_t l = 0; l < lanes; ++l) {
      const T value = v[l];
      int64_t at = stride * int64_t(found[l]);
      for (int64_t half = stride / 2; half > 0; half /= 2) {
        const int64_t next = at + half;
        at += next <= count && (below ? sorted[next - 1] < value : sorted[next - 1] <= value) ? half : 0;
      }
      places[j + l] = int32_t(at);
    }
  }
}
