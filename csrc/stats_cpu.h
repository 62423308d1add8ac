// First pass: the statistics of every term. Included per instruction set.

// A sum of exponentials below this may have lost terms to underflow: it is then taken again with its own shift.
template <class T>
constexpr T kTinySum = sizeof(T) == 4 ? T(1e-20) : T(1e-250);

// Rows whose column sums are added in the precision of the numbers.
constexpr int kFlush = 32;

template <class T>
class Stats {
 public:
  Stats(Walk<T>& walk) : walk_(walk), problem_(walk.problem()) {
    count_ = int(problem_.terms.size());
    data_ = new TermData<T>[count_];
    for (int t = 0; t < count_; ++t) {
      data_[t].gather(problem_.terms[t], walk);
      const int width = reduction_state(problem_.terms[t].reduction);
      data_[t].state.allocate(data_[t].owner->count * width + 1);
      for (int64_t p = 0; p < data_[t].owner->count; ++p)
        state_init(problem_.terms[t].reduction, data_[t].state.get() + p * width);
    }
    items_ = make_items(walk, data_, count_, item_count_);
    threads_ = new ThreadState[walk.threads()];
    for (int t = 0; t < walk.threads(); ++t)
      threads_[t].shift.allocate(item_count_ + 1), threads_[t].reset(item_count_);
  }
  ~Stats() { delete[] data_, delete[] items_, delete[] threads_; }
  Stats(const Stats&) = delete;

  void run(T* rows, T* columns) {
    walk_.tiles([&](const Tile<T>& tile) { return wanted_tile(walk_, items_, item_count_, tile); },
                [&](Tile<T>& tile, int thread) {
                  walk_.distances(tile, thread);
                  body(tile, threads_[thread]);
                });
    for (int t = 0; t < count_; ++t) {
      const Term<T>& term = problem_.terms[t];
      const Side<T>& owner = *data_[t].owner;
      T* out = (term.axis == Axis::rows ? rows : columns) + term.slot * owner.count;
      const int width = reduction_state(term.reduction);
      for (int64_t p = 0; p < owner.count; ++p) {
        double* state = data_[t].state.get() + p * width;
        if (data_[t].late_offset) state[0] += double(data_[t].late_offset.data[p]);
        state_finish(term.reduction, state, out + owner.index[p], owner.count);
      }
    }
  }

 private:
  struct ThreadState {
    RowBuffers<T> buffers;
    alignas(64) T sums[5][kTile];         // per column, of a few rows
    alignas(64) double totals[3][kTile];  // of all rows so far
    alignas(64) Lane<T> kept[kTile];      // columns with a kept entry
    bool again[kTile];                    // columns whose sum is too small
    Buffer<T> shift;                      // per item, see `sticky`
    void reset(int items) {
      for (int k = 0; k < items; ++k) shift[k] = T(-INFINITY);
    }
    void clear(int vectors, int n) {
      for (int k = 0; k < vectors; ++k) {
        memset(sums[k], 0, n * sizeof(T));
        memset(totals[k], 0, n * sizeof(double));
      }
    }
    // Sums of many rows lose digits one by one; every kFlush rows they go to double precision.
    void flush(int vectors, int n, int row, int rows) {
      if ((row + 1) % kFlush != 0 && row + 1 != rows) return;
      for (int k = 0; k < vectors; ++k)
        for (int j = 0; j < n; ++j) totals[k][j] += double(sums[k][j]), sums[k][j] = 0;
    }
    // A shift that stays over many tiles, so that most partial sums are added without rescaling.
    T sticky(int item, T bound) {
      T& last = shift[item];
      if (!(bound <= last && bound > last - T(10))) last = bound - bound == 0 ? std::ceil(bound / 4) * 4 : bound;
      return last;
    }
  };

