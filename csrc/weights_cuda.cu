// Second pass: the weight of every pair of a panel, dL/d<x, y>, and the sums that parameters' gradients need.

#include "collect_cuda.h"
#include "engine_cuda.h"
#include "terms_cuda.h"
#include "tile_cuda.h"

namespace flashpair {
namespace {

// Widest range of logsumexps over which one exponential serves rows and columns: what is then flushed is below exp(-43).
constexpr float kSharedLse = 44;

// A sum of a parameter or of the value, over the columns for each row, or the other way round.
template <class T, int R, bool ROWS>
FP_DEVICE void collect_sum(const Collector<T>& to, const Strip<T, R>& strip, int slot, const T (&entries)[R][kVector],
                           int component) {
  T sums[Side<R, ROWS>::kCount];
  FP_UNROLL
  for (int k = 0; k < Side<R, ROWS>::kCount; ++k) sums[k] = 0;
  FP_EACH_PAIR(R) sums[Side<R, ROWS>::of(r, v)] += entries[r][v];
  if constexpr (ROWS)
    to.template row<R>(slot, strip.row, over_columns(sums, Add{}));
  else
    to.column(component, sums);
}

// The slots whose sums run along the columns of the tile, in the order of their components in shared memory.
constexpr int kColumnComponents = 3;
struct ColumnSlots {
  int slots[kColumnComponents];
  int count;
};
template <class T>
FP_DEVICE ColumnSlots column_slots(const TermCode<T>& term, bool owns_rows) {
  ColumnSlots found{{-1, -1, -1}, 0};
  auto add = [&](int slot) {
    if (slot < 0) return;
    if (found.count == 0) found.slots[0] = slot;
    if (found.count == 1) found.slots[1] = slot;
    if (found.count == 2) found.slots[2] = slot;
    ++found.count;
  };
  if (owns_rows)
    add(term.weight_slot), add(term.other_slot);
  else
    add(term.value_slot), add(term.scale_slot), add(term.offset_slot);
  return found;
}

template <class T, int R, bool ROWS>
FP_DEVICE void cotangents(const TermCode<T>& term, const Strip<T, R>& strip, T (&out)[Side<R, ROWS>::kCount]) {
  if (term.cotangent) return along<T, R, ROWS>(term.cotangent, strip, out);
  FP_UNROLL
  for (int k = 0; k < Side<R, ROWS>::kCount; ++k) out[k] = 1;
}
// Logsumexps, 0 for owners without pairs.
template <class T, int R, bool ROWS>
FP_DEVICE void logsumexps(const TermCode<T>& term, const Strip<T, R>& strip, T (&out)[Side<R, ROWS>::kCount]) {
  along<T, R, ROWS>(term.lse, strip, out);
  FP_UNROLL
  for (int k = 0; k < Side<R, ROWS>::kCount; ++k) out[k] = out[k] == -infinity<T>() ? T(0) : out[k];
}

// --- one direction, any reduction -----------------------------------------------------------------------------------

// Weights of the reduced side, 1 without.
template <class T, int R, bool ROWS>
FP_DEVICE void weights_of(const TermCode<T>& term, const Strip<T, R>& strip, T (&out)[Side<R, ROWS>::kCount]) {
  if (term.weight) return along<T, R, ROWS>(term.weight, strip, out);
  FP_UNROLL
  for (int k = 0; k < Side<R, ROWS>::kCount; ++k) out[k] = 1;
}

// u times d combine(p, q) / dp for the owner's offset p, dq for the other's.
template <class T, int R, bool ROWS>
FP_DEVICE void offset_shares(const TermCode<T>& term, const Strip<T, R>& strip, bool owner, const T (&u)[R][kVector],
                             T (&out)[R][kVector]) {
  using Own = Side<R, ROWS>;
  using Other = Side<R, !ROWS>;
  FP_EACH_PAIR(R) out[r][v] = u[r][v];
  if (!term.logaddexp || !term.other_offset) return;
  T p[Own::kCount], q[Other::kCount];
  along<T, R, ROWS>(term.offset, strip, p);
  along<T, R, !ROWS>(term.other_offset, strip, q);
  FP_EACH_PAIR(R) {
    const T mine = p[Own::of(r, v)], theirs = q[Other::of(r, v)];
    const T share = owner ? logaddexp_share(mine, theirs) : logaddexp_share(theirs, mine);
    out[r][v] = u[r][v] == 0 ? T(0) : u[r][v] * share;
  }
}

// Adds dL/ds of one term to `ds` and collects its sums. With a == owner, b == other, w == weight, g == cotangent:
//   sum           u = g w phi'          dL/dw = g phi
//   logsumexp     u = g p phi'          dL/dw = g p / w            p = w exp(phi - lse)
//   softmax mean  u = g p phi' (s - m)  dL/dw = g p (s - m) / w    and g p goes to s directly
// dL/da = sum u s, dL/dp = sum u dcombine/dp.
template <class T, int R, bool ROWS>
FP_DEVICE void directed(const Pass<T>& pass, const TermCode<T>& term, const Strip<T, R>& strip, const Collector<T>& to,
                        bool sums, T (&ds)[R][kVector]) {
  using Own = Side<R, ROWS>;
  using Other = Side<R, !ROWS>;
  const unsigned bits = keep_bits<T, R, ROWS>(pass, term, strip);
  T score[R][kVector], u[R][kVector];
  evaluate<T, R, ROWS, true>(pass, term, strip, score, u);  // u: the slope, for now
  const bool mean = term.reduction == Reduction::softmax_mean;
  if (sums && term.value_slot >= 0) {
    T value[R][kVector], weight[Other::kCount];
    weights_of<T, R, !ROWS>(term, strip, weight);
    FP_EACH_PAIR(R) value[r][v] = weight[Other::of(r, v)] * score[r][v];
    weigh(pass, term, strip, value);
    FP_EACH_PAIR(R) value[r][v] = has_bit(bits, r, v) ? value[r][v] : T(0);
    collect_sum<T, R, ROWS>(to, strip, term.value_slot, value, 0);
  }
  if (is_softmax(term.reduction)) {
    add_log_weight<T, R, ROWS>(pass, term, strip, score);
    {
      T g[Own::kCount], lse[Own::kCount];
      cotangents<T, R, ROWS>(term, strip, g);
      logsumexps<T, R, ROWS>(term, strip, lse);
      FP_EACH_PAIR(R)
      score[r][v] = has_bit(bits, r, v) ? g[Own::of(r, v)] * exp_of(score[r][v] - lse[Own::of(r, v)]) : T(0);
    }
    if (mean) {
      T means[Own::kCount];
      along<T, R, ROWS>(term.mean, strip, means);
      FP_EACH_PAIR(R) {
        ds[r][v] += score[r][v];
        score[r][v] = has_bit(bits, r, v) && !term.detach ? score[r][v] * (strip.s[r][v] - means[Own::of(r, v)]) : T(0);
      }
    }
    FP_EACH_PAIR(R) u[r][v] = has_bit(bits, r, v) ? score[r][v] * u[r][v] : T(0);
    if (sums && term.weight_slot >= 0) {
      T weight[Other::kCount];
      weights_of<T, R, !ROWS>(term, strip, weight);
      FP_EACH_PAIR(R) score[r][v] = score[r][v] / (weight[Other::of(r, v)] == 0 ? T(1) : weight[Other::of(r, v)]);
    }
  } else {
    T g[Own::kCount], weight[Other::kCount];
    cotangents<T, R, ROWS>(term, strip, g);
    weights_of<T, R, !ROWS>(term, strip, weight);
    weigh(pass, term, strip, u);
    FP_EACH_PAIR(R) {
      const T own = g[Own::of(r, v)];
      u[r][v] = has_bit(bits, r, v) ? own * weight[Other::of(r, v)] * u[r][v] : T(0);
      score[r][v] = has_bit(bits, r, v) ? own * score[r][v] : T(0);
    }
  }
  if (sums && term.weight_slot >= 0) collect_sum<T, R, !ROWS>(to, strip, term.weight_slot, score, 0);
  {
    T scale[Own::kCount];
    along<T, R, ROWS>(term.scale, strip, scale);
    FP_EACH_PAIR(R) ds[r][v] += scale[Own::of(r, v)] * u[r][v];
  }
  if (!sums) return;
  // Components of column sums count up in the order of `column_slots`.
  int own_component = term.value_slot >= 0;
  if (term.scale_slot >= 0) {
    T centre[Own::kCount];
    FP_UNROLL
    for (int k = 0; k < Own::kCount; ++k) centre[k] = 0;
    // Sum of p (s - mean) is 0: leaving the mean out of the lever avoids its rounding.
    if (mean && term.score == Score::identity) along<T, R, ROWS>(term.mean, strip, centre);
    FP_EACH_PAIR(R)
    score[r][v] = has_bit(bits, r, v) ? u[r][v] * (strip.s[r][v] - centre[Own::of(r, v)]) : T(0);
    collect_sum<T, R, ROWS>(to, strip, term.scale_slot, score, own_component++);
  }
  if (term.offset_slot >= 0) {
    offset_shares<T, R, ROWS>(term, strip, true, u, score);
    collect_sum<T, R, ROWS>(to, strip, term.offset_slot, score, own_component);
  }
  if (term.other_slot >= 0) {
    offset_shares<T, R, ROWS>(term, strip, false, u, score);
    collect_sum<T, R, !ROWS>(to, strip, term.other_slot, score, term.weight_slot >= 0);
  }
}

// --- rows and columns with one z: sums and logsumexps without weights --------------------------------------------------

// A pair's weight is e^(score - lse_i) g_i from its row and e^(score - lse_j) g_j from its column: with c below every lse
// of the strip both are e^(score - c) times a factor of one owner, so that a pair takes one exponential. The parameters
// are single numbers here, so that both directions' sums go to the rows.
template <class T, int R>
FP_DEVICE void both_directions(const Pass<T>& pass, const TermCode<T>& row, const TermCode<T>& column,
                               const Strip<T, R>& strip, const Collector<T>& to, T (&ds)[R][kVector]) {
  const unsigned row_bits = keep_bits<T, R, true>(pass, row, strip);
  const unsigned column_bits = keep_bits<T, R, false>(pass, column, strip);
  const bool count_columns = !pass.symmetric || pass.mirror_sums;
  T score[R][kVector], part[R][kVector];  // part: the slope, then what counts for the sums
  evaluate<T, R, true, true>(pass, row, strip, score, part);
  const T scale = row.scale.data ? row.scale.data[0] : row.scale.number;
  auto add = [&](int r, int v, T by_row, T by_column) {
    // The slope of a pair that is not kept may be infinite.
    const T a = has_bit(row_bits, r, v) ? by_row * part[r][v] : T(0);
    const T b = has_bit(column_bits, r, v) ? by_column * part[r][v] : T(0);
    ds[r][v] += scale * (a + b);
    part[r][v] = count_columns ? a + b : a;
  };
  T row_g[R], column_g[kVector];
  cotangents<T, R, true>(row, strip, row_g);
  cotangents<T, R, false>(column, strip, column_g);
  if (row.reduction == Reduction::logsumexp) {
    T row_lse[R], column_lse[kVector], top = -infinity<T>(), bottom = infinity<T>();
    logsumexps<T, R, true>(row, strip, row_lse);
    logsumexps<T, R, false>(column, strip, column_lse);
    FP_UNROLL
    for (int r = 0; r < R; ++r) top = larger(top, row_lse[r]), bottom = smaller(bottom, row_lse[r]);
    FP_UNROLL
    for (int v = 0; v < kVector; ++v) top = larger(top, column_lse[v]), bottom = smaller(bottom, column_lse[v]);
    top = over_lanes(top, Larger{}), bottom = over_lanes(bottom, Smaller{});
    if (top - bottom <= T(kSharedLse)) {
      FP_UNROLL
      for (int r = 0; r < R; ++r) row_g[r] *= exp_of(bottom - row_lse[r]);
      FP_UNROLL
      for (int v = 0; v < kVector; ++v) column_g[v] *= exp_of(bottom - column_lse[v]);
      FP_EACH_PAIR(R) {
        const T e = exp_of(score[r][v] - bottom);
        add(r, v, e * row_g[r], e * column_g[v]);
      }
    } else {
      FP_EACH_PAIR(R)
      add(r, v, exp_of(score[r][v] - row_lse[r]) * row_g[r], exp_of(score[r][v] - column_lse[v]) * column_g[v]);
    }
  } else {
    FP_EACH_PAIR(R) add(r, v, row_g[r], column_g[v]);
  }
  if (row.value_slot >= 0) {
    FP_EACH_PAIR(R)
    score[r][v] = (has_bit(row_bits, r, v) ? score[r][v] : T(0)) +
                  (count_columns && has_bit(column_bits, r, v) ? score[r][v] : T(0));
    collect_sum<T, R, true>(to, strip, row.value_slot, score, 0);
  }
  if (row.offset_slot >= 0) collect_sum<T, R, true>(to, strip, row.offset_slot, part, 0);
  if (row.scale_slot >= 0) {
    FP_EACH_PAIR(R) part[r][v] = part[r][v] == 0 ? T(0) : part[r][v] * strip.s[r][v];
    collect_sum<T, R, true>(to, strip, row.scale_slot, part, 0);
  }
}

// --- kernel -----------------------------------------------------------------------------------------------------------

// Sums along the columns of the tile, one strip of every warp at a time.
template <class T>
struct ColumnSums {
  const Collector<T>& to;
  T* totals;   // (column slots, kTileColumns), each column of one thread
  bool first;  // strip of the tile

