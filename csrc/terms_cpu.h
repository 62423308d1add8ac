// A term as the row loops read it, and the loops over one row of a tile that statistics and weights share. Included per
// instruction set.
//
// A term is evaluated in a direction: `to_row`, where row i owns the statistic and the columns are reduced, and
// `to_column`, where column j owns it. A self-similarity evaluates a tile off the diagonal in both.

// Values along one side, by position, padded so that whole vectors can be read past the end.
template <class T>
struct Along {
  Buffer<T> data;
  void gather(const T* values, const Side<T>& side) {
    data.allocate(side.padded() + kTile);
    for (int64_t p = 0; p < side.count; ++p) data[p] = values[side.index[p]];
    for (int64_t p = side.count; p < side.padded() + kTile; ++p) data[p] = 0;
  }
  void zeros(const Side<T>& side) {
    data.allocate(side.padded() + kTile);
    data.zero(side.padded() + kTile);
  }
  explicit operator bool() const { return bool(data); }
};

template <class T>
struct TermData {
  const Term<T>* term = nullptr;
  const Side<T>* owner = nullptr;
  const Side<T>* other = nullptr;
  Along<T> scale, offset, above, below;  // owner side; empty where uniform
  Along<T> other_offset, weight;         // other side; empty where absent
  // A logsumexp of an identity score commutes with its owner's offset, which is then added at the end, in double
  // precision: z stays one function of s for all pairs, and a small result keeps its digits.
  Along<T> late_offset;
  Buffer<double> state;  // (owners, reduction_state)
  // Backward only, owner side:
  Along<T> cotangent, statistic;  // g; logsumexp of softmax-type terms without late offset, 0 where empty
  Buffer<double> exact;           // the same logsumexp with all its digits
  Along<T> mean;                  // of SOFTMAX_MEAN
  Along<T> log_weight;            // other side, of softmax-type terms
  Buffer<double> dscale, doffset, dother, dweight;

  bool thresholds() const { return term->has_above || term->has_below; }
  bool weighed() const { return term->guide == Guide::weight; }  // by the second product
  bool softmax() const { return term->reduction == Reduction::logsumexp || term->reduction == Reduction::softmax_mean; }
  // z is one affine function of s for all pairs, so both directions share it.
  bool uniform() const {
    return term->scale.uniform() && !offset && !term->other_offset && !term->weight && term->combine == Combine::add &&
           (term->guide == Guide::none || term->guide == Guide::threshold);
  }
  T offset_number() const { return late_offset ? T(0) : term->offset.number; }
  int offset_index() const { return late_offset ? -1 : term->offset_index; }

  void gather(const Term<T>& t, const Walk<T>& walk) {
    term = &t;
    const bool rows = t.axis == Axis::rows || walk.symmetric();
    owner = rows ? &walk.rows() : &walk.columns();
    other = rows ? &walk.columns() : &walk.rows();
    if (!t.scale.uniform()) scale.gather(t.scale.data, *owner);
    const bool late = t.reduction == Reduction::logsumexp && t.score == Score::identity && !t.other_offset;
    if (!t.offset.uniform()) (late ? late_offset : offset).gather(t.offset.data, *owner);
    if (t.has_above && !t.above.uniform()) above.gather(t.above.data, *owner);
    if (t.has_below && !t.below.uniform()) below.gather(t.below.data, *owner);
    if (t.other_offset) other_offset.gather(t.other_offset, *other);
    if (t.weight) weight.gather(t.weight, *other);
  }
  // What z is an affine function of, and what thresholds are compared with, of a row of s and t.
  const T* source(const T* s, const T* t) const { return term->guide == Guide::logits ? t : s; }
  const T* compared(const T* s, const T* t) const { return term->guide == Guide::threshold ? t : s; }
  T scale_at(int64_t p) const { return scale ? scale.data[p] : term->scale.number; }
  T offset_at(int64_t p) const { return offset ? offset.data[p] : offset_number(); }
  T above_at(int64_t p) const { return above ? above.data[p] : term->above.number; }
  T below_at(int64_t p) const { return below ? below.data[p] : term->below.number; }
};

// One evaluation of a pass: a row-directed term, a column-directed term, or both at once where they share z (a
// self-similarity, or CLIP's pair of row and column statistics).
template <class T>
struct Item {
  TermData<T>* to_row = nullptr;
  TermData<T>* to_column = nullptr;
  const TermData<T>* any() const { return to_row ? to_row : to_column; }
};

