// Second pass: the weight dL/ds_ij of every pair, tile by tile, and with it the gradients. Included per instruction set.
//
// Where a term's rows and columns share z, one exponential serves both: with u = exp(f - c), c a bound of f over the
// tile, the weight is u (g_i exp(c - L_i) + g_j exp(c - L_j)). That needs c - L to be moderate; elsewhere the tile takes
// two exponentials.

constexpr double kSharedShift = 40;  // largest c - L at which one exponential loses nothing: weights below e^-47 flush
constexpr double kSparseShare = 0.04;  // fewer non-zero weights than this share of a tile: accumulated pair by pair

template <class T>
class Weights {
 public:
  Weights(Walk<T>& walk, const Gradients<T>& gradients) : walk_(walk), problem_(walk.problem()), gradients_(gradients) {
    count_ = int(problem_.terms.size());
    data_ = new TermData<T>[count_];
    for (int t = 0; t < count_; ++t) prepare(t);
    items_ = make_items(walk, data_, count_, item_count_);
    threads_ = new ThreadState[walk.threads()];
    const bool distances = problem_.similarity != Similarity::dot;
    need_x_ = gradients.dx != nullptr, need_y_ = gradients.dy != nullptr;
    if (need_x_) dx_.allocate(walk.rows().padded() * walk.rows().ld), dx_.zero(walk.rows().padded() * walk.rows().ld);
    if (distances && need_x_) row_sums_.allocate(walk.rows().count + 1), row_sums_.zero(walk.rows().count + 1);
    if (distances && need_y_)
      column_sums_.allocate(walk.columns().count + 1), column_sums_.zero(walk.columns().count + 1);
    if (gradients.total) row_totals_.allocate(walk.rows().count + 1), row_totals_.zero(walk.rows().count + 1);
  }
  ~Weights() { delete[] data_, delete[] items_, delete[] threads_; }
  Weights(const Weights&) = delete;

  void run() {
    walk_.tiles([&](const Tile<T>& tile) { return wanted_tile(walk_, items_, item_count_, tile); },
                [&](Tile<T>& tile, int thread) {
                  if (problem_.similarity == Similarity::dot)
                    body(tile, thread);
                  else
                    distance_body(tile, thread);
                },
                *this);
    if (need_x_) finish_rows();
    if (need_y_ && problem_.rows == 0) memset(gradients_.dy, 0, problem_.columns * problem_.features * sizeof(T));
    for (int t = 0; t < count_; ++t) {
      scatter(data_[t].dscale, *data_[t].owner, gradients_.dscale[t]);
      scatter(data_[t].doffset, *data_[t].owner, gradients_.doffset[t]);
      scatter(data_[t].dother, *data_[t].other, gradients_.dother[t]);
      scatter(data_[t].dweight, *data_[t].other, gradients_.dweight[t]);
    }
    if (gradients_.total) {
      *gradients_.total = 0;
      for (int64_t p = 0; p < problem_.rows; ++p) *gradients_.total += row_totals_[p];
    }
  }

  // dY of a column tile is summed in the thread's own memory. Between the visits of the tile, each by other rows, the
  // output itself keeps the sum; after the last it holds the gradient.
  void enter(int64_t, int, bool first, int thread) {
    threads_[thread].first_visit = first, threads_[thread].open = false;
  }
  void leave(int64_t j0, int columns, bool last, int thread) {
    ThreadState& state = threads_[thread];
    if (!need_y_ || !(state.open || state.first_visit || last)) return;
    const Side<T>& y = walk_.columns();
    T* tile = column_gradient(j0, columns, thread);
    const T* rows = last ? walk_.column_rows(j0, columns, thread) : nullptr;
    for (int j = 0; j < columns; ++j) {
      T* g = tile + j * y.ld;
      if (last) finish(y, j0 + j, g, rows + j * y.ld, column_sums_);
      memcpy(gradients_.dy + y.index[j0 + j] * y.features, g, y.features * sizeof(T));
    }
  }

 private:
  struct ThreadState {
    RowBuffers<T> buffers;
    alignas(64) T column_factor[kTile];
    Buffer<T> dy;  // (kTile, ld) of the column tile that is visited
    bool first_visit = false, open = false;
  };