  void body(const Tile<T>& tile, ThreadState& thread) {
    for (int k = 0; k < item_count_; ++k) {
      const Item<T>& item = items_[k];
      const Coverage coverage = walk_.coverage(item.any()->term->mask, tile);
      if (coverage == Coverage::empty) continue;
      const bool masked = needs_base(walk_, tile, coverage);
      TermData<T>* to_row = item.to_row;
      TermData<T>* to_column = tile.diagonal ? nullptr : item.to_column;
      if (to_row && outside(*to_row, tile, true)) to_row = nullptr;
      if (to_column && outside(*to_column, tile, false)) to_column = nullptr;
      if (!to_row && !to_column) continue;
      if (item.any()->uniform() && item.any()->term->reduction == Reduction::logsumexp) {
        shared_logsumexp(tile, to_row, to_column, masked, k, thread);
        continue;
      }
      if (item.any()->uniform() && item.any()->term->reduction == Reduction::max && !thresholds(to_row, to_column)) {
        shared_max(tile, to_row, to_column, masked, thread);
        continue;
      }
      if (to_row) directed<true>(tile, *to_row, masked, thread);
      if (to_column) directed<false>(tile, *to_column, masked, thread);
    }
  }

  // Row and column sums from one exponential per pair.
  void shared_logsumexp(const Tile<T>& tile, TermData<T>* to_row, TermData<T>* to_column, bool masked, int item,
                        ThreadState& thread) {
    RowBuffers<T>& buffers = thread.buffers;
    TermData<T>& any = to_row ? *to_row : *to_column;
    const int n = whole<T>(tile.columns);
    const bool identity = any.term->score == Score::identity;
    const Bounds<T> kept = kept_range(walk_, tile, any, masked, buffers);
    if (kept.low > kept.high) return;  // no pair
    const T shift = thread.sticky(item, score_bound(any, tile, true, kept.low, kept.high));
    const bool ragged = masked || thresholds(to_row, to_column);
    if (to_column) thread.clear(1, n), memset(thread.kept, 0, n * sizeof(Lane<T>));
    for (int r = 0; r < tile.rows; ++r) {
      if (to_column && r > 0) thread.flush(1, n, r - 1, tile.rows);
      const T* s = tile.s + r * kTile;
      memset(buffers.built, 0, sizeof buffers.built);
      const Lane<T>* base = masked ? base_lanes(walk_, tile, r, any.term->mask, buffers) : nullptr;
      bool row_any = to_row != nullptr, column_any = to_column != nullptr;
      const Lane<T>* keep_row = base;
      const Lane<T>* keep_column = base;
      if (to_row)
        keep_row =
            keep_lanes_of<T, true>(*to_row, base, s, tile.guide(r), n, tile.i0 + r, tile.j0, buffers.keep_row, row_any);
      if (to_column)
        keep_column = keep_lanes_of<T, false>(*to_column, base, s, tile.guide(r), n, tile.i0 + r, tile.j0,
                                              buffers.keep_column, column_any);
      if (!row_any && !column_any) continue;
      const T* z = s;
      T scale = any.term->scale.number, offset = any.offset_number() - shift;
      if (!identity) {
        score_row<T, true>(any, s, n, tile.i0 + r, tile.j0, buffers, buffers.f, static_cast<T*>(nullptr),
                           static_cast<T*>(nullptr));
        z = buffers.f, scale = 1, offset = -shift;
      }
      T sum;
      if (!ragged)
        sum = to_column ? exp_sums<false, true>(z, scale, offset, n, nullptr, nullptr, thread)
                        : exp_sums<false, false>(z, scale, offset, n, nullptr, nullptr, thread);
      else
        sum = column_any ? exp_sums<true, true>(z, scale, offset, n, keep_row, keep_column, thread)
                         : exp_sums<true, false>(z, scale, offset, n, keep_row, keep_column, thread);
      if (!row_any) continue;
      double* state = to_row->state.get() + (tile.i0 + r) * 2;
      if (sum >= kTinySum<T>)
        merge_softmax(state, double(shift), double(sum));
      else
        exact_row(*to_row, tile, r, keep_row, buffers, state);
    }
    if (!to_column) return;
    thread.flush(1, n, tile.rows - 1, tile.rows);
    finish_columns(*to_column, tile, shift, masked, thread);
  }

  // Sum over the row; with COLUMNS also into thread.sums[0].
  template <bool MASKED, bool COLUMNS>
  FP_INLINE T exp_sums(const T* z, T scale, T offset, int n, const Lane<T>* keep_row, const Lane<T>* keep_column,
                       ThreadState& thread) {
    Vec<T> sum{};
    for (int j = 0; j < n; j += kWidth<T>) {
      const Vec<T> e = exp_lanes<T>(scale * load(z + j) + offset);
      sum += MASKED && keep_row ? keep_lanes<T>(load_mask<T>(keep_row + j), e) : e;
      if (COLUMNS) {
        T* column = thread.sums[0] + j;
        if (MASKED && keep_column) {
          const MaskVec<T> keep = load_mask<T>(keep_column + j);
          store(column, load(column) + keep_lanes<T>(keep, e));
          store_mask<T>(thread.kept + j, load_mask<T>(thread.kept + j) | keep);
        } else {
          store(column, load(column) + e);
          if (MASKED) store_mask<T>(thread.kept + j, all_lanes<T>());
        }
      }
    }
    return sum_lanes<T>(sum);
  }