// Does either direction of an item, where it is taken, have thresholds?
template <class T>
bool thresholds(const TermData<T>* to_row, const TermData<T>* to_column) {
  return (to_row && to_row->thresholds()) || (to_column && to_column->thresholds());
}

// Buffers for one row of a tile.
template <class T>
struct RowBuffers {
  static constexpr int kMasks = 5;
  alignas(64) T f[kTile], slope[kTile], e[kTile], offsets[kTile], dz[kTile], dv[kTile];
  alignas(64) Lane<T> base[kMasks][kTile];  // per mask
  alignas(64) Lane<T> keep_row[kTile], keep_column[kTile];
  bool built[kMasks];
};

template <class T>
inline int whole(int columns) {
  return (columns + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// Does a row of this tile need lane masks for this mask?
template <class T>
bool needs_base(const Walk<T>& walk, const Tile<T>& tile, Coverage coverage) {
  if (coverage != Coverage::full || tile.columns % kWidth<T> != 0) return true;
  if (walk.problem().exclude_self && tile.i0 < tile.j0 + tile.columns && tile.j0 < tile.i0 + tile.rows) return true;
  const int64_t* excluded = walk.excluded_positions();
  if (excluded)
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t column = excluded[tile.i0 + r] - tile.j0;
      if (column >= 0 && column < tile.columns) return true;
    }
  return false;
}

// Lanes of row r that a mask keeps, before thresholds.
template <class T>
const Lane<T>* base_lanes(const Walk<T>& walk, const Tile<T>& tile, int r, Mask mask, RowBuffers<T>& buffers) {
  Lane<T>* out = buffers.base[int(mask)];
  if (buffers.built[int(mask)]) return out;
  buffers.built[int(mask)] = true;
  const int n = whole<T>(tile.columns);
  const int64_t row = tile.i0 + r;
  if (mask_uses_labels(mask)) {
    const MaskVec<T> label = MaskVec<T>{} + walk.rows().label_lanes[row];
    const Lane<T>* labels = walk.columns().label_lanes.get() + tile.j0;
    const MaskVec<T> flip = mask == Mask::same ? MaskVec<T>{} : all_lanes<T>();
    for (int j = 0; j < n; j += kWidth<T>) store_mask<T>(out + j, (load_mask<T>(labels + j) == label) ^ flip);
  } else if (mask_uses_pairs(mask)) {
    const bool* given = walk.problem().pair_mask + walk.rows().index[row] * walk.problem().columns;
    const int64_t* index = walk.columns().index + tile.j0;
    for (int j = 0; j < tile.columns; ++j) out[j] = mask_keeps(mask, false, given[index[j]]) ? -1 : 0;
  } else {
    for (int j = 0; j < n; j += kWidth<T>) store_mask<T>(out + j, all_lanes<T>());
  }
  for (int j = tile.columns; j < n; ++j) out[j] = 0;
  if (walk.problem().exclude_self) {
    const int64_t self = row - tile.j0;
    if (self >= 0 && self < tile.columns) out[self] = 0;
  }
  if (walk.excluded_positions()) {
    const int64_t column = walk.excluded_positions()[row] - tile.j0;
    if (column >= 0 && column < tile.columns) out[column] = 0;
  }
  return out;
}

// Thresholds of one direction on top of `base` (nullptr: all lanes). Returns nullptr where all lanes stay; `any` says
// whether one does.
template <class T, bool TO_ROW>
FP_INLINE const Lane<T>* keep_lanes_of(const TermData<T>& data, const Lane<T>* base, const T* s, const T* t, int n,
                                       int64_t row, int64_t column, Lane<T>* out, bool& any) {
  any = true;
  // A pair of weight 0 is no part of a softmax, however large its score.
  const bool weighed = data.softmax() && data.weighed();
  const bool weighted = data.softmax() && data.weight;
  if (weighted && !TO_ROW && data.weight.data[row] == 0) return any = false, base;
  const T* weight = weighted && TO_ROW ? data.weight.data.get() + column : nullptr;
  if (!data.thresholds() && !weight && !weighed) return base;
  const T* compared = data.compared(s, t);
  const T* above = !TO_ROW && data.above ? data.above.data.get() + column : nullptr;
  const T* below = !TO_ROW && data.below ? data.below.data.get() + column : nullptr;
  const T above_all = data.term->has_above ? data.above_at(above ? 0 : TO_ROW ? row : column) : T(-INFINITY);
  const T below_all = data.term->has_below ? data.below_at(below ? 0 : TO_ROW ? row : column) : T(INFINITY);
  MaskVec<T> some{};
  for (int j = 0; j < n; j += kWidth<T>) {
    const Vec<T> v = load(compared + j);
    MaskVec<T> keep = base ? load_mask<T>(base + j) : all_lanes<T>();
    if (data.term->has_above) keep &= ~MaskVec<T>(v <= (above ? load(above + j) : broadcast(above_all)));
    if (data.term->has_below) keep &= ~MaskVec<T>(v >= (below ? load(below + j) : broadcast(below_all)));
    if (weight) keep &= MaskVec<T>(load(weight + j) != 0);
    if (weighed) keep &= ~MaskVec<T>(load(t + j) <= 0);
    store_mask<T>(out + j, keep);
    some |= keep;
  }
  any = any_lane<T>(some);
  return out;
}

// --- z and its score over a row -----------------------------------------------------------------------------------------

template <class T, Score S, bool SLOPE, bool SCALES, bool OFFSETS>
void score_loop(const T* s, int n, const T* scales, T scale, const T* offsets, T offset, T constant, T* value,
                T* slope) {
  for (int j = 0; j < n; j += kWidth<T>) {
    const Vec<T> a = SCALES ? load(scales + j) : broadcast(scale);
    const Vec<T> o = OFFSETS ? load(offsets + j) : broadcast(offset);
    const auto both = score_value_slope<S, VectorMath<T>>(a * load(s + j) + o, broadcast(constant));
    store(value + j, both.value);
    if (SLOPE) store(slope + j, both.slope);
  }
}

template <class T, bool SLOPE, bool SCALES, bool OFFSETS>
void score_dispatch(Score score, const T* s, int n, const T* scales, T scale, const T* offsets, T offset, T constant,
                    T* value, T* slope) {
#define FP_CASE(NAME)                                                                                                \
  case Score::NAME:                                                                                                  \
    return score_loop<T, Score::NAME, SLOPE, SCALES, OFFSETS>(s, n, scales, scale, offsets, offset, constant, value, \
                                                              slope);
  switch (score) {
    FP_CASE(identity)
    FP_CASE(hinge)
    FP_CASE(softplus)
    FP_CASE(square)
    FP_CASE(squared_hinge)
    FP_CASE(circle)
    FP_CASE(softcap)
    FP_CASE(log_cosh)
  }
#undef FP_CASE
}

// log(e^p + e^q) and the share of p.
template <class T>
FP_INLINE Vec<T> logaddexp_lanes(Vec<T> p, Vec<T> q, Vec<T>& share) {
  const Vec<T> difference = p - q;
  const Vec<T> u = exp_lanes<T>(difference < 0 ? difference : -difference);
  share = (difference < 0 ? u : broadcast(T(1))) / (u + T(1));
  const Vec<T> top = difference < 0 ? q : p;
  const Vec<T> sum = top + log1p_unit<T>(u);
  // Both -inf (or equal infinities): the difference is NaN, the answer is the larger.
  return p == q ? p + T(0.693147180559945309) : sum;
}

// value (and slope) of the score of z over one row in one direction; `share`: derivative of the combined offset with
// respect to the owner's, for LOGADDEXP.
template <class T, bool TO_ROW>
void score_row(const TermData<T>& data, const T* s, int n, int64_t row, int64_t column, RowBuffers<T>& buffers,
               T* value, T* slope, T* share) {
  const Term<T>& term = *data.term;
  const T* scales = !TO_ROW && data.scale ? data.scale.data.get() + column : nullptr;
  const T scale = scales ? T(0) : data.scale_at(TO_ROW ? row : column);
  const T* own = !TO_ROW && data.offset ? data.offset.data.get() + column : nullptr;
  const T own_all = own ? T(0) : data.offset_at(TO_ROW ? row : column);
  const T* offsets = own;
  T offset = own_all;
  if (data.other_offset) {
    const T* others = TO_ROW ? data.other_offset.data.get() + column : nullptr;
    const T other_all = TO_ROW ? T(0) : data.other_offset.data[row];
    for (int j = 0; j < n; j += kWidth<T>) {
      const Vec<T> p = own ? load(own + j) : broadcast(own_all);
      const Vec<T> q = others ? load(others + j) : broadcast(other_all);
      Vec<T> part = broadcast(T(1));
      store(buffers.offsets + j, term.combine == Combine::add ? p + q : logaddexp_lanes<T>(p, q, part));
      if (share) store(share + j, part);
    }
    offsets = buffers.offsets;
  }
#define FP_DISPATCH(SLOPE, SCALES, OFFSETS)                                                                         \
  score_dispatch<T, SLOPE, SCALES, OFFSETS>(term.score, s, n, scales, scale, offsets, offset, term.constant, value, \
                                            slope)
  if (slope) {
    if (scales)
      offsets ? FP_DISPATCH(true, true, true) : FP_DISPATCH(true, true, false);
    else
      offsets ? FP_DISPATCH(true, false, true) : FP_DISPATCH(true, false, false);
  } else {
    if (scales)
      offsets ? FP_DISPATCH(false, true, true) : FP_DISPATCH(false, true, false);
    else
      offsets ? FP_DISPATCH(false, false, true) : FP_DISPATCH(false, false, false);
  }
#undef FP_DISPATCH
}

// --- sums over a row ----------------------------------------------------------------------------------------------------

// v_j *= t_j.
template <class T>
FP_INLINE void weigh(T* v, const T* t, int n) {
  for (int j = 0; j < n; j += kWidth<T>) store(v + j, load(v + j) * load(t + j));
}

// Sum of the kept v_j w_j; w nullptr: 1.
template <class T>
FP_INLINE T kept_sum(const T* v, const T* w, const Lane<T>* keep, int n) {
  Vec<T> sum{};
  for (int j = 0; j < n; j += kWidth<T>) {
    Vec<T> x = load(v + j);
    if (w) x *= load(w + j);
    sum += keep ? keep_lanes<T>(load_mask<T>(keep + j), x) : x;
  }
  return sum_lanes<T>(sum);
}

// Largest kept f_j, -inf without any; NaN where one is NaN.
template <class T>
FP_INLINE T kept_max(const T* f, const Lane<T>* keep, int n) {
  Vec<T> top = broadcast(T(-INFINITY));
  MaskVec<T> bad{};
  for (int j = 0; j < n; j += kWidth<T>) {
    const Vec<T> v = load(f + j);
    const MaskVec<T> lanes = keep ? load_mask<T>(keep + j) : all_lanes<T>();
    top = MaskVec<T>(v > top) & lanes ? v : top;
    bad |= MaskVec<T>(v != v) & lanes;
  }
  T best = T(-INFINITY);
  for (int l = 0; l < kWidth<T>; ++l)
    if (top[l] > best) best = top[l];
  return any_lane<T>(bad) ? T(NAN) : best;
}

// e_j = exp(scale s_j + offset).
template <class T>
FP_INLINE void exp_affine(const T* s, T scale, T offset, int n, T* e) {
  for (int j = 0; j < n; j += kWidth<T>) store(e + j, exp_lanes<T>(scale * load(s + j) + offset));
}

// Bounds of z over a tile, for one direction: interval arithmetic on scale, s and offsets.
template <class T>
struct Bounds {
  T low, high;
};
template <class T>
Bounds<T> along_bounds(const Along<T>& along, T number, int64_t first, int count) {
  if (!along) return {number, number};
  Bounds<T> b{along.data[first], along.data[first]};
  for (int k = 1; k < count; ++k) {
    const T v = along.data[first + k];
    if (v < b.low) b.low = v;
    if (v > b.high) b.high = v;
  }
  return b;
}

// An upper bound of the score over a tile in one direction: the shift of its exponentials.
template <class T>
T score_bound(const TermData<T>& data, const Tile<T>& tile, bool to_row, T low, T high) {
  const int64_t first = to_row ? tile.i0 : tile.j0, other_first = to_row ? tile.j0 : tile.i0;
  const int count = to_row ? tile.rows : tile.columns, other_count = to_row ? tile.columns : tile.rows;
  const Bounds<T> a = along_bounds(data.scale, data.term->scale.number, first, count);
  Bounds<T> o = along_bounds(data.offset, data.offset_number(), first, count);
  if (data.other_offset) {
    const Bounds<T> q = along_bounds(data.other_offset, T(0), other_first, other_count);
    if (data.term->combine == Combine::add) {
      o = {o.low + q.low, o.high + q.high};
    } else {
      const T top = o.high > q.high ? o.high : q.high;
      o = {o.low < q.low ? o.low : q.low, top + T(0.7)};
    }
  }
  const T corners[4] = {a.low * low, a.low * high, a.high * low, a.high * high};
  T z_low = corners[0], z_high = corners[0];
  for (T z : corners) {
    if (z < z_low) z_low = z;
    if (z > z_high) z_high = z;
  }
  return score_upper(data.term->score, data.term->constant, z_low + o.low, z_high + o.high);
}

// Logits so near to each other may share a shift, whichever of them are kept.
constexpr double kNear = 20;

// Smallest and largest s of the pairs that the mask of a uniform term keeps; infinite where one is NaN, so that no bound
// speaks for it. CLIP's own pairs, say, are far above all others and no part of their sum. Those of the whole tile where
// it is not masked, where the mask is read pair by pair, and where all logits are near each other.
template <class T>
Bounds<T> kept_range(const Walk<T>& walk, const Tile<T>& tile, const TermData<T>& any, bool masked,
                     RowBuffers<T>& buffers) {
  const Mask mask = any.term->mask;
  const bool near =
      any.term->score == Score::identity && std::abs(any.term->scale.number) * (tile.high - tile.low) <= T(kNear);
  if (!masked || near || mask_uses_pairs(mask)) return {tile.low, tile.high};
  Vec<T> low = broadcast(T(INFINITY)), high = broadcast(T(-INFINITY));
  MaskVec<T> bad{};
  for (int r = 0; r < tile.rows; ++r) {
    memset(buffers.built, 0, sizeof buffers.built);
    const Lane<T>* base = base_lanes(walk, tile, r, mask, buffers);
    for (int j = 0; j < tile.columns; j += kWidth<T>) {
      const Vec<T> v = load(tile.s + r * kTile + j);
      const MaskVec<T> keep = load_mask<T>(base + j);
      low = MaskVec<T>(v < low) & keep ? v : low;
      high = MaskVec<T>(v > high) & keep ? v : high;
      bad |= MaskVec<T>(v != v) & keep;
    }
  }
  Bounds<T> found{T(INFINITY), T(-INFINITY)};
  for (int l = 0; l < kWidth<T>; ++l) {
    if (low[l] < found.low) found.low = low[l];
    if (high[l] > found.high) found.high = high[l];
  }
  if (any_lane<T>(bad)) found = {T(-INFINITY), T(INFINITY)};
  return found;
}

// --- items ----------------------------------------------------------------------------------------------------------------

// Do a row-directed and a column-directed term share z, mask and reduction?
template <class T>
bool shares_z(const TermData<T>& a, const TermData<T>& b) {
  const Term<T>&p = *a.term, &q = *b.term;
  return a.uniform() && b.uniform() && p.reduction == Reduction::logsumexp && q.reduction == Reduction::logsumexp &&
         p.score == q.score && p.mask == q.mask && p.constant == q.constant && p.scale.number == q.scale.number &&
         a.offset_number() == b.offset_number() && p.scale_index == q.scale_index &&
         a.offset_index() == b.offset_index();
}

// The caller deletes the result.
template <class T>
Item<T>* make_items(const Walk<T>& walk, TermData<T>* data, int count, int& items) {
  Item<T>* list = new Item<T>[count + 1];
  items = 0;
  if (walk.symmetric()) {
    for (int t = 0; t < count; ++t) list[items++] = {&data[t], &data[t]};
    return list;
  }
  bool* taken = new bool[count + 1]();
  for (int t = 0; t < count; ++t) {
    if (taken[t]) continue;
    const bool row = data[t].term->axis == Axis::rows;
    int partner = -1;
    for (int u = t + 1; u < count && partner < 0; ++u)
      if (!taken[u] && (data[u].term->axis == Axis::rows) != row && shares_z(data[t], data[u])) partner = u;
    if (partner >= 0) taken[partner] = true;
    TermData<T>* other = partner >= 0 ? &data[partner] : nullptr;
    list[items++] = row ? Item<T>{&data[t], other} : Item<T>{other, &data[t]};
  }
  delete[] taken;
  return list;
}

template <class T>
bool wanted_tile(const Walk<T>& walk, const Item<T>* items, int count, const Tile<T>& tile) {
  for (int k = 0; k < count; ++k)
    if (walk.coverage(items[k].any()->term->mask, tile) != Coverage::empty) return true;
  return false;
}

// Do thresholds alone drop every pair of a tile in one direction? Of a tile with NaN, whose bounds are infinite, never.
template <class T>
bool outside(const TermData<T>& data, const Tile<T>& tile, bool to_row) {
  const bool guided = data.term->guide == Guide::threshold;
  const T tile_low = guided ? tile.t_low : tile.low, tile_high = guided ? tile.t_high : tile.high;
  if (tile_low == T(-INFINITY) || tile_high == T(INFINITY)) return false;
  const int64_t first = to_row ? tile.i0 : tile.j0;
  const int count = to_row ? tile.rows : tile.columns;
  if (data.term->has_above && tile_high <= along_bounds(data.above, data.term->above.number, first, count).low)
    return true;
  return data.term->has_below && tile_low >= along_bounds(data.below, data.term->below.number, first, count).high;
}
