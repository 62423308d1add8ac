// The k most extreme similarities of each row. Included per instruction set.
//
// Each row keeps its k best as (key, column) with key = s or -s, NaN above all, ties to the lower column of the input.
// A vector comparison with the worst of them picks the few entries that are looked at one by one.

template <class T>
class Extremes {
 public:
  explicit Extremes(Walk<T>& walk) : walk_(walk), problem_(walk.problem()) {
    count_ = int(problem_.extremes.size());
    found_ = new Found[count_];
    threads_ = new RowBuffers<T>[walk.threads()];
    for (int e = 0; e < count_; ++e) {
      const Extreme<T>& extreme = problem_.extremes[e];
      Found& found = found_[e];
      found.term.mask = extreme.mask;
      found.term.has_above = extreme.has_above, found.term.has_below = extreme.has_below;
      found.term.above = extreme.above, found.term.below = extreme.below;
      found.term.axis = Axis::rows, found.term.reduction = Reduction::sum, found.term.score = Score::identity;
      found.term.combine = Combine::add;
      found.term.scale.number = 1;
      found.data.gather(found.term, walk);
      found.k = extreme.k, found.largest = extreme.largest;
      const int64_t rows = walk.rows().count;
      found.filled.allocate(rows + 1), found.filled.zero(rows + 1);
      found.keys.allocate(rows * found.k + 1), found.columns.allocate(rows * found.k + 1);
      found.values.allocate(rows * found.k + 1);
      found.worst.allocate(walk.rows().padded() + kTile);
      for (int64_t p = 0; p < walk.rows().padded() + kTile; ++p) found.worst[p] = T(-INFINITY);
    }
  }
  ~Extremes() { delete[] found_, delete[] threads_; }
  Extremes(const Extremes&) = delete;

  // values, indices: (B, k) of each extreme.
  void run(T* const* values, int64_t* const* indices) {
    walk_.tiles(
        [&](const Tile<T>& tile) {
          for (int e = 0; e < count_; ++e)
            if (walk_.coverage(found_[e].term.mask, tile) != Coverage::empty) return true;
          return false;
        },
        [&](Tile<T>& tile, int thread) {
          walk_.distances(tile, thread);
          for (int e = 0; e < count_; ++e) body(tile, found_[e], threads_[thread]);
        });
    for (int e = 0; e < count_; ++e) {
      const Found& found = found_[e];
      for (int64_t p = 0; p < walk_.rows().count; ++p) {
        const int64_t to = walk_.rows().index[p] * found.k;
        for (int q = 0; q < found.k; ++q) {
          const bool there = q < found.filled[p];
          indices[e][to + q] = there ? found.columns[p * found.k + q] : -1;
          values[e][to + q] = there ? found.values[p * found.k + q] : T(found.largest ? -INFINITY : INFINITY);
        }
      }
    }
  }

 private:
  struct Found {
    Term<T> term{};
    TermData<T> data;
    int k = 1;
    bool largest = true;
    Buffer<int> filled;       // per row
    Buffer<T> keys, values;   // (B, k), best first
    Buffer<int64_t> columns;  // of the input
    Buffer<T> worst;          // key that a candidate has to reach
  };

  void body(const Tile<T>& tile, Found& found, RowBuffers<T>& buffers) {
    const Coverage coverage = walk_.coverage(found.term.mask, tile);
    if (coverage == Coverage::empty) return;
    const bool masked = needs_base(walk_, tile, coverage);
    const int n = whole<T>(tile.columns);
    const bool mirrored = walk_.symmetric() && !tile.diagonal;
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.i0 + r;
      const T* s = tile.s + r * kTile;
      memset(buffers.built, 0, sizeof buffers.built);
      const Lane<T>* base = masked ? base_lanes(walk_, tile, r, found.term.mask, buffers) : nullptr;
      bool any = true;
      const Lane<T>* keep =
          keep_lanes_of<T, true>(found.data, base, s, nullptr, n, row, tile.j0, buffers.keep_row, any);
      if (any) candidates<true>(tile, found, s, keep, row, n);
      if (!mirrored) continue;
      keep = keep_lanes_of<T, false>(found.data, base, s, nullptr, n, row, tile.j0, buffers.keep_column, any);
      if (any) candidates<false>(tile, found, s, keep, row, n);
    }
  }

  // Entries of a row that may be among the k best of the row (or of their column).
  template <bool TO_ROW>
  void candidates(const Tile<T>& tile, Found& found, const T* s, const Lane<T>* keep, int64_t row, int n) {
    const Vec<T> sign = broadcast(found.largest ? T(1) : T(-1));
    for (int j = 0; j < n; j += kWidth<T>) {
      const Vec<T> bar = TO_ROW ? broadcast(found.worst[row]) : load(found.worst.get() + tile.j0 + j);
      MaskVec<T> lanes = ~MaskVec<T>(sign * load(s + j) < bar);  // NaN passes
      if (keep) lanes &= load_mask<T>(keep + j);
      if (!any_lane<T>(lanes)) continue;
      for (int l = 0; l < kWidth<T>; ++l)
        if (lanes[l]) {
          const int64_t column = tile.j0 + j + l;
          if (TO_ROW)
            insert(found, row, s[j + l], walk_.columns().index[column]);
          else
            insert(found, column, s[j + l], walk_.rows().index[row]);
        }
    }
  }

  static bool ahead(T key, int64_t column, T other_key, int64_t other_column) {
    return key > other_key || (key == other_key && column < other_column);
  }

  static void insert(Found& found, int64_t row, T value, int64_t column) {
    // A NaN is an infinite key, as in the reference.
    const T key = value != value ? T(INFINITY) : found.largest ? value : -value;
    const int64_t at = row * found.k;
    int filled = found.filled[row];
    if (filled == found.k) {
      if (!ahead(key, column, found.keys[at + filled - 1], found.columns[at + filled - 1])) return;
      --filled;
    }
    int q = filled;
    for (; q > 0 && ahead(key, column, found.keys[at + q - 1], found.columns[at + q - 1]); --q) {
      found.keys[at + q] = found.keys[at + q - 1];
      found.columns[at + q] = found.columns[at + q - 1];
      found.values[at + q] = found.values[at + q - 1];
    }
    found.keys[at + q] = key, found.columns[at + q] = column, found.values[at + q] = value;
    found.filled[row] = ++filled;
    if (filled == found.k) found.worst[row] = found.keys[at + filled - 1];
  }

  Walk<T>& walk_;
  const Problem<T>& problem_;
  Found* found_ = nullptr;
  RowBuffers<T>* threads_ = nullptr;
  int count_ = 0;
};