  // Row and column maxima from one score per pair.
  void shared_max(const Tile<T>& tile, TermData<T>* to_row, TermData<T>* to_column, bool masked, ThreadState& thread) {
    RowBuffers<T>& buffers = thread.buffers;
    TermData<T>& any = to_row ? *to_row : *to_column;
    const int n = whole<T>(tile.columns);
    const bool identity = any.term->score == Score::identity;
    T* highest = thread.sums[4];
    for (int j = 0; j < n; ++j) highest[j] = T(-INFINITY);
    for (int r = 0; r < tile.rows; ++r) {
      const T* s = tile.s + r * kTile;
      memset(buffers.built, 0, sizeof buffers.built);
      const Lane<T>* keep = masked ? base_lanes(walk_, tile, r, any.term->mask, buffers) : nullptr;
      const T* z = s;
      T scale = any.term->scale.number, offset = any.offset_number();
      if (!identity) {
        score_row<T, true>(any, s, n, tile.i0 + r, tile.j0, buffers, buffers.f, static_cast<T*>(nullptr),
                           static_cast<T*>(nullptr));
        z = buffers.f, scale = 1, offset = 0;
      }
      const T top =
          keep ? max_of<true>(z, scale, offset, n, keep, highest) : max_of<false>(z, scale, offset, n, keep, highest);
      if (!to_row) continue;
      const double other[1] = {double(top)};
      state_merge(Reduction::max, to_row->state.get() + tile.i0 + r, other);
    }
    if (!to_column) return;
    for (int j = 0; j < tile.columns; ++j) {
      const double other[1] = {double(highest[j])};
      state_merge(Reduction::max, to_column->state.get() + tile.j0 + j, other);
    }
  }

  // Of the row, and into `highest` of each column; a NaN replaces the largest and then stays.
  template <bool MASKED>
  static FP_INLINE T max_of(const T* z, T scale, T offset, int n, const Lane<T>* keep, T* highest) {
    Vec<T> top = broadcast(T(-INFINITY));
    MaskVec<T> bad{};
    for (int j = 0; j < n; j += kWidth<T>) {
      Vec<T> v = scale * load(z + j) + offset;
      if (MASKED) v = load_mask<T>(keep + j) ? v : broadcast(T(-INFINITY));
      const Vec<T> high = load(highest + j);
      top = v > top ? v : top;
      bad |= MaskVec<T>(v != v);
      store(highest + j, MaskVec<T>(v <= high) | MaskVec<T>(high != high) ? high : v);
    }
    T best = T(-INFINITY);
    for (int l = 0; l < kWidth<T>; ++l)
      if (top[l] > best) best = top[l];
    return any_lane<T>(bad) ? T(NAN) : best;
  }

  static FP_INLINE void merge_softmax(double* state, double shift, double sum) {
    if (state[0] == shift && state[1] != 0) {
      state[1] += sum;
      return;
    }
    const double other[5] = {shift, sum};
    state_merge(Reduction::logsumexp, state, other);
  }

  // One row with its own shift.
  void exact_row(TermData<T>& data, const Tile<T>& tile, int r, const Lane<T>* keep, RowBuffers<T>& buffers,
                 double* state) {
    const int n = whole<T>(tile.columns);
    const T* s = tile.s + r * kTile;
    const bool mean = data.term->reduction == Reduction::softmax_mean;
    score_row<T, true>(data, data.source(s, tile.guide(r)), n, tile.i0 + r, tile.j0, buffers, buffers.f,
                       static_cast<T*>(nullptr), static_cast<T*>(nullptr));
    const T top = kept_max(buffers.f, keep, n);
    if (top == T(-INFINITY)) return;
    exp_affine(buffers.f, T(1), -top, n, buffers.e);
    if (data.weighed()) weigh(buffers.e, tile.guide(r), n);
    const T* weight = data.weight ? data.weight.data.get() + tile.j0 : nullptr;
    double partial[5] = {double(top), double(kept_sum(buffers.e, weight, keep, n)), 0};
    if (mean) {
      const T origin = at_top(buffers.f, s, keep, tile.columns, top);
      for (int j = 0; j < n; j += kWidth<T>) store(buffers.e + j, load(buffers.e + j) * (load(s + j) - origin));
      partial[2] = double(kept_sum(buffers.e, weight, keep, n)), partial[3] = double(origin);
    }
    state_merge(data.term->reduction, state, partial);
  }