  // The sum so far of dY of a column tile, (columns, ld).
  T* column_gradient(int64_t j0, int columns, int thread) {
    ThreadState& state = threads_[thread];
    const Side<T>& y = walk_.columns();
    if (!state.dy) state.dy.allocate(kTile * y.ld), state.dy.zero(kTile * y.ld);
    if (state.open) return state.dy.get();
    state.open = true;
    if (state.first_visit) {
      state.dy.zero(columns * y.ld);
      return state.dy.get();
    }
    for (int j = 0; j < columns; ++j) {
      T* row = state.dy.get() + j * y.ld;
      memcpy(row, gradients_.dy + y.index[j0 + j] * y.features, y.features * sizeof(T));
      // The tile before may have left a NaN in the padding, which `finish` sums.
      memset(row + y.features, 0, (y.ld - y.features) * sizeof(T));
    }
    return state.dy.get();
  }

  void prepare(int t) {
    const Term<T>& term = problem_.terms[t];
    TermData<T>& data = data_[t];
    data.gather(term, walk_);
    const bool rows = term.axis == Axis::rows;
    const int64_t owners = data.owner->count;
    if (gradients_.total) {
      data.cotangent.zeros(*data.owner);
      for (int64_t p = 0; p < owners; ++p) data.cotangent.data[p] = 1;
    } else {
      data.cotangent.gather((rows ? gradients_.grad_rows : gradients_.grad_columns) + term.slot * owners, *data.owner);
    }
    if (data.softmax()) {
      const T* statistics = (rows ? gradients_.rows : gradients_.columns) + term.slot * owners;
      const bool mean = term.reduction == Reduction::softmax_mean;
      if (mean) data.mean.gather(statistics, *data.owner);
      data.statistic.gather(mean ? statistics + owners : statistics, *data.owner);
      if (data.weight) {
        // Inside the exponent, as in the statistic: a large exponent then rounds alike in both.
        data.log_weight.zeros(*data.other);
        for (int64_t p = 0; p < data.other->count; ++p) data.log_weight.data[p] = T(log(double(data.weight.data[p])));
      }
      data.exact.allocate(owners + 1);
      for (int64_t p = 0; p < owners; ++p) {
        T& statistic = data.statistic.data[p];
        if (statistic == T(-INFINITY)) statistic = 0, data.cotangent.data[p] = 0;
        data.exact[p] = double(statistic) - (data.late_offset ? double(data.late_offset.data[p]) : 0.0);
        statistic = T(data.exact[p]);
      }
    }
    auto room = [](Buffer<double>& buffer, const T* wanted, const Side<T>& side) {
      if (wanted) buffer.allocate(side.count + 1), buffer.zero(side.count + 1);
    };
    room(data.dscale, gradients_.dscale[t], *data.owner);
    room(data.doffset, gradients_.doffset[t], *data.owner);
    room(data.dother, gradients_.dother[t], *data.other);
    room(data.dweight, gradients_.dweight[t], *data.other);
    // The softmax sums to 1, so a late offset has its owner's cotangent as gradient.
    if (data.late_offset && data.doffset)
      for (int64_t p = 0; p < owners; ++p) data.doffset[p] = double(data.cotangent.data[p]);
  }

  static bool differentiable(const TermData<T>& data) {
    const Reduction reduction = data.term->reduction;
    return reduction != Reduction::count && reduction != Reduction::moments && reduction != Reduction::max;
  }

  // Both directions through one loop over z?
  bool lean(const Item<T>& item) const {
    const TermData<T>& any = *item.any();
    if (!any.uniform() || any.term->reduction == Reduction::softmax_mean) return false;
    for (const TermData<T>* data : {item.to_row, item.to_column})
      if (data && (data->dother || data->dweight)) return false;
    return true;
  }

  // --- one tile ---------------------------------------------------------------------------------------------------------

  void body(const Tile<T>& tile, int thread) {
    T* w = walk_.scratch(thread).w.get();
    int64_t nonzero = 0;
    if (!weights_of(tile, w, threads_[thread], nonzero)) return;
    accumulate(tile, w, nonzero, thread);
  }

