// Visiting the tiles of S: which exist, which thread has which, and their similarities. Included per instruction set.
//
// Two tiles that run at the same time share neither rows nor columns, so that whatever is accumulated per row or column
// needs no lock, and its order is fixed: a Latin square over (row group, column group), a round robin over pairs of
// groups for the triangle of a self-similarity.

template <class T>
struct Tile {
  int64_t i0, j0;  // first row and column, as positions
  int rows, columns;
  bool diagonal;  // of a self-similarity: holds (i, j) and (j, i)
  T* s;           // (rows, kTile) similarities; dot products unless `distances` was called
  T low, high;    // over the dot products
  T* t;           // (rows, kTile) second product, or nullptr
  T t_low, t_high;
  int64_t next_i0;  // of the tile that this thread comes to next
  int next_rows;    // 0: it comes to none
  const T* next_s;  // its kept similarities, where they are there

  const T* guide(int r) const { return t ? t + r * kTile : nullptr; }
};

// The two sides of a product, by position.
template <class T>
struct Product {
  Side<T> rows, columns;
};

// The column tile of a product as its tiles read it, in the scratch memory of one thread.
template <class T>
struct ColumnTile {
  Buffer<T> packed, staged;
  int64_t packed_tile = -1, staged_tile = -1;
};

// Scratch memory of one thread.
template <class T>
struct Scratch {
  Buffer<T> s, w, t;
  ColumnTile<T> columns, guide_columns;
};

// What a pass does when the walk of a rectangular problem enters and leaves a column tile. Each is visited once per round,
// by a different group of rows.
struct NoVisits {
  void enter(int64_t, int, bool, int) {}
  void leave(int64_t, int, bool, int) {}
};

template <class T>
class Walk {
 public:
  explicit Walk(const Problem<T>& problem) : problem_(problem) {
    bool labelled = false, squares = problem.similarity != Similarity::dot;
    for (const Term<T>& term : problem.terms) labelled |= mask_uses_labels(term.mask);
    for (const Extreme<T>& extreme : problem.extremes) labelled |= mask_uses_labels(extreme.mask);
    make_orders(labelled ? problem.labels : nullptr, problem.rows, problem.ref_labels, problem.columns, symmetric(),
                row_order_, column_order_);
    const int threads = problem.threads;
    sides_.rows.prepare(problem.x, problem.rows, problem.features, row_order_, true, problem.normalize, squares,
                        threads, problem.parallel);
    if (!symmetric())
      sides_.columns.prepare(problem.y, problem.columns, problem.features, column_order_, false, problem.normalize,
                             squares, threads, problem.parallel);
    if (guided()) {
      guide_.rows.prepare(problem.guide_rows, problem.rows, problem.guide_features, row_order_, true, false, false,
                          threads, problem.parallel);
      if (!symmetric())
        guide_.columns.prepare(problem.guide_columns, problem.columns, problem.guide_features, column_order_, false,
                               false, false, threads, problem.parallel);
    }
    cut(threads);
    if (problem.exclude) {
      Buffer<int64_t> position(problem.columns);
      for (int64_t p = 0; p < problem.columns; ++p) position[columns().index[p]] = p;
      excluded_.allocate(problem.rows);
      for (int64_t p = 0; p < problem.rows; ++p) {
        const int64_t column = problem.exclude[rows().index[p]];
        excluded_[p] = column >= 0 && column < problem.columns ? position[column] : -1;
      }
    }
    scratch_ = new Scratch<T>[threads_];
  }
  ~Walk() {
    if (locked_) panel_cache().unlock();
    delete[] scratch_;
  }
  Walk(const Walk&) = delete;

  const Problem<T>& problem() const { return problem_; }
  bool symmetric() const { return problem_.symmetric(); }
  bool guided() const { return problem_.guided; }
  const Side<T>& rows() const { return sides_.rows; }
  const Side<T>& columns() const { return columns_of(sides_); }
  int threads() const { return threads_; }
  Scratch<T>& scratch(int thread) const { return scratch_[thread]; }