  // The s of the largest score.
  static T at_top(const T* f, const T* s, const Lane<T>* keep, int columns, T top) {
    for (int j = 0; j < columns; ++j)
      if (f[j] == top && (!keep || keep[j])) return s[j];
    return T(0);
  }

  // Column sums of exponentials → states. Sums that are too small are taken again with shifts of their own.
  void finish_columns(TermData<T>& data, const Tile<T>& tile, T shift, bool masked, ThreadState& thread) {
    const bool ragged = masked || data.thresholds();
    bool any = false;
    for (int j = 0; j < tile.columns; ++j) {
      thread.again[j] = false;
      if (ragged && !thread.kept[j]) continue;
      const double sum = thread.totals[0][j];
      if (sum >= double(kTinySum<T>))
        merge_softmax(data.state.get() + (tile.j0 + j) * 2, double(shift), sum);
      else
        any = thread.again[j] = true;
    }
    if (any) exact_columns(data, tile, masked, thread);
  }

  // The columns of `again`, each with its largest score as shift.
  void exact_columns(TermData<T>& data, const Tile<T>& tile, bool masked, ThreadState& thread) {
    const int n = whole<T>(tile.columns);
    column_tops(tile, data, masked, thread);
    thread.clear(2, n);
    column_rows(tile, data, masked, thread, 2, [&](const T* s, const T* t, const Lane<T>* keep, int64_t row) {
      column_sums(Reduction::softmax_mean, thread.buffers.f, s, data.weighed() ? t : nullptr, T(0),
                  data.weight ? data.weight.data[row] : T(1), keep, n, thread);
    });
    for (int j = 0; j < tile.columns; ++j)
      if (thread.again[j] && thread.sums[2][j] != T(-INFINITY))
        merge_softmax(data.state.get() + (tile.j0 + j) * 2, double(thread.sums[2][j]), thread.totals[0][j]);
  }

  // Any reduction, one direction.
  template <bool TO_ROW>
  void directed(const Tile<T>& tile, TermData<T>& data, bool masked, ThreadState& thread) {
    RowBuffers<T>& buffers = thread.buffers;
    const Term<T>& term = *data.term;
    const int n = whole<T>(tile.columns), width = reduction_state(term.reduction);
    const bool mean = term.reduction == Reduction::softmax_mean;
    T shift = 0;
    if (!TO_ROW) {
      thread.clear(3, n);
      memset(thread.kept, 0, n * sizeof(Lane<T>));
      if (term.reduction == Reduction::moments || term.reduction == Reduction::max)
        for (int j = 0; j < n; ++j) thread.sums[3][j] = T(INFINITY), thread.sums[4][j] = T(-INFINITY);
      if (term.reduction == Reduction::logsumexp) shift = score_bound(data, tile, false, tile.low, tile.high);
      if (mean) column_tops(tile, data, masked, thread);
    }
    const int summed = term.reduction == Reduction::moments ? 3 : term.reduction == Reduction::max ? 0 : mean ? 2 : 1;
    for (int r = 0; r < tile.rows; ++r) {
      if (!TO_ROW && r > 0) thread.flush(summed, n, r - 1, tile.rows);
      const int64_t row = tile.i0 + r;
      const T *s = tile.s + r * kTile, *t = tile.guide(r);
      memset(buffers.built, 0, sizeof buffers.built);
      const Lane<T>* base = masked ? base_lanes(walk_, tile, r, term.mask, buffers) : nullptr;
      bool any = true;
      const Lane<T>* keep = keep_lanes_of<T, TO_ROW>(data, base, s, t, n, row, tile.j0,
                                                     TO_ROW ? buffers.keep_row : buffers.keep_column, any);
      if (!any) continue;
      double* state = data.state.get() + row * width;  // to row only
      if (TO_ROW && data.softmax()) {
        exact_row(data, tile, r, keep, buffers, state);
        continue;
      }
      const T* f = s;
      if (term.reduction != Reduction::moments) {
        score_row<T, TO_ROW>(data, data.source(s, t), n, row, tile.j0, buffers, buffers.f, static_cast<T*>(nullptr),
                             static_cast<T*>(nullptr));
        f = buffers.f;
        if (data.weighed() && term.reduction == Reduction::sum) weigh(buffers.f, t, n);
      }
      if (TO_ROW) {
        double partial[5] = {0, 0, 0, INFINITY, -INFINITY};
        row_sums(term.reduction, f, data.weight ? data.weight.data.get() + tile.j0 : nullptr, keep, n, tile.columns,
                 partial);
        state_merge(term.reduction, state, partial);
      } else {
        column_sums(term.reduction, f, s, data.weighed() ? t : nullptr, shift,
                    data.weight ? data.weight.data[row] : T(1), keep, n, thread);
      }
    }
    if (TO_ROW) return;
    thread.flush(summed, n, tile.rows - 1, tile.rows);
    if (term.reduction == Reduction::logsumexp) return finish_columns(data, tile, shift, masked, thread);
    for (int j = 0; j < tile.columns; ++j) {
      double partial[5] = {thread.totals[0][j], thread.totals[1][j], thread.totals[2][j], double(thread.sums[3][j]),
                           double(thread.sums[4][j])};
      if (mean) {
        if (thread.sums[2][j] == T(-INFINITY)) continue;
        partial[0] = double(thread.sums[2][j]), partial[1] = thread.totals[0][j], partial[2] = thread.totals[1][j];
      }
      if (term.reduction == Reduction::max) partial[0] = partial[4];
      state_merge(term.reduction, data.state.get() + (tile.j0 + j) * width, partial);
    }
  }