  void distance_body(Tile<T>& tile, int thread) {
    T* w = walk_.scratch(thread).w.get();
    walk_.distances(tile, thread);
    int64_t nonzero = 0;
    if (!weights_of(tile, w, threads_[thread], nonzero)) return;
    // dL/ds → dL/d(squared distance), its sums by row and column, and the product with the other side.
    const int n = whole<T>(tile.columns);
    T* sums = threads_[thread].column_factor;
    memset(sums, 0, sizeof(T) * kTile);
    for (int r = 0; r < tile.rows; ++r) {
      T* row = w + r * kTile;
      if (problem_.similarity == Similarity::euclidean)
        for (int j = 0; j < n; j += kWidth<T>) {
          const Vec<T> d = load(tile.s + r * kTile + j);
          const Vec<T> slope = load(row + j) / (T(2) * d);
          store(row + j, d == 0 ? Vec<T>{} : slope);
        }
      for (int j = tile.columns; j < n; ++j) row[j] = 0;
      Vec<T> total{};
      for (int j = 0; j < n; j += kWidth<T>) {
        const Vec<T> v = load(row + j);
        total += v;
        store(sums + j, load(sums + j) + v);
      }
      if (row_sums_) row_sums_[tile.i0 + r] += double(sum_lanes<T>(total));
    }
    // A self-similarity has one array for both sides.
    double* columns = walk_.symmetric() ? row_sums_.get() : column_sums_.get();
    if (columns)
      for (int j = 0; j < tile.columns; ++j) columns[tile.j0 + j] += double(sums[j]);
    accumulate(tile, w, nonzero, thread);
  }

  // dX += W Y, dY += W^T X.
  void accumulate(const Tile<T>& tile, const T* w, int64_t nonzero, int thread) {
    const Side<T>&x = walk_.rows(), &y = walk_.columns();
    T* dx = need_x_ ? dx_.get() + tile.i0 * x.ld : nullptr;
    T* dy = walk_.symmetric() ? (need_x_ ? dx_.get() + tile.j0 * x.ld : nullptr)
                              : (need_y_ ? column_gradient(tile.j0, tile.columns, thread) : nullptr);
    const T* xi = x.data.get() + tile.i0 * x.ld;
    const T* yj = dx ? walk_.column_rows(tile, thread) : nullptr;
    if (nonzero >= 0 && double(nonzero) < kSparseShare * tile.rows * tile.columns) {
      for (int r = 0; r < tile.rows; ++r)
        for (int j = 0; j < tile.columns; ++j) {
          const T value = w[r * kTile + j];
          if (value == 0) continue;
          if (dx) axpy(value, yj + j * y.ld, dx + r * x.ld, x.width);
          if (dy) axpy(value, xi + r * x.ld, dy + j * y.ld, y.width);
        }
      return;
    }
    Ahead ahead = next_tile(tile, dx != nullptr, dy != nullptr);
    if (dx) gemm_rows(w, int64_t(kTile), tile.rows, tile.columns, yj, y.ld, x.width, dx, x.ld, ahead);
    if (dy) gemm_columns(w, int64_t(kTile), tile.rows, tile.columns, xi, x.ld, y.width, dy, y.ld, ahead);
  }

  // What the next tile reads.
  Ahead next_tile(const Tile<T>& tile, bool dx, bool dy) const {
    const Side<T>& x = walk_.rows();
    const int64_t rows = tile.next_rows * x.ld;
    Ahead ahead;
    if (tile.next_s) ahead.add(tile.next_s, tile.next_rows * int64_t(kTile));
    if (dy) ahead.add(x.data.get() + tile.next_i0 * x.ld, rows);
    if (dx) ahead.add(dx_.get() + tile.next_i0 * x.ld, rows);
    const int64_t panels = round_up(x.width, kPanel<T>) / kPanel<T>;
    ahead.share(panels * ((dx ? tile.rows : 0) + (dy ? tile.columns : 0)) / FP_MR);
    return ahead;
  }