  // Is this column position out of bounds for this row position, whatever the mask?
  bool excluded(int64_t row, int64_t column) const {
    if (excluded_ && excluded_[row] == column) return true;
    return problem_.exclude_self && row == column;  // both sides hold the same rows in the same order
  }
  const int64_t* excluded_positions() const { return excluded_.get(); }

  Coverage coverage(Mask mask, const Tile<T>& tile) const {
    const Side<T>& c = columns();
    if (!mask_uses_labels(mask)) return mask_coverage(mask, 0, 0, 0, 0);
    return mask_coverage(mask, rows().label[tile.i0], rows().label[tile.i0 + tile.rows - 1], c.label[tile.j0],
                         c.label[tile.j0 + tile.columns - 1]);
  }

  // Keeps S for the pass that follows, or takes it from the pass before. `keep`: a further pass will come.
  void use_cache(bool keep) {
    PanelKey key;
    key.rows_hash = rows().hash, key.columns_hash = columns().hash;
    key.order_hash = row_order_.hash * 31 + column_order_.hash;
    key.rows = problem_.rows, key.columns = problem_.columns, key.features = problem_.features;
    key.element_bytes = sizeof(T), key.vector_bytes = FP_VECTOR_BYTES, key.groups = row_tiling_.groups;
    key.symmetric = symmetric(), key.normalize = problem_.normalize;
    const int64_t count =
        symmetric() ? row_tiling_.tiles * (row_tiling_.tiles + 1) / 2 : row_tiling_.tiles * column_tiling_.tiles;
    // Tiles of one size in the cache, rows of kTile.
    const int64_t bytes = count * row_tiling_.largest * kTile * int64_t(sizeof(T));
    locked_ = panel_cache().try_lock();
    if (!locked_) return;
    if (panel_cache().holds(key))
      cached_ = true;
    else if (keep && bytes <= problem_.workspace_bytes)
      cached_ = panel_cache().prepare(key, bytes, count);
  }

  // The columns of a tile as rows (tile.columns, columns().ld).
  const T* column_rows(const Tile<T>& tile, int thread) const { return column_rows(tile.j0, tile.columns, thread); }
  const T* column_rows(int64_t first, int count, int thread) const {
    return column_rows(columns(), scratch_[thread].columns, first, count);
  }

  // body(tile, thread) for every tile for which wanted(tile) holds; s is filled in before the body runs.
  template <class Wanted, class Body>
  void tiles(const Wanted& wanted, const Body& body) {
    NoVisits none;
    tiles(wanted, body, none);
  }
  // enter(first column, columns, first visit?, thread) and leave(..., last visit?, thread) of `visits` around each visit.
  template <class Wanted, class Body, class Visits>
  void tiles(const Wanted& wanted, const Body& body, Visits& visits) {
    if (problem_.rows == 0 || problem_.columns == 0) return;
    const int64_t p = threads_;
    if (!symmetric()) {
      for (int64_t round = 0; round < p; ++round)
        parallel_tasks(problem_.parallel, p, [&](int64_t t) {
          block(t, (t + round) % p, int(t), wanted, body, visits, round == 0, round == p - 1);
        });
      return;
    }
    const int64_t g = row_tiling_.groups;
    if (g == 1)
      return parallel_tasks(problem_.parallel, 1, [&](int64_t) { block(0, 0, 0, wanted, body, visits, true, true); });
    // Groups on the diagonal first, two a thread; then the rounds of a tournament of g players (one rests if g is odd).
    const int64_t players = g + g % 2;
    parallel_tasks(problem_.parallel, p, [&](int64_t t) {
      for (int64_t d = t; d < g; d += p) block(d, d, int(t), wanted, body, visits, false, false);
    });
    for (int64_t round = 0; round + 1 < players; ++round)
      parallel_tasks(problem_.parallel, players / 2, [&](int64_t t) {
        int64_t a = t == 0 ? players - 1 : (round + t) % (players - 1);
        int64_t b = (round + players - 1 - t) % (players - 1);
        if (a > b) {
          const int64_t swap = a;
          a = b, b = swap;
        }
        if (b < g) block(a, b, int(t), wanted, body, visits, false, false);
      });
  }