  // Largest kept score of each column and the s it belongs to, in thread.sums[2] and [3].
  void column_tops(const Tile<T>& tile, TermData<T>& data, bool masked, ThreadState& thread) {
    const int n = whole<T>(tile.columns);
    for (int j = 0; j < n; ++j) thread.sums[2][j] = T(-INFINITY);
    column_rows(tile, data, masked, thread, 0, [&](const T* s, const T*, const Lane<T>* keep, int64_t) {
      for (int j = 0; j < n; j += kWidth<T>) {
        const Vec<T> f = load(thread.buffers.f + j), top = load(thread.sums[2] + j);
        // A NaN takes the place of the largest score and stays.
        MaskVec<T> higher = ~MaskVec<T>(f <= top) & MaskVec<T>(top == top);
        if (keep) higher &= load_mask<T>(keep + j);
        store(thread.sums[2] + j, higher ? f : top);
        store(thread.sums[3] + j, higher ? load(s + j) : load(thread.sums[3] + j));
      }
    });
  }

  // take(s, t, keep, row) of every row that has pairs for the columns, with the scores in buffers.f; the first `summed` of
  // the sums go to double precision on the way.
  template <class Take>
  void column_rows(const Tile<T>& tile, const TermData<T>& data, bool masked, ThreadState& thread, int summed,
                   const Take& take) {
    RowBuffers<T>& buffers = thread.buffers;
    const int n = whole<T>(tile.columns);
    for (int r = 0; r < tile.rows; ++r) {
      if (r > 0) thread.flush(summed, n, r - 1, tile.rows);
      const int64_t row = tile.i0 + r;
      const T *s = tile.s + r * kTile, *t = tile.guide(r);
      memset(buffers.built, 0, sizeof buffers.built);
      const Lane<T>* base = masked ? base_lanes(walk_, tile, r, data.term->mask, buffers) : nullptr;
      bool any = true;
      const Lane<T>* keep = keep_lanes_of<T, false>(data, base, s, t, n, row, tile.j0, buffers.keep_column, any);
      if (!any) continue;
      score_row<T, false>(data, data.source(s, t), n, row, tile.j0, buffers, buffers.f, static_cast<T*>(nullptr),
                          static_cast<T*>(nullptr));
      take(s, t, keep, row);
    }
    thread.flush(summed, n, tile.rows - 1, tile.rows);
  }