  static FP_INLINE void axpy(T value, const T* from, T* to, int64_t width) {
    for (int64_t d = 0; d < width; d += kWidth<T>) store(to + d, load(to + d) + value * load(from + d));
  }

  // W of one tile; `nonzero` counts its entries where they may be few (-1: not counted). False: all zero.
  bool weights_of(const Tile<T>& tile, T* w, ThreadState& thread, int64_t& nonzero) {
    const int n = whole<T>(tile.columns);
    bool sparse = true, written = false;
    for (int k = 0; k < item_count_; ++k) {
      const Item<T>& item = items_[k];
      const TermData<T>& any = *item.any();
      if (!differentiable(any)) continue;
      const Coverage coverage = walk_.coverage(any.term->mask, tile);
      if (coverage == Coverage::empty) continue;
      TermData<T>* to_row = item.to_row;
      TermData<T>* to_column = tile.diagonal ? nullptr : item.to_column;
      if (to_row && outside(*to_row, tile, true)) to_row = nullptr;
      if (to_column && outside(*to_column, tile, false)) to_column = nullptr;
      if (!to_row && !to_column) continue;
      sparse &= any.thresholds() || any.term->mask == Mask::same || any.term->score == Score::hinge ||
                any.term->score == Score::squared_hinge || mask_uses_pairs(any.term->mask) || any.weighed();
      const bool masked = needs_base(walk_, tile, coverage);
      if (!written) clear(tile, w);
      written = true;
      if (lean(item)) {
        if (any.term->reduction == Reduction::sum)
          lean_sum(tile, to_row, to_column, masked, w, thread);
        else
          lean_logsumexp(tile, to_row, to_column, masked, w, thread);
        continue;
      }
      if (to_row) directed<true>(tile, *to_row, masked, w, thread);
      if (to_column) directed<false>(tile, *to_column, masked, w, thread);
    }
    if (!written) return false;
    nonzero = -1;
    if (sparse) nonzero = count_nonzero(tile, w, n);
    return nonzero != 0;
  }

  // Also what the matrix products read beside a tile that is no multiple of their register blocks.
  static void clear(const Tile<T>& tile, T* w) {
    const int rows = int(round_up(tile.rows, FP_MR)), width = int(round_up(whole<T>(tile.columns), FP_MR));
    for (int r = 0; r < rows; ++r) memset(w + r * kTile, 0, width * sizeof(T));
  }

  static int64_t count_nonzero(const Tile<T>& tile, const T* w, int n) {
    int64_t total = 0;
    for (int r = 0; r < tile.rows; ++r) {
      MaskVec<T> count{};
      for (int j = 0; j < n; j += kWidth<T>) count -= MaskVec<T>(load(w + r * kTile + j) != 0);
      for (int l = 0; l < kWidth<T>; ++l) total += count[l];
    }
    return total;
  }

  // --- logsumexp with one z for both directions ----------------------------------------------------------------------------