  FP_DEVICE void add(int component, int slot) const {
    const int column = thread_index();
    if (column >= kTileColumns) return;
    T sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += to.of_warp(component, warp, column);
    T& total = totals[slot * kTileColumns + column];
    total = first ? sum : total + sum;
  }
  // Adds what the warps have left in shared memory for a term.
  FP_DEVICE void add_term(const TermCode<T>& term, bool owns_rows) const {
    const ColumnSlots found = column_slots(term, owns_rows);
    if (found.count == 0) return;
    sync_block();
    add(0, found.slots[0]);
    if (found.count > 1) add(1, found.slots[1]);
    if (found.count > 2) add(2, found.slots[2]);
    sync_block();
  }
  FP_DEVICE void add_slot(int slot) const {
    sync_block();
    add(0, slot);
    sync_block();
  }
  FP_DEVICE void write(int slot) const {
    const int column = thread_index(), j = to.tile_column + column;
    if (slot >= 0 && column < kTileColumns && j < to.pass.end_n)
      to.column_partial(slot, j, totals[slot * kTileColumns + column]);
  }
  FP_DEVICE void write_term(const TermCode<T>& term, bool owns_rows) const {
    const ColumnSlots found = column_slots(term, owns_rows);
    FP_UNROLL
    for (int k = 0; k < 3; ++k) write(found.slots[k]);
  }
};

// The weights of a strip as they are stored; `ds` becomes what was stored.
template <class T, int R, class Out>
FP_DEVICE void store_weights(const Pass<T>& pass, const Strip<T, R>& strip, const WeightsOutput<Out>& output, T factor,
                             T (&ds)[R][kVector]) {
  const int from = strip.column - pass.first_n;
  FP_UNROLL
  for (int r = 0; r < R; ++r) {
    const int i = strip.row + r;
    Out stored[kVector];
    FP_UNROLL
    for (int v = 0; v < kVector; ++v) {
      const bool inside = i < pass.end_b && strip.column + v < pass.end_n;
      stored[v] = narrow(inside ? ds[r][v] * similarity_slope(pass, strip, r, v) * factor : T(0), Out{});
      ds[r][v] = widen(stored[v]);
    }
    if (i < pass.end_b && from < output.stride)
      store4(output.w + int64_t(i - pass.first_b) * output.stride + from, stored);
  }
}

template <class T, class Out>
FP_DEVICE void store_zeros(const Pass<T>& pass, const WeightsOutput<Out>& output, int row, int rows, int column) {
  const int from = column + lane_index() * kVector - pass.first_n;
  Out zeros[kVector];
  FP_UNROLL
  for (int v = 0; v < kVector; ++v) zeros[v] = narrow(T(0), Out{});
  for (int i = row + warp_index(); i < row + rows && i < pass.end_b; i += kWarps)
    if (from < output.stride) store4(output.w + int64_t(i - pass.first_b) * output.stride + from, zeros);
}

template <class T, class Source, class Out>
FP_KERNEL(sizeof(T) == 4 ? 2 : 1)
weights_kernel(const FP_GRID_CONSTANT Pass<T> pass, const Source source, const Partials<T> partials,
               const WeightsOutput<Out> output, int row_slots, int column_slots_count) {
  constexpr int R = kWeightsRows<T>;
  FP_DYNAMIC_SHARED(memory);
  Tile<T, R, Source> tile;
  int tile_b, tile_n;
  tile_of_block(block_index(), pass.tiles_b, pass.tiles_n, tile_b, tile_n);
  const int row = pass.first_b + tile_b * tile.kRows, column = pass.first_n + tile_n * kTileColumns;
  T* shared = reinterpret_cast<T*>(memory + tile.kSharedBytes);
  const Collector<T> to{pass, partials, tile_b, tile_n, shared, column};
  if (!tile_wanted(pass, row, tile.kRows, column, kTileColumns)) {
    to.neutral(row_slots, column_slots_count, row, tile.kRows);
    if (output.w) store_zeros(pass, output, row, tile.kRows, column);
    return;
  }
  tile.load(pass, source, row, column, memory);
  const T factor = output.factor ? T(output.factor[0]) : T(1);
  const bool column_terms_sum = !pass.symmetric || pass.mirror_sums;
  ColumnSums<T> columns{to, shared + kColumnComponents * kWarps * kTileColumns, true};
  const int strips = strips_inside(pass, row, R, tile.kStrips);
  for (int k = 0; k < strips; ++k) {
    const Strip<T, R>& strip = tile.strip(pass, source, k);
    columns.first = k == 0;
    T ds[R][kVector];
    FP_EACH_PAIR(R) ds[r][v] = 0;
    for (int n = 0; n < pass.item_count; ++n) {
      const Item item = pass.items[n];
      if (item.shared) {
        both_directions(pass, pass.terms[item.row], pass.terms[item.column], strip, to, ds);
        continue;
      }
      if (item.row >= 0) {
        directed<T, R, true>(pass, pass.terms[item.row], strip, to, true, ds);
        columns.add_term(pass.terms[item.row], true);
      }
      if (item.column >= 0) {
        directed<T, R, false>(pass, pass.terms[item.column], strip, to, column_terms_sum, ds);
        if (column_terms_sum) columns.add_term(pass.terms[item.column], false);
      }
    }
    if (!output.w) continue;
    store_weights(pass, strip, output, factor, ds);
    // Sums of the rounded weights: rounding errors then cancel between W y and its row sum times x.
    if (output.row_sum_slot >= 0) collect_sum<T, R, true>(to, strip, output.row_sum_slot, ds, 0);
    if (output.column_sum_slot >= 0) {
      collect_sum<T, R, false>(to, strip, output.column_sum_slot, ds, 0);
      columns.add_slot(output.column_sum_slot);
    }
  }
  for (int n = 0; n < pass.item_count; ++n) {
    const Item item = pass.items[n];
    if (item.shared) continue;
    if (item.row >= 0) columns.write_term(pass.terms[item.row], true);
    if (item.column >= 0 && column_terms_sum) columns.write_term(pass.terms[item.column], false);
  }
  if (output.w) columns.write(output.column_sum_slot);
}

}  // namespace

template <class T, class Source, class Out>
Status start_weights(const Pass<T>& pass, const Source& source, const Partials<T>& partials,
                     const WeightsOutput<Out>& output, int row_slots, int column_slots, Stream stream) {
  using Block = Tile<T, kWeightsRows<T>, Source>;
  const int columns = column_slots ? kColumnComponents * kWarps + column_slots : 0;
  const int shared = Block::kSharedBytes + columns * kTileColumns * int(sizeof(T));
  return launch(weights_kernel<T, Source, Out>, int64_t(pass.tiles_b) * pass.tiles_n, shared, stream, pass, source,
                partials, output, row_slots, column_slots);
}

#define FP_INSTANTIATE(T, SOURCE, OUT)                                                                             \
  template Status start_weights(const Pass<T>&, const SOURCE&, const Partials<T>&, const WeightsOutput<OUT>&, int, \
                                int, Stream);
FP_INSTANTIATE(float, PanelSource<float>, float)
FP_INSTANTIATE(float, PanelSource<float>, Half)
FP_INSTANTIATE(float, PanelSource<float>, BFloat16)
FP_INSTANTIATE(double, PanelSource<double>, double)
FP_INSTANTIATE(float, EmbeddingSource<Half>, Half)
FP_INSTANTIATE(float, EmbeddingSource<BFloat16>, BFloat16)

}  // namespace flashpair