  // Dot products → distances, in the scratch memory.
  void distances(Tile<T>& tile, int thread) const {
    if (problem_.similarity == Similarity::dot) return;
    T* out = scratch_[thread].s.get();
    const T* squares = columns().square.get() + tile.j0;
    for (int r = 0; r < tile.rows; ++r) {
      const Vec<T> own = broadcast(rows().square[tile.i0 + r]);
      const T* s = tile.s + r * kTile;
      for (int k = 0; k < tile.columns; k += kWidth<T>) {
        const Vec<T> squared = at_least((own + load(squares + k)) - T(2) * load(s + k), Vec<T>{});
        store(out + r * kTile + k, problem_.similarity == Similarity::euclidean ? sqrt_lanes<T>(squared) : squared);
      }
    }
    tile.s = out;
    range(tile, tile.s, tile.low, tile.high);
  }

 private:
  void cut(int threads) {
    const int64_t wanted = symmetric() && threads > 1 ? 2 * int64_t(threads) : threads;
    row_tiling_.cut(problem_.rows, wanted);
    if (symmetric()) {
      threads_ = row_tiling_.groups > 1 ? int((row_tiling_.groups + 1) / 2) : 1;
      return;
    }
    column_tiling_.cut(problem_.columns, wanted);
    const int64_t least = row_tiling_.groups < column_tiling_.groups ? row_tiling_.groups : column_tiling_.groups;
    if (row_tiling_.groups != least) row_tiling_.cut(problem_.rows, least);
    if (column_tiling_.groups != least) column_tiling_.cut(problem_.columns, least);
    threads_ = int(least);
  }

  template <class Wanted, class Body, class Visits>
  void block(int64_t row_group, int64_t column_group, int thread, const Wanted& wanted, const Body& body,
             Visits& visits, bool first, bool last) {
    const Tiling& ct = symmetric() ? row_tiling_ : column_tiling_;
    Scratch<T>& scratch = scratch_[thread];
    if (!scratch.s) {
      scratch.s.allocate(kTile * kTile), scratch.w.allocate(kTile * kTile);
      if (guided()) scratch.t.allocate(kTile * kTile);
    }
    for (int64_t j = ct.group_start[column_group]; j < ct.group_start[column_group + 1]; ++j) {
      const int width = int(ct.start[j + 1] - ct.start[j]);
      if (!symmetric()) visits.enter(ct.start[j], width, first, thread);
      for (int64_t i = row_tiling_.group_start[row_group]; i < row_tiling_.group_start[row_group + 1]; ++i) {
        if (symmetric() && i > j) continue;
        Tile<T> tile;
        tile.i0 = row_tiling_.start[i], tile.j0 = ct.start[j];
        tile.rows = int(row_tiling_.start[i + 1] - tile.i0), tile.columns = width;
        tile.diagonal = symmetric() && i == j;
        if (!wanted(tile)) continue;
        look_ahead(tile, i, j, row_group, column_group);
        similarities(tile, i, j, thread);
        tile.t = nullptr;
        if (guided()) {
          tile.t = scratch.t.get();
          multiply(guide_, scratch.guide_columns, tile, j, tile.t);
          range(tile, tile.t, tile.t_low, tile.t_high);
        }
        body(tile, thread);
      }
      if (!symmetric()) visits.leave(ct.start[j], width, last, thread);
    }
  }

  void look_ahead(Tile<T>& tile, int64_t i, int64_t j, int64_t row_group, int64_t column_group) const {
    tile.next_i0 = 0, tile.next_rows = 0, tile.next_s = nullptr;
    ++i;
    if (i == row_tiling_.group_start[row_group + 1] || (symmetric() && i > j))
      i = row_tiling_.group_start[row_group], ++j;
    if (j == (symmetric() ? row_tiling_ : column_tiling_).group_start[column_group + 1]) return;
    tile.next_i0 = row_tiling_.start[i], tile.next_rows = int(row_tiling_.start[i + 1] - tile.next_i0);
    if (cached_ && panel_cache().tiles()[slot(i, j)].present) tile.next_s = kept(i, j);
  }
  int64_t slot(int64_t i, int64_t j) const { return symmetric() ? j * (j + 1) / 2 + i : i * column_tiling_.tiles + j; }
  T* kept(int64_t i, int64_t j) const {
    return static_cast<T*>(panel_cache().data()) + slot(i, j) * row_tiling_.largest * kTile;
  }