  void lean_logsumexp(const Tile<T>& tile, TermData<T>* to_row, TermData<T>* to_column, bool masked, T* w,
                      ThreadState& thread) {
    TermData<T>& any = to_row ? *to_row : *to_column;
    RowBuffers<T>& buffers = thread.buffers;
    const int n = whole<T>(tile.columns);
    const bool identity = any.term->score == Score::identity;
    const T scale = any.term->scale.number;
    const Bounds<T> kept = kept_range(walk_, tile, any, masked, buffers);
    if (kept.low > kept.high) return;  // no pair
    const T shift = score_bound(any, tile, true, kept.low, kept.high);
    const bool shared =
        moderate(to_row, shift, tile.i0, tile.rows) && moderate(to_column, shift, tile.j0, tile.columns);
    if (to_column && shared) {
      const double* exact = to_column->exact.get() + tile.j0;
      const T* cotangent = to_column->cotangent.data.get() + tile.j0;
      for (int j = 0; j < n; ++j)
        thread.column_factor[j] =
            j >= tile.columns || cotangent[j] == 0 ? T(0) : cotangent[j] * T(exp(double(shift) - exact[j]));
    }
    const bool sums = any.dscale || (any.doffset && !any.late_offset);
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.i0 + r;
      const T* s = tile.s + r * kTile;
      memset(buffers.built, 0, sizeof buffers.built);
      const Lane<T>* base = masked ? base_lanes(walk_, tile, r, any.term->mask, buffers) : nullptr;
      bool row_any = to_row != nullptr, column_any = to_column != nullptr;
      const Lane<T>* keep_row = base;
      const Lane<T>* keep_column = base;
      if (to_row)
        keep_row = keep_lanes_of<T, true>(*to_row, base, s, tile.guide(r), n, row, tile.j0, buffers.keep_row, row_any);
      if (to_column)
        keep_column = keep_lanes_of<T, false>(*to_column, base, s, tile.guide(r), n, row, tile.j0, buffers.keep_column,
                                              column_any);
      if (!row_any && !column_any) continue;
      const T* z = s;
      T a = scale, o = any.offset_number();
      const T* slope = nullptr;
      if (!identity) {
        score_row<T, true>(any, s, n, row, tile.j0, buffers, buffers.f, buffers.slope, static_cast<T*>(nullptr));
        z = buffers.f, slope = buffers.slope, a = 1, o = 0;
      }
      T* out = w + r * kTile;
      Emitted emitted{scale, out, s, slope};
      const bool apart = slope || sums;
      if (shared) {
        const T g = row_any ? to_row->cotangent.data[row] : T(0);
        const T factor = g == 0 ? T(0) : g * T(exp(double(shift) - to_row->exact[row]));
        const T* columns = column_any ? thread.column_factor : nullptr;
        if (masked || thresholds(to_row, to_column))
          shared_row<true>(z, a, o - shift, factor, columns, keep_row, keep_column, n, apart, emitted);
        else
          shared_row<false>(z, a, o - shift, factor, columns, nullptr, nullptr, n, apart, emitted);
      } else {
        exact_row(z, a, o, row_any ? to_row : nullptr, column_any ? to_column : nullptr, row, tile.j0, keep_row,
                  keep_column, n, emitted);
      }
      if (sums) parameter_sums(any, any.owner == &walk_.rows() ? row : tile.j0, emitted.by_s, emitted.plain);
    }
  }

  // Is c - L moderate for all owners of a tile?
  static bool moderate(const TermData<T>* data, T shift, int64_t first, int count) {
    if (!data) return true;
    const T* statistic = data->statistic.data.get() + first;
    const T* cotangent = data->cotangent.data.get() + first;
    for (int k = 0; k < count; ++k)
      if (cotangent[k] != 0 && !(shift - statistic[k] <= T(kSharedShift))) return false;
    return true;
  }

  // Where dL/df goes: times the slope of f and the scale into a row of W, and into the sums for scale and offset.
  struct Emitted {
    T scale;
    T* out;
    const T *s, *slope;  // slope: nullptr for the identity
    Vec<T> by_s{}, plain{};
    // Without APART there is neither a slope nor a sum that is wanted.
    template <bool APART>
    FP_INLINE void take(int j, Vec<T> d) {
      if (APART) {
        if (slope) d *= load(slope + j);
        by_s += d * load(s + j), plain += d;
      }
      store(out + j, load(out + j) + scale * d);
    }
  };

  // dL/df = u (row factor + column factor).
  template <bool MASKED>
  FP_INLINE void shared_row(const T* z, T a, T o, T factor, const T* column_factor, const Lane<T>* keep_row,
                            const Lane<T>* keep_column, int n, bool apart, Emitted& emitted) {
    if (column_factor)
      apart ? shared_loop<MASKED, true, true>(z, a, o, factor, column_factor, keep_row, keep_column, n, emitted)
            : shared_loop<MASKED, true, false>(z, a, o, factor, column_factor, keep_row, keep_column, n, emitted);
    else
      apart ? shared_loop<MASKED, false, true>(z, a, o, factor, column_factor, keep_row, keep_column, n, emitted)
            : shared_loop<MASKED, false, false>(z, a, o, factor, column_factor, keep_row, keep_column, n, emitted);
  }
  template <bool MASKED, bool COLUMNS, bool APART>
  FP_INLINE void shared_loop(const T* z, T a, T o, T factor, const T* column_factor, const Lane<T>* keep_row,
                             const Lane<T>* keep_column, int n, Emitted& emitted) {
    for (int j = 0; j < n; j += kWidth<T>) {
      const Vec<T> u = exp_lanes<T>(a * load(z + j) + o);
      Vec<T> g = broadcast(factor);
      if (MASKED && keep_row) g = keep_lanes<T>(load_mask<T>(keep_row + j), g);
      if (COLUMNS) {
        Vec<T> c = load(column_factor + j);
        if (MASKED && keep_column) c = keep_lanes<T>(load_mask<T>(keep_column + j), c);
        g += c;
      }
      Vec<T> d = u * g;
      if (MASKED) d = g == 0 ? Vec<T>{} : d;  // the exponential of a masked pair may be infinite
      emitted.template take<APART>(j, d);
    }
  }

  // The same with an exponential for each direction.
  FP_INLINE void exact_row(const T* z, T a, T o, const TermData<T>* to_row, const TermData<T>* to_column, int64_t row,
                           int64_t column, const Lane<T>* keep_row, const Lane<T>* keep_column, int n,
                           Emitted& emitted) {
    for (int j = 0; j < n; j += kWidth<T>) {
      const Vec<T> f = a * load(z + j) + o;
      Vec<T> d{};
      if (to_row) {
        const Vec<T> e = exp_lanes<T>(f - to_row->statistic.data[row]) * to_row->cotangent.data[row];
        d += keep_row ? keep_lanes<T>(load_mask<T>(keep_row + j), e) : e;
      }
      if (to_column) {
        const Vec<T> e = exp_lanes<T>(f - load(to_column->statistic.data.get() + column + j)) *
                         load(to_column->cotangent.data.get() + column + j);
        d += keep_column ? keep_lanes<T>(load_mask<T>(keep_column + j), e) : e;
      }
      emitted.template take<true>(j, d);
    }
  }

  // Gradients of a scale and an offset that all pairs share: their sum is what counts, so one owner takes it.
  // By value: the sums then stay in registers while they grow.
  void parameter_sums(TermData<T>& data, int64_t owner, Vec<T> by_s, Vec<T> plain) {
    if (data.dscale) data.dscale[owner] += double(sum_lanes<T>(by_s));
    if (data.doffset && !data.late_offset) data.doffset[owner] += double(sum_lanes<T>(plain));
  }

  // --- sums with one z for both directions -----------------------------------------------------------------------------------

  void lean_sum(const Tile<T>& tile, TermData<T>* to_row, TermData<T>* to_column, bool masked, T* w,
                ThreadState& thread) {
    TermData<T>& any = to_row ? *to_row : *to_column;
    RowBuffers<T>& buffers = thread.buffers;
    const int n = whole<T>(tile.columns);
    const T scale = any.term->scale.number;
    const bool sums = any.dscale || any.doffset;
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.i0 + r;
      const T* s = tile.s + r * kTile;
      memset(buffers.built, 0, sizeof buffers.built);
      const Lane<T>* base = masked ? base_lanes(walk_, tile, r, any.term->mask, buffers) : nullptr;
      bool row_any = to_row != nullptr, column_any = to_column != nullptr;
      const Lane<T>* keep_row = base;
      const Lane<T>* keep_column = base;
      if (to_row)
        keep_row = keep_lanes_of<T, true>(*to_row, base, s, tile.guide(r), n, row, tile.j0, buffers.keep_row, row_any);
      if (to_column)
        keep_column = keep_lanes_of<T, false>(*to_column, base, s, tile.guide(r), n, row, tile.j0, buffers.keep_column,
                                              column_any);
      if (!row_any && !column_any) continue;
      score_row<T, true>(any, s, n, row, tile.j0, buffers, buffers.f, buffers.slope, static_cast<T*>(nullptr));
      const T g = row_any ? to_row->cotangent.data[row] : T(0);
      const T* cotangent = column_any ? to_column->cotangent.data.get() + tile.j0 : nullptr;
      Emitted emitted{scale, w + r * kTile, s, nullptr};
      for (int j = 0; j < n; j += kWidth<T>) {
        Vec<T> d = broadcast(g);
        if (keep_row) d = keep_lanes<T>(load_mask<T>(keep_row + j), d);
        if (cotangent) {
          const Vec<T> c = load(cotangent + j);
          d += keep_column ? keep_lanes<T>(load_mask<T>(keep_column + j), c) : c;
        }
        d *= load(buffers.slope + j);
        if (masked) d = keep_lanes<T>(load_mask<T>(base + j), d);  // the slope of a masked pair may be infinite
        sums ? emitted.template take<true>(j, d) : emitted.template take<false>(j, d);
      }
      if (sums) parameter_sums(any, any.owner == &walk_.rows() ? row : tile.j0, emitted.by_s, emitted.plain);
      if (gradients_.total) {
        if (row_any) row_totals_[row] += double(kept_sum(buffers.f, static_cast<const T*>(nullptr), keep_row, n));
        if (column_any) row_totals_[row] += double(kept_sum(buffers.f, static_cast<const T*>(nullptr), keep_column, n));
      }
    }
  }

  // --- any reduction, one direction ---------------------------------------------------------------------------------------

  template <bool TO_ROW>
  void directed(const Tile<T>& tile, TermData<T>& data, bool masked, T* w, ThreadState& thread) {
    RowBuffers<T>& buffers = thread.buffers;
    const Term<T>& term = *data.term;
    const int n = whole<T>(tile.columns);
    const bool mean = term.reduction == Reduction::softmax_mean;
    const bool combined = term.combine == Combine::logaddexp && data.other_offset;
    auto along = [&](const Along<T>& values, T number, int64_t row, int j, bool owner) {
      if (!values) return broadcast(number);
      return owner == TO_ROW ? broadcast(values.data[row]) : load(values.data.get() + tile.j0 + j);
    };
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.i0 + r;
      const T *s = tile.s + r * kTile, *t = tile.guide(r);
      memset(buffers.built, 0, sizeof buffers.built);
      const Lane<T>* base = masked ? base_lanes(walk_, tile, r, term.mask, buffers) : nullptr;
      bool any = true;
      const Lane<T>* keep = keep_lanes_of<T, TO_ROW>(data, base, s, t, n, row, tile.j0, buffers.keep_row, any);
      if (!any) continue;
      score_row<T, TO_ROW>(data, data.source(s, t), n, row, tile.j0, buffers, buffers.f, buffers.slope,
                           combined ? buffers.e : nullptr);
      T* out = w + r * kTile;
      for (int j = 0; j < n; j += kWidth<T>) {
        const MaskVec<T> lanes = keep ? load_mask<T>(keep + j) : all_lanes<T>();
        const Vec<T> g = along(data.cotangent, T(0), row, j, true);
        const Vec<T> weight = along(data.weight, T(1), row, j, false);
        const Vec<T> f = load(buffers.f + j), v = load(s + j);
        const Vec<T> share = data.weighed() ? load(t + j) : broadcast(T(1));
        Vec<T> by_score = g * weight * share, direct{}, by_weight = g * f;  // dL/df; dL/ds beside z; dL/dw
        if (data.softmax()) {
          const Vec<T> exponent = f + along(data.log_weight, T(0), row, j, false);
          by_score = g * share * exp_lanes<T>(exponent - along(data.statistic, T(0), row, j, true));
          if (mean) {
            direct = keep_lanes<T>(lanes, by_score);
            by_score = term.detach_weights ? Vec<T>{} : by_score * (v - along(data.mean, T(0), row, j, true));
          }
          by_weight = by_score / weight;
        }
        const Vec<T> d = keep_lanes<T>(lanes, by_score * load(buffers.slope + j));
        store(out + j, load(out + j) + along(data.scale, term.scale.number, row, j, true) * d + direct);
        store(buffers.dz + j, d);
        if (data.dweight) store(buffers.dv + j, keep_lanes<T>(lanes, by_weight));
      }
      if (gradients_.total) {
        if (data.weighed()) weigh(buffers.f, t, n);
        row_totals_[row] += double(weighted_total<TO_ROW>(data, buffers.f, keep, row, tile.j0, n));
      }
      rich_sums<TO_ROW>(data, tile, row, s, n, buffers, combined ? buffers.e : nullptr);
    }
  }

  template <bool TO_ROW>
  static T weighted_total(const TermData<T>& data, const T* f, const Lane<T>* keep, int64_t row, int64_t column,
                          int n) {
    if (!data.weight) return kept_sum(f, static_cast<const T*>(nullptr), keep, n);
    if (TO_ROW) return kept_sum(f, static_cast<const T*>(data.weight.data.get() + column), keep, n);
    return kept_sum(f, static_cast<const T*>(nullptr), keep, n) * data.weight.data[row];
  }

  // Gradients of per-owner and per-other parameters from dL/dz of a row.
  template <bool TO_ROW>
  void rich_sums(TermData<T>& data, const Tile<T>& tile, int64_t row, const T* s, int n, RowBuffers<T>& buffers,
                 const T* share) {
    (void)n;
    auto add = [&](Buffer<double>& into, bool owner, auto value) {
      if (!into) return;
      if (owner == TO_ROW) {
        double total = 0;
        for (int j = 0; j < tile.columns; ++j) total += double(value(j));
        into[row] += total;
      } else {
        for (int j = 0; j < tile.columns; ++j) into[tile.j0 + j] += double(value(j));
      }
    };
    const T* dz = buffers.dz;
    const bool add_offsets = share == nullptr;
    add(data.dscale, true, [&](int j) { return dz[j] == 0 ? T(0) : dz[j] * s[j]; });
    if (!data.late_offset) add(data.doffset, true, [&](int j) { return add_offsets ? dz[j] : dz[j] * share[j]; });
    add(data.dother, false, [&](int j) { return add_offsets ? dz[j] : dz[j] * (T(1) - share[j]); });
    add(data.dweight, false, [&](int j) { return buffers.dv[j]; });
  }

  // --- after the tiles --------------------------------------------------------------------------------------------------------

  // The gradient g of row x at position p, through the distance and the normalisation.
  void finish(const Side<T>& side, int64_t p, T* g, const T* x, const Buffer<double>& sums) const {
    if (sums) {
      const Vec<T> total = broadcast(T(sums[p]));
      for (int64_t d = 0; d < side.width; d += kWidth<T>) store(g + d, T(2) * (total * load(x + d) - load(g + d)));
    }
    if (!problem_.normalize) return;
    const T norm = side.norm[p];
    Vec<T> products{};
    if (!(norm <= T(1e-12)))
      for (int64_t d = 0; d < side.width; d += kWidth<T>) products += load(g + d) * load(x + d);
    const T along = sum_lanes<T>(products);
    for (int64_t d = 0; d < side.width; d += kWidth<T>) store(g + d, (load(g + d) - along * load(x + d)) / norm);
  }

  void finish_rows() {
    const Side<T>& side = walk_.rows();
    const int64_t tasks = side.count > 256 ? walk_.threads() : 1, step = (side.count + tasks - 1) / tasks;
    parallel_tasks(problem_.parallel, tasks, [&](int64_t task) {
      for (int64_t p = task * step; p < side.count && p < (task + 1) * step; ++p) {
        T* g = dx_.get() + p * side.ld;
        finish(side, p, g, side.data.get() + p * side.ld, row_sums_);
        memcpy(gradients_.dx + side.index[p] * side.features, g, side.features * sizeof(T));
      }
    });
  }

  static void scatter(const Buffer<double>& values, const Side<T>& side, T* out) {
    if (!out) return;
    for (int64_t p = 0; p < side.count; ++p) out[side.index[p]] = T(values[p]);
  }

  Walk<T>& walk_;
  const Problem<T>& problem_;
  const Gradients<T>& gradients_;
  TermData<T>* data_ = nullptr;
  Item<T>* items_ = nullptr;
  ThreadState* threads_ = nullptr;
  Buffer<T> dx_;                           // (padded, ld)
  Buffer<double> row_sums_, column_sums_;  // of dL/d(squared distance)
  Buffer<double> row_totals_;              // of pair_sum
  bool need_x_ = false, need_y_ = false;
  int count_ = 0, item_count_ = 0;
};