  static void row_sums(Reduction reduction, const T* f, const T* weight, const Lane<T>* keep, int n, int columns,
                       double* partial) {
    if (reduction == Reduction::sum) {
      partial[0] = double(kept_sum(f, weight, keep, n));
      return;
    }
    if (reduction == Reduction::max) {
      partial[0] = double(kept_max(f, keep, n));
      return;
    }
    Vec<T> count{}, sum{}, squares{}, low = broadcast(T(INFINITY)), high = broadcast(T(-INFINITY));
    MaskVec<T> bad{};
    for (int j = 0; j < n; j += kWidth<T>) {
      const Vec<T> v = load(f + j);
      MaskVec<T> lanes = keep ? load_mask<T>(keep + j) : all_lanes<T>();
      if (reduction == Reduction::count) lanes &= ~MaskVec<T>(v <= 0);
      count += keep_lanes<T>(lanes, broadcast(T(1)));
      sum += keep_lanes<T>(lanes, v);
      squares += keep_lanes<T>(lanes, v * v);
      low = MaskVec<T>(v < low) & lanes ? v : low;
      high = MaskVec<T>(v > high) & lanes ? v : high;
      bad |= MaskVec<T>(v != v) & lanes;
    }
    partial[0] = double(sum_lanes<T>(count));
    if (reduction == Reduction::count) return;
    partial[1] = double(sum_lanes<T>(sum)), partial[2] = double(sum_lanes<T>(squares));
    for (int l = 0; l < kWidth<T>; ++l) {
      if (low[l] < partial[3]) partial[3] = double(low[l]);
      if (high[l] > partial[4]) partial[4] = double(high[l]);
    }
    if (any_lane<T>(bad)) partial[3] = partial[4] = NAN;
    (void)columns;
  }

  // `t`: further weights of the exponentials, or nullptr.
  static void column_sums(Reduction reduction, const T* f, const T* s, const T* t, T shift, T weight,
                          const Lane<T>* keep, int n, ThreadState& thread) {
    auto add = [&](int k, int j, Vec<T> v) { store(thread.sums[k] + j, load(thread.sums[k] + j) + v); };
    for (int j = 0; j < n; j += kWidth<T>) {
      const Vec<T> v = load(f + j);
      MaskVec<T> lanes = keep ? load_mask<T>(keep + j) : all_lanes<T>();
      switch (reduction) {
        case Reduction::sum: add(0, j, keep_lanes<T>(lanes, v * weight)); break;
        case Reduction::count: add(0, j, keep_lanes<T>(lanes & ~MaskVec<T>(v <= 0), broadcast(T(1)))); break;
        case Reduction::logsumexp:
          add(0, j, keep_lanes<T>(lanes, exp_lanes<T>(v - shift) * weight * (t ? load(t + j) : broadcast(T(1)))));
          store_mask<T>(thread.kept + j, load_mask<T>(thread.kept + j) | lanes);
          break;
        case Reduction::softmax_mean: {
          const Vec<T> share = t ? load(t + j) : broadcast(T(1));
          const Vec<T> e = keep_lanes<T>(lanes, exp_lanes<T>(v - load(thread.sums[2] + j)) * weight * share);
          add(0, j, e);
          add(1, j, keep_lanes<T>(lanes, e * (load(s + j) - load(thread.sums[3] + j))));
          break;
        }
        case Reduction::max: {
          const Vec<T> high = load(thread.sums[4] + j);
          // Not `greater`: a NaN replaces the largest and then stays.
          store(thread.sums[4] + j, ~MaskVec<T>(v <= high) & MaskVec<T>(high == high) & lanes ? v : high);
          break;
        }
        case Reduction::moments: {
          add(0, j, keep_lanes<T>(lanes, broadcast(T(1))));
          add(1, j, keep_lanes<T>(lanes, v));
          add(2, j, keep_lanes<T>(lanes, v * v));
          const Vec<T> low = load(thread.sums[3] + j), high = load(thread.sums[4] + j);
          // Not `not greater`: a NaN replaces the extreme and then stays.
          store(thread.sums[3] + j, ~MaskVec<T>(v >= low) & MaskVec<T>(low == low) & lanes ? v : low);
          store(thread.sums[4] + j, ~MaskVec<T>(v <= high) & MaskVec<T>(high == high) & lanes ? v : high);
          break;
        }
      }
    }
  }

  Walk<T>& walk_;
  const Problem<T>& problem_;
  TermData<T>* data_ = nullptr;
  Item<T>* items_ = nullptr;
  ThreadState* threads_ = nullptr;
  int count_ = 0, item_count_ = 0;
};