  void similarities(Tile<T>& tile, int64_t i, int64_t j, int thread) {
    Scratch<T>& scratch = scratch_[thread];
    PanelCache::TileInfo* info = nullptr;
    tile.s = scratch.s.get();
    if (cached_) {
      info = panel_cache().tiles() + slot(i, j);
      tile.s = kept(i, j);
      tile.low = T(info->low), tile.high = T(info->high);
      if (info->present) return;
    }
    multiply(sides_, scratch.columns, tile, j, tile.s);
    range(tile, tile.s, tile.low, tile.high);
    if (info) *info = {true, double(tile.low), double(tile.high)};
  }

  const Side<T>& columns_of(const Product<T>& product) const { return symmetric() ? product.rows : product.columns; }

  static const T* column_rows(const Side<T>& c, ColumnTile<T>& scratch, int64_t first, int count) {
    if (c.data) return c.data.get() + first * c.ld;
    if (!scratch.staged) scratch.staged.allocate(kTile * c.ld);
    if (scratch.staged_tile != first) c.stage(first, count, scratch.staged.get());
    scratch.staged_tile = first;
    return scratch.staged.get();
  }

  // The dot products of a tile → out (rows, kTile); j: which column tile it is.
  void multiply(const Product<T>& product, ColumnTile<T>& scratch, const Tile<T>& tile, int64_t j, T* out) const {
    const Side<T>&r = product.rows, &c = columns_of(product);
    if (!scratch.packed) scratch.packed.allocate(kTile * c.features);
    if (scratch.packed_tile != j) {
      pack_columns(column_rows(c, scratch, tile.j0, tile.columns), c.ld, tile.columns, c.features,
                   scratch.packed.get());
      scratch.packed_tile = j;
    }
    Ahead ahead;
    ahead.add(r.data.get() + tile.next_i0 * r.ld, tile.next_rows * r.ld);
    gemm_similarity(r.data.get() + tile.i0 * r.ld, r.ld, tile.rows, scratch.packed.get(), tile.columns, c.features, out,
                    int64_t(kTile), ahead);
  }

  // Smallest and largest of a tile's products; infinite where it holds a NaN, so that no bound speaks for it.
  static void range(const Tile<T>& tile, const T* products, T& least, T& most) {
    Vec<T> low = broadcast(T(INFINITY)), high = broadcast(T(-INFINITY));
    MaskVec<T> bad{};
    bool bad_rest = false;
    const int whole = tile.columns / kWidth<T> * kWidth<T>;
    T low_rest = T(INFINITY), high_rest = T(-INFINITY);
    for (int r = 0; r < tile.rows; ++r) {
      const T* s = products + r * kTile;
      for (int k = 0; k < whole; k += kWidth<T>) {
        const Vec<T> v = load(s + k);
        low = v < low ? v : low;
        high = v > high ? v : high;
        bad |= MaskVec<T>(v != v);
      }
      for (int k = whole; k < tile.columns; ++k) {
        if (s[k] < low_rest) low_rest = s[k];
        if (s[k] > high_rest) high_rest = s[k];
        bad_rest |= s[k] != s[k];
      }
    }
    for (int l = 0; l < kWidth<T>; ++l) {
      if (low[l] < low_rest) low_rest = low[l];
      if (high[l] > high_rest) high_rest = high[l];
    }
    least = low_rest, most = high_rest;
    if (bad_rest || any_lane<T>(bad)) least = T(-INFINITY), most = T(INFINITY);
  }

  const Problem<T>& problem_;
  Order row_order_, column_order_;
  Product<T> sides_, guide_;
  Tiling row_tiling_, column_tiling_;
  Buffer<int64_t> excluded_;
  Scratch<T>* scratch_ = nullptr;
  int threads_ = 1;
  bool cached_ = false, locked_ = false;
};
